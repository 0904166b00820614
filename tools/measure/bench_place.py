"""The models, stores and configs of a benchmark, and where they lie."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_report import GB

from streammerge.units import parse_size

TOOLS = Path(__file__).resolve().parents[1]
STREAMMERGE = [sys.executable, "-m", "streammerge.cli"]


NAMES = ("base", "tuned1", "tuned2", "tuned3")


TINY = "tiny"


@dataclass(frozen=True)
class Method:
    """A merge to measure, and what its config says."""

    merge_method: str
    parameters: str
    """The parameters of each model, as YAML; mergekit reads them as well."""
    based: bool = True
    """True if the base is a base; else it is one more model."""
    top: str = ""
    """Top-level lines of streammerge's alone."""
    fisher: bool = False
    """True if each model comes with a store of its Fisher diagonal."""
    n_models: int = len(NAMES)
    """How many models take part, the base included."""

    @property
    def shared(self) -> bool:
        """True if mergekit can run the same config."""
        return not self.top and not self.fisher


METHODS = {
    "linear": Method("linear", "weight: 1.0", based=False),
    "task_arithmetic": Method("task_arithmetic", "weight: 1.0"),
    "ties": Method("ties", "weight: 1.0, density: 0.2"),
    "dare_linear": Method("dare_linear", "weight: 1.0, density: 0.5"),
    "dare_ties": Method("dare_ties", "weight: 1.0, density: 0.5"),
    "breadcrumbs": Method("breadcrumbs", "weight: 1.0, density: 0.9, gamma: 0.01"),
    "model_stock": Method("model_stock", ""),
    "slerp": Method("slerp", "", top="parameters: {t: 0.5}\n", n_models=2),
    "della": Method("della", "weight: 1.0, density: 0.5, epsilon: 0.15"),
    # Reads its inputs twice; its limit is still one read.
    "ties-model": Method("ties", "weight: 1.0, density: 0.2", top="parameters: {trim_scope: model}\n"),
    # float32 stores: reads nearly thrice the bytes of the others, and so does its limit.
    "fisher": Method("fisher", "weight: 1.0", based=False, fisher=True),
}


def say(text: str) -> None:
    """Print progress beside the report, which goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def shape_of(nbytes: int) -> dict[str, int]:
    """Return the shape of a llama of about that size; a small one is an eighth as wide, the least has a layer."""
    narrow = 1 if nbytes >= GB // 2 else 8
    hidden, inter, vocab = 2048 // narrow, 5632 // narrow, 32000 // narrow
    layer = 2 * hidden * (3 * inter + 4 * hidden)
    layers = max(1, round((nbytes - 4 * vocab * hidden) / layer))
    return {"layers": layers, "hidden": hidden, "inter": inter, "kv": hidden, "vocab": vocab}


def llama_config(shape: dict[str, int]) -> str:
    """Return a config.json that tells mergekit how many layers there are."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inter"],
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": shape["layers"],
        "vocab_size": shape["vocab"],
        "tie_word_embeddings": False,
    }
    return json.dumps(config, indent=2) + "\n"


@dataclass(frozen=True)
class Workplace:
    """Where everything lies."""

    path: Path

    def models(self, size: str) -> Path:
        """Return the directory of the models of a size."""
        return self.path / f"models-{size}"

    def store(self, size: str, name: str) -> Path:
        """Return the Fisher store of a model."""
        return self.models(size) / f"{name}.zarr"

    def inputs(self, method: Method, size: str) -> list[Path]:
        """Return the files a method merges, model by model."""
        paths: list[Path] = []
        for name in NAMES[: method.n_models]:
            paths += sorted((self.models(size) / name).glob("*.safetensors"))
            if method.fisher:
                paths += sorted(p for p in self.store(size, name).rglob("*") if p.is_file())
        return paths

    def nbytes(self, size: str) -> int:
        """Return the bytes of one model."""
        return sum(p.stat().st_size for p in (self.models(size) / "base").glob("*.safetensors"))

    @property
    def out(self) -> Path:
        """Where merges write; removed after each."""
        return self.path / "out"

    def scrub(self, text: str) -> str:
        """Return a command's words without the paths of this machine."""
        here = {str(self.path): "WORKDIR", sys.prefix: "VENV", str(TOOLS.parent): ".", str(Path.home()): "~"}
        for path, name in here.items():
            text = text.replace(path, name) if path != "/" else text
        return text

    def make_models(self, size: str) -> None:
        """Make the models that are not there yet; a directory that has its final name is complete."""
        target = self.models(size)
        if target.exists():
            return
        say(f"making models of {size}")
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shape = shape_of(0 if size == TINY else parse_size(size))
        options = [text for key, value in shape.items() for text in (f"--{key}", str(value))]
        command = [
            sys.executable,
            TOOLS / "make" / "make_models.py",
            partial,
            "--models",
            str(len(NAMES) - 1),
        ]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        for name in NAMES:
            (partial / name / "config.json").write_text(llama_config(shape))
        partial.rename(target)

    def make_stores(self, size: str) -> None:
        """Make the Fisher stores that are not there yet, through diagonals that are removed again."""
        for seed, name in enumerate(NAMES):
            model, store = self.models(size) / name, self.store(size, name)
            if store.exists():
                continue
            say(f"making the Fisher store of {name} of {size}")
            diagonal = self.path / "diagonal.safetensors"
            make = [
                sys.executable,
                TOOLS / "make" / "make_diagonals.py",
                model,
                diagonal,
                "--seed",
                str(seed),
            ]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
            options = ["--out", store, "--memory", "512MiB", "--quiet", "--overwrite"]
            subprocess.run([*STREAMMERGE, "fisher", "import", model, diagonal, *options], check=True)
            diagonal.unlink()

    def write_config(self, name: str, size: str) -> Path:
        """Write a method's config: one file, for streammerge and mergekit alike."""
        method, models = METHODS[name], self.models(size)
        lines = [f"merge_method: {method.merge_method}"]
        if method.based:
            lines.append(f"base_model: {json.dumps(str(models / NAMES[0]))}")
        lines.append("models:")
        for model in NAMES[1 if method.based else 0 : method.n_models]:
            fisher = f"fisher: {json.dumps(str(self.store(size, model)))}, " if method.fisher else ""
            path = json.dumps(str(models / model))
            lines.append(f"  - {{model: {path}, {fisher}parameters: {{{method.parameters}}}}}")
        config = self.path / f"{name}-{size}.yml"
        config.write_text("\n".join(lines) + f"\n{method.top}dtype: bfloat16\n")
        return config


def check_space(place: Workplace, sizes: Sequence[str], fisher: bool) -> None:
    """Refuse before hours of work what the disk cannot hold: inputs, one output and, for fisher, a diagonal."""
    asked = [parse_size(size) for size in sizes]
    need = sum(
        len(NAMES) * n for n, size in zip(asked, sizes, strict=True) if not place.models(size).exists()
    )
    need += max(asked) + (2 * len(NAMES) * sum(asked) + 2 * max(asked) if fisher else 0)
    free = shutil.disk_usage(place.path).free
    if need > free:
        sys.exit(f"WORKDIR needs {need / GB:.0f} GB free and has {free / GB:.0f} GB: give smaller --sizes")
