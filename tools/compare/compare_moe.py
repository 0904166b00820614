"""Compare mixtures of experts with those of mergekit-moe 0.1.5, from the same configs and models.

    python tools/compare/compare_moe.py MERGEKIT_ENVIRONMENT

Needs a virtual environment with mergekit, and here what the tests need. Models are small and random, in float32. Every
tensor must be equal, the gates apart. Gates of hidden states must agree to what mergekit's bfloat16 leaves of them, those of
embeddings to 1e-6. Of random gates shape and size are compared. Where mergekit fails, its error is shown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

import streammerge
from streammerge.errors import StreammergeError

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
PROMPTS = (["w3 w4 w5", "w6 w7 w8"], ["w9 w10 w11"], ["w12 w13 w14"])
RAGGED = (["w3 w4 w5 w6 w7", "w6"], ["w9 w10"], ["w12 w13 w14 w15"])
MODES = ("cheap_embed", "hidden", "hidden_avg", "hidden_last", "random", "uniform_random")
CONFIG_KEYS = ("auto_map", "transformers_version", "torch_dtype", "id2label", "label2id", "layer_types")
"""Keys of config.json that are not compared."""


@dataclass(frozen=True)
class Case:
    """One config."""

    name: str
    family: str
    mode: str
    more: dict[str, Any] = field(default_factory=dict)
    expert: dict[str, Any] = field(default_factory=dict)
    """Keys of the second expert."""
    shared: int | None = None
    """Model of the shared expert."""
    prompts: tuple[list[str], ...] = PROMPTS
    meant: str = ""
    """Words of the difference that is meant."""


def cases() -> Iterator[Case]:
    """Yield all cases."""
    yield from (Case(f"llama, {mode}", "llama", mode) for mode in MODES)
    for mode, meant in (("cheap_embed", ""), ("hidden", ""), ("hidden_avg", "gate.weight: cosine")):
        name = f"llama, {mode}, prompts of many lengths"
        yield Case(name, "llama", mode, prompts=RAGGED, meant=meant)  # the mean there counts padding
    yield Case("mistral, hidden", "mistral", "hidden", meant="sliding_window is 4096, there None")
    yield Case("qwen3, uniform_random", "qwen3", "uniform_random")
    yield Case("qwen2, uniform_random, shared", "qwen2", "uniform_random", shared=1)
    yield Case("llama as Qwen MoE, hidden, shared", "llama", "hidden", {"architecture": "Qwen MoE"}, shared=1)
    yield Case(
        "llama as Qwen MoE, shared model that is no expert",
        "llama",
        "hidden",
        {"architecture": "Qwen MoE"},
        shared=3,
        meant="mergekit fails",
    )
    yield Case("llama as DeepSeek MoE, hidden", "llama", "hidden", {"architecture": "DeepSeek MoE"})
    yield Case("llama as DeepSeek MoE, shared", "llama", "hidden", {"architecture": "DeepSeek MoE"}, shared=1)
    yield Case("llama, residual_scale", "llama", "hidden", expert={"residual_scale": 0.3})
    yield Case("llama, negative prompts", "llama", "hidden", expert={"negative_prompts": ["w20 w21 w22"]})
    yield Case("llama, experts_per_token", "llama", "hidden", {"experts_per_token": 1})
    yield Case("llama, bfloat16", "llama", "hidden", {"dtype": "bfloat16"})


def write_models(work: Path) -> None:
    """Write four models of each family, with a tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    words = {"<s>": 1, "</s>": 2, "w0": 0} | {f"w{i}": i for i in range(3, 90)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    for family, name in CLASSES.items():
        config = getattr(transformers, f"{name}Config")(
            **SIZES, **({"head_dim": 16} if family == "qwen3" else {})
        )
        for number in range(4):
            torch.manual_seed(number)
            model = getattr(transformers, f"{name}ForCausalLM")(config)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(work / f"{family}-{number}")
            fast.save_pretrained(work / f"{family}-{number}")


def config_of(case: Case, work: Path) -> dict[str, Any]:
    """Return the config of a case."""

    def model(number: int) -> str:
        return str(work / f"{case.family}-{number}")

    experts: list[dict[str, Any]] = [
        {"source_model": model(i), "positive_prompts": case.prompts[i - 1]} for i in (1, 2)
    ]
    experts[1] |= case.expert
    config = {
        "base_model": model(0),
        "gate_mode": case.mode,
        "dtype": "float32",
        "experts": experts,
        **case.more,
    }
    if case.shared is not None:
        shared: dict[str, Any] = {"source_model": model(case.shared), "residual_scale": 0.5}
        if "DeepSeek" not in case.more.get("architecture", ""):
            shared["positive_prompts"] = case.prompts[2]
        config["shared_experts"] = [shared]
    return config


def tensors_of(out: Path) -> dict[str, Tensor]:
    """Return the tensors of an output."""
    return {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()}


def differences(case: Case, ours: Path, theirs: Path) -> Iterator[str]:
    """Yield what differs between two outputs."""
    a, b = tensors_of(ours), tensors_of(theirs)
    if a.keys() != b.keys():
        yield f"names: only here {sorted(a.keys() - b.keys())[:2]}, only there {sorted(b.keys() - a.keys())[:2]}"
    gates = [name for name in a.keys() & b.keys() if name.endswith(("gate.weight", "expert_gate.weight"))]
    for name in a.keys() & b.keys():
        if a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            yield f"{name}: {a[name].dtype} {list(a[name].shape)}, there {b[name].dtype} {list(b[name].shape)}"
        elif name not in gates and not torch.equal(a[name], b[name]):
            yield f"{name}: differs by {(a[name] - b[name]).abs().max():.2g}"
    for name in gates:
        if "random" in case.mode:
            sizes = [t[name].float().square().mean().sqrt() for t in (a, b)]
            if not 0.7 < sizes[0] / sizes[1] < 1.4:
                yield f"{name}: of size {sizes[0]:.2g}, there {sizes[1]:.2g}"
        else:
            cosine = torch.cosine_similarity(a[name].double(), b[name].double()).min()
            lengths = a[name].double().norm(dim=1) / b[name].double().norm(dim=1)
            near, far = (1e-9, 1e-6) if case.mode == "cheap_embed" else (2e-4, 0.01)
            if 1 - cosine > near or (lengths - 1).abs().max() > far:
                yield f"{name}: cosine {cosine:.4f}, lengths {lengths.tolist()}"
    one, other = (json.loads((out / "config.json").read_text()) for out in (ours, theirs))
    for key in sorted(one.keys() & other.keys()):
        if one[key] != other[key] and key not in CONFIG_KEYS:
            yield f"config.json: {key} is {one[key]}, there {other[key]}"


def main() -> None:
    """Compare, and print a line for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environment", type=Path, help="a virtual environment with mergekit")
    environment = parser.parse_args().environment
    driver = Path(__file__).with_name("mergekit_driver.py")
    command = [str(environment / "bin" / "python"), str(driver), "moe"]
    failed = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as mergekit,
    ):
        assert mergekit.stdin is not None
        assert mergekit.stdout is not None
        work = Path(folder)
        write_models(work)
        for number, case in enumerate(cases()):
            config = config_of(case, work)
            file, ours, theirs = (work / f"{number}{end}" for end in (".yml", "-ours", "-theirs"))
            file.write_text(yaml.safe_dump(config))
            mergekit.stdin.write(json.dumps([str(file), str(theirs)]) + "\n")
            mergekit.stdin.flush()
            error = json.loads(mergekit.stdout.readline())
            fused = (
                "DeepSeek" not in case.more.get("architecture", "")
                and case.family != "qwen2"
                and "Qwen" not in case.more.get("architecture", "")
            )
            try:
                streammerge.merge(
                    {**config, "expert_names": "fused" if fused else "classic"}, ours, progress=False
                )
            except StreammergeError as refusal:
                found = [f"refused here: {refusal}"]
            else:
                found = [f"mergekit fails: {error}"] if error else list(differences(case, ours, theirs))
            bad = [line for line in found if not case.meant or case.meant not in line]
            failed += bool(bad) or (not found and bool(case.meant))
            told = "the same" if not found else f"{'' if bad else 'meant: '}{'; '.join((bad or found)[:4])}"
            print(f"{case.name}: {told}", flush=True)
        mergekit.stdin.close()
    print(f"{failed} differ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
