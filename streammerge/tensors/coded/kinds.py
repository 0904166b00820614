"""The kinds of quantised tensors that a device decodes; importing this module registers them."""

from __future__ import annotations

from streammerge.tensors.coded import floats, integers, tables
from streammerge.tensors.coded.base import Codes, Step, aligned, coded_kinds, coded_steps, is_coded

__all__ = [
    "Codes",
    "Step",
    "aligned",
    "coded_kinds",
    "coded_steps",
    "floats",
    "integers",
    "is_coded",
    "tables",
]
