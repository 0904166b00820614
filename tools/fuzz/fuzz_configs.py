"""Targets that read a user's text: YAML, configs, sizes."""

from __future__ import annotations

import math
import pickle
from contextlib import suppress
from random import Random

import fuzz_json
from fuzz_files import same_json
from fuzz_promises import encoded, refused, require, table_of

from streammerge.checkpoint.names import count_layers, layer_fraction
from streammerge.config import config_from_mapping, parse_config
from streammerge.config.settings import value_for
from streammerge.config.strict_yaml import dump_yaml, load_yaml
from streammerge.errors import ConfigError, InputError
from streammerge.units import format_size, parse_size

# --- the config


def check_yaml(raw: bytes) -> None:
    """An accepted config can be written and read back; its strings can be encoded."""
    try:
        value = load_yaml(raw, "c.yml")
    except Exception as error:
        refused(error, ConfigError)
        return
    if len(raw) < 4096:  # Aliases written out take longer than they are worth here.
        text = dump_yaml(value)
        if len(text) < 1 << 20:
            require(same_json(load_yaml(text, "c.yml"), value), "written and read back it is another value")


_TENSORS = [
    "model.embed.weight",
    "model.layers.0.mlp.up.weight",
    "model.layers.7.self_attn.q.weight",
    "lm_head",
]


def check_config(raw: bytes) -> None:
    """A config that is accepted is a plain value, gives each tensor its parameters, and is the same as a mapping."""
    try:
        config = parse_config(raw, "c.yml")
    except Exception as error:
        refused(error, ConfigError, limit=6000)
        return
    require(pickle.loads(pickle.dumps(config)) == config, "it does not pickle")
    hash(config)
    layers = count_layers(_TENSORS)
    for setting in (*config.parameters.values(), *(s for m in config.models for s in m.parameters.values())):
        for tensor in _TENSORS:
            value = value_for(setting, tensor, layer_fraction(tensor, layers))
            require(value is None or isinstance(value, bool | int | float | str), "no scalar")
            require(not isinstance(value, float) or math.isfinite(value), f"{value} for {tensor}")
    data = load_yaml(raw, "c.yml")
    again = config_from_mapping(data, "c.yml")
    for field in (
        "merge_method",
        "models",
        "base_model",
        "dtype",
        "out_dtype",
        "parameters",
        "seed",
        "exclude",
    ):
        require(repr(getattr(again, field)) == repr(getattr(config, field)), f"{field} differs as a mapping")


def yaml_seeds() -> list[bytes]:
    """Return the tables of the YAML reader's tests."""
    rows = [row[0] for name in ("ACCEPTED", "REFUSED") for row in table_of("config.test_yaml", name)]
    return encoded([*rows, *table_of("config.test_yaml", "HUGE")])


def config_seeds() -> list[bytes]:
    """Return the tables of the schema's tests, and a config of each kind."""
    rows = [row[0] for row in table_of("config.test_schema", "REFUSED")]
    models = "models: [{model: a, parameters: {weight: 0.5}}, {model: b, alias: c, parameters: {weight: [0, 1.5]}}]\n"
    tops = [
        "merge_method: ties\nbase_model: base\nparameters: {density: 0.2, normalize: true}\ndtype: bfloat16\n",
        "merge_method: linear\nparameters:\n  weight: [{filter: mlp, value: [0, 1]}, {value: 0.5}]\nseed: 7\n",
        "merge_method: dare_ties\nbase_model: {path: org/name, revision: main}\nexclude: ['lm_head', '^a.*$']\n",
    ]
    return encoded([*rows, *(top + models for top in tops)])


_WORDS = [
    b"merge_method: ",
    b"models:",
    b"- model: ",
    b"base_model: ",
    b"parameters:",
    b"weight: ",
    b"{filter: mlp, value: 1}",
    b"&a ",
    b"*a",
    b"<<: *a",
    b"!!int ",
    b"!!float ",
    b"!!str ",
    b"? ",
    b"| \n",
    b"> \n",
    b"\\x00",
    b"\\ud800",
    b"%YAML 1.1\n---\n",
    b"1e400",
    b".nan",
    b".inf",
    b"0x",
    b"0b",
    b"0o7",
    b"1_000",
    b"12:30:45",
    b"~",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
    b"seed: ",
    b"exclude: ",
    b"dtype: ",
    b"[[",
    b"]]",
    b"{",
    b"}",
    b",",
    b"\n  ",
    b"\t",
    b"'",
    b'"',
    b"#",
    b"(?:a{1,99}){1,99}",
]


def change_yaml(raw: bytes, rng: Random, blind: fuzz_json.Blind) -> bytes | None:
    """Insert words of the language, move lines, or change bytes."""
    what = rng.randrange(4)
    if what == 0:
        return None
    if what == 1:
        lines = raw.split(b"\n")
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        if rng.random() < 0.5:
            lines[i], lines[j] = lines[j], lines[i]
        else:
            lines.insert(i, lines[j])
        return b"\n".join(lines)
    at = rng.randrange(len(raw) + 1)
    end = at if what == 2 else min(len(raw), at + rng.randrange(8))
    return raw[:at] + rng.choice(_WORDS) + raw[end:]


# --- sizes


def check_size(raw: bytes) -> None:
    """A size is a positive number of bytes that can be shown."""
    text = raw.decode("utf-8", "surrogateescape")
    try:
        nbytes = parse_size(text)
    except Exception as error:
        refused(error, InputError, limit=500)
        return
    require(type(nbytes) is int and nbytes > 0, f"{nbytes!r}")
    require(len(format_size(nbytes)) < 100, "a long size")
    with suppress(ValueError):
        require(int(text) == nbytes, "plain bytes are not what they say")


def size_seeds() -> list[bytes]:
    """Return sizes as people write them, and some that are refused."""
    sizes = [
        "1",
        "512MiB",
        "2GiB",
        "5GB",
        "1.5 GiB",
        "0",
        "-1",
        "1e9",
        "nan",
        "inf",
        "",
        " 7 k ",
        "1024TiB",
        "0.1b",
        "9" * 64,
        "9" * 65,
        "1..5G",
        "１２",
        "5 \u00a0GB",
        "1\n",
        "0x10",
        "1_000",
        "9" * 50 + "." + "9" * 9 + "PiB",
    ]
    return encoded(sizes)
