"""Recognise files that are mistaken for checkpoints, by their first bytes, and state the cure."""

from __future__ import annotations

GGUF = (
    "a GGUF file, which is quantised or made for llama.cpp and cannot be merged; use the original safetensors"
)

_BY_START = (
    (b"version ", "a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (b"GGUF", GGUF),
    (b"\x89HDF", "an HDF5 file (.h5), as Keras writes it: convert it to safetensors"),
    (b"\x93NUMPY", "an array of numpy (.npy): convert it to safetensors"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
)


def lookalike(first: bytes) -> str | None:
    """Return the kind of a file that is not a checkpoint, from its first bytes (ideally 512); None if unknown."""
    for start, what in _BY_START:
        if first.startswith(start):
            return what
    if first.lstrip()[:1] == b"<":
        return "a web page, not a model: download it again"
    if first[257:262] == b"ustar":
        return "a tar archive, as torch wrote before 0.2: load it and save it again with a current torch"
    return None
