"""Importing this module registers every method that ships with the package."""

from streammerge.methods import (
    breadcrumbs,
    dare,
    della,
    fisher,
    karcher,
    linear,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    ram,
    slerp,
    task_arithmetic,
    ties,
)

__all__ = [
    "breadcrumbs",
    "dare",
    "della",
    "fisher",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "slerp",
    "task_arithmetic",
    "ties",
]
