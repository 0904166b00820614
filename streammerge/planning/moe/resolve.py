"""Resolve a mixture of experts to jobs: each tensor is a copy of the base's, of an expert's, or a gate.

::

    base      everything but the MLPs       -> under its own name
    experts   mlp.{gate,up,down}_proj       -> under the expert's name, or several joined in a fused tensor
    gates     one row per expert and layer  -> `Gates`, computed before the merge begins, or drawn from the seed
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.refs.blocks import Block, BlocksRef
from streammerge.checkpoint.refs.gates import ChangedRef, Distribution, DrawnRef, GateRef, Gates, InventedRef
from streammerge.config.moe import ExpertSpec, MoeSpec
from streammerge.config.schema import MergeConfig
from streammerge.config.wording import child, refuse
from streammerge.dtypes import FLOATS
from streammerge.errors import ModelError, printable
from streammerge.formats.refs import SourceRef
from streammerge.lazy import late_pattern
from streammerge.numerics.philox import derive_key
from streammerge.planning.job import Job
from streammerge.planning.moe.families import FAMILIES, Family
from streammerge.planning.moe.targets import PARTS, Sizes, Target, choose_target
from streammerge.planning.resolve.assemble import Indexes
from streammerge.planning.resolve.jobs import Lender, Resolved
from streammerge.records import dataclass

_LAYER = late_pattern(r"model\.layers\.(\d+)\.(.+)", re.DOTALL)
_OUTER = frozenset({"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"})
_BLOCK_NBYTES = 300
"""Bytes per weight that is joined with others, for its place there and its reference."""
_LEFT_OUT = "rotary_emb.inv_freq"
"""A buffer in old checkpoints that loaders compute themselves."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: its jobs, its settings and its gates."""

    resolved: Resolved
    settings: Mapping[str, Any]
    """The content of config.json, apart from what follows from the output's dtypes."""
    gates: Gates | None
    """The gates to compute; None if they are drawn."""
    gate_bytes: int
    """Bytes of memory that they take."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its lists take in addition to those of its jobs."""
        blocks = sum(ref.n_blocks for job in self.resolved.jobs for ref in job.sources)
        return self.gate_bytes + _BLOCK_NBYTES * blocks


def resolve_experts(config: MergeConfig, template: TensorIndex, indexes: Indexes, seed: int) -> Mixture:
    """Return the mixture of experts that a config describes.

    Parameters
    ----------
    template
        The base.
    indexes
        The models under the base's names, by reference.

    Raises
    ------
    ConfigError
        If the architecture does not suit the base or the experts.
    ModelError
        If an expert does not fit the base, or the base has a tensor that the architecture has no place for.
    """
    spec = config.moe
    assert spec is not None
    family = _family_of(template)
    target = choose_target(spec, family.model_type, config.where)
    if spec.names == "fused" and not target.fused:
        refuse(
            child(f"{config.where}:", "expert_names"),
            f"{target.title} has no fused form that a library reads: use 'classic'",
        )
    base = _Base(template, target)
    experts = [_Expert(one, i, indexes[one.reference], base, seed) for i, one in enumerate(spec.every)]
    sizes = _sizes(spec, experts)
    gated = spec.every if target.shared_gate else spec.experts
    _check_shared_prompts(spec, target)
    gates = Gates(gated, len(base.layers)) if spec.reads_prompts else None
    maker = _Maker(config, spec, target, base, experts, gates, seed)
    jobs = tuple(maker.jobs())
    settings = family.completed(template.config)
    settings |= target.settings(settings, spec, sizes)
    settings |= {"architectures": [target.class_name], "model_type": target.model_type}
    if target.model_type != "deepseek":
        settings.pop("auto_map", None)
    resolved = Resolved(jobs, tuple(maker.lenders), (), (*config.notes, *_notes(spec, target, settings)))
    rows = 0 if gates is None else len(base.layers) * len(gated)
    return Mixture(resolved, settings, gates, 4 * rows * base.hidden)


