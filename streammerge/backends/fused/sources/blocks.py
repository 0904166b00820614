"""What every kernel does to a block of elements: widen, round out, draw random words. Mirrors `kernels/blocks.py`."""

import inspect

import triton
import triton.language as tl

BF16 = tl.constexpr(0)
F16 = tl.constexpr(1)
F32 = tl.constexpr(2)
NOTHING = tl.constexpr(-1)


def kernel(function):
    """Make a function a kernel with arguments of 64 bits; no value of an argument gives a kernel of its own."""
    parameters = inspect.signature(function).parameters.values()
    plain = [one.name for one in parameters if one.annotation is not tl.constexpr]
    function.__annotations__.update(dict.fromkeys(plain, "i64"))
    return triton.jit(function, do_not_specialize=plain)


@triton.jit
def i16_at(address):
    """Return an address as a pointer to 16-bit words."""
    return address.to(tl.int64).to(tl.pointer_type(tl.int16))


@triton.jit
def i32_at(address):
    """Return an address as a pointer to 32-bit words."""
    return address.to(tl.int64).to(tl.pointer_type(tl.int32))


@triton.jit
def i64_at(address):
    """Return an address as a pointer to 64-bit words."""
    return address.to(tl.int64).to(tl.pointer_type(tl.int64))


@triton.jit
def u8_at(address):
    """Return an address as a pointer to bytes."""
    return address.to(tl.int64).to(tl.pointer_type(tl.uint8))


@triton.jit
def f32_at(address):
    """Return an address as a pointer to fp32."""
    return address.to(tl.int64).to(tl.pointer_type(tl.float32))


@triton.jit
def f64_at(address):
    """Return an address as a pointer to fp64."""
    return address.to(tl.int64).to(tl.pointer_type(tl.float64))


@triton.jit
def real(bits):
    """Return the fp64 number of 64 bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def f32_bits(x):
    """Return the bit patterns of fp32 values."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(bits):
    """Return the fp32 values of bit patterns (uint32)."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def places_of(part, start, n, BLOCK: tl.constexpr):
    """Return the first element of a part (a multiple of 4), its elements, their places in the block, and which exist."""
    first = (start.to(tl.int64) & ~3) + part * BLOCK
    element = first + tl.arange(0, BLOCK)
    at = element - start
    return first, element, at, (at >= 0) & (at < n)


@triton.jit
def places(start, n, BLOCK: tl.constexpr):
    """Return the same of this program, whose part has its number."""
    return places_of(tl.program_id(0).to(tl.int64), start, n, BLOCK)


@triton.jit
def widen(address, code, at, mask):
    """Return elements `at` (int64) of an operand, exactly, in fp32; an operand of code `NOTHING` holds zeros."""
    if code == F32:
        bits = tl.load(i32_at(address) + at, mask, other=0).to(tl.uint32, bitcast=True)
    elif code == NOTHING:
        bits = (at * 0).to(tl.uint32)
    else:
        h = tl.load(i16_at(address) + at, mask, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
        if code == BF16:
            bits = h << 16
        else:
            sign = (h & 0x8000) << 16
            size = h & 0x7FFF
            small = f32_bits(size.to(tl.int32, bitcast=True).to(tl.float32) * (2.0**-24))
            bits = tl.where(size < 0x7C00, (size << 13) + (112 << 23), (size << 13) + (224 << 23))
            bits = tl.where(size < 0x0400, small, bits) | sign
    return from_bits(bits)


@triton.jit
def sticky_bits(y):
    """Round fp64 to fp32 by round-to-odd, so that a second rounding to 16 bits is the only one."""
    f = y.to(tl.float32)
    wide = f.to(tl.float64)
    bits = f32_bits(f)
    away = (tl.abs(wide) > tl.abs(y)).to(tl.uint32)
    return tl.where(wide != y, (bits - away) | 1, bits)


@triton.jit
def round_out(y, address, code, at, mask):
    """Round fp64 values once, to nearest even, into an output; return how many are not finite.

    A NaN becomes the canonical quiet NaN. With the code `NOTHING` nothing is written, and 0 returned.
    """
    count = tl.sum((mask & False).to(tl.int32))
    if code == F32:
        bits = f32_bits(y.to(tl.float32))
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
        tl.store(i32_at(address) + at, bits.to(tl.int32, bitcast=True), mask)
        count = tl.sum((mask & ((bits & 0x7F800000) == 0x7F800000)).to(tl.int32))
    elif code != NOTHING:
        bits = sticky_bits(y)
        if code == BF16:
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
            bad = (rounded & 0x7F80) == 0x7F80
        else:
            sign = (bits >> 16) & 0x8000
            a = bits & 0x7FFFFFFF
            normal = (a - (112 << 23) + 0xFFF + ((a >> 13) & 1)) >> 13
            # 0.5 has an ulp of 2**-24, the spacing of fp16 subnormals, so the addition rounds to that spacing.
            small = f32_bits(from_bits(a) + 0.5) - 0x3F000000
            rounded = tl.where(a < 0x38800000, small, normal)
            rounded = tl.where(a >= 0x47800000, 0x7C00, rounded)
            rounded = tl.where(a > 0x7F800000, 0x7E00, rounded | sign)
            bad = (rounded & 0x7C00) == 0x7C00
        tl.store(i16_at(address) + at, rounded.to(tl.uint16).to(tl.int16, bitcast=True), mask)
        count = tl.sum((bad & mask).to(tl.int32))
    return count


@triton.jit
def add_count(counts, place, count):
    """Add an integer to a counter of 64 bits."""
    tl.atomic_add(i64_at(counts) + place, count.to(tl.int64), sem="relaxed")


@triton.jit
def philox(group, key):
    """Return the four words (uint32) of Philox4x32-10 for counters (int64) and the key of four words that `key` points to."""
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    k0 = tl.load(key).to(tl.uint32)
    k1 = tl.load(key + 1).to(tl.uint32)
    c2 = tl.zeros_like(c0) + tl.load(key + 2).to(tl.uint32)
    c3 = tl.zeros_like(c0) + tl.load(key + 3).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(first, key, BLOCK: tl.constexpr):
    """Return the random words (uint32) of BLOCK elements from `first` (int64, a multiple of 4) on."""
    w0, w1, w2, w3 = philox((first >> 2) + tl.arange(0, BLOCK // 4).to(tl.int64), key)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
