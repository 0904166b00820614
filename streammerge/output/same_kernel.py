"""Processes on one kernel see without files whether another has ended."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

from streammerge.io.private import own_token


@cache
def kernel() -> str:
    """Return a name of the kernel that this process runs on, until the next boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def processes() -> str:
    """Return a name of the kernel and of its set of process numbers: inside it, a process sees whether others have ended."""
    try:
        return f"{kernel()}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{kernel()}:{own_token()}"


def have_seen_end(where: str, pid: int) -> bool:
    """Return whether the process of a number is known to have ended.

    Parameters
    ----------
    where
        What `processes` returned in that process.
    """
    if where != processes():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # it runs as a different user, or its number is none
    return False
