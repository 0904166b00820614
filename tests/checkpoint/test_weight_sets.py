"""Directories with several sets of weights: one is taken whole, the others are named; what is no model is named too."""

import json

import pytest
import torch

from streammerge.checkpoint import open_model
from streammerge.checkpoint.weight_sets import find_sets
from streammerge.errors import ModelError
from tests.formats.safetensors_files import write_model

F32, F16 = ("F32", (2,)), ("F16", (2,))
HF = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
LLAMA = {"mistral.safetensors": F16}


def refusal(reference):
    with pytest.raises(ModelError) as caught:
        open_model(reference)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1000
    return line


# (what lies there, the title of the set that is taken, the titles of the others)
TAKEN = [
    (["model.safetensors", "model.fp16.safetensors"], "model.safetensors", ["model.fp16.safetensors"]),
    (["model.fp16.safetensors"], "model.fp16.safetensors", []),
    (["model.fp16.safetensors", "pytorch_model.bin"], "pytorch_model.bin", ["model.fp16.safetensors"]),
    (["pytorch_model.bin", "pytorch_model.fp16.bin"], "pytorch_model.bin", ["pytorch_model.fp16.bin"]),
    ([*HF, INDEX, "consolidated.safetensors"], INDEX, ["consolidated.safetensors"]),
    ([*HF, "consolidated.safetensors"], f"{HF[0]} … {HF[1]}", ["consolidated.safetensors"]),
    ([HF[0], "consolidated.safetensors"], "consolidated.safetensors", [HF[0]]),
    (["consolidated.safetensors", "pytorch_model.bin"], "consolidated.safetensors", ["pytorch_model.bin"]),
    (["consolidated.safetensors", "tokenizer.json"], "consolidated.safetensors", []),
    ([*HF, INDEX, "model.safetensors"], INDEX, ["model.safetensors"]),
    ([*HF, "model.safetensors"], "model.safetensors", [f"{HF[0]} … {HF[1]}"]),
    (
        ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
        "diffusion_pytorch_model.safetensors",
        ["diffusion_pytorch_model.fp16.safetensors"],
    ),
    (
        [
            "model.fp16-00001-of-00002.safetensors",
            "model.fp16-00002-of-00002.safetensors",
            *HF,
            INDEX,
            "model.safetensors.index.fp16.json",
        ],
        INDEX,
        ["model.safetensors.index.fp16.json"],
    ),
    (
        [
            "diffusion_pytorch_model-00001-of-00001.fp16.safetensors",
            "diffusion_pytorch_model.non_ema.bin",
            "diffusion_pytorch_model.bin",
        ],
        "diffusion_pytorch_model.bin",
        ["diffusion_pytorch_model-00001-of-00001.fp16.safetensors", "diffusion_pytorch_model.non_ema.bin"],
    ),
    (
        [
            "model.safetensors",
            "optimizer.bin",
            "training_args.bin",
            "adapter_model.safetensors",
            ".x.safetensors",
        ],
        "model.safetensors",
        [],
    ),
    (["part-a.safetensors", "part-b.safetensors"], "part-a.safetensors … part-b.safetensors", []),
    (["part-a.safetensors", "model.safetensors"], "model.safetensors", ["part-a.safetensors"]),
    (["sd.safetensors", "sd.fp16.safetensors"], "sd.safetensors", ["sd.fp16.safetensors"]),
    (["optimizer.bin", "scheduler.bin", "notes.txt"], None, []),
]


@pytest.mark.parametrize(("present", "taken", "others"), TAKEN, ids=[str(row[0])[:60] for row in TAKEN])
def test_one_set_is_taken_and_the_others_are_known(present, taken, others):
    for some in (present, present[::-1]):
        titles = [found.title for found in find_sets(some)]
        assert titles[:1] == ([] if taken is None else [taken])
        assert titles[1:] == others


