"""The model card of an output: what was merged, how, and the config word for word."""

from __future__ import annotations

import json
import os
import re

from streammerge.planning.plan import MergePlan


def model_card(plan: MergePlan) -> str:
    """Return the text of README.md; a function of the plan alone."""
    names = [_name(index.reference) for index in (*([] if plan.base is None else [plan.base]), *plan.models)]
    sources = [f"- {_quoted(name)}" for name in dict.fromkeys(names)]
    models = "\n".join(f"- {_name(model.reference)}" for model in plan.models)
    front = "\n".join(
        [
            "---",
            "base_model:",
            *sources,
            "library_name: transformers",
            "tags:",
            "- merge",
            "- streammerge",
            "---",
        ]
    )
    of_base = "" if plan.base is None else f" with {_name(plan.base.reference)} as the base"
    paper = f" ({plan.method.paper})" if plan.method.paper else ""
    fence = "````" if "```" in plan.config.text else "```"
    return (
        f"{front}\n\n# Merged model\n\nMade by streammerge with the method `{plan.method.name}`{paper}{of_base}.\n\n"
        f"## Models\n\n{models}\n\n## Configuration\n\n{fence}yaml\n{plan.config.text.rstrip()}\n{fence}\n"
    )


def _quoted(name: str) -> str:
    """Return a name as YAML takes it for a string."""
    return name if re.fullmatch(r"[A-Za-z][\w./-]*", name, re.ASCII) else json.dumps(name)


def _name(reference: str) -> str:
    """Return a reference as a hub name, or the last part of a path."""
    if os.path.isabs(reference) or reference.startswith("."):
        return os.path.basename(os.path.normpath(reference))
    return reference
