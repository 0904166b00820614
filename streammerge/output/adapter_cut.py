"""What an adapter takes from its file of factors.

The file of factors has room for the largest rank of every module and for every whole tensor. The adapter takes from it
the ranks that were found, and those whole modules that differ from the base's::

    file of factors   A | B | figures | A | B | figures | norm | embedding
    the adapter       A' | B'         | A | B           | norm
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.weight_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from streammerge.dtypes import FLOATS, itemsize
from streammerge.errors import ModelError, printable
from streammerge.io.reader import Reader
from streammerge.numerics.casts import F64, rounded, widened
from streammerge.numerics.crc32 import combine_all, crc32
from streammerge.output.commit import cover, manifest_of
from streammerge.output.identity import Identity
from streammerge.output.journal import Receipt
from streammerge.output.place import CONFIG_COPY, Place
from streammerge.planning.layout import header_of, place_in_file
from streammerge.planning.low_rank.adapter import PREFIX, AdapterPlan, FactoredModule, SavedTensor
from streammerge.planning.plan import MergePlan
from streammerge.records import dataclass
from streammerge.tensors.encoders.base import Stored
from streammerge.tensors.encoders.low_rank import NORM, RANK, RESIDUAL, LowRank
from streammerge.tensors.read import read_elements

_STEP = 1 << 20
"""Bytes copied, or elements compared, at a time."""

Read = Callable[[int, int], bytes]
"""Returns bytes of the file of factors, from an offset on."""


class EmptyAdapterError(ModelError):
    """An adapter that would hold no factors."""


@dataclass(frozen=True)
class Residual:
    """What the factors of one module miss."""

    module: str
    rank: int
    norm: float
    """The norm of the module's change."""
    residual: float
    """The norm of what the factors miss, relative to `norm`."""


@dataclass(frozen=True)
class _Entry:
    """A tensor of the adapter, and the offset of its bytes in the file of factors."""

    stored: Stored
    offset: int


def residuals_of(manifest: Mapping[str, Any]) -> tuple[Residual, ...]:
    """Return what a manifest records of an adapter's modules; empty if it is that of a model."""
    modules = manifest.get("adapter", {}).get("modules", {})
    return tuple(Residual(name, one["rank"], one["norm"], one["residual"]) for name, one in modules.items())


def total_residual(residuals: Sequence[Residual]) -> float:
    """Return the norm of what all factors miss together, relative to that of all changes."""
    missed = math.fsum((one.norm * one.residual) ** 2 for one in residuals)
    return math.sqrt(missed / math.fsum(one.norm**2 for one in residuals)) if residuals else 0.0


def residual_table(residuals: Sequence[Residual]) -> str:
    """Return the residuals in Markdown."""
    rows = [f"| `{one.module}` | {one.rank} | {one.residual:.3g} |" for one in residuals]
    intro = (
        "## Residuals\n\nThe part of each matrix's change that the factors miss, as a share of its norm; "
        f"of all together {total_residual(residuals):.3g}."
    )
    return "\n".join([intro, "", "| module | rank | residual |", "|---|---|---|", *rows])


