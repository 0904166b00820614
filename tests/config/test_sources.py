"""Configs from mappings and files: the same config, and nothing but ConfigError for the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.config import MergeConfig, config_from_mapping, load_config, parse_config
from streammerge.errors import ConfigError

CONFIG = """\
merge_method: linear
models: [{model: a, parameters: {weight: [0, 0.5]}}, {model: b}]
seed: 7
"""


def test_a_mapping_may_hold_paths_and_tuples() -> None:
    data = {
        "merge_method": "linear",
        "models": ({"model": Path("/x/a"), "parameters": {"weight": (0, 1e-5)}},),
        "exclude": ("1e-5",),
    }
    config = config_from_mapping(data)
    assert config.models[0].reference == "/x/a"
    assert config == parse_config(config.text, "config")
    assert config.exclude == ("1e-5",)


class _Opaque:
    pass


BAD_MAPPINGS = [
    ({"merge_method": _Opaque()}, "config: merge_method: a _Opaque is not a value a config can hold"),
    ({1: 2}, "config: key 1 is not a string"),
    ({"a\ud800": 2}, "config: key 'a"),
    ({"merge_method": "a\0"}, "config: merge_method: NUL"),
    ({"merge_method": b"x"}, "config: merge_method: a bytes is not a value"),
    ([1], "config: a config is a map"),
    ({"merge_method": "x", "models": ["a"], "parameters": {"w": 10**5000}}, "config: parameters.w: an integ"),
]


@pytest.mark.parametrize(("data", "words"), BAD_MAPPINGS, ids=range(len(BAD_MAPPINGS)))
def test_a_mapping_of_other_things_is_refused(data: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(data)  # type: ignore[arg-type]
    assert str(caught.value).startswith(words)


def test_a_mapping_that_contains_itself_is_refused() -> None:
    data: dict[str, object] = {}
    data["a"] = data
    with pytest.raises(ConfigError, match="nested deeper than 50"):
        config_from_mapping(data)


def test_a_config_file_is_read_and_named_as_given(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_bytes(CONFIG.encode())
    (tmp_path / "link.yml").symlink_to(path)
    assert load_config(path).where == str(path)
    assert load_config(str(tmp_path / "link.yml")).text == CONFIG


def _fifo(path: Path) -> None:
    os.mkfifo(path)


BAD_FILES = [
    (lambda path: None, "cannot be read: No such file or directory"),
    (_fifo, "not a regular file"),
    (Path.mkdir, "not a regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    (lambda path: path.symlink_to(path), "cannot be read: Too many levels"),
    (lambda path: path.write_bytes(b" " * (4 << 20) + b"a: 1"), "larger than 4 MiB"),
    (lambda path: path.write_bytes(b"\xff"), "line 1: not UTF-8"),
]


@pytest.mark.parametrize(("make", "words"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_anything_but_a_small_regular_file_is_refused_without_waiting(tmp_path, make, words) -> None:
    path = tmp_path / "c.yml"
    make(path)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {words}")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_path_that_cannot_be_is_refused(path: str) -> None:
    with pytest.raises(ConfigError):
        load_config(path)


_WORDS = st.sampled_from(
    """merge_method models model parameters weight filter value alias dtype seed exclude linear path
    revision base_model 1 0.5 true null [] {} - .nan a+b 2001-99-99 &a *a << slices lora
    """.split()  # noqa: SIM905
)
_JUNK = st.lists(_WORDS | st.sampled_from([":", ": ", "\n", "\n  ", "- ", ", ", "{", "}", "[", "]"]))


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        _JUNK.map("".join),
        _JUNK.map(lambda w: "merge_method: linear\nmodels: [{model: a}]\n" + "".join(w)),
        st.binary(),
    )
)
def test_any_bytes_give_a_config_or_config_error(text: str | bytes) -> None:
    with suppress(ConfigError):
        assert isinstance(parse_config(text), MergeConfig)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=5), t, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from(["base_model", "dtype", "parameters", "seed", "exclude", "slices", "x"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES), st.lists(_VALUES, max_size=2), st.dictionaries(st.text(), _VALUES))
def test_any_mapping_gives_a_config_that_round_trips_or_config_error(extra, models, parameters) -> None:
    first = {"model": "a", "parameters": parameters}
    try:
        config = config_from_mapping({"merge_method": "x", "models": [first, *models], **extra})
    except ConfigError:
        return
    assert parse_config(config.text, "config") == config


def test_importing_the_config_loads_no_array_library() -> None:
    code = (
        "import sys, streammerge.config; sys.exit(any(m in sys.modules for m in ('numpy', 'torch', 'zarr')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
