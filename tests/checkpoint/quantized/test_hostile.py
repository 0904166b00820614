"""Every hostile quantised model of the table is refused in one line by what opens and reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.checkpoint.index import open_model
from streammerge.errors import ModelError
from streammerge.io.reader import Reader
from streammerge.planning.resolve.quantised import refusal
from streammerge.tensors.read import read_elements
from tests.laws.hostile.case import Case
from tests.laws.hostile.quantised import all_cases

CASES = list(all_cases())


def read_all(path: Path) -> None:
    """Open a model and read all of it, as a merge does; codes that nothing decodes are refused."""
    model = open_model(path)
    if model.quantization is not None:
        raise refusal(model, model.quantization, min(model.quantization.codes))
    reader = Reader()
    try:
        for ref in model.values():
            read_elements(reader, ref, 0, ref.n_elements)
    finally:
        reader.close()


@pytest.mark.parametrize("case", CASES, ids=[case.what[:80] for case in CASES])
def test_it_is_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    case.build(tmp_path)
    read_all(tmp_path / "a")
    said = refusal_of(tmp_path / "b")
    assert case.expect in (("accepted", "either") if said is None else ("refused", "either"))
    if said is not None:
        assert case.words in said
        assert said.isprintable()
        assert len(said) < 1500


def refusal_of(path: Path) -> str | None:
    """Return what is said of a model that is refused; None of one that is read."""
    try:
        read_all(path)
    except ModelError as error:
        return str(error)
    return None
