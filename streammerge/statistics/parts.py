"""The parts of reducers as JSON holds them, so that processes which share a pass tell each other what they counted.

A part is made of numbers, texts, arrays, tuples, lists and mappings. JSON has no tuples, no keys other than texts, and no
arrays, and its readers round floats: each is written as an object with one key that names its kind.
"""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np

from streammerge.statistics.base import from_hex, hex_of

_DTYPES = ("int32", "int64", "uint32", "uint64", "float64")
_MOST_NBYTES = 1 << 31
"""Most bytes of one array."""


def encoded(part: Any) -> object:
    """Return a part as JSON holds it exactly.

    Raises
    ------
    TypeError
        If it is made of anything else.
    """
    if part is None or isinstance(part, bool | str):
        return part
    if isinstance(part, int | np.integer):
        return int(part)
    if isinstance(part, float | np.floating):
        return {"float": hex_of(float(part))}
    if isinstance(part, np.ndarray):
        if part.dtype.name not in _DTYPES:
            raise TypeError(f"an array of {part.dtype} in a part")
        data = base64.b64encode(zlib.compress(np.ascontiguousarray(part).tobytes(), 1)).decode()
        return {"array": [part.dtype.name, list(part.shape), data]}
    if isinstance(part, tuple):
        return {"tuple": [encoded(one) for one in part]}
    if isinstance(part, list):
        return {"list": [encoded(one) for one in part]}
    if isinstance(part, dict):
        return {"map": [[encoded(key), encoded(value)] for key, value in part.items()]}
    raise TypeError(f"a {type(part).__name__} in a part")


def decoded(plain: Any) -> Any:
    """Return the part that `encoded` converted; nobody else has it, so that a reducer may absorb it.

    Raises
    ------
    ValueError
        If `encoded` cannot have produced it.
    """
    if plain is None or isinstance(plain, bool | str | int):
        return plain
    match plain:
        case {"float": str(text)}:
            return from_hex(text)
        case {"array": [str(dtype), list(shape), str(data)]}:
            return _array(dtype, shape, data)
        case {"tuple": list(items)}:
            return tuple(decoded(item) for item in items)
        case {"list": list(items)}:
            return [decoded(item) for item in items]
        case {"map": list(items)}:
            return {decoded(key): decoded(value) for key, value in map(tuple, items)}
    raise ValueError("not a part of a statistic")


def _array(dtype: str, shape: list[Any], data: str) -> Any:
    if dtype not in _DTYPES or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("not an array of a part")
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes > _MOST_NBYTES:
        raise ValueError("an array that is too large for a part")
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(base64.b64decode(data, validate=True), nbytes + 1)
    except zlib.error:
        raise ValueError("not an array of a part") from None
    if len(raw) != nbytes:
        raise ValueError("not an array of a part")
    return np.frombuffer(raw, dtype).reshape(shape).copy()
