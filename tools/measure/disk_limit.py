"""What the machine itself can do: read files past the page cache while others are written, and compute nothing.

    python tools/measure/disk_limit.py SCRATCH NBYTES FILE...
    python tools/measure/disk_limit.py SCRATCH NBYTES -          # the names of the files on stdin, each but the last ended by a zero byte

8 threads read the files in blocks of 4 MiB while 4 threads write NBYTES to SCRATCH, allocated before and synced at the end. All
of it is direct I/O (O_DIRECT), so the page cache neither helps nor costs. Where the file system refuses that, the same calls go
through the page cache, and the printed line says so. Prints seconds until all was read, seconds until all was on the disk, and
`direct` or `buffered`.
"""

from __future__ import annotations

import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 4 << 20
READERS, WRITERS = 8, 4
SECTOR = 4096

Block = tuple[int, int]
"""A file descriptor, and where in its file the block begins."""


class Blocks:
    """Blocks that threads take one by one, in order."""

    def __init__(self, blocks: Iterator[Block]):
        self._blocks, self._lock = blocks, threading.Lock()

    def each(self, move: Callable[[int, int, mmap.mmap], None]) -> None:
        """Take blocks until none is left; `move` gets a buffer that direct I/O accepts, the thread's own."""
        with mmap.mmap(-1, BLOCK) as buffer:
            while True:
                with self._lock:
                    block = next(self._blocks, None)
                if block is None:
                    return
                move(*block, buffer)


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """Open a file for direct I/O where its file system has it; return whether it has."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644), True
    except OSError:
        return os.open(path, flags, 0o644), False


def read_block(fd: int, offset: int, buffer: mmap.mmap) -> None:
    """Read a block; the last one of a file is short."""
    os.preadv(fd, [buffer], offset)


def write_block(fd: int, offset: int, buffer: mmap.mmap) -> None:
    """Write a whole block."""
    if os.pwritev(fd, [buffer], offset) != BLOCK:
        raise OSError("the disk took part of a block: is it full?")


def blocks_of(fds: Sequence[int]) -> Iterator[Block]:
    """Yield the blocks of open files, file by file."""
    for fd in fds:
        for offset in range(0, os.fstat(fd).st_size, BLOCK):
            yield fd, offset


def measure(scratch: Path, nbytes: int, inputs: Sequence[Path]) -> tuple[float, float, bool]:
    """Return the seconds of reading and of writing, which begin together, and whether both went past the page cache.

    Files are opened, and the room of the output is allocated, before the clock starts; the sync is inside.
    """
    opened = [open_direct(path, os.O_RDONLY) for path in inputs]
    out, direct = open_direct(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(out, 0, -(-nbytes // BLOCK) * BLOCK)
    began = time.monotonic()

    def move(fds: Sequence[int], threads: int, block: Callable[[int, int, mmap.mmap], None]) -> float:
        """Move all blocks of some files; return when that was done."""
        blocks = Blocks(blocks_of(fds))
        with ThreadPoolExecutor(threads) as pool:
            for taken in [pool.submit(blocks.each, block) for _ in range(threads)]:
                taken.result()
        if block is write_block:
            os.fsync(out)
        return time.monotonic() - began

    with ThreadPoolExecutor(2) as both:
        reading = both.submit(move, [fd for fd, _ in opened], READERS, read_block)
        writing = both.submit(move, [out], WRITERS, write_block)
        read_s, write_s = reading.result(), writing.result()
    for fd, _ in opened:
        os.close(fd)
    os.close(out)
    return read_s, write_s, direct and all(past for _, past in opened)


def main() -> None:
    """Measure once and print the line."""
    scratch, nbytes, *inputs = sys.argv[1:]
    if inputs == ["-"]:
        inputs = [os.fsdecode(name) for name in sys.stdin.buffer.read().split(b"\0")]
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        read_s, write_s, direct = measure(Path(scratch), int(nbytes), [Path(text) for text in inputs])
    finally:
        Path(scratch).unlink(missing_ok=True)
    print(f"{read_s:.4f} {write_s:.4f} {'direct' if direct else 'buffered'}")


if __name__ == "__main__":
    main()
