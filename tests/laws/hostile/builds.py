"""Ways to make the models and files of a hostile case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.laws.hostile.case import Build, file_of

Tensors = dict[str, tuple[str, list[int], bytes]]
SHARD = "model.safetensors"


def file(path: str, raw: bytes | str) -> Build:
    """Put a file there, whatever was there."""

    def build(d: Path) -> None:
        target = d / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_bytes(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"))

    return build


def both(raw: bytes) -> Build:
    """Give both models the same file."""

    def build(d: Path) -> None:
        for name in ("a", "b"):
            (d / name / SHARD).write_bytes(raw)

    return build


def config(text: bytes | str) -> Build:
    """Write the config."""
    return file("config.yml", text)


def with_tensors(a: Tensors, b: Tensors) -> Build:
    """Give each model its tensors."""

    def build(d: Path) -> None:
        (d / "a" / SHARD).write_bytes(file_of(a))
        (d / "b" / SHARD).write_bytes(file_of(b))

    return build


def nothing(d: Path) -> None:
    """Leave the sound models as they are."""


def in_place_of_shard(make: Any) -> Build:
    """Put something that is no regular file where a shard should be."""

    def build(d: Path) -> None:
        (d / "b" / SHARD).unlink()
        make(d / "b" / SHARD)

    return build
