"""Every method, element by element, against the float64 reference of `tests.methods.reference`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.api import merge
from tests.conftest import as_float64, config_for
from tests.methods import reference

SHAPES = {
    "a.weight": (90, 130),
    "b.layers.0.weight": (37, 111),
    "b.layers.1.weight": (4097,),
    "c.norm": (64,),
    "d.scalar": (),
}
WEIGHTS = (1.0, 0.5, 0.75)
SEED = 11
ALIASES = ("first", "second", "third")

Case = tuple[str, dict[str, Any]]
CASES: list[Case] = [
    ("linear", {}),
    ("linear", {"normalize": False}),
    ("task_arithmetic", {"lambda": 0.7}),
    ("task_arithmetic", {"normalize": True}),
    ("ties", {"density": 0.2}),
    ("ties", {"density": 0.2, "ties": "all", "lambda": 1.3}),
    ("ties", {"density": 0.2, "ties": "drop"}),
    ("ties", {"density": 0.2, "ties": "index"}),
    ("ties", {"density": 0.3, "trim_scope": "model"}),
    ("ties", {"density": 0.3, "trim_scope": "model", "ties": "all"}),
    ("ties", {"density": 0.3, "trim_scope": "model", "ties": "index"}),
    ("ties", {"density": 0.3, "trim_scope": "model", "ties": "drop"}),
    ("ties", {"density": 0.2, "trim_scope": "model", "ties": "all", "count": "floor+1", "zero_sign": "majority"}),
    ("ties", {"density": 0.2, "ties": "index", "zero_sign": "positive"}),
    ("ties", {"density": 0.4, "zero_sign": "majority", "normalize": False}),
    ("ties", {"density": 0.4, "rescale": "l1"}),
    ("ties", {"density": 0.4, "rescale": "l1", "trim_scope": "model", "ties": "index"}),
    ("dare_linear", {"density": 0.3}),
    ("dare_linear", {"density": 0.5, "rescale": "l1", "normalize": True}),
    ("dare_linear", {"density": 0.5, "rescale": "none"}),
    ("dare_ties", {"density": 0.3}),
    ("dare_ties", {"density": 0.5, "zero_sign": "majority", "normalize": True}),
    ("dare_ties", {"density": 0.5, "rescale": "l1", "zero_sign": "positive"}),
]  # fmt: skip


def run_both(
    method: str,
    parameters: dict[str, Any],
    paths: list[Path],
    out: Path,
    double: bool = False,
    weights: tuple[float, ...] = WEIGHTS,
    densities: tuple[float, ...] | None = None,
) -> tuple[dict[str, np.ndarray], reference.Merged, list[int]]:
    """Merge with the product and with the reference; also return the product's kept counts."""
    aliases = ALIASES[: len(weights)]
    models = [
        {"model": str(path), "alias": alias, "parameters": {"weight": weight}}
        for path, alias, weight in zip(paths[1:], aliases, weights, strict=True)
    ]
    if densities is not None:
        for model, density in zip(models, densities, strict=True):
            model["parameters"] |= {"density": density}  # type: ignore[operator]
    merge(config_for(method, paths, models=models, parameters=parameters, seed=SEED), out, memory="1GiB")
    found = json.loads((out / "streammerge.json").read_text())["densities"]
    base, *tensors = (as_float64(path) for path in paths)
    if densities is None:
        densities = (parameters.get("density", 1.0),) * len(tensors)
    random = {"seed": SEED, "aliases": aliases}
    common: dict[str, Any] = {"lam": parameters.get("lambda", 1.0), "double": double}
    if method == "linear":
        expected = reference.linear(tensors, weights, parameters.get("normalize", True))
    elif method == "task_arithmetic":
        common["normalize"] = parameters.get("normalize", False)
        expected = reference.task_arithmetic(base, tensors, weights, **common)
    elif method == "ties":
        expected = reference.ties(
            base,
            tensors,
            weights,
            densities,
            **common,
            **random,
            normalize=parameters.get("normalize", True),
            scope=parameters.get("trim_scope", "tensor"),
            plus_one=parameters.get("count") == "floor+1",
            policy=parameters.get("ties", "thin"),
            zero_sign=parameters.get("zero_sign", "zero"),
            l1=parameters.get("rescale") == "l1",
        )
    else:
        expected = reference.dare(
            base,
            tensors,
            weights,
            densities,
            **common,
            **random,
            elect=method == "dare_ties",
            normalize=parameters.get("normalize", False),
            rescale=parameters.get("rescale", "paper"),
            zero_sign=parameters.get("zero_sign", "zero"),
        )
    return as_float64(out), expected, [entry["kept"] for entry in found]


def assert_equal_to_the_last_bit_but_ties(
    merged: dict[str, np.ndarray], expected: reference.Merged, name: str, bound: float = 0.501
) -> None:
    assert merged.keys() == expected.theta.keys()
    for tensor, values in merged.items():
        error = reference.ulp_error(values, expected.theta[tensor], expected.size[tensor], name)
        assert error.max(initial=0.0) <= bound, (
            tensor,
            error.max(),
            np.unravel_index(error.argmax(), error.shape),
        )


