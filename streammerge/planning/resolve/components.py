"""Checks of models with several folders: every folder of the output must be in the template model, and be complete."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.names import in_component
from streammerge.config.schema import MergeConfig
from streammerge.errors import ConfigError, ModelError, printable
from streammerge.planning.job import Job


def check_pipeline(config: MergeConfig, template: TensorIndex) -> None:
    """Refuse settings of a single tokenizer for a pipeline, which has several, each with its own text encoder.

    Raises
    ------
    ConfigError
        If there are any; the message names the key.
    """
    if not template.is_pipeline:
        return
    asked = {"tokenizer_source": config.tokenizer, "chat_template": config.chat_template}
    for key, value in asked.items():
        if value is not None:
            raise ConfigError(
                f"{config.where}: {key}: {printable(template.reference)} is a pipeline, whose tokenizers are copied: leave {key} out"
            )


def check_components(template: TensorIndex, inputs: Sequence[TensorIndex], jobs: Sequence[Job]) -> None:
    """Refuse an output with a folder that the template model lacks, or without the weights of one that it has.

    Raises
    ------
    ModelError
        If so; the message has the cure.
    """
    known = {folder for index in inputs for folder in index.folders}
    if not known:
        return
    written = {in_component(job.name)[0][:-1]: job for job in reversed(jobs)}
    for folder, job in written.items():
        if folder in known and folder not in template.folders:
            raise ModelError(
                f"tensor {printable(job.name)}: {printable(template.reference)} has no component {printable(folder)}: name a model that "
                "has it first, or as the base"
            )
    for folder in template.folders:
        if folder not in written:
            raise ModelError(
                f"{printable(template.reference)}: no tensor of its component {printable(folder)} would be in the output, which would not "
                f"load: list `^{printable(folder)}/` under `exclude:` to copy it, or give it a module of its own where there "
                "are `modules:`"
            )
