"""What the program in a PyTorch checkpoint speaks of: names of the outside world, storages, tensors, dicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class Known:
    """A name of the outside world that a checkpoint needs; a mark, which nobody can call."""

    kind: Literal[
        "dict", "tensor", "old tensor", "young tensor", "parameter", "typed tensor", "storage", "dtype"
    ]
    dtype: str | None = None
    """Of a storage (None: bytes of any dtype), or the dtype itself."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """What is no part of a tensor: an object of another class, or what a function returned; of it we keep the name."""

    name: str
    """What it is, for a message; fit for one."""


@dataclass(eq=False, slots=True)
class Root:
    """A storage as it lies in the file."""

    name: str
    nbytes: int
    begin: int
    """In the file; -1 as long as that is not known."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage, or the part of one that is called a storage too."""

    root: Root
    dtype: str | None
    begin: int = 0
    """In the root, in bytes."""
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a program says of one tensor: `skip` elements of its storage lie before it.

    What is Any here is checked when the tensor's name is known.
    """

    storage: Storage
    dtype: str
    skip: Any
    shape: Any
    strides: Any
    bits: list[Any]
    """Nothing, or one value that is true if its numbers are stored conjugated or negated."""


class Names(dict[str, Any]):
    """A dict of the program, without the items whose keys are no strings: nothing else is ever hashed."""

    odd: str = ""
    """The type of the first key that is no string."""


class Storages(Protocol):
    """Knows the storages of a file."""

    def find(self, key: str, dtype: str | None, count: int, view: Any) -> Storage:
        """Return a storage of `count` elements, or the part of it that `view` says; refuse one that is not there."""


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
"""Dtypes too young to have a storage class: torch writes them beside a storage of bytes."""

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
"""Modules that no checkpoint needs a name of, but those who mean harm do."""
HARMFUL_BUILTINS = frozenset(
    ["eval", "exec", "execfile", "compile", "__import__", "open", "input", "breakpoint"]
)
