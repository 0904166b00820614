"""Make a synthetic Fisher diagonal of a model of any size: positive fp32 values in one safetensors file.

    python tools/make/make_diagonals.py MODEL OUT.safetensors --seed 1

Values are log-normal over some six orders of magnitude, as squared gradients are, and never 0; what matters here
is that their mantissas are noise, which does not compress. Blocks are generated one at a time.
"""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path

import numpy as np
from safetensors import safe_open

BLOCK = 1 << 22


def shapes_of(model: Path) -> dict[str, list[int]]:
    """Return the shapes of a model's tensors by name, from the headers of its shards."""
    shapes = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return dict(sorted(shapes.items()))


def values(n: int, random: np.random.Generator) -> np.ndarray:
    """Return `n` values of a diagonal."""
    return np.exp(random.standard_normal(n, np.float32) * np.float32(2.5) - np.float32(20.0))


def main() -> None:
    """Write the diagonal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shapes = shapes_of(args.model)
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(args.seed)
    with args.out.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for start in range(0, prod(shape), BLOCK):
                file.write(values(min(BLOCK, prod(shape) - start), random).tobytes())
    print(f"{args.out}: {offset / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
