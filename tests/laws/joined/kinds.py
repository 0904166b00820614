"""Merges of every kind of input and output, small, each with several shards or files to share out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Config = dict[str, Any] | str
WHOLE = {"density": 0.3, "trim_scope": "model", "ties": "index"}
KINDS: dict[str, Callable[[Path], Config]] = {}


def kind(function: Callable[[Path], Config]) -> Callable[[Path], Config]:
    """Register what writes the inputs of a kind of merge and returns its config."""
    KINDS[function.__name__] = function
    return function


def written(room: Path) -> dict[str, Config]:
    """Write the inputs of every kind; return the configs."""
    return {name: write(room / name) for name, write in KINDS.items()}


def ties(base: object, *models: object, **more: Any) -> dict[str, Any]:
    """Return a merge with two rounds over the whole model."""
    return {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [str(model) for model in models],
        "parameters": WHOLE,
        **more,
    }


@kind
def adapters(room: Path) -> Config:
    from tests.checkpoint.adapters.scene import Q, factors, write_adapter, write_base

    base = write_base(room / "base")
    write_adapter(room / "a", factors(Q, 24, 40, 8, 1))
    return ties(base, f"{base}+{room / 'a'}", write_base(room / "other", seed=1))


@kind
def adapters_upon_a_whole_model(room: Path) -> Config:
    from tests.checkpoint.adapters.scene import Q, factors, write_adapter, write_base

    base = write_base(room / "base")
    write_adapter(room / "a", factors(Q, 24, 40, 8, 1))
    models = [{"model": f"{base}+{room / 'a'}", "parameters": {"weight": 0.5}}]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}


@kind
def stages(room: Path) -> Config:
    import yaml

    from tests.checkpoint.adapters.scene import write_base

    base, *models = (str(write_base(room / f"m{i}", seed=i)) for i in range(4))
    first = {"name": "a", **ties(base, *models[:2])}
    second = {"name": "b", "merge_method": "dare_ties", "base_model": base, "models": ["a", models[2]]}
    second |= {"parameters": {"density": 0.5}, "dtype": "float16", "seed": 2}
    return yaml.safe_dump_all([first, second, ties(base, "b", models[1])], sort_keys=False)


@kind
def quantised_output(room: Path) -> Config:
    from tests.conftest import write_models

    names = {f"model.layers.{i}.mlp.up_proj.weight": (128, 128) for i in range(2)}
    paths = write_models(room, 2, shapes={"model.embed_tokens.weight": (64, 64), **names})
    return ties(*paths, quantize="fp8", dtype="bfloat16")


@kind
def quantised_input(room: Path) -> Config:
    from tests.laws.quantised.test_merges import write_fp8

    room.mkdir()
    a, b = write_fp8(room / "a", 0, 2), write_fp8(room / "b", 1, 2)
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (a, b)]
    return {"merge_method": "linear", "models": models, "quantize": "same"}


@kind
def single_files(room: Path) -> Config:
    import torch
    from safetensors.torch import save_file

    room.mkdir()
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        tensors = {
            f"model.diffusion_model.{i}.weight": torch.randn(48, 40, generator=random) for i in range(3)
        }
        save_file(tensors, room / f"{seed}.safetensors", metadata={"modelspec.title": "a mix"})
    return ties(*(room / f"{seed}.safetensors" for seed in range(3)))


@kind
def pipelines(room: Path) -> Config:
    from tests.checkpoint.pipelines import write_pipeline

    paths = [write_pipeline(room / name, seed) for seed, name in enumerate("abc")]
    return ties(*paths)


@kind
def training_runs(room: Path) -> Config:
    import torch

    from tests.formats.dcp_files import write_dcp

    for step in (900, 1000):
        random = torch.Generator().manual_seed(step)
        tensors = {f"layers.{i}.weight": torch.randn(40, 64, generator=random) for i in range(3)}
        write_dcp(room / "run" / f"step-{step}", tensors)
    return {"merge_method": "linear", "checkpoints": {"directory": str(room / "run"), "schedule": "wma"}}


@kind
def vocabularies(room: Path) -> Config:
    from tests.checkpoint.tokenizers.scene import words, write

    config = {"model_type": "llama"}
    for seed, (name, first) in enumerate({"a": 100, "b": 200}.items()):
        write(room / name, words("".join(map(chr, range(first, first + 300)))), seed=seed, config=config)
    models = [{"model": str(room / name), "parameters": {"weight": 0.5}} for name in "ab"]
    return {"merge_method": "linear", "models": models, "tokenizer_source": "union"}


@kind
def slices(room: Path) -> Config:
    from tests.conftest import write_models

    names = {f"model.layers.{i}.mlp.up_proj.weight": (40, 64) for i in range(3)}
    paths = write_models(room, 2, shapes={"model.embed_tokens.weight": (64, 64), **names})
    for path in paths:
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3}))
    ranges = ((paths[1], [0, 2]), (paths[2], [1, 3]))
    found = [{"sources": [{"model": str(path), "layer_range": span}]} for path, span in ranges]
    return {"merge_method": "passthrough", "slices": found}


@kind
def mixtures_of_experts(room: Path) -> Config:
    import torch

    from tests.conftest import write_model

    squares = [f"self_attn.{name}_proj" for name in "qkvo"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (48, 32),
        "lm_head.weight": (48, 32),
        "model.norm.weight": (32,),
        **{f"model.layers.0.{name}.weight": (32, 32) for name in squares},
        **{f"model.layers.0.mlp.{name}_proj.weight": (64, 32) for name in ("gate", "up")},
        "model.layers.0.mlp.down_proj.weight": (32, 64),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.post_attention_layernorm.weight": (32,),
    }
    paths = []
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        paths.append(write_model(room / str(seed), tensors))
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    settings |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 48}
    for path in paths:
        (path / "config.json").write_text(json.dumps({**settings, "num_key_value_heads": 4}))
    experts = [{"source_model": str(path)} for path in paths[1:]]
    return {"base_model": str(paths[0]), "gate_mode": "random", "experts": experts}
