"""NaN and infinity: counted in all that is written, and traced to where they come from only when there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import itemsize
from streammerge.errors import ModelError, printable
from streammerge.formats.safetensors import TensorRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.planning.job import Job
from streammerge.tensors.read import read_elements

_STEP = 1 << 18
"""Elements looked at together."""
_EXPONENT = {
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7C,
    "BF16": 0x7F80,
    "F16": 0x7C00,
    "F32": 0x7F800000,
    "F64": 0x7FF0000000000000,
}

Read = Callable[[int, int], Bytes]
"""Returns the bytes of a tensor's elements from the first to before the last."""


@dataclass(frozen=True)
class Tally:
    """How many elements there are of a kind, and the first of them."""

    count: int = 0
    first: int = -1

    def plus(self, mask: NDArray[np.bool_], start: int) -> Tally:
        """Take the elements from `start` on into account."""
        count = int(np.count_nonzero(mask))
        first = start + int(np.argmax(mask)) if self.count == 0 and count else self.first
        return Tally(self.count + count, first)

    def then(self, later: Tally) -> Tally:
        """Take a tally of later elements into account."""
        return Tally(self.count + later.count, self.first if self.count else later.first)


@dataclass(frozen=True)
class Finding:
    """What is not finite in a tensor: in its inputs, and in the output though every input is finite there."""

    job: Job
    inputs: tuple[Tally, ...]
    overflow: Tally

    def error(self) -> ModelError:
        """Return the refusal that names the first input, or else the overflow."""
        name = printable(self.job.name)
        for ref, tally in zip(self.job.inputs, self.inputs, strict=True):
            if tally.count:
                return ModelError(
                    f"{printable(ref.path)}: tensor {name} holds NaN or infinity at element {tally.first}; repair the "
                    "model, list the tensor under `exclude:` to copy it, or go on with --nonfinite warn"
                )
        where = f" at element {self.overflow.first}" if self.overflow.count else ""
        return ModelError(
            f"tensor {name}: the merged values overflow {self.job.dtype}{where}; smaller weights, or a wider `dtype`, "
            "avoid it; or go on with --nonfinite warn"
        )

    def warnings(self) -> list[str]:
        """Return one line for each input concerned, and one for the overflow."""
        name = printable(self.job.name)
        lines = [
            f"tensor {name}: {tally.count} elements of {printable(ref.path)} are NaN or infinite (the first is "
            f"{tally.first}), and so are those of the output"
            for ref, tally in zip(self.job.inputs, self.inputs, strict=True)
            if tally.count
        ]
        if self.overflow.count:
            lines.append(
                f"tensor {name}: {self.overflow.count} merged elements overflow {self.job.dtype} (the first is "
                f"{self.overflow.first})"
            )
        return lines


def trace(reader: Reader, job: Job, start: int, stop: int, output: Read | None) -> Finding:
    """Return what is not finite in elements `start` to `stop` of a job; without `output`, in its inputs."""
    inputs = [Tally() for _ in job.inputs]
    overflow = Tally()
    for first, last in _steps(start, stop):
        anywhere = np.zeros(last - first, np.bool_)
        for i, ref in enumerate(job.inputs):
            bad = is_bad(read_elements(reader, ref, first, last), ref.dtype)
            inputs[i] = inputs[i].plus(bad, first)
            anywhere |= bad
        if output is not None:
            overflow = overflow.plus(is_bad(output(first, last), job.dtype) & ~anywhere, first)
    return Finding(job, tuple(inputs), overflow)


def bad_fisher(reader: Reader, job: Job, start: int, stop: int) -> ModelError | None:
    """Return the refusal of the first Fisher diagonal with a value that is no certainty, if one has any."""
    for fisher in job.fishers:
        if not isinstance(fisher, TensorRef):
            continue
        for first, last in _steps(start, stop):
            raw = read_elements(reader, fisher, first, last)
            bad = is_bad(raw, fisher.dtype) | _is_negative(raw, fisher.dtype)
            if bad.any():
                return ModelError(
                    f"{printable(fisher.path)}: the Fisher diagonal of tensor {printable(job.name)} holds NaN, "
                    f"infinity or a negative number at element {first + int(np.argmax(bad))}; estimate it anew"
                )
    return None


def tally(raw: Bytes, dtype: str, start: int = 0) -> Tally:
    """Return how many elements of a tensor are NaN or infinite; `raw` begins with its element `start`.

    Other dtypes of less than 16 bits, and complex ones, are never merged and not looked at.
    """
    found = Tally()
    if dtype in _EXPONENT:
        width = itemsize(dtype)
        for first, last in _steps(0, raw.size // width):
            found = found.plus(is_bad(raw[first * width : last * width], dtype), start + first)
    return found


def is_bad(raw: Bytes, dtype: str) -> NDArray[np.bool_]:
    """Return which elements are NaN or infinite: those whose exponent is all ones."""
    bits = raw.view(_unsigned(dtype))
    exponent = bits.dtype.type(_EXPONENT[dtype])
    return (bits & exponent) == exponent


def _is_negative(raw: Bytes, dtype: str) -> NDArray[np.bool_]:
    bits = raw.view(_unsigned(dtype))
    shift = bits.dtype.type(8 * bits.itemsize - 1)
    return (bits >> shift == 1) & (bits << bits.dtype.type(1) != 0)


def _unsigned(dtype: str) -> Any:
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[itemsize(dtype)]


def _steps(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, _STEP):
        yield first, min(stop, first + _STEP)
