"""Sort a model's tensors by what an adapter can hold of them.

PEFT adapts modules, not tensors. A linear map, a convolution or an embedding gets two factors for its weight; any other
module without modules of its own is stored whole; a parameter of a module that has others inside is beyond it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from streammerge.checkpoint.names import is_embedding, is_head
from streammerge.checkpoint.tensor_kinds import kind_of
from streammerge.config.lora import LoraOutput
from streammerge.dtypes import FLOATS
from streammerge.lazy import late_pattern

Kind = Literal["linear", "convolution", "embedding", "whole", "bias", "loose", "experts", "left out"]
"""`linear` to `embedding`: factors. `bias`: of a linear map or convolution with factors. `loose`: a parameter that no
adapter can change. `experts`: matrices of several experts in one tensor."""
FACTORED = ("linear", "convolution", "embedding")

TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose linear maps are stored as (in, out)."""
_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""The modules for which this holds."""
ROUTERS = frozenset({"gate", "router", "gating", "wg", "shared_expert_gate", "switch"})
"""Modules that send a token to its experts; transformers stores them as bare parameters."""
_SCANNING = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
"""Model types whose `out_proj` is read by kernels past its module, so that PEFT gives it no factors."""
_TABLES = ("embed", "wte", "wpe", "relative_attention_bias")
"""Parts of the names of modules whose weight is a table of vectors."""


_EXPERT = late_pattern(r"\.experts\.\d+\.")


class Sorter:
    """Sorts the tensors of one model.

    Parameters
    ----------
    tensors
        The shape of each tensor, by name.
    dtypes
        The dtype of each.
    config
        The base's config.json.
    """

    def __init__(
        self,
        tensors: Mapping[str, Sequence[int]],
        dtypes: Mapping[str, str],
        config: Mapping[str, Any],
        asked: LoraOutput,
    ) -> None:
        self._tensors, self._dtypes, self._asked = tensors, dtypes, asked
        self._transposes = config.get("model_type") in TRANSPOSED
        self._scans = config.get("model_type") in _SCANNING
        self._parents = {module.rpartition(".")[0] for module in modules_of(tensors)}
        # PEFT fuses experts that are stored one by one, and takes every module of these names for one of theirs.
        self._of_experts = {name.split(".")[-2] for name in tensors if is_expert(name)}
        self._include = None if asked.include is None else re.compile(asked.include)
        self._exclude = None if asked.exclude is None else re.compile(asked.exclude)

    def kind(self, name: str) -> Kind:
        """Return what becomes of a tensor."""
        module, _, leaf = name.rpartition(".")
        if self.is_left_out(module or name):
            return "left out"
        if module in self._parents or not module:
            experts = "experts" in name and len(self._tensors[name]) == 3
            return "experts" if experts else "loose"
        if self.is_saved(module):
            return "whole"
        of_weight = self._of_weight(module)
        if leaf == "weight":
            return of_weight
        if "experts" in name and len(self._tensors[name]) >= 2:
            return "experts"
        return "bias" if leaf == "bias" and of_weight in FACTORED[:2] else "whole"

    def _of_weight(self, module: str) -> Kind:
        """Return what becomes of a module's weight."""
        name = f"{module}.weight"
        shape = self._tensors.get(name, ())
        if self._dtypes.get(name) not in FLOATS or len(shape) < 2 or 0 in shape:
            return "whole"
        kind, last = kind_of(name), module.rpartition(".")[2]
        if kind == "norm" or last in ROUTERS or (self._scans and last == "out_proj"):
            return "whole"
        if last in self._of_experts and not is_expert(module):
            return "whole"
        if len(shape) > 2:
            depthwise = shape[1] == 1 and shape[0] > 1
            return "experts" if "experts" in module else "whole" if depthwise else "convolution"
        of_table = self.kind_of_table(name)
        if of_table is None:
            return "linear"
        return of_table if self._asked.embeddings else "whole"

    def kind_of_table(self, name: str) -> Kind | None:
        """Return the kind of factors that an embedding's or a head's weight may have; None for any other tensor."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(self._tensors[name]) != 2 or self.is_saved(module):
            return None
        return "linear" if is_head(name) else "embedding" if is_table(module) else None

    def is_left_out(self, module: str) -> bool:
        """Return whether the user leaves a module out."""
        if self._exclude is not None and self._exclude.search(module):
            return True
        return self._include is not None and not self._include.search(module)

    def is_saved(self, module: str) -> bool:
        """Return whether the user wants a module whole."""
        return any(module == name or module.endswith(f".{name}") for name in self._asked.modules_to_save)

    def is_turned(self, name: str, kind: Kind) -> bool:
        """Return whether the rows of a weight are its inputs."""
        last = name.split(".")[-2]
        return kind == "embedding" or (self._transposes and last in _CONV1D and len(self._tensors[name]) == 2)


def is_expert(name: str) -> bool:
    """Return whether a module or tensor belongs to one expert, by its name.

    >>> is_expert("model.layers.0.mlp.experts.3.up_proj"), is_expert("model.layers.0.mlp.shared_experts.up_proj")
    (True, False)
    """
    return _EXPERT.search(name) is not None


def is_table(module: str) -> bool:
    """Return whether a module is an embedding, of tokens, positions or anything else, by its name.

    >>> is_table("model.embed_tokens"), is_table("embeddings.dense"), is_table("lm_head")
    (True, False, False)
    """
    return is_embedding(f"{module}.weight") or any(
        part in module.rpartition(".")[2].lower() for part in _TABLES
    )


def modules_of(names: Iterable[str]) -> set[str]:
    """Return the modules that own tensors, and all modules around them.

    >>> sorted(modules_of(["a.b.weight"]))
    ['a', 'a.b']
    """
    found: set[str] = set()
    for name in names:
        module = name.rpartition(".")[0]
        while module and module not in found:
            found.add(module)
            module = module.rpartition(".")[0]
    return found


def named(modules: Collection[str], every: Collection[str], *, divider: str) -> list[str]:
    """Return the shortest list of names whose matches among the modules `every` are exactly `modules`.

    A module matches a name that it is, or that it ends with, after `divider`. Where the last parts of names do not
    suffice, whole names are listed.

    >>> named(["a.0.up", "a.1.up"], ["a.0.up", "a.1.up", "a.0.down"], divider=".")
    ['up']
    >>> named(["a.0.up"], ["a.0.up", "a.1.up", "a.0.down"], divider=".")
    ['a.0.up']
    """
    wanted = set(modules)
    found: dict[str, None] = {}
    lasts: dict[str, list[str]] = {}
    for module in modules:
        lasts.setdefault(module.rpartition(".")[2], []).append(module)
    for last, own in lasts.items():
        others = [one for one in every if one not in wanted and (one == last or one.endswith(divider + last))]
        found |= dict.fromkeys(own if others else [last])
    return sorted(found)