@pytest.mark.parametrize(("method", "parameters"), CASES)
@pytest.mark.parametrize(
    ("dtype", "spread"),
    [(torch.float32, 1e-3), (torch.bfloat16, 1e-3), (torch.bfloat16, 1e-4), (torch.float16, 1e-3)],
    ids=["continuous fp32", "bf16 lattice", "bf16 lattice with many ties", "fp16"],
)
def test_a_merge_is_the_reference_rounded_once(
    method: str,
    parameters: dict[str, Any],
    dtype: torch.dtype,
    spread: float,
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
) -> None:
    paths = make_models(dtype=dtype, spread=spread, shapes=SHAPES)
    merged, expected, kept = run_both(method, parameters, paths, tmp_path / "out")
    if expected.masks:
        assert kept == expected.kept
    assert_equal_to_the_last_bit_but_ties(merged, expected, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_fp64_models_are_merged_in_fp64(
    method: str, parameters: dict[str, Any], make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(dtype=torch.float64, shapes={"a.weight": (33, 65), "b": (64,), "c": ()})
    merged, expected, kept = run_both(method, parameters, paths, tmp_path / "out", double=True)
    if expected.masks:
        assert kept == expected.kept
    for name, values in merged.items():  # both sides round at every step
        error = np.abs(values - expected.theta[name])
        assert (error <= 8 * reference.ulp(expected.size[name], "float64")).all()


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_every_model_has_its_own_density_and_sign_of_weight(
    scope: str, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(spread=2e-4, shapes=SHAPES)
    merged, expected, kept = run_both(
        "ties",
        {"trim_scope": scope, "normalize": False},
        paths,
        tmp_path / "ties",
        weights=(1.0, -0.5, 2.0),
        densities=(0.1, 1.0, 0.5),
    )
    assert kept == expected.kept
    assert_equal_to_the_last_bit_but_ties(merged, expected, "bfloat16")
    merged, expected, kept = run_both(
        "dare_linear", {}, paths, tmp_path / "dare", weights=(1.0, -0.5, 2.0), densities=(0.0, 1.0, 0.25)
    )
    assert kept == expected.kept
    assert kept[0] == 0
    assert_equal_to_the_last_bit_but_ties(merged, expected, "bfloat16")


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_thin_keeps_all_above_none_below_and_the_right_fraction_of_ties(
    scope: str, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    # One model without a second to elect against: what survives is visible in the output.
    paths = make_models(
        n_models=1, dtype=torch.bfloat16, spread=1e-4, shapes={"a": (600, 100), "b": (50, 80)}
    )
    merged, expected, kept = run_both(
        "ties", {"density": 0.2, "trim_scope": scope}, paths, tmp_path / "out", weights=(1.0,)
    )
    base, tuned = as_float64(paths[0]), as_float64(paths[1])
    tensors = sorted(base) if scope == "tensor" else ["a"]
    for place, name in enumerate(tensors):
        threshold, ties, needed = expected.thresholds[place]
        delta = np.abs((tuned[name] - base[name]).astype(np.float32))
        survived = merged[name] != base[name]
        assert survived[delta > threshold].all()
        assert not survived[delta < threshold].any()
        tied = delta == threshold
        q = needed / ties
        n = int(tied.sum())
        assert n > 100
        assert threshold > 0
        assert abs(int(survived[tied].sum()) - n * q) <= 5 * (n * q * (1 - q)) ** 0.5
    assert kept == [sum(int((merged[name] != base[name]).sum()) for name in base)]


def test_trim_policies_are_nested_and_index_keeps_exactly_k(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(n_models=1, spread=1e-4, shapes={"a": (300, 100)})
    counts = {
        policy: run_both("ties", {"density": 0.2, "ties": policy}, paths, tmp_path / policy, weights=(1.0,))[
            2
        ][0]
        for policy in ("drop", "thin", "index", "all")
    }
    assert counts["index"] == 6000
    assert counts["drop"] < counts["thin"] < counts["all"]
    assert counts["all"] > 7000, "the lattice has hardly any ties"


def test_an_output_of_another_dtype_is_rounded_once_from_fp64(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(dtype=torch.float32, shapes=SHAPES)
    base, *models = (as_float64(path) for path in paths)
    for name in ("bfloat16", "float16", "float64"):
        config = config_for("task_arithmetic", paths, parameters={"lambda": 0.3}, dtype=name)
        merge(config, tmp_path / name, memory="1GiB")
        expected = reference.task_arithmetic(base, models, (1.0, 1.0, 1.0), lam=0.3)
        bound = 0.5 + 1e-6 if name != "float64" else 2.0
        assert_equal_to_the_last_bit_but_ties(as_float64(tmp_path / name), expected, name, bound)


def test_an_empty_tensor_does_not_hang_a_trim(make_models: Callable[..., list[Path]], tmp_path: Path) -> None:
    paths = make_models(shapes={"w": (30, 4), "empty": (0, 4)})
    for policy in ("thin", "index", "all", "drop"):
        config = config_for("ties", paths, parameters={"density": 0.5, "ties": policy})
        merge(config, tmp_path / policy, memory="1GiB")
