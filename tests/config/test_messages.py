"""A common mistake in a config is answered with the place, the line itself and the cure."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from streammerge.config import config_from_mapping, load_config, parse_config
from streammerge.errors import ConfigError

YAML = [
    (
        "models:\n  - model: a\n  parameters:\n    weight: 1\n",
        "line 3, column 3: 'parameters:' is next to the list; indent it under '- model:' (4 spaces) "
        '(at ^ in "  ^parameters:")',
    ),
    (
        "models:\n  - model: a\n  dtype: float16\n",
        "line 3, column 3: 'dtype:' is in the column of the list's dashes: begin it in the column of the list's own key",
    ),
    (
        "models:\n  - model: a\n   parameters:\n    weight: 1\n",
        "line 3, column 4: 'parameters:' is indented differently from line 2 ('model:' begins in column 5): align them",
    ),
    (
        "models:\n  - model: a\n      parameters:\n    weight: 1\n",
        "'parameters:' is indented deeper than 'model:' on line 2, which has a value already: begin it in column 5",
    ),
    (
        "slices:\n- sources:\n  - model: a\n    layer_range: [0, 2]\n   - model: b\n",
        "line 5, column 4: this dash is indented differently from that of line 3 (column 3): align them",
    ),
    (
        "  a: 1\nb: 2\n",
        "line 2, column 1: 'b:' is indented differently from line 1 ('a:' begins in column 3)",
    ),
    ("merge_method\nmodels: a\n", "'merge_method' on line 1 has no ':' after it"),
    (
        "a: b: c\n",
        "line 1, column 5: a second ': ' in one line, mapping values are not allowed here: quote the text, "
        'or begin a new line (at ^ in "a: b^: c")',
    ),
    (
        'exclude: ["\\.bias$"]\n',
        "in double quotes a backslash begins an escape: use single quotes, or two backslashes",
    ),
    ("a: [1, 2\nb: 3\n", "a comma or a closing ] is missing"),
    ("a: {x: 1\nb: 3\n", "a comma or a closing } is missing"),
    ("a: [1, 2]]\n", "a closing ] without its ["),
    ("a: 'xx\nb: 1\n", "the quote is never closed"),
    ("a: @x\n", 'quote the text that begins so (at ^ in "a: ^@x")'),
    (f"a: '{'x' * 900}': 1", "xx'^: 1\")"),
]


@pytest.mark.parametrize(("text", "words"), YAML, ids=range(len(YAML)))
def test_what_is_not_yaml_is_shown_with_its_line_and_the_cure(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        parse_config(text, "c.yml")
    message = str(caught.value)
    assert message.startswith("c.yml: line ")
    assert len(message.splitlines()) == 1
    assert message.isprintable()


M = "merge_method: linear\nmodels: [{model: a}]\n"
KEYS = [
    (
        M + "weights: [0.5, 0.5]",
        "'weights' is not a key: each model has its own 'weight' under parameters: {model: x, "
        "parameters: {weight: 0.5}}",
    ),
    (M + "density: 0.5", "'density' goes under parameters: {density: 0.5}"),
    (M + "normalize: false", "'normalize' goes under parameters: {normalize: false}"),
    (
        "merge_method: slerp\nslices: [{sources: [{model: x, layer_range: [0, 1]}], merge_method: slerp}]",
        "slices[0]: 'merge_method' belongs at the top level of the config, once for the whole merge",
    ),
    (M + "random_seed: 3", "'random_seed' is called 'seed' here"),
    (M + "Dtype: float16", "unknown key 'Dtype' (did you mean 'dtype'?)"),
    (
        "merge_method: ties\nmodels: [{model: x, density: 0.5}]",
        "models[0]: 'density' goes under parameters: {model: 'x', parameters: {density: 0.5}}",
    ),
    (
        "merge_method: ties\nmodels: [{model: x, weight: [1, 2]}]",
        "models[0]: 'weight' goes under parameters: {model: 'x', parameters: {weight: …}}",
    ),
    (
        "merge_method: ties\nmodels: [{model: x, layer_range: [0, 2]}]",
        "models[0]: 'layer_range' goes into slices: ",
    ),
    (
        "merge_method: ties\nmodels: [{model: x, lora: y}]",
        "models[0]: an adapter is part of the model: {model: x+adapter}",
    ),
    (
        M + "dtype: bfloat6",
        "dtype: 'bfloat6' is not one of float16, bfloat16, float32, float64 (did you mean 'bfloat16'",
    ),
    (M + "quantize: fp9", "quantize: 'fp9' is not one of none, same, fp8 (did you mean 'fp8'"),
    (M + "quantization: fp8", "'quantization' is called 'quantize' here"),
    (M + "chat_template: chatlm", "chat_template: 'chatlm' is not a template (did you mean 'chatml'?"),
]


@pytest.mark.parametrize(("text", "words"), KEYS, ids=range(len(KEYS)))
def test_a_key_that_belongs_elsewhere_is_told_where(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_config(text, "c.yml")


def test_keys_of_old_configs_are_ignored_with_a_word_wherever_they_stand() -> None:
    config = parse_config(
        M.replace("model: a", "model: a, override_architecture: x, embed_slerp: true")
        + "int8_mask: true\nembed_slerp: true"
    )
    assert len(config.notes) == 4
    assert all(": ignored: " in note for note in config.notes)


def test_yaml_text_in_place_of_a_path_is_told_apart_from_a_missing_file() -> None:
    for text in (M, "{merge_method: linear, models: [a]}"):
        with pytest.raises(
            ConfigError, match="this is YAML text, not a path: write it to a file, or pass a mapping"
        ):
            load_config(text)
    with pytest.raises(ConfigError, match=r"nowhere\.yml: cannot be read: No such file"):
        load_config("nowhere.yml")


def test_a_config_is_read_from_a_pipe_that_is_open_already() -> None:
    read, write = os.pipe()
    writer = threading.Timer(0.1, lambda: (os.write(write, M.encode()), os.close(write)))
    writer.start()
    try:
        config = load_config(f"/dev/fd/{read}")
    finally:
        writer.join()
        os.close(read)
    assert (config.text, config.where) == (M, f"/dev/fd/{read}")


def test_a_dash_is_standard_input(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(M + "dtyp: x")
    kept = os.dup(0)
    fd = os.open(tmp_path / "c.yml", os.O_RDONLY)
    os.dup2(fd, 0)
    try:
        with pytest.raises(ConfigError, match="standard input: unknown key 'dtyp'"):
            load_config("-")
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(fd)


def test_a_named_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.yml")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_config(tmp_path / "c.yml")


def test_numbers_of_numpy_are_the_ones_that_they_print() -> None:
    config = config_from_mapping(
        {
            "merge_method": "ties",
            "models": [{"model": "a", "parameters": {"weight": np.float32(0.3)}}],
            "seed": np.int64(7),
            "parameters": {
                "density": np.linspace(0, 1, 3),
                "lambda": np.float16(0.7),
                "normalize": np.bool_(True),
            },
        }
    )
    assert config.models[0].parameters["weight"].clauses[0].values == (0.3,)
    assert config.parameters["density"].clauses[0].values == (0.0, 0.5, 1.0)
    assert config.parameters["lambda"].clauses[0].values == (0.7,)
    assert config.parameters["normalize"].clauses[0].values == (True,)
    assert config.seed == 7
    assert parse_config(config.text, "config") == config
    for wrong in (np.zeros((2, 2)), np.complex64(1), np.datetime64("2020-01-01")):
        with pytest.raises(ConfigError, match="is not a value a config can hold"):
            config_from_mapping({"merge_method": "ties", "seed": wrong})


def test_a_directory_has_no_revisions() -> None:
    text = "merge_method: linear\nmodels: [{model: {model: {path: org/base, revision: v1}, lora: {path: ./other, revision: main}}}]"
    assert parse_config(text).models[0].reference == "org/base@v1+./other"


def test_the_name_of_a_config_moves_no_cursor() -> None:
    config = parse_config(M + "int8_mask: true", "x\x1b[31m.yml")
    assert config.where == "x\\x1b[31m.yml"
    assert config.notes[0].isprintable()
