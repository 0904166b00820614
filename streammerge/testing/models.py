"""Small models on disk, and configs over them, for checks of the laws."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import streammerge.methods.catalog  # noqa: F401  (registers the built-in methods)
from streammerge.methods.registry import all_methods

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (700, 64),
    "model.layers.0.self_attn.q_proj.weight": (96, 130),
    "model.layers.0.mlp.down_proj.weight": (37, 53),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.self_attn.q_proj.weight": (96, 130),
    "model.layers.1.mlp.down_proj.weight": (37, 53),
    "model.layers.1.input_layernorm.weight": (64,),
    "conv.weight": (8, 3, 3, 3),
    "column": (301, 1),
    "scalar": (),
    "empty": (0, 5),
    "lm_head.weight": (700, 64),
}
"""Shapes that a model has, and odd ones: rows of one element, no axes, no elements."""


def write_model(directory: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a model directory and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    return directory


def write_models(
    directory: Path,
    n_models: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    spread: float = 1e-3,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    seed: int = 0,
) -> list[Path]:
    """Write a base and fine-tunes of it: [base, model 1, model 2, ...].

    Parameters
    ----------
    spread
        Standard deviation of the fine-tunes' task vectors; the base's is 0.02. If small, rounding gives many ties.
    """
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    paths = []
    for i in range(n_models + 1):
        tensors = {
            name: (t + (torch.randn(t.shape, generator=generator) * spread if i else 0)).to(dtype)
            for name, t in base.items()
        }
        tensors["position_ids"] = torch.arange(16)
        paths.append(write_model(directory / ("base" if i == 0 else f"m{i}"), tensors))
    return paths


def config_for(method: str, paths: Sequence[Path], **top: Any) -> dict[str, Any]:
    """Return a config for a method over [base, models...], as its traits require.

    The config has a base if the method uses one, at most as many models as it takes, and a Fisher diagonal or Gram
    matrices for each model if it weighs by them. A method that is not registered yet gets the base and all models.
    `top` sets and overrides keys.
    """
    models: list[dict[str, Any]] = [{"model": str(path)} for path in paths[1:]]
    config: dict[str, Any] = {"merge_method": method, "models": models, "base_model": str(paths[0])}
    registered = all_methods().get(method)
    if registered is not None:
        config["models"] = models = models[: registered.n_models[1]]
        drops = registered.drop.fraction in top.get("parameters", {})
        if registered.base in ("member", "none") and not drops:
            del config["base_model"]
        stores = {"fisher": (registered.fisher, write_fisher), "gram": (registered.gram, write_grams)}
        for key, (needed, write) in stores.items():
            for model in models if needed else ():
                model[key] = str(write(Path(model["model"])))
    return {**config, **top}


def write_fisher(model: Path, seed: int = 0) -> Path:
    """Write a Fisher diagonal next to a model's directory, if there is none: skewed, its zeros shared by all models."""
    path = model.with_name(f"{model.name}-fisher.safetensors")
    if not path.exists():
        generator = torch.Generator().manual_seed(sum(model.name.encode()) + seed)
        fisher = {}
        for name, tensor in read_tensors(model).items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                fisher[name] = (noise * 1e-4).square() * torch.exp(2 * noise)
                fisher[name].view(-1)[: tensor.numel() // 8] = 0.0
                fisher[name].view(-1)[tensor.numel() // 2 :: 7] = 0.0
        save_file(fisher, path)
    return path


def write_grams(model: Path) -> Path:
    """Write Gram matrices of the linear maps of a model next to its directory, if there are none."""
    from streammerge.checkpoint.index import open_model
    from streammerge.estimate.gram.compute import GramSums
    from streammerge.formats.zarr_store import GRAM_ATTRIBUTE
    from streammerge.formats.zarr_writer import StoreWriter, chunk_runs, locked_partial
    from streammerge.io.reader import Reader
    from streammerge.tensors.fingerprint import fingerprint

    path = model.with_name(f"{model.name}-gram.zarr")
    if path.exists():
        return path
    generator = torch.Generator().manual_seed(sum(model.name.encode()))
    matrices = {name: t.shape[1] for name, t in read_tensors(model).items() if t.dim() == 2 and t.numel()}
    widths = {name: n for name, n in matrices.items() if "mlp" in name} or matrices
    with locked_partial(path, False):
        store = StoreWriter(path, {}, attribute=GRAM_ATTRIBUTE, sums=GramSums)
        for name, n in widths.items():
            inputs = torch.randn(2 * n, n, generator=generator)
            gram = (inputs.T @ inputs / len(inputs)).numpy().reshape(-1)
            store.write(name, (n, n), "F32", (gram[a:b] for a, b in chunk_runs((n, n))))
        store.commit(
            widths, {"model_fingerprint": fingerprint(open_model(model), Reader()), "model_name": model.name}
        )
    return path


def output_bytes(out: Path) -> dict[str, bytes]:
    """Return the bytes of every file of an output."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def read_tensors(out: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of an output, shards joined."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("model*.safetensors")):
        tensors.update(load_file(path))
    return tensors
