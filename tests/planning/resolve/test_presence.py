"""`tensors: common | any`: which tensors are merged over which models, held against float64 references of those models alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from streammerge.api import merge, plan
from streammerge.cli.merging import plan as plan_command
from streammerge.errors import ConfigError, InputError, ModelError
from tests.checkpoint.tokenizers.scene import write as write_tokenized
from tests.conftest import config_for, read_tensors, write_fisher, write_model
from tests.methods import reference
from tests.methods.reference_drop import fisher

SEED, WEIGHTS, ALIASES = 11, [0.7, 0.4, 1.3], ["x", "y", "z"]
SHAPE = (40, 33)
HOLDERS: dict[str, tuple[int, ...]] = {
    "model.layers.0.w": (0, 1, 2, 3),
    "model.layers.1.w": (0, 1, 3),
    "model.layers.2.w": (0, 2),
    "only.base": (0,),
    "without.base": (1, 3),
    "only.second": (2,),
    "shapes": (0, 1, 2, 3),
    "shapes.two": (0, 1, 2),
}
"""The models that have each tensor; 0 is the base."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)
    models: list[dict[str, torch.Tensor]] = [{} for _ in range(4)]
    for name, holders in HOLDERS.items():
        base = torch.randn(SHAPE, generator=generator)
        for place in holders:
            shape = (20, 66) if name.startswith("shapes") and place == 2 else SHAPE
            models[place][name] = (base + 0.1 * torch.randn(SHAPE, generator=generator)).reshape(shape)
    return [write_model(folder / f"m{place}", tensors) for place, tensors in enumerate(models)]


def configure(method: str, paths: Sequence[Path], tensors: str, **parameters: Any) -> dict[str, Any]:
    config = config_for(
        method, list(paths), parameters=parameters, seed=SEED, tensors=tensors, dtype="float32"
    )
    for model, alias, weight in zip(config["models"], ALIASES, WEIGHTS, strict=False):
        model |= {"alias": alias, "parameters": {"weight": weight}}
    return config


def loaded(paths: Sequence[Path]) -> list[dict[str, np.ndarray]]:
    return [{name: t.double().numpy() for name, t in read_tensors(path).items()} for path in paths]


def expected(method: str, name: str, having: list[int], paths: list[Path], **options: Any) -> np.ndarray:
    """Merge one tensor over the models that have it, in float64, as if there were no others."""
    base, *models = [{name: model[name]} if name in model else {} for model in loaded(paths)]
    own = [models[i - 1] for i in having]
    weights, aliases = [WEIGHTS[i - 1] for i in having], [ALIASES[i - 1] for i in having]
    densities = [options.get("density", 1.0)] * len(own)
    if method == "linear":
        return reference.linear(own, weights, options.get("normalize", True)).theta[name]
    if method == "task_arithmetic":
        return reference.task_arithmetic(base, own, weights).theta[name]
    if method == "ties":
        return reference.ties(base, own, weights, densities, seed=SEED, aliases=aliases).theta[name]
    if method == "fisher":
        values = [np.load(write_diagonal(paths[i]))[name] for i in having]
        return fisher(own, [{name: value} for value in values], weights).theta[name]
    elect = method == "dare_ties"
    return reference.dare(base, own, weights, densities, elect=elect, seed=SEED, aliases=aliases).theta[name]


def write_diagonal(path: Path) -> Path:
    """Return a file of a model's Fisher diagonal as float64 arrays."""
    from safetensors.torch import load_file

    arrays = path.with_name(f"{path.name}-fisher.npz")
    if not arrays.exists():
        found = load_file(write_fisher(path))
        np.savez(arrays, **{name: tensor.double().numpy() for name, tensor in found.items()})
    return arrays


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"normalize": False}),
    ("task_arithmetic", {}),
    ("ties", {"density": 0.4}),
    ("dare_linear", {"density": 0.5}),
    ("dare_ties", {"density": 0.5}),
    ("fisher", {}),
]


CASES = [
    (*row, tensors)
    for row in METHODS
    for tensors in ("any", "common")
    if (row[0], tensors) != ("fisher", "any")
]


