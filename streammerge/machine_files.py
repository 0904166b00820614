"""How many files may be open: the system's limit, shared out between the output's shards and the inputs."""

from __future__ import annotations

import resource

from streammerge.errors import InputError

_OTHERS = 48
"""Standard streams, libraries, sockets of whoever called, the journal, the lock, directories, and a few to spare."""
_MOST_INPUTS = 128
"""Input files open at a time; more gain nothing."""
_EACH = 2
"""A file is opened through the page cache and past it."""


def share_out(n_shards: int, n_threads: int) -> int:
    """Return how many input files may be open at a time, beside `n_shards` of the output.

    Parameters
    ----------
    n_threads
        That read; each has an input open, and a file of a store.

    Raises
    ------
    InputError
        If the system allows too few; the message says how many it takes.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = _OTHERS + _EACH * (n_shards + 2 * n_threads)
    if allowed == resource.RLIM_INFINITY:
        return _MOST_INPUTS
    if allowed < least:
        raise InputError(
            f"writing {n_shards} shards takes {least} open files, the limit is {allowed}: raise it with "
            f"`ulimit -n {least}`, or write fewer shards with a larger --shard-size"
        )
    return min(_MOST_INPUTS, n_threads + (allowed - least) // _EACH)
