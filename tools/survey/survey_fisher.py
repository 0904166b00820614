"""
Fisher diagonals of the survey's fine-tunes: the exact estimator of Matena and Raffel, section 3.3.

F = mean over examples of sum over labels y of p(y|x) (d log p(y|x) / d theta)^2, every example for itself, with
the model in eval mode and the task's head fixed. A parameter the loss does not touch gets zeros.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from finetune_minilm import MAX_TOKENS, TASKS, Encoder, save, split
from safetensors.torch import load_file
from survey_models import Bench, Demo, MiniLM, Part
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "make"))

from make_demo_models import exact_diagonal

N_TEXTS = 256
DEMO_SEED, MINILM_SEED = 1, 0  # The seeds of the models' own training, so that the examples are from it.


def make_diagonals(bench: Bench) -> None:
    """Estimate the diagonal of every fine-tune and import it into a Zarr store by the command line."""
    for task in bench.part.tasks:
        store = bench.diagonal(task)
        if store.exists():
            continue
        path = store.with_suffix(".safetensors")
        if not path.exists():
            store.parent.mkdir(parents=True, exist_ok=True)
            save(_diagonal(bench.part, task), path)
        command = ["fisher", "import", str(bench.part.model(task)), str(path), "--out", str(store), "--quiet"]
        command += ["--estimator", "exact, sum over labels"]
        subprocess.run([sys.executable, "-m", "streammerge.cli", *command], check=True)


def _diagonal(part: Part, task: str) -> dict[str, Tensor]:
    if isinstance(part, Demo):
        return exact_diagonal(load_file(part.model(task) / "model.safetensors"), task, DEMO_SEED)
    assert isinstance(part, MiniLM)
    return minilm_diagonal(part, task, N_TEXTS)


def minilm_diagonal(part: MiniLM, task: str, n: int) -> dict[str, Tensor]:
    """Over the first `n` training texts; they are made again as `finetune_minilm.py` made them."""
    texts = [text for text, _ in split(TASKS[task](), random.Random(MINILM_SEED))[0][:n]]
    encoder = Encoder(part.model(task))
    encoder.model.eval()
    head = load_file(part.model(task) / "head.safetensors")
    assert len(head["bias"]) == len(json.loads((part.model(task) / "labels.json").read_text()))
    table = encoder.model.get_input_embeddings().weight.requires_grad_(False)
    named = {name: p for name, p in encoder.model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    words = torch.zeros_like(table)
    for text in texts:
        _add_text(encoder, head, text, named, total, words)
    total["embeddings.word_embeddings.weight"] = words
    stored = load_file(part.model(task) / "model.safetensors")
    return {
        name: total[name] / n if name in total else torch.zeros_like(tensor)
        for name, tensor in stored.items()
        if tensor.is_floating_point()
    }


def _add_text(
    encoder: Encoder,
    head: dict[str, Tensor],
    text: str,
    named: dict[str, nn.Parameter],
    total: dict[str, Tensor],
    words: Tensor,
) -> None:
    """Add one text's term; rows of the word table get theirs through the embedded tokens, for speed."""
    batch = encoder.tokenizer([text], max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    rows, place = batch["input_ids"][0].unique(return_inverse=True)
    embedded = encoder.model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
    hidden = encoder.model(inputs_embeds=embedded, **batch).last_hidden_state
    log_p = (hidden.mean(1)[0] @ head["weight"].T + head["bias"]).log_softmax(0)
    leaves = [embedded, *named.values()]
    for label, p in enumerate(log_p.detach().exp().tolist()):
        gradients = torch.autograd.grad(
            log_p[label], leaves, retain_graph=label + 1 < len(log_p), allow_unused=True
        )
        row_sums = torch.zeros(len(rows), words.shape[1]).index_add_(0, place, gradients[0][0])
        words[rows] += p * row_sums.square()
        for name, g in zip(named, gradients[1:], strict=True):
            if g is not None:
                total[name].addcmul_(g, g, value=p)
