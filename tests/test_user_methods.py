"""Merge methods of a user's own, from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge, plan
from streammerge.errors import BudgetError, InputError, StreammergeError
from streammerge.methods import catalog, registry
from tests.conftest import config_for, output_bytes, read_tensors

METHODS = """
import torch
import streammerge
from streammerge import PerModel

@streammerge.method("my_midpoint", base="required")
def my_midpoint(models, base, *, t: float = 0.5, weight: PerModel[float] = 1.0):
    '''Step from the base towards the weighted mean.'''
    mean = sum(w * m for w, m in zip(weight, models)) / sum(weight)
    return base + t * (mean - base)

@streammerge.method("my_rows", access="row", base="none")
def my_rows(models, base, *, eps: float = 1e-6):
    '''The mean, each row scaled to the mean norm of the inputs' rows.'''
    mean = sum(models) / len(models)
    norm = sum(m.norm(dim=-1, keepdim=True) for m in models) / len(models)
    return mean / (mean.norm(dim=-1, keepdim=True) + eps) * norm

@streammerge.method("my_tensor", access="tensor", base="none")
def my_tensor(models, base, *, scale: float = 1.0):
    '''The mean, scaled to the largest magnitude of the first model.'''
    mean = sum(models) / len(models)
    return scale * mean * (models[0].abs().amax() / mean.abs().amax().clamp_min(1e-12))

@streammerge.method("my_wrong_shape", base="none")
def my_wrong_shape(models, base):
    '''Too few elements.'''
    return models[0].reshape(-1)[:1]

@streammerge.method("my_nothing", base="none")
def my_nothing(models, base):
    '''No tensor at all.'''
    return None
"""
SHAPES: dict[str, tuple[int, ...]] = {"embed": (600, 64), "a.weight": (96, 130), "norm": (64,), "scalar": ()}


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    catalog.load_builtin()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    path = tmp_path / "my_methods.py"
    path.write_text(METHODS)
    return path


@pytest.fixture
def paths(make_models: Callable[..., list[Path]]) -> list[Path]:
    return make_models(shapes=SHAPES, dtype=torch.float32)


def config_of(method: str, paths: list[Path], **parameters: Any) -> dict[str, Any]:
    config = config_for(method, paths, parameters=parameters)
    if method != "my_midpoint":
        del config["base_model"]
    return config


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
    monkeypatch.setattr(catalog, "entry_points", lambda group: [point])
    catalog.load_builtin()
    assert "installed_one" in registry.all_methods()
    broken = EntryPoint("broken", "no_such_module_here", "streammerge.methods")
    monkeypatch.setattr(catalog, "entry_points", lambda group: [broken])
    with pytest.raises(InputError, match="broken"):
        catalog.load_builtin()
