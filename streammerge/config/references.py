"""How a config names a model."""

from __future__ import annotations

import os

from streammerge.config.wording import check_keys, child, refuse, shown


def parse_text(value: object, path: str) -> str:
    """Return `value` if it is a string that can name something; ConfigError otherwise."""
    if not isinstance(value, str):
        refuse(path, f"must be a string, not {shown(value)} (quote it)")
    if not value.strip():
        refuse(path, "must not be empty")
    return value


def parse_reference(value: object, path: str) -> str:
    """Return a model reference as one string: a path or hub name, with ``@revision`` if it has one.

    It is written as that string, as ``{path, revision}``, or as mergekit writes it, ``{model:
    {path, revision}}``. The map is taken literally; in a string, `+` announces a LoRA adapter
    unless the directory exists.
    """
    if not isinstance(value, dict):
        reference = parse_text(value, path)
        if "+" in reference and not os.path.isdir(reference):
            refuse(path, f"{shown(reference)} is no directory, and LoRA ('+') is not supported yet")
        return reference
    later = ("lora", "override_architecture")
    if "model" in value:
        check_keys(value, path, ("model",), later)
        inner = value["model"]
        if isinstance(inner, dict) and "model" in inner:
            refuse(child(path, "model"), "a map within a map (write {path: …, revision: …})")
        return parse_reference(inner, child(path, "model"))
    check_keys(value, path, ("path", "revision"), later)
    if "path" not in value:
        refuse(path, "'path' is missing")
    location = parse_text(value["path"], child(path, "path"))
    if value.get("revision") is None:
        return location
    revision = parse_text(value["revision"], child(path, "revision"))
    for key, text in (("path", location), ("revision", revision)):
        if "@" in text:
            refuse(child(path, key), f"'@' in {shown(text)} (it divides path and revision)")
    return f"{location}@{revision}"
