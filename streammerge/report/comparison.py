"""A comparison of models: its numbers by tensor, layer and kind, as plain values and as text that fits a screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.tensor_kinds import TensorKind
from streammerge.errors import printable
from streammerge.methods.comparison import SHARES, TensorDifference
from streammerge.records import dataclass
from streammerge.statistics.kinds import SignCounts
from streammerge.units import plural

KINDS = ("attention", "mlp", "norm", "embedding", "other")
"""Kinds of tensors that are told apart; output heads count with the embeddings."""
_BARS = "▁▂▃▄▅▆▇█"
_NAMED = 3
"""Tensors left out whose names are printed."""
_LISTED = 8
"""Models whose cosines are printed."""


@dataclass(frozen=True)
class ComparedTensor:
    """One tensor of a comparison."""

    name: str
    kind: TensorKind
    layer: tuple[str, int] | None
    """The stack that its layer lies in, and the number of the layer; None if it is not part of a layer."""
    dtypes: tuple[str, ...]
    """The dtypes that the base and the models store it in."""
    difference: TensorDifference


@dataclass(frozen=True)
class Comparison:
    """How models differ from their base, and from each other."""

    base: str
    models: tuple[str, ...]
    tensors: tuple[ComparedTensor, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that not all models have, or have in the same shape, each with the reason."""

    @property
    def short_names(self) -> list[str]:
        """See `short_names`."""
        return short_names(self.models)

    @cached_property
    def total(self) -> Sums:
        """The sums over all tensors."""
        return Sums.of(self.tensors, len(self.models))

    @property
    def cosines(self) -> list[list[float | None]]:
        """The cosines between task vectors, (models, models); None if one of the two is zero."""
        dots = self.total.dots
        norms = np.sqrt(np.diag(dots))
        return [
            [
                _ratio(dots[i, j], norms[i] * norms[j]) if i != j else _ratio(norms[i], norms[i])
                for j in range(len(dots))
            ]
            for i in range(len(dots))
        ]

    def by_layer(self) -> dict[tuple[str, int], Sums]:
        """Return the sums over each layer, in order."""
        return self._grouped(lambda tensor: tensor.layer)

    def by_kind(self) -> dict[str, Sums]:
        """Return the sums over the tensors of each of `KINDS`, in this order."""
        found = self._grouped(lambda tensor: _shown_kind(tensor.kind))
        return {kind: found.get(kind) or Sums.of((), len(self.models)) for kind in KINDS}

    def _grouped(self, key: Callable[[ComparedTensor], Any]) -> dict[Any, Sums]:
        groups: dict[Hashable, list[ComparedTensor]] = {}
        for tensor in self.tensors:
            if (found := key(tensor)) is not None:
                groups.setdefault(found, []).append(tensor)
        return {group: Sums.of(tensors, len(self.models)) for group, tensors in sorted(groups.items())}


@dataclass(frozen=True)
class Sums:
    """The sums of some tensors' differences, added in the order of the tensors."""

    base_square: float
    dots: NDArray[np.float64]
    """(models, models)"""
    top_squares: NDArray[np.float64]
    """(models, `SHARES`)"""
    signs: SignCounts
    top_signs: SignCounts
    exponents: NDArray[np.int64]
    """(models, 256)"""

    @classmethod
    def of(cls, tensors: Iterable[ComparedTensor], n_models: int) -> Sums:
        """Add up some tensors."""
        found = [tensor.difference for tensor in tensors]
        base = 0.0
        dots, top = np.zeros((n_models, n_models)), np.zeros((n_models, len(SHARES)))
        exponents = np.zeros((n_models, 256), np.int64)
        for one in found:
            base += one.base_square
            dots += one.dots
            top += one.top_squares
            exponents += one.exponents
        signs = SignCounts(sum(one.signs.agree for one in found), sum(one.signs.conflict for one in found))
        top_signs = SignCounts(
            sum(one.top_signs.agree for one in found), sum(one.top_signs.conflict for one in found)
        )
        return cls(base, dots, top, signs, top_signs, exponents)

    @property
    def base_norm(self) -> float:
        """The norm of the base."""
        return math.sqrt(self.base_square)

    def norm(self, model: int) -> float:
        """Return the norm of a task vector."""
        return math.sqrt(self.dots[model, model])

    def relative(self, model: int) -> float | None:
        """Return the norm of a task vector divided by that of the base; None if the base is zero."""
        return _ratio(self.norm(model), self.base_norm)

    def top_share(self, model: int) -> list[float | None]:
        """Return the part of the squared norm that the largest entries hold, for each of `SHARES`."""
        square = self.dots[model, model]
        return [_ratio(min(top, square), square) for top in self.top_squares[model]]


def short_names(references: Sequence[str]) -> list[str]:
    """Return the last parts of models' paths, or the whole paths if these would be equal, safe to print."""
    ends = [printable(name.rstrip("/").rpartition("/")[2] or name, 28) for name in references]
    return ends if len(set(ends)) == len(ends) else [printable(name, 28) for name in references]


def shares_of_signs(counts: SignCounts) -> dict[str, float | None]:
    """Return the shares of agreeing and of conflicting signs; None if no element has two non-zero task vectors."""
    both = counts.agree + counts.conflict
    return {"agree": _ratio(counts.agree, both), "conflict": _ratio(counts.conflict, both)}


