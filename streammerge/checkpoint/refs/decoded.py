"""The part that all quantised tensors share: values in fp32, computed from codes as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streammerge.formats.refs import MadeRef


class DecodedRef(MadeRef):
    """A tensor stored as codes; its values are decoded to fp32 as they are read."""

    __slots__ = ()
    decoders = frozenset({"unpacking"})
    """Groups of compiled kernels that decode it."""
    if TYPE_CHECKING:

        @property
        def title(self) -> str:
            """The storage format, as `inspect` and `plan` show it."""

    @property
    def dtype(self) -> str:
        """The dtype of the decoded values."""
        return "F32"

    @property
    def stored_dtype(self) -> str:
        """See `SourceRef`: the dtype of the weights before quantisation."""
        return "BF16"

    @property
    def stored_format(self) -> str:
        """See `SourceRef`."""
        return self.title

    @property
    def kernels(self) -> frozenset[str]:
        """See `SourceRef`."""
        return self.decoders

    @property
    def shown(self) -> Mapping[str, Any]:
        """See `SourceRef`."""
        return {"stored_as": self.title}
