"""Write the machine code of compiled loops to files that `streammerge.numerics.ready` loads without numba.

The code is what numba has cached. To it comes, for each choice of types, a function of LLVM that reads the arguments from
slots of 8 bytes, and numba's functions for memory: loops allocate their buffers, and count no references to arguments.
Types are told as JSON: the name of a scalar's type, ``["array", dtype, rank]``, or ``["tuple", types]``.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from streammerge.numerics.compiled import kernel_cache
from streammerge.numerics.ready import NO_MATCH, file_of, write_code

_HEAD = object.__basicsize__
_DATA, _RANK, _DIMENSIONS, _STRIDES, _FLAGS = _HEAD, _HEAD + 8, _HEAD + 16, _HEAD + 24, _HEAD + 48
"""Offsets in numpy's object of an array (``PyArrayObject_fields``, which numpy keeps as it is for compiled extensions)."""
_WANTED = 0x1 | 0x100 | 0x400
"""Flags of arrays: contiguous, aligned, writable."""
_NONE = -2
"""What numba's functions return in place of 0 if their result is None."""
_RETURNS = {"int64": "q", "uint32": "I", "float64": "d", "float32": "f", "none": ""}
_MEMORY = """
declare ptr @malloc(i64)
declare void @free(ptr)
declare void @abort()
define weak_odr ptr @NRT_MemInfo_alloc_aligned(i64 %size, i32 %align) {
  %wide = zext i32 %align to i64
  %extra = add i64 %wide, 64
  %all = add i64 %size, %extra
  %memory = call ptr @malloc(i64 %all)
  %none = icmp eq ptr %memory, null
  br i1 %none, label %fail, label %fill
fail:
  ret ptr null
fill:
  %at = ptrtoint ptr %memory to i64
  %behind = add i64 %at, %extra
  %mask = sub i64 0, %wide
  %place = and i64 %behind, %mask
  %data = inttoptr i64 %place to ptr
  %head = insertvalue {i64, ptr, ptr, ptr, i64, ptr} zeroinitializer, i64 1, 0
  %known = insertvalue {i64, ptr, ptr, ptr, i64, ptr} %head, ptr %data, 3
  %full = insertvalue {i64, ptr, ptr, ptr, i64, ptr} %known, i64 %size, 4
  store {i64, ptr, ptr, ptr, i64, ptr} %full, ptr %memory
  ret ptr %memory
}
define weak_odr void @NRT_MemInfo_call_dtor(ptr %info) {
  call void @free(ptr %info)
  ret void
}
define weak_odr void @NRT_Free(ptr %memory) {
  call void @free(ptr %memory)
  ret void
}
"""
"""numba's counted memory: a head of the count, two pointers, the data's address and the size, and the data behind it."""
_MADE = {"NRT_MemInfo_alloc_aligned", "NRT_MemInfo_call_dtor", "NRT_Free"}


class UnfitError(Exception):
    """A loop has arguments, or calls functions, that `ready` does not serve."""


def export() -> int:
    """Write the files of all loops that are compiled in this process and have none; return how many were written."""
    directory, written = kernel_cache().directory, 0
    if directory is None:
        return 0
    for name, loop in list(_loops()):
        for signature, compiled in list(loop.overloads.items()):
            types = hashlib.blake2b(repr(signature).encode(), digest_size=6).hexdigest()
            path = file_of(directory, name, types)
            if path.exists():
                continue
            # Whatever numba's inner workings do not give, numba itself serves.
            with suppress(Exception):
                write_code(path, *_exported(name, loop, signature, compiled, types))
                written += 1
    return written


def _loops() -> Iterator[tuple[str, Any]]:
    """Yield the public loops of all imported modules of ours, by their names below the package."""
    for module_name, module in sorted(sys.modules.items()):
        if not module_name.startswith(("streammerge.kernels.", "streammerge.numerics.")) or module is None:
            continue
        for name, loop in vars(module).items():
            function = getattr(loop, "py_func", None)
            if function is not None and function.__module__ == module_name and not name.startswith("_"):
                yield f"{module_name.partition('.')[2]}.{name}", loop


