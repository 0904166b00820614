"""`output: lora`: the jobs that compute an adapter's factors, and those of the tensors that it stores whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from streammerge.algebra.low_rank import computed_rank
from streammerge.checkpoint.module_names import architecture_of, namer
from streammerge.checkpoint.names import embedding_of, flag_of, is_embedding, is_head
from streammerge.checkpoint.refs.difference import DifferenceRef, SumOfProductsRef
from streammerge.dtypes import FLOATS8
from streammerge.errors import ConfigError, ModelError, printable
from streammerge.formats.refs import SourceRef
from streammerge.planning.job import Job
from streammerge.planning.low_rank.adapter import AdapterPlan, FactoredModule, SavedModule, SavedTensor
from streammerge.planning.low_rank.changes import coefficients_of, is_same, sum_of_products
from streammerge.planning.low_rank.fused_experts import check_parameter, depth_of, form_of
from streammerge.planning.low_rank.sorting import FACTORED, Kind, Sorter, is_expert, modules_of
from streammerge.planning.quantize.base import Material, Storage, stores
from streammerge.planning.resolve.find import Finder
from streammerge.planning.resolve.jobs import is_plain_copy
from streammerge.tensors.encoders.low_rank import LowRank

MERGE = "(the merge)"
"""The name of the stage whose result an adapter is made of."""


_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of the names of architectures with an output head."""


class MergeNeededError(Exception):
    """A change is neither the difference of two models nor a sum of adapters: the merge must be a stage."""


@stores("lora")
def _choose(material: Material) -> Storage:
    _check(material)
    return _Choice(material).storage()


def _check(material: Material) -> None:
    """Refuse what no adapter can express."""
    config, template = material.config, material.template
    asked = config.lora
    assert asked is not None
    if asked.base is None and config.base_model is None:
        raise ConfigError(
            f"{config.where}: output: lora is the result minus its base: set `base_model`, or `base` under `output`"
        )
    where = f"{config.where}: output: lora"
    if (config.out_dtype or config.dtype) in FLOATS8:
        raise ConfigError(f"{config.where}: dtype: the factors would overflow FP8: use bfloat16 or wider")
    if config.quantize != "none":
        raise ConfigError(f"{where}: the factors are floats: leave `quantize` out")
    if any(module.is_sliced or module.name is not None for module in config.modules):
        raise ConfigError(f"{where}: an adapter keeps the base's layers: list whole `models`, without slices")
    if config.tokenizer is not None:
        raise ConfigError(f"{where}: an adapter keeps the base's vocabulary: leave the tokenizer keys out")
    if template.folders:
        raise ConfigError(
            f"{where}: adapters of several folders of weights are not written: merge the models"
        )


