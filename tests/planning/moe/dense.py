"""Dense models so small that a mixture of them is made in a moment, and the models that read the mixtures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
HIDDEN, INTERMEDIATE, LAYERS = 32, 48, 2
_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
TOKENS = torch.arange(3, 23).reshape(2, 10)


def write_dense(
    folder: Path, family: str, seed: int, dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """Write a dense model with random weights, and return its directory."""
    name = FAMILIES[family]
    sizes = {**_SIZES, **({"head_dim": 16} if family == "qwen3" else {}), **settings}
    config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder)
    write_words(folder)
    return folder


def write_header(folder: Path, **sizes: int) -> Path:
    """Write a Llama of any size whose weights take no room on the disk: only a header, and a hole."""
    config = transformers.LlamaConfig(**{**_SIZES, **sizes}, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        tensors = transformers.LlamaForCausalLM(config).state_dict()
    config.save_pretrained(folder)
    write_words(folder)
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def write_experts(names: Sequence[str], prompts: Sequence[str]) -> None:
    """Write a model for each name, whose beginning tells the family, with a tokenizer of the words of some prompts."""
    words = sorted({word for text in prompts for word in text.split()})
    for seed, name in enumerate(names):
        write_words(write_dense(Path(name), Path(name).name.partition("-")[0], seed), words)


def write_words(folder: Path, known: Sequence[str] = [f"w{i}" for i in range(3, 90)]) -> None:
    """Write a tokenizer whose tokens from 3 on are words, with a BOS."""
    words = {"<s>": 1, "</s>": 2, "w0": 0} | {word: i for i, word in enumerate(known, 3)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def load(folder: Path) -> Any:
    """Return the model in a directory; every tensor must have been used, and every parameter found."""
    settings = json.loads((folder / "config.json").read_text())
    if settings["model_type"] == "deepseek":
        return DeepSeek.of(folder, settings)
    model, about = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == settings["architectures"][0]
    problems = {key: found for key, found in about.items() if found}
    assert not problems, problems
    return model


class DeepSeek(nn.Module):
    """The MLP of DeepSeekMoE (Dai et al., 2024): routed experts, of which the best share a token, and shared ones."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = settings["hidden_size"], settings["moe_intermediate_size"]
        self.top_k = settings["num_experts_per_tok"]
        self.gate = nn.Linear(hidden, settings["n_routed_experts"], bias=False)
        self.experts = nn.ModuleList(_Mlp(hidden, inner) for _ in range(settings["n_routed_experts"]))
        shared = settings["n_shared_experts"]
        self.shared_experts = _Mlp(hidden, inner * shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        weights = torch.zeros(*x.shape[:-1], len(self.experts)).scatter(
            -1, chosen, scores / scores.sum(-1, keepdim=True)
        )
        total = sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        assert isinstance(total, Tensor)
        return total if self.shared_experts is None else total + self.shared_experts(x)

    @staticmethod
    def of(folder: Path, settings: dict[str, Any]) -> Any:
        """Return transformers' Llama with these MLPs; transformers itself reads the architecture with its authors' code only."""
        plain = {key: value for key, value in settings.items() if key not in ("model_type", "auto_map")}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**plain))
        for layer in model.model.layers:
            layer.mlp = DeepSeek(settings)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()


class _Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
