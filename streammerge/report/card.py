"""The model card of an output: what was merged, how, how to load it, and the config.

The front matter contains only names that the hub knows, never a path. The text contains no local path either; the config
file next to the card is verbatim.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from streammerge.config.settings import Setting
from streammerge.errors import printable
from streammerge.lazy import late_pattern
from streammerge.planning.files.ecosystem import ecosystem_of
from streammerge.planning.files.origins import Origin, origins_of, shared_licence, shown_reference
from streammerge.planning.low_rank.adapter import AdapterPlan
from streammerge.planning.plan import MergePlan
from streammerge.report.loading import how_to_load, peft_lines
from streammerge.report.stages import stage_tree
from streammerge.units import plural
from streammerge.version import __version__

_PATH = late_pattern(
    r"(?<![\w.~/@:-])(?:~[\w-]*|\.\.?)?/(?:[^\s/'\"#,\[\]{}:]+/)*([^\s/'\"#,\[\]{}:]+)/?", re.ASCII
)


def model_card(plan: MergePlan) -> str:
    """Return the text of README.md. It depends only on the plan, and on the licences in the inputs' own cards."""
    if plan.adapter is not None:
        return _adapter_card(plan, plan.adapter)
    origins = {origin: None for index in plan.originals for origin in origins_of(index)}
    ecosystem = ecosystem_of(plan.template)
    parts = [
        _front_matter(plan, ecosystem.library, tuple(origins)),
        *_title(plan),
        "## Models",
        "\n".join(_models(plan)),
        *_stages(plan),
        *_settings(plan),
        *_stored(plan),
        *how_to_load(plan, ecosystem),
        "## Configuration",
        _configuration(plan),
        "`streammerge.json` holds the checksums of all files and the fingerprints of all inputs; `streammerge verify` reads "
        "every byte against them.",
    ]
    return "\n\n".join(parts) + "\n"


def _adapter_card(plan: MergePlan, adapter: AdapterPlan) -> str:
    """Return the text for an adapter; the residuals of its modules follow it."""
    assert plan.base is not None
    base = origins_of(plan.base)
    merged = plan.method.name != "passthrough"
    made = f"a merge by `{plan.method.name}`" if merged else "a fine-tuned model"
    place = next((origin.name for origin in base if origin.on_hub), "path/to/the/base")
    asked = adapter.asked
    rank = (
        f"of rank {asked.rank}"
        if asked.rank
        else f"with {100 * (asked.energy or 0):g} % of each squared norm"
    )
    parts = [
        _front_matter(plan, "peft", base, "adapter"),
        "# A LoRA adapter",
        f"The difference between {made} and its base, {rank}, computed by streammerge {__version__}.",
        "## Models",
        "\n".join(_models(plan)),
        *_settings(plan),
        "## How to load it",
        "\n".join(["```python", *peft_lines(plan.template.config, place), "```"]),
        "## Configuration",
        _configuration(plan),
        "`streammerge.json` holds the checksums of all files and the fingerprints of all inputs; `streammerge verify` reads "
        "every byte against them.",
    ]
    return "\n\n".join(parts) + "\n"


def _title(plan: MergePlan) -> tuple[str, str]:
    """Return the title, and a sentence on how the model was made."""
    if (moe := plan.config.moe) is not None:
        n = plural(len(moe.experts), "expert")
        chosen = f"each token is routed to {moe.per_token} of {n}"
        return (
            "# A mixture of experts",
            f"Made by streammerge {__version__}: {chosen}, by gates of the mode `{moe.gate_mode}`.",
        )
    paper = f" ({plan.method.paper})" if plan.method.paper else ""
    name = plan.method.name
    return f"# A merge by {name}", f"Merged by streammerge {__version__} with the method `{name}`{paper}."


