"""`merge --report`: against float64 sums of our own; the merge's bytes and its success never depend on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streammerge
from streammerge.engine.merge import Summary
from streammerge.errors import BudgetError, InputError, Stopped, StreammergeWarning, WorldError
from streammerge.events import Event
from streammerge.report.pages.merged import MergeReport, merge_page
from tests.conftest import as_float64, write_model, write_models

pytest.importorskip("vl_convert", reason="the extra `pages` is not installed")

quiet: dict[str, Any] = {"on_event": lambda event: None}
DENSITY = 0.3
LAYERS = ("model.layers.0.", "model.layers.1.")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"), 2)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[MergeReport]:
    """The values of the pages that are asked for; nothing is drawn."""
    found: list[MergeReport] = []

    def keep(report: MergeReport) -> str:
        found.append(report)
        return "a page"

    monkeypatch.setattr("streammerge.api.reporting.merge_page", keep)
    return found


def ties(paths: list[Path], **more: Any) -> dict[str, Any]:
    parameters = {"density": DENSITY, "weight": 1.0}
    models = [{"model": str(path), "parameters": parameters} for path in paths[1:]]
    return {"merge_method": "ties", "base_model": str(paths[0]), "models": models, "dtype": "float32", **more}


def linear(paths: list[Path]) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [str(path) for path in paths[1:]],
        "parameters": {"weight": 1.0},
    }


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def layer(tensors: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    return np.concatenate([value.ravel() for name, value in tensors.items() if name.startswith(prefix)])


def check_ties(report: MergeReport, paths: list[Path], out: Path) -> None:
    """Hold a report on a merge by TIES against the files."""
    base, *models, output = [as_float64(path) for path in (*paths, out)]
    assert report.comparison is not None
    places = report.comparison.by_layer()
    for number, prefix in enumerate(LAYERS):
        sums = places["model.layers", number]
        deltas = [layer(model, prefix) - layer(base, prefix) for model in (*models, output)]
        expected = np.array([[a @ b for b in deltas] for a in deltas])
        assert sums.dots == pytest.approx(expected, rel=1e-9, abs=1e-12)
        here = [one for one in report.signs if one.layer == ("model.layers", number)]
        moves = np.sum([(one.moves.up, one.moves.down, one.moves.still) for one in here], axis=0)
        own = deltas[-1]
        assert moves.tolist() == [(own > 0).sum(), (own < 0).sum(), (own == 0).sum()]
        for i, delta in enumerate(deltas[:-1]):
            pairs = np.sum([(one.with_model[i].agree, one.with_model[i].conflict) for one in here], axis=0)
            assert pairs.tolist() == [(delta * own > 0).sum(), (delta * own < 0).sum()]
    assert report.comparison.models[-1] == "output"
    assert report.has_base


def check_kept(report: MergeReport, summary: Summary) -> None:
    """Hold the densities by layer against the totals that the manifest records."""
    for model, density in enumerate(summary.densities):
        assert sum(one.kept[model] for one in report.kept) == density.kept
        assert sum(one.of for one in report.kept) == density.of
    matrices = [one for one in report.kept if one.of > 1000]
    assert {one.layer for one in matrices} == {None, ("model.layers", 0), ("model.layers", 1)}
    for one in matrices:
        assert [count / one.of for count in one.kept] == pytest.approx([DENSITY] * 2, rel=0.01)


def test_what_ties_did_is_measured_exactly(
    paths: list[Path], tmp_path: Path, reports: list[MergeReport]
) -> None:
    out = tmp_path / "out"
    summary = streammerge.merge(ties(paths), out, report=tmp_path / "page.html", **quiet)
    assert (tmp_path / "page.html").read_text() == "a page"
    check_ties(reports[0], paths, out)
    check_kept(reports[0], summary)
    assert [name for name, _ in reports[0].densities] == [str(path) for path in paths[1:]]
    assert reports[0].profile["stages"]["commit"]["wall"] > 0
    again = tmp_path / "again"
    streammerge.merge(ties(paths), again, report=tmp_path / "page.html", kernels=False, **quiet)
    assert reports[1].signs == reports[0].signs
    assert reports[1].kept == reports[0].kept
    plain = tmp_path / "plain"
    streammerge.merge(ties(paths), plain, **quiet)
    assert contents(plain) == contents(out)


def test_a_resumed_merge_and_a_complete_one_are_reported(
    paths: list[Path], tmp_path: Path, reports: list[MergeReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"

    def fail(*arguments: object) -> None:
        raise WorldError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("streammerge.engine.session.commit", fail)
        with pytest.raises(WorldError, match="the disk is full"):
            streammerge.merge(ties(paths), out, report=page, **quiet)
    assert reports == []
    assert not page.exists()
    summary = streammerge.merge(ties(paths), out, report=page, **quiet)
    assert summary.bytes_resumed > 0
    check_kept(reports[0], summary)
    assert any("finished by an earlier run" in note for note in reports[0].notes)
    assert streammerge.merge(ties(paths), out, report=page, **quiet).already_complete
    check_ties(reports[1], paths, out)
    assert (list(reports[1].kept), dict(reports[1].profile)) == ([], {})
    assert reports[1].densities == reports[0].densities
    assert any("there are no times" in note for note in reports[1].notes)


def test_without_a_base_the_distances_begin_at_the_output(
    paths: list[Path], tmp_path: Path, reports: list[MergeReport]
) -> None:
    out = tmp_path / "files" / "model.safetensors"
    out.parent.mkdir()
    streammerge.merge(linear(paths), out, report=tmp_path / "page.html", **quiet)
    (report,) = reports
    assert report.comparison is not None
    assert (report.has_base, report.comparison.base, len(report.comparison.models)) == (False, "output", 2)
    output = as_float64(out.parent)
    for number, prefix in enumerate(LAYERS):
        for i, path in enumerate(paths[1:]):
            expected = np.linalg.norm(layer(as_float64(path), prefix) - layer(output, prefix))
            assert report.comparison.by_layer()["model.layers", number].norm(i) == pytest.approx(expected)


def test_stages_and_slices_are_reported(
    paths: list[Path], tmp_path: Path, reports: list[MergeReport]
) -> None:
    _, one, two = map(str, paths)
    stages = (
        f"name: first\nmerge_method: linear\nmodels: [{one}, {two}]\nparameters: {{weight: 1.0}}\n---\n"
        f"merge_method: linear\nmodels: [first, {two}]\nparameters: {{weight: 1.0}}\ndtype: float32\n"
    )
    streammerge.merge(stages, tmp_path / "stages", report=tmp_path / "page.html", **quiet)
    assert reports[0].comparison is not None
    assert reports[0].comparison.models == ("first", two)
    assert reports[0].comparison.total.norm(0) == pytest.approx(reports[0].comparison.total.norm(1), rel=0.05)
    slices = [{"sources": [{"model": model, "layer_range": [0, 1]}]} for model in (one, two)]
    config = {"merge_method": "passthrough", "slices": slices}
    streammerge.merge(config, tmp_path / "slices", report=tmp_path / "page.html", **quiet)
    assert reports[1].comparison is not None
    assert "merged from other models than most tensors" in reports[1].comparison.left_out.values()


def test_the_quantisation_error_is_that_of_the_stored_values(
    tmp_path: Path, reports: list[MergeReport]
) -> None:
    generator = torch.Generator().manual_seed(5)
    name = "model.layers.0.mlp.up_proj.weight"
    models = [
        str(write_model(tmp_path / f"m{i}", {name: torch.randn(256, 128, generator=generator).bfloat16()}))
        for i in range(2)
    ]
    config = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}
    streammerge.merge({**config, "dtype": "float32"}, tmp_path / "exact", **quiet)
    out = tmp_path / "coded"
    streammerge.merge(
        {**config, "quantize": "fp8", "dtype": "bfloat16"}, out, report=tmp_path / "p.html", **quiet
    )
    (report,) = reports
    streammerge.merge(
        {"merge_method": "passthrough", "models": [str(out)], "dtype": "float32"},
        tmp_path / "decoded",
        **quiet,
    )
    exact, decoded = (as_float64(tmp_path / which)[name] for which in ("exact", "decoded"))
    expected = np.linalg.norm(decoded - exact) / np.linalg.norm(exact)
    assert 0.01 < expected < 0.05
    assert report.rounding is not None
    assert report.rounding.total.relative(0) == pytest.approx(expected, rel=1e-9)
    assert "Quantisation error by layer" in merge_page(report)


def test_a_report_that_fails_leaves_the_merge_complete(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(report: MergeReport) -> str:
        raise RuntimeError("the library is broken\nin two lines")

    monkeypatch.setattr("streammerge.api.reporting.merge_page", fail)
    out, page = tmp_path / "out", tmp_path / "page.html"
    with pytest.warns(
        StreammergeWarning, match=r"out is complete, but its report .* was not written: the library"
    ):
        summary = streammerge.merge(linear(paths), out, report=page, progress=False)
    assert not summary.already_complete
    assert not page.exists()
    assert not streammerge.verify(out).problems


def test_a_report_that_is_stopped_leaves_the_merge_complete(paths: list[Path], tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    stop = threading.Event()

    def on_event(event: Event) -> None:
        if event.kind == "commit":
            stop.set()

    with pytest.raises(Stopped):
        streammerge.merge(linear(paths), out, report=page, on_event=on_event, stop=stop)
    assert not page.exists()
    assert streammerge.merge(linear(paths), out, **quiet).already_complete


def test_a_report_that_cannot_be_made_is_refused_before_the_merge(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match="lies in OUT"):
        streammerge.merge(linear(paths), out, report=out / "page.html", **quiet)
    with monkeypatch.context() as patched:
        patched.setattr("streammerge.report.pages.needed.DRAWING_NBYTES", 1 << 50)
        with pytest.raises(BudgetError, match="is too little for a report"):
            streammerge.merge(linear(paths), out, report=tmp_path / "page.html", **quiet)
    monkeypatch.setattr("streammerge.report.pages.needed.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        streammerge.merge(linear(paths), out, report=tmp_path / "page.html", **quiet)
    assert list(out.iterdir()) == []


def test_bits_of_a_report_do_not_depend_on_memory_or_threads(
    paths: list[Path],
    tmp_path: Path,
    reports: list[MergeReport],
    small_capacity: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streammerge.merge(ties(paths), tmp_path / "out", **quiet)
    streammerge.merge(ties(paths), tmp_path / "out", report=tmp_path / "page.html", **quiet)
    monkeypatch.setattr("streammerge.report.pages.needed.DRAWING_NBYTES", 0)
    small_capacity(330_000, 1)
    streammerge.merge(ties(paths), tmp_path / "out", report=tmp_path / "page.html", **quiet)
    first, second = reports
    assert first.comparison is not None
    assert second.comparison is not None
    assert first.signs == second.signs
    assert first.comparison.total.dots.tobytes() == second.comparison.total.dots.tobytes()
