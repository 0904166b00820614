"""`quantize: none`: tensors are stored as floats, in `dtype`."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.checkpoint.index import TensorIndex
from streammerge.config.schema import MergeConfig
from streammerge.planning.job import Job
from streammerge.planning.quantize.base import Storage, stores


@stores("none")
def _choose(config: MergeConfig, jobs: Sequence[Job], template: TensorIndex) -> Storage:
    return Storage(tuple(jobs))
