"""Slices and modules: layers stacked anew, each merged from its own sources, as mergekit's configs say it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge, plan
from streammerge.errors import ConfigError, InputError
from tests.conftest import output_bytes, read_tensors, write_model

LAYER = {"self_attn.q_proj.weight": (8, 8), "mlp.up_proj.weight": (16, 8), "input_layernorm.weight": (8,)}
Models = Callable[..., dict[str, Path]]


def llama(seed: int, n_layers: int, prefix: str = "model.layers") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,), "lm_head.weight": (32, 8)}
    shapes |= {f"{prefix}.{i}.{rest}": shape for i in range(n_layers) for rest, shape in LAYER.items()}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Four llamas: a and b of four layers, c of six, and the base of a and b."""
    paths = {}
    for seed, (name, n_layers) in enumerate({"base": 4, "a": 4, "b": 4, "c": 6}.items()):
        paths[name] = write_model(tmp_path / name, llama(seed, n_layers))
        config = {"model_type": "llama", "num_hidden_layers": n_layers, "torch_dtype": "bfloat16"}
        (paths[name] / "config.json").write_text(json.dumps(config))
    return paths


def source(path: Path, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"model": str(path), "layer_range": [first, end]}
    return {**entry, "parameters": parameters} if parameters else entry


def merged(config: Mapping[str, Any], out: Path, **options: Any) -> dict[str, torch.Tensor]:
    merge(config, out, **options)
    return read_tensors(out)


def layer(tensors: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    start = f"model.layers.{number}."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_layers_of_two_models_are_stacked(models: dict[str, Path], tmp_path: Path) -> None:
    config = {
        "merge_method": "passthrough",
        "slices": [{"sources": [source(models["a"], 0, 3)]}, {"sources": [source(models["c"], 2, 6)]}],
    }
    found = merged(config, tmp_path / "out")
    a, c = (read_tensors(models[name]) for name in "ac")
    for number in range(7):
        assert_same(layer(found, number), layer(a, number) if number < 3 else layer(c, number - 1))
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], c["model.norm.weight"])
    assert torch.equal(found["lm_head.weight"], c["lm_head.weight"])
    assert len(found) == 3 + 7 * len(LAYER)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 7


def test_a_last_slice_without_layers_says_norm_and_head_and_a_first_one_the_embedding(
    models: dict[str, Path], tmp_path: Path
) -> None:
    a, b, base = (read_tensors(models[name]) for name in ("a", "b", "base"))
    part = {"sources": [source(models["a"], 0, 4), source(models["base"], 0, 4)]}
    slices = [{"sources": [source(models["b"], 0, 0)]}, part, {"sources": [source(models["b"], 4, 4)]}]
    config = {
        "merge_method": "slerp",
        "base_model": str(models["base"]),
        "parameters": {"t": 0.5},
        "slices": slices,
    }
    found = merged(config, tmp_path / "out")
    plain = merged({**config, "slices": [part]}, tmp_path / "plain")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(found[name], b[name])
        assert not torch.equal(plain[name], b[name])
    for number in range(4):
        assert_same(layer(found, number), layer(plain, number))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
    both = {"sources": [source(models["a"], 4, 4, weight=0.25), source(models["b"], 4, 4, weight=0.75)]}
    config = {
        "merge_method": "linear",
        "slices": [{"sources": [source(models["a"], 0, 4)]}, both],
        "dtype": "float32",
    }
    head = merged(config, tmp_path / "both")["lm_head.weight"]
    torch.testing.assert_close(head, 0.25 * a["lm_head.weight"].float() + 0.75 * b["lm_head.weight"].float())
    assert base.keys() == found.keys()


def test_a_slice_without_layers_in_the_middle_is_ignored_with_a_word(models: dict[str, Path]) -> None:
    parts = [{"sources": [source(models["a"], *layers)]} for layers in ((0, 2), (3, 3), (2, 4))]
    decided = plan({"merge_method": "passthrough", "slices": parts})
    assert any("slices[1]: ignored: a slice without layers" in warning for warning in decided.warnings)
    decided = plan({"merge_method": "passthrough", "slices": [parts[0], parts[2]]})
    assert not any("ignored" in warning for warning in decided.warnings)


def test_one_layer_repeated_is_read_as_often(models: dict[str, Path], tmp_path: Path) -> None:
    config = {"merge_method": "passthrough", "slices": [{"sources": [source(models["a"], 1, 2)]}] * 3}
    found, a = merged(config, tmp_path / "out"), read_tensors(models["a"])
    for number in range(3):
        assert_same(layer(found, number), layer(a, 1))


