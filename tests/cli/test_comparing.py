"""The command `compare`: text for people, one object for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import streammerge
from streammerge.report.comparison import comparison_text, comparison_values
from tests.cli.running import Cli, write_config
from tests.conftest import write_models


def test_the_command_prints_a_screen_or_one_object(cli: Cli, tmp_path: Path) -> None:
    base, *models = write_models(tmp_path, 2)
    found = streammerge.compare(models, base, on_event=lambda event: None)
    run = cli("compare", *models, "--base", base, "--quiet")
    assert (run.code, run.out.rstrip()) == (0, comparison_text(found))
    as_json = cli("compare", *models, "--base", base, "--json")
    assert json.loads(as_json.out) == json.loads(json.dumps(comparison_values(found)))


def test_one_model_alone_is_refused_in_one_line(cli: Cli, tmp_path: Path) -> None:
    run = cli("compare", write_models(tmp_path, 1)[0])
    assert run.code == 2
    assert (
        run.err
        == "streammerge: compare: only one model and no base: name at least two models, or give --base\n"
    )


def test_the_page_is_written_after_the_text(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="the extra `pages` is not installed")
    base, *models = write_models(tmp_path, 1)
    run = cli("compare", *models, "--base", base, "--quiet", "--html", tmp_path / "page.html")
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith("base ")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_a_page_that_cannot_be_made_is_refused_before_any_work(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "nothing here"  # not even looked for
    run = cli("compare", missing, missing, "--html", tmp_path / "model.safetensors")
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert "--html" in run.err
    assert "choose one that ends in .html" in run.err
    monkeypatch.setattr("streammerge.report.pages.needed.find_spec", lambda name: None)
    run = cli("compare", missing, missing, "--html", tmp_path / "page.html")
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert "pip install 'streammerge[pages]'" in run.err


def test_a_page_needs_memory_to_be_drawn(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vl_convert", reason="the extra `pages` is not installed")
    base, *models = write_models(tmp_path, 1)
    monkeypatch.setattr("streammerge.report.pages.needed.DRAWING_NBYTES", 1 << 50)
    run = cli("compare", *models, "--base", base, "--quiet", "--html", tmp_path / "page.html")
    assert (run.code, run.out) == (2, "")
    assert "is too little for a page: the process itself needs" in run.err
    assert not (tmp_path / "page.html").exists()


def test_a_merge_reports_on_itself(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="the extra `pages` is not installed")
    models = [str(path) for path in write_models(tmp_path, 2)]
    config = write_config(tmp_path / "mean.yml", {"merge_method": "linear", "models": models[1:]})
    page = tmp_path / "page.html"
    run = cli("merge", config, tmp_path / "page.html.d", "--json", "--report", page)
    events = [json.loads(line)["event"] for line in run.out.splitlines()]
    assert (run.code, events[-1]) == (0, "done")
    assert events.index("report") > events.index("commit")
    assert page.read_text().count("<svg") > 4
    refused = cli("merge", config, tmp_path / "new", "--report", tmp_path / "page.txt")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--report" in refused.err
    assert not (tmp_path / "new").exists()
