"""The sets of weights in a directory, distinguished by file names; only one set is read.

A repository may hold its weights several times: as safetensors and as PyTorch files, in full and in half precision
(``model.fp16.safetensors``), in the layout of Hugging Face and of Mistral (``consolidated*.safetensors``). Tensors of
different sets are never mixed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache

from streammerge.formats.lookalikes import GGUF
from streammerge.formats.registry import suffixes
from streammerge.formats.safetensors import SUFFIX
from streammerge.formats.torch_dcp import METADATA
from streammerge.formats.torch_file import PICKLES
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

_VARIANTS = "fp16|bf16|f16|fp32|f32|fp8|half|8bit|4bit|int8|int4|non_ema|ema|no_ema|flax|tf"
_BY_PATH_ONLY = (*PICKLES[1:], METADATA)
"""Endings of names with no fixed meaning: such a file is read as a model only if the reference names it."""
_KNOWN = ("model", "diffusion_pytorch_model", "open_clip_model", "open_clip_pytorch_model", "pytorch_model")
"""Stems of weight files that libraries look for."""
_PICKLE_STEMS = ("pytorch_model", "diffusion_pytorch_model", "open_clip_pytorch_model", "model")
_CONSOLIDATED = "consolidated"
_NO_WEIGHTS = ("adapter_model", "optimizer", "scheduler", "training_args", "rng_state")
"""Stems of files of the same kinds that hold adapters or a trainer's state."""
_OTHERS = {
    ".gguf": GGUF,
    ".h5": "HDF5 files of Keras (.h5)",
    ".msgpack": "files of Flax (.msgpack)",
    ".onnx": "ONNX files (.onnx)",
    ".npz": "arrays of numpy (.npz)",
    ".ot": "files of rust-bert (.ot)",
    ".tflite": "TFLite files (.tflite)",
    ".mlmodel": "Core ML files (.mlmodel)",
    ".keras": "files of Keras (.keras)",
}
"""Other things in people's directories, by name ending."""


