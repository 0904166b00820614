"""Interpret the pickle program in a PyTorch checkpoint with a machine that cannot call anything.

A pickle is a program for a stack machine. The program of ``torch.save`` builds a dict of tensors, each a view of one
storage; the file may contain other data of a trainer. Global names are only marks. For functions that build tensors,
the machine itself does what torch's function would do. For all others, it keeps only the name (`Foreign`), whatever the
program calls, builds or fills. Hence no code in the file can run.

Python's own unpickler is unsuitable, even restricted. It hashes any key in the file (a deeply nested tuple overflows
the C stack, which kills the process), and sizes its memo by the largest index (8 bytes in a file can take 4 GiB).

No code here recurses into, compares or prints nested values of a file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from streammerge.formats.refusing import AGAIN, PLAIN, Refused, Source
from streammerge.formats.safetensors import MAX_NAME
from streammerge.formats.torch_names import (
    HARMFUL,
    HARMFUL_BUILTINS,
    KNOWN,
    Foreign,
    Known,
    Names,
    Storage,
    Storages,
    Tensor,
)
from streammerge.io.files import quoted

MAX_STEPS = 4_000_000
"""Most opcodes, of which a tensor takes about 26; each costs up to 100 bytes of memory."""

_WINDOW = 1 << 18
"""Bytes of a program of unknown length that are read first."""


class Machine:
    """Interprets the programs of ``torch.save``; an opcode that it never writes is refused.

    Values are None, booleans, numbers, strings, tuples, lists, `Names`, and the inert classes of
    `streammerge.formats.torch_names`. A step that raises `IndexError` (empty stack) or `ValueError` means that the
    program is broken.

    Parameters
    ----------
    raw
        The program.
    storages
        The storages of the file.
    source
        The source of further bytes, read as needed; None if `raw` is the whole program.
    limit
        Most bytes to read from the source.
    """

    most_steps = 0
    """Most opcodes of a program, if different from `MAX_STEPS`."""

    def __init__(self, raw: bytes, storages: Storages, source: Source | None = None, limit: int = 0) -> None:
        self.raw, self.storages = raw, storages
        self.source, self.limit = source, limit
        self.at = 0
        self.clear()

    def clear(self) -> None:
        """Clear all values, as needed between several programs in a file."""
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        """The stacks below each mark."""
        self.memo: list[Any] = []

    def run(self) -> Any:
        """Return what the program leaves on the stack."""
        self.clear()
        try:
            for _ in range(self.most_steps or MAX_STEPS):
                code = self.take(1)
                if code == b".":
                    return self.stack.pop()
                if code not in _STEPS:
                    raise Refused(f"its data.pkl has opcode 0x{code.hex()}, not one of tensors: {PLAIN}")
                _STEPS[code](self)
        except (IndexError, ValueError):
            raise Refused(f"its data.pkl is broken before byte {self.at}: {AGAIN}") from None
        raise Refused(f"its data.pkl has more than {self.most_steps or MAX_STEPS} opcodes")

    def _have(self, nbytes: int) -> bool:
        """Read from the source until the program has `nbytes`; return whether the source has enough."""
        while nbytes > len(self.raw):
            more = 0
            if self.source is not None:
                most = min(self.source.nbytes, self.limit) - len(self.raw)
                more = min(most, max(_WINDOW, len(self.raw), nbytes - len(self.raw)))
            if more <= 0 or self.source is None:
                return False
            self.raw += self.source.read(len(self.raw), more, "its program")
        return True

    def take(self, nbytes: int) -> bytes:
        """Return the next bytes."""
        self.skip(nbytes)
        return self.raw[self.at - nbytes : self.at]

    def skip(self, nbytes: int) -> None:
        """Skip the next bytes."""
        self.at += nbytes
        if not self._have(self.at):
            raise ValueError

    def number(self, nbytes: int, signed: bool = False) -> int:
        """Return the next bytes as an integer."""
        return int.from_bytes(self.take(nbytes), "little", signed=signed)

    def integer(self, nbytes: int) -> None:
        """Push an integer; one that cannot be a size is replaced by a mark."""
        if nbytes <= 8:
            self.push(self.number(nbytes, True))
        else:
            self.skip(nbytes)
            self.push(Foreign("a long integer"))

    def text(self, nbytes: int) -> None:
        """Push a string; one that cannot be a name is replaced by a mark."""
        if nbytes <= 4 * MAX_NAME:
            self.push(self.take(nbytes).decode())
        else:
            self.skip(nbytes)
            self.push(Foreign("a long string"))

    def pass_over(self, nbytes: int, what: str) -> None:
        """Skip the next bytes and push a mark in their place."""
        self.skip(nbytes)
        self.push(Foreign(what))

    def line(self) -> str:
        """Return the next line."""
        self._have(self.at + MAX_NAME)
        end = self.raw.index(b"\n", self.at, self.at + MAX_NAME)
        return self.take(end + 1 - self.at)[:-1].decode()

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self, count: int) -> tuple[Any, ...]:
        """Pop the `count` topmost values and return them, the top last."""
        return tuple([self.stack.pop() for _ in range(count)][::-1])

    def pop_one(self) -> None:
        """Drop the topmost value, or a mark."""
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def mark(self) -> None:
        """Begin a new stack above the current one."""
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> tuple[Any, ...]:
        """Pop the values above the mark and return them."""
        values, self.stack = tuple(self.stack), self.below.pop()
        return values

    def pop_set(self) -> None:
        """Replace the values above the mark, which form a frozen set, by an inert mark."""
        self.pop_mark()
        self.push(Foreign("a set"))

    def put(self, index: int) -> None:
        """Memoise the top; indexes count from 0 (Python 2: from 1) without gaps, so that steps bound the memory."""
        if index > len(self.memo) + 1:
            raise IndexError
        if index > len(self.memo):
            self.memo.append(None)
        self.memo[index : index + 1] = [self.stack[-1]]

    def new_dict(self) -> Names:
        """Return an empty dict."""
        return Names()

    def set_items(self, items: tuple[Any, ...]) -> None:
        """Put alternating keys and values into the dict on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, Foreign):
            return
        if not isinstance(target, Names) or len(items) % 2:
            raise ValueError
        fill(target, zip(items[::2], items[1::2], strict=True))

    def append(self, items: tuple[Any, ...]) -> None:
        """Append values to the list on top of the stack; ignore them if it is a `Foreign` object."""
        target = self.stack[-1]
        if isinstance(target, Foreign):
            return
        if type(target) is not list:
            raise ValueError
        target.extend(items)

    def build(self) -> None:
        """Drop attributes of the value below them: torch's `_metadata`, or attributes that a user put on a tensor."""
        self.stack.pop()
        if not isinstance(self.stack[-1], (Names, Tensor, Foreign)):
            raise ValueError

    def find(self, module: Any, name: Any) -> None:
        """Push the mark for a global name."""
        if type(module) is not str or type(name) is not str:
            raise ValueError
        full = quoted(f"{module}.{name}")
        builtin = module in ("builtins", "__builtin__") and name in HARMFUL_BUILTINS
        if builtin or module.split(".")[0] in HARMFUL:
            raise Refused(f"its data.pkl wants {full}, which no checkpoint needs: do not use this file")
        self.push(KNOWN.get((module, name)) or Foreign(f"an object that needs {full}"))

    def find_storage(self) -> None:
        """Push the storage of a persistent id."""
        match self.pop(1):
            case (("storage", Known("storage", dtype), str() as key, str(), int() as count),):
                self.push(self.storages.find(key, dtype, count, None))
            case (("storage", Known("storage", dtype), str() as key, str(), int() as count, view),):
                self.push(self.storages.find(key, dtype, count, view))
            case (("storage", Foreign() as dtype, *_),):
                self.push(dtype)
            case (("module", Foreign() as module, *_),):  # Before torch 1.6 a class came with its source.
                self.push(module)
            case _:
                raise ValueError

    def reduce(self) -> None:
        """Push the result of a function for its arguments."""
        function, args = self.pop(2)
        if type(args) is not tuple:
            raise ValueError
        if function == Known("typed tensor"):
            match args:
                case Known(kind) as function, _, tuple() as args, _ if kind != "typed tensor":
                    pass  # The class (torch's or any other) and the state (its attributes) change no number.
                case Foreign() as function, _, _, _:
                    pass
                case _:
                    raise ValueError
        self.push(call(function, args))

    def reduce_with_keywords(self) -> None:
        """Push the mark of an object made with keyword arguments, which no known class takes."""
        function, args, _ = self.pop(3)
        if not isinstance(function, Foreign) or type(args) is not tuple:
            raise ValueError
        self.push(function)


