"""A config of several documents: stages that may use each other's results, one of which is the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from streammerge.config.references import parse_text
from streammerge.config.schema import MergeConfig, ModelSpec, config_of
from streammerge.config.strict_yaml import dump_yaml
from streammerge.config.wording import child, refuse, shown

MOST_STAGES = 64
_NAME = "name"


def staged_config(documents: Sequence[object], text: str, where: str) -> MergeConfig:
    """Return the config of the output; its `stages` are the other documents, in an order that respects their uses.

    Parameters
    ----------
    documents
        Two or more documents, as plain values.
    text
        The YAML of all documents.

    Raises
    ------
    ConfigError
        If a document is malformed, a name occurs twice, stages form a cycle, or there are several outputs.
    """
    if len(documents) > MOST_STAGES:
        refuse(where, f"{len(documents)} documents, at most {MOST_STAGES}: merge some of them first")
    configs: dict[str | None, MergeConfig] = {}
    for number, document in enumerate(documents, 1):
        config = _stage(document, where, number)
        if config.name in configs:
            if config.name is None:
                refuse(
                    where, "two documents have no `name:`: only the output goes without one; name the other"
                )
            refuse(where, f"two stages are called {shown(config.name)}: rename one")
        configs[config.name] = config
    uses = {config.name: _used(config, configs) for config in configs.values()}
    order = _in_order(uses, where)
    output = _output(uses, order, where)
    stages = tuple(configs[name] for name in order if name != output)
    for stage in stages:
        if stage.lora is not None:
            refuse(stage.lora.path, "a stage is a model: only the last document may write an adapter")
    for stage in stages:
        if stage.sweep:
            refuse(
                child(f"{stage.where}:", "sweep"), "only the output can be swept: move it to that document"
            )
    return replace(configs[output], name=None, stages=stages, text=text, where=where)


def stage_of(reference: str, names: Sequence[str]) -> str | None:
    """Return the stage that a model reference names, with or without an adapter, or None.

    >>> stage_of("first+adapters/a", ["first"]), stage_of("models/first", ["first"])
    ('first', None)
    """
    return next((name for name in names if reference == name or reference.startswith(f"{name}+")), None)


def as_map(document: object, where: str) -> dict[str, object]:
    """Return a document as a map of keys; refuse any other."""
    if not isinstance(document, dict):
        refuse(where, f"a config is a map of keys (merge_method, models, …), not {shown(document)}")
    return document


def _stage(document: object, where: str, number: int) -> MergeConfig:
    data = dict(as_map(document, f"{where}: document {number}"))
    given = data.pop(_NAME, None)
    name = None if given is None else parse_text(given, child(f"{where}: document {number}:", _NAME))
    if name is not None and "+" in name:
        refuse(
            child(f"{where}: document {number}:", _NAME),
            f"'+' in {shown(name)} (it divides model and adapter)",
        )
    place = f"{where} (stage {name})" if name is not None else f"{where} (output)"
    return replace(config_of(data, dump_yaml(data), place), name=name)


def _used(config: MergeConfig, configs: dict[str | None, MergeConfig]) -> list[str | None]:
    """Return the names of the stages that a stage uses, in the order of the documents."""
    names = [name for name in configs if name is not None]
    used = {stage_of(reference, names) for reference in config.references}
    return [name for name in names if name in used]


def _in_order(uses: dict[str | None, list[str | None]], where: str) -> list[str | None]:
    """Return the names in the config's order, except that each comes after those that it uses."""
    try:
        return list(TopologicalSorter(uses).static_order())
    except CycleError as error:
        circle = " → ".join(str(name) for name in reversed(error.args[1]))
        refuse(where, f"stages form a cycle: {circle}: remove one of these uses")


def _output(uses: dict[str | None, list[str | None]], order: Sequence[str | None], where: str) -> str | None:
    """Return the name of the document that no other document uses."""
    used = {name for names in uses.values() for name in names}
    left = [name for name in order if name not in used]
    if len(left) > 1:
        names = " and ".join("the document without a name" if name is None else shown(name) for name in left)
        refuse(
            where, f"{names} are not used by any stage, so there are {len(left)} outputs: remove all but one"
        )
    return left[0]


def kept_stages(config: MergeConfig, directory: Path) -> list[tuple[MergeConfig, Path]]:
    """Return every stage as a separate config with its folder in `directory`, in order.

    Raises
    ------
    ConfigError
        If a name cannot be the name of a folder.
    """
    names = [str(stage.name) for stage in config.stages]
    for name in names:
        if "/" in name or name in (".", ".."):
            refuse(config.where, f"{shown(name)} cannot be the name of the stage's folder: rename the stage")
    return [
        (replace(_placed(stage, names, directory), name=None), directory / str(stage.name))
        for stage in config.stages
    ]


def read_from(config: MergeConfig, directory: Path) -> MergeConfig:
    """Return the config of the output only, which reads the stages from the folders of `kept_stages`."""
    return replace(_placed(config, [str(stage.name) for stage in config.stages], directory), stages=())


def _placed(config: MergeConfig, names: Sequence[str], directory: Path) -> MergeConfig:
    """Return a config with stages replaced by their folders."""

    def place(reference: str) -> str:
        stage = stage_of(reference, names)
        return reference if stage is None else str(directory / stage) + reference[len(stage) :]

    def moved(spec: ModelSpec) -> ModelSpec:
        return replace(spec, reference=place(spec.reference))

    modules = tuple(
        replace(
            module,
            slices=tuple(
                replace(
                    part,
                    sources=tuple(map(moved, part.sources)),
                    base_model=None if part.base_model is None else place(part.base_model),
                )
                for part in module.slices
            ),
        )
        for module in config.modules
    )
    lora = config.lora
    if lora is not None and lora.base is not None:
        lora = replace(lora, base=place(lora.base))
    tokenizer = config.tokenizer
    if tokenizer is not None:
        tokens = {
            token: source if source.model is None else replace(source, model=place(source.model))
            for token, source in tokenizer.tokens.items()
        }
        tokenizer = replace(tokenizer, source=place(tokenizer.source), tokens=tokens)
    return replace(
        config,
        models=tuple(map(moved, config.models)),
        modules=modules,
        base_model=None if config.base_model is None else place(config.base_model),
        lora=lora,
        tokenizer=tokenizer,
    )