def _front_matter(plan: MergePlan, library: str, origins: tuple[Origin, ...], relation: str = "merge") -> str:
    """Return the front matter that the hub reads: https://huggingface.co/docs/hub/model-cards."""
    hub = dict.fromkeys(origin.name for origin in origins if origin.on_hub)
    lines = ["---"]
    if hub:
        lines += ["base_model:", *(f"- {_quoted(name)}" for name in hub)]
    lines.append(f"base_model_relation: {relation}")
    lines += [f"{key}: {_quoted(value)}" for key, value in shared_licence(origins)]
    if library:
        lines.append(f"library_name: {library}")
    tags = ("lora", "streammerge") if relation == "adapter" else ("merge", "streammerge", plan.method.name)
    lines += ["tags:", *(f"- {_quoted(tag)}" for tag in tags), "---"]
    return "\n".join(lines)


def _quoted(name: str) -> str:
    """Return a text as a YAML string."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", name, re.ASCII)
    return (
        name
        if plain and name.lower() not in ("true", "false", "yes", "no", "on", "off", "null")
        else json.dumps(name)
    )


def _models(plan: MergePlan) -> Iterator[str]:
    """Yield a line for every input, with a link if it is on the hub."""
    for index in plan.originals:
        names = " with the adapter ".join(_link(origin) for origin in origins_of(index))
        stored = "; ".join(index.stored_formats)
        yield f"- {names}{' (base)' if index is plan.base else ''}{f', stored as {stored}' if stored else ''}"


def _stages(plan: MergePlan) -> Iterator[str]:
    """Yield the stages as a tree, if there are any."""
    if plan.stages:
        yield "## Stages"
        yield "\n".join(["```", *stage_tree(plan), "```"])


def _link(origin: Origin) -> str:
    if origin.on_hub:
        return f"[{origin.name}](https://huggingface.co/{origin.name}/tree/{origin.revision})"
    return _code(origin.name)


def _code(text: object) -> str:
    """Return a text that Markdown shows verbatim, also in a table."""
    return "`" + printable(text, 120).replace("`", "'").replace("|", "¦") + "`"


def _settings(plan: MergePlan) -> Iterator[str]:
    """Yield a table of the config's parameters, and the seed if it matters."""
    rows = [("all", plan.config.parameters)]
    rows += [(shown_reference(spec.reference), spec.parameters) for spec in plan.config.models]
    cells = [
        f"| {_code(name)} | {_code(key)} | {_code(_shown(setting))} |"
        for name, settings in rows
        for key, setting in sorted(settings.items())
    ]
    if cells:
        yield "## Parameters"
        yield "\n".join(["| model | parameter | value |", "|---|---|---|", *cells])
    if plan.config.moe is not None and plan.config.moe.draws:
        yield f"Random numbers are drawn from the seed {plan.seed}: the same seed gives the same bits."
    if plan.random:
        yield f"Random drops are drawn from the seed {plan.seed}: the same seed gives the same bits."


def _stored(plan: MergePlan) -> Iterator[str]:
    """Yield lines on the storage of quantised tensors."""
    counts = Counter(job.encoder.label for job in plan.jobs if job.encoder is not None)
    if counts:
        formats = ", ".join(f"{n} as {label}" for label, n in counts.items())
        yield (
            f"Of {len(plan.jobs)} tensors, these are quantised: {formats}. Each is the merge in fp32, rounded once; "
            "config.json declares it."
        )


def _shown(setting: Setting) -> str:
    clauses = [
        (f"{clause.filter}: " if clause.filter is not None else "")
        + (str(clause.values[0]) if len(clause.values) == 1 else f"[{', '.join(map(str, clause.values))}]")
        for clause in setting.clauses
    ]
    return "; ".join(clauses)


def _configuration(plan: MergePlan) -> str:
    """Return the config with only the last part of each local path."""
    text = plan.config.text
    for reference in sorted(_references(plan), key=len, reverse=True):
        text = text.replace(reference, shown_reference(reference))
    text = _PATH.sub(r"\1", text).rstrip()
    fence = "````" if "```" in text else "```"
    return f"{fence}yaml\n{text}\n{fence}"


def _references(plan: MergePlan) -> set[str]:
    """Return the references in the config."""
    stores: Mapping[str, object] = dict.fromkeys(index.reference for index in plan.stores)
    return (
        {index.reference for index in plan.inputs}
        | {spec.reference for spec in plan.config.models}
        | set(stores)
    )