def fill(target: Names, items: Any) -> None:
    """Put pairs into a dict; refuse a duplicate key."""
    for key, value in items:
        if type(key) is not str:
            target.odd = target.odd or type(key).__name__
            continue
        if key in target:
            raise Refused(f"its data.pkl has the key {quoted(key)} twice")
        target[key] = value


def call(function: Any, args: tuple[Any, ...]) -> Any:
    """Do the work of torch's functions, each with its argument list, whose last entry is often left out."""
    if isinstance(function, Foreign):
        return function
    if isinstance(function, Known) and function.kind != "dict" and args and isinstance(args[0], Foreign):
        return args[0]  # A result made of an unknown value is unknown too.
    match function, args:
        case Known("dict"), () | (Foreign() | None,):  # The argument is the factory of a defaultdict.
            return Names()
        case Known("dict"), (list() | tuple() as pairs,):  # Python 2 writes an OrderedDict this way.
            made = Names()
            if any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
                raise ValueError
            fill(made, pairs)
            return made
        case Known("parameter"), (Tensor() as tensor, _, _) | (Tensor() as tensor, _, _, _):
            return tensor
        case Known("old tensor"), (Storage(_, str(code)) as storage, skip, shape, strides):
            return Tensor(storage, code, skip, shape, strides, [])
        case Known("tensor"), (Storage(_, str(code)) as storage, skip, shape, strides, _, _, *bits):
            return Tensor(storage, code, skip, shape, strides, bits)
        case Known("young tensor"), (
            (Storage(_, None) as storage, skip, shape, strides, _, _, Known("dtype", str(code)), *bits)
        ):
            return Tensor(storage, code, skip, shape, strides, bits)
    raise ValueError


