"""The small files beside the weights: which the output gets from the donor, and that they stay the same meanwhile."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from streammerge.engine.reader import changed, check_unchanged
from streammerge.errors import WorldError, printable
from streammerge.index.header import FileStamp
from streammerge.index.model import CONFIG_NAME

TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
COPIED = (
    "generation_config.json", *TOKENIZER, "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
"""Files copied from the donor as they are."""

_LARGEST = 1 << 28


def find_sidecars(directory: Path, tokenizer: Path | None) -> dict[str, FileStamp]:
    """Return, by name, the sidecars of a model directory, as they are now, with the tokenizer of a second, or without.

    Raises
    ------
    WorldError
        If that cannot be found out.
    """
    found = {}
    for name in (CONFIG_NAME, *COPIED):
        home = tokenizer if name in TOKENIZER else directory
        if home is None:
            continue
        path = home / name
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                continue
            raise _unreadable(path, error) from error
        if stat.S_ISREG(status.st_mode) and status.st_size <= _LARGEST:
            found[name] = FileStamp(
                str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, ""
            )
    return found


def read_sidecars(stamps: Mapping[str, FileStamp], contents: Mapping[str, str]) -> dict[str, bytes]:
    """Return the content of sidecars by name.

    Parameters
    ----------
    contents
        SHA-256 of each when the merge began.

    Raises
    ------
    WorldError
        If one cannot be read or is not what it was then.
    """
    found = {}
    for name, stamp in stamps.items():
        try:
            found[name] = Path(stamp.path).read_bytes()
        except OSError as error:
            check_unchanged(stamp)
            raise _unreadable(stamp.path, error) from error
        if hashlib.sha256(found[name]).hexdigest() != contents[name]:
            raise changed(stamp.path)
    return found


def _unreadable(path: object, error: OSError) -> WorldError:
    return WorldError(
        f"{printable(path)}: cannot be read: {error.strerror or error}; make it readable, or remove it, and run the "
        "same command again"
    )
