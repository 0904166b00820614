"""The fused kernels in Triton: read by Triton's compiler and interpreter only, never on the way of a merge by shipped PTX.

Two rules keep the bits of the CPU: one lane computes all of an element, in the order of `streammerge.kernels`; and across
elements only integers are added, or fp64 in an order that a loop fixes. `tl.sum` of floats is never used, fp32 is never
divided (Triton's is not IEEE), and no bf16 or fp16 type is named: 16-bit floats are integers here.

Arguments are integers alone. A Python float would become fp32, whatever its value; fp64 numbers travel as their bits.
"""
