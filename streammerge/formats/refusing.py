"""Shared helpers for readers that detect errors in a file whose path they do not know."""

from __future__ import annotations

from streammerge.io.files import Handle, read_exactly
from streammerge.records import dataclass

AGAIN = "download or copy it again"
CONVERT = "convert it to safetensors, or save it again with a current torch"
PLAIN = "save only the dict of tensors, or convert it to safetensors"


class Refused(Exception):
    """An error in a file, raised where its path is not known."""


def need(sound: bool, otherwise: str) -> None:
    """Raise `Refused` with the message `otherwise` unless `sound`."""
    if not sound:
        raise Refused(otherwise)


@dataclass(frozen=True, slots=True)
class Source:
    """An open file, or a part of a file that is treated as a file."""

    fd: Handle
    nbytes: int
    path: str
    begin: int = 0
    """Start of the part in the file; offsets are relative to it."""

    def read(self, offset: int, nbytes: int, what: str) -> bytes:
        """Return a range of bytes; refuse a range that exceeds the part."""
        end = f"{what} is beyond the end of the file ({self.nbytes} bytes): {AGAIN}"
        need(0 <= offset <= self.nbytes - nbytes, end)
        return read_exactly(self.fd, nbytes, self.begin + offset, self.path)