def _exported(
    name: str, loop: Any, signature: Any, compiled: Any, types: str
) -> tuple[dict[str, Any], list[bytes]]:
    """Return what is told of a loop and its object files; raise `UnfitError` if `ready` does not serve it."""
    kinds = [_kind(one) for one in compiled.signature.args]
    returns = _returned(compiled.signature.return_type)
    symbol, code, bitcode = _cached(loop, signature, compiled)
    entry = f"ready.{name}.{types}"
    unpacking = _unpacking(compiled, symbol, kinds, entry)
    told = {"entry": entry, "loop": symbol, "arguments": kinds, "returns": returns}
    return told, [code, _assembled(f"{unpacking}\n{_stand_ins(bitcode)}"), _assembled(_MEMORY)]


def _cached(loop: Any, signature: Any, compiled: Any) -> tuple[str, bytes, bytes]:
    """Return the loop's symbol, the object file and the bitcode that numba has cached.

    A different process may have compiled the loop meanwhile and replaced what this one had cached. The symbol has a number
    that numba counts in each process, so it is taken from the cache with the code, never from this process.
    """
    cache = loop._cache
    key = cache._index_key(signature, compiled.target_context.codegen())
    library, described = cache._cache_file.load(key)[:2]
    _, kind, (code, bitcode) = library
    if kind != "object":
        raise UnfitError(kind)
    return described.llvm_func_name, code, bitcode


def _kind(of: Any) -> Any:
    """Return a numba type as JSON."""
    from numba import types

    if isinstance(of, types.Array):
        if of.layout != "C" or not of.mutable or not of.aligned or of.ndim < 1:
            raise UnfitError(str(of))
        return ["array", str(of.dtype), of.ndim]
    if isinstance(of, types.BaseTuple):
        return ["tuple", [_kind(one) for one in _parts(of)]]
    if str(of) not in ("int64", "float64", "float32", "bool"):
        raise UnfitError(str(of))
    return str(of)


def _parts(of: Any) -> list[Any]:
    return list(of)


def _returned(of: Any) -> str:
    """Return the format of a result, a number or a tuple of them: numba writes it as C lays out a struct."""
    from numba import types

    parts = _parts(of) if isinstance(of, types.BaseTuple) else [of]
    if not all(str(one) in _RETURNS for one in parts):
        raise UnfitError(str(of))
    return "@" + "".join(_RETURNS[str(one)] for one in parts)


# --- code of LLVM


class _Reading:
    """The part of a function that reads a loop's arguments from slots.

    Parameters
    ----------
    function
        The function, without code; its first argument is the address of the slots.
    wanted
        LLVM's types of the loop's arguments, in order.
    """

    def __init__(self, function: Any, wanted: Any) -> None:
        from llvmlite import ir

        self.ir, self.function, self.wanted = ir, function, wanted
        self.builder = ir.IRBuilder(function.append_basic_block())
        self.unfit = function.append_basic_block()
        self.word, self.half, self.pointer = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
        self.values: list[Any] = []
        self._at = -8

    def take(self, kind: Any) -> None:
        """Append the values of an argument to `values`."""
        if not isinstance(kind, str) and kind[0] == "tuple":
            for one in kind[1]:
                self.take(one)
            return
        self._at += 8
        slots, double = self.function.args[0], self.ir.DoubleType()
        if not isinstance(kind, str):
            self._array(np.dtype(kind[1]).itemsize, kind[2], self._read(slots, self._at, self.pointer))
        elif kind == "float32":
            narrow = self.builder.fptrunc(self._read(slots, self._at, double), self.ir.FloatType())
            self.values.append(narrow)
        elif kind == "bool":
            wide = self._read(slots, self._at, self.word)
            self.values.append(self.builder.trunc(wide, self.wanted[len(self.values)]))
        else:
            self.values.append(self._read(slots, self._at, double if kind == "float64" else self.word))

    def fitted(self) -> list[Any]:
        """Return the values with the types that are wanted; raise `UnfitError` if they are others."""
        if len(self.values) != len(self.wanted):
            raise UnfitError("a different convention of calls")
        pairs = list(zip(self.values, self.wanted, strict=True))
        fit = [
            self.builder.bitcast(value, kind) if isinstance(kind, self.ir.PointerType) else value
            for value, kind in pairs
        ]
        if any(value.type != kind for value, kind in zip(fit, self.wanted, strict=True)):
            raise UnfitError("a different convention of calls")
        return fit

    def _read(self, base: Any, offset: int, kind: Any) -> Any:
        place = self.builder.gep(base, [self.ir.Constant(self.word, offset)])
        return self.builder.load(self.builder.bitcast(place, kind.as_pointer()))

    def _check(self, value: Any, wanted: int) -> None:
        fit = self.function.append_basic_block()
        same = self.builder.icmp_signed("==", value, self.ir.Constant(self.half, wanted))
        self.builder.cbranch(same, fit, self.unfit)
        self.builder.position_at_end(fit)

    def _array(self, itemsize: int, rank: int, given: Any) -> None:
        """Append the fields of numba's struct of an array, without an owner whose references would be counted."""
        build = self.builder
        self._check(self._read(given, _RANK, self.half), rank)
        flags = self._read(given, _FLAGS, self.half)
        self._check(build.and_(flags, self.ir.Constant(self.half, _WANTED)), _WANTED)
        sizes, steps = (self._read(given, offset, self.pointer) for offset in (_DIMENSIONS, _STRIDES))
        lengths = [self._read(sizes, 8 * i, self.word) for i in range(rank)]
        strides = [self._read(steps, 8 * i, self.word) for i in range(rank)]
        number = lengths[0]
        for length in lengths[1:]:
            number = build.mul(number, length)
        owner = self.ir.Constant(self.pointer, None)
        size, data = self.ir.Constant(self.word, itemsize), self._read(given, _DATA, self.pointer)
        self.values += [owner, owner, number, size, data, *lengths, *strides]


