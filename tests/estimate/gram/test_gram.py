"""Gram matrices are those of hooks on the whole model; `regmean` merges with them by its formula."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from streammerge.algebra.regression import regression_operators
from streammerge.api import compute_grams, merge, plan, verify
from streammerge.errors import ConfigError, ModelError, Stopped
from streammerge.planning.schedule import Chunk
from tests.conftest import config_for, output_bytes, read_tensors
from tests.estimate.network.tiny import make_lines, make_model, write_lines


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that wait for each other are slow where others run; nothing here loses power."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arrays(store: Path) -> dict[str, np.ndarray]:
    group = zarr.open_group(str(store), mode="r")
    return {name: np.asarray(group[name][...]) for name in group.array_keys()}


def hooked(model: nn.Module, lines: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the mean of x x^T over all tokens, by the weight's name, fp64."""
    inputs: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: inputs.setdefault(name, []).append(
            args[0].flatten(0, -2).double()
        )

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(keep(f"{name}.weight"))
    with torch.no_grad():
        for line in lines:
            model(input_ids=torch.tensor([line["input_ids"]]))
    joined = {name: torch.cat(parts) for name, parts in inputs.items()}
    return {name: x.T @ x / len(x) for name, x in joined.items()}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_matrices_are_those_of_hooks_on_the_whole_model(name: str, tmp_path: Path) -> None:
    model, lines = make_model(name, tmp_path / "model"), make_lines()
    data = write_lines(tmp_path / "data.jsonl", lines)
    compute_grams(tmp_path / "model", data, tmp_path / "s.zarr")
    found, expected = arrays(tmp_path / "s.zarr"), hooked(model, lines)
    assert set(found) == {name for name in expected if ".layer" in name}
    for weight, gram in found.items():
        assert np.abs(gram - expected[weight].numpy()).max() < 1e-6 * float(expected[weight].abs().max())


