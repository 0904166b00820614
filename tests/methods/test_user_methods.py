"""Merge methods of a user's own, from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.algebra.extent import Extent
from streammerge.api import merge, plan
from streammerge.errors import BudgetError, InputError, StreammergeError
from streammerge.methods import catalog, registry
from tests.conftest import config_for, output_bytes, read_tensors
from tests.laws.test_methods import VARIANTS
from tests.methods.users import (
    METHODS,
    SHAPES,
    config_of,
)


def test_an_elementwise_formula_does_what_it_says(paths: list[Path], methods: Path, tmp_path: Path) -> None:
    config = config_of("my_midpoint", paths, t=0.25, weight=2.0)
    merge(config, tmp_path / "out", methods=methods)
    merged, base, *models = (read_tensors(p) for p in (tmp_path / "out", *paths))
    for name in SHAPES:
        mean = sum(model[name] for model in models) / len(models)
        torch.testing.assert_close(merged[name], base[name] + 0.25 * (mean - base[name]))


def test_a_row_formula_sees_whole_rows(paths: list[Path], methods: Path, tmp_path: Path) -> None:
    merge(config_of("my_rows", paths), tmp_path / "out", methods=methods)
    merged, *models = (read_tensors(p) for p in (tmp_path / "out", *paths[1:]))
    for name in ("embed", "a.weight"):
        norms = sum(model[name].norm(dim=-1) for model in models) / len(models)
        torch.testing.assert_close(merged[name].norm(dim=-1), norms, rtol=1e-3, atol=1e-4)


def test_a_tensor_formula_sees_the_whole_tensor(paths: list[Path], methods: Path, tmp_path: Path) -> None:
    merge(config_of("my_tensor", paths), tmp_path / "out", methods=methods)
    merged, first = read_tensors(tmp_path / "out"), read_tensors(paths[1])
    for name in SHAPES:
        torch.testing.assert_close(merged[name].abs().max(), first[name].abs().max())


@pytest.mark.parametrize("method", ["my_midpoint", "my_rows", "my_tensor"])
def test_the_bytes_of_a_formula_do_not_depend_on_memory_or_threads(
    method: str, paths: list[Path], methods: Path, small_capacity: Callable[[int, int], None], tmp_path: Path
) -> None:
    small_capacity(1 << 30, 1)
    merge(config_of(method, paths), tmp_path / "whole", methods=methods)
    # Many workers make the chunks small: the embedding is cut into several.
    small_capacity(1 << 23, 40)
    merge(config_of(method, paths), tmp_path / "cut", methods=methods)
    assert output_bytes(tmp_path / "cut") == output_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "word"), [("my_wrong_shape", "not a tensor of shape"), ("my_nothing", "NoneType")]
)
def test_a_formula_that_returns_something_else_is_one_line_with_the_tensor(
    method: str, word: str, paths: list[Path], methods: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=word) as caught:
        merge(config_of(method, paths), tmp_path / "out", methods=methods)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_name_that_a_builtin_method_has_is_refused(
    paths: list[Path], methods: Path, tmp_path: Path
) -> None:
    methods.write_text(METHODS.replace("my_midpoint", "ties"))
    with pytest.raises(InputError, match=r"'ties'.*taken by a built-in"):
        merge(config_of("my_rows", paths), tmp_path / "out", methods=methods)
    assert registry.get_method("ties").origin == "built in"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("import nothing_of_that_name", "nothing_of_that_name"),
        ("def (:", "SyntaxError"),
        ("1 / 0", "ZeroDivision"),
    ],
)
def test_a_file_that_cannot_be_run_is_one_line(
    text: str, word: str, paths: list[Path], methods: Path, tmp_path: Path
) -> None:
    methods.write_text(text)
    with pytest.raises(InputError, match=word) as caught:
        merge(config_of("my_rows", paths), tmp_path / "out", methods=methods)
    assert "my_methods.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(StreammergeError, match=r"none\.py"):
        plan(config_of("my_rows", paths), methods=tmp_path / "none.py")


def test_a_whole_tensor_that_does_not_fit_is_refused_with_both_numbers(
    paths: list[Path], methods: Path, small_capacity: Callable[[int, int], None], tmp_path: Path
) -> None:
    small_capacity(1 << 19, 1)
    with pytest.raises(
        BudgetError, match=r"(embed|a\.weight): .*the whole tensor, .*iB.*leaves 512 KiB.*at least .*iB"
    ):
        merge(config_of("my_tensor", paths), tmp_path / "out", methods=methods)
    assert not (tmp_path / "out").exists()


def test_a_parameter_the_formula_does_not_declare_is_refused(
    paths: list[Path], methods: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"unknown parameter 'tt'"):
        plan(config_of("my_midpoint", paths, tt=1), methods=methods)


def test_without_the_file_the_method_is_unknown(paths: list[Path]) -> None:
    with pytest.raises(InputError, match="unknown method 'my_tensor'"):
        plan(config_of("my_tensor", paths))


def test_an_installed_package_adds_methods_through_its_entry_point(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from importlib.metadata import EntryPoint

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    (tmp_path / "my_installed_methods.py").write_text(
        "import streammerge\n"
        "@streammerge.method('installed_one')\n"
        "def installed_one(models, base):\n"
        "    return models[0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("mine", "my_installed_methods", "streammerge.methods")
    monkeypatch.setattr(catalog, "_entry_points", lambda: (point,))
    catalog.load_builtin()
    assert "installed_one" in registry.all_methods()
    broken = EntryPoint("broken", "no_such_module_here", "streammerge.methods")
    monkeypatch.setattr(catalog, "_entry_points", lambda: (broken,))
    with pytest.raises(InputError, match="broken"):
        catalog.load_builtin()


# --- the same bits on any number of threads


@pytest.mark.parametrize(
    "expression", ["models[0] @ models[1].T @ models[0]", "models[0] - models[1].mean()"]
)
def test_the_bytes_of_sums_and_products_do_not_depend_on_torchs_threads(
    expression: str, make_models: Callable[..., list[Path]], methods: Path, tmp_path: Path
) -> None:
    paths = make_models(shapes={"a.weight": (300, 1100)}, dtype=torch.float32)
    methods.write_text(
        "import streammerge\n"
        "@streammerge.method('my_sums', access='tensor', base='none')\n"
        f"def my_sums(models, base):\n    return {expression}\n"
    )
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            merge(config_of("my_sums", paths), tmp_path / f"{threads}", methods=methods)
            assert torch.get_num_threads() == threads
            outputs.append(output_bytes(tmp_path / f"{threads}"))
    finally:
        torch.set_num_threads(before)
    assert outputs[0] == outputs[1]


# --- refused when it is registered, or named when it fails


@pytest.mark.parametrize(
    ("decorator", "signature", "words"),
    [
        ("access='model'", "models, base", r"access=\"model\" .* access=\"tensor\""),
        ("", "models, base, x=1", r"parameter 'x'; put a \* before it: def f\(models, base, \*, x=…\)"),
        ("", "context, x=1", r"parameter 'x'; put a \* before it: def f\(context, \*, x=…\)"),
        ("", "models, base, **more", r"\*\*more"),
        ("", "models, base, *more", r"\*more"),
        ("", "models", "takes models, base"),
        ("", "", "takes context"),
    ],
)
def test_what_no_config_could_use_is_refused_when_it_is_registered(
    decorator: str, signature: str, words: str, methods: Path, paths: list[Path]
) -> None:
    methods.write_text(
        f"import streammerge\n@streammerge.method('odd', {decorator})\ndef odd({signature}):\n    return None\n"
    )
    with pytest.raises(InputError, match=words) as caught:
        plan(config_of("odd", paths), methods=methods)
    assert str(caught.value).startswith("method 'odd': ")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return models[0].int()", r"^method 'odd': tensor \S+: returned int32 numbers"),
        ("return models[0][:0]", r"^method 'odd': tensor \S+: returned \(0,\), not a tensor of shape"),
        (
            "raise ValueError('no\\nsuch thing')",
            r"^method 'odd' failed on tensor \S+: ValueError: no\\nsuch thing \(STREAMMERGE_DEBUG=1 for the traceback\)$",
        ),
        ("models[7]", r"^method 'odd' failed on tensor \S+: IndexError"),
        ("raise streammerge.errors.ModelError('x.safetensors: bad')", r"^x\.safetensors: bad$"),
    ],
)
def test_a_method_that_fails_is_one_line_that_names_it_and_the_tensor(
    body: str, words: str, methods: Path, paths: list[Path], tmp_path: Path
) -> None:
    methods.write_text(
        "import streammerge, streammerge.errors\n@streammerge.method('odd', base='none')\n"
        f"def odd(models, base):\n    {body}\n"
    )
    with pytest.raises(InputError, match=words) as caught:
        merge(config_of("odd", paths), tmp_path / "out", methods=methods)
    assert caught.value.exit_code == 2


def test_a_method_that_chooses_a_rule_and_fails_is_named_too(methods: Path, paths: list[Path]) -> None:
    methods.write_text(
        "import streammerge\n@streammerge.method('odd', base='none')\ndef odd(scope):\n    return scope.nothing\n"
    )
    with pytest.raises(InputError, match=r"^method 'odd' failed on tensor \S+: AttributeError"):
        plan(config_of("odd", paths), methods=methods)


def test_our_own_errors_keep_their_text_in_a_users_file(methods: Path, paths: list[Path]) -> None:
    methods.write_text("import streammerge\nstreammerge.plan({'merge_method': 'tise', 'models': []})\n")
    with pytest.raises(InputError) as caught:
        plan(config_of("odd", paths), methods=methods)
    assert "my_methods.py" not in str(caught.value)
    assert "Error" not in str(caught.value)


# --- what methods declare


@pytest.mark.parametrize(("method", "parameters"), VARIANTS)
def test_no_method_needs_more_than_it_declares(
    method: str, parameters: dict[str, Any], make_models: Callable[..., list[Path]]
) -> None:
    decided = plan(config_for(method, make_models(), parameters=parameters))
    declared = decided.method
    if any(declared.drops(job.parameters) for job in decided.jobs if job.kind == "merge"):
        return  # a drop before it is no part of it
    order = list(Extent)
    assert max(order.index(access) for access in decided.access) <= order.index(declared.access)


# --- words of the version before


def test_modules_of_the_version_before_are_found_with_a_warning() -> None:
    from streammerge.algebra.rules import Rule, WeightedSum
    from streammerge.statistics.kinds import AbsSum, Statistic

    with pytest.warns(DeprecationWarning, match=r"methods\.recipes\.WeightedSum is now .*rules\.WeightedSum"):
        from streammerge.methods.recipes import WeightedSum as OldSum
    with pytest.warns(DeprecationWarning, match=r"methods\.requests\.AbsSum is now"):
        from streammerge.methods.requests import AbsSum as OldAbsSum
    with pytest.warns(DeprecationWarning, match="Statistic"):
        from streammerge.methods.requests import Request
    with pytest.warns(DeprecationWarning, match="Rule"):
        from streammerge.methods.recipes import Recipe
    assert (OldSum, OldAbsSum, Request, Recipe) == (WeightedSum, AbsSum, Statistic, Rule)
    with pytest.raises(ImportError, match="Nothing"):
        from streammerge.methods.requests import Nothing  # noqa: F401


def test_a_base_called_donor_is_the_template_with_a_warning(methods: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"base=\"template\""):
        streammerge.method("of_a_donor", base="donor")(lambda models, base: models[0])
    assert registry.get_method("of_a_donor").base == "template"


# --- what the types say


def test_a_value_per_model_and_a_statistic_have_their_types() -> None:
    from streammerge.algebra.task_vectors import TaskVector
    from streammerge.statistics.asking import ask, ask_all
    from streammerge.statistics.kinds import AbsSum

    def steps() -> Any:
        total = yield from ask(AbsSum(TaskVector(0)))
        both = yield from ask_all([AbsSum(TaskVector(1)), AbsSum(TaskVector(2))])
        return total, both

    asked = steps()
    assert next(asked) == [AbsSum(TaskVector(0))]
    assert asked.send([1.5]) == [AbsSum(TaskVector(1)), AbsSum(TaskVector(2))]
    with pytest.raises(StopIteration) as stop:
        asked.send([2.0, 3.0])
    assert stop.value.value == (1.5, [2.0, 3.0])
    assert streammerge.per_model(1.0) == 1.0


def test_an_access_that_is_none_is_refused_when_it_is_registered(methods: Path) -> None:
    with pytest.raises(
        InputError, match=r"unknown access 'rows': give one of elementwise, row, tensor, model"
    ):
        streammerge.method("of_rows", access="rows")(lambda models, base: models[0])
