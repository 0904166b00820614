"""The findings of `compare_mergekit.py`, and the page it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_differences import Case, RandomCase

PRECISIONS = ("float32", "float64")


@dataclass(frozen=True)
class Compared:
    """How two outputs differ."""

    names: bool
    shapes: bool
    dtypes: bool
    config: bool
    ulp: float
    """The worst difference, in ulp at the size of the largest operand of the element; of tensors both have."""
    differing: float
    """Fraction of elements that differ by more than the case's bound."""


@dataclass(frozen=True)
class Row:
    """One case, compared in both precisions."""

    case: Case
    found: Mapping[str, Compared]
    verdict: str
    explained: bool


@dataclass(frozen=True)
class Kept:
    """The part of its task vector that a merge of one model with random drops keeps."""

    fraction: float
    smaller_half: float
    larger_half: float
    norm: float
    """L1 norm of what was added to the base, over that of the task vector."""


@dataclass(frozen=True)
class RandomRow:
    """One random case, measured in mergekit, here, and here with mergekit's choices."""

    case: RandomCase
    theirs: Kept
    ours: Kept
    cured: Kept
    verdict: str
    explained: bool


def page(rows: Sequence[Row], random_rows: Sequence[RandomRow], about: str) -> str:
    """Return the page of results; `about` says what the models are."""
    counts = {v: sum(r.verdict.startswith(v) for r in rows) for v in ("equal", "as documented")}
    lines = [
        "# Compared with mergekit",
        "",
        "Written by `python tools/compare/compare_mergekit.py MERGEKIT_ENVIRONMENT`: the same configs, unmodified, through mergekit 0.1.5",
        f"and through this program, on a base and fine-tunes of it ({about}), in float32 and in",
        "float64 (mergekit computes in the dtype of the merge). Of every output: names, shapes and dtypes of the tensors, the fields",
        "of config.json, and the worst difference of an element, in ulp at the size of its largest operand. A difference that is",
        "meant counts only with a proof, below, that nothing else differs.",
        "",
        f"{len(rows)} configs give the same tensors: {counts['equal']} are equal, at most but for rounding; {counts['as documented']} differ "
        "as is meant and nowhere else. "
        f"{len(random_rows)} with random drops leave the same fractions and norms.",
        "",
        "| config | names | shapes | dtypes | config.json | ulp in float32 | in float64 | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [
            "=" if row.found and all(getattr(one, field) for one in row.found.values()) else "≠"
            for field in ("names", "shapes", "dtypes", "config")
        ]
        ulps = [f"{row.found[dtype].ulp:.3g}" if dtype in row.found else "" for dtype in PRECISIONS]
        lines.append(f"| {row.case.name} | {' | '.join([*same, *ulps])} | {row.verdict} |")
    lines += ["", "## Differences, and their reasons", ""]
    said: set[str] = set()
    for one in (row.case.differs for row in rows):
        if one is None or one.why in said:
            continue
        said.add(one.why)
        if one.cure:
            proof = "With `preset: mergekit` the results are equal but for rounding."
        elif one.theirs is not None:
            proof = "mergekit's result is equal, but for rounding, to the formula with just this changed."
        else:
            proof = "In float64 the results are equal but for rounding."
        lines.append(f"- `{one.where}`: {one.why}. {proof}")
    lines += [
        "",
        "## Random drops",
        "",
        "The masks cannot be the same (mergekit's depend on the order of all tensors before). Of one model and a base: the fraction of",
        "entries kept; of the smaller and of the larger half of each row's magnitudes; and the L1 norm of what is added to the base,",
        "over the task vector's. mergekit restores that norm; here survivors are divided by their probability, which keeps the",
        "expectation, unless `preset: mergekit` (the third figure of a norm) or `rescale: l1` says otherwise.",
        "",
        "| config | kept: mergekit | here | smaller and larger half: mergekit | here | norm: mergekit | here | with the preset | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in random_rows:
        halves = [f"{k.smaller_half:.3f}, {k.larger_half:.3f}" for k in (one.theirs, one.ours)]
        norms = [f"{k.norm:.4f}" for k in (one.theirs, one.ours, one.cured)]
        lines.append(
            f"| {one.case.name} | {one.theirs.fraction:.4f} | {one.ours.fraction:.4f} | {halves[0]} | {halves[1]} | "
            f"{norms[0]} | {norms[1]} | {norms[2] if one.case.cure else ''} | {one.verdict} |"
        )
    return "\n".join(lines) + "\n"