class _Choice:
    """Chooses the form of every tensor of one adapter."""

    def __init__(self, material: Material) -> None:
        self._material, config = material, material.config
        assert config.lora is not None
        self._asked = config.lora
        self._reference = self._asked.base or config.base_model or ""
        self._finder = Finder(material.indexes, None, {})
        jobs = {job.name: job for job in material.jobs}
        self._jobs: dict[str, Job] = jobs
        self._bases = {name: self._base_of(job) for name, job in jobs.items()}
        settings = material.template.config
        shapes = {name: job.shape for name, job in jobs.items()}
        self._sorter = Sorter(
            shapes, {name: job.sources[0].dtype for name, job in jobs.items()}, settings, self._asked
        )
        self._written: list[Job] = []
        self._named = namer(settings, jobs)
        self._tied = flag_of(settings) is not False and not any(map(is_head, jobs))
        """Whether the head is the embedding."""
        self._known: dict[str, bool] = {}

    def _check_names(self) -> None:
        """Refuse names that no module has, and an `include` that finds none: a typing error would give a different adapter."""
        modules = {name.rpartition(".")[0] for name in self._jobs}
        for wanted in self._asked.modules_to_save:
            if not any(module == wanted or module.endswith(f".{wanted}") for module in modules):
                raise ConfigError(
                    f"{self._asked.path}.modules_to_save: no module is called {printable(wanted, 120)}: mend or remove the name"
                )
        include = self._asked.include
        if include is not None and not any(re.search(include, module) for module in modules):
            raise ConfigError(
                f"{self._asked.path}.include: {printable(repr(include), 120)} finds no module: mend or remove the "
                "pattern"
            )

    def storage(self) -> Storage:
        self._check_names()
        kinds = {name: self._kind(name) for name in self._jobs}
        self._refuse(kinds)
        changed = [name for name, kind in kinds.items() if kind in FACTORED and not self._is_the_base(name)]
        experts = any(map(is_expert, changed))  # PEFT fuses them, so all have factors, be they zero
        parameters = self._parameters(kinds)
        factored = [
            self._factored(name, kind)
            for name, kind in kinds.items()
            if kind in FACTORED and (name in changed or (experts and is_expert(name)))
        ]
        factored += [self._parameter(name, parameters) for name in parameters]
        saved = self._saved(kinds)
        if not factored and any(kind in (*FACTORED, "experts") for kind in kinds.values()):
            raise ModelError(
                f"no matrix differs from that of {printable(self._reference)}: there is no adapter to write (embeddings "
                "and heads count as matrices with `embeddings`, --embeddings)"
            )
        if not factored:
            raise ModelError(
                f"{self._material.config.where}: output: lora: no matrix is left to decompose: widen `include`, or "
                "leave out `exclude`"
            )
        loose = [
            (name, self._jobs[name].sources[0], self._bases[name])
            for name, kind in kinds.items()
            if kind == "loose" and not self._asked.drop_rest and not self._is_the_base(name)
        ]
        adapter = AdapterPlan(
            self._reference,
            self._asked,
            tuple(factored),
            tuple(saved),
            tuple(sorted({self._named(module) for module in modules_of(self._jobs)})),
            self._material.template.config,
            self._biases(kinds),
            tuple(loose),
        )
        jobs = tuple(replace(job, ordinal=i) for i, job in enumerate(self._written))
        return Storage(jobs, adapter=adapter, notes=self._notes(kinds))

    def _base_of(self, job: Job) -> SourceRef | None:
        """Return the base's tensor; None if it has none of this shape."""
        found = self._finder.find(self._reference, job.name)
        return found if found is not None and found.shape == job.shape else None

    def _kind(self, name: str) -> Kind:
        """Return what becomes of a tensor; one that the base has not is stored whole."""
        kind = self._sorter.kind(name)
        of_table = self._sorter.kind_of_table(name) if kind == "whole" and not self._tied else None
        if of_table is not None:
            base = self._bases[name]
            if base is not None and isinstance(
                sum_of_products(self._jobs[name], base, self._material), SumOfProductsRef
            ):
                return of_table
        if kind in FACTORED and self._bases[name] is None:
            self._check_foreign(name)
            return "whole"
        if kind == "bias" and self._kind(f"{name.removesuffix('.bias')}.weight") not in FACTORED:
            return "whole"
        return kind

    def _check_foreign(self, name: str) -> None:
        """Refuse a base that lacks a matrix, or has it in another shape, unless it is an embedding, a head or outside the layers."""
        theirs = self._finder.find(self._reference, name)
        if (
            is_head(name)
            or is_embedding(name)
            or (theirs is None and not any(map(str.isdigit, name.split("."))))
        ):
            return
        there = "is missing" if theirs is None else f"is {list(theirs.shape)}"
        raise ModelError(
            f"{printable(self._reference)}: tensor {printable(name)} {there} there, {list(self._jobs[name].shape)} in the "
            "result: this is not its base"
        )

    def _refuse(self, kinds: Mapping[str, Kind]) -> None:
        """Refuse tensors that no adapter can change, if the merge changes them."""
        for name, kind in kinds.items():
            if kind == "experts" and not self._is_the_base(name):
                check_parameter(name, self._jobs[name].shape)
        merged = [
            name for name, kind in kinds.items() if kind == "loose" and self._jobs[name].kind == "merge"
        ]
        merged = [name for name in merged if not self._is_copied(name) and not self._is_the_base(name)]
        if merged and not self._asked.drop_rest:
            raise ModelError(
                f"tensor {printable(merged[0])} is a parameter of a module that has others inside, which no adapter can "
                "change: leave such parameters out with drop_rest (--drop-rest)"
            )

    def _is_copied(self, name: str) -> bool:
        return is_plain_copy(self._jobs[name], self._material.method)

    def _is_the_base(self, name: str) -> bool:
        """Return whether a tensor is that of the base, since every model has it from there."""
        if name not in self._known:
            self._known[name] = self._find_whether_base(name)
        return self._known[name]

    def _find_whether_base(self, name: str) -> bool:
        job, base = self._jobs[name], self._bases[name]
        if base is None or not all(is_same(ref, base) for ref in job.sources):
            return False
        return self._is_copied(name) or coefficients_of(job, self._material) is not None

    # --- factors

    def _factored(self, name: str, kind: Kind) -> FactoredModule:
        job, base = self._jobs[name], self._bases[name]
        assert base is not None
        change = self._change(job, base)
        if self._asked.embeddings and (is_embedding(name) or is_head(name)) and self._tied:
            raise ModelError(
                f"{printable(self._reference)}: embedding and head share their weights, which two adapters would change "
                "twice: leave `embeddings` (--embeddings) out, so that they are stored whole"
            )
        turned = self._sorter.is_turned(name, kind)
        matrix = job.shape[0], math.prod(job.shape[1:])
        asked, config = self._asked, self._material.config
        # PEFT fuses experts, so they have one rank.
        rank = asked.most if asked.rank is not None or is_expert(name) else min(asked.most, *matrix)
        form = LowRank(
            name,
            matrix,
            rank,
            None if is_expert(name) else asked.energy,
            config.out_dtype or config.dtype or "F32",
            computed_rank(matrix, rank),
            turned,
        )
        ordinal = self._write(Job(0, name, "F64", job.shape, "factor", (change,), None, {}, encoder=form))
        bias = None
        module = name.removesuffix(".weight")
        of_bias = f"{module}.bias"
        has_bias = of_bias in self._jobs and self._kind(of_bias) == "bias" and not self._is_the_base(of_bias)
        if has_bias and not asked.drop_rest:
            bias = self._tensor(of_bias, "bias")
        return FactoredModule(self._named(module), ordinal, kind, job.shape, turned, bias)

    def _parameters(self, kinds: Mapping[str, Kind]) -> list[str]:
        """Return the parameters of experts: all of them if any differs; without the biases if these are not wanted."""
        found = [
            name
            for name, kind in kinds.items()
            if kind == "experts" and not (self._asked.drop_rest and len(self._jobs[name].shape) == 2)
        ]
        return [] if all(map(self._is_the_base, found)) else found

    def _parameter(self, name: str, parameters: Sequence[str]) -> FactoredModule:
        job, base = self._jobs[name], self._bases[name]
        if base is None:
            self._check_foreign(name)
        assert base is not None
        material = self._material
        dtype = material.config.out_dtype or material.config.dtype or "F32"
        form = form_of(name, job.shape, self._asked, dtype, material.template.config)
        change = self._change(job, base)
        ordinal = self._write(Job(0, name, "F64", job.shape, "factor", (change,), None, {}, encoder=form))
        module, _, leaf = name.rpartition(".")
        named, depth = f"{self._named(module)}.{leaf}", depth_of(name, parameters)
        return FactoredModule(named, ordinal, "experts", job.shape, form.turned, depth=depth)

    def _change(self, job: Job, base: SourceRef) -> SourceRef:
        """Return the change of a weight: of a model, of several adapters together, or of a merge."""
        material = self._material
        if self._is_the_base(job.name):
            return DifferenceRef(base, base)
        if (products := sum_of_products(job, base, material)) is not None:
            return products
        if is_plain_copy(job, material.method):
            return DifferenceRef(job.sources[0], base)
        if material.merged is None:
            raise MergeNeededError
        return DifferenceRef(material.merged[job.name], base)

    def _write(self, job: Job) -> int:
        self._written.append(job)
        return len(self._written) - 1

    # --- whole tensors

    def _saved(self, kinds: Mapping[str, Kind]) -> list[SavedModule]:
        """Return the modules that are stored whole, each with all of its tensors."""
        if self._asked.drop_rest:
            return []
        modules: dict[str, list[SavedTensor]] = {}
        owned: dict[str, list[str]] = {}
        for name in (name for name, kind in kinds.items() if kind == "whole"):
            owned.setdefault(name.rpartition(".")[0], []).append(name)
        for module, names in owned.items():
            if not all(map(self._is_the_base, names)):
                tensors = [self._tensor(name, name.rpartition(".")[2]) for name in names]
                modules[self._named(module)] = tensors
        modules |= self._sharing(modules)
        return [SavedModule(name, tuple(tensors)) for name, tensors in modules.items()]

    def _biases(self, kinds: Mapping[str, Kind]) -> tuple[SavedTensor, ...]:
        """Return the biases of modules whose weight is that of the base."""
        found = (name for name, kind in kinds.items() if kind == "bias" and not self._is_the_base(name))
        alone = [name for name in found if self._is_the_base(f"{name.removesuffix('.bias')}.weight")]
        return () if self._asked.drop_rest else tuple(self._tensor(name, "bias") for name in alone)

    def _tensor(self, name: str, leaf: str) -> SavedTensor:
        job = self._write(self._jobs[name])
        module = name.rpartition(".")[0]
        return SavedTensor(f"{self._named(module)}.{leaf}", job, self._bases[name])

    def _sharing(self, modules: Mapping[str, Sequence[SavedTensor]]) -> dict[str, list[SavedTensor]]:
        """Return the modules that share a stored embedding: PEFT stores each as a module of its own."""
        embedding = embedding_of(self._jobs)
        names = {name for name in self._jobs if is_embedding(name) or name == embedding}
        tables = {self._named(name.rpartition(".")[0]) for name in names}
        found = [(name, own) for name, own in modules.items() if name in tables and len(own) == 1]
        others: list[str] = []
        settings = self._material.template.config
        if len(found) == 1 and self._tied and architecture_of(settings).endswith(_WITH_HEAD):
            others.append("lm_head")
        for name, _ in found:
            if name.rpartition(".")[2] == "shared":
                around = name.removesuffix("shared")
                others += [f"{around}encoder.embed_tokens", f"{around}decoder.embed_tokens"]
        return {name: [replace(found[0][1][0], name=f"{name}.weight")] for name in others}

    def _notes(self, kinds: Mapping[str, Kind]) -> tuple[str, ...]:
        left = [name for name, kind in kinds.items() if kind == "left out"]
        rest = [name for name, kind in kinds.items() if kind not in (*FACTORED, "experts", "left out")]
        notes = []
        foreign = [name for name, kind in kinds.items() if kind == "whole" and self._bases[name] is None]
        if foreign and not self._asked.drop_rest:
            notes.append(
                f"{len(foreign)} tensors that {printable(self._reference)} has not, or has in another shape, are stored whole: "
                f"PEFT needs a model with such modules (first: {printable(foreign[0])})"
            )
        if left:
            notes.append(f"{len(left)} tensors are left out of the adapter by include and exclude")
        elif self._asked.exclude is not None:
            notes.append(
                f"{self._asked.path}.exclude: {printable(repr(self._asked.exclude), 120)} finds no module"
            )
        if rest and self._asked.drop_rest:
            notes.append(
                f"{len(rest)} tensors that are not decomposed are left out of the adapter (drop_rest)"
            )
        return tuple(notes)
