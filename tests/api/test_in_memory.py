"""Merges of models in memory: the bits of merges of files, and nothing copied, written or guessed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge import iter_merged, merge, merge_state_dicts
from streammerge.errors import InputError, ModelError, Stopped, StreammergeWarning
from tests.conftest import config_for, read_tensors, write_models
from tests.laws.test_methods import VARIANTS

Tensors = dict[str, torch.Tensor]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (90, 16),
    "model.layers.0.mlp.down_proj.weight": (24, 40),
    "model.layers.0.input_layernorm.weight": (16,),
    "scalar": (),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], list[Path]]:
    """Return a base and three models of a dtype, written once."""

    @functools.cache
    def write(dtype: torch.dtype) -> list[Path]:
        directory = tmp_path_factory.mktemp("models")
        return write_models(directory, dtype=dtype, shapes=SHAPES, spread=2e-4)

    return write


def held_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config over paths as one over the names of the directories; Gram stores stay on the disk."""
    models = [
        {**spec, "model": Path(spec["model"]).name}
        | ({"fisher": Path(spec["model"]).name} if "fisher" in spec else {})
        for spec in config["models"]
    ]
    base = {"base_model": Path(config["base_model"]).name} if "base_model" in config else {}
    return {**config, "models": models, **base}


def named(config: Mapping[str, Any]) -> list[Path]:
    """Return the models of a config."""
    return [Path(p) for p in (*(spec["model"] for spec in config["models"]), config.get("base_model")) if p]


@pytest.mark.parametrize(
    ("method", "parameters", "dtype"),
    [(*variant, torch.bfloat16) for variant in VARIANTS]
    + [(method, parameters, dtype) for method, parameters in dict(VARIANTS).items() for dtype in DTYPES[1:]],
)
def test_state_dicts_merge_to_the_bits_of_files(
    method: str,
    parameters: dict[str, Any],
    dtype: torch.dtype,
    tmp_path: Path,
    scenes: Callable[[torch.dtype], list[Path]],
) -> None:
    scene = scenes(dtype)
    config = config_for(method, scene, parameters=parameters, seed=7)
    merge(config, tmp_path / "out", memory="1GiB", progress=False)
    expected = read_tensors(tmp_path / "out")
    models = {path.name: read_tensors(path) for path in named(config)}
    fishers = {
        Path(spec["model"]).name: read_tensors_of(spec["fisher"])
        for spec in config["models"]
        if "fisher" in spec
    }
    found = merge_state_dicts(held_config(config), models, fishers=fishers, memory="1GiB", progress=False)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)


def read_tensors_of(path: str) -> Tensors:
    from safetensors.torch import load_file

    return load_file(path)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def raw(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


LINEAR = {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 0.5}}


def two(**tensors: Any) -> dict[str, Tensors]:
    """Return two models of the same tensors, the second of their doubles."""
    return {"a": dict(tensors), "b": {name: 2 * t for name, t in tensors.items()}}


def test_modules_and_numpy_arrays_serve_as_models() -> None:
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    torch.nn.init.constant_(a.weight, 1.0)
    torch.nn.init.constant_(b.weight, 2.0)
    arrays = {name: t.detach().numpy() for name, t in b.named_parameters()}
    merged = merge_state_dicts(LINEAR, {"a": a, "b": arrays}, progress=False)
    a.load_state_dict(merged)
    assert list(merged) == ["weight", "bias"]
    assert torch.equal(a.weight, torch.full((2, 3), 1.5))


