"""A case of hostile input, and the sound models around it."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Build = Callable[[Path], None]
"""Changes the sound directory of a case into the hostile one."""

CONFIG = "merge_method: linear\nmodels:\n  - model: a\n  - model: b\n"
VALUES = {"a": 1.0, "b": 3.0}
MEAN = 2.0


@dataclass(frozen=True)
class Case:
    """One hostile thing and what it must get."""

    what: str
    build: Build
    words: str = ""
    """A part of the one line on stderr; where the case is accepted, of a warning."""
    expect: str = "refused"
    """`refused`: exit 2 with the words. `mean`: exit 0 and the mean of the models. `accepted`: exit 0. `either`:
    one of both. `failed`: exit 1 or 2, one line."""
    arguments: tuple[str, ...] = ("merge", "config.yml", "out", "--memory", "512MiB")
    keep_out: bool = False
    """True if OUT exists before, and must stay as it was."""
    environment: dict[str, str] = field(default_factory=dict)


def tensor(values: float, n: int = 6) -> bytes:
    """Return n fp32 values."""
    return struct.pack(f"<{n}f", *[values] * n)


def file_of(tensors: dict[str, tuple[str, list[int], bytes]], metadata: Any = None) -> bytes:
    """Return a sound safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def sound(directory: Path) -> None:
    """Write two models that merge to their mean, and the config of it."""
    for name, value in VALUES.items():
        (directory / name).mkdir()
        tensors = {"w": ("F32", [2, 3], tensor(value)), "n": ("F32", [6], tensor(value))}
        (directory / name / "model.safetensors").write_bytes(file_of(tensors, {"format": "pt"}))
        (directory / name / "config.json").write_text('{"model_type": "llama"}\n')
    (directory / "config.yml").write_text(CONFIG)


def state(directory: Path) -> dict[str, str]:
    """Return what is there, links and special files by kind, everything but `out` by content."""
    found = {}
    for root, folders, files in os.walk(directory):
        folders[:] = [f for f in folders if Path(root, f) != directory / "out"]
        for name in [*folders, *files]:
            path = Path(root, name)
            key = str(path.relative_to(directory))
            if path.is_symlink():
                found[key] = "-> " + os.readlink(path)
            elif path.is_file():
                found[key] = hashlib.blake2b(path.read_bytes()).hexdigest()
            else:
                found[key] = f"{path.stat().st_mode:o}"
    return found