def _unpacking(compiled: Any, symbol: str, kinds: list[Any], entry: str) -> str:
    """Return the function that takes slots and room for the result, and calls the loop by its symbol."""
    from llvmlite import ir

    signature, convention = compiled.signature, compiled.target_context.call_conv
    shape = convention.get_function_type(signature.return_type, signature.args)
    module, half, pointer = ir.Module(), ir.IntType(32), ir.IntType(8).as_pointer()
    loop = ir.Function(module, shape, symbol)
    function = ir.Function(module, ir.FunctionType(half, [pointer, pointer]), entry)
    reading = _Reading(function, list(shape.args[2:]))
    for kind in kinds:
        reading.take(kind)
    builder, values = reading.builder, reading.fitted()
    error = builder.alloca(shape.args[1].pointee)
    code = builder.call(loop, [builder.bitcast(function.args[1], shape.args[0]), error, *values])
    if str(signature.return_type) == "none":
        none = builder.icmp_signed("==", code, ir.Constant(half, _NONE))
        code = builder.select(none, ir.Constant(half, 0), code)
    builder.ret(code)
    builder.position_at_end(reading.unfit)
    builder.ret(ir.Constant(half, NO_MATCH))
    return str(module)


def _stand_ins(bitcode: bytes) -> str:
    """Return code that stands for what only the functions for Python call, which nobody calls here."""
    import llvmlite.binding as llvm

    module, lines = llvm.parse_bitcode(bitcode), []
    for function in module.functions:
        name = function.name
        if not function.is_declaration or name in _MADE or name.startswith("llvm."):
            continue
        if name.startswith(("Py", "_Py", "numba_", "NRT_")):
            lines.append(f"define weak_odr void @{name}() {{\n  call void @abort()\n  unreachable\n}}")
        elif llvm.address_of_symbol(name) is None:
            raise UnfitError(name)
    for variable in module.global_variables:
        if variable.is_declaration:
            lines.append(f"@{variable.name} = weak_odr global ptr null")
    return "\n".join([*lines, "declare void @abort()"])


def _assembled(code: str) -> bytes:
    """Return the object file of a module of LLVM's assembly language."""
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(code)
    module.verify()
    target = llvm.Target.from_default_triple()
    static = target.name.startswith("x86")
    machine = target.create_target_machine(
        opt=2, reloc="static" if static else "default", codemodel="jitdefault", jit=True
    )
    made: bytes = machine.emit_object(module)
    return made
