"""Breadcrumbs against a float64 reference that sorts: which entries stay, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge.algebra.task_vectors import TaskVector
from streammerge.api import merge
from streammerge.statistics.kinds import Band
from tests.conftest import as_float64, config_for
from tests.methods import reference

Array = np.ndarray
SHAPES = {"a.weight": (90, 130), "b.norm": (64,), "c.scalar": ()}


def band(delta: Array, density: float, gamma: float, ties: str) -> Array:
    """The entries that stay, from the ranks of a sorted tensor; equal magnitudes rank by index."""
    magnitude = np.abs(delta).ravel()
    n = magnitude.size
    inside = int(density * n)
    outliers = min(int(gamma * n), n - inside)
    order = np.lexsort((np.arange(n), -magnitude))
    if ties == "index":
        mask = np.zeros(n, bool)
        mask[order[outliers : outliers + inside]] = True
        return mask.reshape(delta.shape)
    low = magnitude[order[outliers + inside - 1]] if outliers + inside else np.inf
    high = magnitude[order[outliers - 1]] if outliers else np.inf
    kept = (
        (magnitude >= low) & ~(magnitude >= high)
        if ties == "all"
        else (magnitude > low) & ~(magnitude > high)
    )
    return kept.reshape(delta.shape)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("ties", ["index", "all", "drop"])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.3), (0.003, 0.0), (0.4, 1.0)])
@pytest.mark.parametrize("spread", [1e-3, 1e-4], ids=["few ties", "many ties"])
def test_a_merge_is_the_reference_rounded_once(
    method: str,
    ties: str,
    density: float,
    gamma: float,
    spread: float,
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
) -> None:
    paths = make_models(n_models=2, spread=spread, shapes=SHAPES)
    parameters: dict[str, Any] = {"density": density, "gamma": gamma, "ties": ties, "lambda": 0.7}
    merge(config_for(method, paths, parameters=parameters), tmp_path / "out", memory="1GiB")
    base, *models = (as_float64(path) for path in paths)
    for name, merged in as_float64(tmp_path / "out").items():
        deltas = [(model[name].astype("f4") - base[name].astype("f4")).astype("f8") for model in models]
        kept = [np.where(band(delta, density, gamma, ties), delta, 0.0) for delta in deltas]
        total = kept[0] + kept[1]
        if method == "breadcrumbs_ties":
            total = sum(np.where(np.sign(one) == np.sign(total), one, 0.0) for one in kept)
        expected = base[name] + 0.7 * total
        size = np.maximum(np.abs(base[name]), np.abs(total))
        assert reference.ulp_error(merged, expected, size, "bfloat16").max() <= 0.501, name


@pytest.mark.parametrize(
    ("density", "gamma", "n", "counts"),
    [
        (0.5, 0.01, 1000, (10, 510)),
        (0.5, 0.01, 64, (0, 32)),  # mergekit 0.1.4 loses the whole tensor here
        (1.0, 0.01, 1000, (0, 1000)),  # nothing is left out where all is to stay
        (0.9, 0.2, 10, (1, 10)),  # fewer outliers, so that the density holds
        (0.1, 0.0, 5, (0, 0)),
        (0.0, 0.5, 10, (5, 5)),
    ],
)
def test_how_many_lie_above_the_edges_of_a_band(
    density: float, gamma: float, n: int, counts: tuple[int, int]
) -> None:
    bands = [Band(TaskVector(0), density, gamma, edge) for edge in ("upper", "lower")]  # type: ignore[arg-type]
    assert tuple(band.count(n) for band in bands) == counts


def test_ties_at_both_edges_are_thinned_to_the_right_counts(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """All magnitudes are equal: a tenth are outliers and half of the rest stay, by the same random words."""
    base, model = make_models(n_models=1, spread=0.0, shapes={"w": (200, 100)}, dtype=torch.float32)
    for directory, value in ((base, 0.0), (model, 2.0**-8)):
        tensors = load_file(directory / "model.safetensors")
        save_file({**tensors, "w": torch.full((200, 100), value)}, directory / "model.safetensors")
    config = config_for("breadcrumbs", [base, model], parameters={"density": 0.45, "gamma": 0.1})
    merge(config, tmp_path / "out")
    moved = int((as_float64(tmp_path / "out")["w"] != 0).sum())
    assert abs(moved - 9000) < 5 * (20000 * 0.45 * 0.55) ** 0.5
