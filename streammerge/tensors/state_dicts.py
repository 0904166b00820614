"""Models held in memory, presented as files, so that the plan and the engine need to know only files.

Each model is a virtual file with a name for messages. It contains the tensors in the order in which the safetensors
library would have written them, and `TensorRef`s point into it. Hence a merge of state dicts uses the same plan,
statistics and kernels as a merge of files, in the same order, and gives the same bits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from streammerge.checkpoint.companions import CompanionIndex
from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.names import is_head
from streammerge.checkpoint.quantization import quantization_of
from streammerge.checkpoint.quantized.declarations import NOTHING
from streammerge.checkpoint.quantized.registry import decoded
from streammerge.checkpoint.refs.float8 import with_floats
from streammerge.dtypes import BITS, RANK
from streammerge.errors import InputError, printable
from streammerge.formats.refs import TensorRef
from streammerge.formats.safetensors import MAX_NAME
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import IoMode, Reader
from streammerge.tensors.held import Held, hold

_ALIGN = 64
"""Alignment in bytes of the tensors in a virtual file."""


class StateDict:
    """The tensors of one model in memory.

    Parameters
    ----------
    path
        The model's name in messages, and the path of its virtual file.
    values
        Tensors of torch or arrays of numpy, by name.

    Raises
    ------
    InputError
        If a name or a value cannot be merged.
    """

    def __init__(self, path: str, values: Mapping[str, object]) -> None:
        self.path = path
        self.tensors: dict[str, Held] = {}
        """The tensors in the given order."""
        for name, value in values.items():
            what = f"{printable(path)}[{printable(repr(name), 200)}]"
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
                raise InputError(f"{what}: a tensor's name is a text of 1 to {MAX_NAME} characters")
            self.tensors[name] = hold(value, what)
        if not self.tensors:
            raise InputError(f"{printable(path)}: holds no tensor")
        self._starts: list[int] = []
        self._placed: list[Held] = []

    def shared(self) -> dict[str, str]:
        """Return the tensors that share a different tensor's memory, with that tensor's name: ``{head: embedding}``."""
        first: dict[object, str] = {}
        for name in sorted(self.tensors, key=is_head):  # stable, heads last: a head is never the original
            first.setdefault(self.tensors[name].place, name)
        return {
            name: first[held.place]
            for name, held in self.tensors.items()
            if first[held.place] != name and all(held.shape)
        }

    def index(self, reference: str, leave_out: Iterable[str] = ()) -> TensorIndex:
        """Return the model's index for a plan, without the tensors to leave out."""
        without = set(leave_out)
        names = [name for name in self.tensors if name not in without]
        names.sort(key=lambda name: (-RANK[self.tensors[name].dtype], name.encode("utf-8", "surrogatepass")))
        self._starts, self._placed = [], []
        refs: dict[str, TensorRef] = {}
        offset = 0
        for name in names:
            held = self.tensors[name]
            ref = TensorRef(name, held.dtype, held.shape, self.path, offset, 0)
            nbytes = ref.n_elements * BITS[held.dtype] // 8
            refs[name] = TensorRef(name, held.dtype, held.shape, self.path, offset, nbytes)
            self._starts.append(offset)
            self._placed.append(held)
            offset += -(-nbytes // _ALIGN) * _ALIGN
        tensors = decoded(refs, NOTHING).tensors
        found = quantization_of(tensors, {})
        return TensorIndex(reference, Path(self.path), (), with_floats(tensors, found), quantization=found)

    def read(self, offset: int, target: Bytes) -> None:
        """Fill `target` from a byte of the virtual file on; the range is within one tensor."""
        if not target.size:
            return
        # If several tensors have the same offset, all except the last are empty.
        place = bisect_right(self._starts, offset) - 1
        held = self._placed[place]
        held.copy((offset - self._starts[place]) * 8 // BITS[held.dtype], target)


class HeldReader(Reader):
    """Reads virtual files from memory, and all other files from disk.

    Parameters
    ----------
    models
        The models in memory.
    """

    def __init__(
        self, models: Iterable[StateDict], backend: IoMode = "direct", *, most_open: int = 48
    ) -> None:
        super().__init__(backend, most_open=most_open)
        self._held = {model.path: model for model in models}

    def read_into(self, path: str, offset: int, target: Bytes) -> None:
        """See `Reader`."""
        if (model := self._held.get(path)) is None:
            super().read_into(path, offset, target)
        else:
            model.read(offset, target)
            self._count(target.size)

    def read_parts(self, path: str, parts: Iterable[tuple[int, list[memoryview]]]) -> None:
        """See `Reader`."""
        if path not in self._held:
            super().read_parts(path, parts)
            return
        for offset, views in parts:
            for view in views:
                self.read_into(path, offset, np.frombuffer(view, np.uint8))
                offset += len(view)

    def read_slot(self, path: str, offset: int, nbytes: int, slot: Bytes, *, again: bool = False) -> int:
        """See `Reader`."""
        if path not in self._held:
            return super().read_slot(path, offset, nbytes, slot, again=again)
        self.read_into(path, offset, slot[:nbytes])
        return 0

    def prefetch(self, path: str, offset: int, nbytes: int) -> None:
        """See `Reader`: virtual files are already in memory."""
        if path not in self._held:
            super().prefetch(path, offset, nbytes)


def ties_of(models: Sequence[StateDict], others: Sequence[TensorIndex]) -> dict[str, str]:
    """Return the tensors that share a different tensor's memory in every model, with its name; files store only one.

    Parameters
    ----------
    models
        The models in memory. The first decides; if any other has two separate tensors, they are not tied.
    others
        Models in files, which store only separate tensors.
    """
    found = models[0].shared() if models else {}
    for model in models[1:]:
        theirs = model.shared()
        found = {
            name: first
            for name, first in found.items()
            if theirs.get(name) == first or name not in model.tensors
        }
    return {name: first for name, first in found.items() if not any(name in index for index in others)}


def held_fisher(model: StateDict) -> CompanionIndex:
    """Return tensors in memory as one model's Fisher diagonal.

    Raises
    ------
    InputError
        If a tensor does not consist of floats.
    """
    index = model.index(model.path)
    for name, ref in index.items():
        if ref.dtype not in ("F16", "BF16", "F32", "F64"):
            raise InputError(
                f"{printable(model.path)}[{printable(repr(name), 200)}]: is {ref.dtype}: a Fisher diagonal is made of floats"
            )
    return CompanionIndex(model.path, index.stored(), (), index)
