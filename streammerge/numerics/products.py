"""The product of two narrow matrices, such as LoRA factors, summed in the same order however it is cut."""

from streammerge.numerics.jit import njit

_COLUMNS = 1024
"""Elements of a row summed at a time; they and the columns of the right factor fit in the CPU's cache."""


@njit(nogil=True)
def add_products(left, right, first, last, out):
    """Write ``left @ right[:, first:last]``: each product is rounded, then added in order of rank.

    ===========  ===================================  ============================================
    left         float32 or float64 (n, rank)         the left factor
    right        of the same dtype (rank, columns)    the right factor
    first, last  int64                                columns of the right factor
    out          of the same dtype (n, last - first)  written
    ===========  ===================================  ============================================
    """
    n, rank = left.shape
    for begin in range(first, last, _COLUMNS):
        m = min(_COLUMNS, last - begin)
        for i in range(n):
            row = out[i, begin - first : begin - first + m]
            row[:] = 0
            k = 0
            while k + 4 <= rank:
                # Four products at a time, in order: the sum is loaded and stored a quarter as often.
                a, b, c, d = left[i, k], left[i, k + 1], left[i, k + 2], left[i, k + 3]
                ra, rb = right[k, begin : begin + m], right[k + 1, begin : begin + m]
                rc, rd = right[k + 2, begin : begin + m], right[k + 3, begin : begin + m]
                for j in range(m):
                    row[j] = (((row[j] + a * ra[j]) + b * rb[j]) + c * rc[j]) + d * rd[j]
                k += 4
            while k < rank:
                a = left[i, k]
                ra = right[k, begin : begin + m]
                for j in range(m):
                    row[j] = row[j] + a * ra[j]
                k += 1
