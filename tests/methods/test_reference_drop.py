"""Fisher merging, and a drop before every method, element by element against a float64 reference."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.algebra.block import Block, Operand
from streammerge.algebra.rules import FisherMean
from streammerge.api import merge
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.torch.math import TorchMath
from streammerge.errors import ConfigError
from streammerge.numerics.philox import RandomKeys
from tests.conftest import as_float64, config_for, read_tensors, write_fisher
from tests.methods import reference
from tests.methods.reference_drop import DropSpec, dropped, fisher
from tests.methods.test_reference import ALIASES, SEED, SHAPES, WEIGHTS, assert_equal_to_the_last_bit_but_ties

FISHER: list[dict[str, Any]] = [
    {},
    {"normalize": False},
    {"normalize": False, "floor": 0.0},
    {"floor": 0.0, "fallback": "average"},
    {"floor": 0.3, "floor_on": "all"},
    {"floor": 0.3, "floor_how": "add"},
    {"preset": "paper"},
    {"preset": "mergelm", "fallback": "average"},
]
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"floor_units": "raw"},
    "mergelm": {"normalize": False, "floor_units": "raw", "floor_on": "all", "floor_how": "add"},
}
LATTICES = [(torch.float32, 1e-3), (torch.bfloat16, 1e-3), (torch.bfloat16, 1e-4), (torch.float16, 1e-3)]
NAMES = ["continuous fp32", "bf16 lattice", "bf16 lattice with many ties", "fp16"]


def with_aliases(method: str, paths: list[Path], **top: Any) -> dict[str, Any]:
    config = config_for(method, paths, seed=SEED, **top)
    for model, alias, weight in zip(config["models"], ALIASES, WEIGHTS, strict=False):
        model |= {"alias": alias}
        if method != "passthrough":
            model["parameters"] = {"weight": weight}
    return config


def fishers_of(paths: list[Path]) -> list[dict[str, np.ndarray]]:
    from safetensors.torch import load_file

    return [{n: t.double().numpy() for n, t in load_file(write_fisher(path)).items()} for path in paths[1:]]


def kept_of(out: Path) -> list[int]:
    return [entry["kept"] for entry in json.loads((out / "streammerge.json").read_text())["densities"]]


@pytest.mark.parametrize("parameters", FISHER, ids=str)
@pytest.mark.parametrize(("dtype", "spread"), LATTICES, ids=NAMES)
def test_a_fisher_merge_is_the_reference_rounded_once_at_any_memory(
    parameters: dict[str, Any],
    dtype: torch.dtype,
    spread: float,
    make_models: Callable[..., list[Path]],
    small_capacity: Callable[[int, int], None],
    tmp_path: Path,
) -> None:
    paths = make_models(dtype=dtype, spread=spread, shapes=SHAPES)
    options = {**PRESETS.get(parameters.get("preset", ""), {}), **parameters}
    options.pop("preset", None)
    _, *models = (as_float64(path) for path in paths)
    expected = fisher(models, fishers_of(paths), WEIGHTS, **options)
    for capacity in (1 << 30, 1 << 17):
        small_capacity(capacity, 2)
        out = tmp_path / str(capacity)
        merge(with_aliases("fisher", paths, parameters=parameters), out)
        assert_equal_to_the_last_bit_but_ties(as_float64(out), expected, str(dtype).removeprefix("torch."))


DROPS = [
    DropSpec(0.3),
    DropSpec(0.9, rescale="none"),
    DropSpec(0.5, rescale="l1"),
    DropSpec(0.37, mask="exact"),
    DropSpec(0.6, mask="exact", rescale="l1", shared=True),
    DropSpec(0.5, mask="magnitude", rescale="none"),
    DropSpec(0.5, shared=True),
    DropSpec(1.0),
]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("task_arithmetic", {"lambda": 0.7}),
    ("ties", {"density": 1.0}),
    ("fisher", {}),
    ("passthrough", {}),
]


@pytest.mark.parametrize("spec", DROPS, ids=str)
@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=[name for name, _ in METHODS])
@pytest.mark.parametrize(("dtype", "spread"), [LATTICES[0], LATTICES[2]], ids=[NAMES[0], NAMES[2]])
def test_a_drop_before_a_method_is_the_method_of_the_dropped_models(
    spec: DropSpec,
    method: str,
    parameters: dict[str, Any],
    dtype: torch.dtype,
    spread: float,
    make_models: Callable[..., list[Path]],
    small_capacity: Callable[[int, int], None],
    tmp_path: Path,
) -> None:
    paths = make_models(dtype=dtype, spread=spread, shapes=SHAPES)
    drop = {
        "drop_rate": spec.rate,
        "drop_mask": spec.mask,
        "drop_rescale": spec.rescale,
        "shared_mask": spec.shared,
    }
    base, *models = (as_float64(path) for path in paths)
    models = models[:1] if method == "passthrough" else models
    after = dropped(base, models, spec, SEED, ALIASES[: len(models)])
    weights = WEIGHTS[: len(models)]
    if method == "linear":
        expected = reference.linear(after.models(base), weights)
    elif method == "task_arithmetic":
        expected = reference.task_arithmetic(base, after.models(base), weights, lam=0.7, double=True)
    elif method == "ties":
        expected = reference.disjoint_merge(base, after.left, weights, after.factors, "zero", True, 1.0)
    elif method == "fisher":
        expected = fisher(after.models(base), fishers_of(paths), weights)
    else:
        expected = reference.linear(after.models(base), (1.0,))
    for tensor, values in expected.size.items():  # task vectors are what is added, on top of the base
        expected.size[tensor] = np.maximum(values, np.abs(base[tensor]))
    for capacity in (1 << 30, 1 << 17):
        small_capacity(capacity, 2)
        out = tmp_path / str(capacity)
        merge(with_aliases(method, paths, parameters={**parameters, **drop}), out)
        assert kept_of(out) == after.kept()
        assert_equal_to_the_last_bit_but_ties(as_float64(out), expected, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("method", ["dare_linear", "dare_fisher"])
def test_dare_methods_are_a_drop_under_other_names(
    method: str, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models()
    plain = {"dare_linear": "task_arithmetic", "dare_fisher": "fisher"}[method]
    for mask, rescale in itertools.product(("bernoulli", "exact", "magnitude"), ("paper", "l1", "none")):
        one = {"density": 0.25, "mask": mask, "rescale": rescale}
        other = {"drop_rate": 0.75, "drop_mask": mask, "drop_rescale": rescale}
        merge(config_for(method, paths, parameters=one), tmp_path / "one", memory="1GiB", overwrite=True)
        merge(config_for(plain, paths, parameters=other), tmp_path / "two", memory="1GiB", overwrite=True)
        first, second = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_shared_mask_is_one_mask_and_needs_no_aliases(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, tuned = make_models(n_models=1)
    twins = [{"model": str(tuned), "alias": "a"}, {"model": str(tuned), "alias": "b"}]
    config = config_for(
        "dare_linear", [base, tuned], models=twins, parameters={"density": 0.5, "normalize": True}
    )
    config["parameters"]["shared_mask"] = True
    merge(config, tmp_path / "shared", memory="1GiB")
    alone = config_for("dare_linear", [base, tuned], parameters={"density": 0.5, "shared_mask": True})
    merge(alone, tmp_path / "alone", memory="1GiB")
    first, second = read_tensors(tmp_path / "shared"), read_tensors(tmp_path / "alone")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_exact_mask_drops_exactly_the_right_number_of_each_tensor(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    shapes = {"a": (1000, 999), "b": (7,), "c": (), "d": (3, 5)}
    base, tuned = make_models(n_models=1, dtype=torch.float32, shapes=shapes)
    for rate in (0.001, 0.5, 0.9, 0.99999):
        config = config_for(
            "task_arithmetic", [base, tuned], parameters={"drop_rate": rate, "drop_mask": "exact"}
        )
        merge(config, tmp_path / "out", memory="1GiB", overwrite=True)
        expected = sum(n - round(rate * n) for n in (999_000, 7, 1, 15) if round(rate * n))
        assert kept_of(tmp_path / "out") == [expected]


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("linear", {"drop_rate": 0.5, "normalize": False}, "normalize: false"),
        ("passthrough", {"drop_rate": 0.5, "scale": 2.0}, "scale"),
        ("ties", {"drop_rate": 0.5, "density": 0.5, "drop_mask": "magnitude"}, "cut by magnitude twice"),
        (
            "ties",
            {"drop_rate": 0.5, "density": 0.5, "drop_rescale": "l1", "trim_scope": "model"},
            "trim_scope",
        ),
        ("fisher", {"weight": -1.0}, "weights of 0 or more"),
        ("fisher", {"weight": 0.0}, "not all 0"),
        ("ties", {"drop_rate": 1.5}, r"is outside the range \[0, 1\]"),
    ],
)
def test_what_has_no_one_meaning_is_refused(
    method: str,
    parameters: dict[str, Any],
    message: str,
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=message):
        merge(config_for(method, make_models(), parameters=parameters), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_drop_without_a_base_is_refused(make_models: Callable[..., list[Path]], tmp_path: Path) -> None:
    config = config_for("linear", make_models(), parameters={"drop_rate": 0.5})
    del config["base_model"]
    with pytest.raises(ConfigError, match="base_model: a drop needs a base model"):
        merge(config, tmp_path / "out")


# --- Fisher: laws

finite = st.floats(-(2.0**100), 2.0**100, width=32)
certainty = st.one_of(
    st.just(0.0),
    st.floats(0.0, 1.0, width=32),
    st.floats(0.0, 2.0**127, width=32),
    st.floats(0.0, 2.0**-126, width=32),
)


@given(
    st.lists(
        st.tuples(st.lists(finite, min_size=3, max_size=3), st.lists(certainty, min_size=3, max_size=3)),
        min_size=1,
        max_size=40,
    ),
    st.lists(st.floats(1e-20, 1e20), min_size=3, max_size=3),
    st.floats(0.0, 1.0),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["F32", "BF16"]),
)
@settings(max_examples=300, deadline=None)
def test_the_result_lies_between_the_models_and_torch_and_kernel_agree(
    elements: list[tuple[list[float], list[float]]],
    coefficients: list[float],
    floor: float,
    add: bool,
    average: bool,
    out_dtype: str,
) -> None:
    n = len(elements)
    values = np.array([theta for theta, _ in elements], np.float32).T.copy()
    fishers = np.array([known for _, known in elements], np.float32).T.copy()
    rule = FisherMean(tuple(coefficients), (floor, 0.0, floor), add, (1.0, 2.0, 3.0) if average else ())
    width = -(-n * 4 // 64) * 64
    results = []
    for math in (KernelMath, lambda piece: TorchMath(piece, "cpu", 16)):
        buffer = np.zeros(7 * width, np.uint8)
        for i, row in enumerate([*values, *fishers]):
            buffer[i * width : i * width + 4 * n] = row.view(np.uint8)
        operands = tuple(Operand(i * width, "F32") for i in range(6))
        piece = Block(
            buffer, operands[:3], None, "t", 0, n, (n,), RandomKeys(0, ("a", "b", "c")), operands[3:]
        )
        applied = math(piece).apply(rule, Operand(6 * width, out_dtype))  # type: ignore[operator]
        results.append((buffer[6 * width :].tobytes(), applied))
    assert results[0] == results[1]
    raw = np.frombuffer(results[0][0], np.uint8)
    if out_dtype == "F32":
        merged = raw[: 4 * n].view(np.float32).astype(np.float64)
        low, high = values.min(axis=0), values.max(axis=0)
        assert (merged >= low).all()
        assert (merged <= high).all()
    assert results[0][1].not_finite == 0 or out_dtype == "BF16"


def test_equal_diagonals_give_the_weighted_average(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    paths = make_models(dtype=torch.float32)
    ones = {name: torch.full_like(t, 3e-7) for name, t in load_file(write_fisher(paths[1])).items()}
    for path in paths[1:]:
        save_file(ones, write_fisher(path))
    merge(with_aliases("fisher", paths), tmp_path / "fisher", memory="1GiB")
    merge(with_aliases("linear", paths), tmp_path / "linear", memory="1GiB")
    first, second = read_tensors(tmp_path / "fisher"), read_tensors(tmp_path / "linear")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=2e-7, atol=1e-9)
