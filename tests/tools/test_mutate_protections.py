"""Every protection that can be taken out is where the tool looks for it, and so are the tests that must notice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "prove"))

from mutate_protections import MUTATIONS, Mutation, missing  # noqa: E402


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.protection)
def test_a_protection_is_where_it_is_taken_out(mutation: Mutation) -> None:
    assert missing(mutation, ROOT) == ""


def test_a_place_that_is_gone_and_a_test_that_is_gone_are_told() -> None:
    gone = Mutation("P1", "x", "streammerge/version.py", "no such text", "", "tests/test_docs.py -k x")
    assert missing(gone, ROOT) == "NOT FOUND: 0 places in streammerge/version.py"
    untested = Mutation("P1", "x", "streammerge/version.py", "__version__", "", "tests/nowhere")
    assert missing(untested, ROOT) == "NO SUCH TEST: tests/nowhere"
