"""Constants of fp32 arithmetic that the torch formulas and the compiled kernels share."""

LARGEST = 3.4028234663852886e38
"""The largest finite fp32 number."""
UNKNOWN = 0x7FC00000
"""The pattern of a score that is not finite: it ranks above all others."""
SMOOTHING = 1e-8
"""Added to every probability of a softmax (mergekit's)."""
