"""Tensors of torch or numpy that the caller holds in memory, copied piece by piece on request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import itemsize
from streammerge.errors import InputError, printable
from streammerge.formats.safetensors import MAX_RANK

if TYPE_CHECKING:
    import torch

_STEP = 1 << 20
"""Number of elements copied at a time from a GPU or from a non-contiguous tensor."""
_TORCH = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
"""Names of the dtypes in torch, numpy and ml_dtypes."""


class Held(Protocol):
    """One tensor in memory."""

    @property
    def dtype(self) -> str:
        """The dtype, a key of `streammerge.dtypes.BITS`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""

    @property
    def place(self) -> object:
        """A key that is equal for two tensors if and only if they view the same memory in the same way."""

    def copy(self, start: int, target: NDArray[np.uint8]) -> None:
        """Fill `target` with the bytes of the elements from `start` on, in the order of the shape."""


class _Strided:
    """The common part for tensors of torch and arrays of numpy: copies ranges of the flat order by whole rows."""

    def __init__(self, value: Any, dtype: str, contiguous: bool) -> None:
        self._value, self.dtype, self._contiguous = value, dtype, contiguous
        self.shape: tuple[int, ...] = tuple(value.shape)

    def copy(self, start: int, target: NDArray[np.uint8]) -> None:
        """See `Held`."""
        width = itemsize(self.dtype)
        for first in range(0, target.size // width, _STEP):
            n = min(_STEP, target.size // width - first)
            target[first * width : (first + n) * width] = self._bytes(
                self._elements(start + first, start + first + n)
            )

    def _elements(self, start: int, stop: int) -> Any:
        rows = self._value
        if self._contiguous:
            return rows.reshape(-1)[start:stop]
        while rows.shape[0] == 1:
            rows = rows[0]
        line = max(1, int(np.prod(rows.shape[1:], dtype=np.int64)))
        first = start // line
        some = rows[first : -(-stop // line)].reshape(-1)
        return some[start - first * line : stop - first * line]

    def _bytes(self, flat: Any) -> NDArray[np.uint8]:
        raise NotImplementedError


class _Tensor(_Strided):
    """A tensor of torch, on any device."""

    def __init__(self, value: torch.Tensor, dtype: str) -> None:
        value = value.detach()
        super().__init__(value, dtype, value.is_contiguous())

    @property
    def place(self) -> object:
        """See `Held`."""
        t = self._value
        return str(t.device), t.data_ptr(), self.dtype, self.shape, t.stride()

    def _bytes(self, flat: torch.Tensor) -> NDArray[np.uint8]:
        import torch

        plain = flat.resolve_conj().resolve_neg().cpu().contiguous()
        return plain.view(torch.uint8).numpy()


class _Array(_Strided):
    """An array of numpy."""

    def __init__(self, value: NDArray[Any], dtype: str) -> None:
        super().__init__(value, dtype, bool(value.flags.c_contiguous))

    @property
    def place(self) -> object:
        """See `Held`."""
        return "numpy", self._value.ctypes.data, self.dtype, self.shape, self._value.strides

    def _bytes(self, flat: NDArray[Any]) -> NDArray[np.uint8]:
        native = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
        return np.ascontiguousarray(native).view(np.uint8)


def hold(value: object, what: str) -> Held:
    """Return a value of a state dict as a readable tensor; refuse a value that is not a tensor."""
    import torch

    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if value.layout != torch.strided or value.is_quantized:
            raise InputError(
                f"{what}: a tensor with layout {value.layout} or quantised: make it dense floats"
            )
        if value.is_meta:
            raise InputError(f"{what}: lies on the device 'meta' and has no values: load the model first")
    elif isinstance(value, np.ndarray):
        name = value.dtype.name
    else:
        raise InputError(
            f"{what}: a {type(value).__name__} is neither a torch.Tensor nor a numpy array: leave it out"
        )
    if name not in _TORCH:
        raise InputError(
            f"{what}: dtype {printable(name, 60)} cannot be merged: convert it to a float dtype first"
        )
    if len(value.shape) > MAX_RANK:
        raise InputError(f"{what}: has {len(value.shape)} dimensions, more than {MAX_RANK}")
    return (
        _Tensor(value, _TORCH[name])
        if isinstance(value, torch.Tensor)
        else _Array(np.asarray(value), _TORCH[name])
    )


def torch_dtype(code: str) -> torch.dtype:
    """Return torch's dtype for the format's dtype code."""
    import torch

    name = next(name for name, known in _TORCH.items() if known == code)
    return getattr(torch, name)
