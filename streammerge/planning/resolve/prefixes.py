"""Match names that differ only in their prefix between two models, by comparing names and shapes.

Models save the same layers under ``model.``, ``bert.``, ``language_model.model.``, ``model.language_model.`` or without a
prefix. No list of architectures is needed: a name without its prefix (``layers.3.mlp.up_proj.weight``) identifies the
tensor, and all tensors with the same prefix move together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from streammerge.checkpoint.names import in_component
from streammerge.errors import ModelError, printable
from streammerge.formats.refs import SourceRef
from streammerge.records import dataclass

_MOST_RULES = 12
"""Most candidates that are counted in full."""
_SAMPLED = 4096
"""Most names that candidates are derived from."""
_MOST_STARTS = 16
"""Most parts of a name that are considered."""
_MOST_FOUND = 12
"""Most rules for one model."""
_MOST_TWINS = 6
"""Most tensors with the same ending that a name is compared with."""


@dataclass(frozen=True)
class Rule:
    """A renaming: the prefix `own` in a model corresponds to the prefix `template` in the template model."""

    own: str
    """The model's prefix; it ends with a dot, or is empty."""
    template: str
    names: tuple[str, ...] = ()
    """The model's names that the rule finds in the template model."""


def find_rules(
    own: Mapping[str, SourceRef],
    template: Mapping[str, SourceRef],
    reference: str,
    template_reference: str,
    exclude: Sequence[str] = (),
) -> list[Rule]:
    """Return the rules that turn names of a model that the template model lacks into names of the template model.

    Parameters
    ----------
    exclude
        Regular expressions of the template model's tensors that are not matched.

    Raises
    ------
    ModelError
        If two prefixes of the template model fit equally well.
    """
    left = {name: ref for name, ref in own.items() if name not in template}
    patterns = [re.compile(pattern) for pattern in exclude]
    free = {
        name: ref
        for name, ref in template.items()
        if name not in own and not any(pattern.search(name) for pattern in patterns)
    }
    words: set[str] = set()
    rules: list[Rule] = []
    while left and free and len(rules) < _MOST_FOUND:
        candidates = _candidates(left, free)
        counted = sorted(
            (_count(prefixes, left, free) for prefixes in candidates),
            key=lambda found: (-found.alike, -len(found.rule.names), found.rule.own, found.rule.template),
        )
        best = next((found for found in counted if _holds(found, words)), None)
        if best is None:
            return rules
        twins = [other for other in counted if _is_twin(other, best) and _holds(other, words)]
        for other in twins:
            if set(other.rule.names) & set(best.rule.names):
                raise ModelError(
                    f"{printable(reference)}: {printable(best.rule.own + '*')} fits both {printable(best.rule.template + '*')} and "
                    f"{printable(other.rule.template + '*')} of {printable(template_reference)}: list one of these under `exclude:`"
                )
        best = _meant([best, *twins], patterns, reference, template_reference)
        rules.append(best.rule)
        words |= {*best.rule.own.split("."), *best.rule.template.split(".")}
        for name in best.rule.names:
            del left[name], free[best.rule.template + name[len(best.rule.own) :]]
    return rules


def layers_behind(own: Iterable[str], rules: Sequence[Rule], found: Collection[str]) -> dict[str, str]:
    """Return new names, in the template model's manner, for layers in matched stacks that the template model lacks.

    Parameters
    ----------
    found
        Names that rules matched.
    """
    stacks = {
        own_stack: rule.template + own_stack[len(rule.own) :]
        for rule in rules
        for name in rule.names
        if (own_stack := _stack(name, len(rule.own))) is not None
    }
    starts = tuple(stacks)
    behind: dict[str, str] = {}
    for name in own:
        if name not in found and name.startswith(starts):
            stack = next(stack for stack in starts if name.startswith(stack))
            behind[name] = stacks[stack] + name[len(stack) :]
    return behind


def _stack(name: str, start: int) -> str | None:
    """Return the part of a name before its layer number, which is the first number after `start`."""
    at = start
    for part in name[start:].split("."):
        if part.isdigit():
            return name[:at]
        at += len(part) + 1
    return None


