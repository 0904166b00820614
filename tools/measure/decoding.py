"""Measures how long it takes to read each quantised format: nanoseconds of CPU time an element, files in the page cache.

    python tools/measure/decoding.py [NAME...] [--side 2048] [--runs 5]

The models are those of the tests (`tests/checkpoint/quantized/formats.py`), with one weight of SIDE x SIDE. The least of
the runs counts, since what else the machine does only adds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from streammerge.backends.cpu.compile import ensure_compiled
from streammerge.checkpoint.index import open_model
from streammerge.formats.refs import SourceRef
from streammerge.io.buffer_pool import Pool
from streammerge.io.pages import slot_bytes
from streammerge.io.reader import Reader
from streammerge.tensors.read import read_source

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.checkpoint.quantized.formats import FORMATS, write


def seconds_of(ref: SourceRef, runs: int) -> float:
    """Return the CPU seconds of reading a tensor once, by this thread."""
    reader, pool, found = Reader("read"), Pool(1 << 40), []
    scratch = np.empty(ref.scratch_bytes, np.uint8)
    with pool.lease(slot_bytes(ref.nbytes), threading.Event()) as slot:
        assert slot is not None
        for _ in range(runs + 1):
            began = time.thread_time()
            read_source(reader, ref, 0, ref.n_elements, slot, scratch)
            found.append(time.thread_time() - began)
    reader.close()
    return min(found[1:])


def main() -> None:
    """Print a line a format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all formats")
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    if (reason := ensure_compiled(["decoding", "unpacking"])) is not None:
        sys.exit(reason)
    for name in asked.names or FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            module = FORMATS[name].modules[0]
            write(Path(folder), name, rows=asked.side, columns=asked.side, modules=(module,))
            model = open_model(Path(folder))
            ref = next(ref for key, ref in model.items() if key.startswith(module))
            print(f"{1e9 * seconds_of(ref, asked.runs) / ref.n_elements:7.2f} ns  {name}", flush=True)


if __name__ == "__main__":
    main()
