"""Compile loops with numba, cached in the kernels' directory.

numba is imported when the first loop is declared: the arguments of kernels are declared without one.
"""

import importlib
from functools import cache
from importlib.util import find_spec

from streammerge.numerics.compiled import kernel_cache


@cache
def load_without_scipy() -> None:
    """Load numba's functions of arrays without scipy, which no kernel calls.

    numba imports scipy's linear algebra to see whether it is there, and that takes as long as importing numba itself. Here
    the question is answered without importing it, once; whoever else uses numba in this process finds everything as usual.
    """
    try:
        linalg = importlib.import_module("numba.np.linalg")
        imports = linalg.ensure_blas
        if find_spec("scipy") is None:
            return
        linalg.ensure_blas = lambda: None
        try:
            arrays = importlib.import_module("numba.np.arraymath")
        finally:
            linalg.ensure_blas = imports
        if hasattr(arrays, "ensure_blas"):
            arrays.ensure_blas = imports
    except (ImportError, AttributeError):
        return  # a different numba: it looks for scipy itself


def njit(**options):
    """Compile on the first call, as numba does, and cache the result in the kernels' directory if there is one.

    numba's own choice would be the package's folder where the user's cache directory is not writable.
    """
    load_without_scipy()
    import numba

    from streammerge.numerics.wide import WideCompiler

    def decorate(function):
        directory = kernel_cache().directory
        loop = numba.njit(pipeline_class=WideCompiler, **options)(function)
        if directory is None or options.get("inline") == "always":
            return loop
        before = numba.config.CACHE_DIR, getattr(numba.config, "CACHE_LOCATOR_CLASSES", "")
        numba.config.CACHE_DIR, numba.config.CACHE_LOCATOR_CLASSES = (
            str(directory),
            "UserProvidedCacheLocator",
        )
        try:
            loop.enable_caching()
        except RuntimeError:
            pass  # the directory has vanished: compile for this process only
        finally:
            numba.config.CACHE_DIR, numba.config.CACHE_LOCATOR_CLASSES = before
        return loop

    return decorate
