"""Values in the program of a PyTorch checkpoint: global names, storages, tensors, dicts."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from streammerge.records import dataclass


@dataclass(frozen=True, slots=True)
class Known:
    """A global name (function, class, dtype) that a checkpoint needs; an inert mark that cannot be called."""

    kind: Literal[
        "dict", "tensor", "old tensor", "young tensor", "parameter", "typed tensor", "storage", "dtype"
    ]
    dtype: str | None = None
    """The dtype of a storage class (None: bytes of any dtype), or the dtype that the name stands for."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """An object of a different class, or a function's result, which is not part of a tensor; only a name is kept."""

    name: str
    """A description that is safe to show in messages."""


@dataclass(eq=False, slots=True)
class Root:
    """A whole storage in the file."""

    name: str
    nbytes: int
    begin: int
    """Offset in the file; -1 until it is known."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A whole storage, or a part of one that the file treats as a storage."""

    root: Root
    dtype: str | None
    begin: int = 0
    """Offset in the root, in bytes."""
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the program describes it; it begins `skip` elements after the start of its storage.

    Fields of type Any are checked when the tensor's name is known.
    """

    storage: Storage
    dtype: str
    skip: Any
    shape: Any
    strides: Any
    bits: list[Any]
    """Empty, or one value that is true if the numbers are stored conjugated or negated."""


class Names(dict[str, Any]):
    """A dict of the program. Items whose keys are not strings are left out, so that only strings are hashed."""

    odd: str = ""
    """The type of the first key that is not a string."""


class Storages(Protocol):
    """Finds the storages of a file."""

    def find(self, key: str, dtype: str | None, count: int, view: Any) -> Storage:
        """Return a storage of `count` elements, or the part of it given by `view`; refuse one that does not exist."""


STORAGES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
}
YOUNG_DTYPES = {
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
"""Newer dtypes without a storage class; torch writes them in addition to a storage of bytes."""

KNOWN: dict[tuple[str, str], Known] = {
    ("collections", "OrderedDict"): Known("dict"),
    ("collections", "defaultdict"): Known("dict"),
    ("torch._utils", "_rebuild_tensor"): Known("old tensor"),
    ("torch._utils", "_rebuild_tensor_v2"): Known("tensor"),
    ("torch._utils", "_rebuild_tensor_v3"): Known("young tensor"),
    ("torch._utils", "_rebuild_parameter"): Known("parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"): Known("parameter"),
    ("torch._tensor", "_rebuild_from_type_v2"): Known("typed tensor"),
    ("torch.storage", "UntypedStorage"): Known("storage"),
    **{("torch", name): Known("storage", dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): Known("dtype", dtype) for name, dtype in YOUNG_DTYPES.items()},
}

HARMFUL = frozenset(
    [
        "os",
        "posix",
        "nt",
        "subprocess",
        "sys",
        "pty",
        "socket",
        "shutil",
        "runpy",
        "importlib",
        "ctypes",
        "commands",
        "webbrowser",
        "code",
        "pickle",
        "_pickle",
        "multiprocessing",
        "signal",
    ]
)
"""Modules whose names no checkpoint needs, but malicious files use."""
HARMFUL_BUILTINS = frozenset(
    ["eval", "exec", "execfile", "compile", "__import__", "open", "input", "breakpoint"]
)
