"""Selects the tensors of the output if the models need not have the same: `tensors: common` and `tensors: any`.

``common`` merges what all models have and leaves the rest out. ``any`` merges each tensor over the models that have it,
with the weights of those models; the base, if there is one, must have it. A tensor whose shapes differ between those
models is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, replace

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.names import count_real, depth_of
from streammerge.config.schema import MergeConfig
from streammerge.errors import ModelError, printable
from streammerge.methods.registry import Method
from streammerge.planning.resolve.assemble import OutputTensor, Stack
from streammerge.planning.resolve.find import Finder
from streammerge.records import dataclass

NOT_IN_ALL = "not in every model"
NOT_IN_BASE = "not in the base"
SHAPES = "of different shapes"
TOO_FEW = "in fewer models than the method takes"


@dataclass(frozen=True)
class Selection:
    """The tensors of an output, and those left out of it."""

    outputs: tuple[OutputTensor, ...]
    copied: frozenset[str] = frozenset()
    """Names of tensors that one model alone has and that are copied from there."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that are not in the output, each with the reason."""
    stacks: tuple[Stack, ...] = ()
    """Stacks of layers that are longer or shorter than the template model's."""
    notes: tuple[str, ...] = ()


def select(
    config: MergeConfig,
    method: Method,
    outputs: Sequence[OutputTensor],
    template: TensorIndex,
    finder: Finder,
    excluded: Collection[str],
) -> Selection:
    """Return which of all models' tensors are merged, each with the models that take part.

    Parameters
    ----------
    outputs
        The tensors of all models.
    excluded
        Names of tensors that are copied from the template model, or under ``any`` from the first that has them.

    Raises
    ------
    ModelError
        If nothing is left.
    """
    chosen: list[OutputTensor] = []
    copied: set[str] = set()
    left_out: dict[str, str] = {}
    fewer: list[str] = []
    for output in outputs:
        if output.name in excluded:
            found, why = _of_excluded(output, config, template)
        else:
            found, why = _of_merged(output, config, method, finder)
        if found is None:
            left_out[output.name] = why
            continue
        if why:
            copied.add(output.name)
        elif len(found.sources) < len(output.sources):
            fewer.append(output.name)
        chosen.append(found)
    if not chosen:
        raise ModelError(
            f"{config.where}: tensors: {config.tensors}: nothing is left to merge: {_counted(left_out)}: these models have no "
            "tensors in common"
        )
    counts, _ = count_real([output.name for output in chosen], template.config)
    placed = tuple(replace(output, depth=depth_of(output.name, counts)) for output in chosen)
    notes = _notes(config, len(outputs), left_out, fewer, copied)
    return Selection(placed, frozenset(copied), left_out, _stacks(template, counts), notes)


def _of_excluded(
    output: OutputTensor, config: MergeConfig, template: TensorIndex
) -> tuple[OutputTensor | None, str]:
    if config.tensors == "common" and output.template[0] != template.reference:
        return None, NOT_IN_ALL
    return output, ""


def _of_merged(
    output: OutputTensor, config: MergeConfig, method: Method, finder: Finder
) -> tuple[OutputTensor | None, str]:
    """Return a tensor with the models that take part, and a text if it is copied; or None, and why it is left out."""
    part, (least, _) = output.part, method.n_models
    base = None if part.base is None else finder.find(part.base.reference, output.base)
    found = [finder.find(spec.reference, name) for spec, name in output.models]
    having = [place for place, ref in enumerate(found) if ref is not None]
    if config.tensors == "common" and (len(having) < len(found) or (part.base is not None and base is None)):
        return None, NOT_IN_ALL
    if part.base is not None and base is None:
        return None, NOT_IN_BASE
    if len({ref.shape for ref in (base, *found) if ref is not None}) > 1:
        return None, SHAPES
    alone = not having or (len(having) == 1 and part.base is None)
    if len(having) < least and not alone:
        return None, TOO_FEW
    sources = tuple(part.sources[place] for place in having)
    names = tuple(output.sources[place] for place in having)
    taking = (
        output
        if len(having) == len(found)
        else replace(output, part=replace(part, sources=sources), sources=names)
    )
    return taking, "copied" if len(having) < max(1, least) else ""


def _stacks(template: TensorIndex, counts: Mapping[str, int]) -> tuple[Stack, ...]:
    """Return the stacks whose number of layers is not the template model's, for its config.json."""
    own, extra = count_real(template, template.config)
    return tuple(
        Stack(None, prefix, own[prefix], tuple((template.reference, layer) for layer in range(n)))
        for prefix, n in counts.items()
        if prefix in own and own[prefix] != n and not extra.get(prefix)
    )


def _notes(
    config: MergeConfig,
    total: int,
    left_out: Mapping[str, str],
    fewer: Sequence[str],
    copied: Collection[str],
) -> tuple[str, ...]:
    key = f"tensors: {config.tensors}"
    notes = []
    if left_out:
        notes.append(
            f"{key}: {len(left_out)} of {total} tensors are left out: {_counted(left_out)} (first: "
            f"{printable(next(iter(left_out)))})"
        )
    if fewer:
        notes.append(
            f"{key}: {len(fewer)} of {total} tensors are merged over those models that have them (first: {printable(fewer[0])})"
        )
    if copied:
        notes.append(
            f"{key}: {len(copied)} of {total} tensors are in one model alone and copied from there (first: "
            f"{printable(min(copied))})"
        )
    return tuple(notes)


def _counted(left_out: Mapping[str, str]) -> str:
    return ", ".join(f"{n} {why}" for why, n in Counter(left_out.values()).items())
