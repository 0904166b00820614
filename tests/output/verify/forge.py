"""Outputs that lie: changed, and sealed anew so that every checksum is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streammerge.formats.safetensors import read_header
from streammerge.numerics.crc32 import crc32
from streammerge.output.manifest import load_manifest, seal
from streammerge.output.place import MANIFEST


def reseal(out: Path, *files: str, **fields: Any) -> None:
    """Make the manifest say of some files, and the tensors in them, what they are now; and whatever else is wanted."""
    manifest = load_manifest(out)
    del manifest["manifest_crc32"]
    for name in files:
        raw = (out / name).read_bytes()
        manifest["files"][name] = {"nbytes": len(raw), "crc32": f"{crc32(raw):08x}"}
    (out / MANIFEST).write_bytes(seal(manifest | fields))


def change_element(out: Path, tensor: str, element: int, bit: int = 0) -> None:
    """Flip a bit of an element of a tensor so that `verify` alone cannot know."""
    manifest = load_manifest(out)
    for path in out.glob("model*.safetensors"):
        ref = read_header(path)[0].get(tensor)
        if ref is not None:
            raw = bytearray(path.read_bytes())
            width = ref.nbytes // max(1, ref.n_elements)
            raw[ref.offset + element * width] ^= 1 << bit
            path.write_bytes(raw)
            crc = crc32(raw[ref.offset : ref.offset + ref.nbytes])
            manifest["tensors"][tensor]["crc32"] = f"{crc:08x}"
            reseal(out, path.name, tensors=manifest["tensors"])
            return
    raise AssertionError(tensor)
