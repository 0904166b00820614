"""`streammerge.testing` finds what breaks a law, says which and how to mend it, and lets pass what keeps them all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from streammerge.methods import registry
from streammerge.testing import check_method, laws
from streammerge.testing.models import config_for, write_models
from streammerge.testing.trial import Trial

SHAPES: dict[str, tuple[int, ...]] = {"embed": (700, 64), "a.weight": (37, 53), "scalar": (), "empty": (0, 5)}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
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
    with pytest.raises(AssertionError, match=r"no method is registered in it; decorate"):
        check_method(file)


def test_a_trial_is_interrupted_on_its_way(file: Path, tmp_path: Path) -> None:
    paths = write_models(tmp_path / "models", shapes=SHAPES)
    (tmp_path / "out").mkdir()
    trial = Trial(registry.get_method("linear"), config_for("linear", paths), tmp_path / "out")
    for questions in laws.INTERRUPTIONS:
        assert trial.interrupted(f"{questions}", questions, nbytes=trial.least()) is not None