def _family_of(template: TensorIndex) -> Family:
    kind = template.config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        said = printable(kind, 60) if kind else "not said"
        raise ModelError(
            f"{printable(template.reference)}: config.json: model_type {said}: a mixture of experts is built from a base of type "
            f"{', '.join(FAMILIES)}"
        )
    return family


class _Base:
    """The base: its tensors outside the MLPs by layer, and the shapes that experts must have."""

    def __init__(self, index: TensorIndex, target: Target) -> None:
        self.index = index
        numbers = set()
        self.names: list[str] = []
        for name in index:
            layer = _LAYER.fullmatch(name)
            inner = layer.group(2) if layer else ""
            if inner.endswith(_LEFT_OUT) or name.endswith(_LEFT_OUT):
                continue
            is_mlp = inner in _MLP
            if not is_mlp and inner not in target.layer and name not in _OUTER:
                raise ModelError(
                    f"{printable(index.reference)}: tensor {printable(name)}: {target.title} has no place for it: choose a base without "
                    "it, or a different `architecture`"
                )
            if layer:
                numbers.add(int(layer.group(1)))
            self.names.append(name)
        self.layers = range(len(numbers))
        if not numbers or numbers != set(self.layers):
            raise ModelError(
                f"{printable(index.reference)}: its layers are not numbered from 0 without gaps (model.layers.N)"
            )
        self.embedding = self._tensor("model.embed_tokens.weight")
        for inner in (*sorted(target.required), "mlp.gate_proj.weight"):
            for number in self.layers:
                name = f"model.layers.{number}.{inner}"
                if "_proj" in inner and len(self._tensor(name).shape) != 2:
                    raise ModelError(f"{printable(index.reference)}: tensor {name} is not a matrix")
                self._tensor(name)
        if len(self.embedding.shape) != 2:
            raise ModelError(
                f"{printable(index.reference)}: tensor model.embed_tokens.weight is not a matrix"
            )
        self.hidden = self.embedding.shape[1]
        # A library builds the layers that config.json says before it looks for their tensors.
        for key, found in (("num_hidden_layers", len(numbers)), ("hidden_size", self.hidden)):
            if index.config.get(key) != found:
                raise ModelError(
                    f"{printable(index.reference)}: config.json: {key} is {printable(index.config.get(key), 40)}, but the tensors have {found}"
                )

    def _tensor(self, name: str) -> SourceRef:
        if name not in self.index:
            raise ModelError(f"{printable(self.index.reference)}: tensor {name} is missing")
        return self.index[name]


_MLP = {f"mlp.{part}.weight": part for part in PARTS}


class _Expert:
    """One expert: the MLPs of a model, with its noise and factor."""

    def __init__(self, spec: ExpertSpec, number: int, index: TensorIndex, base: _Base, seed: int) -> None:
        self.spec, self._number, self._index, self._seed = spec, number, index, seed
        self._base = base
        first = self._found(0, "gate_proj")
        self.intermediate = first.shape[0] if first.shape else 0
        self._check_activation()
        for layer in base.layers:
            for part in PARTS:
                self._check_shape(self._found(layer, part), layer, part)
        more = f"model.layers.{len(base.layers)}."
        if any(name.startswith(more) for name in index):
            raise self._unfit(
                f"has more layers than the base {printable(base.index.reference)} ({len(base.layers)})"
            )

    def weight(self, layer: int, part: str) -> SourceRef:
        """Return a weight, with noise and factor if the config has them."""
        ref = self._found(layer, part)
        scale = self.spec.scale if part == "down_proj" else 1.0
        if not self.spec.noise and scale == 1.0:
            return ref
        name = _dense_name(layer, part)
        key = derive_key(self._seed, "moe noise", str(self._number), name)
        return ChangedRef(ref, name, self.spec.noise, scale, key)

    def _found(self, layer: int, part: str) -> SourceRef:
        name = _dense_name(layer, part)
        ref = self._index.get(name)
        if ref is None:
            raise self._unfit(
                f"tensor {name} is missing, so it cannot be an expert of the base {printable(self._base.index.reference)}"
            )
        if ref.dtype not in FLOATS:
            raise self._unfit(
                f"tensor {name} is {ref.dtype}, not a floating-point dtype: dequantise the model first"
            )
        return ref

    def _check_shape(self, ref: SourceRef, layer: int, part: str) -> None:
        wanted = (self.intermediate, self._base.hidden)
        if part == "down_proj":
            wanted = wanted[::-1]
        if ref.shape != wanted:
            raise self._unfit(
                f"tensor {_dense_name(layer, part)} has shape {list(ref.shape)}, but an expert of "
                f"{printable(self._base.index.reference)} needs {list(wanted)}: take experts of one size"
            )

    def _check_activation(self) -> None:
        own, theirs = (one.config.get("hidden_act", "silu") for one in (self._index, self._base.index))
        if own != theirs:
            raise self._unfit(
                f"its activation is {printable(own, 40)}, that of the base {printable(theirs, 40)}: take experts of one kind"
            )

    def _unfit(self, what: str) -> ModelError:
        return ModelError(f"{self.spec.path}: {printable(self._index.reference)}: {what}")


