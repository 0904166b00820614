"""The public names: found, spelt out, documented, lazy; what they show, warn of and raise."""

from __future__ import annotations

import ast
import inspect
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge import api
from streammerge.events import Event
from tests.conftest import config_for

FUNCTIONS = [name for name in streammerge.__all__ if inspect.isfunction(getattr(streammerge, name))]


def test_every_public_name_is_there_listed_and_has_a_home() -> None:
    assert set(streammerge.__all__) <= set(dir(streammerge))
    assert {name for names in streammerge._HOMES.values() for name in names} == set(streammerge.__all__)
    assert all(callable(getattr(streammerge, name)) for name in streammerge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'marge'"):
        streammerge.marge  # noqa: B018


def test_the_module_tells_how_it_is_used() -> None:
    text = streammerge.__doc__ or ""
    assert "import streammerge" in text
    assert all(name in text for name in FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_takes_returns_raises_and_shows_an_example(name: str) -> None:
    function = getattr(streammerge, name)
    text = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    sections = [part for part in ("Parameters", "Raises", "Examples") if f"\n{part}\n---" not in text]
    refuses_nothing = name in ("method", "per_model")
    assert sections == (["Raises"] if refuses_nothing else [])
    described = text.split("Parameters\n---")[1].split(
        "\n\n" + ("Examples" if refuses_nothing else "Raises")
    )[0]
    words = described.replace(",", " ").split()
    assert [parameter for parameter in parameters if parameter not in words] == []


def test_merge_takes_all_options_of_plan_with_the_same_defaults() -> None:
    merge, plan = (
        inspect.signature(function).parameters for function in (streammerge.merge, streammerge.plan)
    )
    assert plan["out"].default is None  # the one thing that a plan can do without
    assert {name: merge[name].default for name in plan if name != "out"} == {
        name: parameter.default for name, parameter in plan.items() if name != "out"
    }


def test_a_type_checker_sees_every_public_name_where_it_lives() -> None:
    tree = ast.parse(Path(streammerge.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {
        (f"streammerge.{home}", name) for home, names in streammerge._HOMES.items() for name in names
    }


def test_warnings_are_python_warnings_that_point_at_the_callers_line(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models()
    config = config_for("slerp", paths, parameters={"t": 0.5, "weight": 1.0})
    with pytest.warns(streammerge.StreammergeWarning, match="weight") as caught:
        api.merge(config, tmp_path / "out", memory="1GiB", progress=False)
    assert {warning.filename for warning in caught} == {__file__}
    events: list[Event] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        api.merge(config, tmp_path / "out", memory="1GiB", on_event=events.append)
    assert any("weight" in event.values["message"] for event in events if event.kind == "warning")


def test_a_merge_shows_a_bar_on_a_terminal_lines_elsewhere_and_nothing_if_told_so(
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[str] = []

    class Bar:
        def __init__(self, what: str) -> None:
            made.append(f"bar of {what}")

        def __call__(self, event: Event) -> None:
            made.append(event.kind)

        def close(self) -> None:
            made.append("closed")

    monkeypatch.setattr("streammerge.report.progress.BarReporter", lambda what, signals: Bar(what))
    monkeypatch.setattr("streammerge.api.feedback.BarReporter", Bar)
    paths = make_models()
    config = config_for("linear", paths)
    api.merge(config, tmp_path / "quiet", memory="1GiB", progress=False)
    assert made == []
    assert capsys.readouterr() == ("", "")
    api.merge(config, tmp_path / "lines", memory="1GiB")
    assert made == []
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "linear" in stderr
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    api.merge(config, tmp_path / "bar", memory="1GiB")
    assert (made[0], made[-1]) == ("bar of merging", "closed")
    assert "commit" in made
    monkeypatch.setattr("streammerge.api.feedback._in_notebook", lambda: True)
    made.clear()
    with pytest.raises(streammerge.OutputError):
        api.merge(config_for("linear", paths, dtype="float32"), tmp_path / "bar", memory="1GiB")
    assert (made[0], made[-1]) == ("bar of merging", "closed")


def test_a_merge_stopped_by_ctrl_c_goes_on_when_called_again(
    make_models: Callable[..., list[Path]], tmp_path: Path, small_capacity: Callable[[int, int], None]
) -> None:
    config = config_for("ties", make_models(), parameters={"density": 0.3})
    api.merge(config, tmp_path / "whole", memory="1GiB", progress=False)
    small_capacity(1 << 16, 1)

    def interrupt(event: Event) -> None:
        if event.kind == "progress" and event.values["elements"]:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        api.merge(config, tmp_path / "out", on_event=interrupt)
    assert threading.active_count() < before + 8
    done = api.merge(config, tmp_path / "out", progress=False)
    assert done.bytes_resumed
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_summary_names_the_models_of_its_densities(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models()
    config = config_for("ties", paths, parameters={"density": 0.3})
    for _ in range(2):  # merged, and found complete
        done = api.merge(config, tmp_path / "out", memory="1GiB", progress=False)
        assert [density.model for density in done.densities] == [str(path) for path in paths[1:]]
        assert all(0.28 < density.density < 0.32 for density in done.densities)


def test_errors_are_one_family() -> None:
    assert issubclass(streammerge.ModelError, streammerge.InputError)
    assert not issubclass(streammerge.Stopped, KeyboardInterrupt)


def test_a_config_may_be_text(make_models: Callable[..., list[Path]]) -> None:
    _, first, second, _ = make_models()
    text = f"merge_method: linear\nmodels: [{first}, {second}]\nparameters: {{weight: 0.5}}\n"
    assert len(streammerge.plan(text, memory="1GiB").models) == 2


def test_a_model_and_the_methods_can_be_looked_at(make_models: Callable[..., list[Path]]) -> None:
    index = streammerge.inspect_model(make_models()[0])
    assert index["model.embed_tokens.weight"].shape == (700, 64)
    assert streammerge.list_methods()["ties"].parameters["density"].default == 1.0


def test_a_plan_shows_itself_in_a_few_lines(make_models: Callable[..., list[Path]]) -> None:
    config = config_for("ties", make_models(), parameters={"density": 0.3})
    decided: Any = streammerge.plan(config, memory="1GiB")
    assert len(repr(decided)) < 600
    for part in ("ties", "3", "7 tensors", "KiB", "1.0 GiB"):
        assert part in decided.summary()
    html = decided._repr_html_()
    assert "<table" in html
    assert "ties" in html


@pytest.mark.parametrize(
    "option", [{"seed": -1}, {"seed": 2**64}, {"seed": "1"}, {"threads": "2"}, {"threads": 0}]
)
def test_a_seed_or_a_number_of_threads_that_is_none_is_refused(
    make_models: Callable[..., list[Path]], tmp_path: Path, option: dict[str, Any]
) -> None:
    """A manifest with such a seed could not be read again."""
    config = {"merge_method": "linear", "models": list(map(str, make_models(2))), "parameters": {"weight": 1}}
    for called in (
        lambda: streammerge.plan(config, **option),
        lambda: streammerge.merge(config, tmp_path / "out", **option),
    ):
        with pytest.raises(streammerge.InputError, match=next(iter(option))):
            called()
