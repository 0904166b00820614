"""SCE and Arcee Fusion, which select elements by a score: tables by hand, and float64 references that sort."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.algebra.gram_matrix import rows_at_once
from streammerge.algebra.rules import SelectedMerge
from streammerge.algebra.scores import Importance, Selection, Spread
from streammerge.algebra.task_vectors import Cut, TaskVector, Where
from streammerge.api import merge
from streammerge.backends.torch.backend import BLOCK_ELEMENTS
from streammerge.engine import answers
from streammerge.engine.scheduler import Scheduler
from streammerge.methods.registry import get_method
from streammerge.numerics import elementary
from streammerge.statistics.kinds import (
    NonZero,
    Quantile,
    Squares,
    SquareSums,
    Threshold,
)
from tests.conftest import as_float64, config_for, output_bytes
from tests.laws.test_methods import VARIANTS
from tests.methods import reference
from tests.methods.by_hand import KEYS, call, follow
from tests.methods.test_hand_tables_ties import key

Array = np.ndarray
ZERO = [0.0] * 4

# --- SCE (https://arxiv.org/abs/2408.07990), by hand

DELTAS = [[1.0, 0.5, -0.5, 0.25], [-1.0, 0.5, 0.25, 0.75]]
# Variances 1, 0, 9/64, 1/16: three are not 0. Squares of all entries: 1.5625 and 1.875, as 5 to 6.


def spread_of(deltas: Sequence[Sequence[float]]) -> list[float]:
    models = [torch.tensor(delta) for delta in deltas]
    spread = Spread(tuple(TaskVector(i) for i in range(len(models))))
    patterns = spread.patterns(models, torch.zeros(len(deltas[0])), Where("t", 0, KEYS))
    return patterns.view(torch.float32).tolist()


def test_sce_selects_where_models_differ_most_weighs_them_by_what_is_left_and_erases_minorities() -> None:
    assert spread_of(DELTAS) == [1.0, 0.0, 0.140625, 0.0625]
    (statistic,) = follow("sce", 2, select_topk=0.7)
    assert statistic == NonZero(Spread((TaskVector(0), TaskVector(1))))
    (statistic,) = follow("sce", 2, [3], select_topk=0.7)
    assert statistic.count(4) == 2  # int(0.7 * 3)
    # The first and the third are left: squares 1.25 and 1.0625. The first cancels, the third is negative.
    answers: list[list[Any]] = [[3], [Threshold(key(0.140625), 1, 1)], [(0, 3)]]
    (statistic,) = follow("sce", 2, *answers, select_topk=0.7)
    assert isinstance(statistic, Squares)
    answers.append([SquareSums((1.25, 1.0625), 4)])
    assert call(follow("sce", 2, *answers, select_topk=0.7), DELTAS, ZERO) == [0.0, 0.0, -0.5, 0.0]
    mergekit = dict(get_method("sce").presets["mergekit"])
    positive = follow("sce", 2, *answers, select_topk=0.7, **mergekit)
    assert call(positive, DELTAS, ZERO) == [1.0, 0.0, -0.5, 0.0]


def test_sce_without_a_selection_is_the_mean_weighed_by_mean_squares() -> None:
    squares: list[Any] = [SquareSums((1.5625, 1.875), 4)]
    expected = [0.0, 0.5, -0.5, (5 * 0.25 + 6 * 0.75) / 11]
    assert call(follow("sce", 2, squares), DELTAS, ZERO) == pytest.approx(expected, rel=1e-15)
    # mergekit's guard: mean squares that sum to less than the floor (here 3.4375 / 4) make equal weights ...
    assert call(follow("sce", 2, squares, floor=0.9), DELTAS, ZERO)[3] == 0.5
    # ... and no sum of agreeing weights counts as less: the third is divided by 0.8, not by 5/11.
    assert call(follow("sce", 2, squares, floor=0.8), DELTAS, ZERO)[2] == pytest.approx(-0.5 * (5 / 11) / 0.8)


def test_sce_of_models_that_are_the_same_selects_nothing() -> None:
    same = [[0.5, -0.25], [0.5, -0.25]]
    assert spread_of(same) == [0.0, 0.0]
    (statistic,) = follow("sce", 2, [0], select_topk=0.9)
    assert statistic.count(2) == 0
    none = [[0], [Threshold(key(math.inf), 1, 0)], [(0, 0)], [SquareSums((0.0, 0.0), 2)]]
    assert call(follow("sce", 2, *none, select_topk=0.9), same, [1.0, 2.0]) == [1.0, 2.0]
    squares: list[Any] = [SquareSums((0.3125, 0.3125), 2)]
    assert call(follow("sce", 2, squares), same, [1.0, 2.0]) == [1.5, 1.75]


# --- Arcee Fusion, by hand


def test_arcee_fusion_takes_over_what_lies_far_above_the_median() -> None:
    wanted = follow("arcee_fusion", 1)
    assert [(type(r), r.q, r.count(9), r.count(1)) for r in wanted] == [
        (Quantile, 0.25, 7, 1),
        (Quantile, 0.5, 5, 1),
        (Quantile, 0.75, 3, 1),
    ]
    # 1 + 1.5 (2 - 0.5) = 3.25
    rule = follow("arcee_fusion", 1, [Threshold(key(value), 1, 1) for value in (0.5, 1.0, 2.0)])
    assert rule.selection.cut == Cut(key(3.25), "all")
    # 1 + 1.5 * 2^-25 lies between two fp32 numbers: the upper, further away, is the least that is not below.
    rule = follow("arcee_fusion", 1, [Threshold(key(value), 1, 1) for value in (0.0, 1.0, 2.0**-25)])
    assert rule.selection.cut.key == key(1.0 + 2.0**-23)


def test_arcee_fusion_measures_importance_by_the_divergence_of_rows() -> None:
    """Two rows of two: in the first the odds go from 1:1 to 3:1, in the second they stay."""
    base, theta = torch.zeros(4), torch.tensor([math.log(3.0), 0.0, 2.0, 2.0])
    importance = Importance(TaskVector(0))
    patterns = importance.patterns([theta], base, Where("t", 0, KEYS, row_length=2))
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    expected = [math.log(3.0) * divergence, 0.0, 0.0, 0.0]
    assert patterns.view(torch.float32).tolist() == pytest.approx(expected, rel=1e-6)
    rule = SelectedMerge((TaskVector(0),), Selection(importance, Cut(key(1e-3), "all")))
    merged = rule([theta], base, Where("t", 0, KEYS, row_length=2))
    assert merged.tolist() == [float(theta[0]), 0.0, 0.0, 0.0]
    # A row of one element has one probability, 1: nothing diverges.
    assert importance.patterns([theta], base, Where("t", 0, KEYS, row_length=1)).tolist() == [0] * 4


# --- float64 references

SHAPES = {
    "a.weight": (90, 130),
    "b.deep": (3, 37, 11),
    "c.norm": (4097,),
    "d.scalar": (),
    "e.column": (50, 1),
}


def deltas_of(base: Array, thetas: Sequence[Array]) -> Array:
    return np.stack([theta.astype("f4") - base.astype("f4") for theta in thetas]).astype("f8")


def sce(base: Array, thetas: Sequence[Array], topk: float, positive: bool, floor: float) -> tuple[Array, int]:
    """Return the merged tensor and how many elements are selected."""
    deltas = deltas_of(base, thetas)
    n = base.size
    if topk < 1:
        spread = deltas.var(axis=0).astype("f4").ravel()
        k = int(topk * np.count_nonzero(spread))
        mask = np.zeros(n, bool)
        mask[np.lexsort((np.arange(n), -spread))[:k]] = True
        deltas = np.where(mask.reshape(base.shape), deltas, 0.0)
    squares = (deltas**2).reshape(len(thetas), -1).sum(axis=1)
    total = squares.sum()
    equal = total == 0 or total / n < floor
    weights = np.full(len(thetas), 1 / len(thetas)) if equal else squares / total
    sign = np.sign(deltas.sum(axis=0))
    sign = np.where(sign == 0, 1.0 if positive else 2.0, sign)
    agree = np.sign(deltas) == sign
    by_model = weights.reshape(-1, *[1] * base.ndim) * agree
    divisor = np.maximum(by_model.sum(axis=0), floor)
    return base + (by_model * deltas).sum(axis=0) / np.where(divisor == 0, 1.0, divisor), k if topk < 1 else n


def arcee_fusion(base: Array, theta: Array) -> tuple[Array, int]:
    """Return the merged tensor and how many elements are taken over."""
    (delta,) = deltas_of(base, [theta])
    length = base.shape[-1] if base.ndim else 1

    def softmax(rows: Array) -> Array:
        powers = np.exp(rows - rows.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True) + 1e-8

    p, q = softmax(theta.reshape(-1, length)), softmax(base.reshape(-1, length))
    divergence = np.maximum((p * np.log(p / q)).sum(axis=1), 0.0)
    score = (np.abs(delta).reshape(-1, length) * divergence[:, None]).astype("f4").astype("f8")
    lower, median, upper = np.sort(score.ravel())[[int(q * (score.size - 1)) for q in (0.25, 0.5, 0.75)]]
    mask = (score >= median + 1.5 * (upper - lower)).reshape(base.shape)
    return base + np.where(mask, delta, 0.0), int(mask.sum())


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sce", {}),
    ("sce", {"select_topk": 0.1}),
    ("sce", {"select_topk": 0.5, "zero_sign": "positive", "floor": 1e-6}),
    ("sce", {"select_topk": 0.0}),
    ("arcee_fusion", {}),
]


@pytest.mark.parametrize(("method", "parameters"), CASES)
@pytest.mark.parametrize(
    ("dtype", "spread"),
    [(torch.float32, 1e-3), (torch.float32, 0.3), (torch.bfloat16, 1e-4), (torch.float16, 1e-2)],
    ids=["close", "far apart", "many ties", "fp16"],
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
    paths = paths[: 2 if method == "arcee_fusion" else 4]
    merge(config_for(method, paths, parameters=parameters), tmp_path / "out", memory="1GiB")
    merged, (base, *tensors) = as_float64(tmp_path / "out"), [as_float64(path) for path in paths]
    selected = 0
    for name, values in merged.items():
        thetas = [tensor[name] for tensor in tensors]
        if method == "sce":
            expected, count = sce(
                base[name],
                thetas,
                parameters.get("select_topk", 1.0),
                "zero_sign" in parameters,
                parameters.get("floor", 0.0),
            )
        else:
            expected, count = arcee_fusion(base[name], thetas[0])
        selected += count
        error = reference.ulp_error(values, expected, np.abs(base[name]), str(dtype).removeprefix("torch."))
        assert error.max() <= 0.501, name
    found = json.loads((tmp_path / "out" / "streammerge.json").read_text())["densities"]
    if method == "arcee_fusion" or "select_topk" in parameters:
        assert [entry["kept"] for entry in found] == [selected] * len(tensors)


def test_ties_of_the_spread_go_by_index(make_models: Callable[..., list[Path]], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, *models = make_models(n_models=2, dtype=torch.float32, shapes={"w": (3, 4)})
    ones = torch.ones(3, 4)
    for path, value in zip((base, *models), (0.0, 1.0, 2.0), strict=True):
        save_file({"w": ones * value}, path / "model.safetensors")
    merge(config_for("sce", [base, *models], parameters={"select_topk": 0.5}), tmp_path / "out")
    # Squares 1 and 4 of each element: 0.2 * 1 + 0.8 * 2.
    assert as_float64(tmp_path / "out")["w"].ravel() == pytest.approx([1.8] * 6 + [0.0] * 6)


# --- how a tensor is passed over


@pytest.mark.parametrize(
    ("method", "parameters"),
    [(m, p) for m, p in VARIANTS if m in ("sce", "arcee_fusion", "ramplus_tl") or "nuslerp_row_wise" in p],
)
def test_a_tensor_in_memory_may_be_passed_over_in_parts(
    method: str,
    parameters: dict[str, Any],
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_for(method, make_models(spread=1e-4), parameters=parameters)
    merge(config, tmp_path / "whole")
    monkeypatch.setattr(answers, "_COUNTED_AT_ONCE", 5000)
    merge(config, tmp_path / "parts")
    assert output_bytes(tmp_path / "parts") == output_bytes(tmp_path / "whole")


def test_rows_are_not_cut_by_the_blocks_of_torch(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    assert 700 * 130 > BLOCK_ELEMENTS > BLOCK_ELEMENTS // 130 * 130
    config = config_for("arcee_fusion", make_models(n_models=1, shapes={"w": (700, 130)}))
    merge(config, tmp_path / "kernels")
    merge(config, tmp_path / "torch", kernels=False)
    assert output_bytes(tmp_path / "torch") == output_bytes(tmp_path / "kernels")


def test_answers_are_given_up_with_their_tensor(
    make_models: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    run = Scheduler.run

    def run_and_look(self: Scheduler, *arguments: Any) -> None:
        run(self, *arguments)
        left.append(len(self._worker.answers))

    monkeypatch.setattr(Scheduler, "run", run_and_look)
    merge(config_for("sce", make_models()), tmp_path / "out")
    assert left == [0]


def test_columns_of_a_wide_tensor_are_summed_by_fewer_rows_at_once_and_still_by_the_same(
    make_models: Callable[..., list[Path]], tmp_path: Path, small_capacity: Callable[[int, int], None]
) -> None:
    assert rows_at_once(40_000) == 26
    parameters = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    config = config_for("nuslerp", make_models(n_models=2, shapes={"w": (60, 40_000)}), parameters=parameters)
    merge(config, tmp_path / "kernels")
    merge(config, tmp_path / "torch", kernels=False)
    small_capacity(1 << 25, 3)
    merge(config, tmp_path / "streamed")
    expected = output_bytes(tmp_path / "kernels")
    assert output_bytes(tmp_path / "torch") == output_bytes(tmp_path / "streamed") == expected


# --- exp and log

EDGES = np.array(
    [0.0, -1e-300, -1e-17, -0.34657359027997264, -0.6931471805599453, -1.0, -36.9, -699.9, -700.0]
)


def test_exp_is_right_to_its_last_digits_and_the_kernel_is_the_formula() -> None:
    from numba import njit

    from streammerge.kernels import elementary as compiled

    rng = np.random.default_rng(0)
    x = np.concatenate([EDGES, -rng.random(20_000) * 700, -rng.random(20_000), -rng.random(1000) * 1e-9])
    values = elementary.exp(torch.from_numpy(x)).numpy()
    assert np.abs(values / np.exp(x) - 1).max() < 4e-16
    assert elementary.exp(torch.tensor([-1e4, 0.0]).double()).tolist() == [values[EDGES.size - 1], 1.0]
    each = njit(lambda x: np.array([compiled.exp(value) for value in x]))
    assert (each(x).view(np.int64) == values.view(np.int64)).all()


def test_log_is_right_to_its_last_digits_and_the_kernel_is_the_formula() -> None:
    from numba import njit

    from streammerge.kernels import elementary as compiled

    rng = np.random.default_rng(0)
    near_one = 1 + (rng.random(20_000) - 0.5) * np.exp(-rng.random(20_000) * 30)
    edges = [1.0, 0.5, 2.0, 0.7071067811865475, 0.7071067811865476, 1.4142135623730951, 1e-8, 1e8]
    y = np.concatenate([edges, np.exp((rng.random(20_000) - 0.5) * 40), near_one])
    values = elementary.log(torch.from_numpy(y)).numpy()
    error = np.abs(values - np.log(y))
    assert (error <= 1e-15 * np.abs(np.log(y))).all()
    assert values[0] == 0.0
    each = njit(lambda y: np.array([compiled.log(value) for value in y]))
    assert (each(y).view(np.int64) == values.view(np.int64)).all()
