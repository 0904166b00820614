"""Apply a LoRA adapter to a model. The adapter changes the base's tensors as they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from streammerge.checkpoint.adapters.experts import MOST_RANK, Experts, pair
from streammerge.checkpoint.adapters.files import Adapter, Parts
from streammerge.checkpoint.adapters.head import is_tied, renamed, settle_vocabulary
from streammerge.checkpoint.adapters.names import Names
from streammerge.checkpoint.adapters.slices import Slices
from streammerge.checkpoint.adapters.tokens import with_tokens
from streammerge.checkpoint.names import HEADS, is_embedding
from streammerge.checkpoint.refs.adapted import AdaptedRef, Factor
from streammerge.dtypes import FLOATS
from streammerge.formats.refs import SourceRef, TensorRef, row_elements
from streammerge.io.files import bad, quoted
from streammerge.records import dataclass

_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Modules that GPT-2 and similar models store as (in, out), but other models as (out, in)."""

_PACKED = ("qweight", "weight_packed", "weight_q")
"""Names of a module's weight in quantised models."""


@dataclass(frozen=True)
class AdaptedModel:
    """The result of applying an adapter to a base."""

    tensors: Mapping[str, SourceRef]
    """The tensors in the base's order; new ones last."""
    config: Mapping[str, Any]
    """The base's config.json, changed if the adapter unties the head or resizes the vocabulary."""
    notes: tuple[str, ...]


def adapt(
    adapter: Adapter, base: Mapping[str, SourceRef], config: Mapping[str, Any], reference: str
) -> AdaptedModel:
    """Return the base model with the adapter applied.

    Raises
    ------
    ModelError
        If a tensor of the adapter fits no tensor of the base, or several.
    """
    work = _Adapting(adapter, base, config, reference)
    work.replace()
    work.change()
    tensors = with_tokens(adapter, work.names, base, work.tensors, tied=is_tied(config, base))
    return AdaptedModel(*settle_vocabulary(adapter, base, tensors, config))


