"""The command `compare`: text for people, one object for programs."""

from __future__ import annotations

import json
from pathlib import Path

import streammerge
from streammerge.report.comparison import comparison_text, comparison_values
from tests.cli.running import Cli
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
