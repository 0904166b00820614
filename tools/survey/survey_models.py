"""The models of the survey, and a bench that merges them with streammerge and counts what the merges get right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from finetune_minilm import Encoder
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers.utils import logging

from streammerge import merge
from streammerge.demo import digits
from streammerge.methods.registry import get_method

Flags = NDArray[np.bool_]
Scores = dict[str, list[int]]
"""Each task's right answers and examples of the tuning half, right answers and examples of the report half."""

MEMORY = "1GiB"
CORRECTIONS = ("svc", "subspace_boosting")
"""Methods that correct a merge of the same models."""


class Part(Protocol):
    """A base, its fine-tunes, and the test of each one's task."""

    name: str
    title: str
    tasks: tuple[str, ...]
    matrices: str | None
    """Regular expression of its matrices; None: those of its layers."""

    def model(self, name: str) -> Path:
        """Directory of `base` or of a task's fine-tune."""

    def right(self, directory: Path, tasks: Sequence[str]) -> dict[str, Flags]:
        """Return the test examples of each task that the model in `directory` gets right."""


class Demo:
    """The four shipped fine-tunes of a small convolutional network."""

    name = "demo"
    title = "Demo: four fine-tunes of a small convolutional network"
    tasks: tuple[str, ...] = digits.TASKS
    matrices: str | None = "hidden|head"

    def model(self, name: str) -> Path:
        """Directory inside the package."""
        return digits.model_dir(name)

    def right(self, directory: Path, tasks: Sequence[str]) -> dict[str, Flags]:
        """Over the shipped test images."""
        weights, (images, labels) = digits.load_model(directory), digits.test_images()
        return {t: digits.logits(weights, digits.view(t, images)).argmax(axis=1) == labels for t in tasks}


class MiniLM:
    """The fine-tunes that `finetune_minilm.py train` wrote."""

    name = "minilm"
    title = "MiniLM: three fine-tunes of a sentence transformer"
    tasks: tuple[str, ...] = ("sections", "languages", "code")
    matrices: str | None = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def model(self, name: str) -> Path:
        """Directory below the one that was given."""
        return self.directory / name

    def right(self, directory: Path, tasks: Sequence[str]) -> dict[str, Flags]:
        """Over each task's `test.jsonl`, with the task's own head."""
        logging.disable_progress_bar()
        encoder, found = Encoder(directory), {}
        for task in tasks:
            labels = json.loads((self.model(task) / "labels.json").read_text())
            lines = (self.model(task) / "test.jsonl").read_text("utf-8").splitlines()
            tests = [json.loads(line) for line in lines]
            head = load_file(self.model(task) / "head.safetensors")
            features = encoder.all_features([test["text"] for test in tests])
            logits = features @ head["weight"].T + head["bias"]
            found[task] = (
                logits.argmax(1) == torch.tensor([labels.index(test["label"]) for test in tests])
            ).numpy()
        return found


def accuracy(scores: Scores, half: str = "all") -> float:
    """Mean over the tasks, 0..1; `half` is `tune`, `report` or `all`."""
    first, stop = {"tune": (0, 2), "report": (2, 4), "all": (0, 4)}[half]
    each = [sum(row[first:stop:2]) / sum(row[first + 1 : stop : 2]) for row in scores.values()]
    return sum(each) / len(each)


@dataclass
class Bench:
    """Merges and scores; a score that is in the work directory already is not computed again."""

    part: Part
    work: Path
    known: dict[str, Scores] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                entry = json.loads(line)
                self.known[entry["key"]] = entry["scores"]

    def diagonal(self, task: str) -> Path:
        """Zarr store of the Fisher diagonal of a task's fine-tune."""
        return self.work / "fisher" / f"{task}.zarr"

    def config(
        self, method: str, tasks: Sequence[str], parameters: Mapping[str, Any], seed: int = 0
    ) -> dict[str, Any] | str:
        """Config of a merge of some tasks' fine-tunes; the parameters are the same for all of them.

        A method that corrects a merge corrects the sum of the task vectors, a stage of its own.
        """
        models: list[Any] = [{"model": str(self.part.model(task))} for task in tasks]
        if method.endswith("fisher"):
            for task, model in zip(tasks, models, strict=True):
                model["fisher"] = str(self.diagonal(task))
        config = {"merge_method": method, "models": models, "parameters": dict(parameters), "seed": seed}
        if method not in ("linear", "fisher") or "drop_rate" in parameters:
            config["base_model"] = str(self.part.model("base"))
        if self.part.matrices is not None and get_method(method).matrices:
            config["matrices"] = self.part.matrices
        if method not in CORRECTIONS:
            return config
        total = {"name": "total", "merge_method": "task_arithmetic", "base_model": config["base_model"]}
        return yaml.safe_dump_all(
            [{**total, "models": models, "dtype": "float32"}, {**config, "models": ["total", *models]}]
        )

    def score(
        self,
        method: str,
        tasks: Sequence[str] = (),
        on: Sequence[str] = (),
        seed: int = 0,
        **parameters: Any,
    ) -> Scores:
        """Merge the fine-tunes of `tasks` (all) and score the merge `on` some tasks (those)."""
        tasks = tuple(tasks) or self.part.tasks
        on = tuple(on) or tasks
        parameters = {name.rstrip("_"): value for name, value in parameters.items()}
        key = json.dumps([method, tasks, on, seed, parameters], sort_keys=True)
        if key not in self.known:
            out = self.merged(method, tasks, seed, **parameters)
            self._add(key, self._count(out, on))
        return self.known[key]

    def score_model(self, name: str, on: Sequence[str] = ()) -> Scores:
        """Score `base` or a fine-tune as it is."""
        on = tuple(on) or self.part.tasks
        key = json.dumps(["model", name, on])
        if key not in self.known:
            self._add(key, self._count(self.part.model(name), on))
        return self.known[key]

    def merged(self, method: str, tasks: Sequence[str], seed: int = 0, **parameters: Any) -> Path:
        """Merge; the result is overwritten by the next merge."""
        out = self.work / "merged"
        merge(self.config(method, tasks, parameters, seed), out, memory=MEMORY, threads=1, overwrite=True)
        return out

    def _count(self, directory: Path, on: Sequence[str]) -> Scores:
        """Even examples are the tuning half, odd ones the report half."""
        found = self.part.right(directory, on)
        halves = {task: (flags[0::2], flags[1::2]) for task, flags in found.items()}
        return {
            task: [n for half in pair for n in (int(half.sum()), len(half))] for task, pair in halves.items()
        }

    def _add(self, key: str, scores: Scores) -> None:
        self.known[key] = scores
        with self._file.open("a") as file:
            file.write(json.dumps({"key": key, "scores": scores}) + "\n")

    @property
    def _file(self) -> Path:
        return self.work / "scores.jsonl"