class _Adapting:
    """Applies the parts of one adapter to the tensors of its base."""

    def __init__(
        self, adapter: Adapter, base: Mapping[str, SourceRef], config: Mapping[str, Any], reference: str
    ) -> None:
        self.tensors = dict(base)
        self.names = Names(base, reference)
        self._adapter, self._base, self._config, self._reference = adapter, base, config, reference

    def replace(self) -> None:
        """Replace the base's tensors by the adapter's whole tensors, and add those that the base lacks."""
        for plain, ref in self._adapter.replaced.items():
            width = row_elements(ref.shape)
            name = self.names.find(plain, ref.path, self._of_width(width))
            if name is not None and row_elements(self._base[name].shape) != width:
                raise bad(
                    ref.path,
                    f"tensor {quoted(ref.name)} is {list(ref.shape)}, the base's {list(self._base[name].shape)}",
                )
            self.tensors[name or plain] = replace(ref, name=name or plain)

    def _of_width(self, width: int) -> Callable[[str], bool]:
        """Return a function that tells whether the rows of a named base tensor have `width` elements."""
        return lambda name: row_elements(self._base[name].shape) == width

    def change(self) -> None:
        """Add the low-rank changes."""
        slices = Slices(self.names, self._base)
        experts = Experts(self._adapter, self.names, self._base, self._config)
        for module, levels in self._adapter.modules.items():
            targets = experts.targets(module, levels)
            if targets:
                for target, parts in targets:
                    self.tensors |= experts.adapted(module, target, parts, self.tensors)
                continue
            if len(levels) > 1:
                path = next(iter(levels[0].values())).path
                raise bad(
                    path,
                    f"module {quoted(module)}: factors within factors, which `target_parameters` does not explain",
                )
            if f"{module}.weight" in self._base or not slices.take(module, levels[0]):
                self._change_module(module, levels[0])
        self.tensors |= slices.together(self.tensors, self._adapted)

    def _change_module(self, module: str, parts: Parts) -> None:
        path = next(iter(parts.values())).path
        name = self._weight_of(module, parts, path)
        weight = self.tensors[name]
        if weight.dtype not in FLOATS:
            raise bad(
                weight.path,
                f"tensor {quoted(name)} is {weight.dtype}: an adapter goes on float weights; dequantise",
            )
        adapted = self.tensors[name] = self._adapted(module, parts, weight)
        bias = parts.get("lora_B.bias")
        if bias is not None:
            of_bias = name.removesuffix("weight") + "bias"
            self.tensors[of_bias] = _adapted_bias(module, self.tensors.get(of_bias), bias, adapted.scale)

    def _weight_of(self, module: str, parts: Parts, path: str) -> str:
        """Return the name of the weight that a module's factors change; a tied head gets its own weight."""
        plain = f"{module}.weight"

        def fits(name: str) -> bool:
            return _shapes_fit(parts, self._base[name].shape)

        name = self.names.find(plain, path, fits)
        if name is not None:
            return name
        if plain.endswith(HEADS) and is_tied(self._config, self._base, asked=True):
            head = next(head for head in HEADS if plain.endswith(head))
            if head in self.tensors:  # the adapter itself has it
                return head
            embeddings = [name for name in self._base if is_embedding(name) and fits(name)]
            if len(embeddings) == 1:
                self.tensors[head] = renamed(self._base[embeddings[0]], head)
                return head
        for leaf in _PACKED:
            packed = self.names.find(f"{module}.{leaf}", path)
            if packed is not None:
                raise bad(
                    self._base[packed].path,
                    f"tensor {quoted(packed)} is packed: an adapter goes on float weights; dequantise",
                )
        raise bad(
            path,
            f"adapts module {quoted(module)}, which {self._reference} has not: another base model's adapter",
        )

    def _adapted(self, module: str, parts: Parts, weight: SourceRef) -> AdaptedRef:
        """Return a weight with its two factors, for either orientation of the weight."""
        settings = self._adapter.settings
        embedding, a, b = pair(module, parts)
        magnitude = parts.get("lora_magnitude_vector")
        transposed = embedding or self._is_transposed(module, a, b, weight)
        rank = a.shape[0] if a.shape else 0
        rows, columns = (weight.shape[0] if weight.shape else 0), row_elements(weight.shape)
        inputs, outputs = (rows, columns) if transposed else (columns, rows)
        fits = (
            len(weight.shape) >= 2
            and weight.n_elements
            and 1 <= rank <= MOST_RANK
            and row_elements(a.shape) == inputs
            and (transposed or a.shape[1:] == weight.shape[1:])
            and b.shape[:2] == (outputs, rank)
            and math.prod(b.shape[2:]) == 1
        )
        if not fits:
            raise bad(
                a.path,
                f"module {quoted(module)}: factors {list(b.shape)} and {list(a.shape)} do not fit the weight "
                f"{list(weight.shape)}",
            )
        if magnitude is not None:
            if math.prod(magnitude.shape) != outputs:
                raise bad(
                    a.path,
                    f"module {quoted(module)}: a magnitude {list(magnitude.shape)} for {outputs} outputs",
                )
        elif settings.flag("use_dora"):
            raise bad(a.path, f"module {quoted(module)}: use_dora, and no lora_magnitude_vector")
        if transposed:
            left, right = Factor(a, 1, inputs), Factor(b, 1, rank)
        else:
            left, right = Factor(b, rank, 1), Factor(a, inputs, 1)
        return AdaptedRef(
            weight, left, right, rank, settings.scale(self._key(module), rank), magnitude, transposed
        )

    def _key(self, module: str) -> str:
        """Return the name that PEFT matches patterns against: the module, or the targeted parameter."""
        named = any(
            f"{module}.weight".endswith(f".{target}")
            for target in self._adapter.settings.texts("target_parameters")
        )
        return f"{module}.weight" if named else module

    def _is_transposed(self, module: str, a: TensorRef, b: TensorRef, weight: SourceRef) -> bool:
        """Return whether a weight is stored as (in, out).

        The shapes decide unless the weight is square. `fan_in_fan_out` alone is not reliable: PEFT decides per module,
        and saves the value of the last module.
        """
        flag = self._adapter.settings.flag("fan_in_fan_out")
        if len(weight.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
            return False
        as_stored = (b.shape[0], a.shape[1]) == weight.shape
        turned = (a.shape[1], b.shape[0]) == weight.shape
        if as_stored != turned or not as_stored:
            return turned
        if module.rpartition(".")[2] not in _CONV1D:
            return flag and not any(name.rpartition(".")[2] in _CONV1D for name in self._adapter.modules)
        for name, ref in self._base.items():
            stem, _, leaf = name.rpartition(".")
            bias = self._base.get(f"{stem}.bias")
            known = leaf == "weight" and stem.rpartition(".")[2] in _CONV1D and len(ref.shape) == 2
            if known and bias is not None and ref.shape[0] != ref.shape[1]:
                return bias.shape == ref.shape[1:]  # a bias has one element per output
        return flag


def _shapes_fit(parts: Parts, shape: tuple[int, ...]) -> bool:
    """Return whether factors may belong to a weight of this shape, in either orientation."""
    a = parts.get("lora_A") or parts.get("lora_embedding_A")
    b = parts.get("lora_B") or parts.get("lora_embedding_B")
    if a is None or b is None or not a.shape or not b.shape or len(shape) < 2:
        return True  # refused later
    sides = row_elements(a.shape), b.shape[0]
    return sides in ((row_elements(shape), shape[0]), (shape[0], row_elements(shape)))


def _adapted_bias(module: str, bias: SourceRef | None, change: TensorRef, scale: float) -> AdaptedRef:
    """Return the bias of a module trained with ``lora_bias``; its change is scaled like the weight's."""
    if bias is None or bias.dtype not in FLOATS or bias.shape != change.shape:
        raise bad(change.path, f"module {quoted(module)}: a change of a bias that the base has not")
    return AdaptedRef(bias, Factor(change, 1, 1), None, 1, scale)
