"""The options of a merge that are not part of its config."""

from __future__ import annotations

from typing import Literal

from streammerge.errors import InputError
from streammerge.records import dataclass

LeftOut = Literal["tokenizer", "model card"]
DEFAULT_SHARD_SIZE = 5_000_000_000
MAX_READS = 8.0


@dataclass(frozen=True)
class PlanOptions:
    """The options of a merge that are not part of its config."""

    memory: int | None = None
    """Bound of the process's peak resident memory, in bytes; None: half of what is free."""
    threads: int | None = None
    """Number of CPUs to keep busy; None: all available."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or the device of a registered backend."""
    kernels: bool | None = None
    """Whether to use compiled kernels; None: yes, unless compiling them takes longer than the merge."""
    shard_size: int = DEFAULT_SHARD_SIZE
    """Most bytes of tensors in one shard."""
    seed: int | None = None
    """Overrides the config's seed."""
    notes: tuple[str, ...] = ()
    """Warnings that the plan shows before its own."""
    file: str | None = None
    """The name of the single file that is written; None: a directory."""
    left_out: tuple[LeftOut, ...] = ()
    """Files that are not written to the output."""
    max_reads: float = MAX_READS
    """Bytes that stages may read for each byte of the inputs."""
    tensors_only: bool = False
    """Whether the output stays in memory; no file is written, and the models need no folder."""

    streamed: bool = False
    """Whether the output is written in the order of its bytes, as an object store takes it."""

    def __post_init__(self) -> None:
        """Refuse invalid numbers, which Python callers may pass."""
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise InputError(f"threads {self.threads!r} is not a positive integer")
        if not self.max_reads >= 1:
            raise InputError(f"max_reads {self.max_reads!r} is not a number of 1 or more")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**64):
            raise InputError(f"seed {self.seed!r} is not an integer from 0 to 2**64 - 1")
