"""Trace NaN and infinity in the output to their origin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from streammerge.engine.worker import Worker
from streammerge.errors import MergedOverflowError, ModelError, printable
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.numerics.finite import Tally, is_bad, is_negative, steps
from streammerge.planning.job import Job
from streammerge.records import dataclass
from streammerge.tensors.read import read_elements

Read = Callable[[int, int], Bytes]
"""Function that returns the bytes of a tensor's elements from `first` to before `last`."""


@dataclass(frozen=True)
class Finding:
    """Non-finite elements of a tensor: those of its inputs, and output elements whose inputs are all finite."""

    job: Job
    inputs: tuple[Tally, ...]
    overflow: Tally

    def error(self, worker: Worker) -> ModelError:
        """Return the error that names the first input, or the overflow, and the worker's output if it is one of several."""
        name = printable(self.job.name)
        go_on = "or go on with --nonfinite warn"
        if self.job.encoder is not None:
            go_on = "or remove `quantize`: quantised tensors cannot hold it"
        for ref, tally in zip(self.job.inputs, self.inputs, strict=True):
            if tally.count:
                cure = f"repair the model, list the tensor under `exclude:` to copy it, {go_on}"
                return ModelError(
                    f"{printable(ref.path)}: tensor {name} holds NaN or infinity at {self._place(tally.first)}: "
                    f"{'repair the model' if worker.spec.measures else cure}"
                )
        where = f" at {self._place(self.overflow.first)}" if self.overflow.count else ""
        return MergedOverflowError(
            f"{labelled(worker.label)}tensor {name}: the merged values overflow {self.job.dtype}{where}: use smaller weights or a wider "
            f"`dtype`, {go_on}",
            worker.label,
        )

    def _place(self, element: int) -> str:
        """Return the number of an element; of a matrix, with its indices."""
        if len(self.job.shape) < 2:
            return f"element {element}"
        return f"element {element} [{', '.join(map(str, np.unravel_index(element, self.job.shape)))}]"

    def warnings(self, label: str = "") -> list[str]:
        """Return one line per affected input, and one for the overflow, which names the output if it is one of several."""
        name = printable(self.job.name)
        lines = [
            f"tensor {name}: {tally.count} elements of {printable(ref.path)} are NaN or infinite (the first is "
            f"{tally.first}), and so are those of the output"
            for ref, tally in zip(self.job.inputs, self.inputs, strict=True)
            if tally.count
        ]
        if self.overflow.count:
            lines.append(
                f"{labelled(label)}tensor {name}: {self.overflow.count} merged elements overflow {self.job.dtype} (the first is "
                f"{self.overflow.first})"
            )
        return lines


def labelled(label: str) -> str:
    """Return the beginning of a line on one of several outputs.

    >>> labelled("lambda=0.5"), labelled("")
    ('lambda=0.5: ', '')
    """
    return f"{printable(label, 200)}: " if label else ""


def trace(reader: Reader, job: Job, start: int, stop: int, output: Read | None) -> Finding:
    """Return the non-finite elements of a job in the range `start` to `stop`; without `output`, of its inputs only."""
    inputs = [Tally() for _ in job.inputs]
    overflow = Tally()
    for first, last in steps(start, stop):
        anywhere = np.zeros(last - first, np.bool_)
        for i, ref in enumerate(job.inputs):
            bad = is_bad(read_elements(reader, ref, first, last), ref.dtype)
            inputs[i] = inputs[i].plus(bad, first)
            anywhere |= bad
        if output is not None:
            overflow = overflow.plus(is_bad(output(first, last), job.dtype) & ~anywhere, first)
    return Finding(job, tuple(inputs), overflow)


def bad_fisher(reader: Reader, job: Job, start: int, stop: int) -> ModelError | None:
    """Return the error for the first Fisher diagonal with an invalid value, or None."""
    for fisher in job.fishers:
        if fisher.chunk_elements:  # checked when it was stored
            continue
        for first, last in steps(start, stop):
            raw = read_elements(reader, fisher, first, last)
            bad = is_bad(raw, fisher.dtype) | is_negative(raw, fisher.dtype)
            if bad.any():
                return ModelError(
                    f"{printable(fisher.path)}: the Fisher diagonal of tensor {printable(job.name)} holds NaN, "
                    f"infinity or a negative number at element {first + int(np.argmax(bad))}: estimate it again"
                )
    return None