@pytest.mark.parametrize(("method", "options", "tensors"), CASES, ids=str)
def test_each_tensor_is_merged_over_its_models_with_their_weights_and_random_words(
    method: str, options: dict[str, Any], tensors: str, paths: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge(configure(method, paths, tensors, **options), out)
    merged = {name: tensor.double().numpy() for name, tensor in read_tensors(out).items()}
    based = method not in ("linear", "fisher")
    names = set()
    for name, holders in HOLDERS.items():
        having = [place for place in holders if place]
        taking = (0, *having) if based else tuple(having)
        if name.startswith("shapes") or (
            tensors == "common" and taking != ((0, 1, 2, 3) if based else (1, 2, 3))
        ):
            continue
        if not having and not based:
            continue
        if based and 0 not in holders:
            continue
        names.add(name)
        if len(having) < 1 or (len(having) == 1 and not based and method == "fisher"):
            continue
        wanted = expected(method, name, having, paths, **options)
        np.testing.assert_allclose(merged[name], wanted, rtol=3e-7, atol=2e-7)
    if tensors == "any" and based:
        assert np.array_equal(merged["only.base"], loaded(paths)[0]["only.base"])
    assert merged.keys() == names


@pytest.mark.parametrize(("method", "options"), METHODS[3:6], ids=str)
def test_what_all_models_have_does_not_depend_on_what_some_are_without(
    method: str, options: dict[str, Any], paths: list[Path], tmp_path: Path
) -> None:
    merge(configure(method, paths, "any", **options), tmp_path / "any")
    for place, path in enumerate(paths):
        tensors = {"model.layers.0.w": read_tensors(path)["model.layers.0.w"]}
        write_model(tmp_path / f"m{place}", tensors)
    alone = [tmp_path / f"m{place}" for place in range(4)]
    merge(configure(method, alone, "same", **options), tmp_path / "same")
    found, same = read_tensors(tmp_path / "any"), read_tensors(tmp_path / "same")
    assert torch.equal(found["model.layers.0.w"], same["model.layers.0.w"])


def test_bits_do_not_depend_on_memory_and_threads(
    paths: list[Path], tmp_path: Path, small_capacity: Any
) -> None:
    config = configure("dare_ties", paths, "any", density=0.5)
    files = []
    for capacity, threads in ((1 << 30, 1), (1 << 16, 2)):
        small_capacity(capacity, threads)
        merge(config, tmp_path / f"out{threads}")
        files.append((tmp_path / f"out{threads}" / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_what_is_left_out_is_counted_and_listed(paths: list[Path], tmp_path: Path) -> None:
    decided = plan(configure("ties", paths, "common"))
    assert dict(decided.tensors_left_out) == {
        "model.layers.1.w": "not in every model",
        "model.layers.2.w": "not in every model",
        "only.base": "not in every model",
        "shapes": "of different shapes",
        "shapes.two": "not in every model",
        "without.base": "not in every model",
        "only.second": "not in every model",
    }
    (line,) = (line for line in decided.warnings if "left out" in line)
    assert "`" not in line
    assert "tensors: common: 7 of 8 tensors are left out: 6 not in every model, 1 of different shapes" in line
    decided = plan(configure("ties", paths, "any"))
    assert dict(decided.tensors_left_out) == {
        "shapes": "of different shapes",
        "shapes.two": "of different shapes",
        "without.base": "not in the base",
        "only.second": "not in the base",
    }
    lines = "\n".join(decided.warnings)
    assert "2 of 8 tensors are merged over those models that have them (first: model.layers.1.w)" in lines
    assert "1 of 8 tensors are in one model alone and copied from there (first: only.base)" in lines
    written = tmp_path / "config.yml"
    written.write_text(json.dumps(configure("ties", paths, "any")))
    text = CliRunner().invoke(plan_command, [str(written)]).output
    assert "left out  4 tensors: shapes (of different shapes), shapes.two (of different" in text
    values = json.loads(CliRunner().invoke(plan_command, [str(written), "--json"]).output)
    assert values["tensors_left_out"]["only.second"] == "not in the base"


def test_without_a_base_every_model_adds_its_tensors(paths: list[Path], tmp_path: Path) -> None:
    decided = plan(configure("linear", paths, "any"))
    assert {job.name for job in decided.jobs} == {
        "model.layers.0.w",
        "model.layers.1.w",
        "model.layers.2.w",
        "without.base",
        "only.second",
    }
    assert decided.tensors_left_out == {"shapes": "of different shapes", "shapes.two": "of different shapes"}
    members = {job.name: job.members for job in decided.jobs}
    assert members["model.layers.1.w"] == (0, 2)
    assert members["only.second"] == (1,)


def test_a_method_of_two_models_copies_what_one_alone_has(paths: list[Path], tmp_path: Path) -> None:
    config = {
        "merge_method": "slerp",
        "base_model": str(paths[1]),
        "parameters": {"t": 0.5},
        "tensors": "any",
    }
    config |= {"models": [{"model": str(paths[1])}, {"model": str(paths[2])}], "dtype": "float32"}
    merge(config, tmp_path / "out")
    merged, first = read_tensors(tmp_path / "out"), read_tensors(paths[1])
    assert merged.keys() == {"model.layers.0.w", "model.layers.1.w", "without.base"}
    assert torch.equal(merged["without.base"], first["without.base"])
    assert not torch.equal(merged["model.layers.0.w"], first["model.layers.0.w"])


def test_excluded_tensors_are_copied_from_the_first_model_that_has_them(
    paths: list[Path], tmp_path: Path
) -> None:
    config = configure("linear", paths, "any") | {"exclude": ["^only", "shapes"]}
    merge(config, tmp_path / "out")
    merged = read_tensors(tmp_path / "out")
    assert torch.equal(merged["only.second"], read_tensors(paths[2])["only.second"])
    assert torch.equal(merged["shapes"], read_tensors(paths[1])["shapes"])


@pytest.mark.parametrize("n", [2, 3])
def test_the_number_of_layers_follows_in_config_json(n: int, tmp_path: Path) -> None:
    for name, layers in (("a", 3), ("b", 2)):
        tensors = {f"model.layers.{i}.w": torch.full((4, 4), float(i)) for i in range(layers)}
        write_model(tmp_path / name, {"model.embed_tokens.weight": torch.ones(4, 4), **tensors})
        settings = {
            "model_type": "llama",
            "num_hidden_layers": layers,
            "layer_types": ["x", "y", "z"][:layers],
        }
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    order = ["a", "b"] if n == 2 else ["b", "a"]
    config = {"merge_method": "linear", "models": [{"model": str(tmp_path / name)} for name in order]}
    config |= {"parameters": {"weight": 0.5}, "tensors": "common" if n == 2 else "any"}
    merge(config, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == n
    assert len(written["layer_types"]) == n
    with pytest.raises(ModelError, match="layers"):
        plan({**config, "tensors": "same"})


def test_densities_are_those_of_the_tensors_that_a_model_has(paths: list[Path], tmp_path: Path) -> None:
    summary = merge(configure("ties", paths, "any", density=0.5), tmp_path / "out")
    n = SHAPE[0] * SHAPE[1]
    assert [one.of for one in summary.densities] == [2 * n, 2 * n, 2 * n]
    assert all(0.45 < one.density < 0.55 for one in summary.densities)


# (the keys that are added, the message)
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"tensors": "all"}, r"tensors: 'all' is none of same, common, any"),
    ({"tensors": ["same"]}, r"is none of same, common, any"),
    (
        {"tensors": "any", "merge_method": "ties", "parameters": {"trim_scope": "model", "density": 0.5}},
        "in place of `any`",
    ),
    ({"merge_method": "fisher"}, "norms of Fisher diagonals"),
]


@pytest.mark.parametrize(("keys", "said"), REFUSALS, ids=[str(row[0]) for row in REFUSALS])
def test_what_cannot_be_is_refused_by_name(keys: dict[str, Any], said: str, paths: list[Path]) -> None:
    config = configure(keys.get("merge_method", "linear"), paths, "any") | keys
    with pytest.raises(ConfigError, match=said):
        plan(config)


def test_slices_and_modules_are_refused_by_name(paths: list[Path]) -> None:
    source = {"model": str(paths[1]), "layer_range": [0, 1]}
    for inputs in (
        {"slices": [{"sources": [source]}]},
        {"modules": {"text_decoder": {"models": [str(paths[1])]}}},
    ):
        with pytest.raises(ConfigError, match="tensors: 'common' goes with whole models"):
            plan({"merge_method": "passthrough", "tensors": "common", **inputs})


def test_models_with_nothing_in_common_are_refused(paths: list[Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", {"elsewhere": torch.ones(3)})
    models = [{"model": str(path), "parameters": {"weight": 1}} for path in (paths[1], other)]
    with pytest.raises(InputError, match="nothing is left to merge: 6 not in every model"):
        plan({"merge_method": "linear", "models": models, "tensors": "common"})


@pytest.mark.parametrize("tensors", ["common", "any"])
def test_vocabularies_are_put_in_one_order_as_ever(tensors: str, tmp_path: Path) -> None:
    ids = [{"a": 0, "b": 1, "c": 2}, {"c": 0, "d": 1, "a": 2, "e": 3}]
    models = [write_tokenized(tmp_path / f"m{i}", own, seed=i) for i, own in enumerate(ids)]
    config: dict[str, Any] = {"merge_method": "linear", "tokenizer_source": "union", "dtype": "float32"}
    config["models"] = [{"model": str(model.path), "parameters": {"weight": 0.5}} for model in models]
    merge(config, tmp_path / "same")
    file = models[1].path / "model.safetensors"
    save_file({**load_file(file), "extra.weight": torch.ones(3)}, file)
    merge({**config, "tensors": tensors}, tmp_path / "out")
    same, found = read_tensors(tmp_path / "same"), read_tensors(tmp_path / "out")
    assert ("extra.weight" in found) == (tensors == "any")
    assert same.keys() == found.keys() - {"extra.weight"}
    assert all(torch.equal(found[name], same[name]) for name in same)
