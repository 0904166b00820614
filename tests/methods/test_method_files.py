"""The identity of a user's method: all local files that it imports."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.api import merge, plan
from streammerge.errors import InputError, StreammergeError
from streammerge.methods import registry
from tests.conftest import config_for, read_tensors
from tests.methods.users import (
    config_of,
)

# --- which code a method is

HELPED = """
import streammerge

@streammerge.method("my_helped", base="none")
def my_helped(models, base):
    from helper_of_mine import scale
    return models[0] * scale()
"""


@pytest.fixture
def helped(methods: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a method that imports a module, which imports another."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("helper_of_mine", "helper_of_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    methods.write_text(HELPED)
    methods.with_name("helper_of_mine.py").write_text(
        "from helper_of_helper import two\ndef scale():\n    return two / 2\n"
    )
    methods.with_name("helper_of_helper.py").write_text("two = 2.0\n")
    return methods


def test_a_method_is_all_local_files_that_it_imports(helped: Path, paths: list[Path]) -> None:
    identity = plan(config_of("my_helped", paths), methods=helped).identity()
    assert {"method module helper_of_mine", "method module helper_of_helper"} <= set(identity)
    assert not any("torch" in name or "streammerge" in name for name in identity)


@pytest.mark.parametrize("name", ["helper_of_mine", "helper_of_helper"])
def test_a_finished_merge_is_not_taken_for_one_by_other_helpers(
    name: str, helped: Path, paths: list[Path], tmp_path: Path
) -> None:
    out, config = tmp_path / "out", config_of("my_helped", paths)
    merge(config, out, methods=helped)
    assert merge(config, out, methods=helped).already_complete
    with helped.with_name(f"{name}.py").open("a") as file:
        file.write("two = 4.0\n")
    with pytest.raises(StreammergeError, match=f"method module {name}"):
        merge(config, out, methods=helped)
    merge(config, out, methods=helped, overwrite=True)
    changed = read_tensors(out)["embed"]
    expected = read_tensors(paths[1])["embed"] * 2.0
    assert torch.equal(changed, expected), "a module that was edited is imported anew"


def test_a_plan_with_a_users_method_goes_through_pickle(helped: Path, paths: list[Path]) -> None:
    decided = plan(config_of("my_helped", paths), methods=helped)
    packed = pickle.dumps(decided)
    del registry._METHODS["my_helped"]
    again = pickle.loads(packed)
    assert again.identity() == decided.identity()
    assert again.method.origin == "user_methods_my_methods"
    helped.with_name("helper_of_helper.py").write_text("two = 8.0\n")
    with pytest.raises(InputError, match=r"'my_helped' has changed .*\(method module helper_of_helper\)"):
        pickle.loads(packed)


def test_a_plan_with_a_builtin_method_goes_through_pickle(paths: list[Path]) -> None:
    decided = plan(config_for("slerp", paths[:2], parameters={"t": 0.5}))
    again = pickle.loads(pickle.dumps(decided))
    assert again.method is decided.method
    assert pickle.loads(pickle.dumps(registry.REQUIRED)) is registry.REQUIRED


def test_a_method_without_a_file_is_its_code(methods: Path) -> None:
    found = []
    for number in (1.0, 2.0):
        space: dict[str, Any] = {"streammerge": streammerge, "__name__": "somewhere"}
        exec(
            "@streammerge.method('of_no_file', base='none')\n"
            f"def of_no_file(models, base):\n    return models[0] * {number}\n",
            space,
        )
        found.append(registry.get_method("of_no_file").fingerprint)
    assert found[0] != found[1]
