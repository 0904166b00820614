"""Jobs and configs that tests of the planner share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from streammerge.dtypes import BITS
from streammerge.formats.refs import TensorRef
from streammerge.planning.job import Job

# --- the schedule


def make_job(
    ordinal: int,
    shape: tuple[int, ...],
    n_models: int = 2,
    dtype: str = "BF16",
    kind: str = "merge",
    out: str | None = None,
    has_base: bool = True,
    name: str | None = None,
) -> Job:
    n = math.prod(shape)
    ref = TensorRef(name or f"t{ordinal}", dtype, shape, "model.safetensors", 0, n * BITS[dtype] // 8)
    return Job(
        ordinal,
        ref.name,
        out or dtype,
        shape,
        kind,
        (ref,) * n_models,  # type: ignore[arg-type]
        ref if has_base else None,
        {},
    )


Change = Callable[[dict[str, Any]], None]


def top(**parameters: Any) -> Change:
    return lambda config: config.setdefault("parameters", {}).update(parameters)


def first(**parameters: Any) -> Change:
    return lambda config: config["models"][0].setdefault("parameters", {}).update(parameters)
