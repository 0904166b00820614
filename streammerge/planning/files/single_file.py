"""The files that an output in a single file does without, and the metadata in its header.

Programs that load single files (ComfyUI, Stable Diffusion web UIs, kohya's scripts) read settings from the header's
metadata: ``modelspec.*`` (the ModelSpec standard of Stability AI), the rank of a LoRA, ``config`` of video models.
Metadata that tell how to load the model hold for the merge as well, and are kept. Metadata on one training, or on the
content of one file, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from streammerge.checkpoint.index import TensorIndex
from streammerge.errors import ConfigError, ModelError, printable
from streammerge.lazy import late_pattern

_KEPT = late_pattern(
    r"modelspec\.(?!hash_|thumbnail|date)[\w.]+|config|prediction_type|ss_v2|ss_base_model_version|ss_network_(?:module|dim|alpha)",
    re.ASCII,
)
_LONGEST = 1 << 16
"""Most characters of a text that is kept."""


def kept_metadata(template: TensorIndex) -> dict[str, str]:
    """Return the template model's metadata that a single file keeps, sorted by key."""
    found = template.metadata
    return {key: found[key] for key in sorted(found) if _KEPT.fullmatch(key) and len(found[key]) <= _LONGEST}


def check_fits_one_file(template: TensorIndex, changed: Mapping[str, bytes], where: str) -> None:
    """Refuse an output that does not fit in one file.

    Parameters
    ----------
    changed
        Files of the tokenizer that the merge changes.
    where
        The name of the config in messages.

    Raises
    ------
    InputError
        If it does not fit; the message has the cure.
    """
    if template.folders:
        folder = printable(template.folders[0], 80)
        raise ModelError(
            f"{printable(template.reference)}: its weights lie in several folders ({folder}/ …): name a directory as OUT, not a "
            "single file"
        )
    if changed:
        raise ConfigError(
            f"{where}: the merge changes the tokenizer ({printable(min(changed), 80)}), which a single file cannot hold: name a "
            "directory as OUT, or remove `tokenizer`, `tokenizer_source` and `chat_template`"
        )


def not_written(template: TensorIndex, files: Sequence[str]) -> tuple[str, ...]:
    """Return one line on the files that a directory would hold, if there are any."""
    if not files:
        return ()
    some = ", ".join(printable(name, 60) for name in files[:4]) + (" …" if len(files) > 4 else "")
    return (
        f"OUT is a single file: what goes with the weights of {printable(template.reference)} is not written ({some})",
    )
