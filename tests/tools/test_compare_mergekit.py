"""The comparison with mergekit, without mergekit: its cases merge here, and it sees what it is to see."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streammerge.api import plan

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "compare"))

import compare_mergekit as tool
import mergekit_models
from mergekit_cases import CASES, RANDOM_CASES, merge
from mergekit_differences import Case, Difference, RandomCase
from mergekit_report import page

METHODS = [
    "linear",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "sce",
    "ram",
    "ramplus_tl",
    "model_stock",
    "nearswap",
    "arcee_fusion",
    "passthrough",
]
EVERY = (*CASES, *RANDOM_CASES)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tool.Workshop:
    return tool.Workshop(tmp_path_factory.mktemp("models"), None)


def test_all_of_mergekits_methods_are_compared() -> None:
    assert {case.config["merge_method"] for case in EVERY} == set(METHODS)
    assert len({case.name for case in EVERY}) == len(EVERY) > 60


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_config_is_accepted_here(case: Case, workshop: tool.Workshop) -> None:
    more = case.cure if isinstance(case, RandomCase) else case.differs.cure if case.differs else {}
    for config in (case.config, {**case.config, "parameters": {**case.config.get("parameters", {}), **more}}):
        decided = plan({**tool.placed(config, workshop.work / "float64"), "dtype": "float64"})
        found = {job.name: job.shape for job in decided.jobs}
        wanted = dict(mergekit_models.shapes())
        if "slices" in config:  # other layers, of the same tensors
            last = {name.rsplit(".", 2)[-2] for name in wanted}
            assert {name.rsplit(".", 2)[-2] for name in found} == last
        elif "tokenizer" in config or "tokenizer_source" in config:  # other rows
            assert {name: shape[1:] for name, shape in found.items()} == {n: s[1:] for n, s in wanted.items()}
        else:
            assert found == wanted


@pytest.mark.parametrize("method", METHODS)
def test_the_merge_of_every_method_is_read_back(method: str, workshop: tool.Workshop) -> None:
    config = next(case.config for case in EVERY if case.config["merge_method"] == method)
    output = workshop.ours(config, "float32")
    assert output.error is None
    assert {name: tensor.shape for name, tensor in output.tensors.items()} == dict(mergekit_models.shapes())
    assert output.config == {
        key: value for key, value in mergekit_models.CONFIG.items() if key not in tool.IGNORED_FIELDS
    }


# --- what is compared

INPUT = {"w": np.array([1.0, -2.0, 0.5], np.float32)}
SAME = tool.Output(INPUT, {"layers": 2})


def test_a_difference_counts_in_ulp_of_the_largest_operand() -> None:
    moved = tool.Output({"w": np.nextafter(INPUT["w"], np.float32(9))}, {"layers": 2})
    assert tool.compare(SAME, moved, [], 0).ulp == 1.0
    # Beside an operand of 1024 it is the 1024th part of one, for 1 and -2; for 0.5 half of that.
    found = tool.compare(SAME, moved, [{"w": np.full(3, 1024.0, np.float32)}], 2.0**-11)
    assert found.ulp == 2.0**-10
    assert found.differing == pytest.approx(2 / 3)
    assert tool.compare(SAME, tool.Output({"w": INPUT["w"] * np.nan}, {"layers": 2}), [], 0).ulp == np.inf


def test_other_names_shapes_dtypes_and_fields_are_seen() -> None:
    def found(tensors: Mapping[str, np.ndarray], layers: int = 2) -> list[bool]:
        one = tool.compare(SAME, tool.Output(tensors, {"layers": layers}), [], 0)
        return [one.names, one.shapes, one.dtypes, one.config]

    assert found(INPUT) == [True] * 4
    assert found({**INPUT, "x": INPUT["w"]}) == [False, True, True, True]
    assert found({"w": INPUT["w"][:2]}) == [True, False, True, True]
    assert found({"w": INPUT["w"].astype(np.float64)}) == [True, True, False, True]
    assert found(INPUT, layers=3) == [True, True, True, False]


class Scripted:
    """Stands for both programs: their outputs are written down."""

    def __init__(self, theirs: float, ours: float, cured: float = 0.0) -> None:
        self.values = {"theirs": theirs, "ours": ours, "cured": cured}

    def _output(self, which: str, dtype: str) -> tool.Output:
        value = self.values[which]
        return (
            tool.Output({"w": np.full(2, value, dtype)}, {}) if value >= 0 else tool.Output(error="no room")
        )

    def theirs(self, config: Any, dtype: str) -> tool.Output:
        return self._output("theirs", dtype)

    def ours(self, config: Any, dtype: str, more: Any = None) -> tool.Output:
        return self._output("cured" if more else "ours", dtype)

    def models(self, config: Any, dtype: str) -> list[dict[str, np.ndarray]]:
        return [{"w": np.full(2, 1.0, dtype)}]


CURE = Difference("they differ", "sce", cure={"floor": 1e-6})
FORMULA = Difference("they differ", "sce", theirs=lambda base: 2.0 * base)
FLOAT64 = Difference("they differ", "sce", exact_in_float64=True)


@pytest.mark.parametrize(
    ("theirs", "ours", "cured", "differs", "explained", "verdict"),
    [
        (2.0, 2.0, 0.0, None, True, "equal"),
        (2.0, 2.0 * (1 + 2.0**-52), 0.0, None, True, "equal but for rounding"),
        (2.0, 3.0, 0.0, None, False, "DIFFERENT"),
        (2.0, -1.0, 0.0, None, False, "DIFFERENT: mergekit: merges; here: no room"),
        (2.0, 3.0, 2.0, CURE, True, "as documented: sce, 100 % of the elements in float32"),
        (2.0, 3.0, 2.5, CURE, False, "DIFFERENT by 2.1e+06 ulp in float32 beside what is meant"),
        (2.0, 2.0, 2.0, CURE, False, "EQUAL, though a difference is noted for it"),
        (2.0, 3.0, 0.0, FORMULA, True, "as documented: sce, 100 % of the elements in float32"),
        (2.5, 3.0, 0.0, FORMULA, False, "DIFFERENT by 2.1e+06 ulp in float32 beside what is meant"),
        (2.0, 3.0, 0.0, FLOAT64, False, "DIFFERENT in float64 too"),
    ],
)
def test_a_difference_is_explained_only_by_its_proof(
    theirs: float, ours: float, cured: float, differs: Difference | None, explained: bool, verdict: str
) -> None:
    case = Case("a case", merge("sce", "a"), differs)
    row = tool.judge(Scripted(theirs, ours, cured), case)  # type: ignore[arg-type]
    assert (row.explained, row.verdict) == (explained, verdict)
    text = page([row], [], "two layers")
    assert f"| {verdict} |" in text
    assert ("they differ" in text) == (differs is not None)


def test_another_config_is_a_difference_that_no_row_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted(2.0, 3.0, 2.0)
    monkeypatch.setattr(
        scripted,
        "ours",
        lambda config, dtype, more=None: tool.Output(
            {"w": np.full(2, 2.0 if more else 3.0, dtype)}, {"layers": 3}
        ),
    )
    row = tool.judge(scripted, Case("a case", merge("sce", "a"), CURE))  # type: ignore[arg-type]
    assert (row.explained, row.verdict) == (False, "DIFFERENT: names, shapes, dtypes or config")
