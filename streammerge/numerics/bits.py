"""Bit patterns and the fp32 values they stand for, inside compiled loops."""

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
def word_at(typing_context, address):
    """Return the eight bytes at an address, which need not be aligned, as uint64."""

    def build(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint64(types.intp), build
