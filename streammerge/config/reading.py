"""Read a config from a file, a pipe, standard input, a text, or a Python mapping."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import replace

from streammerge.config.moe_config import any_config_of
from streammerge.config.schema import MergeConfig
from streammerge.config.stages import as_map, staged_config
from streammerge.config.strict_yaml import MAX_BYTES, MAX_DEPTH, UNSPEAKABLE, dump_yaml, load_documents
from streammerge.config.wording import child, refuse, shown
from streammerge.errors import ConfigError

STDIN = "-"
"""The path that means standard input."""
_PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Prefixes of paths that mean open descriptors, such as a shell's `<(command)`; reading from these pipes waits."""


def parse_config(text: bytes | str, where: str = "config.yml") -> MergeConfig:
    """Return the config that the YAML `text` describes; raise ConfigError if it is invalid."""
    documents = load_documents(text, where)
    verbatim = text if isinstance(text, str) else bytes(text).decode("utf-8")
    return (
        staged_config(documents, verbatim, where)
        if len(documents) > 1
        else any_config_of(as_map(documents[0], where), verbatim, where)
    )


def load_config(path: str | os.PathLike[str]) -> MergeConfig:
    """Return the config in the file at `path`, of at most 4 MiB; raise ConfigError if it is invalid.

    `path` is a regular file, ``-`` for standard input, or a pipe opened by the caller's shell (``/dev/fd/63``).
    """
    where = os.fspath(path)
    if not isinstance(where, str):
        where = os.fsdecode(where)
    try:
        if where == STDIN:
            return parse_config(_read_all(os.dup(0)), "standard input")
        # Non-blocking, so that a FIFO without a writer does not hang before fstat detects it.
        fd = os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode) and not where.startswith(_PIPES):
            os.close(fd)
            refuse(
                where,
                "not a regular file (give the path of a YAML file, or - and the text on standard input)",
            )
        data = _read_all(fd)
    except OSError as error:
        if "\n" in where.strip() or "merge_method:" in where:
            refuse("config", "this is YAML text, not a path: write it to a file, or pass a mapping")
        refuse(where or "config", f"cannot be read: {error.strerror}")
    except ConfigError:
        raise
    except ValueError:
        refuse(where, "NUL in a path")
    return parse_config(data, where)


def _read_all(fd: int) -> bytes:
    """Read a descriptor up to the largest size of a config, and close it."""
    with open(fd, "rb") as file:
        os.set_blocking(file.fileno(), True)
        return file.read(MAX_BYTES + 1)


def config_from_mapping(data: Mapping[str, object], where: str = "config") -> MergeConfig:
    """Return the config that `data`, structured like the YAML, describes.

    Paths may be given as `Path`, lists as tuples, numbers as numpy's scalars. The `text` of the result is YAML that
    parses to the same config.
    """
    plain = as_map(_plain(data, f"{where}:", 0), where)
    return replace(any_config_of(plain, "", where), text=dump_yaml(plain))


def _plain(value: object, path: str, depth: int) -> object:
    """Return a deep copy of `value` in YAML's types."""
    if depth > MAX_DEPTH:
        refuse(path, f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or UNSPEAKABLE.search(key):
                refuse(path, f"key {shown(key)} is not a string, or none that UTF-8 can encode")
        return {str(key): _plain(item, child(path, key), depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return _plain(os.fspath(value), path, depth)
    if type(value).__module__ == "numpy":
        value = _of_numpy(value, path)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, list):
        return _plain(value, path, depth)
    if isinstance(value, str) and UNSPEAKABLE.search(value):
        refuse(path, f"NUL or half a surrogate pair in {shown(value)}")
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return refuse(path, f"{shown(value)} is not a value a config can hold (use float, int, str …)")


def _of_numpy(value: object, path: str) -> object:
    """Return a numpy scalar or vector in Python's types. Floats become the value of their shortest decimal, so that
    ``np.float32(0.3)`` is 0.3."""
    import numpy as np

    if isinstance(value, np.floating):
        return float(str(value))
    if isinstance(value, np.bool_ | np.integer | np.str_):
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return _of_numpy(value[()], path)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return [_of_numpy(item, path) for item in value]
    return refuse(path, f"a {type(value).__name__} is not a value a config can hold (use float, int, str …)")
