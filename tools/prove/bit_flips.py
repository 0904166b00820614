"""Flip one bit of an output at a time, anywhere, and count how many flips `verify` finds and names.

    python tools/prove/bit_flips.py OUT --flips 200

A file is drawn first, half of the time by its size, so that small files get their share; then a byte of it, and a
bit. Each flip is undone; the output is as it was afterwards.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path

from streammerge.errors import ModelError
from streammerge.formats.safetensors import read_header
from streammerge.output.check import verify


def main() -> None:
    """Flip, verify, undo; print the totals."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    sizes = {path: path.stat().st_size for path in sorted(arguments.out.iterdir())}
    if problems := verify(arguments.out).problems:
        sys.exit(f"damaged before anything was flipped: {problems[0]}")
    found = in_tensors = tensors_named = 0
    began = time.monotonic()
    for _ in range(arguments.flips):
        by_size = rng.random() < 0.5
        path = rng.choices(list(sizes), list(sizes.values()))[0] if by_size else rng.choice(list(sizes))
        position, bit = rng.randrange(sizes[path]), rng.randrange(8)
        tensor = tensor_at(path, position)
        flip(path, position, bit)
        try:
            said = report(arguments.out)
        finally:
            flip(path, position, bit)
        found += path.name in said
        in_tensors += tensor is not None
        tensors_named += tensor is not None and f"tensor {tensor} is damaged" in said
        if path.name not in said:
            print(f"missed: bit {bit} of byte {position} of {path.name}: {said!r}")
    seconds = (time.monotonic() - began) / max(1, arguments.flips)
    print(
        f"{found} of {arguments.flips} flips found and the file named; {tensors_named} of {in_tensors} in tensors, the"
    )
    print(f"tensor named; {seconds:.2f} s each; {len(verify(arguments.out).problems)} problems afterwards")


def report(out: Path) -> str:
    """Return all that `verify` says."""
    try:
        return "\n".join(verify(out).problems)
    except ModelError as error:
        return str(error)


def tensor_at(path: Path, position: int) -> str | None:
    """Return the tensor that a byte of a shard belongs to."""
    if path.suffix != ".safetensors":
        return None
    refs = read_header(path)[0].values()
    return next((ref.name for ref in refs if ref.offset <= position < ref.offset + ref.nbytes), None)


def flip(path: Path, position: int, bit: int) -> None:
    """Change one bit of a file in place."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(descriptor, 1, position)[0]
        os.pwrite(descriptor, bytes([byte ^ (1 << bit)]), position)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
