"""Compute the low-rank factors of the change of a weight, and the norm of what they miss."""

from __future__ import annotations

import math
import signal

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.low_rank import (
    Decomposition,
    Matrix,
    Rows,
    blocks,
    decompose,
    decompose_product,
    hold,
)
from streammerge.checkpoint.refs.difference import DifferenceRef, SumOfProductsRef
from streammerge.dtypes import FLOATS
from streammerge.engine.worker import Worker
from streammerge.errors import ModelError, Stopped, printable
from streammerge.formats.refs import SourceRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import F64, rounded, widened
from streammerge.numerics.finite import Tally, is_bad, steps
from streammerge.planning.job import Job
from streammerge.planning.plan import MergePlan
from streammerge.tensors.difference import read_factors
from streammerge.tensors.encoders.low_rank import NORM, RANK, RESIDUAL, LowRank
from streammerge.tensors.read import read_elements


def factors_of(worker: Worker, job: Job, buffer: Bytes) -> list[Bytes]:
    """Return the bytes of A, of B and of the figures: see `LowRank`.

    Raises
    ------
    ModelError
        If a value is not finite; WorldError if reading fails.
    """
    form = job.encoder
    assert isinstance(form, LowRank)
    if form.experts == 1:
        return _factors_of_matrix(worker, job, form, buffer, 0)
    stacked_a = np.empty((form.experts, form.parts[0].nbytes // form.experts), np.uint8)
    width = form.parts[1].nbytes // (form.outputs * form.rank * form.experts)
    stacked_b = np.empty((form.outputs, form.rank, form.experts), f"V{width}")
    total = np.zeros(form.parts[2].shape)
    for expert in range(form.experts):
        a, b, figures = _factors_of_matrix(worker, job, form, buffer, expert)
        stacked_a[expert] = a
        stacked_b[..., expert] = b.view(stacked_b.dtype).reshape(form.outputs, form.rank)
        own = figures.view(np.float64)
        total[RANK] = max(total[RANK], own[RANK])
        total[[NORM, RESIDUAL]] = np.hypot(total[[NORM, RESIDUAL]], own[[NORM, RESIDUAL]])
    return [stacked_a.reshape(-1), stacked_b.reshape(-1).view(np.uint8), total.view(np.uint8)]


def _factors_of_matrix(worker: Worker, job: Job, form: LowRank, buffer: Bytes, expert: int) -> list[Bytes]:
    """Return A, B and the figures of the matrix, or of that of one expert."""
    ref, room = job.sources[0], Scratch(buffer)
    rows: Rows
    with worker.stages.time("compute"):
        if isinstance(ref, SumOfProductsRef):
            product = _Product(*read_factors(worker.reader, ref))
            rows, found = product, decompose_product(product.left, product.right, form.computed)
        else:
            assert isinstance(ref, DifferenceRef)
            rows, found = _decomposed(worker, job, ref, form, room, expert)
        if not math.isfinite(found.square_sum):
            raise _not_finite(worker.reader, job)
        rank = rank_of(found, form)
        stored = rank if form.energy is not None or not rank else form.rank
        a, b = _factors(found, rank, stored, form)
        if not all(np.isfinite(widened(part, form.dtype, F64)).all() for part in (a, b)):
            raise ModelError(
                f"tensor {printable(job.name)}: its factors overflow {form.dtype}: use `dtype: float32`"
            )
        missed = _missed(rows, _product_of(a, b, stored, form), room)
        figures = np.zeros(3 + form.rank)
        figures[:3] = stored, math.sqrt(found.square_sum), missed
        figures[3 : 3 + rank] = found.values[:rank]
    sizes = [part.nbytes // form.experts for part in form.parts[:2]] + [figures.nbytes]
    return [_padded(part, n) for part, n in zip((a, b, figures.view(np.uint8)), sizes, strict=True)]


def check_loose(plan: MergePlan, reader: Reader) -> None:
    """Refuse a model that changes a parameter which no adapter can change; it is read for that.

    Raises
    ------
    ModelError
        If such a parameter differs from the base's.
    """
    for name, ref, base in () if plan.adapter is None else plan.adapter.loose:
        if base is not None and _are_equal(reader, ref, base):
            continue
        how = "the base has not" if base is None else "differs from the base's"
        raise ModelError(
            f"{printable(ref.path)}: tensor {printable(name)} {how}, and as a parameter of a module that has others inside "
            "no adapter can hold it: leave such parameters out with drop_rest (--drop-rest)"
        )


def _are_equal(reader: Reader, ref: SourceRef, base: SourceRef) -> bool:
    if ref.dtype not in FLOATS or base.dtype not in FLOATS:
        n = ref.n_elements
        same = ref.dtype == base.dtype
        return same and bool((read_elements(reader, ref, 0, n) == read_elements(reader, base, 0, n)).all())

    def values(one: SourceRef, first: int, last: int) -> Matrix:
        return widened(read_elements(reader, one, first, last), one.dtype, F64)

    return all(
        np.array_equal(values(ref, first, last), values(base, first, last))
        for first, last in steps(0, ref.n_elements)
    )


def rank_of(found: Decomposition, form: LowRank) -> int:
    """Return the number of singular values that are kept: those asked for that are not zero."""
    most = min(form.rank, int(np.count_nonzero(found.values)))
    if form.energy is None or not most:
        return most
    reached = np.cumsum(np.square(found.values[:most])) >= form.energy * found.square_sum * (1 - 2.0**-48)
    return int(np.argmax(reached)) + 1 if reached.any() else most


def _decomposed(
    worker: Worker, job: Job, ref: DifferenceRef, form: LowRank, room: Scratch, expert: int
) -> tuple[Rows, Decomposition]:
    """Return the change as a matrix whose rows can be read, and its decomposition."""
    scratch = room.take((ref.scratch_bytes,), np.dtype(np.uint8))
    rows: Rows = _Read(worker, ref, form.matrix, scratch, expert)
    held = (worker.plan.work[job.ordinal].at_once or 0) // max(1, form.matrix[1])
    if held >= form.matrix[0]:
        rows = hold(rows, _taker(room), form.matrix[0] if ref.is_whole else None)
    return rows, decompose(rows, form.computed, held, _taker(room.rest()))


def _taker(room: Scratch) -> _Taker:
    return _Taker(room)


class _Taker:
    """Allocates matrices in the memory of a piece."""

    def __init__(self, room: Scratch) -> None:
        self._room = room

    def __call__(self, rows: int, columns: int) -> Matrix:
        return self._room.take((rows, columns), F64)


class _Read:
    """The difference of two tensors as a matrix whose rows are read as they are needed."""

    def __init__(
        self, worker: Worker, ref: DifferenceRef, shape: tuple[int, int], scratch: Bytes, expert: int
    ) -> None:
        self._worker, self._ref, self._scratch, self.shape = worker, ref, scratch, shape
        self._start = expert * shape[0] * shape[1]

    def read(self, first: int, last: int, out: Matrix) -> None:
        """See `Rows`; raises Stopped if the merge is stopped, since a large matrix takes long."""
        if self._worker.stop.is_set():
            raise Stopped(signal.SIGTERM)
        n = self.shape[1]
        target = out.reshape(-1).view(np.uint8)
        first, last = (self._start + row * n for row in (first, last))
        self._ref.read(self._worker.reader, first, last, target, Scratch(self._scratch))


class _Product:
    """A product of two factors as a matrix whose rows are computed as they are needed."""

    def __init__(self, left: Matrix, right: Matrix) -> None:
        self.left, self.right = left, right
        self.shape = left.shape[0], right.shape[1]

    def read(self, first: int, last: int, out: Matrix) -> None:
        """See `Rows`."""
        np.matmul(self.left[first:last], self.right, out=out)


def _factors(found: Decomposition, rank: int, stored: int, form: LowRank) -> tuple[Bytes, Bytes]:
    """Return A, (stored, inputs), and B, (outputs, stored), rounded to their dtype; the scale is split evenly."""
    roots = np.sqrt(found.values[:rank])
    left, right = found.left[:, :rank] * roots, found.right[:rank] * roots[:, None]
    a = np.zeros((stored, form.inputs))
    b = np.zeros((form.outputs, stored))
    a[:rank], b[:, :rank] = (left.T, right.T) if form.turned else (right, left)
    return rounded(a.reshape(-1), form.dtype), rounded(b.reshape(-1), form.dtype)


def _product_of(a: Bytes, b: Bytes, stored: int, form: LowRank) -> _Product:
    """Return the change that the rounded factors make, in the orientation of the weight."""
    one = widened(a, form.dtype, F64).reshape(stored, form.inputs)
    other = widened(b, form.dtype, F64).reshape(form.outputs, stored)
    return _Product(one.T, other.T) if form.turned else _Product(other, one)


def _missed(rows: Rows, product: _Product, room: Scratch) -> float:
    """Return the norm of the difference between a matrix and a product."""
    total = 0.0
    shape = rows.shape
    for first, last in blocks(shape):
        part = np.empty((last - first, shape[1]))
        rows.read(first, last, part)
        part -= product.left[first:last] @ product.right
        total += float(np.vdot(part, part))
    return math.sqrt(total)


def _padded(part: NDArray[np.uint8], nbytes: int) -> Bytes:
    whole = np.zeros(nbytes, np.uint8)
    whole[: part.size] = part
    return whole


def _not_finite(reader: Reader, job: Job) -> ModelError:
    """Return the error that names the first value that is not finite, and its tensor."""
    for ref in job.sources[0].parts:
        tally = Tally()
        for first, last in steps(0, ref.n_elements):
            tally = tally.plus(is_bad(read_elements(reader, ref, first, last), ref.dtype), first)
        if tally.count:
            return ModelError(
                f"{printable(ref.path)}: tensor {printable(job.name)} holds NaN or infinity at element {tally.first}: "
                "repair the model, or leave the module out of the adapter"
            )
    return ModelError(f"tensor {printable(job.name)}: its change overflows fp64: repair the models")
