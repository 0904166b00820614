"""Bit patterns and the fp32 and fp64 values they stand for, and the fused multiply-add, inside compiled loops."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def f32_from_bits(typing_context, bits):
    """Reinterpret a uint32 as float32."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def bits_from_f32(typing_context, value):
    """Reinterpret a float32 as uint32."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def f64_from_bits(typing_context, bits):
    """Reinterpret a uint64 as float64."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.uint64), build


@intrinsic
def bits_from_f64(typing_context, value):
    """Reinterpret a float64 as uint64."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(64))

    return types.uint64(types.float64), build


@intrinsic
def multiply_add(typing_context, a, b, c):
    """Return ``a * b + c``, rounded once."""

    def build(context, builder, signature, args):
        return builder.fma(*args)

    return types.float64(types.float64, types.float64, types.float64), build


@intrinsic
def has_multiply_add(typing_context):
    """Return whether `multiply_add` is one instruction where the loop runs; elsewhere it is a call of a function."""

    def build(context, builder, signature, args):
        triple, _, features = context.codegen().magic_tuple()
        found = triple.startswith(("aarch64", "arm64")) or "+fma" in features.split(",")
        return ir.Constant(ir.IntType(1), int(found))

    return types.boolean(), build


@intrinsic
def word_at(typing_context, address):
    """Return the eight bytes at an address, which need not be aligned, as uint64."""

    def build(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint64(types.intp), build
