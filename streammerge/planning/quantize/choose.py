"""The way an output is stored: what the config key `quantize` says, each value one file of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import streammerge.planning.quantize.fp8
import streammerge.planning.quantize.plain  # noqa: F401  (these register themselves)
from streammerge.checkpoint.index import TensorIndex
from streammerge.config.schema import MergeConfig
from streammerge.errors import ConfigError, printable
from streammerge.planning.job import Job
from streammerge.planning.quantize.base import Storage, choice_of


def choose_storage(config: MergeConfig, jobs: Sequence[Job], template: TensorIndex) -> Storage:
    """Return how each tensor of the output is stored.

    Raises
    ------
    InputError
        If it cannot be stored as the config says.
    """
    storage = choice_of(config.quantize)(config, jobs, template)
    if storage.declared is not None and template.folders:
        raise ConfigError(
            f"{config.where}: quantize: {printable(template.reference)} has weights in several folders "
            f"({printable(template.folders[0], 80)}/ …), whose libraries do not read this: leave `quantize` out"
        )
    return storage
