"""`quantize: none`: tensors are stored as floats, in `dtype`."""

from __future__ import annotations

from streammerge.planning.quantize.base import Material, Storage, stores


@stores("none")
def _choose(material: Material) -> Storage:
    return Storage(material.jobs)
