"""Targets that read Fisher stores: their tables and compressed chunks."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import fuzz_json
from fuzz_promises import refused, require

from streammerge.checkpoint.companions import open_fisher
from streammerge.errors import ModelError
from streammerge.formats.zarr_chunks import _decode
from streammerge.formats.zarr_store import GROUP_FILE

# --- stores of Fisher diagonals


class FisherTable:
    """The table of a store: every chunk of a tensor that is accepted is a file inside the store."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "store.zarr"
        self._directory.mkdir(exist_ok=True)

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        (self._directory / GROUP_FILE).write_bytes(raw)
        try:
            index = open_fisher(self._directory)
        except Exception as error:
            refused(error, ModelError)
            return
        for ref in index.values():
            require(os.path.dirname(ref.path) == str(self._directory), f"{ref.path} is outside")
            require(ref.nbytes >= 0 and math.isfinite(ref.square_sum) and ref.stored_nbytes >= 0, f"{ref}")
            require(1 <= ref.chunk_elements <= 1 << 29, f"a chunk of {ref.chunk_elements} elements")
            stop = min(ref.n_elements, 5 * ref.chunk_elements)
            position = 0
            for number, (path, first, end) in enumerate(ref.chunks(0, stop)):
                require(first == position < end, f"{ref}: chunk {number} from {first} to {end}")
                require(os.path.realpath(path).startswith(ref.path + "/"), f"{path} is outside")
                position = end
                if number > 100:
                    break
            else:
                require(position >= stop, f"{ref}: its chunks end at {position}")

    @staticmethod
    def seeds() -> list[bytes]:
        """Return tables as the importer writes them."""
        sums = {"sum": 1.5, "square_sum": 2.25, "largest": 0.5, "zeros": 3, "stored_nbytes": 100}
        rows = []
        for shape, chunk in (
            ([], []),
            ([10], [4]),
            ([3, 5], [2, 5]),
            ([2, 3, 7], [1, 1, 4]),
            ([0, 4], [1, 4]),
            ([6], [6]),
        ):
            entry = {"array": "a0", "dtype": "F32", "shape": shape, "chunk": chunk, **sums}
            about = {"format": 1, "model_fingerprint": "ab", "model_name": "x", "tensors": {"w": entry}}
            about["tensors"]["b"] = {**entry, "array": "a1", "dtype": "BF16"}
            rows.append({"zarr_format": 3, "node_type": "group", "attributes": {"streammerge_fisher": about}})
        rows += [{"zarr_format": 3, "attributes": {}}, {"zarr_format": 2}, {}]
        return [json.dumps(row).encode() for row in rows]


STORE_WORDS = [
    *fuzz_json.TEXTS,
    "array",
    "shape",
    "chunk",
    "square_sum",
    "stored_nbytes",
    "tensors",
    "F32",
    "BF16",
]


def check_chunk(raw: bytes) -> None:
    """A chunk of a store that is damaged, or made to look sound, is refused; nothing is written beside its place."""
    import google_crc32c
    import numpy as np

    sealed = raw + google_crc32c.value(raw).to_bytes(4, "little")
    wanted = int.from_bytes(raw[4:8], "little") % (1 << 16) if len(raw) >= 8 else 64
    room = np.full(wanted + 128, 0xA5, np.uint8)
    for data in (raw, sealed):
        try:
            _decode("c/0", np.frombuffer(bytearray(data), np.uint8), room[64 : 64 + wanted])
        except Exception as error:
            refused(error, ModelError)
        require(
            bool((room[:64] == 0xA5).all() and (room[64 + wanted :] == 0xA5).all()), "wrote beside its place"
        )


def chunk_seeds() -> list[bytes]:
    """Return sound chunks of several compressors and sizes."""
    import numpy as np
    from numcodecs import Blosc

    arrays = [
        np.zeros(100, np.float32),
        np.arange(500, dtype=np.float32),
        np.random.default_rng(0).random(64, np.float32),
    ]
    codecs = [
        Blosc(cname, level, shuffle) for cname in ("zstd", "lz4") for level in (1, 5) for shuffle in (0, 1, 2)
    ]
    return [codec.encode(array) for array in arrays for codec in codecs]