def _dense_name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.{part}.weight"


def _sizes(spec: MoeSpec, experts: list[_Expert]) -> Sizes:
    """Return the sizes of the mixture; refuse experts of different sizes."""
    first = experts[0]
    for expert in experts[1:]:
        if expert.intermediate != first.intermediate:
            raise ModelError(
                f"{expert.spec.path}: {printable(expert.spec.reference)}: its MLPs have {expert.intermediate} intermediate features, "
                f"those of {printable(first.spec.reference)} {first.intermediate}: take experts of one size"
            )
    return Sizes(len(spec.experts), first.intermediate, first.intermediate if spec.shared else 0)


def _check_shared_prompts(spec: MoeSpec, target: Target) -> None:
    """Refuse a shared expert whose gate is to be computed from prompts that it does not have."""
    for expert in spec.shared:
        if spec.reads_prompts and target.shared_gate and not expert.positive:
            refuse(
                expert.path,
                f"'positive_prompts' is missing: the shared expert of {target.title} has a gate, which gate_mode "
                f"'{spec.gate_mode}' computes from prompts: list some, or use gate_mode 'random'",
            )


def _notes(spec: MoeSpec, target: Target, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield warnings on mixtures that do not do what people expect."""
    routed = [(expert.reference, expert.noise) for expert in spec.experts]
    if len(routed) > 1 and len(set(routed)) == 1 and not routed[0][1]:
        yield (
            "all experts are the same model, so the mixture computes what that model computes until it is trained: give "
            "experts a noise_scale, or take different models"
        )
    if not target.shared_gate and any(expert.prompts for expert in spec.shared):
        yield f"shared_experts: the prompts have no effect: a shared expert of {target.title} has no gate"
    if target.model_type == "qwen3_moe" and settings.get("use_sliding_window"):
        yield "config.json: use_sliding_window: Qwen3-MoE applies the window in all layers, the base only in some"


class _Maker:
    """Makes the jobs of a mixture, layer by layer in the base's order."""

    def __init__(
        self,
        config: MergeConfig,
        spec: MoeSpec,
        target: Target,
        base: _Base,
        experts: list[_Expert],
        gates: Gates | None,
        seed: int,
    ) -> None:
        self._config, self._spec, self._target, self._base = config, spec, target, base
        self._routed, self._shared = experts[: len(spec.experts)], experts[len(spec.experts) :]
        self._gates, self._seed = gates, seed
        self._count = 0
        self.lenders: list[Lender] = []

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs in the order of the base's tensors; a layer's mixture comes in place of its first MLP tensor."""
        done: set[int] = set()
        for name in self._base.names:
            layer = _LAYER.fullmatch(name)
            if layer is None or layer.group(2) not in _MLP:
                yield self._copy(name, self._base.index[name])
            elif (number := int(layer.group(1))) not in done:
                done.add(number)
                for inner, ref in self._layer(number):
                    yield self._copy(f"model.layers.{number}.{inner}", ref)

    def _copy(self, name: str, ref: SourceRef) -> Job:
        if ref.dtype not in FLOATS:
            raise ModelError(
                f"{printable(self._base.index.reference)}: tensor {printable(name)} is {ref.dtype}, not a floating-point dtype: "
                "dequantise the model first"
            )
        dtype = self._dtype(ref)
        source = ref.as_stored(dtype).renamed(name)
        job = Job(self._count, name, dtype, ref.shape, "copy", (source,), None, {})
        self._count += 1
        self.lenders.append(Lender(self._base.index.reference, name, ref))
        return job

    def _dtype(self, ref: SourceRef) -> str:
        """Return the config's dtype, or that in which a tensor is stored; gates have that of the embedding."""
        if self._config.dtype is not None:
            return self._config.dtype
        stored = (self._base.embedding if isinstance(ref, InventedRef) else ref).stored_dtype
        return "BF16" if isinstance(ref, InventedRef) and stored not in FLOATS else stored

    def _layer(self, layer: int) -> Iterator[tuple[str, SourceRef]]:
        """Yield the tensors of a layer's mixture, with their names in the layer."""
        target = self._target
        for name in target.zero_biases:
            if f"model.layers.{layer}.{name}" not in self._base.index:
                yield name, self._zeros(layer, name)
        yield target.gate[self._spec.names], self._gate(layer, 0, len(self._routed))
        yield from self._fused(layer) if self._spec.names == "fused" else self._one_by_one(layer)
        for expert in self._shared:
            for part in PARTS:
                yield target.shared_expert.format(part=target.parts[part]), expert.weight(layer, part)
        if self._shared and target.shared_gate:
            yield target.shared_gate, self._gate(layer, len(self._routed), len(self._routed) + 1)

    def _one_by_one(self, layer: int) -> Iterator[tuple[str, SourceRef]]:
        for number, expert in enumerate(self._routed):
            for part in PARTS:
                name = self._target.expert.format(expert=number, part=self._target.parts[part])
                yield name, expert.weight(layer, part)

    def _fused(self, layer: int) -> Iterator[tuple[str, SourceRef]]:
        yield "mlp.experts.gate_up_proj", self._joined(layer, ("gate_proj", "up_proj"))
        yield "mlp.experts.down_proj", self._joined(layer, ("down_proj",))

    def _joined(self, layer: int, parts: tuple[str, ...]) -> SourceRef:
        """Return weights of all experts as one tensor, [experts, rows of all parts, columns]."""
        weights = [expert.weight(layer, part) for expert in self._routed for part in parts]
        rows, columns = weights[0].shape
        blocks = tuple(Block(ref, 0, columns, i * rows, 0, rows, columns) for i, ref in enumerate(weights))
        dtypes = {ref.dtype for ref in weights}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
        shape = (len(self._routed), rows * len(parts), columns)
        return BlocksRef(f"model.layers.{layer}.mlp.experts", dtype, shape, blocks)

    def _gate(self, layer: int, first: int, end: int) -> SourceRef:
        shape = (end - first, self._base.hidden)
        name = f"model.layers.{layer}.mlp.{'shared_expert_gate' if first else 'gate'}.weight"
        if self._gates is not None:
            return GateRef(self._base.embedding, name, shape, self._gates, layer, first)
        kind: Distribution = "normal" if self._spec.gate_mode == "random" else "uniform"
        limit = 1.0 if kind == "normal" else self._base.hidden**-0.5
        key = derive_key(self._seed, "moe gate", "", name)
        return DrawnRef(self._base.embedding, name, shape, kind, key, limit)

    def _zeros(self, layer: int, name: str) -> SourceRef:
        weight = self._base.index[f"model.layers.{layer}.{name.removesuffix('.bias')}.weight"]
        return DrawnRef(self._base.embedding, name, weight.shape[:1], "zero")


def with_settings(template: TensorIndex, mixture: Mixture) -> TensorIndex:
    """Return the base with the settings of the mixture, as the template of the output's files."""
    return replace(template, config=mixture.settings)
