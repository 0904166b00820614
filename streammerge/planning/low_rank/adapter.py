"""The plan of an adapter: its modules, and where each one's tensors come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from streammerge.checkpoint.module_names import architecture_of
from streammerge.config.lora import LoraOutput
from streammerge.formats.refs import SourceRef
from streammerge.planning.low_rank.sorting import Kind, is_expert, named
from streammerge.records import dataclass

PREFIX = "base_model.model."
"""Beginning of all names in an adapter's file."""
_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("BartForConditionalGeneration", "SEQ_2_SEQ_LM"),
)
"""PEFT's task types, by the ending of the architecture's name. Those of classifiers would store the classifier whole."""


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that is stored whole."""

    name: str
    """Its name among the modules that PEFT sees."""
    job: int
    base: SourceRef | None
    """The base's tensor: if both hold the same, it is not stored. None: the base has none of this shape."""


@dataclass(frozen=True)
class FactoredModule:
    """A module whose weight is stored as factors."""

    name: str
    job: int
    kind: Kind
    shape: tuple[int, ...]
    """The shape of the weight."""
    turned: bool
    """Whether the rows of the weight are its inputs."""
    bias: SavedTensor | None = None
    depth: int = 0
    """Number of PEFT's wrappers around its own, if it is a parameter of experts: one per parameter that follows it."""

    @property
    def is_parameter(self) -> bool:
        """Whether it is no module, but a parameter with the matrices of several experts, or with their biases."""
        return self.kind == "experts"

    @property
    def of_experts(self) -> bool:
        """Whether it belongs to experts, which have factors all together or not at all."""
        return self.is_parameter or is_expert(self.name)

    def factors(self, rank: int) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
        """Return name and shape of A and B in the adapter's file."""
        stem, rest = PREFIX + self.name, self.shape[1:]
        if self.is_parameter:
            stem = PREFIX + self.name.rpartition(".")[0] + ".base_layer" * self.depth
            *experts, rows, columns = self.shape
            inputs, outputs = (rows, columns) if self.turned else (columns, rows)
            rank *= math.prod(experts)
            return (f"{stem}.lora_A.weight", (rank, inputs)), (f"{stem}.lora_B.weight", (outputs, rank))
        if self.kind == "embedding":
            return (f"{stem}.lora_embedding_A", (rank, self.shape[0])), (
                f"{stem}.lora_embedding_B",
                (self.shape[1], rank),
            )
        inputs, outputs = (self.shape[0], self.shape[1]) if self.turned else (rest[0], self.shape[0])
        ones = (1,) * (len(rest) - 1)
        return (f"{stem}.lora_A.weight", (rank, inputs, *rest[1:])), (
            f"{stem}.lora_B.weight",
            (outputs, rank, *ones),
        )


@dataclass(frozen=True)
class SavedModule:
    """A module that is stored whole, if any of its tensors differs from the base's."""

    name: str
    tensors: tuple[SavedTensor, ...]


@dataclass(frozen=True)
class AdapterPlan:
    """What an adapter will hold."""

    base: str
    """The reference of the model that it belongs to."""
    asked: LoraOutput
    factored: tuple[FactoredModule, ...]
    saved: tuple[SavedModule, ...]
    modules: tuple[str, ...]
    """The names of all modules of the model."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The base's config.json."""
    biases: tuple[SavedTensor, ...] = ()
    """Biases of modules whose weight is that of the base."""
    loose: tuple[tuple[str, SourceRef, SourceRef | None], ...] = ()
    """Tensors that no adapter can change, with the base's; they must be equal."""

    def config(self, ranks: Mapping[str, int], saved: Sequence[str], bias: str) -> dict[str, Any]:
        """Return adapter_config.json.

        Parameters
        ----------
        ranks
            The rank of each module with factors.
        saved
            The modules that are stored whole.
        bias
            Which biases are stored: `none`, `lora_only` or `all`.
        """
        rank = max(ranks.values(), default=0)
        other = {name: own for name, own in ranks.items() if own != rank}
        every = [name for name in self.modules if name not in saved]
        turned = {module.name for module in self.factored if module.turned and module.kind == "linear"}
        parameters = [module.name for module in self.factored if module.is_parameter and module.name in ranks]
        of_parameters: dict[str, Any] = {}
        if parameters:  # whose layout is that of this version
            of_parameters = {"target_parameters": parameters, "peft_version": "0.19.0"}
        return {
            **of_parameters,
            "alpha_pattern": other,
            "base_model_name_or_path": self.base,
            "bias": bias,
            "fan_in_fan_out": any(name in turned for name in ranks),
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "modules_to_save": named(saved, self.modules, divider="") or None,
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": other,
            "target_modules": named([name for name in ranks if name not in parameters], every, divider="."),
            "task_type": self._task(),
            "use_dora": False,
            "use_rslora": False,
        }

    def _task(self) -> str | None:
        name = architecture_of(self.settings)
        return next((task for end, task in _TASKS if name.endswith(end)), None)
