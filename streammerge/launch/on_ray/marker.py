"""A small file where the output will be, by which nodes show that they see the same directory."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streammerge.errors import InputError, WorldError, printable
from streammerge.io.volumes import is_url
from streammerge.launch.on_ray.actor import versions


class Marker:
    """The marker of one output; a folder of an object store needs none, and its path and text are empty.

    Parameters
    ----------
    tell
        Told the path, so that the file is removed even if this process is killed.
    """

    def __init__(self, out: Path, tell: Callable[[Mapping[str, Any]], None]) -> None:
        self._out = out
        self.path = self.text = ""
        if is_url(out):
            return
        place = out
        while not place.is_dir():
            place = place.parent
        self.text = secrets.token_hex(16)
        self.path = str(place / f".streammerge-{self.text[:12]}")
        tell({"event": "marker", "path": self.path})

    def write(self) -> None:
        """Write the file.

        Raises
        ------
        WorldError
            If it cannot be written.
        """
        if not self.path:
            return
        try:
            Path(self.path).write_text(self.text)
        except OSError as error:
            raise WorldError(f"{printable(self.path)}: {error.strerror}") from None

    def remove(self) -> None:
        """Remove the file if it is there."""
        if self.path:
            with contextlib.suppress(OSError):
                Path(self.path).unlink()

    def check(self, told: Mapping[str, Any]) -> None:
        """Check what a node tells of itself before an engine is started there; see `Engine.hello`.

        Raises
        ------
        InputError
            If its versions are different, or if it does not see the output.
        """
        host, there = printable(told["host"], 80), told["versions"]
        for name, version in versions().items():
            if there.get(name) != version:
                raise InputError(
                    f"node {host} has {name} {printable(str(there.get(name)))}, and here it is {version}: install the same "
                    "version on all nodes"
                )
        if told["sees"] != self.text:
            raise InputError(
                f"{printable(self._out)}: node {host} does not see what is written there: give an OUT on a file system that "
                "all nodes share, under the same path"
            )
