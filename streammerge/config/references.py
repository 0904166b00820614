"""References, the ways in which a config names a model."""

from __future__ import annotations

from streammerge.config.wording import check_keys, child, refuse, shown
from streammerge.io.volumes import refuse_secrets

_DIRECTORIES = (".", "/", "~")
"""Prefixes of directory paths, which have no revision; mergekit ignores one too."""


def parse_text(value: object, path: str) -> str:
    """Return `value` if it is a non-empty string; raise ConfigError otherwise."""
    if not isinstance(value, str):
        refuse(path, f"must be a string, not {shown(value)} (quote it)")
    if not value.strip():
        refuse(path, "must not be empty")
    return value


def parse_reference(value: object, path: str) -> str:
    """Return a model reference as one string: a path or hub name with optional ``@revision`` and ``+adapter``.

    The config writes it as that string, as ``{path, revision}``, or in mergekit's form ``{model: {path, revision}, lora:
    {path, revision}}``. Opening the model decides whether a `+` in a string separates an adapter, since the name of a
    directory may contain one.
    """
    if not isinstance(value, dict):
        return _parse_place(value, path)
    if "model" not in value:
        return _parse_place(value, path)
    check_keys(value, path, ("model", "lora", "override_architecture"))
    places = [_parse_place(value["model"], child(path, "model"))]
    if value.get("lora") is not None:
        places.append(_parse_place(value["lora"], child(path, "lora")))
        for key, text in zip(("model", "lora"), places, strict=True):
            if "+" in text:
                refuse(child(path, key), f"'+' in {shown(text)} (it divides model and adapter)")
    return "+".join(places)


def _parse_place(value: object, path: str) -> str:
    """Return ``path@revision`` for a string or a map; a URL must not carry secrets."""
    if not isinstance(value, dict):
        text = parse_text(value, path)
        refuse_secrets(text)
        return text
    if "model" in value:
        refuse(path, "a map within a map (write {path: …, revision: …})")
    check_keys(value, path, ("path", "revision"))
    if "path" not in value:
        refuse(path, "'path' is missing")
    location = parse_text(value["path"], child(path, "path"))
    refuse_secrets(location)
    if value.get("revision") is None:
        return location
    revision = parse_text(value["revision"], child(path, "revision"))
    if location.startswith(_DIRECTORIES):
        return location
    for key, text in (("path", location), ("revision", revision)):
        if "@" in text:
            refuse(child(path, key), f"'@' in {shown(text)} (it divides path and revision)")
    return f"{location}@{revision}"


def parse_base(value: object, path: str) -> tuple[str, str]:
    """Return the reference of a base model, and the prefix taken off its names: ``{model: …, strip: "model."}``."""
    if not isinstance(value, dict) or "strip" not in value:
        return parse_reference(value, path), ""
    rest = {key: item for key, item in value.items() if key != "strip"}
    return parse_reference(rest, path), parse_text(value["strip"], child(path, "strip"))
