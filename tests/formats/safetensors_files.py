"""A small writer of safetensors files, sound or hostile, that shares nothing with the package."""

import contextlib
import json
import math
import signal
import struct

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def entry(dtype="F32", shape=(1,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def framed(header, data=b"\0\0\0\0", length=None):
    """Return a file: `header` may be a value, text or bytes; `length` is what it says of itself."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def nbytes_of(dtype, shape):
    return math.prod(shape) * BITS[dtype] // 8


def sound(tensors, metadata=None, pad=True):
    """Return a sound file of ``{name: (dtype, shape)}``, its data the bytes 0, 1, 2, ..."""
    header = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        header[name] = entry(dtype, shape, end, end + nbytes_of(dtype, shape))
        end = header[name]["data_offsets"][1]
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8 if pad else 0)
    return framed(text, bytes(i % 251 for i in range(end)))


def write_model(directory, shards, weight_map=None, **index):
    """Write ``{file: {name: (dtype, shape)}}``, with an index file if there is a `weight_map`."""
    directory.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        (directory / file).write_bytes(sound(tensors))
    if weight_map is not None:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map, **index})
        (directory / "model.safetensors.index.json").write_text(text)
    return directory


@contextlib.contextmanager
def within(seconds):
    """Fail if the body takes more CPU time, or hangs: ten times that on a clock, for the machine may be busy."""

    def ring(*_):
        raise TimeoutError(f"took longer than {seconds} s")

    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, ring) for number in timers}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
