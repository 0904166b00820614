"""Compiled loops that are called without numba, whose import takes longer than a plan.

`streammerge.numerics.exporting` writes the machine code of each loop that Python calls beside numba's own cache: the same
code, and a function that unpacks its arguments from an array of 8-byte slots. Here LLVM's loader alone takes it in. What is
missing, or called with arguments of other types, is left to numba.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from streammerge.numerics.compiled import kernel_cache

SUFFIX = ".ready"
NO_MATCH = -100
"""What the function returns if an array is not as the loop was compiled for: contiguous, aligned, writable, of its rank."""
_SCALARS: dict[str, tuple[str, set[type]]] = {
    "int64": ("q", {int, np.int64}),
    "float64": ("d", {float, np.float64}),
    "float32": ("d", {np.float32}),
    "bool": ("q", {bool}),
}
"""The slot of each type of scalars, and the Python types that numba takes for it."""
_HEAD = struct.Struct("<q")
_LOADING = threading.RLock()
_LOADED: dict[str, tuple[Overload, ...]] = {}
"""The loops of this process, by name; changed under `_LOADING`."""
_ENGINES: list[Any] = []
"""The loaders, which hold the loaded code for the life of the process."""
_UNFIT = object()


def file_of(directory: Path, loop: str, types: str) -> Path:
    """Return the file of a loop, ``module.function``, for arguments of some types, whose digest is given."""
    return directory / f"{loop}-{types}{SUFFIX}"


def write_code(path: Path, told: dict[str, Any], objects: list[bytes]) -> None:
    """Write the object files of a loop and what is told of it, if they can be loaded: all or nothing.

    The trial is before the file has its name, since LLVM may end the process that loads what it cannot link.
    """
    head = json.dumps(told | {"sizes": [len(one) for one in objects]}).encode()
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        content = _HEAD.pack(len(head)) + head + b"".join(objects)
        partial.write_bytes(_checksum(content) + content)
        load_code(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _read(path: Path) -> tuple[dict[str, Any], list[bytes]]:
    """Return what `write_code` wrote; raise ValueError if the file has changed, since LLVM trusts what it loads."""
    whole = path.read_bytes()
    content = whole[16:]
    if whole[:16] != _checksum(content):
        raise ValueError("not as it was written")
    (told_size,) = _HEAD.unpack_from(content)
    at = _HEAD.size + told_size
    told = json.loads(content[_HEAD.size : at])
    objects = []
    for size in told["sizes"]:
        objects.append(content[at : at + size])
        at += size
    return told, objects


# --- a loop for arguments of one choice of types


class Overload:
    """A loop's machine code for arguments of some types.

    Parameters
    ----------
    told
        ``entry``, the function's symbol, and ``loop``, that of the loop it calls; ``arguments``, their types (see
        `exporting`); ``returns``, the format of the result.
    address
        Where the function lies in memory.
    """

    def __init__(self, told: dict[str, Any], address: int) -> None:
        import ctypes

        self._pack = _packing(told["arguments"])
        self._result = struct.Struct(told["returns"])
        self._room = ctypes.c_char * (self._result.size + 8)
        self._call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(address)

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        """Return the result, or `_UNFIT` if the arguments have other types or the loop fails; releases the GIL."""
        try:
            slots = self._pack(*arguments)
        except (TypeError, ValueError, AttributeError, struct.error):
            return _UNFIT
        if slots is None:
            return _UNFIT
        room = self._room()
        if self._call(slots, room) != 0:
            return _UNFIT
        found = self._result.unpack_from(room)
        return found[0] if len(found) == 1 else found or None


def _packing(arguments: list[Any]) -> Callable[..., bytes | None]:
    """Compile a function of the arguments that returns their slots, or None if their types differ.

    The slot of an array is the address of its object, whose fields the function reads: the caller holds it meanwhile.
    """
    names: dict[str, Any] = {"id": id, "type": type}
    lines: list[str] = []
    slots: list[str] = []
    formats = ["<"]

    def take(kind: Any, name: str) -> None:
        if isinstance(kind, str):
            form, types = _SCALARS[kind]
            names[f"types_{kind}"] = types
            lines.append(f"if type({name}) not in types_{kind}: return None")
            slots.append(name)
            formats.append(form)
        elif kind[0] == "array":
            names[f"dtype_{kind[1]}"] = np.dtype(kind[1])
            lines.append(f"if {name}.dtype != dtype_{kind[1]} or type({name}) is not ndarray: return None")
            slots.append(f"id({name})")
            formats.append("Q")
        else:
            inner = [f"{name}_{i}" for i in range(len(kind[1]))]
            lines.append(f"({''.join(one + ', ' for one in inner)}) = {name}")
            for one, of in zip(inner, kind[1], strict=True):
                take(of, one)

    parameters = [f"a{i}" for i in range(len(arguments))]
    for name, kind in zip(parameters, arguments, strict=True):
        take(kind, name)
    names |= {"ndarray": np.ndarray, "pack": struct.Struct("".join(formats)).pack}
    lines.append(f"return pack({', '.join(slots)})")
    exec(f"def packed({', '.join(parameters)}):\n " + "\n ".join(lines), names)
    packed: Callable[..., bytes | None] = names["packed"]
    return packed


@cache
def _native() -> Any:
    """Return LLVM's target of this machine."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


