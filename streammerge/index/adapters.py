"""LoRA adapters in the format of PEFT: which weights of a base model they change, and how.

Read are ``adapter_config.json`` and the header of ``adapter_model.safetensors`` (or ``adapter_model.bin``). A tensor of
the adapter is a factor of a weight's change, a magnitude of DoRA, or a whole tensor that takes the base's place
(``modules_to_save``, biases).
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streammerge.dtypes import FLOATS
from streammerge.errors import ModelError
from streammerge.index.derived import AdaptedRef, SourceRef, row_elements
from streammerge.index.files import bad, quoted, read_exactly, reading
from streammerge.index.header import FileStamp, TensorRef, read_header
from streammerge.index.naming import LANGUAGE_PARTS, TIED
from streammerge.index.pickles import read_pickle
from streammerge.index.strict_json import MAX_NBYTES, parse_object

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<leaf>weight|bias))?",
    re.DOTALL,
)
_REFUSED = {
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "an activated LoRA, which depends on the text",
    "trainable_token_indices": "single trained tokens",
    "layer_replication": "replicated layers",
    "target_parameters": "parameters that are no module's weight",
    "megatron_config": "a Megatron layout",
    "arrow_config": "Arrow, which routes by the text",
}
"""Entries of a configuration that change what the tensors mean, with what they stand for."""
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of ways to initialise after which the base is another one."""
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Modules that are stored as (in, out) by GPT-2 and its kin, and as any other by others."""
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
_HEAD = "lm_head.weight"
_MOST_RANK = 1 << 16
_LARGEST_ALPHA = 1e30
_LONGEST_MATCHED = 400
"""Characters of a module's name that expressions are tried on."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes, by the name of the module or the tensor, as PEFT calls it."""

    directory: Path
    modules: Mapping[str, Mapping[str, TensorRef]]
    """Of each module, by part: ``lora_A``, ``lora_B``, ``lora_B.bias``, ``lora_magnitude_vector`` …"""
    replaced: Mapping[str, TensorRef]
    """Whole tensors that take the place of the base's."""
    settings: Mapping[str, Any]
    stamps: tuple[FileStamp, ...]


def read_adapter(directory: Path) -> Adapter:
    """Read the configuration of an adapter and the header of its weights.

    Raises
    ------
    ModelError
        If a file is missing or malformed, or the adapter is none that is a sum of low rank.
    WorldError
        If the machine cannot read it.
    """
    settings, config_stamp = _read_settings(directory / ADAPTER_CONFIG)
    names = [name for name in _WEIGHTS if os.path.lexists(directory / name)]
    if not names:
        raise bad(str(directory), f"an adapter without {_WEIGHTS[0]}: download or copy it again")
    path = directory / names[0]
    if names[0].endswith(".bin"):
        refs, stamp = read_pickle(path)
    else:
        refs, _, stamp = read_header(path)
    modules: dict[str, dict[str, TensorRef]] = {}
    replaced: dict[str, TensorRef] = {}
    for name, ref in refs.items():
        if ref.dtype not in FLOATS:
            raise bad(ref.path, f"tensor {quoted(name)} is {ref.dtype}: an adapter is made of floats")
        if ".original_module." in name:  # what a trained copy took the place of
            continue
        plain = name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        match = _PARTS.fullmatch(plain)
        if match is None and (".lora_" in plain or "token_adapter" in plain):
            raise bad(ref.path, f"tensor {quoted(name)}: a kind of adapter that is not supported")
        if match is None:
            place, key = replaced, plain
        else:
            place = modules.setdefault(match["module"], {})
            key = match["part"] if match["leaf"] != "bias" else f"{match['part']}.bias"
        if key in place:
            raise bad(ref.path, f"tensor {quoted(name)} is there under another name too")
        place[key] = ref
    return Adapter(directory, modules, replaced, settings, (stamp, config_stamp))