def test_slices_of_whole_models_are_the_same_merge_as_the_models(
    models: dict[str, Path], tmp_path: Path
) -> None:
    names = ["a", "b"]
    parameters = {"density": 0.4, "weight": [0.2, 1.0], "normalize": True}
    common = {"merge_method": "ties", "base_model": str(models["base"]), "parameters": parameters}
    whole = merged({**common, "models": [{"model": str(models[n])} for n in names]}, tmp_path / "whole")
    sources = [source(models[n], 0, 4) for n in names]
    sliced = merged({**common, "slices": [{"sources": sources}]}, tmp_path / "sliced")
    assert_same(whole, sliced)
    listed = [source(models["base"], 0, 4), *sources]
    assert_same(whole, merged({**common, "slices": [{"sources": listed}]}, tmp_path / "listed"))


def test_each_slice_has_sources_and_parameters_of_its_own(models: dict[str, Path], tmp_path: Path) -> None:
    config = {
        "merge_method": "linear",
        "parameters": {"weight": 9.0},
        "slices": [
            {"sources": [source(models["a"], 0, 2, weight=3.0), source(models["b"], 2, 4, weight=1.0)]},
            {"sources": [source(models["c"], 4, 6)], "parameters": {"weight": 5.0, "normalize": False}},
        ],
    }
    found = merged(config, tmp_path / "out")
    a, b, c = (read_tensors(models[name]) for name in "abc")
    for number in range(2):
        for rest, tensor in layer(found, number).items():
            one, two = layer(a, number)[rest].double(), layer(b, number + 2)[rest].double()
            assert torch.equal(tensor, ((3 * one + two) / 4).bfloat16()), (number, rest)
    for number in range(2):
        for rest, tensor in layer(found, number + 2).items():
            assert torch.equal(tensor, (5 * layer(c, number + 4)[rest].double()).bfloat16())
    # Outside of the layers: the first slice's on the input side, the last slice's on the other.
    embedding = "model.embed_tokens.weight"
    assert torch.equal(found[embedding], ((3 * a[embedding].double() + b[embedding].double()) / 4).bfloat16())
    assert torch.equal(found["lm_head.weight"], (5 * c["lm_head.weight"].double()).bfloat16())


def test_a_gradient_runs_over_the_layers_of_its_slice(models: dict[str, Path], tmp_path: Path) -> None:
    config = {
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "slices": [
            {"sources": [source(models["c"], 0, 3, weight=[1.0, 3.0])]},
            {"sources": [source(models["c"], 3, 4, weight=[1.0, 3.0])]},
        ],
    }
    found, c = merged(config, tmp_path / "out"), read_tensors(models["c"])
    for number, weight in enumerate([1.0, 2.0, 3.0, 3.0]):
        for rest, tensor in layer(found, number).items():
            assert torch.equal(tensor, (weight * layer(c, number)[rest].double()).bfloat16())
    assert torch.equal(found["model.norm.weight"], c["model.norm.weight"])  # the first point


def test_filters_of_a_model_see_its_own_names_and_shared_ones_the_outputs(
    models: dict[str, Path], tmp_path: Path
) -> None:
    own = [{"filter": "layers.4.", "value": 2.0}, {"value": 1.0}]
    shared = [{"filter": "layers.0.", "value": 4.0}, {"value": 1.0}]
    plain = {"merge_method": "linear", "parameters": {"normalize": False}}
    slices = [{"sources": [source(models["c"], 4, 6, weight=own)]}]
    config: dict[str, Any] = {**plain, "slices": slices}
    c = read_tensors(models["c"])
    found = merged(config, tmp_path / "own")
    assert torch.equal(
        found["model.layers.0.input_layernorm.weight"], 2 * c["model.layers.4.input_layernorm.weight"]
    )
    config = {**plain, "slices": [{"sources": [source(models["c"], 4, 6)], "parameters": {"weight": shared}}]}
    found = merged(config, tmp_path / "shared")
    assert torch.equal(
        found["model.layers.0.input_layernorm.weight"], 4 * c["model.layers.4.input_layernorm.weight"]
    )
    assert_same(layer(found, 1), layer(c, 5))


