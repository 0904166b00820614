"""Run mergekit configs as they are, on small models that stand in for those they name.

    python tools/compare/run_configs.py DIRECTORY_OR_FILE …

Every model that a config names becomes a llama of a few kilobytes with a tokenizer, as deep as the config's layer ranges ask
for: a hub name in a Hugging Face cache of the tool's own, any other path in its working directory. Adapters (`model+adapter`)
are LoRA in PEFT's format. The config is merged by the command, text untouched, the output verified, loaded by transformers
and run once. The documents of a file are merged one by one, into the directory that `out_path` or `name` says, so that
a later one finds the earlier.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

LAYERS, HIDDEN, INTER, KV, VOCAB = 4, 16, 24, 8, 40
COMMIT = "0" * 40
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Outcome:
    """How one config went."""

    name: str
    problem: str | None
    warnings: tuple[str, ...] = ()


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of a llama."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        p = f"model.layers.{layer}."
        yield p + "input_layernorm.weight", (HIDDEN,)
        yield p + "post_attention_layernorm.weight", (HIDDEN,)
        for name, rows, columns in (
            ("mlp.down_proj", HIDDEN, INTER),
            ("mlp.gate_proj", INTER, HIDDEN),
            ("mlp.up_proj", INTER, HIDDEN),
            ("self_attn.k_proj", KV, HIDDEN),
            ("self_attn.v_proj", KV, HIDDEN),
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
        ):
            yield f"{p}{name}.weight", (rows, columns)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def write_model(directory: Path, layers: int, seed: int) -> None:
    """Write a llama and its tokenizer; another seed, another fine-tune of the same base."""
    directory.mkdir(parents=True, exist_ok=True)
    base, tuned = np.random.default_rng(0), np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(layers):
        value = base.standard_normal(shape) * 0.05 + ("norm" in name)
        tensors[name] = (value + 0.01 * tuned.standard_normal(shape)).astype(np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer of `VOCAB` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = ["<unk>", "<s>", "</s>", *(chr(ord("a") + i) for i in range(26))]
    vocabulary += [f"tok{i}" for i in range(VOCAB - len(vocabulary))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_adapter(directory: Path, layers: int, seed: int) -> None:
    """Write a LoRA adapter of rank 2 on the query projections."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        p = f"base_model.model.model.layers.{layer}.self_attn.q_proj."
        tensors[p + "lora_A.weight"] = rng.standard_normal((2, HIDDEN)).astype(np.float32) * 0.1
        tensors[p + "lora_B.weight"] = rng.standard_normal((HIDDEN, 2)).astype(np.float32) * 0.1
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def references_of(config: Any) -> Iterator[str]:
    """Yield every model that a config names, adapters as ``model+adapter``."""
    if isinstance(config, dict):
        for key, value in config.items():
            is_source = key in ("tokenizer_source", "source") and value not in ("union", "base")
            if (key in ("model", "base_model") or is_source) and isinstance(value, str):
                yield value
            else:
                yield from references_of(value)
    elif isinstance(config, list):
        for item in config:
            yield from ([item] if isinstance(item, str) and "/" in item else references_of(item))


def depth_of(config: Any) -> int:
    """Return how many layers the models of a config need."""
    if isinstance(config, dict):
        mine = config.get("layer_range")
        return max(
            [mine[1] if isinstance(mine, list) else 0, *(depth_of(value) for value in config.values())]
        )
    return max((depth_of(item) for item in config), default=0) if isinstance(config, list) else 0


class Workshop:
    """A working directory with models, and a hub cache."""

    def __init__(self, root: Path, layers: int) -> None:
        self.root, self._layers = root, layers
        self.cache = root / "hub"
        self.environment = {**os.environ, "HF_HUB_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1"}

    def place(self, reference: str) -> Path:
        """Return where the stand-in of a reference lies."""
        name = reference.split("@")[0]
        if not _HUB_NAME.fullmatch(name):
            return self.root / name
        repo = self.cache / ("models--" + name.replace("/", "--"))
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        revision = reference.partition("@")[2] or "main"
        (repo / "refs" / revision).write_text(COMMIT)
        return repo / "snapshots" / COMMIT

    def prepare(self, config: Any) -> None:
        """Write the models that a config names and that are not there yet."""
        for reference in dict.fromkeys(references_of(config)):
            model, _, adapter = reference.partition("+")
            for seed, (name, write) in enumerate([(model, write_model), (adapter, write_adapter)]):
                directory = self.place(name) if name else None
                if directory is not None and not directory.exists():
                    write(directory, self._layers, seed + sum(name.encode()))

    def run(self, *arguments: str) -> tuple[str | None, tuple[str, ...]]:
        """Run the command; return the error, if there is one, and the warnings."""
        done = subprocess.run(
            [sys.executable, "-m", "streammerge.cli", *arguments],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        lines = done.stderr.splitlines()
        warnings = tuple(line.removeprefix("warning: ") for line in lines if line.startswith("warning: "))
        error = next((line for line in reversed(lines) if not line.startswith("warning: ")), "no message")
        return (None if done.returncode == 0 else f"exit {done.returncode}: {error}"), warnings

    def merge(self, text: str, name: str, out: str) -> Outcome:
        """Merge one document, verify and load what comes out."""
        self.prepare(yaml.safe_load(text))
        (self.root / "config.yml").write_text(text)
        problem, warnings = self.run("merge", "config.yml", out, "--memory", "512MiB", "--quiet")
        if problem is None:
            problem, _ = self.run("verify", out)
        return Outcome(name, problem or self.cannot_load(self.root / out), warnings)

    def cannot_load(self, out: Path) -> str | None:
        """Return why transformers cannot load and run an output, None if it can."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if loading[kind]:
                return f"transformers: {kind}: {sorted(loading[kind])[:3]}"
        tokens = AutoTokenizer.from_pretrained(out)("a b c", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            finite = bool(torch.isfinite(model(tokens).logits).all())
        return None if finite else "the logits are not finite"


def documents(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the text, the name and the output directory of every document of a file."""
    texts = [part for part in re.split(r"(?m)^---\s*$", path.read_text()) if part.strip()]
    for number, text in enumerate(texts, 1):
        config = yaml.safe_load(text)
        name = path.name if len(texts) == 1 else f"{path.name}, document {number}"
        said = config.get("out_path") or config.get("name") if len(texts) > 1 else None
        yield text, name, said or f"merged-{path.stem}-{number}"


def main() -> None:
    """Run all configs given; exit with 1 if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path)
    files: list[Path] = []
    for path in parser.parse_args().paths:
        files += sorted(path.glob("*.y*ml")) if path.is_dir() else [path]
    outcomes = []
    for file in files:
        with tempfile.TemporaryDirectory() as root:
            layers = depth_of(list(yaml.safe_load_all(file.read_text()))) or LAYERS
            workshop = Workshop(Path(root), layers)
            for text, name, out in documents(file):
                outcomes.append(workshop.merge(text, name, out))
                print(f"{name:40} {outcomes[-1].problem or 'merged, verified, loaded, run'}", flush=True)
                for warning in outcomes[-1].warnings:
                    print(f"{'':40}   warning: {warning}")
    failed = sum(one.problem is not None for one in outcomes)
    print(f"{len(outcomes)} configs, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