def _read_settings(path: Path) -> tuple[dict[str, Any], FileStamp]:
    with reading(str(path)) as (fd, status):
        if status.st_size > MAX_NBYTES:
            raise bad(str(path), f"has {status.st_size} bytes, more than {MAX_NBYTES}")
        raw = read_exactly(fd, status.st_size, 0, str(path))
    settings = parse_object(raw, str(path), "the file", "any")
    stamp = FileStamp(
        str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino,
        hashlib.blake2b(raw, digest_size=16).hexdigest(),
    )  # fmt: skip
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise bad(
            str(path),
            f"peft_type is {quoted(str(kind), 40)}: only LORA is supported; merge it with PEFT first",
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise bad(str(path), f"init_lora_weights: {quoted(start, 40)}: PEFT changes the base's weights before it adds the "
                             "adapter, which is not supported; convert the adapter, or merge it with PEFT first")  # fmt: skip
    for key, what in _REFUSED.items():
        if settings.get(key):
            raise bad(str(path), f"{key}: {what} is not supported; merge the adapter with PEFT first")
    return settings, stamp


def adapt(adapter: Adapter, base: Mapping[str, SourceRef], reference: str) -> dict[str, SourceRef]:
    """Return the base model's tensors with the adapter applied, in the base's order.

    Raises
    ------
    ModelError
        If a tensor of the adapter fits none of the base.
    """
    tensors = dict(base)
    names = _Names(base)
    for plain, ref in adapter.replaced.items():
        name = names.find(plain)
        if name is not None and row_elements(base[name].shape) != row_elements(ref.shape):
            raise bad(
                ref.path,
                f"tensor {quoted(ref.name)} is {list(ref.shape)}, the base's {list(base[name].shape)}",
            )
        tensors[name or plain] = replace(ref, name=name or plain)
    for module, parts in adapter.modules.items():
        some = next(iter(parts.values()))
        name = names.find(f"{module}.weight")
        if name is None:
            raise bad(
                some.path,
                f"adapts module {quoted(module)}, which {reference} has not: another base model's adapter",
            )
        weight = tensors[name]
        if not isinstance(weight, TensorRef) or weight.dtype not in FLOATS:
            raise bad(
                weight.path,
                f"tensor {quoted(name)} is {weight.dtype}: an adapter goes on float weights; dequantise",
            )
        adapted = tensors[name] = _adapted(adapter, module, parts, weight, base)
        bias = parts.get("lora_B.bias")
        if bias is not None:
            of_bias = name.removesuffix("weight") + "bias"
            tensors[of_bias] = _adapted_bias(module, tensors.get(of_bias), bias, adapted.scale)
    return tensors


def settle_vocabulary(
    adapter: Adapter,
    base: Mapping[str, SourceRef],
    tensors: Mapping[str, SourceRef],
    config: Mapping[str, Any],
) -> tuple[dict[str, SourceRef], dict[str, Any]]:
    """Return a model's tensors and settings after an adapter that brings an embedding or a head of its own.

    A head that it brings is no copy of the embedding any more; where it brings only the embedding, the head stays that of the
    base, as with PEFT (unless the adapter was trained with ``ensure_weight_tying``). The size of the vocabulary follows.
    """
    found, settings = dict(tensors), copy.deepcopy(dict(config))
    parts = [
        settings,
        *(part for key, part in settings.items() if key in LANGUAGE_PARTS and isinstance(part, dict)),
    ]
    tied = any(part.get(TIED) is True for part in parts)
    embeddings = [name for name in base if name.endswith(_EMBEDDINGS) and tensors[name] is not base[name]]
    brought = [name for name in embeddings if not isinstance(tensors[name], AdaptedRef)]
    heads = [name for name in tensors if name.endswith(_HEAD)]
    own_head = any(name not in base or tensors[name] is not base[name] for name in heads)
    if tied and brought and not heads and not _flag(adapter, "ensure_weight_tying"):
        embedding = base[brought[0]]
        assert isinstance(embedding, TensorRef)
        found[_HEAD] = replace(embedding, name=_HEAD)
        own_head = True
    if tied and own_head:
        for part in parts:
            if part is settings or TIED in part:
                part[TIED] = False
    for name in brought:
        before, after = base[name].shape[0], tensors[name].shape[0]
        for part in parts:
            if before != after and part.get("vocab_size") == before:
                part["vocab_size"] = after
    return found, settings


class _Names:
    """Finds what a base model calls a tensor that an adapter names: the same, or with other modules around it."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)
        self._inside: dict[str, list[str]] | None = None
        self._by_parts: dict[tuple[str, ...], list[str]] = {}

    def find(self, plain: str) -> str | None:
        """Return the base's name; None if there is none, or more than one.

        One of the names has to be the end of the other, or both have the same parts, as a language model beside a vision
        tower may: ends that are alike mean nothing, as ``dense.weight`` of two heads.
        """
        if plain in self._names:
            return plain
        if self._inside is None:
            self._inside = {}
            for name in self._names:
                self._by_parts.setdefault(tuple(sorted(name.split("."))), []).append(name)
                for tail in _tails(name):
                    self._inside.setdefault(tail, []).append(name)
        for found in (
            self._inside.get(plain, []),
            [tail for tail in _tails(plain) if tail in self._names],
            self._by_parts.get(tuple(sorted(plain.split("."))), []),
        ):
            if found:
                return found[0] if len(found) == 1 else None
        return None


def _tails(name: str) -> Iterator[str]:
    """Yield a name without up to three modules around it; the number of a layer is never one of them."""
    for _ in range(4):
        yield name
        outer, _, name = name.partition(".")
        if outer.isdigit() or "." not in name:
            return


def _is_transposed(
    adapter: Adapter,
    module: str,
    a: TensorRef,
    b: TensorRef,
    weight: TensorRef,
    base: Mapping[str, SourceRef],
) -> bool:
    """Return whether a weight is stored as (in, out).

    The shapes tell, but of a square one. `fan_in_fan_out` alone does not: PEFT decides for each module, and saves what it
    said of the last.
    """
    flag = _flag(adapter, "fan_in_fan_out")
    if len(weight.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
        return False
    as_stored = (b.shape[0], a.shape[1]) == weight.shape
    turned = (a.shape[1], b.shape[0]) == weight.shape
    if as_stored != turned or not as_stored:
        return turned
    if module.rpartition(".")[2] not in _CONV1D:
        return flag and not any(name.rpartition(".")[2] in _CONV1D for name in adapter.modules)
    for name, ref in base.items():
        stem, _, leaf = name.rpartition(".")
        bias = base.get(f"{stem}.bias")
        known = leaf == "weight" and stem.rpartition(".")[2] in _CONV1D and len(ref.shape) == 2
        if known and bias is not None and ref.shape[0] != ref.shape[1]:
            return bias.shape == ref.shape[1:]  # which has an element for each output
    return flag


def _adapted(
    adapter: Adapter,
    module: str,
    parts: Mapping[str, TensorRef],
    weight: TensorRef,
    base: Mapping[str, SourceRef],
) -> AdaptedRef:
    """Return a weight with its two factors, whichever way it is stored."""
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for part in (first, second):
        if part not in parts:
            path = next(iter(parts.values())).path
            raise bad(path, f"module {quoted(module)} has no {part}: the file is not complete")
    a, b = parts[first], parts[second]
    magnitude = parts.get("lora_magnitude_vector")
    transposed = embedding or _is_transposed(adapter, module, a, b, weight, base)
    rank = a.shape[0] if a.shape else 0
    rows, columns = (weight.shape[0] if weight.shape else 0), row_elements(weight.shape)
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    fits = (
        len(weight.shape) >= 2 and weight.n_elements and 1 <= rank <= _MOST_RANK
        and row_elements(a.shape) == inputs and (transposed or a.shape[1:] == weight.shape[1:])
        and b.shape[:2] == (outputs, rank) and math.prod(b.shape[2:]) == 1
    )  # fmt: skip
    if not fits:
        raise bad(a.path, f"module {quoted(module)}: factors {list(b.shape)} and {list(a.shape)} do not fit the weight "
                          f"{list(weight.shape)}")  # fmt: skip
    if magnitude is not None:
        if embedding:
            raise bad(
                a.path,
                f"module {quoted(module)}: DoRA on an embedding is not supported; merge it with PEFT first",
            )
        if math.prod(magnitude.shape) != outputs:
            raise bad(
                a.path, f"module {quoted(module)}: a magnitude {list(magnitude.shape)} for {outputs} outputs"
            )
    elif _flag(adapter, "use_dora") and not embedding:
        raise bad(a.path, f"module {quoted(module)}: use_dora, and no lora_magnitude_vector")
    left, right = (a, b) if transposed else (b, a)
    return AdaptedRef(weight, left, right, rank, _scale(adapter, module, rank), transposed, magnitude)


def _adapted_bias(module: str, bias: SourceRef | None, change: TensorRef, scale: float) -> AdaptedRef:
    """Return the bias of a module that was trained with ``lora_bias``: with a change that is scaled like the weight's."""
    if not isinstance(bias, TensorRef) or bias.dtype not in FLOATS or bias.shape != change.shape:
        raise bad(change.path, f"module {quoted(module)}: a change of a bias that the base has not")
    return AdaptedRef(bias, change, None, 1, scale)


def _scale(adapter: Adapter, module: str, rank: int) -> float:
    """Return what the product of the factors is multiplied by: alpha over the rank, or over its root (rsLoRA)."""
    path = str(adapter.directory / ADAPTER_CONFIG)
    alpha = _of_module(adapter, "alpha_pattern", module, adapter.settings.get("lora_alpha", 8))
    stated = _of_module(adapter, "rank_pattern", module, adapter.settings.get("r", 8))
    if isinstance(stated, int) and stated != rank and adapter.settings.get("r") is not None:
        raise bad(path, f"module {quoted(module)}: rank {stated}, but its factors have {rank}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _LARGEST_ALPHA:
        raise bad(path, f"lora_alpha of module {quoted(module)} is no number, or none of use")
    return alpha / math.sqrt(rank) if _flag(adapter, "use_rslora") else alpha / rank


def _of_module(adapter: Adapter, key: str, module: str, otherwise: Any) -> Any:
    """Return what a pattern says of a module, as PEFT matches them: the end of its name, or an expression for it."""
    patterns = adapter.settings.get(key) or {}
    path = str(adapter.directory / ADAPTER_CONFIG)
    if not isinstance(patterns, dict):
        raise bad(path, f"{key} is not a map")
    for pattern, value in patterns.items():
        if module == pattern or module.endswith(f".{pattern}"):
            return value
        plain = pattern.replace(".*", "", 2).replace("(?:", "(")
        if _SIMPLE.fullmatch(plain) is None or plain.count("(") > 3 or plain.count("|") > 20:
            raise bad(
                path,
                f"{key}: {quoted(pattern, 80)} is too free an expression; merge the adapter with PEFT first",
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                expression = re.compile(rf"(.*\.)?({pattern})", re.DOTALL)
        except (re.error, Warning):
            raise bad(path, f"{key}: {quoted(pattern, 80)} is no regular expression") from None
        if len(module) <= _LONGEST_MATCHED and expression.fullmatch(module):
            return value
    return otherwise


_SIMPLE = re.compile(r"\^?[\w.\\|()\[\]-]{0,600}\$?", re.ASCII)
"""Expressions with no repetition but two of ``.*``, and few choices, so that no text takes long to match."""


def _flag(adapter: Adapter, key: str) -> bool:
    value = adapter.settings.get(key, False)
    if not isinstance(value, bool | None):
        raise bad(str(adapter.directory / ADAPTER_CONFIG), f"{key} is neither true nor false")
    return bool(value)


def split_reference(reference: str, exists: Callable[[str], bool]) -> tuple[str, str]:
    """Return the model and the adapter of ``model+adapter``; of several ways to read it, that which names what exists.

    Raises
    ------
    ModelError
        If that leaves more than one.
    """
    cuts = [i for i, character in enumerate(reference) if character == "+"]
    ways = [(reference[:i], reference[i + 1 :]) for i in cuts if reference[:i] and reference[i + 1 :]]
    if len(ways) > 1:
        ways = [(model, adapter) for model, adapter in ways if exists(model) and exists(adapter)] or ways
    if len(ways) != 1:
        raise ModelError(f"{quoted(reference)}: not one model and one adapter (model+adapter)")
    return ways[0]
