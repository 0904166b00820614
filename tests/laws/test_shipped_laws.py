"""`streammerge.testing` finds what breaks a law, says which and how to mend it, and lets pass what keeps them all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.algebra.competition import Size
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import TaskVectorMerge
from streammerge.algebra.scores import Importance, Spread
from streammerge.algebra.task_vectors import TaskVector
from streammerge.methods import registry
from streammerge.statistics.describing import Magnitudes, Moves, OwnSquares, SignAgreement
from streammerge.statistics.kinds import (
    KINDS,
    AbsSum,
    Band,
    ColumnGram,
    FisherSquares,
    Gram,
    Largest,
    LowWords,
    NonZero,
    Quantile,
    RegressionOperators,
    SignTotal,
    Squares,
    Statistic,
    TieIndex,
    TopK,
    Touches,
)
from streammerge.statistics.orders import Order
from streammerge.statistics.ranks import Rank
from streammerge.statistics.sums import BlockSums, SumsOfSquares
from streammerge.testing import check_format, check_method, check_statistic, laws
from streammerge.testing.models import config_for, read_tensors, write_models
from streammerge.testing.trial import Trial

SHAPES: dict[str, tuple[int, ...]] = {"embed": (700, 64), "a.weight": (37, 53), "scalar": (), "empty": (0, 5)}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(registry, "_METHODS", dict(registry.all_methods()))
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)
    return tmp_path / "checked_methods.py"


def check(file: Path, body: str, decorator: str = "", **options: object) -> None:
    file.write_text(
        "import torch, streammerge\nfrom streammerge import PerModel\n"
        f"@streammerge.method('checked', {decorator})\ndef checked(models, base):\n    {body}\n"
    )
    check_method(file, shapes=SHAPES, dtypes=["bfloat16"], peak=False, **options)  # type: ignore[arg-type]


def test_a_good_formula_keeps_every_law(file: Path) -> None:
    check(file, "return sum(models) / len(models)", symmetric=True)


@pytest.mark.parametrize(
    ("body", "decorator", "words"),
    [
        (
            "return models[0] - models[0].mean()",
            "",
            r"depend on how .* declare access=\"row\".*element \d+: .* is not",
        ),
        ("return models[0] - models[0].mean()", "access='row'", r"declare access=\"tensor\""),
        ("return models[0] + torch.rand(())", "", "depend on"),
    ],
)
def test_a_broken_law_is_named_with_its_cure(file: Path, body: str, decorator: str, words: str) -> None:
    with pytest.raises(AssertionError, match=rf"method 'checked'.*{words}"):
        check(file, body, decorator)


def test_an_order_that_matters_is_found_where_a_method_is_said_to_be_symmetric(file: Path) -> None:
    with pytest.raises(AssertionError, match="order of the models"):
        check(file, "return models[0] + 0", symmetric=True)


def test_a_file_without_a_method_is_refused(file: Path) -> None:
    file.write_text("")
    with pytest.raises(AssertionError, match=r"it registers no method; decorate"):
        check_method(file)


def test_a_trial_is_interrupted_on_its_way(file: Path, tmp_path: Path) -> None:
    paths = write_models(tmp_path / "models", shapes=SHAPES)
    (tmp_path / "out").mkdir()
    trial = Trial(registry.get_method("linear"), config_for("linear", paths), tmp_path / "out")
    for questions in laws.INTERRUPTIONS:
        assert trial.interrupted(f"{questions}", questions, nbytes=trial.least()) is not None


# --- statistics and formats

VECTORS = tuple(TaskVector(i) for i in range(3))
STATISTICS = [
    TopK(VECTORS[0], 0.3),
    TopK(VECTORS[1], 0.2, extent=Extent.MODEL),
    Band(VECTORS[0], 0.5, 0.1, "lower"),
    NonZero(Spread(VECTORS)),
    Largest(Spread(VECTORS), 100),
    Quantile(Importance(VECTORS[0]), 0.5),
    AbsSum(VECTORS[2]),
    Squares(VECTORS),
    Touches(VECTORS, 1e-3),
    Gram(4),
    Gram(3, VECTORS),
    ColumnGram(4),
    SignTotal(TaskVectorMerge(VECTORS, elect=True)),
    LowWords(VECTORS[0], 0.4),
    FisherSquares(1),
    OwnSquares(3),
    SignAgreement(VECTORS),
    Magnitudes(VECTORS[0]),
    Moves(3, 1),
    Order(Size(VECTORS[0]), 0.7, 1),
]


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda one: type(one).__name__)
def test_every_statistic_keeps_every_law(statistic: Statistic[Any]) -> None:
    check_statistic(statistic)


def test_every_kind_of_statistic_that_ships_is_checked() -> None:
    ours = {kind for name, kind in KINDS.items() if name.startswith("streammerge.")}
    abstract = {BlockSums, SumsOfSquares, Rank}
    assert ours - abstract - {type(one) for one in STATISTICS} <= {
        TieIndex,
        RegressionOperators,
    }  # they need data of another


def test_a_value_that_is_not_the_expected_one_is_found() -> None:
    touched = check_statistic(Touches(VECTORS, 1e-3))
    with pytest.raises(AssertionError, match=r"statistic Touches: its value is .*, expected None"):
        check_statistic(Touches(VECTORS, 1e-3), expected=lambda base, models: None)
    assert touched is not None


def test_safetensors_keep_every_law_of_formats(tmp_path: Path) -> None:
    (model, *_) = write_models(tmp_path, n_models=0, shapes=SHAPES)
    tensors = read_tensors(model)
    data = {name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
    check_format(model / "model.safetensors", data)
    data["embed"] = data["embed"][:-1] + bytes([data["embed"][-1] ^ 1])
    with pytest.raises(
        AssertionError, match=r"tensor 'embed': reading elements 0 to 44800 gives values that differ"
    ):
        check_format(model / "model.safetensors", data)
