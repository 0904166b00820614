"""Configs and models that do not fit are refused with the place and the cure; what is left out is noted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import plan
from streammerge.errors import BudgetError, InputError, ModelError
from tests.conftest import config_for, write_model
from tests.planning.jobs import Change, first, top


def models_of(tmp_path: Path, *models: dict[str, torch.Tensor]) -> list[Path]:
    return [
        write_model(tmp_path / f"model {i}", {name: t.clone() for name, t in tensors.items()})
        for i, tensors in enumerate(models)
    ]


X = torch.ones(4, 6)


ROWS = {"a": X, "b": X}


REFUSED: list[tuple[str, list[dict[str, torch.Tensor]], str]] = [
    (
        "missing in a model",
        [ROWS, ROWS, {"a": X}],
        "model 2: tensor b is missing, .*model 0 has it; list it under `exclude:` to copy it from there",
    ),
    ("several missing", [{**ROWS, "c": X}, ROWS, {"a": X}], "model 1: tensor c is missing"),
    (
        "missing in the base",
        [{"a": X}, ROWS, ROWS],
        "model 0: tensor b is missing, all other models have it; list it under `exclude:` to leave it out",
    ),
    (
        "another vocabulary",
        [ROWS, ROWS, {"a": X, "b": torch.ones(5, 6)}],
        r"tensor b: \[5, 6\] in .*, \[4, 6\] in .*; vocabularies differ: align them with `tokenizer_source: union`",
    ),
    (
        "another shape",
        [ROWS, ROWS, {"a": X, "b": torch.ones(6, 4)}],
        r"tensor b: \[6, 4\] in .*; shapes differ: ",
    ),
    ("same count, another rank", [ROWS, ROWS, {"a": X, "b": torch.ones(24)}], r"tensor b: \[24\] in "),
    (
        "floats against integers",
        [ROWS, ROWS, {"a": X, "b": X.int()}],
        "tensor b: I32 in .*, F32 in .*; these dtypes cannot",
    ),
    (
        "integers against floats",
        [{"a": X, "b": X.int()}, ROWS, ROWS],
        "tensor b: F32 in .*, I32 in .*; these dtypes cannot",
    ),
    (
        "integers of two widths",
        [{"b": X.int()}, {"b": X.int()}, {"b": X.long()}],
        r"tensor b: integer dtypes differ \(I32, I64\); list it under `exclude:`",
    ),
    (
        "a quantised dtype",
        [{"b": X.to(torch.float8_e8m0fnu)}] * 3,
        "tensor b in .* is F8_E8M0, a quantised or complex",
    ),
    (
        "complex numbers",
        [{"b": X.to(torch.complex64)}] * 3,
        "tensor b in .* is C64, a quantised or complex dtype",
    ),
]


def test_a_misspelt_tensor_is_named_with_the_one_that_is_missing(tmp_path: Path) -> None:
    paths = models_of(tmp_path, {"a": X, "net.1.up_proj": X}, {"a": X, "net.1.up_prjo": X})
    said = (
        r"model 1: tensor net\.1\.up_proj is missing, .* or rename net\.1\.up_prjo, which .*model 0 has not"
    )
    with pytest.raises(ModelError, match=said):
        plan(config_for("ties", paths, parameters={"density": 0.5}))


@pytest.mark.parametrize(("tensors", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_tensors_that_do_not_fit_are_refused_with_the_cure(
    tensors: list[dict[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    paths = models_of(tmp_path, *tensors)
    config = config_for("ties", paths, parameters={"density": 0.5})
    with pytest.raises(ModelError, match=message) as caught:
        plan(config, memory="1GiB")
    assert "\n" not in str(caught.value)
    plan(
        {**config, "exclude": ["^b$", "^c$"]} if "a" in tensors[0] else {**config, "exclude": ["b"]},
        memory="1GiB",
    )


def test_a_tensor_that_some_models_have_beyond_the_base_is_left_out_with_a_warning(tmp_path: Path) -> None:
    paths = models_of(tmp_path, {"a": X}, ROWS, {"a": X})
    decided = plan(config_for("ties", paths), memory="1GiB")
    assert [job.name for job in decided.jobs] == ["a"]
    assert any("1 tensor that" in w and "(first: b)" in w for w in decided.warnings)


def test_float_dtypes_that_differ_are_promoted_with_a_warning(tmp_path: Path) -> None:
    paths = models_of(tmp_path, {"a": X.bfloat16()}, {"a": X}, {"a": X.half()})
    decided = plan(config_for("ties", paths), memory="1GiB")
    assert decided.jobs[0].dtype == "F32"
    assert any("1 tensors differ in dtype" in w and "(BF16, F16, F32)" in w for w in decided.warnings)


def key(**keys: Any) -> Change:
    return lambda config: config.update(keys)


WRONG: list[tuple[str, str, Change, str]] = [
    ("a bool weight", "ties", top(weight=True), r"parameters\.weight: 'True' is not a number"),
    ("a bool weight of a model", "ties", first(weight=True), r"models\[0\]\.parameters\.weight: 'True' is not a number"),
    ("text as a weight", "ties", top(weight="half"), "'?half'? is not a number"),
    ("a number as a switch", "ties", top(normalize=2), r"parameters\.normalize: '2' is not true or false"),
    ("an unknown name", "ties", top(densty=0.5), "unknown parameter 'densty' of method 'ties' .did you mean 'density'"),
    ("an unknown name of a model", "ties", first(wieght=1.0),
     r"models\[0\]\.parameters\.wieght: unknown parameter .*did you mean 'weight'"),
    ("a name far from any", "linear", top(qqqq=1), "unknown parameter 'qqqq' of method 'linear' .known: weight, norm"),
    ("a weight for one model only", "ties", first(weight=0.5),
     r"models\[1\]: no weight for tensor .*, but other models have one: give a weight to all or none"),
    ("density above 1", "ties", top(density=1.5), r"parameters\.density: 1\.5 is outside the range \[0, 1\]"),
    ("density below 0", "dare_linear", first(density=-0.1), r"density: -0\.1 is outside the range \[0, 1\]"),
    ("density in percent", "ties", top(density=20), r"20 is outside the range \[0, 1\] \(a fraction: 0\.2 for 20 %\)"),
    ("no t for slerp", "slerp", lambda config: config["models"].__delitem__(slice(1, None)),
     r"^config: parameters: 't' is missing: slerp needs parameters: \{t: 0\.5\} \(0 = the base, 1 = the other model\)$"),
    ("t for some tensors", "slerp", top(t=[{"filter": "mlp", "value": 0.5}]),
     "parameters.t: no filter matches tensor .*: add `- value: …` as the last entry"),
    ("a weight with filters alone", "ties",
     lambda config: [m.update(parameters={"weight": w}) for m, w in zip(
         config["models"], [1, [{"filter": "mlp", "value": 0.5}], 1], strict=True)],
     r"models\[1\]\.parameters\.weight: no filter matches tensor .*: add `- value: …` as the last entry"),
    ("a key of the config among the parameters", "ties", top(dtype="bfloat16"),
     "parameters.dtype: 'dtype' is not a parameter: move it to the top level of the config"),
    ("no base for slerp", "slerp", lambda config: config.pop("base_model"),
     "'slerp' needs one: the first of the two models"),
    ("a choice misspelt", "ties", top(ties="thni"), "'thni' is not one of thin, all, index, drop .did you mean 'thin'"),
    ("a method in capitals", "TIES", key(), "unknown method 'TIES' .did you mean 'ties'"),
    ("a method by another name", "average", key(), "unknown method 'average' .did you mean 'linear'"),
    ("a method by the name of its paper", "model-soup", key(), "unknown method 'model-soup' .did you mean 'linear'"),
    ("a method of one's own without its file", "sign_averaging", key(),
     "unknown method 'sign_averaging' .`streammerge methods` lists them; your own methods need --methods FILE"),
    ("a gradient that leaves the range", "ties", top(density=[0.5, 1.5]), r"density: 1\.\d+ is outside the range|1\.5"),
    ("a shared parameter of one model", "ties", first(normalize=False),
     r"models\[0\]\.parameters\.normalize: 'normalize' is one value for all models: put it under `parameters:`"),
    ("lambda of one model", "task_arithmetic", first(**{"lambda": 0.5}), "'lambda' is one value for all models"),
    ("a preset of one model", "ties", first(preset="paper"), r"models\[0\]\.parameters\.preset: unknown parameter"),
    ("an unknown choice", "ties", top(ties="some"), "'?some'? is not one of thin, all, index, drop"),
    ("an unknown preset", "ties", top(preset="papers"), "'papers' is not a preset of 'ties' .did you mean 'paper'"),
    ("a preset where there is none", "linear", top(preset="paper"), "unknown parameter 'preset' of method 'linear'"),
    ("an unknown method", "tise", key(), "merge_method: unknown method 'tise' .did you mean 'ties'"),
    ("no base", "ties", lambda config: config.pop("base_model"), "base_model: 'ties' needs one: the model that the others were fine-tuned from"),
    ("a base without a weight of its own", "linear",
     lambda config: [config.update(base_model=config["models"].pop()["model"]), *(
         m.update(parameters={"weight": 0.5}) for m in config["models"])],
     "base_model: no weight for tensor .*: set a top-level weight under `parameters:`, or list the base"),
    ("a base of a copy", "passthrough", lambda config: config.update(base_model="/x", models=config["models"][:1]),
     "base_model: 'passthrough' takes no base"),
    ("two models to copy", "passthrough", lambda config: config["models"].append({"model": "/nowhere"}), "nowhere"),
    ("weights that cancel", "linear", top(weight=-1.0), "the weights sum to -3: `linear` divides by their sum"),
    ("a density per layer with one trim", "ties",
     top(trim_scope="model", density=[{"filter": "mlp", "value": 0.5}, {"value": 0.3}]),
     "density differs from other tensors', but `trim_scope: model` trims the model as a whole"),
    ("a negative seed", "ties", key(seed=-1), r"seed: must be an integer from 0 to 2\*\*64 - 1"),
    ("an unknown dtype", "ties", key(dtype="float8"), "dtype: .*float8.* is not one of"),
    ("a key of the future", "ties", key(slices=[]), "slices"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "change", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_config_is_refused_with_the_place_and_the_cure(
    method: str, change: Change, message: str, make_models: Callable[..., list[Path]]
) -> None:
    config = config_for(method, make_models(shapes={"a.mlp": (4, 4), "b": (4,), "layers.0.x": (2,)}))
    change(config)
    with pytest.raises(InputError, match=message) as caught:
        plan(config, memory="1GiB")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_parameter_without_effect_is_noted_not_refused(make_models: Callable[..., list[Path]]) -> None:
    config = config_for("ties", make_models(shapes={"w": (4,)}), parameters={"int8_mask": True})
    assert any("int8_mask: ignored" in warning for warning in plan(config, memory="1GiB").warnings)


def test_too_little_memory_is_refused_with_both_numbers(make_models: Callable[..., list[Path]]) -> None:
    config = config_for("linear", make_models(shapes={"w": (4,)}))
    with pytest.raises(BudgetError, match=r"--memory 100 MiB is too little: .* give at least \d+ MiB"):
        plan(config, memory="100MiB")
