"""Describe stores of Fisher diagonals and Gram matrices to users."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from streammerge.checkpoint.companions import CompanionIndex
from streammerge.errors import printable
from streammerge.estimate.store_run import Written
from streammerge.lazy import late_pattern
from streammerge.machine import peak_memory
from streammerge.units import format_seconds, format_size, plural

_LAYER = late_pattern(r"^(.*?\.\d+)(?:\.|$)")
_SHOWN = 12


def imported_text(imported: Written) -> str:
    """Return a text on the result of an import."""
    about = imported.about
    stored = sum(entry["stored_nbytes"] for entry in about["tensors"].values())
    resumed = f", {imported.resumed} of them by an earlier run" if imported.resumed else ""
    return (
        f"wrote {printable(imported.out)}: {plural(imported.tensors, 'tensor')}{resumed}, {about['elements']:,} certainties in "
        f"{format_size(stored)}; norm {about['norm']:.6g}"
    )


def computed_values(computed: Written) -> dict[str, Any]:
    """Return the result of a run over examples as plain values."""
    about = {key: value for key, value in computed.about.items() if key != "tensors"}
    return {
        "out": computed.out,
        "tensors": computed.tensors,
        "bytes_read": computed.bytes_read,
        "seconds": round(computed.seconds, 3),
        "peak_resident_bytes": peak_memory(),
        **about,
    }


def computed_text(computed: Written) -> str:
    """Return a text on the result of a run over examples."""
    about = computed.about
    stored = sum(entry["stored_nbytes"] for entry in about["tensors"].values())
    what = f"{about['elements']:,} certainties" if "estimator" in about else "Gram matrices"
    labels = f", {about['estimator']} labels" if "estimator" in about else ""
    return (
        f"wrote {printable(computed.out)}: {plural(computed.tensors, 'tensor')}, {what} in {format_size(stored)}\n"
        f"{plural(about['examples'], 'example')}, {plural(about['tokens'], 'token')}{labels}; read {format_size(computed.bytes_read)} in "
        f"{format_seconds(computed.seconds)}, peak memory {format_size(peak_memory())}"
    )


def info_text(store: CompanionIndex) -> str:
    """Return a text with totals, each layer's share of the sum, and the undecided parameters."""
    about, tensors = store.about, store.about["tensors"]
    stored = sum(entry["stored_nbytes"] for entry in tensors.values())
    width = 2 if about.get("dtype") == "BF16" else 4
    raw = width * sum(math.prod(entry["shape"]) for entry in tensors.values())
    lines = [
        f"model      {printable(about.get('model_name'))} ({printable(about.get('model_fingerprint'))})",
        f"estimate   {_estimate(about)}",
        f"tensors    {len(tensors)}, {about.get('elements', 0):,} certainties, {printable(about.get('dtype'))}",
        f"stored     {format_size(stored)}, {100 * stored / max(1, raw):.1f} % of {format_size(raw)}",
        f"sum        {about.get('sum', 0.0):.6g}, norm {about.get('norm', 0.0):.6g}, "
        f"largest {max(entry['largest'] for entry in tensors.values()):.6g}",
        "",
        "share of the sum, by layer:",
    ]
    lines += [f"  {100 * share:6.2f} %  {printable(layer, 80)}" for layer, share in _shares(tensors).items()]
    lines += ["", *_undecided(about, tensors)]
    return "\n".join(lines)


def gram_info_text(store: CompanionIndex) -> str:
    """Return a text on the source of a store of Gram matrices, and its largest matrices."""
    about, tensors = store.about, store.about["tensors"]
    stored = sum(entry["stored_nbytes"] for entry in tensors.values())
    largest = sorted(tensors, key=lambda name: (-math.prod(tensors[name]["shape"]), name))
    lines = [
        f"model      {printable(about.get('model_name'))} ({printable(about.get('model_fingerprint'))})",
        f"examples   {printable(about.get('examples', 'unknown'))}, {printable(about.get('tokens', 'unknown'))} tokens",
        f"matrices   {len(tensors)}, {format_size(stored)} as stored",
        "",
        "the largest:",
    ]
    lines += [
        f"  {' x '.join(map(str, tensors[name]['shape'])):>15}  {printable(name, 80)}"
        for name in largest[:_SHOWN]
    ]
    return "\n".join(lines)


def _estimate(about: Mapping[str, Any]) -> str:
    parts = [printable(about["estimator"])] if about.get("estimator") else ["of unknown kind"]
    if about.get("examples") is not None:
        parts.append(f"{about['examples']} examples")
    if about.get("seed") is not None:
        parts.append(f"seed {about['seed']}")
    return ", ".join(parts)


def _shares(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return each layer's share of the sum; tensors outside the layers are listed separately."""
    sums: dict[str, float] = {}
    for name, entry in tensors.items():
        match = _LAYER.match(name)
        layer = match[1] if match else name
        sums[layer] = sums.get(layer, 0.0) + entry["sum"]
    total = sum(sums.values())
    return {layer: value / total if total else 0.0 for layer, value in sums.items()}


def _undecided(about: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return lines on parameters without information: a diagonal of 0, or no diagonal."""
    sizes = {name: math.prod(entry["shape"]) for name, entry in tensors.items()}
    partly = {name: entry["zeros"] / sizes[name] for name, entry in tensors.items() if entry["zeros"]}
    missing = about.get("missing") or []
    total, zeros = sum(sizes.values()), sum(entry["zeros"] for entry in tensors.values())
    lines = [f"undecided: {zeros:,} of {total:,} certainties are 0 ({100 * zeros / max(1, total):.3g} %)"]
    worst = sorted(partly, key=lambda name: (-partly[name], name))
    lines += [f"  {100 * partly[name]:6.2f} %  {printable(name, 80)}" for name in worst[:_SHOWN]]
    if len(worst) > _SHOWN:
        lines.append(f"  and {len(worst) - _SHOWN} more tensors")
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        lines.append(f"no diagonal: {', '.join(printable(name, 80) for name in missing[:_SHOWN])}{more}")
    return lines