@cache
def _patterns(suffixes: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the patterns for the names of weight files and of their indexes."""
    suffix = rf"(?P<suffix>{'|'.join(map(re.escape, suffixes))})"
    file = re.compile(
        rf"(?P<stem>.+?)(?P<variant>[.](?:{_VARIANTS}))?(?:-(?P<number>\d{{1,9}})-of-(?P<count>\d{{1,9}}))?"
        rf"(?P<behind>[.](?:{_VARIANTS}))?{suffix}",
        re.ASCII | re.DOTALL,
    )
    index = re.compile(rf"(?P<stem>.+?){suffix}\.index(?:\.(?P<variant>{_VARIANTS}))?\.json", re.ASCII)
    return file, index


@dataclass(frozen=True, slots=True)
class WeightSet:
    """Files that form a model together."""

    stem: str
    variant: str
    """The variant, such as ``fp16``; empty for the default weights."""
    suffix: str
    names: tuple[str, ...]
    """The files of the set; if it has an index, the existing files whose names look like its shards."""
    index: str | None = None
    missing: int = 0
    """Number of shards that are missing according to the numbers in the names."""

    @property
    def title(self) -> str:
        """The name of the set in messages."""
        return self.index or (
            self.names[0] if len(self.names) == 1 else f"{self.names[0]} … {self.names[-1]}"
        )

    @property
    def is_known(self) -> bool:
        """Whether libraries look for files of this name."""
        return self.stem in (*_KNOWN, _CONSOLIDATED)

    @property
    def order(self) -> tuple[int, ...]:
        """The sort key of the set; the set with the least key is read."""
        kind = 0 if self.index is not None else 1 if len(self.names) == 1 else 2
        return (
            bool(self.missing),
            bool(self.variant),
            self.suffix != SUFFIX,
            self.stem == _CONSOLIDATED,
            self.stem not in _KNOWN,
            kind,
        )


def find_sets(present: Iterable[str]) -> list[WeightSet]:
    """Return the sets of weights among the names in a directory; the first one is to be read.

    >>> [some.title for some in find_sets(["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"])]
    ['model.safetensors', 'pytorch_model.bin', 'model.fp16.safetensors']
    """
    file, index = _patterns(tuple(suffix for suffix in suffixes() if suffix not in _BY_PATH_ONLY))
    files: dict[tuple[str, str, str], dict[str, tuple[int, int] | None]] = {}
    indexes: dict[tuple[str, str, str], str] = {}
    for name in sorted(present):
        if name.startswith("."):
            continue
        if match := index.fullmatch(name):
            key = match["stem"], match["variant"] or "", match["suffix"]
            if _wanted(key):
                indexes[_of_variant(key)] = name
        elif match := file.fullmatch(name):
            variant = (match["variant"] or match["behind"] or "").removeprefix(".")
            key = match["stem"], variant, match["suffix"]
            if _wanted(key):
                number = None if match["number"] is None else (int(match["number"]), int(match["count"]))
                files.setdefault(key, {})[name] = number
    found = [_with_index(key, name, files) for key, name in indexes.items()]
    for key, names in files.items():
        counts = {number[1] for number in names.values() if number is not None}
        if key in indexes and len(counts) == 1:  # with several counts, only the index knows its shards
            names = {name: number for name, number in names.items() if number is None}
        found += _without_index(key, names)
    return sorted(_joined(found), key=lambda some: some.order)


def _wanted(key: tuple[str, str, str]) -> bool:
    stem, _, suffix = key
    return stem in _PICKLE_STEMS if suffix in PICKLES else stem not in _NO_WEIGHTS


def _of_variant(key: tuple[str, str, str]) -> tuple[str, str, str]:
    """Return the key of an index whose stem contains the variant: ``model.fp16.safetensors.index.json``."""
    stem, variant, suffix = key
    match = re.fullmatch(rf"(.+)\.({_VARIANTS})", stem)
    return (match[1], match[2], suffix) if match and not variant else key


def _with_index(
    key: tuple[str, str, str], name: str, files: dict[tuple[str, str, str], dict[str, tuple[int, int] | None]]
) -> WeightSet:
    shards = tuple(file for file, number in files.get(key, {}).items() if number is not None)
    return WeightSet(*key, shards, name)


def _without_index(key: tuple[str, str, str], names: dict[str, tuple[int, int] | None]) -> list[WeightSet]:
    """Return the sets of one stem without an index: a single file, and shards grouped by their stated count."""
    found = []
    by_count: dict[int, dict[int, str]] = {}
    for name, number in names.items():
        if number is None:
            found.append(WeightSet(*key, (name,)))
        else:
            by_count.setdefault(number[1], {})[number[0]] = name
    for count, shards in by_count.items():
        found.append(WeightSet(*key, tuple(sorted(shards.values())), None, max(0, count - len(shards))))
    return found


def _joined(found: list[WeightSet]) -> list[WeightSet]:
    """Join the sets of names that no library uses into one; if there are no other sets, they are shards of any name."""
    own = [
        some
        for some in found
        if some.stem not in (*_KNOWN, _CONSOLIDATED) and some.suffix == SUFFIX and some.index is None
    ]
    plain = [some for some in own if not any(_is_variant_of(some, other) for other in own)]
    if len(plain) < 2 or any(some.missing for some in plain):
        return found
    names = tuple(sorted(name for some in plain for name in some.names))
    return [*(some for some in found if some not in plain), WeightSet(plain[0].stem, "", SUFFIX, names)]


def _is_variant_of(some: WeightSet, other: WeightSet) -> bool:
    return bool(some.variant) and not other.variant and some.stem == other.stem


_OF_DEEPSPEED = late_pattern(
    r"zero_to_fp32\.py|global_step\d+|(?:bf16_)?zero_pp_rank_\d+_mp_rank_\d+_\w+\.pt", re.ASCII
)
"""Names in the folder of a training with DeepSpeed's ZeRO, whose weights are in shards of optimizer state."""

NOTHING = (
    "no model here: neither model.safetensors.index.json nor any *.safetensors file, nor pytorch_model.bin"
)


def no_model(present: Collection[str], otherwise: str = NOTHING) -> str:
    """Return the reason to refuse a directory without weights, from its content; else `otherwise`."""
    for suffix, what in _OTHERS.items():
        first = min((name for name in present if name.endswith(suffix)), default=None)
        if first is not None:
            cure = (
                ""
                if what is GGUF
                else ", which cannot be merged; use the safetensors or PyTorch files of the model"
            )
            return f"no model here but {first!r}, {what}{cure}"
    if any(map(_OF_DEEPSPEED.fullmatch, present)) and not any(
        name.startswith("mp_rank_") for name in present
    ):
        return (
            "no model here but DeepSpeed's shards of a training: put them together with its `zero_to_fp32.py`, which DeepSpeed saves "
            "beside them, and use what it writes"
        )
    torch = sorted(name for name in present if name.endswith(PICKLES) and not name.startswith("."))
    if torch:
        return f"no model here under a usual name; if {torch[0]!r} is one, write its path itself"
    return otherwise