def _linked(objects: list[bytes]) -> Any:
    """Return a loader of LLVM's with object files in it, linked to each other and to nothing else that is loaded.

    Files may come from several processes. In one loader a name that two of them give to different functions would stand for
    the first.
    """
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _native().create_target_machine())
    for one in objects:
        engine.add_object_file(llvm.ObjectFileRef.from_data(one))
    engine.finalize_object()
    _ENGINES.append(engine)
    return engine


def load_code(path: Path) -> Overload:
    """Load a loop's file; no two threads may do so at once.

    Raises
    ------
    OSError, ValueError, KeyError, RuntimeError, ImportError
        If the file is not whole, or LLVM does not take it.
    """
    told, objects = _read(path)
    engine = _linked(objects)
    # What LLVM does not find has the address 0, also where the entry calls it.
    entry, _ = addresses = [engine.get_function_address(told[name]) for name in ("entry", "loop")]
    if not all(addresses):
        raise ValueError("no function")
    return Overload(told, entry)


# --- loops by name


class Loop:
    """A loop that Python calls; numba is imported for arguments that no file serves.

    Parameters
    ----------
    module
        Its module below ``streammerge``: ``kernels.merge``.
    name
        The function.
    """

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name
        self._overloads: tuple[Overload, ...] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Call the loop with arguments as numba's function takes them."""
        if self._overloads is None:
            self._overloads = _overloads(f"{self.module}.{self.name}")
        for one in self._overloads:
            found = one(arguments)
            if found is not _UNFIT:
                return found
        return getattr(import_module(f"streammerge.{self.module}"), self.name)(*arguments)


def _overloads(loop: str) -> tuple[Overload, ...]:
    """Return what is compiled of a loop; each file is loaded once in a process, whoever asks."""
    with _LOADING:
        if loop not in _LOADED:
            _LOADED[loop] = tuple(_load_all(loop))
        return _LOADED[loop]


def _load_all(loop: str) -> Iterator[Overload]:
    directory = kernel_cache().directory
    if directory is None:
        return
    for path in sorted(directory.glob(f"{loop}-*{SUFFIX}")):
        with suppress(OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, struct.error):
            yield load_code(path)


class Loops:
    """The loops of a module, as attributes.

    Parameters
    ----------
    module
        The module below ``streammerge``.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Loop:
        """Return a loop, and remember it."""
        loop = Loop(self._module, name)
        setattr(self, name, loop)
        return loop
