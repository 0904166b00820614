"""DELLA against a float64 reference: ranks by counting, the same random words, one element after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.algebra.task_vectors import RankDrop
from streammerge.api import merge
from streammerge.errors import ConfigError
from tests.conftest import as_float64, config_for
from tests.methods import reference

Array = np.ndarray
SHAPES = {"a.weight": (40, 130), "b.deep": (3, 5, 64), "c.norm": (300,), "d.column": (50, 1), "e.scalar": ()}


def probabilities(delta: Array, low: float, spread: float) -> Array:
    """q of every entry of a matrix, its rank found by comparing it with all others of its row."""
    rows = np.abs(delta).reshape(-1, delta.shape[-1] if delta.ndim else 1)
    n = rows.shape[1]
    smaller = (rows[:, None, :] < rows[:, :, None]).sum(axis=2)
    equal = (rows[:, None, :] == rows[:, :, None]).sum(axis=2)
    middle = smaller + (equal - 1) / 2  # of ranks from 0
    q = low + spread * middle / (n - 1) if n > 1 else np.full(rows.shape, low + spread / 2)
    return q.reshape(delta.shape)


def survivors(
    delta: Array, tensor: str, model: str, seed: int, density: float, epsilon: float
) -> tuple[Array, Array]:
    """The mask and the probabilities of one task vector."""
    q = probabilities(delta, density - epsilon, 2 * epsilon)
    words = reference.all_words(delta.size, reference.key_of(seed, "della", model, tensor)).reshape(
        delta.shape
    )
    return words < np.floor(q * 2.0**32 + 0.5), q


@pytest.mark.parametrize("rescale", ["paper", "l1", "none"])
@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize(
    ("dtype", "spread"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-4)], ids=["continuous", "many equal"]
)
def test_a_merge_is_the_reference_rounded_once(
    method: str,
    rescale: str,
    dtype: torch.dtype,
    spread: float,
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
) -> None:
    paths = make_models(n_models=3, dtype=dtype, spread=spread, shapes=SHAPES)
    density, epsilon, weights, names = 0.4, 0.25, (1.0, 0.5, 0.75), ("one", "two", "three")
    models = [
        {"model": str(path), "alias": name, "parameters": {"weight": weight}}
        for path, name, weight in zip(paths[1:], names, weights, strict=True)
    ]
    parameters: dict[str, Any] = {"density": density, "epsilon": epsilon, "rescale": rescale, "lambda": 0.7}
    config = config_for(method, paths, models=models, parameters=parameters, seed=9)
    merge(config, tmp_path / "out", memory="1GiB")
    base, *tensors = (as_float64(path) for path in paths)
    for name, merged in as_float64(tmp_path / "out").items():
        taus = []
        for model, alias, weight in zip(tensors, names, weights, strict=True):
            delta = (model[name].astype("f4") - base[name].astype("f4")).astype("f8")
            mask, q = survivors(delta, name, alias, 9, density, epsilon)
            left = np.where(mask, delta / q if rescale == "paper" else delta, 0.0)
            if rescale == "l1" and np.abs(left).sum() > 0:
                left = left * (np.abs(delta).sum() / np.abs(left).sum())
            taus.append(weight * left)
        total = sum(taus)
        if method == "della":
            agree = [(np.sign(tau) == np.sign(total)) & (tau != 0) for tau in taus]
            divisor = sum(np.where(a, w, 0.0) for a, w in zip(agree, weights, strict=True))
            total = sum(np.where(a, tau, 0.0) for a, tau in zip(agree, taus, strict=True))
            total = total / np.where(divisor == 0, 1.0, divisor)
        expected = base[name] + 0.7 * total
        size = np.max([np.abs(base[name]), *(np.abs(tau) for tau in taus)], axis=0)
        error = reference.ulp_error(merged, expected, size, str(dtype).removeprefix("torch."))
        assert error.max(initial=0.0) <= 0.501, name


def test_the_larger_an_entry_the_likelier_it_stays_and_the_mean_is_the_density() -> None:
    """Five entries, two of them equal: ranks 1, 2, 3.5, 3.5, 5."""
    delta = torch.tensor([0.1, -0.3, 0.2, 0.3, -0.4])
    q = RankDrop(0.2, 0.4).probabilities(delta, 5)
    assert q.tolist() == pytest.approx([0.2, 0.45, 0.3, 0.45, 0.6])
    assert float(q.mean()) == pytest.approx(0.4)
    assert RankDrop(0.2, 0.4).probabilities(delta, 1).tolist() == pytest.approx([0.4] * 5)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"density": 0.9}, "probabilities from 0.75 to 1.05"),
        ({"density": 0.66, "epsilon": 1.35}, r"is outside the range \[0, 1\]"),
        ({"density": 0.1}, "probabilities from -0.05 to 0.25"),
        ({"density": 0.5, "drop_rate": 0.5}, "already drops parameters; remove `drop_rate`"),
    ],
)
def test_probabilities_that_are_none_are_refused_before_anything_is_written(
    parameters: dict[str, Any], words: str, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        merge(config_for("della", make_models(), parameters=parameters), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_density_of_one_drops_nothing_and_of_none_everything(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, model = make_models(n_models=1)
    for density, end in ((1.0, model), (0.0, base)):
        merge(config_for("della", [base, model], parameters={"density": density}), tmp_path / f"{density}")
        merged, expected = as_float64(tmp_path / f"{density}"), as_float64(end)
        assert all(np.array_equal(merged[name], expected[name]) for name in expected)
