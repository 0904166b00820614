"""Load a checkpoint's tensors as a model's parameters: match names, widen values to fp32, join experts.

transformers stores some parameters differently from checkpoints (all experts of a layer in one tensor), and can split
them. Without copies the parts are views of the parameter: values are read into it through them, and results for the
parameter are read out through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from streammerge.checkpoint.index import TensorIndex
from streammerge.dtypes import FLOATS, itemsize
from streammerge.errors import InputError, ModelError, printable
from streammerge.estimate.network.skeleton import Skeleton
from streammerge.formats.refs import SourceRef
from streammerge.io.reader import Reader
from streammerge.numerics.casts import torch_dtype
from streammerge.tensors.read import read_elements

_PIECE = 1 << 22
"""Number of elements that are read and widened at a time."""


class Loader:
    """Reads parameters of a skeleton from the files of its model.

    Raises
    ------
    ModelError
        If a parameter has no tensor, or one of a different shape or kind.
    """

    def __init__(self, skeleton: Skeleton, index: TensorIndex, reader: Reader) -> None:
        self._skeleton = skeleton
        self._index = index
        self._reader = reader
        self._find = _Names(skeleton.model, index)
        for parameter in skeleton.aliases:
            self.parts(parameter, parameter)

    @property
    def reference(self) -> str:
        """The model's reference."""
        return self._index.reference

    def name(self, parameter: nn.Parameter) -> str:
        """Return a parameter's first name."""
        return self._skeleton.name(parameter)

    def parts(self, parameter: nn.Parameter, values: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the checkpoint that form a parameter, as views of `values`, which has its shape.

        A tied parameter may be in the checkpoint under several names.
        """
        found: dict[str, Tensor] = {}
        for alias in self._skeleton.aliases[parameter]:
            for name, window in self._find.apart(alias, values).items():
                known = self._find(name)
                if known is not None:
                    found[known] = window
        self._check(parameter, values, found)
        return found

    def load(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's values in fp32."""
        values = torch.empty(parameter.shape)
        filled = 0
        for name, window in self.parts(parameter, values).items():
            if window.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
                raise ModelError(
                    f"{printable(self._index.reference)}: transformers rearranges {printable(name)} in an unsupported way"
                )
            if filled < values.numel():  # a tied parameter's second name holds the same values
                self._fill(self._index[name], window)
                filled += window.numel()
        return values

    def rows(self, parameter: nn.Parameter, ids: Tensor) -> Tensor:
        """Return some rows of an embedding, [len(ids), width], fp32."""
        ref = self._index[next(iter(self.parts(parameter, parameter)))]
        width = ref.shape[1]
        buffer = np.empty((len(ids), width * itemsize(ref.dtype)), np.uint8)
        for row, i in zip(buffer, ids.tolist(), strict=True):
            row[:] = read_elements(self._reader, ref, i * width, (i + 1) * width)
        return (
            torch.from_numpy(buffer.reshape(-1))
            .view(torch_dtype(ref.dtype))
            .to(torch.float32)
            .view(-1, width)
        )

    def _fill(self, ref: SourceRef, window: Tensor) -> None:
        flat = window.view(-1) if window.is_contiguous() else torch.empty(ref.n_elements)
        for first in range(0, ref.n_elements, _PIECE):
            n = min(_PIECE, ref.n_elements - first)
            buffer = read_elements(self._reader, ref, first, first + n)
            flat[first : first + n] = torch.from_numpy(buffer).view(torch_dtype(ref.dtype))
        if not window.is_contiguous():
            window.copy_(flat.view(window.shape))

    def _check(self, parameter: nn.Parameter, values: Tensor, found: Mapping[str, Tensor]) -> None:
        name, where = printable(self._skeleton.name(parameter)), printable(self._index.reference)
        if sum(window.numel() for window in found.values()) < values.numel():
            raise ModelError(
                f"{where}: the parameter {name} of {type(self._skeleton.model).__name__} is missing in the checkpoint"
            )
        for tensor, window in found.items():
            ref = self._index[tensor]
            if ref.shape != tuple(window.shape):
                raise ModelError(
                    f"{where}: tensor {printable(tensor)} has shape {list(ref.shape)}, but config.json requires {list(window.shape)}"
                )
            if ref.dtype not in FLOATS:
                raise ModelError(
                    f"{where}: tensor {printable(tensor)} is {ref.dtype}, not a floating-point dtype"
                )


class _Names:
    """Maps transformers' names of parameter parts to the checkpoint's names."""

    def __init__(self, model: nn.Module, index: TensorIndex) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                rename_source_key,
                revert_weight_conversion,
            )
        except ImportError as error:
            raise InputError(f"transformers 5 is needed to run a model ({error})") from None
        self._model = model
        self._revert: Callable[..., Mapping[str, Tensor]] = revert_weight_conversion
        conversions: Iterable[Any] = get_model_conversion_mapping(model, add_legacy=True)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converts = any(isinstance(entry, WeightConverter) for entry in conversions)
        known = model.state_dict()

        def canonical(name: str) -> str:
            renamed: str = rename_source_key(name, renamings, [], model.base_model_prefix, known)[0]
            return renamed

        self._canonical = canonical
        self._index = index
        self._by_name = {canonical(name): name for name in reversed(tuple(index))}

    def __call__(self, part: str) -> str | None:
        """Return the checkpoint's name of a part, or None."""
        return part if part in self._index else self._by_name.get(self._canonical(part))

    def apart(self, name: str, values: Tensor) -> dict[str, Tensor]:
        """Return the parts of a parameter by their names in files."""
        if not self._converts:
            return {name: values}
        with _NoCopies(), torch.no_grad():
            return dict(self._revert(self._model, {name: values.detach()}))


class _NoCopies(TorchFunctionMode):
    """While active, `contiguous` returns the tensor itself."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))
