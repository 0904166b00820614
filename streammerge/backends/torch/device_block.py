"""A block on a torch device: inputs are copied to the device part by part, and results are written back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from streammerge.algebra.block import Block, Operand, operand_bytes
from streammerge.algebra.rules import Inputs
from streammerge.algebra.task_vectors import Where
from streammerge.errors import WorldError, printable
from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.casts import round_to, torch_dtype

if TYPE_CHECKING:
    import torch

_Result = TypeVar("_Result")


def _nothing(device: str) -> None:
    return


class DeviceHooks(NamedTuple):
    """Calls that a device needs. The host needs none: its operations are complete when they return."""

    synchronize: Callable[[str], None] = _nothing
    """Waits until the device has done what this thread asked of it."""
    free_unused: Callable[[str], None] = _nothing
    """Gives back memory that is kept for later."""


HOST = DeviceHooks()


def _smaller(size: int, divisor: int) -> int:
    """Return about half of a size, in multiples of `divisor`; 0 if it is not more than one."""
    return size // 2 // divisor * divisor or (divisor if size > divisor else 0)


class DeviceBlock:
    """A block and the device that its parts are computed on.

    Parameters
    ----------
    block
        The block, in this process's memory.
    device
        ``cpu`` or ``cuda[:N]``.
    at_once
        Number of elements processed at a time if the formula may be cut anywhere; 0: it sees the whole tensor.
    keep
        Whether all of the block's operands fit in the device's memory; they are then copied there once, whatever the
        number of passes.
    hooks
        Calls that the device needs.
    """

    def __init__(
        self, block: Block, device: str, at_once: int, *, keep: bool = False, hooks: DeviceHooks = HOST
    ) -> None:
        self.block = block
        self.device = device
        self.at_once = at_once
        self._keep = keep
        self._hooks = hooks
        self._kept: dict[Operand, torch.Tensor] = {}
        self._divergences: dict[tuple[int, int], dict[object, torch.Tensor]] = {}

    def each(self, run: Callable[[int, int], _Result], divisor: int = 1) -> Iterator[_Result]:
        """Yield the result of `run` for each part; after an out-of-memory error, retry with smaller parts.

        `run` receives the first element and the one after the last. They are a multiple of `divisor` apart, except at
        the end of the block. `run` must change no state before it succeeds.

        Raises
        ------
        WorldError
            If the device's memory cannot hold the smallest part.
        """
        import torch

        start, size = 0, max(divisor, self.at_once // divisor * divisor)
        while start < self.block.n:
            stop = min(self.block.n, start + size)
            try:
                result = run(start, stop)
            except torch.OutOfMemoryError:
                if not self._keep:
                    size = _smaller(min(size, stop - start), divisor)
                self._keep = False
                self._kept.clear()
                if size < divisor or not self.at_once:
                    raise self.out_of_memory() from None
                self.free_unused()
                continue
            yield result
            start = stop

    def out_of_memory(self) -> WorldError:
        """Return the error that the device's memory does not hold what is to be computed."""
        tensor = printable(self.block.tensor)
        return WorldError(
            f"tensor {tensor}: {self.device} is out of memory: free some, or merge with --device cpu"
        )

    def free_unused(self) -> None:
        """Give back memory of the device that is kept for later."""
        self._hooks.free_unused(self.device)

    def tensor(self, operand: Operand, a: int, b: int) -> torch.Tensor:
        """Return elements `a` to `b` of an operand on the device, in fp32, or in fp64 if they are stored so."""
        if self._keep:
            if operand not in self._kept:
                whole = self._host(operand, 0, self.block.n)
                self._kept[operand] = whole.to(self.device, non_blocking=True)
            values = self._kept[operand][a:b]
        else:
            values = self._host(operand, a, b).to(self.device, non_blocking=True)
        return values.clone() if operand.dtype == "F64" else values.float()

    def _host(self, operand: Operand, a: int, b: int) -> torch.Tensor:
        """Return a view of an operand's bytes in the buffer."""
        import torch

        width = operand_bytes(operand, 1)
        raw: Bytes = self.block.buffer[operand.offset + a * width : operand.offset + b * width]
        return torch.from_numpy(raw).view(torch_dtype(operand.dtype))

    def inputs(self, a: int, b: int) -> Inputs:
        """Return elements `a` to `b` of the base and the models, flat; all in fp64 if any is, else in fp32."""
        import torch

        block = self.block
        base = self.tensor(block.base, a, b) if block.base is not None else None
        models = [self.tensor(operand, a, b) for operand in block.models]
        if any(tensor.dtype == torch.float64 for tensor in [*models, *([] if base is None else [base])]):
            models = [model.double() for model in models]
            base = None if base is None else base.double()
        return Inputs(models, base, self.where(a, self._divergences.setdefault((a, b), {})))

    def where(self, a: int, divergences: dict[object, torch.Tensor] | None = None) -> Where:
        """Return the position of the elements from `a`, with the values per row that are known of them."""
        block = self.block
        known = {} if divergences is None else divergences
        return Where(block.tensor, block.start + a, block.keys, block.row_length, divergences=known)

    def fishers(self, a: int, b: int) -> list[torch.Tensor]:
        """Return elements `a` to `b` of the Fisher diagonals."""
        return [self.tensor(operand, a, b) for operand in self.block.fishers]

    def store(self, merged: torch.Tensor, out: Operand, a: int, b: int) -> int:
        """Write elements `a` to `b` of the output, rounded once; return the number of non-finite ones."""
        import torch

        rounded = round_to(merged, out.dtype)
        bad = int((~torch.isfinite(rounded)).sum())
        if bad:
            rounded = torch.where(torch.isnan(rounded), torch.full_like(rounded, float("nan")), rounded)
        # The last step, since the output may overlay an input: until here the part can be computed again.
        self._host(out, a, b).copy_(rounded, non_blocking=True)
        self._hooks.synchronize(self.device)
        return bad
