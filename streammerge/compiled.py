"""Whether the compiled kernels can be used here."""

from __future__ import annotations

from functools import cache


@cache
def missing_kernels() -> str | None:
    """Return why the kernels cannot be used, in one line; None if they can.

    numba may be missing, or refuse a numpy newer than it knows. Everything works without it, through torch.
    """
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return (str(error) or "numba cannot be imported").splitlines()[0]
    return None
