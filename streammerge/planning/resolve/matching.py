"""Rename the models' tensors to the names of the template model.

This precedes the rest of the planning, which sees all models with the template model's names and layout of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace

from streammerge.checkpoint.index import TensorIndex
from streammerge.errors import printable
from streammerge.formats.refs import SourceRef
from streammerge.lazy import late_pattern
from streammerge.planning.resolve.experts import Layout, has_experts, laid_out, layout_of
from streammerge.planning.resolve.prefixes import Rule, find_rules, layers_behind
from streammerge.planning.resolve.spellings import spelt_alike
from streammerge.records import dataclass

_WRAPPERS = late_pattern(r"(?:(?:_orig_mod|module|_fsdp_wrapped_module|_forward_module)\.)+")
"""Beginnings of names that torch.compile, DDP, FSDP and DeepSpeed put before those of the model that they wrap."""


@dataclass(frozen=True)
class Matched:
    """The models under the template model's names."""

    indexes: Mapping[str, TensorIndex]
    """The renamed models, by reference."""
    own_names: Mapping[str, Mapping[str, str]]
    """The own names of renamed tensors, by reference and by the template model's name."""
    prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The prefixes of the template model's names of shared tensors, by reference, for renamed models."""
    notes: tuple[str, ...] = ()

    @property
    def n_blocks(self) -> int:
        """Number of blocks of tensors that are assembled as they are read."""
        return sum(ref.n_blocks for reference in self.own_names for ref in self.indexes[reference].values())


def match_names(
    template: TensorIndex, indexes: Mapping[str, TensorIndex], exclude: Sequence[str] = ()
) -> Matched:
    """Return all models under the names that the template model has, with its layout of experts.

    A tensor that the template model lacks, or that matches a pattern in `exclude`, keeps its name.

    Raises
    ------
    ModelError
        If the match is ambiguous.
    """
    found: dict[str, TensorIndex] = {}
    own_names: dict[str, Mapping[str, str]] = {}
    prefixes: dict[str, tuple[str, ...]] = {}
    notes = _wrapped(template)
    layout = layout_of(template) if has_experts(template) else None
    for reference, index in indexes.items():
        if index is template:
            found[reference] = index
            continue
        matched = index if layout is None else _with_experts(index, template, layout, notes)
        converted = matched is not index
        matched = spelt_alike(matched, template, notes)
        alike = _is_part(matched, template)
        rules = [] if alike else find_rules(matched, template, reference, template.reference, exclude)
        if rules:
            matched = _renamed(matched, rules)
            prefixes[reference] = tuple(dict.fromkeys(rule.template for rule in rules))
            notes.append(_told(reference, template, rules))
        if converted:
            matched = _with_routers(matched, template)
        found[reference] = matched
        if matched is not index:
            own_names[reference] = _own_names(index, matched)
    return Matched(found, own_names, prefixes, tuple(notes))


def _is_part(index: Mapping[str, SourceRef], template: Mapping[str, SourceRef]) -> bool:
    """Return whether one of the two sets of names contains the other."""
    return index.keys() <= template.keys() or template.keys() <= index.keys()


def _with_experts(index: TensorIndex, template: TensorIndex, layout: Layout, notes: list[str]) -> TensorIndex:
    if not has_experts(index):
        return index
    found = laid_out(index, layout)
    if found is not index:
        how = "fused" if layout.fused else "one by one"
        notes.append(
            f"{printable(index.reference)}: its experts are converted to the layout of {printable(template.reference)}, stored {how}"
            f"{' as (in, out)' if layout.flipped else ''}"
        )
    return found


def _with_routers(index: TensorIndex, template: TensorIndex) -> TensorIndex:
    """Return a model with the tensors next to its experts renamed to the template model's, if shapes identify them.

    The layouts of experts differ in these names too: ``gate.weight`` and ``router.weight``.
    """
    left = _by_module(template, index)
    mine = _by_module(index, template)
    called: dict[str, str] = {}
    for module, shapes in mine.items():
        for shape, names in shapes.items():
            others = left.get(module, {}).get(shape, [])
            if len(names) == len(others) == 1:
                called[names[0]] = others[0]
    return (
        replace(index, tensors={called.get(name, name): ref for name, ref in index.items()})
        if called
        else index
    )


def _by_module(
    index: Mapping[str, SourceRef], other: Mapping[str, SourceRef]
) -> dict[str, dict[tuple[int, ...], list[str]]]:
    """Return the names in modules with experts that only `index` has, by module and shape."""
    modules = {name[: name.index(".experts.") + 1] for name in index if ".experts." in name}
    found: dict[str, dict[tuple[int, ...], list[str]]] = {}
    for name in (name for name in index if name not in other and ".experts." not in name):
        at = name.find(".") + 1
        while at and name[:at] not in modules:
            at = name.find(".", at) + 1
        if at:
            found.setdefault(name[:at], {}).setdefault(index[name].shape, []).append(name)
    return found


def _renamed(index: TensorIndex, rules: list[Rule]) -> TensorIndex:
    called = {name: rule.template + name[len(rule.own) :] for rule in rules for name in rule.names}
    called |= layers_behind(index, rules, called.keys())
    return replace(index, tensors={called.get(name, name): ref for name, ref in index.items()})


def _wrapped(template: TensorIndex) -> list[str]:
    """Return a warning if the output's names would be those of a wrapper around the model, which no library looks for."""
    found = _WRAPPERS.match(next(iter(template), "")) if template.config else None
    if found is None or not all(name.startswith(found[0]) for name in template):
        return []
    return [
        f"{printable(template.reference)}: its names begin with `{found[0]}`, as a wrapper of the training calls them, and so do "
        f'those of the output, which may not load: write `strip: "{found[0]}"` beside this model to take it off'
    ]


def _own_names(index: TensorIndex, matched: TensorIndex) -> dict[str, str]:
    """Return the own names of tensors that were renamed without being converted."""
    names = {id(ref): name for name, ref in index.items()}
    return {
        name: own for name, ref in matched.items() if (own := names.get(id(ref))) is not None and own != name
    }


def _told(reference: str, template: TensorIndex, rules: list[Rule]) -> str:
    pairs = ", ".join(
        f"{printable(rule.own, 80)}* is {printable(rule.template, 80)}* ({len(rule.names)} tensors)"
        for rule in rules
    )
    return f"{printable(reference)}: its names are matched with those of {printable(template.reference)}: {pairs}"
