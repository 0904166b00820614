"""The output's config.json: that of the template model, with the changes that the merge makes."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streammerge import dtypes
from streammerge.checkpoint.index import CONFIG_NAME, TensorIndex
from streammerge.checkpoint.names import LANGUAGE_PARTS, TIED, flag_of, is_head
from streammerge.checkpoint.quantized.declarations import DECLARATIONS, EXPERT_DTYPE
from streammerge.checkpoint.sidecar_names import is_sound_name
from streammerge.config.schema import MergeConfig
from streammerge.errors import printable
from streammerge.io import volumes
from streammerge.planning.files.ecosystem import reads_dtype
from streammerge.planning.files.layer_settings import NUMBERS, follow_layers, tail_of
from streammerge.planning.files.tokenizer import renumber
from streammerge.planning.job import Job
from streammerge.planning.quantize.base import Storage
from streammerge.planning.resolve.assemble import Indexes, Stack
from streammerge.planning.resolve.codes import holds_codes
from streammerge.planning.resolve.vocabulary import Alignment

Settings = dict[str, Any]

_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "decoder_layers",
    "encoder_layers",
    "depth",
)
"""Names of the setting for the number of layers."""
_LANGUAGE = ("", *LANGUAGE_PARTS)
"""The parts of a config that describe the language model."""


def all_settings(
    config: MergeConfig,
    template: TensorIndex,
    indexes: Indexes,
    storage: Storage,
    stacks: Sequence[Stack],
    alignment: Alignment | None = None,
) -> tuple[dict[str, Settings], list[str]]:
    """Return the settings of the output and of each of its components, by the path of the file, and warnings.

    A pipeline's own list of components stays as it is. A component's config.json follows its dtype and quantisation.
    """
    own: Settings = {}
    notes: list[str] = []
    if not template.is_pipeline:
        own, notes = merged_config(config, template, indexes, storage, stacks, alignment)
    found = {template.settings_file: own} if own else {}
    for component in (one for one in template.components if one.config):
        settings = copy.deepcopy(dict(component.config))
        mine = [job for job in storage.jobs if job.name.startswith(f"{component.folder}/")]
        _set_dtype(settings, config, mine)
        if not holds_codes(mine):
            notes += [f"{component.folder}/{note}" for note in _drop_quantisation(settings)]
        found[f"{component.folder}/{CONFIG_NAME}"] = settings
    return found, notes


def merged_config(
    config: MergeConfig,
    template: TensorIndex,
    indexes: Indexes,
    storage: Storage,
    stacks: Sequence[Stack],
    alignment: Alignment | None = None,
) -> tuple[Settings, list[str]]:
    """Return the settings of the output, and warnings; without a config.json of the template model, no settings.

    The merge may change the dtype, the number of layers and lists with an entry per layer, whether embedding and head
    are tied, the size of the vocabulary, token ids, and a quantisation that the output no longer has.
    """
    if not template.config:
        return {}, []
    jobs = storage.jobs
    settings = copy.deepcopy(dict(template.config))
    notes: list[str] = []
    _set_dtype(settings, config, jobs)
    for stack in stacks:
        notes += _set_layers(settings, stack, indexes)
    _untie(settings, template, indexes, jobs)
    if alignment is not None:
        notes += _set_vocabulary(settings, alignment)
    if storage.declared is not None:
        _drop_quantisation(settings)
        settings["quantization_config"] = dict(storage.declared)
    elif not storage.keeps and not holds_codes(jobs):
        notes += _drop_quantisation(settings)
    notes += _name_code(settings, template)
    return settings, notes


def spelled(settings: Mapping[str, Any], raw: bytes) -> bytes:
    """Return config.json as bytes: the template model's own if nothing has changed."""
    try:
        unchanged = json.loads(raw) == settings
    except (ValueError, RecursionError):
        unchanged = False
    return raw if unchanged else json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"


def _set_dtype(settings: Settings, config: MergeConfig, jobs: Sequence[Job]) -> None:
    wanted = config.out_dtype or config.dtype
    if wanted is None:
        _follow_dtype(settings, jobs)
        return
    if reads_dtype(settings) and "dtype" not in settings and "torch_dtype" not in settings:
        settings["dtype"] = dtypes.CONFIG_NAME[wanted]
    for _, part in _parts(settings):
        for name in ("torch_dtype", "dtype"):
            if part.get(name) is not None:
                part[name] = dtypes.CONFIG_NAME[wanted]


def _follow_dtype(settings: Settings, jobs: Sequence[Job]) -> None:
    """Without a configured dtype, name the dtype of most output bytes; a part keeps its dtype if the output has it."""
    nbytes = Counter[str]()
    for job in jobs:
        if job.encoder is None and job.dtype in dtypes.CONFIG_NAME:
            nbytes[dtypes.CONFIG_NAME[job.dtype]] += job.output_bytes
    if not nbytes:
        return
    most = max(nbytes, key=lambda name: (nbytes[name], name))
    for where, part in _parts(settings):
        for key in ("torch_dtype", "dtype"):
            if isinstance(part.get(key), str) and (where == "" or part[key] not in nbytes):
                part[key] = most


