"""Tables for people: a model's tensors, the methods."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from streammerge.errors import printable
from streammerge.index.derived import AdaptedRef
from streammerge.index.header import TensorRef
from streammerge.index.model import TensorIndex
from streammerge.methods.registry import REQUIRED, Method, Parameter
from streammerge.units import format_size


def inspect_values(index: TensorIndex) -> list[dict[str, Any]]:
    """Return a model's tensors as plain values; of one with an adapter, the weight in its file and the adapter's rank."""
    found: list[dict[str, Any]] = []
    for name, ref in index.items():
        stored = ref.weight if isinstance(ref, AdaptedRef) else ref
        assert isinstance(stored, TensorRef)
        entry = {
            "name": name, "dtype": stored.dtype, "shape": list(stored.shape), "file": os.path.basename(stored.path),
            "offset": stored.offset, "nbytes": stored.nbytes,
        }  # fmt: skip
        adapter = {"adapter_rank": ref.rank} if isinstance(ref, AdaptedRef) else {}
        found.append(entry | adapter)
    return found


def inspect_text(index: TensorIndex) -> str:
    """Return a model's tensors, one a line, and totals by dtype."""
    tensors = inspect_values(index)
    width = min(80, max(len(printable(name)) for name in index))
    lines = [
        f"{printable(t['name']):<{width}}  {t['dtype']:<8} {t['shape']!s:<18} {format_size(t['nbytes']):>9}  "
        f"{printable(t['file'])}" + (f" + adapter of rank {t['adapter_rank']}" if "adapter_rank" in t else "")
        for t in tensors
    ]
    by_dtype: dict[str, int] = {}
    for t in tensors:
        by_dtype[t["dtype"]] = by_dtype.get(t["dtype"], 0) + t["nbytes"]
    totals = ", ".join(f"{dtype} {format_size(n)}" for dtype, n in sorted(by_dtype.items()))
    parameters = sum(ref.n_elements for ref in index.values())
    lines.append(
        f"{len(index)} tensors, {parameters:,} elements, {format_size(sum(by_dtype.values()))} ({totals}) in "
        f"{len(index.stamps)} file{'s' * (len(index.stamps) != 1)}"
    )
    return "\n".join(lines)


def methods_text(methods: Mapping[str, Method]) -> str:
    """Return one line per method."""
    width = max(map(len, methods))
    return "\n".join(f"{name:<{width}}  {method.summary}" for name, method in methods.items())


def method_text(method: Method) -> str:
    """Return everything about one method."""
    least, most = method.n_models
    count = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
    lines = [
        f"{method.name}  ({method.origin})",
        "",
        method.text,
        "",
        f"models: {count}; base_model: {method.base}; access: at most {method.access}",
    ]
    if method.paper:
        lines.append(f"paper: {method.paper}")
    lines += ["", "parameters:"] + [f"  {_parameter(p)}" for p in method.parameters.values()]
    lines += [f"  preset {name}: {dict(values)}" for name, values in method.presets.items()]
    lines += [f"  {name}: accepted and ignored, {why}" for name, why in method.ignored.items()]
    return "\n".join(lines)


def _parameter(parameter: Parameter) -> str:
    kind = "|".join(parameter.choices) or "|".join(t.__name__ for t in parameter.kind)
    span = f" in [{parameter.bounds[0]:g}, {parameter.bounds[1]:g}]" if parameter.bounds else ""
    each = ", one per model" if parameter.per_model else ""
    default = " (required)" if parameter.default is REQUIRED else f" = {parameter.default}"
    return f"{parameter.name}: {kind}{span}{default}{each}"
