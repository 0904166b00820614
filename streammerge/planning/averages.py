"""Averages of checkpoints: the key `checkpoints` becomes models with weights, one weighted sum for every schedule."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from streammerge.checkpoint.runs import find_run
from streammerge.config.checkpoints import Averaged, Checkpoints
from streammerge.config.schema import MergeConfig, ModelSpec
from streammerge.config.settings import parse_setting
from streammerge.config.wording import child, refuse
from streammerge.errors import ModelError, printable
from streammerge.io.files import meant
from streammerge.io.volumes import is_url
from streammerge.units import plural


def settle_checkpoints(config: MergeConfig) -> MergeConfig:
    """Return the config with the checkpoints that it selects as its models, each with its coefficient as weight.

    A checkpoint whose coefficient is 0 is not among the models.

    Raises
    ------
    InputError
        If there are none, or fewer than asked for, or a directory cannot be read.
    """
    asked = config.checkpoints
    if asked is None:
        return config
    references, notes = _find(asked)
    if asked.last is not None and asked.last > len(references):
        n = len(references)
        refuse(child(asked.path, "last"), f"{asked.last}, but there are {n} checkpoints in {_places(asked)}")
    references = references[-(asked.last or 0) :]
    coefficients = asked.schedule.coefficients(len(references))
    averaged = tuple(map(Averaged, references, coefficients))
    idle = [one for one in averaged if not one.coefficient]
    if idle:
        names = ", ".join(printable(one.reference, 80) for one in idle[:3])
        notes.append(f"the schedule {asked.schedule} gives a coefficient of 0, and does not read: {names}")
    module = config.modules[0]
    part = replace(module.slices[0], sources=_models(averaged, asked))
    normalize = parse_setting(False, child(asked.path, "schedule"))
    return replace(
        config,
        models=part.sources,
        modules=(replace(module, slices=(part,)),),
        parameters={"normalize": normalize},
        averaged=averaged,
        notes=(*config.notes, *notes),
    )


def _models(averaged: tuple[Averaged, ...], asked: Checkpoints) -> tuple[ModelSpec, ...]:
    times: Counter[str] = Counter()
    models = []
    for one in averaged:
        if one.coefficient:
            weight = parse_setting(one.coefficient, child(asked.path, "schedule"))
            spec = ModelSpec(one.reference, {"weight": weight}, path=asked.path, strip=asked.strip)
            models.append(replace(spec, again=times[one.reference]))
            times[one.reference] += 1
    return tuple(models)


def _find(asked: Checkpoints) -> tuple[list[str], list[str]]:
    """Return the references of all checkpoints, oldest first, and notes on how they were found."""
    references: list[str] = []
    notes: list[str] = []
    for text in asked.places:
        found, said = _find_in(text, asked.pattern, alone=len(asked.places) == 1)
        references += found
        notes += said
    return references, notes


def _find_in(text: str, pattern: str | None, *, alone: bool) -> tuple[list[str], list[str]]:
    """Return the same for one place: the children of a directory, or a model among several places."""
    shown, directory = printable(text, 80), Path(os.path.expanduser(text))
    if not os.path.isdir(directory):
        if alone and is_url(text):
            raise ModelError(
                f"{shown}: checkpoints are listed in local directories only: name each one's URL"
            )
        if alone:
            raise ModelError(f"{shown}: no such directory of checkpoints{meant(text)}")
        return [text], []
    run = find_run(directory, pattern)
    n = plural(len(run.names), "checkpoint")
    if run.has_model and not alone:
        return [text], [f"{shown} is taken as one model; the {n} in it are not"] if run.names else []
    if not run.names:
        what = "a model, with no checkpoints in it" if run.has_model else "no checkpoints in it"
        like = f" whose names look like {printable(pattern, 60)!r}" if pattern else ""
        cure = "name the directory that holds them, or several models"
        raise ModelError(f"{shown}: {what}{like}: {cure}")
    own = [f"{shown}: the model in it is not averaged, its {n} are"] if run.has_model else []
    return [os.path.join(text, name) for name in run.names], [*own, *run.notes]


def _places(asked: Checkpoints) -> str:
    return ", ".join(printable(place, 80) for place in asked.places[:3])