def _name_code(settings: Settings, template: TensorIndex) -> list[str]:
    """Warn that a loader may be told to run the template model's Python code, which the merge copies and never runs."""
    named = settings.get("auto_map")
    values = list(named.values()) if isinstance(named, dict) else []
    texts = {
        text
        for value in values
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str)
    }
    modules = sorted({text.split(".")[0] + ".py" for text in texts if "--" not in text})
    elsewhere = sorted({text.split("--")[0] for text in texts if "--" in text})
    notes = []
    if modules:
        lost = [
            name
            for name in modules
            if not is_sound_name(name) or not volumes.lexists(template.directory / name)
        ]
        fate = (
            f"{printable(', '.join(lost), 200)} is missing in {printable(template.reference)}"
            if lost
            else "copied with it"
        )
        notes.append(
            f"config.json: auto_map refers to Python code ({printable(', '.join(modules), 200)}): {fate}; streammerge never runs it, "
            "and a loader only with `trust_remote_code`"
        )
    if elsewhere:
        notes.append(
            f"config.json: auto_map refers to Python code of {printable(', '.join(elsewhere), 200)} on the hub, which a loader "
            "fetches only with `trust_remote_code`"
        )
    return notes


def _parts(settings: Settings, within: str = "") -> Iterator[tuple[str, Settings]]:
    """Yield the settings themselves and those of their modules at any depth: ``thinker_config.text_config``."""
    yield within, settings
    for name, value in settings.items():
        is_part = name.endswith(("_config", "_cfg")) or name in ("encoder", "decoder")
        if isinstance(value, dict) and is_part and name not in DECLARATIONS:
            yield from _parts(value, f"{within}.{name}".lstrip("."))


def _set_layers(settings: Settings, stack: Stack, indexes: Indexes) -> list[str]:
    """Set the number of layers of a stack, and rebuild its lists with an entry per layer."""
    found = [
        (name, part, key)
        for name, part in _parts(settings)
        for key in _COUNTS
        if part.get(key) == stack.before
    ]
    own = [entry for entry in found if _belongs(entry[0], entry[2], stack)] or found
    if len({id(part) for _, part, _ in own}) != 1:
        what = "more than one place" if own else "no place"
        return [
            f"config.json: {what} for the number of layers of {stack.prefix}, now {len(stack.layers)}: set it by hand"
        ]
    part_name, part, _ = own[0]
    for key, value in list(part.items()):
        if key in NUMBERS or not isinstance(value, list) or not all(_is_simple(item) for item in value):
            continue
        if len(value) in (stack.before, stack.before + stack.extra_before):
            entries = [
                _entry(indexes, reference, part_name, key, number, value)
                for reference, number in stack.layers
            ]
            part[key] = [*entries, *tail_of(value, stack)]
    told = follow_layers(part, stack, lambda reference: _part_of(indexes[reference].config, part_name))
    for _, _, key in own:
        part[key] = len(stack.layers)
    return told


def _part_of(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part: Any = settings
    for key in name.split(".") if name else ():
        part = part.get(key) if isinstance(part, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _belongs(part: str, key: str, stack: Stack) -> bool:
    """Return whether a count belongs to a stack, judging by their names."""
    prefix = stack.prefix.lower()
    for word, names in (("vis", ("vision", "visual", "vit")), ("audio", ("audio",))):
        if any(name in prefix for name in names):
            return word in part
    for word in ("encoder", "decoder"):
        if word in prefix.split("."):
            return key.startswith((word, f"num_{word}")) or key in ("num_layers", "num_hidden_layers")
    return part in _LANGUAGE


def _is_simple(item: object) -> bool:
    return item is None or isinstance(item, str | int | float | bool)


def _entry(indexes: Indexes, reference: str, part: str, key: str, number: int, own: Sequence[Any]) -> Any:
    """Return a layer's entry in a list of its own model; if that has no such list, in the template model's."""
    values = _part_of(indexes[reference].config, part).get(key)
    if isinstance(values, list) and number < len(values):
        return values[number]
    return own[min(number, len(own) - 1)]


def _set_vocabulary(settings: Settings, alignment: Alignment) -> list[str]:
    lost: list[str] = []
    for name, part in _parts(settings):
        if name not in _LANGUAGE:
            continue
        if type(part.get("vocab_size")) is int:
            part["vocab_size"] = alignment.n_rows
        if alignment.numbers is not None:
            lost += renumber(part, alignment.numbers)
    if not lost:
        return []
    return [f"config.json: {', '.join(lost)}: the output's tokenizer lacks this token: set it by hand"]


def _untie(settings: Settings, template: TensorIndex, indexes: Indexes, jobs: Sequence[Job]) -> None:
    """Untie head and embedding in the settings if a model with a separate head takes part in the head's merge."""
    heads = [job.name for job in jobs if is_head(job.name)]
    own = any(
        head in index and flag_of(index.config) is not True for head in heads for index in indexes.values()
    )
    if not own or (flag_of(template.config) is not True and all(head in template for head in heads)):
        return
    for _, part in _parts(settings):
        if TIED in part:
            part[TIED] = False
    settings[TIED] = False


def _drop_quantisation(settings: Settings) -> list[str]:
    """Remove the entry of a quantisation that the output does not have."""
    notes = []
    for name, part in list(_parts(settings)):
        for key in (*DECLARATIONS, EXPERT_DTYPE):
            if part.pop(key, None) is not None:
                notes.append(
                    f"config.json: {name + '.' if name else ''}{key} is left out: the output is not quantised"
                )
    return notes