class Cut:
    """What an adapter takes from its file of factors.

    Parameters
    ----------
    read
        Reads the file of factors.
    reader
        Reads the base, with which whole tensors are compared.
    place
        Where the adapter will be.

    Raises
    ------
    EmptyAdapterError
        If no matrix differs from the base's.
    """

    def __init__(self, plan: MergePlan, read: Read, reader: Reader, place: Place) -> None:
        assert plan.adapter is not None
        self._plan, self._read, self._reader = plan, read, reader
        self._adapter: AdapterPlan = plan.adapter
        self.residuals: list[Residual] = []
        self._entries: list[_Entry] = []
        self._experts = any(one.of_experts and self._figures(one)[RANK] for one in self._adapter.factored)
        biases: set[bool] = set()
        for module in self._adapter.factored:
            wrapped = self._take(module)
            if module.bias is not None and self._differs(module.bias):
                self._entries.append(self._whole(module.bias, ".base_layer" if wrapped else ""))
                biases.add(wrapped)
        for bias in filter(self._differs, self._adapter.biases):
            self._entries.append(self._whole(bias))
            biases.add(False)
        saved = []
        for whole in self._adapter.saved:
            if any(map(self._differs, whole.tensors)):
                saved.append(whole.name)
                self._entries += map(self._whole, whole.tensors)
        ranks = {one.module: one.rank for one in self.residuals}
        of_biases = "all" if False in biases else "lora_only" if biases else "none"
        self._config = self._adapter.config(ranks, saved, of_biases)
        if not self.residuals:
            raise EmptyAdapterError(
                f"{printable(place.out)}: no matrix differs from that of {printable(plan.adapter.base)}: there is no adapter "
                "to write (embeddings and heads count with `embeddings`, --embeddings)"
            )
        self._ordered = sorted(self._entries, key=lambda entry: place_in_file(entry.stored))
        self._header = header_of([entry.stored for entry in self._ordered])
        self._checksums: list[tuple[int, int]] = []
        self._tensors: dict[str, tuple[Stored, int]] = {}

    def _take(self, module: FactoredModule) -> bool:
        """Take the factors of a module, unless its weight is that of the base; return whether they were taken."""
        of_a, of_b, _ = self._plan.layout.slots[module.job]
        part, _, _ = self._plan.jobs[module.job].parts
        figures = self._figures(module)
        rank, norm, missed = int(figures[RANK]), float(figures[NORM]), float(figures[RESIDUAL])
        if not rank and self._experts and module.of_experts:
            form = self._plan.jobs[module.job].encoder
            assert isinstance(form, LowRank)
            rank = form.rank  # zeros: PEFT fuses experts, and needs the factors of all
        if not rank:
            return False
        for (name, shape), slot in zip(module.factors(rank), (of_a, of_b), strict=True):
            self._entries.append(_Entry(Stored(name, part.dtype, shape), slot.offset))
        self.residuals.append(Residual(module.name, rank, norm, missed / norm if norm else 0.0))
        return True

    def _figures(self, module: FactoredModule) -> NDArray[np.float64]:
        slot = self._plan.layout.slots[module.job][2]
        return np.frombuffer(self._read(slot.offset, slot.nbytes), F64)

    def _whole(self, tensor: SavedTensor, wrapper: str = "") -> _Entry:
        """Take a tensor whole; `wrapper` is what PEFT puts before the last part of its name."""
        job, (slot,) = self._plan.jobs[tensor.job], self._plan.layout.slots[tensor.job]
        module, _, leaf = tensor.name.rpartition(".")
        return _Entry(Stored(f"{PREFIX}{module}{wrapper}.{leaf}", job.dtype, job.shape), slot.offset)

    def _differs(self, tensor: SavedTensor) -> bool:
        """Return whether a tensor differs from the base's, rounded to the same dtype."""
        job, base = self._plan.jobs[tensor.job], tensor.base
        (slot,) = self._plan.layout.slots[tensor.job]
        if base is None:
            return True
        width = itemsize(job.dtype)
        for first in range(0, job.n_elements, _STEP):
            last = min(job.n_elements, first + _STEP)
            ours = self._read(slot.offset + first * width, (last - first) * width)
            theirs = read_elements(self._reader, base, first, last)
            if job.dtype in FLOATS and base.dtype in FLOATS:
                theirs = rounded(widened(theirs, base.dtype, F64), job.dtype)
            if ours != theirs.tobytes():
                return True
        return False

    @property
    def nbytes(self) -> int:
        """Size of the adapter's file of weights."""
        return len(self._header) + sum(entry.stored.nbytes for entry in self._ordered)

    def data(self) -> Iterator[bytes]:
        """Yield the bytes of the adapter's file of weights, in order."""
        self._checksums, self._tensors = [(crc32(self._header), len(self._header))], {}
        yield self._header
        for entry in self._ordered:
            crc, end = 0, entry.offset + entry.stored.nbytes
            for position in range(entry.offset, end, _STEP):
                some = self._read(position, min(_STEP, end - position))
                crc = crc32(some, crc)
                yield some
            self._checksums.append((crc, entry.stored.nbytes))
            self._tensors[entry.stored.name] = entry.stored, crc

    def made(self, card: str) -> dict[str, bytes]:
        """Return the small files, of which the last marks a finished adapter."""
        made = {CONFIG_COPY: self._plan.config.text.encode("utf-8", "surrogatepass")}
        if "model card" not in self._plan.left_out:
            made["README.md"] = f"{card}\n{residual_table(self.residuals)}\n".encode()
        config = json.dumps(self._config, indent=2, ensure_ascii=False).encode() + b"\n"
        return made | {ADAPTER_CONFIG: config}

    def manifest(
        self,
        made: Mapping[str, bytes],
        receipts: Sequence[Receipt],
        identity: Identity,
        contents: Mapping[str, str],
    ) -> dict[str, Any]:
        """Return the manifest, when all of `data` has been taken; `contents` as in `commit`."""
        files = {ADAPTER_WEIGHTS: (self.nbytes, combine_all(self._checksums))}
        files |= {name: (len(data), crc32(data)) for name, data in made.items()}
        manifest = manifest_of(
            self._plan, cover(self._plan, receipts), identity, files, self._tensors, contents
        )
        manifest["densities"] = []  # those of its whole tensors alone would mislead
        manifest["adapter"] = {
            "residual": total_residual(self.residuals),
            "modules": {
                one.module: {"rank": one.rank, "norm": one.norm, "residual": one.residual}
                for one in self.residuals
            },
        }
        return manifest