def test_tensors_of_two_sets_are_never_mixed_and_the_other_is_named(tmp_path):
    write_model(tmp_path, {HF[0]: {"a": F32}, HF[1]: {"b": F32}}, {"a": HF[0], "b": HF[1]})
    write_model(tmp_path, {"consolidated.safetensors": {"layers.0": F32}})
    torch.save({"c": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    index = open_model(tmp_path)
    assert set(index) == {"a", "b"}
    (note,) = index.notes
    assert "'consolidated.safetensors', 'pytorch_model.bin'" in note
    assert "'model.safetensors.index.json' is taken" in note


def test_an_index_that_came_without_any_shard_is_in_nobodys_way(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": HF[0]}}))
    assert f"the shard '{HF[0]}' of tensor 'a' is missing" in refusal(tmp_path)
    write_model(tmp_path, {"consolidated.safetensors": {"layers.0": F32}})
    index = open_model(tmp_path)
    assert set(index) == {"layers.0"}
    assert INDEX in index.notes[0]
    write_model(tmp_path, {HF[1]: {"b": F32}})  # With one of its shards it is a download that broke off.
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": HF[0], "b": HF[1]}}))
    assert "is missing: download" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (
            "model-Q4_K_M.gguf",
            "quantised or made for llama.cpp and cannot be merged; use the original safetensors",
        ),
        ("tf_model.h5", "HDF5 files of Keras"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
        ("arrays.npz", "numpy"),
        ("epoch=3.ckpt", "if 'epoch=3.ckpt' is one, write its path itself"),
        ("notes.txt", "no model here: neither"),
    ],
)
def test_what_lies_there_instead_of_a_model_is_named(tmp_path, name, part):
    (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    line = refusal(tmp_path)
    assert part in line
    if name not in ("notes.txt", "epoch=3.ckpt"):
        assert part in refusal(tmp_path / name)


def test_a_gguf_file_under_another_name_is_named(tmp_path):
    for name in ("x.safetensors", "x.bin"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
        assert "a GGUF file, which is quantised" in refusal(tmp_path / name)


def write_indexed(path, names, extra, config=None):
    write_model(path, {HF[0]: dict.fromkeys(names, F32)}, dict.fromkeys((*names, *extra), HF[0]))
    (path / "config.json").write_text(json.dumps(config or {}))


COPIES = [
    (
        ["shared.weight"],
        ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
        {"tie_word_embeddings": False},
    ),
    (["model.shared.weight"], ["model.decoder.embed_tokens.weight", "lm_head.weight"], {}),
    (["transformer.wte.weight"], ["lm_head.weight"], {}),
    (["model.embed_tokens.weight"], ["lm_head.weight"], {"text_config": {"tie_word_embeddings": True}}),
    (
        ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"],
        ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"],
        {},
    ),
    (
        ["roberta.embeddings.word_embeddings.weight", "lm_head.bias"],
        ["lm_head.decoder.weight", "lm_head.decoder.bias"],
        {},
    ),
    (["model.decoder.embed_tokens.weight"], ["proj_out.weight"], {}),
]


@pytest.mark.parametrize(("names", "copies", "config"), COPIES, ids=[row[1][0] for row in COPIES])
def test_an_index_may_list_tied_copies_that_no_shard_has(tmp_path, names, copies, config):
    write_indexed(tmp_path, names, copies, config)
    index = open_model(tmp_path)
    assert set(index) == set(names)
    assert all(f"'{copy}'" in index.notes[0] for copy in copies)


@pytest.mark.parametrize(
    ("names", "lost", "config"),
    [
        (["shared.weight"], "decoder.block.0.layer.0.SelfAttention.q.weight", {}),
        (["model.embed_tokens.weight"], "lm_head.weight", {"tie_word_embeddings": False}),
        (["model.norm.weight"], "lm_head.weight", {}),
        (["model.norm.weight"], "encoder.embed_tokens.weight", {}),
        (["lm_head.weight"], "model.embed_tokens.weight", {}),
    ],
)
def test_a_tensor_that_is_lost_is_refused_by_name(tmp_path, names, lost, config):
    write_indexed(tmp_path, names, [lost], config)
    line = refusal(tmp_path)
    assert f"tensor '{lost}' is not in its shard" in line
    assert INDEX in line


# Paths.


def test_a_missing_directory_is_answered_with_one_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "m" / "llama-math", {"model.safetensors": {"w": F32}})
    line = refusal("m/llama-mth")
    assert (
        "no such directory (did you mean m/llama-math?), and no model of that name in the Hugging Face"
        in line
    )
    assert "if it is a hub name, download it first with `hf download m/llama-mth`" in line
    assert "(did you mean m/Llama-Math?)" not in refusal("m/other")
    assert "did you mean m/llama-math?" in refusal("m/LLAMA-MATH")
    (tmp_path / "a.ckpt").touch()
    assert "no such file (did you mean b/a.ckpt?)" not in refusal("b/a.ckpt")
    assert "aa.ckpt: no such file (did you mean a.ckpt?)" in refusal("aa.ckpt")


def test_a_home_directory_is_written_out_wherever_a_path_stands(tmp_path, monkeypatch):
    from streammerge.checkpoint.companions import open_fisher, open_grams

    monkeypatch.setenv("HOME", str(tmp_path))
    write_model(tmp_path / "f", {"model.safetensors": {"w": F32}})
    assert set(open_fisher("~/f")) == {"w"}
    with pytest.raises(ModelError, match="neither a Zarr store"):
        open_grams("~/f")


def test_all_models_that_have_to_be_downloaded_are_named_at_once(tmp_path, monkeypatch):
    from streammerge import plan

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "here", {"model.safetensors": {"w": F32}})
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("org/a", "here", "org/b@v2")]
    with pytest.raises(ModelError) as caught:
        plan({"merge_method": "linear", "models": models})
    assert "2 models are neither local directories nor in the Hugging Face cache" in str(caught.value)
    assert "`hf download org/a; hf download org/b --revision v2`" in str(caught.value)
