"""The schema: real configs are read as their authors mean them, mistakes are named with the cure."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from streammerge.config import (
    MergeConfig,
    config_from_mapping,
    parse_config,
    value_for,
)
from streammerge.errors import ConfigError

LINEAR = """\
models:
  - model: ./base
    parameters:
      weight: 0.6
  - model: org/name@main
    parameters:
      weight: 0.4
merge_method: linear
dtype: float16
"""

SLERP = """\
base_model: ./a   # the base is one of the two
models:
  - model: ./a
  - model: ./b
merge_method: slerp
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: torch.bfloat16
out_dtype: float32
tokenizer_source: null
"""

TIES = """\
models:
  - model: {model: {path: ./a+b, revision: null}, lora: null}
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: {path: org/b, revision: v2}
    parameters: &shared
      density: 0.5
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
  - {model: org/b, alias: again, parameters: *shared}
merge_method: ties
base_model: {model: {path: ./base}}
parameters:
  normalize: true
  int8_mask: true
exclude: [lm_head, '\\.bias$']
"""

DARE = """\
merge_method: dare_ties
base_model: ./base
models:
  - model: ./a
    parameters: {weight: 0.5, density: 0.53}
    fisher: ./a.zarr
seed: 18446744073709551615
parameters: {lambda: 1e-1, preset: mergekit}
"""


def _clauses(config: MergeConfig) -> dict[str, object]:
    return {
        name: setting.clauses[0].values for spec in config.models for name, setting in spec.parameters.items()
    }


def test_a_linear_config_is_read() -> None:
    config = parse_config(LINEAR)
    assert config.merge_method == "linear"
    assert [spec.reference for spec in config.models] == ["./base", "org/name@main"]
    assert [spec.parameters["weight"].clauses[0].values for spec in config.models] == [(0.6,), (0.4,)]
    assert config.models[1].parameters["weight"].path == "config.yml: models[1].parameters.weight"
    assert config.models[1].path == "config.yml: models[1]"
    assert (config.dtype, config.out_dtype, config.base_model) == ("F16", None, None)
    assert (config.seed, config.exclude, config.parameters) == (0, (), {})
    assert (config.text, config.where) == (LINEAR, "config.yml")


def test_a_slerp_config_with_gradients_and_filters_is_read() -> None:
    config = parse_config(SLERP.encode(), "c.yml")
    t = config.parameters["t"]
    assert t.path == "c.yml: parameters.t"
    assert value_for(t, "model.layers.3.self_attn.q_proj.weight", 0.25) == 0.5
    assert value_for(t, "model.layers.3.mlp.up_proj.weight", 1.0) == 0
    assert value_for(t, "model.norm.weight", 0.0) == 0.5
    assert (config.dtype, config.out_dtype, config.base_model) == ("BF16", "F32", "./a")


def test_a_ties_config_with_a_base_is_read() -> None:
    config = parse_config(TIES)
    assert [spec.reference for spec in config.models] == ["./a+b", "org/b@v2", "org/b"]
    assert [spec.alias for spec in config.models] == [None, None, "again"]
    assert config.base_model == "./base"
    assert config.models[0].parameters["density"].clauses[0].values == (1, 0.7, 0.1)
    assert value_for(config.models[2].parameters["weight"], "model.layers.0.mlp.up", 0) == 0.5
    assert config.models[2].parameters["weight"].path == "config.yml: models[2].parameters.weight"
    assert config.parameters["normalize"].clauses[0].values == (True,)
    assert config.exclude == ("lm_head", r"\.bias$")


def test_a_dare_config_with_a_seed_is_read() -> None:
    config = parse_config(DARE)
    assert (config.seed, config.models[0].fisher) == (2**64 - 1, "./a.zarr")
    assert config.parameters["lambda"].clauses[0].values == (0.1,)
    assert _clauses(config) == {"weight": (0.5,), "density": (0.53,)}


@pytest.mark.parametrize("text", [LINEAR, SLERP, TIES, DARE])
def test_a_config_pickles_compares_and_hashes(text: str) -> None:
    config = parse_config(text)
    assert pickle.loads(pickle.dumps(config)) == config == parse_config(text)
    assert hash(config) == hash(parse_config(text))


def test_crlf_a_bom_and_comments_change_nothing_but_the_text() -> None:
    other = b"\xef\xbb\xbf# comment\n" + LINEAR.encode().replace(b"\n", b"\r\n")
    config = parse_config(other)
    assert config.models == parse_config(LINEAR).models
    assert config.text.encode() == other


M = "merge_method: linear\nmodels: [{model: a}]\n"
S = "merge_method: linear\nslices: "

REFUSED = [
    # The document.
    ("- a", ": a config is a map of keys (merge_method, models, …), not a list"),
    ("a", ": a config is a map of keys (merge_method, models, …), not 'a'"),
    ("2001-99-99", ": a config is a map of keys"),
    ("", ": line 1, column 1: the config is empty"),
    # Keys.
    (M + "merge_metod: x", ": unknown key 'merge_metod' (did you mean 'merge_method'?)"),
    (M + "parmeters: {}", ": unknown key 'parmeters' (did you mean 'parameters'?)"),
    (M + "xyz: 1", ": unknown key 'xyz' (known: merge_method, models,"),
    (M + "merge_method: x", ": line 3, column 1: duplicate key 'merge_method'"),
    (M + f"? {'k' * 900}\n: 1", ": unknown key 'kkk"),
    (M + "slices: []", ": 'models' and 'slices' cannot both be set"),
    (M + "modules: {}", ": 'models' and 'modules' cannot both be set"),
    (S + "[]", ": slices: must be a list of slices (- sources: …), not an empty list"),
    (S + "[a]", ": slices[0]: must be a map (sources: …), not 'a'"),
    (S + "[{source: []}]", ": slices[0]: unknown key 'source' (did you mean 'sources'?)"),
    (S + "[{parameters: {}}]", ": slices[0]: 'sources' is missing"),
    (S + "[{sources: []}]", ": slices[0].sources: must be a list of models (- model: …), not an empty list"),
    (S + "[{sources: [{model: a}]}]", ": slices[0].sources[0]: 'layer_range' is missing"),
    (S + "[{sources: [{layer_range: [0, 1]}]}]", ": slices[0].sources[0]: 'model' is missing"),
    *(
        (
            S + f"[{{sources: [{{model: a, layer_range: {value}}}]}}]",
            ": slices[0].sources[0].layer_range: must be two layer numbers [first, end), not ",
        )
        for value in ("3", "[0]", "[0, 1, 2]", "[0, 1.5]", "[-1, 2]", "[false, true]", "[a, b]", "null", "{}")
    ),
    (
        S + "[{sources: [{model: a, layer_range: [4, 4]}]}]",
        ": slices: no slice holds a layer",
    ),
    (
        S + "[{sources: [{model: a, layer_range: [4, 3]}]}]",
        ": slices[0].sources[0].layer_range: [4, 3) ends before it begins",
    ),
    (
        S + "[{sources: [{model: a, layer_range: [0, 99999999]}]}]",
        ": slices[0].sources[0].layer_range: 99999999 layers",
    ),
    (
        S + "[{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]",
        ": slices[0].sources[1].layer_range: 3 layers, but 2 of the slice's first source",
    ),
    (
        S
        + "[{sources: [{model: a, alias: x, layer_range: [0, 2]}, {model: a, alias: x, layer_range: [2, 4]}]}]",
        ": slices[0].sources[1]: 'x' is sources[0] already (give one of them its own `alias:`)",
    ),
    (
        S
        + "[{sources: [{model: a, alias: x, layer_range: [0, 2]}]}, {sources: [{model: b, alias: x, layer_range: [2, 4]}]}]",
        ": slices[1].sources[0]: 'x' has a different model at ",
    ),
    (
        "merge_method: linear\nmodules: []",
        ": modules: must be a map of modules (name: {models: …}), not an empty list",
    ),
    (
        "merge_method: linear\nmodules: {text: 3}",
        ": modules.text: must be a map (models: … or slices: …), not 3",
    ),
    (
        "merge_method: linear\nmodules: {text: {}}",
        ": modules.text: 'models' is missing (or 'slices', or 'modules')",
    ),
    (
        "merge_method: linear\nmodules: {text: {model: a}}",
        ": modules.text: unknown key 'model' (did you mean 'models'?)",
    ),
    (
        "merge_method: linear\nmodules: {text: {models: [a], slices: []}}",
        ": modules.text: 'models' and 'slices' cannot both be set",
    ),
    (M + "tokenizer: {sorce: union}", ": tokenizer: unknown key 'sorce' (did you mean 'source'"),
    (M + "tokenizer_source: [base]", ": tokenizer_source: must be a string"),
    (M + "chat_template: auto_", ": chat_template: 'auto_' is not a template (did you mean 'auto'"),
    # The method and the models.
    ("models: [{model: a}]", ": 'merge_method' is missing"),
    ("merge_method: null\nmodels: [{model: a}]", ": merge_method: must be a string, not null"),
    ("merge_method: 3\nmodels: [{model: a}]", ": merge_method: must be a string, not 3 (quote it)"),
    ("merge_method: ''\nmodels: [{model: a}]", ": merge_method: must not be empty"),
    ("merge_method: linear", ": 'models' is missing"),
    ("merge_method: linear\nmodels:", ": models: must be a list of models (- model: …), not null"),
    ("merge_method: linear\nmodels: []", ": models: must be a list of models (- model: …), not an empty"),
    ("merge_method: linear\nmodels: a", ": models: must be a list of models (- model: …), not 'a'"),
    ("merge_method: linear\nmodels: {model: a}", ": models: must be a list of models"),
    ("merge_method: linear\nmodels: [null]", ": models[0]: must be a map (model: …), not null"),
    ("merge_method: linear\nmodels: [5]", ": models[0]: must be a map (model: …), not 5"),
    ("merge_method: linear\nmodels: [{}]", ": models[0]: 'model' is missing"),
    ("merge_method: linear\nmodels: [{model: }]", ": models[0].model: must be a string, not null"),
    ("merge_method: linear\nmodels: [{model: 5}]", ": models[0].model: must be a string, not 5 (quote"),
    ("merge_method: linear\nmodels: [{model: no}]", ": models[0].model: must be a string, not false"),
    ("merge_method: linear\nmodels: [{model: [a]}]", ": models[0].model: must be a string, not a list"),
    ('merge_method: linear\nmodels: [{model: "a\\0b"}]', ": line 2, column 18: NUL"),
    ("merge_method: linear\nmodels: [{model: ' '}]", ": models[0].model: must not be empty"),
    (
        "merge_method: linear\nmodels: [{model: a, weight: 1}]",
        ": models[0]: 'weight' goes under parameters: {model: 'a', parameters: {weight: 1}}",
    ),
    (
        "merge_method: linear\nmodels: [{model: a, paramters: {}}]",
        ": models[0]: unknown key 'paramters' (did you mean 'parameters'?)",
    ),
    ("merge_method: linear\nmodels: [{model: a, lora: b}]", ": models[0]: an adapter is part of the model"),
    (
        "merge_method: linear\nmodels: [{model: a, layer_range: [0, 1]}]",
        ": models[0]: 'layer_range' goes into slices",
    ),
    # References.
    (M + "base_model: {path: 1}", ": base_model.path: must be a string, not 1"),
    (M + "base_model: {revision: x}", ": base_model: 'path' is missing"),
    (M + "base_model: {path: x, revision: 3}", ": base_model.revision: must be a string, not 3"),
    (M + "base_model: {path: x@y, revision: z}", ": base_model.path: '@' in 'x@y'"),
    (M + "base_model: {path: x, revison: z}", ": base_model: unknown key 'revison' (did you mean 'revision'"),
    (M + "base_model: {model: {path: x+y}, lora: {path: z}}", ": base_model.model: '+' in 'x+y'"),
    (
        M + "base_model: {model: x, lora: {pth: y}}",
        ": base_model.lora: unknown key 'pth' (did you mean 'path'",
    ),
    (M + "base_model: {model: {model: x}}", ": base_model.model: a map within a map"),
    # Names of models.
    ("merge_method: linear\nmodels: [{model: a, alias: ''}]", ": models[0].alias: must not be empty"),
    ("merge_method: linear\nmodels: [{model: a, alias: 1}]", ": models[0].alias: must be a string, not 1"),
    ("merge_method: linear\nmodels: [{model: a, fisher: }]", ": models[0].fisher: must be a string, not nul"),
    (
        "merge_method: linear\nmodels: [{model: a}, {model: b}, {model: c, alias: a}]",
        ": models[2]: 'a' is models[0] already (give one of them its own `alias:`)",
    ),
    (
        "merge_method: linear\nmodels: [{model: a, alias: x}, {model: b, alias: x}]",
        ": models[1]: 'x' is models[0] already (give one of them its own `alias:`)",
    ),
    # Options.
    (M + "dtype: float99", ": dtype: 'float99' is not one of float16, bfloat16, float32, float64"),
    (M + "dtype: int8", ": dtype: 'int8' is not one of"),
    (
        M + "dtype: BF17",
        ": dtype: 'BF17' is not one of float16, bfloat16, float32, float64 (did you mean 'bf16'",
    ),
    (M + "out_dtype: 16", ": out_dtype: 16 is not one of"),
    (M + "dtype: [float16]", ": dtype: a list is not one of"),
    (M + "seed: -1", ": seed: must be an integer from 0 to 2**64 - 1, not -1"),
    (M + "seed: 18446744073709551616", ": seed: must be an integer from 0 to"),
    (M + "seed: true", ": seed: must be an integer from 0 to 2**64 - 1, not true"),
    (M + "seed: 1.0", ": seed: must be an integer"),
    (M + "seed:", ": seed: must be an integer from 0 to 2**64 - 1, not null"),
    (M + "exclude: {a: 1}", ": exclude: must be a list of regular expressions, not a map"),
    (M + "exclude:", ": exclude: must be a list of regular expressions, not null"),
    (M + "exclude: [1]", ": exclude[0]: must be a string, not 1"),
    (M + "exclude: [a, '(']", ": exclude[1]: '(' is not a regular expression"),
    (M + "exclude: ['[[a]']", ": exclude[0]: '[[a]' is not a regular expression: Possible nested set"),
    (M + "exclude: ['a{99999999999999999999}']", ": exclude[0]: "),
    (M + f"exclude: ['{'(' * 900}']", ": exclude[0]: '((("),
    (M + f"exclude: ['{'a' * 2000}']", ": exclude[0]: 2000 characters, at most 1000"),
    # Parameters.
    (M + "parameters: [1]", ": parameters: must be a map of parameters, not a list"),
    (M + "parameters: {weight: }", ": parameters.weight: null is not a value"),
    (M + "parameters: {weight: .nan}", ": parameters.weight: nan is not a finite number"),
    (M + "parameters: {weight: -.inf}", ": parameters.weight: -inf is not a finite number"),
    (M + "parameters: {weight: 1e999}", ": parameters.weight: inf is not a finite number"),
    (M + "parameters: {weight: []}", ": parameters.weight: an empty list"),
    (M + "parameters: {weight: {a: 1}}", ": parameters.weight: unknown key 'a' (known: filter, value)"),
    (M + "parameters: {weight: [1, b]}", ": parameters.weight: a gradient is all numbers"),
    (M + "parameters: {weight: [[1]]}", ": parameters.weight[0]: a list is not a value"),
    (M + "parameters: {'a\\nb': }", ": parameters.a\\nb: null is not a value"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=range(len(REFUSED)))
def test_mistakes_are_named_with_their_place_and_cure(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "dir/c.yml")
    message = str(caught.value)
    assert message.startswith("dir/c.yml" + words)
    assert len(message) < 400
    assert len(message.splitlines()) == 1
    assert message.isprintable()


@pytest.mark.parametrize(
    ("text", "words"), [row for row in REFUSED if row[1].count("line") == 0], ids=lambda v: None
)
def test_a_mapping_meets_the_same_refusals(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(_pyyaml(text), "c")
    assert str(caught.value).startswith(words.removeprefix(": ").join(["c: ", ""]))


def _pyyaml(text: str) -> dict[str, object]:
    return yaml.safe_load(text.replace("1e999", "1.0e+999").replace("2001-99-99", "x"))


def test_a_string_with_a_plus_may_name_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a+b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_config("merge_method: linear\nmodels: [{model: a+b}]").models[0].reference == "a+b"


@pytest.mark.parametrize("text", [LINEAR, SLERP, TIES, DARE])
def test_the_text_of_a_mapping_parses_to_the_same_config(text: str) -> None:
    config = config_from_mapping(yaml.safe_load(text), "config.yml")
    again = parse_config(config.text)
    assert again == config
    assert again.parameters == config.parameters


def test_numbers_in_quotes_are_numbers_and_x_keys_hold_anchors() -> None:
    """Templates of configs put numbers in quotes; mergekit takes them too."""
    plain = """
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [0, 4]}
parameters:
  t: [{filter: mlp, value: [0, 0.5, -1e-2]}, {value: 1}]
"""
    quoted = """
x-common: &range ["0", "4"]
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: *range}
      - {model: b, layer_range: *range}
parameters:
  t: [{filter: mlp, value: ["0", "+.5", "-1e-2"]}, {value: "1"}]
"""
    one, other = parse_config(plain), parse_config(quoted)
    assert one.parameters["t"].clauses == other.parameters["t"].clauses
    assert [spec.layer_range for spec in one.models] == [spec.layer_range for spec in other.models]
