"""Files next to the weights: those that a model needs are copied, the others are named, and no link leads out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streammerge.api import merge, plan, verify
from streammerge.checkpoint import sidecars as beside
from streammerge.checkpoint.sidecar_names import is_editable, is_loaded, is_tokenizer_file
from streammerge.events import Event
from tests.conftest import write_model

TRAVELS = (
    "tokenizer.json",
    "tokenizer.model",
    "spm.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "bpe.codes",
    "dict.txt",
    "normalizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "qwen.tiktoken",
    "vocab-src.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tools.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "audio_config.json",
    "generation_config.json",
    "SYSTEM_PROMPT.txt",
    "params.json",
    "modeling_new.py",
    "configuration_new.py",
    "speakers/en/voice_1.npy",
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "a file nobody knows.xyz",
)
STAYS = (
    "pytorch_model.bin",
    "model.Q4.gguf",
    "model.onnx",
    "onnx/decoder.json",
    "optimizer.pt",
    "rng_state_0.pth",
    "trainer_state.json",
    "training_args.bin",
    "consolidated.safetensors",
    "tf_model.h5",
    "flax_model.msgpack",
    "checkpoint-5/config.json",
    "original/params.json",
    "other/weights.pt",
    "banner.png",
    "mergekit_config.yml",
    "quantize_config.json",
)
SILENT = (
    "README.md",
    ".gitattributes",
    ".cache/x",
    "streammerge.json",
    "streammerge_config.yml",
    "model.safetensors.partial",
)


def put(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}" if name.endswith(".json") else f"of {directory.name}: {name}")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [
        write_model(tmp_path / name, {"model.embed_tokens.weight": torch.full((4, 4), float(i))})
        for i, name in enumerate("ab")
    ]


def config_of(models: list[Path], **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "dtype": "float32",
        **more,
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in models],
    }


def files_of(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def told(models: list[Path]) -> str:
    return "\n".join(plan(config_of(models)).warnings)


MADE = {"README.md", "config.json", "model.safetensors", "streammerge.json", "streammerge_config.yml"}


def test_everything_travels_but_other_formats_and_traces_which_one_warning_names(
    models: list[Path], tmp_path: Path
) -> None:
    put(models[0], *TRAVELS, *STAYS, *SILENT)
    put(models[1], "only_b.json")
    out, events = tmp_path / "out", list[Event]()
    merge(config_of(models), out, on_event=events.append)
    assert files_of(out) == MADE | set(TRAVELS)
    for name in TRAVELS:
        assert (out / name).read_bytes() == (models[0] / name).read_bytes()
    (warning,) = [e.values["message"] for e in events if "not copied" in str(e.values.get("message"))]
    shown = [name.split("/")[0] for name in STAYS if name.split("/")[0] in warning]
    assert len(shown) >= 12
    assert f"and {len({name.split('/')[0] for name in STAYS}) - 12} more" in warning
    assert not [name for name in SILENT if name in warning]
    assert verify(out).problems == ()
    assert merge(config_of(models), out).already_complete


def test_a_file_that_settings_name_travels_whatever_it_looks_like(models: list[Path], tmp_path: Path) -> None:
    (models[0] / "tokenizer_config.json").write_text('{"vocab_file": "words.bin", "other_file": 3}')
    put(models[0], "words.bin", "else.bin")
    merge(config_of(models), tmp_path / "out")
    assert {"words.bin", "tokenizer_config.json"} <= files_of(tmp_path / "out")
    assert "else.bin" in told(models)


def test_the_tokenizer_comes_from_its_source_and_the_rest_from_the_template_model(
    models: list[Path], tmp_path: Path
) -> None:
    for path in models:
        put(path, "spm.model", "SYSTEM_PROMPT.txt", "generation_config.json")
        (path / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "of": path.name})
        )
    put(models[0], "merges.txt")
    out = tmp_path / "out"
    merge(config_of(models, tokenizer_source=str(models[1])), out)
    assert (out / "spm.model").read_text() == "of b: spm.model"
    assert (out / "SYSTEM_PROMPT.txt").read_text() == "of a: SYSTEM_PROMPT.txt"
    assert "merges.txt" not in files_of(out)


def test_a_single_file_of_a_folder_takes_only_tokenizer_and_settings_along(tmp_path: Path) -> None:
    files = []
    for i, name in enumerate("ab"):
        save_file({"w": torch.full((2,), float(i))}, tmp_path / f"{name}.safetensors")
        files.append(tmp_path / f"{name}.safetensors")
    put(tmp_path, "tokenizer.json", "notes.json", "other.txt", "unrelated/x.json", "spm.model")
    merge(config_of(files), tmp_path / "out")
    assert files_of(tmp_path / "out") == MADE - {"config.json"} | {"tokenizer.json", "spm.model"}


def link_out(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def link_in_a_folder(path: Path, secret: Path) -> None:
    path.parent.joinpath("more").mkdir()
    (path.parent / "more" / path.name).symlink_to(secret)


def folder_link(path: Path, secret: Path) -> None:
    (path.parent / "more").symlink_to(secret.parent)


def dangling(path: Path, secret: Path) -> None:
    path.symlink_to(secret.parent / "none")


def a_loop(path: Path, secret: Path) -> None:
    path.symlink_to(path)


def a_pipe(path: Path, secret: Path) -> None:
    os.mkfifo(path)


def false_blob(path: Path, secret: Path) -> None:
    blobs = secret.parent / "blobs"
    blobs.mkdir()
    (blobs / ("0" * 40)).write_text("secret")
    path.symlink_to(blobs / ("0" * 40))


def odd_name(path: Path, secret: Path) -> None:
    (path.parent / "x\x1b[31m.json").write_text("secret")
    (path.parent / os.fsdecode(b"\xff.json")).write_text("secret")


@pytest.mark.parametrize(
    "trick", [link_out, link_in_a_folder, folder_link, dangling, a_loop, a_pipe, false_blob, odd_name]
)
def test_what_leads_out_of_the_folder_or_is_no_file_stays_behind_and_is_named(
    trick: Callable[[Path, Path], None], models: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret.json").write_text("secret")
    trick(models[0] / "prompt.json", tmp_path / "home" / "secret.json")
    out = tmp_path / "out"
    merge(config_of(models), out)
    assert files_of(out) == MADE
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert "not copied to the output" in told(models)


def test_the_blobs_of_a_cache_are_followed(models: list[Path], tmp_path: Path) -> None:
    repository = tmp_path / "models--org--x"
    snapshot, blob = repository / "snapshots" / "1", repository / "blobs" / ("a1" * 20)
    blob.parent.mkdir(parents=True)
    snapshot.parent.mkdir()
    models[0].rename(snapshot)
    blob.write_text("{}")
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").symlink_to(f"../../../blobs/{blob.name}")
    (snapshot / "tekken.json").symlink_to(f"../../blobs/{blob.name}")
    merge(config_of([snapshot, models[1]]), tmp_path / "out")
    assert {"tekken.json", "1_Pooling/config.json"} <= files_of(tmp_path / "out")
    assert not (tmp_path / "out" / "tekken.json").is_symlink()


def test_sizes_and_numbers_of_files_are_bounded(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "LARGEST", 100)
    monkeypatch.setattr(beside, "MOST_BYTES", 150)
    monkeypatch.setattr(beside, "MOST_FILES", 9)
    (models[0] / "a.txt").write_text("x" * 101)
    (models[0] / "b.txt").write_text("x" * 90)
    (models[0] / "c.txt").write_text("x" * 90)
    put(models[0], *(f"many/{i}.txt" for i in range(20)))
    merge(config_of(models), tmp_path / "out")
    assert files_of(tmp_path / "out") == MADE | {"b.txt"}
    assert all(
        word in told(models) for word in ("a.txt (101 B)", "c.txt (too much", "many/ (more than 9 files)")
    )


def test_folders_without_end_are_not_followed_for_ever(models: list[Path], tmp_path: Path) -> None:
    put(models[0], "/".join(["d"] * 40) + "/x.json", "d/y.json")
    merge(config_of(models), tmp_path / "out")
    assert files_of(tmp_path / "out") == MADE | {"d/y.json"}


@pytest.mark.parametrize("path", ["../a", "/etc", "..", "x\0y", "a/b/c/d/e/f/g", 3, None, "x" * 300])
def test_modules_that_lead_elsewhere_are_no_modules(path: object, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path}, 3, {"path": "1_Pooling"}]))
    assert beside.module_folders(tmp_path) == ("1_Pooling",)


@pytest.mark.parametrize("text", ["{}", "[" * 100_000, "\xff", "null", ""])
def test_modules_that_are_no_list_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text, encoding="latin1")
    assert beside.module_folders(tmp_path) == ()


def test_overwriting_removes_what_the_other_merge_took_along(models: list[Path], tmp_path: Path) -> None:
    put(models[0], "spm.model", "1_Pooling/config.json", "deep/er/x.txt")
    out = tmp_path / "out"
    merge(config_of(models), out)
    (out / "deep" / "mine.txt").write_text("mine")
    merge(config_of(models[::-1]), out, overwrite=True)
    assert files_of(out) == MADE | {"deep/mine.txt"}
    assert verify(out).others == ("deep",)


def test_files_in_folders_are_verified(models: list[Path], tmp_path: Path) -> None:
    put(models[0], "1_Pooling/config.json", "1_Pooling/vocab.txt")
    out = tmp_path / "out"
    merge(config_of(models), out)
    (out / "1_Pooling" / "vocab.txt").write_text("of a: 1_Pooling/vocab.tx_")
    (out / "1_Pooling" / "new.py").write_text("")
    (out / "1_Pooling" / "notes").write_text("")
    verdict = verify(out)
    assert [problem.split(":")[0] for problem in verdict.problems] == [
        "1_Pooling/vocab.txt",
        "1_Pooling/new.py",
    ]
    assert verdict.others == ("1_Pooling/notes",)


def test_declarations_of_a_quantisation_stay_behind_where_the_output_has_none(models: list[Path]) -> None:
    put(models[0], "hf_quant_config.json", "quantize_config.json")
    assert "hf_quant_config.json, quantize_config.json" in told(models)


def test_names_are_judged_by_what_they_are() -> None:
    assert all(is_tokenizer_file(name) for name in TRAVELS[:21])
    assert not any(is_tokenizer_file(name) for name in TRAVELS[21:])
    assert is_loaded("config.json")
    assert not any(
        map(
            is_editable,
            ("config.json", "tokenizer.json", "vocab.txt", "model.safetensors", "streammerge.json"),
        )
    )