@pytest.mark.parametrize("big_endian", [False, True])
def test_arrays_and_tensors_in_any_memory_order_are_read_in_that_of_their_shape(big_endian: bool) -> None:
    plain = torch.arange(24.0).reshape(2, 3, 4)
    views = {"a": {"w": plain.permute(2, 0, 1)}, "b": {"w": plain.flip(1).permute(2, 0, 1)}}
    arrays = {k: {"w": v["w"].numpy().astype(">f4" if big_endian else "<f4")} for k, v in views.items()}
    expected = merge_state_dicts(
        LINEAR,
        {k: {"w": v["w"].clone(memory_format=torch.contiguous_format)} for k, v in views.items()},
        progress=False,
    )
    assert torch.equal(expected["w"], (views["a"]["w"] + views["b"]["w"]) / 2)
    for models in (views, arrays, {"a": views["a"], "b": {"w": arrays["b"]["w"][:, ::-1][:, ::-1]}}):
        assert torch.equal(merge_state_dicts(LINEAR, models, progress=False)["w"], expected["w"])


def test_inputs_stay_as_they_are_and_the_output_has_memory_of_its_own() -> None:
    models = two(w=torch.ones(5), copied=torch.arange(3))
    models["b"]["copied"] = models["a"]["copied"].clone()
    before = {key: {name: t.clone() for name, t in tensors.items()} for key, tensors in models.items()}
    merged = merge_state_dicts(LINEAR, models, progress=False)
    for tensor in merged.values():
        tensor.zero_()
    assert all(torch.equal(models[key][name], before[key][name]) for key in models for name in models[key])


def test_tensors_that_are_one_in_every_model_are_one_in_the_output() -> None:
    def model(seed: int) -> Tensors:
        embedding = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        return {
            "lm_head.weight": embedding,
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": torch.ones(4),
        }

    config = {
        "merge_method": "dare_linear",
        "base_model": "base",
        "models": ["a"],
        "parameters": {"density": 0.5},
    }
    models = {"base": model(0), "a": model(1)}
    merged = merge_state_dicts(config, models, progress=False)
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    assert list(merged) == list(models["base"])
    alone = {key: {n: t for n, t in m.items() if n != "lm_head.weight"} for key, m in models.items()}
    expected = merge_state_dicts(config, alone, progress=False)
    assert torch.equal(merged["lm_head.weight"], expected["model.embed_tokens.weight"])
    apart = {"base": models["base"], "a": {name: t.clone() for name, t in models["a"].items()}}
    untied = merge_state_dicts(config, apart, progress=False)
    assert untied["lm_head.weight"].data_ptr() != untied["model.embed_tokens.weight"].data_ptr()


def test_models_on_the_disk_merge_with_models_in_memory(
    scenes: Callable[[torch.dtype], list[Path]], tmp_path: Path
) -> None:
    base, first, *_ = scenes(torch.bfloat16)
    config = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": ["m1"],
        "parameters": {"lambda": 0.5},
    }
    mixed = merge_state_dicts(config, {"base": str(base), "m1": read_tensors(first)}, progress=False)
    held = merge_state_dicts(config, {"base": read_tensors(base), "m1": first}, progress=False)
    assert mixed.keys() == held.keys()
    assert all(same_bits(mixed[name], held[name]) for name in held)


def test_dtypes_that_are_not_merged_are_copied_and_tensors_without_elements_kept() -> None:
    special = {
        "f8": torch.arange(8.0).to(torch.float8_e4m3fn),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 4),
        "count": torch.tensor([7], dtype=torch.uint16),
    }
    models = {key: {"w": torch.ones(2), **special} for key in "ab"}
    merged = merge_state_dicts({**LINEAR, "exclude": ["f8"]}, models, progress=False)
    assert list(merged) == ["w", *special]
    assert all(same_bits(merged[name], special[name]) for name in special)


def test_the_loop_over_merged_tensors_gives_what_the_whole_merge_gives_and_may_be_left() -> None:
    models = two(**{f"w{i}": torch.full((300,), float(i)) for i in range(40)})
    expected = merge_state_dicts(LINEAR, models, progress=False)
    found = dict(iter_merged(LINEAR, models))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    threads = threading.active_count()
    for _ in iter_merged(LINEAR, models):
        break
    assert threading.active_count() <= threads