def comparison_values(found: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values, as ``--json`` prints them."""
    layers, kinds = found.by_layer(), found.by_kind()
    one_stack = len({stack for stack, _ in layers}) < 2
    return {
        "base": found.base,
        "models": [
            {
                "model": name,
                "norm": found.total.norm(i),
                "relative": found.total.relative(i),
                "top_share": dict(zip(map(str, SHARES), found.total.top_share(i), strict=True)),
                "layers": [
                    {
                        "layer": layer if one_stack else f"{stack}.{layer}",
                        "norm": sums.norm(i),
                        "relative": sums.relative(i),
                    }
                    for (stack, layer), sums in layers.items()
                ],
                "kinds": {kind: sums.norm(i) for kind, sums in kinds.items()},
                "tensors": {tensor.name: _tensor_values(tensor, i) for tensor in found.tensors},
            }
            for i, name in enumerate(found.models)
        ],
        **({"left_out": dict(found.left_out)} if found.left_out else {}),
        "cosines": found.cosines,
        "signs": {
            "all": shares_of_signs(found.total.signs),
            "top20": shares_of_signs(found.total.top_signs),
        },
    }


def _tensor_values(tensor: ComparedTensor, model: int) -> dict[str, Any]:
    sums = Sums.of([tensor], len(tensor.dtypes) - 1)
    return {
        "norm": sums.norm(model),
        "relative": sums.relative(model),
        "identical": is_identical(tensor, model),
        "dtype": tensor.dtypes[model + 1],
    }


def is_identical(tensor: ComparedTensor, model: int) -> bool:
    """Return whether a model's tensor equals the base's; entries are counted, since squares of small ones vanish in a sum."""
    found = tensor.difference
    return not found.dots[model, model] and not found.exponents[model, 1:].any()


def _shown_kind(kind: TensorKind) -> str:
    return "embedding" if kind == "head" else kind


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


# --- text


def comparison_text(found: Comparison, width: int = 100) -> str:
    """Return a comparison as text that fits a screen of some columns."""
    names = found.short_names
    wide = min(28, max(map(len, ("model", *names))))
    lines = [
        f"base {printable(found.base, 80)}: {plural(len(found.tensors), 'tensor')}, "
        f"norm {found.total.base_norm:.4g}",
        *_left_out_text(found),
        "",
        f"{'task vector':<{wide}}  {'norm':>9}  {'of base':>8}  {'top 1 %':>7}  {'top 5 %':>7}  {'top 20 %':>8}  "
        f"{'identical':>9}",
    ]
    for i, name in enumerate(names):
        top = "  ".join(
            f"{_percent(share):>{w}}" for share, w in zip(found.total.top_share(i), (7, 7, 8), strict=True)
        )
        same = sum(is_identical(tensor, i) for tensor in found.tensors)
        lines.append(
            f"{name:<{wide}}  {found.total.norm(i):>9.4g}  {_percent(found.total.relative(i)):>8}  {top}  {same:>9,}"
        )
    lines += ["  (top: the part of the squared norm that the largest entries of each tensor hold)", ""]
    lines += [*_kinds_text(found, names, wide), "", *_layers_text(found, names, wide, width)]
    if len(names) > 1:
        lines += ["", *_cosines_text(found, names, wide), "", *_signs_text(found)]
    dtypes = sorted({dtype for tensor in found.tensors for dtype in tensor.dtypes})
    lines.append(f"dtypes: {', '.join(dtypes)}")
    return "\n".join(line.rstrip() for line in lines)


def _kinds_text(found: Comparison, names: Sequence[str], wide: int) -> list[str]:
    kinds = {kind: sums for kind, sums in found.by_kind().items() if sums.base_square or sums.dots.any()}
    head = "".join(f"  {kind:>9}" for kind in kinds)
    rows = (
        f"{name:<{wide}}" + "".join(f"  {_percent(sums.relative(i)):>9}" for sums in kinds.values())
        for i, name in enumerate(names)
    )
    return [f"{'norm of base':<{wide}}{head}", *rows]


def _layers_text(found: Comparison, names: Sequence[str], wide: int, width: int) -> list[str]:
    layers = list(found.by_layer().values())
    if not layers:
        return []
    room = max(8, width - wide - 24)
    step = -(-len(layers) // room)
    rows = []
    for i, name in enumerate(names):
        norms = [sums.norm(i) for sums in layers]
        peaks = [max(norms[at : at + step]) for at in range(0, len(norms), step)]
        most = max(peaks)
        bars = "".join(_BARS[min(7, int(8 * peak / (most or 1.0)))] for peak in peaks)
        where = f"at most {most:.3g} in layer {norms.index(most)}" if most else "0 in every layer"
        rows.append(f"{name:<{wide}}  {bars}  {where}")
    return [f"norm by layer, from 0 to {len(layers) - 1}", *rows]


def _cosines_text(found: Comparison, names: Sequence[str], wide: int) -> list[str]:
    shown = names[:_LISTED]
    head = "".join(f"  {i + 1:>6}" for i in range(len(shown)))
    rows = [
        f"{i + 1}. {name:<{wide}}"
        + "".join(
            "       –" if cosine is None else f"  {cosine:>6.3f}" for cosine in found.cosines[i][: len(shown)]
        )
        for i, name in enumerate(shown)
    ]
    more = [f"… and {len(names) - len(shown)} more: --json has them all"] if len(shown) < len(names) else []
    return [f"{'cosine':<{wide + 3}}{head}", *rows, *more]


def _signs_text(found: Comparison) -> list[str]:
    everywhere, top = shares_of_signs(found.total.signs), shares_of_signs(found.total.top_signs)
    return [
        "signs where two task vectors or more are not zero: "
        f"{_percent(everywhere['conflict'])} conflict; of the largest 20 %: {_percent(top['conflict'])}"
    ]


def _left_out_text(found: Comparison) -> list[str]:
    if not found.left_out:
        return []
    names = ", ".join(printable(name, 60) for name in list(found.left_out)[:_NAMED])
    more = f", and {len(found.left_out) - _NAMED:,} more" if len(found.left_out) > _NAMED else ""
    return [f"not compared, since the models do not all have them alike: {names}{more}"]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"
