"""What readers of a file have in common that find out what is wrong with it where its path is not known."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.io.files import read_exactly

AGAIN = "download or copy it again"
CONVERT = "convert it to safetensors, or save it again with a current torch"
PLAIN = "save only the dict of tensors, or convert it to safetensors"


class Refused(Exception):
    """What is wrong with the file; raised where its path is not known."""


def need(sound: bool, otherwise: str) -> None:
    """Refuse the file unless something of it is `sound`."""
    if not sound:
        raise Refused(otherwise)


@dataclass(frozen=True, slots=True)
class Source:
    """An open file, or a part of one that is like a file itself."""

    fd: int
    nbytes: int
    path: str
    begin: int = 0
    """Where the part begins in the file; offsets are counted from there."""

    def read(self, offset: int, nbytes: int, what: str) -> bytes:
        """Return a range of it; refuse one that is not inside."""
        end = f"{what} is beyond the end of the file ({self.nbytes} bytes): {AGAIN}"
        need(0 <= offset <= self.nbytes - nbytes, end)
        return read_exactly(self.fd, nbytes, self.begin + offset, self.path)