def test_stopped_and_run_again_the_store_has_the_same_bytes(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", make_lines(4))
    compute_grams(tmp_path / "model", data, tmp_path / "whole.zarr")
    stops = 0
    for share in (0.1, 0.6, 2.0):
        stop = threading.Event()

        def watch(event: Any, stop: threading.Event = stop, share: float = share) -> None:
            if event.kind == "progress" and event.values["elements"] > share * event.values["elements_total"]:
                stop.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("streammerge.estimate.network.progress._EVENT_SECONDS", 0.0)
            try:
                compute_grams(tmp_path / "model", data, tmp_path / "parts.zarr", on_event=watch, stop=stop)
            except Stopped:
                stops += 1
    assert stops == 2
    whole, parts = tmp_path / "whole.zarr", tmp_path / "parts.zarr"
    files = [p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.is_file()]
    assert files == [p.relative_to(parts) for p in sorted(parts.rglob("*")) if p.is_file()]
    assert all((whole / file).read_bytes() == (parts / file).read_bytes() for file in files)


# --- merging


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and their matrices."""
    directory = tmp_path_factory.mktemp("pair")
    torch.set_num_threads(1)
    for n, name in enumerate(("a", "b")):
        make_model("llama", directory / name, seed=n)
        data = write_lines(directory / f"{name}.jsonl", make_lines(20, seed=n))
        compute_grams(directory / name, data, directory / f"{name}.zarr")
    return directory


def config_of(pair: Path, **parameters: Any) -> dict[str, Any]:
    models = [{"model": str(pair / name), "gram": str(pair / f"{name}.zarr")} for name in ("a", "b")]
    return {"merge_method": "regmean", "models": models, "parameters": parameters}


def by_formula(pair: Path, alpha: float) -> Mapping[str, torch.Tensor]:
    """Return (W_a G_a + W_b G_b) (G_a + G_b)^-1 of linear maps, the average of everything else, fp64."""
    models = [read_tensors(pair / name) for name in ("a", "b")]
    stores = [arrays(pair / f"{name}.zarr") for name in ("a", "b")]
    merged = {}
    for name in models[0]:
        weights = [model[name].double() for model in models]
        merged[name] = (weights[0] + weights[1]) / 2
        if name in stores[0]:
            grams = [torch.from_numpy(store[name]).double() for store in stores]
            grams = [alpha * g + (1 - alpha) * g.diagonal().diag() for g in grams]
            right = weights[0] @ grams[0] + weights[1] @ grams[1]
            merged[name] = torch.linalg.solve(grams[0] + grams[1], right, left=False)
    return merged


@pytest.mark.parametrize("alpha", [0.9, 0.5, 0.0])
def test_linear_maps_are_merged_by_least_squares(alpha: float, pair: Path, tmp_path: Path) -> None:
    merge(config_of(pair, alpha=alpha), tmp_path / "out", memory="1GiB")
    found, expected = read_tensors(tmp_path / "out"), by_formula(pair, alpha)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-5, atol=1e-6), name


def test_the_bytes_depend_on_neither_memory_nor_threads_and_verify_agrees(pair: Path, tmp_path: Path) -> None:
    config = config_of(pair, alpha=0.9)
    merge(config, tmp_path / "one", memory="500MiB", threads=1)
    merge(config, tmp_path / "two", memory="4GiB", threads=4)
    assert output_bytes(tmp_path / "one") == output_bytes(tmp_path / "two")
    verdict = verify(tmp_path / "one", against=config, sample=None)
    assert not verdict.problems


def test_pieces_of_rows_give_the_bytes_of_the_whole(
    make_models: Callable[..., list[Path]], small_capacity: Callable[[int, int], None], tmp_path: Path
) -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (1000, 40), "model.norm.weight": (40,)}
    config = config_for("regmean", make_models(n_models=2, shapes=shapes))
    merge(config, tmp_path / "whole", memory="1GiB")
    small_capacity(5_300_000, 2)  # little more than what torch needs for a block
    assert sum(isinstance(step, Chunk) for step in plan(config).steps()) > 2
    merge(config, tmp_path / "pieces")
    assert output_bytes(tmp_path / "whole") == output_bytes(tmp_path / "pieces")


def test_directions_without_data_keep_the_average() -> None:
    """Two inputs are never fed: the mixers leave what lies along them alone, and mix the others as if alone."""
    random = np.random.default_rng(0)
    grams = []
    for _ in range(2):
        x = random.standard_normal((50, 6)).astype(np.float32)
        x[:, 4:] = 0.0
        grams.append(x.T @ x / 50)
    few = [gram[:4, :4].copy() for gram in grams]
    found = regression_operators(grams, 1.0, (1.0, 1.0))
    expected = regression_operators(few, 1.0, (1.0, 1.0))
    for mixer, alone in zip(found, expected, strict=True):
        assert torch.allclose(mixer[:4, :4], alone, atol=1e-5)
        assert not mixer[4:].any()
        assert not mixer[:, 4:].abs().max() > 1e-12


def test_a_model_that_alone_has_weight_is_returned(pair: Path, tmp_path: Path) -> None:
    config = config_of(pair)
    config["models"][0]["parameters"], config["models"][1]["parameters"] = {"weight": 0.0}, {"weight": 2.0}
    merge(config, tmp_path / "out", memory="1GiB")
    found, expected = read_tensors(tmp_path / "out"), read_tensors(pair / "b")
    assert all(torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-8) for name in expected)


def test_what_does_not_belong_together_is_refused(pair: Path, tmp_path: Path) -> None:
    swapped = config_of(pair)
    swapped["models"][0]["gram"], swapped["models"][1]["gram"] = (str(pair / f"{n}.zarr") for n in ("b", "a"))
    with pytest.raises(ModelError, match="belongs to model 'b'"):
        merge(swapped, tmp_path / "out")
    none = config_of(pair)
    del none["models"][1]["gram"]
    with pytest.raises(ConfigError, match="needs the model's Gram matrices"):
        merge(none, tmp_path / "out")
    with pytest.raises(ConfigError, match="takes no Gram matrices"):
        merge({**config_of(pair), "merge_method": "linear"}, tmp_path / "out")


def test_the_bytes_do_not_depend_on_the_threads_of_matrix_products(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """With 300 inputs the products of two threads differ from those of one in their last bits."""
    paths = make_models(shapes={"mlp.weight": (1100, 300)}, dtype=torch.float64)
    config = config_for("regmean", paths)
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        merge(config, tmp_path / str(n))
        assert torch.get_num_threads() == n
        found.append(output_bytes(tmp_path / str(n)))
    assert found[0] == found[1]
