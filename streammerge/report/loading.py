"""Lines for a model card that show how a library loads the output."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from streammerge.checkpoint.index import CONFIG_NAME
from streammerge.lazy import late_pattern
from streammerge.planning.files.ecosystem import Ecosystem
from streammerge.planning.plan import MergePlan

_HERE = "path/to/this/folder"
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSpeechSeq2Seq": "AutoModelForSpeechSeq2Seq",
}
"""Endings of the names of architectures, with the classes that load them."""
_IDENTIFIER = late_pattern(r"[A-Za-z_]\w{0,80}", re.ASCII)


def how_to_load(plan: MergePlan, ecosystem: Ecosystem) -> Iterator[str]:
    """Yield a heading and a few lines of Python; nothing if the library is unknown."""
    lines = {
        "transformers": _transformers,
        "diffusers": _diffusers,
        "sentence-transformers": _sentence_transformers,
        "timm": _timm,
        "open_clip": _open_clip,
    }.get(ecosystem.library)
    if lines is not None:
        yield "## How to load it"
        yield "\n".join(["```python", *lines(plan.settings.get(CONFIG_NAME) or plan.template.config), "```"])


def _transformers(config: Mapping[str, Any]) -> list[str]:
    auto = auto_class(config)
    return [
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{_HERE}", dtype="auto")',
    ]


def peft_lines(config: Mapping[str, Any], base: str) -> list[str]:
    """Return lines of Python that put an adapter on its base."""
    auto = auto_class(config)
    return [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{base}", dtype="auto")',
        f'model = PeftModel.from_pretrained(model, "{_HERE}")',
    ]


def auto_class(config: Mapping[str, Any]) -> str:
    """Return the class of transformers that loads a model.

    >>> auto_class({"architectures": ["LlamaForCausalLM"]}), auto_class({})
    ('AutoModelForCausalLM', 'AutoModel')
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if name.endswith("ForConditionalGeneration"):
        return "AutoModelForImageTextToText" if "vision_config" in config else "AutoModelForSeq2SeqLM"
    return next((auto for end, auto in _AUTO.items() if name.endswith(end)), "AutoModel")


def _diffusers(config: Mapping[str, Any]) -> list[str]:
    named = config.get("_class_name")
    name = named if isinstance(named, str) and _IDENTIFIER.fullmatch(named) else "AutoModel"
    what = "pipeline" if name.endswith("Pipeline") else "model"
    return [
        f"from diffusers import {name}",
        "",
        f'{what} = {name}.from_pretrained("{_HERE}", torch_dtype="auto")',
    ]


def _sentence_transformers(config: Mapping[str, Any]) -> list[str]:
    return [
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{_HERE}")',
    ]


def _timm(config: Mapping[str, Any]) -> list[str]:
    return ["import timm", "", f'model = timm.create_model("local-dir:{_HERE}", pretrained=True)']


def _open_clip(config: Mapping[str, Any]) -> list[str]:
    return [
        "import open_clip",
        "",
        f'model, preprocess = open_clip.create_model_from_pretrained("local-dir:{_HERE}")',
    ]