@pytest.mark.parametrize("reference", ["config", "slice"])
def test_the_base_may_have_layers_of_its_own_in_a_slice(
    reference: str, models: dict[str, Path], tmp_path: Path
) -> None:
    part: dict[str, Any] = {"sources": [source(models["base"], 0, 2), source(models["c"], 4, 6)]}
    config: dict[str, Any] = {"merge_method": "slerp", "parameters": {"t": 0.0}, "slices": [part]}
    (config if reference == "config" else part)["base_model"] = str(models["base"])
    found, base = merged(config, tmp_path / "out"), read_tensors(models["base"])
    for number in range(2):
        assert_same(layer(found, number), layer(base, number))
    config["parameters"] = {"t": 1.0}
    assert_same(layer(merged(config, tmp_path / "end"), 1), layer(read_tensors(models["c"]), 5))


def test_a_slice_of_the_base_alone_is_copied(models: dict[str, Path], tmp_path: Path) -> None:
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(models["base"]),
        "slices": [
            {"sources": [source(models["base"], 0, 2)]},
            {"sources": [source(models["base"], 2, 4), source(models["a"], 2, 4, weight=1.0)]},
        ],
    }
    found = merged(config, tmp_path / "out")
    base, a = read_tensors(models["base"]), read_tensors(models["a"])
    assert_same(layer(found, 1), layer(base, 1))
    for rest, tensor in layer(found, 3).items():
        delta = layer(a, 3)[rest].float() - layer(base, 3)[rest].float()
        assert torch.equal(tensor, (layer(base, 3)[rest].double() + delta.double()).bfloat16())


def test_random_masks_follow_the_model_not_its_place_in_a_slice(
    models: dict[str, Path], tmp_path: Path
) -> None:
    common = {"merge_method": "dare_linear", "base_model": str(models["base"]), "seed": 3}
    a, b = (source(models[n], 0, 4, weight=1.0, density=0.5) for n in "ab")
    first = merged({**common, "slices": [{"sources": [a, b]}]}, tmp_path / "ab")
    second = merged({**common, "slices": [{"sources": [b, a]}]}, tmp_path / "ba")
    assert_same(first, second)
    half_b = source(models["b"], 0, 2, weight=1.0, density=0.5)
    rest_a = source(models["a"], 2, 4, weight=1.0, density=0.5)
    apart = {**common, "slices": [{"sources": [half_b]}, {"sources": [rest_a]}]}
    alone = {**common, "slices": [{"sources": [a]}]}
    assert_same(layer(merged(apart, tmp_path / "apart"), 3), layer(merged(alone, tmp_path / "alone"), 3))
    report = json.loads((tmp_path / "apart" / "streammerge.json").read_text())["densities"]
    assert [entry["model"] for entry in report] == [0, 1]
    assert all(0.4 < entry["density"] * 2 < 1.2 for entry in report)


def test_memory_and_threads_change_no_byte_of_a_stack(
    models: dict[str, Path], tmp_path: Path, small_capacity: Callable[[int, int], None]
) -> None:
    slices = [
        {"sources": [source(models["a"], 0, 3), source(models["b"], 1, 4)]},
        {"sources": [source(models["a"], 0, 4), source(models["c"], 2, 6)]},
    ]
    config = {
        "merge_method": "dare_ties",
        "base_model": str(models["base"]),
        "slices": slices,
        "parameters": {"density": 0.5, "weight": 0.7},
    }
    merge(config, tmp_path / "one")
    small_capacity(300_000, 3)
    merge(config, tmp_path / "two")
    assert output_bytes(tmp_path / "one") == output_bytes(tmp_path / "two")


