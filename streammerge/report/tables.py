"""Tables of a model's tensors and of the methods, as text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.names import in_component
from streammerge.errors import InputError, printable
from streammerge.methods.registry import REQUIRED, Method, Parameter
from streammerge.report.example import example_config
from streammerge.report.wrapping import reflowed, wrapped
from streammerge.units import format_size, plural

_LISTED = 20
"""Number of tensors listed without --all."""


def inspect_values(index: TensorIndex) -> list[dict[str, Any]]:
    """Return a model's tensors as plain values.

    For a tensor with an adapter they describe the weight in its file and the adapter's rank; for a quantised tensor, its
    format, the dtype of its codes, and the size of codes and scales.
    """
    found: list[dict[str, Any]] = []
    for name, ref in index.items():
        lies = ref.stored
        component, _ = in_component(name) if index.folders else ("", name)
        entry = {
            "name": name,
            "dtype": lies.dtype,
            "shape": list(ref.shape),
            "file": component + os.path.basename(lies.path),
            "offset": lies.offset,
            "nbytes": lies.nbytes,
        }
        if ref.stored_format is not None:  # with its scales
            entry["nbytes"] = sum(part.nbytes for part in ref.parts)
        found.append({**entry, **ref.shown})
    return found


def name_filter(pattern: str | None) -> Callable[[str], bool]:
    """Return a function that tells whether a tensor's name matches; without a pattern all names do.

    Raises
    ------
    InputError
        If the pattern is not a regular expression.
    """
    if pattern is None:
        return lambda name: True
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"pattern {printable(pattern)!r} is not a regular expression: {error}") from None
    return lambda name: compiled.search(name) is not None


def inspect_text(
    index: TensorIndex, wanted: Callable[[str], bool] | None = None, *, everything: bool = False
) -> str:
    """Return a model's totals, then its tensors, one per line.

    Parameters
    ----------
    wanted
        Function that selects tensors by name, all of which are listed; None: only the first tensors.
    everything
        List all.
    """
    tensors = inspect_values(index)
    lines = [_totals(index, tensors), *_components(index)]
    if wanted is not None:
        tensors = [t for t in tensors if wanted(t["name"])]
        nbytes = format_size(sum(t["nbytes"] for t in tensors))
        lines.append(f"{plural(len(tensors), 'tensor')} of these match, {nbytes}")
    shown = tensors if everything or wanted is not None else tensors[:_LISTED]
    width = min(80, max((len(printable(t["name"])) for t in shown), default=0))
    lines += [
        f"{printable(t['name']):<{width}}  {t['dtype']:<8} {t['shape']!s:<18} {format_size(t['nbytes']):>9}  "
        f"{printable(t['file'])}"
        + (f" … in {t['chunks']} chunks" if "chunks" in t else "")
        + (f" + adapter of rank {t['adapter_rank']}" if "adapter_rank" in t else "")
        + (f": {t['stored_as']}" if "stored_as" in t else "")
        for t in shown
    ]
    if len(shown) < len(tensors):
        lines.append(f"… and {len(tensors) - len(shown):,} more: --all lists them, a PATTERN selects")
    return "\n".join(lines)


def _totals(index: TensorIndex, tensors: list[dict[str, Any]]) -> str:
    by_dtype: dict[str, int] = {}
    for t in tensors:
        by_dtype[t["dtype"]] = by_dtype.get(t["dtype"], 0) + t["nbytes"]
    totals = ", ".join(f"{dtype} {format_size(n)}" for dtype, n in sorted(by_dtype.items()))
    parameters = sum(ref.n_elements for ref in index.values())
    known = index.config.get("architectures")
    known = known[0] if isinstance(known, list) and known else index.config.get("_class_name")
    architecture = f"{printable(known, 80)}: " if isinstance(known, str) else ""
    return (
        f"{architecture}{plural(len(index), 'tensor')}, {plural(parameters, 'element')}, "
        f"{format_size(sum(by_dtype.values()))} ({totals}) in {plural(len(index.stamps), 'file')}"
    )


def _components(index: TensorIndex) -> Iterator[str]:
    """Yield a line for each folder of a model that consists of several: its tensors and their bytes."""
    width = max(map(len, index.folders), default=0)
    for folder in index.folders:
        own = [ref for name, ref in index.items() if name.startswith(f"{folder}/")]
        nbytes = format_size(sum(ref.nbytes for ref in own))
        yield f"  {printable(folder):<{width}}  {plural(len(own), 'tensor')}, {nbytes}"


def methods_text(methods: Mapping[str, Method]) -> str:
    """Return one line per method, wrapped between words on a terminal."""
    indent = max(map(len, methods)) + 2
    return wrapped("\n".join(f"{name:<{indent}}{method.summary}" for name, method in methods.items()), indent)


def method_text(method: Method) -> str:
    """Return everything about one method."""
    least, most = method.n_models
    count = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
    lines = [
        f"{method.name}  ({method.origin})",
        "",
        reflowed(method.text),
        "",
        f"models: {count}; base_model: {method.base}; access: at most {method.access}",
    ]
    if method.paper:
        lines.append(f"paper: {method.paper}")
    lines += ["", "parameters:"] + [f"  {_parameter(p)}" for p in method.parameters.values()]
    lines += [f"  preset {name}: {dict(values)}" for name, values in method.presets.items()]
    lines += [f"  {name}: accepted and ignored, {why}" for name, why in method.ignored.items()]
    lines += ["", "example:", *(f"  {line}" for line in example_config(method).splitlines())]
    return "\n".join(lines)


def _parameter(parameter: Parameter) -> str:
    kind = "|".join(parameter.choices) or "|".join(t.__name__ for t in parameter.kind)
    span = f" in [{parameter.bounds[0]:g}, {parameter.bounds[1]:g}]" if parameter.bounds else ""
    each = ", one per model" if parameter.per_model else ""
    default = " (required)" if parameter.default is REQUIRED else f" = {parameter.default}"
    return f"{parameter.name}: {kind}{span}{default}{each}"
