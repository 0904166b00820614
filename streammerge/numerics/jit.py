"""Compiles loops with numba and keeps them where kernels are kept."""

import numba

from streammerge.numerics.compiled import kernel_cache


def njit(**options):
    """Compile as numba does when first called, and keep the result where kernels are kept, or nowhere.

    Left to itself numba would take the package's own folder where the user's cannot be written.
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
            pass  # taken away since: compiled for this process alone
        finally:
            numba.config.CACHE_DIR, numba.config.CACHE_LOCATOR_CLASSES = before
        return loop

    return decorate