def test_tied_tensors_come_one_after_the_other_from_the_loop() -> None:
    shared = torch.ones(3, 3)
    models = {key: {"shared.weight": shared, "decoder.weight": shared} for key in "ab"}
    (first, x), (second, y) = iter_merged(LINEAR, models)
    assert (first, second) == ("shared.weight", "decoder.weight")
    assert x is y


def test_progress_is_told_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    merge_state_dicts(LINEAR, two(w=torch.ones(4)))
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "merging a, b by linear into memory" in stderr


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    merge_state_dicts(LINEAR, two(w=torch.ones(4)), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_not_finite_is_refused_or_kept_and_reported() -> None:
    models = two(w=torch.tensor([1.0, float("nan"), 2.0]))
    with pytest.raises(ModelError, match=r"tensor w .*element 1|w.*models\['a'\]"):
        merge_state_dicts(LINEAR, models, progress=False)
    with pytest.raises(ModelError):
        list(iter_merged(LINEAR, models))
    with pytest.warns(StreammergeWarning, match=r"tensor w: 1 elements of models\['a'\]"):
        merged = merge_state_dicts(LINEAR, models, nonfinite="warn", progress=False)
    assert merged["w"].isnan().tolist() == [False, True, False]
    large = {key: {"w": torch.tensor([6e4, 1.0]).half()} for key in "ab"}
    config = {**LINEAR, "parameters": {"weight": 2.0, "normalize": False}}
    with pytest.warns(StreammergeWarning, match="tensor w: 1 merged elements overflow F16"):
        merge_state_dicts(config, large, nonfinite="warn", progress=False)


def test_a_set_stop_ends_the_merge() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        merge_state_dicts(LINEAR, two(w=torch.ones(4)), stop=stop, progress=False)


class Odd:
    """No model."""


@pytest.mark.parametrize(
    ("models", "change", "message"),
    [
        ({"a": {"w": torch.ones(2)}}, {}, r"model 'b' is not a key of `models` \('a'\)"),
        ({**two(w=torch.ones(2)), "c": {"w": torch.ones(2)}}, {}, "models: 'c' is given, but the config"),
        ({"a": {}, "b": {}}, {}, r"models\['a'\]: holds no tensor"),
        ({"a": {"w": 1.0}, "b": {}}, {}, r"models\['a'\]\['w'\]: a float is neither"),
        ({"a": {7: torch.ones(2)}, "b": {}}, {}, r"models\['a'\]\[7\]: a tensor's name is a text"),
        ({"a": Odd(), "b": {}}, {}, r"models\['a'\]: must be a state dict, a module or a path, not a Odd"),
        ({"a": {"w": torch.ones(2, device="meta")}, "b": {}}, {}, "has no values: load the model first"),
        ({"a": {"w": torch.eye(2).to_sparse()}, "b": {}}, {}, "make it dense floats"),
        ({"a": {"w": np.array(["x"])}, "b": {}}, {}, "cannot be merged"),
        (
            {"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(3)}},
            {},
            r"\[3\] in models\['b'\], \[2\] in models\['a'\]",
        ),
        (
            two(w=torch.ones(2)),
            {"tokenizer_source": "union"},
            "tokenizer_source: models in memory have no tokenizer",
        ),
        (
            two(w=torch.ones(2)),
            {
                "merge_method": "fisher",
                "parameters": {},
                "models": [{"model": "a", "fisher": "x"}, {"model": "b", "fisher": "x"}],
            },
            "fisher 'x' is not a key of `fishers`",
        ),
        ([], {}, "models: must be a mapping of names to state dicts, not a list"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(
    models: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        merge_state_dicts({**LINEAR, **change}, models, progress=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        iter_merged({**LINEAR, **change}, models)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_are_read_where_they_lie() -> None:
    models = two(w=torch.arange(6.0).reshape(2, 3).T)
    on_gpu = {key: {name: t.cuda() for name, t in tensors.items()} for key, tensors in models.items()}
    merged = merge_state_dicts(LINEAR, on_gpu, progress=False)
    assert torch.equal(merged["w"], merge_state_dicts(LINEAR, models, progress=False)["w"])