# The steps by opcode, in this order: protocol and frame length, which are skipped; plain values; bytes, which no tensor
# contains; tuples; lists and sets; dicts; attributes; the memo; names; calls and persistent ids.
_STEPS: dict[bytes, Callable[[Machine], object]] = {
    b"\x80": lambda m: m.skip(1),
    b"\x95": lambda m: m.skip(8),
    b"0": Machine.pop_one,
    b"1": Machine.pop_mark,
    b"2": lambda m: m.push(m.stack[-1]),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"J": lambda m: m.push(m.number(4, True)),
    b"\x8a": lambda m: m.integer(m.number(1)),
    b"I": lambda m: m.push(int(m.line()[:20])),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"X": lambda m: m.text(m.number(4)),
    b"\x8c": lambda m: m.text(m.number(1)),
    b"\x8d": lambda m: m.text(m.number(8)),
    b"T": lambda m: m.text(m.number(4)),
    b"U": lambda m: m.text(m.number(1)),
    b"B": lambda m: m.pass_over(m.number(4), "bytes"),
    b"C": lambda m: m.pass_over(m.number(1), "bytes"),
    b"\x8e": lambda m: m.pass_over(m.number(8), "bytes"),
    b"\x96": lambda m: m.pass_over(m.number(8), "bytes"),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.push(m.pop(1)),
    b"\x86": lambda m: m.push(m.pop(2)),
    b"\x87": lambda m: m.push(m.pop(3)),
    b"(": Machine.mark,
    b"t": lambda m: m.push(m.pop_mark()),
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.append(m.pop(1)),
    b"e": lambda m: m.append(m.pop_mark()),
    b"\x8f": lambda m: m.push(Foreign("a set")),
    b"\x90": lambda m: m.append(m.pop_mark()),
    b"\x91": Machine.pop_set,
    b"}": lambda m: m.push(m.new_dict()),
    b"s": lambda m: m.set_items(m.pop(2)),
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"b": lambda m: m.build(),
    b"q": lambda m: m.put(m.number(1)),
    b"r": lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.number(1)]),
    b"j": lambda m: m.push(m.memo[m.number(4)]),
    b"c": lambda m: m.find(m.line(), m.line()),
    b"\x93": lambda m: m.find(*m.pop(2)),
    b"Q": Machine.find_storage,
    b"R": lambda m: m.reduce(),
    b"\x81": lambda m: m.reduce(),
    b"\x92": Machine.reduce_with_keywords,
}
