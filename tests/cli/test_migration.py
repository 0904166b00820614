"""Scripts and configs written for mergekit work: its options, and the keys of its configs outside the schema."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from streammerge.api import merge, plan
from streammerge.cli.extracting import extract_lora
from streammerge.cli.merging import merge as merge_command
from streammerge.errors import ConfigError, InputError
from streammerge.report.card import model_card
from tests.cli.running import Cli, assert_refused, write_config
from tests.conftest import config_for, output_bytes, read_tensors

FEW = {
    "embed.weight": (40, 8),
    "layers.0.mlp.weight": (16, 12),
    "layers.1.mlp.weight": (16, 12),
    "norm": (8,),
}
Make = Callable[..., list[Path]]


@pytest.fixture
def paths(make_models: Make) -> list[Path]:
    paths = make_models(shapes=FEW)
    for path in paths:
        (path / "tokenizer.json").write_text("{}")
        (path / "generation_config.json").write_text("{}")
    return paths


@pytest.fixture
def config(paths: list[Path], tmp_path: Path) -> Path:
    return write_config(tmp_path / "c.yml", config_for("dare_ties", paths, parameters={"density": 0.5}))


# --- options of mergekit-yaml


def test_the_options_of_a_script_for_mergekit_are_taken_and_the_needless_ones_named(
    cli: Cli, config: Path, tmp_path: Path
) -> None:
    plain = cli("merge", config, tmp_path / "plain", "--seed", 7)
    run = cli(
        "merge",
        config,
        tmp_path / "out",
        "--copy-tokenizer",
        "--no-cuda",
        "--allow-crimes",
        "--lazy-unpickle",
        "--low-cpu-memory",
        "--out-shard-size",
        "1B",
        "--random-seed",
        7,
        "-j",
        2,
        "--trust-remote-code",
        "-vv",
        "--lora-merge-cache",
        "/tmp/x",
        "--write-threads",
        4,
        "--async-write",
        "--clone-tensors",
        "--no-read-to-gpu",
        "--safe-serialization",
        "--write-model-card",
        "--no-quiet",
    )
    assert (plain.code, run.code) == (0, 0), run.err
    told = {line.split(":")[1].strip() for line in run.err.splitlines() if line.startswith("warning: --")}
    assert told == {
        "--allow-crimes",
        "--trust-remote-code",
        "--lora-merge-cache",
        "--low-cpu-memory",
        "--lazy-unpickle",
        "--clone-tensors",
        "--async-write",
        "--write-threads",
        "--verbose",
    }
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "plain")


def test_shards_are_counted_as_mergekit_counts_them(cli: Cli, config: Path, tmp_path: Path) -> None:
    for size, n in (("1k", 2), ("1m", 1), ("1KiB", 2)):
        assert cli("merge", config, tmp_path / size, "--out-shard-size", size).code == 0
        assert len(list((tmp_path / size).glob("model*.safetensors"))) == n


def test_an_output_without_tokenizer_and_model_card(cli: Cli, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("merge", config, out, "--no-copy-tokenizer", "--no-write-model-card").code == 0
    names = {path.name for path in out.iterdir()}
    assert "generation_config.json" in names
    assert not {"tokenizer.json", "README.md"} & names
    assert cli("verify", out).code == 0
    assert_refused(cli("merge", config, out), "left out")


def test_options_that_contradict_or_ask_for_what_is_not_done_are_refused(
    cli: Cli, config: Path, tmp_path: Path
) -> None:
    for options, word in (
        (("--seed", 1, "--random-seed", 2), "--random-seed"),
        (("--no-safe-serialization",), "safetensors"),
        (("--unsafe-truncate-embeddings",), "source: base"),
        (("--out-shard-size", "-5B"), "size"),
    ):
        run = cli("merge", config, tmp_path / "out", *options)
        assert run.code == 2, options
        assert word in run.err
        assert not (tmp_path / "out").exists()


def test_the_cache_of_models_may_be_named(
    cli: Cli, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    repo = tmp_path / "cache" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    os.rename(paths[1], repo / "snapshots" / ("0" * 40))
    config = write_config(
        tmp_path / "c.yml", {"merge_method": "passthrough", "models": [{"model": "org/name"}]}
    )
    assert cli("merge", config, tmp_path / "out").code == 2
    assert cli("merge", config, tmp_path / "out", "--transformers-cache", tmp_path / "cache").code == 0


def test_every_option_in_the_guide_is_one_of_the_command(cli: Cli) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "use" / "from-mergekit.md").read_text()
    named = set(re.findall(r"`(--?[a-z][a-z-]*)`", guide))
    options = [*merge_command.params, *extract_lora.params]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    known |= {
        "--embed-lora",
        "--save-module",
        "--skip-undecomposable",
    }  # mergekit's, which the guide translates
    assert len(named) > 25
    assert named <= known


# --- configs as they are published


def warnings_for(config: Any) -> str:
    return "\n".join(plan(config, memory="1GiB").warnings)


def test_parameters_of_other_methods_change_nothing_and_are_named(paths: list[Path], tmp_path: Path) -> None:
    plain = config_for("model_stock", paths)
    weighed = {
        **plain,
        "models": [{**model, "parameters": {"weight": [1, 2]}} for model in plain["models"]],
        "parameters": {"int8_mask": True, "normalize": True},
    }
    assert warnings_for(weighed).count("ignored: model_stock has no 'weight'") == 3
    for config, name in ((plain, "a"), (weighed, "b")):
        merge(config, tmp_path / name)
    one, other = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ConfigError, match="unknown parameter 'weigth'"):
        plan({**plain, "parameters": {"weigth": 1}})


def test_numbers_for_booleans_and_exponents_without_a_point(paths: list[Path], tmp_path: Path) -> None:
    text = (
        yaml.safe_dump(config_for("ties", paths))
        + "parameters: {normalize: 1.0, lambda: 5e-1, int8_mask: 1.0}\n"
    )
    (job,) = (
        job for job in plan(write_config(tmp_path / "c.yml", text)).jobs if job.name == "layers.0.mlp.weight"
    )
    assert job.parameters["normalize"] is True
    assert job.parameters["lambda"] == 0.5
    for wrong in ("2", "0.5", "'yes'"):
        with pytest.raises(ConfigError, match="not true or false"):
            plan(write_config(tmp_path / "w.yml", text.replace("normalize: 1.0", f"normalize: {wrong}")))
    with pytest.raises(ConfigError, match="not a finite number"):
        plan(write_config(tmp_path / "w.yml", text.replace("5e-1", "1e999")))


def test_the_names_of_stages_are_taken_with_a_note(paths: list[Path]) -> None:
    told = warnings_for({**config_for("linear", paths), "name": "first", "out_path": "x"})
    assert "name: ignored" in told
    assert "out_path: ignored" in told
    with pytest.raises(InputError, match="unknown key 'nmae'"):
        plan({**config_for("linear", paths), "nmae": "first"})


def test_dtypes_that_differ_are_no_surprise_where_the_config_says_the_output_s(paths: list[Path]) -> None:
    file = paths[1] / "model.safetensors"
    save_file({name: t.float() if t.is_floating_point() else t for name, t in load_file(file).items()}, file)
    plain = config_for("linear", paths)
    assert "differ in dtype" in warnings_for(plain)
    assert "differ in dtype" not in warnings_for({**plain, "dtype": "bfloat16"})


# --- what lies beside the weights


def test_code_that_a_config_asks_for_is_named_and_copied_as_data(paths: list[Path], tmp_path: Path) -> None:
    asks = {
        "model_type": "x",
        "auto_map": {"AutoModel": "modeling_x.X", "AutoConfig": ["conf.C", None], "A": "org/repo--m.X"},
    }
    (paths[1] / "config.json").write_text(json.dumps(asks))
    (paths[1] / "modeling_x.py").write_text("raise SystemExit")
    config = {"merge_method": "linear", "models": [{"model": str(path)} for path in paths[1:]]}
    told = warnings_for(config)
    assert "auto_map refers to Python code (conf.py, modeling_x.py): conf.py is missing in" in told
    assert "Python code of org/repo on the hub" in told
    merge(config, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_x.py").read_text() == "raise SystemExit"


def test_the_model_card_names_every_model_the_method_and_its_paper(paths: list[Path]) -> None:
    card = model_card(plan({**config_for("ties", paths), "base_model": f"{paths[0]}"}))
    assert all(f"- `{name}`" in card for name in ("m1", "m2", "m3"))
    assert "- `base` (base)" in card
    assert "`ties` (Yadav et al. 2023, https://arxiv.org/abs/2306.01708)" in card
    assert "merge_method: ties" in card
