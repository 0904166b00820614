"""Compile loops with numba, cached in the kernels' directory."""

import numba

from streammerge.numerics.compiled import kernel_cache


def njit(**options):
    """Compile on the first call, as numba does, and cache the result in the kernels' directory if there is one.

    numba's own choice would be the package's folder where the user's cache directory is not writable.
    """

    def decorate(function):
        directory = kernel_cache().directory
        loop = numba.njit(**options)(function)
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