def _is_twin(other: _Counted, best: _Counted) -> bool:
    return other is not best and (other.alike, len(other.rule.names)) == (best.alike, len(best.rule.names))


def _meant(
    fits: Sequence[_Counted], patterns: Sequence[re.Pattern[str]], reference: str, template_reference: str
) -> _Counted:
    """Return the first of equally good candidates, or one that matches the same tensors and is not excluded."""
    best = fits[0]
    rivals = [found for found in fits if _targets(found.rule) & _targets(best.rule)]
    if len(rivals) == 1:
        return best
    left = [
        found
        for found in rivals
        if not all(any(pattern.search(name) for pattern in patterns) for name in found.rule.names)
    ]
    if len(left) == 1:
        return left[0]
    one, other = (found.rule for found in rivals[:2])
    raise ModelError(
        f"{printable(reference)}: {printable(one.own + '*')} and {printable(other.own + '*')} both fit "
        f"{printable(one.template + '*')} of {printable(template_reference)}: list one of these under `exclude:`"
    )


def _targets(rule: Rule) -> set[str]:
    """Return the names of the template model that a rule matches."""
    return {rule.template + name[len(rule.own) :] for name in rule.names}


def _candidates(left: Mapping[str, SourceRef], free: Mapping[str, SourceRef]) -> list[tuple[str, str]]:
    """Return the pairs of prefixes, of the model and of the template model, with the most equal names after them."""
    ends: dict[str, list[str]] = {}
    for name in free:
        for start in _starts(name):
            if len(begins := ends.setdefault(name[start:], [])) <= _MOST_TWINS:
                begins.append(name[:start])
    votes: Counter[tuple[str, str]] = Counter()
    for name in _spread(left):
        for start in _starts(name):
            begins = ends.get(name[start:], [])
            if 0 < len(begins) <= _MOST_TWINS:
                votes.update((name[:start], begin) for begin in begins)
            if begins:
                break
    return [prefixes for prefixes, _ in votes.most_common(_MOST_RULES)]


def _starts(name: str) -> Iterator[int]:
    """Yield the start of each part of a name except the last: ``weight`` alone identifies nothing."""
    yield 0
    if component := len(in_component(name)[0]):
        yield component
    at = name.find(".") + 1
    last = name.rfind(".") + 1
    for _ in range(_MOST_STARTS):
        if not 0 < at < last:
            return
        yield at
        at = name.find(".", at) + 1


def _spread(names: Mapping[str, SourceRef]) -> Iterable[str]:
    """Return a limited number of names, spread over all of them."""
    listed = list(names)
    return listed[:: max(1, len(listed) // _SAMPLED)]


@dataclass(frozen=True)
class _Counted:
    """A candidate rule, and how well it fits."""

    rule: Rule
    alike: int
    """Number of matched names with the same shape."""
    under_own: int
    """Number of names with this prefix in the model."""
    under_template: int


def _count(
    prefixes: tuple[str, str], left: Mapping[str, SourceRef], free: Mapping[str, SourceRef]
) -> _Counted:
    own, template = prefixes
    mine = [name for name in left if name.startswith(own)]
    names = tuple(name for name in mine if template + name[len(own) :] in free)
    alike = sum(left[name].shape == free[template + name[len(own) :]].shape for name in names)
    return _Counted(
        Rule(own, template, names), alike, len(mine), sum(name.startswith(template) for name in free)
    )


def _holds(found: _Counted, words: set[str]) -> bool:
    """Return whether a candidate is more than a coincidence.

    It must match several tensors, and at least half of those with its prefix in either model. A single tensor (a head)
    suffices if a rule with many tensors has already identified the words of the prefix as wrappers.
    """
    n = len(found.rule.names)
    if not n or 2 * n < min(found.under_own, found.under_template):
        return False
    numbers = [
        [part for part in begin.split(".") if part.isdigit()]
        for begin in (found.rule.own, found.rule.template)
    ]
    if all(numbers) and numbers[0] != numbers[1]:
        return False  # A layer never matches a layer of a different number.
    parts = {*found.rule.own.split("."), *found.rule.template.split(".")}
    return n >= 3 or parts <= words | {""}
