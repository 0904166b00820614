"""Make the pictures of the pages in docs/use/pictures: a comparison, a merge's report, and a sweep, as a browser shows them.

    python tools/pages/screenshots.py

The sweep merges the demo's models and scores them on its images. The other two pages show models made here: 24 layers of random
weights, and changes to them that differ by layer, since no model with layers ships with the program. It needs a Chromium.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from browser import browser

import streammerge
from streammerge.demo.digits import TASKS, accuracy, load_model, model_dir
from streammerge.report.pages.sweep import sweep_page
from streammerge.testing.models import write_model

LAYERS, WIDTH, INNER, WORDS = 24, 64, 160, 512
WINDOW, HEIGHT = 1000, 1100
"""The size of a picture in pixels."""
LAMBDAS, DENSITIES = (0.5, 1.0, 1.5, 2.0), (0.1, 0.2, 0.5)
"""The example of docs/use/sweeps.md."""
MOST_NBYTES = 150_000


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of a small llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.self_attn.{one}_proj.weight": (WIDTH, WIDTH) for one in "qkvo"}
        found |= {f"{prefix}.mlp.{one}_proj.weight": (INNER, WIDTH) for one in ("gate", "up")}
        found[f"{prefix}.mlp.down_proj.weight"] = (WIDTH, INNER)
        found[f"{prefix}.input_layernorm.weight"] = (WIDTH,)
    return found


def change(shape: tuple[int, ...], size: float, seed: int) -> torch.Tensor:
    """Return a change whose entries have heavy tails, as those of fine-tunes have."""
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 3


def write_family(folder: Path) -> tuple[Path, list[Path]]:
    """Write a base and three fine-tunes: one grows with depth, one peaks in the middle, one shares much with the first."""
    base = {name: change(shape, 0.5, i) for i, (name, shape) in enumerate(shapes().items())}
    tensors: dict[str, dict[str, torch.Tensor]] = {"math": {}, "code": {}, "chat": {}}
    for i, (name, weight) in enumerate(base.items()):
        depth = int(name.split(".")[2]) / LAYERS if "layers" in name else 0.1
        math = change(tuple(weight.shape), 0.01 + 0.03 * depth, 1000 + i)
        code = change(tuple(weight.shape), 0.035 - 0.1 * (depth - 0.5) ** 2, 2000 + i)
        own = change(tuple(weight.shape), 0.02, 3000 + i)
        tensors["math"][name] = weight + math
        tensors["code"][name] = weight + code
        tensors["chat"][name] = weight + 0.5 * math + own
    written = write_model(folder / "base", {name: t.bfloat16() for name, t in base.items()})
    models = [
        write_model(folder / model, {name: t.bfloat16() for name, t in own.items()})
        for model, own in tensors.items()
    ]
    return written, models


def ties(base: Path, models: list[Path], **more: Any) -> dict[str, Any]:
    """Return a config."""
    given = [{"model": str(model), "parameters": {"weight": 1.0, "density": 0.3}} for model in models]
    return {"merge_method": "ties", "base_model": str(base), "models": given, "dtype": "bfloat16", **more}


def swept(folder: Path) -> str:
    """Return the page of a sweep over the demo's models."""
    models = [{"model": str(model_dir(task)), "parameters": {"weight": 1.0}} for task in TASKS]
    config = {
        "merge_method": "ties",
        "base_model": str(model_dir("base")),
        "models": models,
        "sweep": {"lambda": list(LAMBDAS), "density": list(DENSITIES)},
    }
    command = f"{sys.executable} {Path(__file__).resolve()} --score {{}}"
    streammerge.sweep(config, folder / "swept", score=command, progress=False)
    with (folder / "swept" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    return sweep_page(rows, ["lambda", "density"], name="ties.yml", method="ties")


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", help="compare, report or sweep; all if none is named")
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[2] / "docs" / "use" / "pictures")
    parser.add_argument(
        "--score", type=Path, help="print the mean accuracy of one merged model, and do nothing else"
    )
    given = parser.parse_args()
    if given.score is not None:
        print(mean(accuracy(load_model(given.score), task) for task in TASKS))
        return
    given.to.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name, browser() as opened:
        folder = Path(name)
        base, models = write_family(folder)
        makers: dict[str, Callable[[Path], object]] = {
            "compare": lambda path: streammerge.compare(models, base, html=path, progress=False),
            "report": lambda path: streammerge.merge(
                ties(base, models), folder / "merged", report=path, progress=False
            ),
            "sweep": lambda path: path.write_text(swept(folder)),
        }
        for page in given.pages or makers:
            makers[page](folder / f"{page}.html")
            dark = page == "report"
            seen = opened.open(folder / f"{page}.html", width=WINDOW, dark=dark)
            assert not seen.complaints, seen
            # The pages name the folder that they were made in.
            opened.evaluate(
                f"document.body.innerHTML = document.body.innerHTML.replaceAll('{folder}/', 'models/')"
            )
            picture = given.to / f"{page}.png"
            opened.screenshot(picture, height=HEIGHT)
            nbytes = picture.stat().st_size
            print(f"{picture}: {nbytes:,} bytes")
            assert nbytes < MOST_NBYTES, picture


if __name__ == "__main__":
    main()
