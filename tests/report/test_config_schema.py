"""The JSON schema of configs: it takes what the program takes, and marks what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from streammerge.config import moe
from streammerge.config import schema as reader
from streammerge.config.known_keys import KEYS
from streammerge.methods.catalog import load_builtin
from streammerge.methods.registry import all_methods
from streammerge.report.config_schema import config_schema
from streammerge.report.example import commented_config
from tests.cli.running import Cli, cli
from tests.test_docs import blocks

__all__ = ["cli"]

load_builtin()
SCHEMA = config_schema(all_methods())
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def fits(value: Any, schema: Any) -> bool:
    """Return whether a value fits a schema, of the keywords that ours has."""
    if schema is True:
        return True
    if "$ref" in schema:
        return fits(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema and not any(fits(value, each) for each in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = schema.get("type", [])
    if kinds and not isinstance(
        value, tuple(TYPES[k] for k in ([kinds] if isinstance(kinds, str) else kinds))
    ):
        return False
    if isinstance(value, list):
        most = schema.get("maxItems", len(value))
        return schema.get("minItems", 0) <= len(value) <= most and all(
            fits(each, schema.get("items", True)) for each in value
        )
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(schema.get("required", ())) <= set(value) and all(
            fits(each, known[key]) if key in known else rest is not False and fits(each, rest)
            for key, each in value.items()
        )
    return True


@pytest.mark.parametrize(("place", "text"), blocks("yaml"), ids=lambda value: str(value)[:40])
def test_the_configs_of_the_docs_fit(place: str, text: str) -> None:
    assert all(fits(document, SCHEMA) for document in yaml.safe_load_all(text))


@pytest.mark.parametrize("name", list(all_methods()))
def test_the_config_to_start_from_fits(name: str) -> None:
    assert fits(yaml.safe_load(commented_config(all_methods()[name])), SCHEMA)


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: tyes\nmodels: [{model: a}]",
        "models: [{model: a}]",
        "merge_method: linear\nmodles: [{model: a}]",
        "merge_method: linear\nmodels: [{model: a, weight: 1}]",
        "merge_method: linear\nmodels: []",
        "base_model: a\nexperts: [{source_model: b, positive_prompt: [c]}]",
        "base_model: a\nexperts: [{source_model: b}]\ngate_mode: hiden",
        "merge_method: linear\nmodels: [{model: a}]\ndtype: bfloat61",
        "merge_method: linear\nmodels: [{model: a}]\nseed: x",
        "merge_method: ties\nmodels: [{model: a}]\nparameters: {trim_scope: models}",
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0]}]}]",
    ],
)
def test_what_is_misspelt_does_not_fit(text: str) -> None:
    assert not fits(yaml.safe_load(text), SCHEMA)


def test_the_keys_are_those_that_are_read() -> None:
    definitions = {name: set(each.get("properties", ())) for name, each in SCHEMA["$defs"].items()}
    assert set(KEYS) <= definitions["merge"]
    assert definitions["mixture"] == {*moe.KEYS, *moe.KEYS_WITHOUT_EFFECT}
    assert definitions["expert"] == set(moe.EXPERT_KEYS)
    assert definitions["model"] == set(reader._MODEL_KEYS)
    assert definitions["source"] == {*reader._MODEL_KEYS, "layer_range"}
    assert definitions["slice"] == set(reader._SLICE_KEYS)
    assert definitions["module"] == set(reader._MODULE_KEYS)


def test_the_command_prints_it(cli: Cli) -> None:
    run = cli("schema")
    assert (run.code, run.err) == (0, "")
    assert json.loads(run.out)["title"] == "streammerge config"