WRONG: list[tuple[str, Callable[[dict[str, Path]], dict[str, Any]], str]] = [
    ("a range beyond the layers", lambda m: {"slices": [{"sources": [source(m["a"], 2, 5)]}]},
     r"slices\[0\]\.sources\[0\]\.layer_range: \[2, 5\] ends beyond the 4 layers of .*a"),
    ("two sources to copy", lambda m: {"slices": [{"sources": [source(m["a"], 0, 2), source(m["b"], 0, 2)]}]},
     r"slices\[0\]\.sources: 'passthrough' takes exactly 1; the config has 2"),
    ("an unknown parameter", lambda m: {"slices": [{"sources": [source(m["a"], 0, 2, scale_=1.0)]}]},
     r"slices\[0\]\.sources\[0\]\.parameters\.scale_: unknown parameter"),
    ("an unknown parameter of a slice",
     lambda m: {"slices": [{"sources": [source(m["a"], 0, 2)], "parameters": {"wieght": 1}}]},
     r"slices\[0\]\.parameters\.wieght: unknown parameter"),
    ("a preset of a slice",
     lambda m: {"merge_method": "ties", "base_model": str(m["base"]),
                "slices": [{"sources": [source(m["a"], 0, 2)], "parameters": {"preset": "paper"}}]},
     r"slices\[0\]\.parameters\.preset: unknown parameter"),
    ("a trim of whole models over different models",
     lambda m: {"merge_method": "ties", "base_model": str(m["base"]),
                "parameters": {"density": 0.5, "trim_scope": "model"},
                "slices": [{"sources": [source(m["a"], 0, 2)]}, {"sources": [source(m["b"], 2, 4)]}]},
     "comes from a different set of models; `trim_scope: model`"),
    ("a module that is none", lambda m: {"modules": {"vision_tower": {"models": [str(m["a"])]}}},
     "modules.vision_tower: no tensor of .* belongs to this module: the model's names begin with lm_head, model"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_wrong_slice_is_refused_with_the_place(
    make: Callable[[dict[str, Path]], dict[str, Any]], message: str, models: dict[str, Path]
) -> None:
    with pytest.raises(InputError, match=message):
        plan({"merge_method": "passthrough", **make(models)}, memory="1GiB")


# --- several stacks of layers


def vision_language(seed: int) -> dict[str, torch.Tensor]:
    text = {name.replace("model.", "model.language_model.", 1): t for name, t in llama(seed, 3).items()}
    generator = torch.Generator().manual_seed(seed + 100)
    sizes = {f"model.vision_tower.encoder.layers.{i}.w": (4, 4) for i in range(2)}
    sizes["model.multi_modal_projector.linear_1.weight"] = (8, 4)
    return text | {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}


@pytest.fixture
def vlms(tmp_path: Path) -> dict[str, Path]:
    """Two vision-language models."""
    paths = {}
    for seed, name in enumerate("xy"):
        paths[name] = write_model(tmp_path / name, vision_language(seed))
        config = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 2}}
        (paths[name] / "config.json").write_text(json.dumps(config))
    return paths


def test_slices_of_a_model_with_several_stacks_need_modules(vlms: dict[str, Path]) -> None:
    config = {"merge_method": "passthrough", "slices": [{"sources": [source(vlms["x"], 0, 2)]}]}
    with pytest.raises(ConfigError, match=r"has 2 \(model.language_model.layers, .*under `modules:`"):
        plan(config, memory="1GiB")


def test_each_module_is_merged_by_itself(vlms: dict[str, Path], tmp_path: Path) -> None:
    config = {
        "merge_method": "linear",
        "modules": {
            "text_decoder": {
                "slices": [{"sources": [source(vlms["x"], 0, 2)]}, {"sources": [source(vlms["y"], 0, 3)]}]
            },
            "vision_tower": {
                "models": [
                    {"model": str(vlms["x"]), "parameters": {"weight": 3.0}},
                    {"model": str(vlms["y"]), "parameters": {"weight": 1.0}},
                ]
            },
            "multi_modal_projector": {"models": [str(vlms["y"])]},
        },
    }
    found = merged(config, tmp_path / "out")
    x, y = read_tensors(vlms["x"]), read_tensors(vlms["y"])
    text = "model.language_model.layers"
    for number in range(5):
        expected, own = (x, number) if number < 2 else (y, number - 2)
        for rest in LAYER:
            assert torch.equal(found[f"{text}.{number}.{rest}"], expected[f"{text}.{own}.{rest}"])
    name = "model.vision_tower.encoder.layers.1.w"
    assert torch.equal(found[name], ((3 * x[name].double() + y[name].double()) / 4).bfloat16())
    name = "model.multi_modal_projector.linear_1.weight"
    assert torch.equal(found[name], y[name])
    assert torch.equal(found["lm_head.weight"], y["lm_head.weight"])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["text_config"]["num_hidden_layers"] == 5
    assert settings["vision_config"]["num_hidden_layers"] == 2


def test_what_belongs_to_no_module_is_left_out_and_said(vlms: dict[str, Path]) -> None:
    config = {
        "merge_method": "linear",
        "modules": {"text_decoder": {"models": [str(vlms["x"]), str(vlms["y"])]}},
    }
    made = plan(config, memory="1GiB")
    assert any("3 tensors of" in line and "belong to no module" in line for line in made.warnings)
    assert not any("vision" in job.name for job in made.jobs)
