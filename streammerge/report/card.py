"""The model card of an output: what was merged, how, and the config word for word."""

from __future__ import annotations

import os

from streammerge.plan.plan import MergePlan


def model_card(plan: MergePlan) -> str:
    """Return the text of README.md; a function of the plan alone."""
    base = [] if plan.base is None else ["base_model:", f"- {_name(plan.base.reference)}"]
    models = "\n".join(f"- {_name(model.reference)}" for model in plan.models)
    front = "\n".join(
        ["---", *base, "library_name: transformers", "tags:", "- merge", "- streammerge", "---"]
    )
    of_base = "" if plan.base is None else f" with {_name(plan.base.reference)} as the base"
    paper = f" ({plan.method.paper})" if plan.method.paper else ""
    fence = "````" if "```" in plan.config.text else "```"
    return (
        f"{front}\n\n# Merged model\n\nMade by streammerge with the method `{plan.method.name}`{paper}{of_base}.\n\n"
        f"## Models\n\n{models}\n\n## Configuration\n\n{fence}yaml\n{plan.config.text.rstrip()}\n{fence}\n"
    )


def _name(reference: str) -> str:
    """Return a reference as a hub name, or the last part of a path."""
    if os.path.isabs(reference) or reference.startswith("."):
        return os.path.basename(os.path.normpath(reference))
    return reference
