"""PEFT's ``adapter_config.json``: the kind of an adapter, the scale of its changes, and unsupported settings."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.io.files import bad, quoted, read_exactly, reading
from streammerge.io.stamp import FileStamp
from streammerge.io.strict_json import MAX_NBYTES, parse_object
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

ADAPTER_CONFIG = "adapter_config.json"
LORA, TOKENS = "LORA", "TRAINABLE_TOKENS"
_WITH_PEFT = "merge it into the base with PEFT's merge_and_unload first"
_PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
    "XLORA",
)
"""Kinds that change no weights, or that depend on the input, so that they cannot be merged."""
_REFUSED = {
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "an activated LoRA, which acts on a part of the text only",
    "layer_replication": "a model of replicated layers",
    "megatron_config": "a Megatron layout",
    "use_bdlora": "a block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
"""Entries of a configuration that change the meaning of the tensors, with a description."""
_ROUTED = {"arrow_config": "Arrow, which routes by the text"}
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Prefixes of initialisations that change the base."""
_LARGEST_ALPHA = 1e30
_LONGEST_MATCHED = 400
"""Most characters of a module's name that expressions are matched with."""
_SIMPLE = late_pattern(r"\^?[\w.\\|()\[\]-]{0,600}\$?", re.ASCII)
"""Expressions with at most two ``.*``, no other repetition and few alternatives, so that matching is fast."""


@dataclass(frozen=True)
class AdapterSettings:
    """The entries of an adapter's configuration, checked when they are used."""

    path: str
    entries: Mapping[str, Any]

    def flag(self, key: str) -> bool:
        """Return a Boolean entry; False if it is missing."""
        value = self.entries.get(key, False)
        if not isinstance(value, bool | None):
            raise bad(self.path, f"{key} is neither true nor false")
        return bool(value)

    def texts(self, key: str) -> list[str]:
        """Return an entry that is a list of strings; empty if it is missing."""
        value = self.entries.get(key) or []
        if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
            raise bad(self.path, f"{key} is not a list of names")
        return value

    def scale(self, module: str, rank: int) -> float:
        """Return the scale of the product of a module's factors: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        alpha = self._of_module("alpha_pattern", module, self.entries.get("lora_alpha", 8))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _LARGEST_ALPHA:
            raise bad(self.path, f"lora_alpha of module {quoted(module)} is no number, or none of use")
        stated = self.rank(module)
        if stated is not None and stated != rank:
            raise bad(self.path, f"module {quoted(module)}: rank {stated}, but its factors have {rank}")
        return alpha / math.sqrt(rank) if self.flag("use_rslora") else alpha / rank

    def rank(self, module: str) -> int | None:
        """Return the stated rank of a module, or None."""
        stated = self._of_module("rank_pattern", module, self.entries.get("r", 8))
        if not isinstance(stated, int) or isinstance(stated, bool) or self.entries.get("r") is None:
            return None
        return stated

    def token_indices(self, module: str) -> list[Any]:
        """Return the ids of the tokens that were trained in a module.

        Raises
        ------
        ModelError
            If the configuration has none for it.
        """
        key = "token_indices" if self.entries.get("peft_type") == TOKENS else "trainable_token_indices"
        value = self.entries.get(key)
        if isinstance(value, dict):
            ends = [name for name in value if module == name or module.endswith(f".{name}")]
            value = value[ends[0]] if len(ends) == 1 else None
        if not isinstance(value, list):
            raise bad(self.path, f"{key} has no tokens for the trained module {quoted(module)}")
        return value

    def _of_module(self, key: str, module: str, otherwise: Any) -> Any:
        """Return the value of the pattern that matches a module, as in PEFT: an ending of its name, or an expression."""
        patterns = self.entries.get(key) or {}
        if not isinstance(patterns, dict):
            raise bad(self.path, f"{key} is not a map")
        for pattern, value in patterns.items():
            if module == pattern or module.endswith(f".{pattern}"):
                return value
            plain = pattern.replace(".*", "", 2).replace("(?:", "(")
            if _SIMPLE.fullmatch(plain) is None or plain.count("(") > 3 or plain.count("|") > 20:
                raise bad(
                    self.path,
                    f"{key}: {quoted(pattern, 80)} is too free an expression; merge the adapter with PEFT first",
                )
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    expression = re.compile(rf"(.*\.)?({pattern})", re.DOTALL)
            except (re.error, Warning):
                raise bad(self.path, f"{key}: {quoted(pattern, 80)} is no regular expression") from None
            if len(module) <= _LONGEST_MATCHED and expression.fullmatch(module):
                return value
        return otherwise


def read_settings(path: Path) -> tuple[AdapterSettings, FileStamp]:
    """Read an adapter's configuration.

    Raises
    ------
    ModelError
        If it is malformed, or of a kind that is not a fixed change of weights.
    """
    with reading(str(path)) as (fd, status):
        if status.st_size > MAX_NBYTES:
            raise bad(str(path), f"has {status.st_size} bytes, more than {MAX_NBYTES}")
        raw = read_exactly(fd, status.st_size, 0, str(path))
    entries = parse_object(raw, str(path), "the file", "any")
    check_kind(entries, str(path))
    return AdapterSettings(str(path), entries), FileStamp.of(path, status, raw)


def check_kind(entries: Mapping[str, Any], path: str) -> None:
    """Refuse a configuration of a kind that is not a fixed change of weights, or not supported."""
    kind = entries.get("peft_type")
    if kind in _PROMPTS:
        raise bad(
            path,
            f"peft_type is {quoted(str(kind), 40)}, which changes no weights: it cannot be merged; "
            "keep it as an adapter of the merged model",
        )
    if kind not in (LORA, TOKENS):
        raise bad(
            path,
            f"peft_type is {quoted(str(kind), 40)}: only LORA and TRAINABLE_TOKENS are supported; {_WITH_PEFT}",
        )
    start = entries.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise bad(
            path,
            f"init_lora_weights: {quoted(start, 40)}: this initialisation modifies the base weights before training "
            "(PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do), so the adapter does not fit the base; save it with PEFT's "
            f"path_initial_model_for_weight_conversion, or {_WITH_PEFT}",
        )
    for key, what in _REFUSED.items():
        if entries.get(key):
            raise bad(path, f"{key}: {what} is not supported; merge the adapter with PEFT first")
    for key, what in _ROUTED.items():
        if entries.get(key):
            raise bad(path, f"{key}: {what}: it is no fixed change of the weights, and cannot be merged")
