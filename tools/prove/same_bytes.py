"""Hash the weights that a fixed set of merges writes, so that two versions of the program can be compared.

    python tools/prove/same_bytes.py before.json                    # writes a hash for each merge
    python tools/prove/same_bytes.py after.json --against before.json   # and exits with 1 where one differs

The set: the configs of `mergekit_cases.py` (methods, slices, adapters, vocabularies, gradients, output dtypes) on float32,
float16 and bfloat16 models, random drops with seeds, and merges weighted by Fisher diagonals and Gram matrices.
Run it from the root of the checkout whose package is to be hashed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from streammerge.api import merge

sys.path.append(str(Path(__file__).resolve().parents[1] / "compare"))

from compare_mergekit import placed
from mergekit_cases import CASES
from mergekit_cases import merge as config_of
from mergekit_models import write_models

DTYPES = ("float32", "float16", "bfloat16")
DROPS = ("dare_linear", "dare_ties", "della", "della_linear", "dare_fisher")


def configs(directory: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each merge's name and config, models being directories."""
    for case in CASES:
        yield case.name, placed(dict(case.config), directory)
    for method in DROPS:
        for density in (0.3, 0.7):
            config = config_of(method, "abc", weight=[0.5, 0.3, 0.2], density=density)
            yield f"{method}, density {density}", with_stores(placed(config, directory), "fisher", method)
    dropped = config_of("task_arithmetic", "ab", parameters={"drop_rate": 0.4}, weight=0.5)
    yield "task_arithmetic, drop_rate", placed(dropped, directory)
    model = config_of("ties", "abc", parameters={"trim_scope": "model"}, weight=0.5, density=0.2)
    yield "ties, trimmed over the model", placed(model, directory)
    for method, key in (("fisher", "fisher"), ("regmean", "gram")):
        yield method, with_stores(placed(config_of(method, "abc", base=False), directory), key, method)


def with_stores(config: dict[str, Any], key: str, method: str) -> dict[str, Any]:
    """Give each model of a config the store that its method weighs by."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.conftest import write_fisher, write_grams

    if method in ("fisher", "dare_fisher", "regmean"):
        for model in config["models"]:
            write = write_fisher if key == "fisher" else write_grams
            model[key] = str(write(Path(model["model"])))
    return config


def as_bfloat16(directory: Path) -> None:
    """Store the models of a directory, written as float32, in bfloat16."""
    for path in directory.glob("*/model.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def weights_hash(out: Path) -> str:
    """Return the SHA-256 of all weight files of an output and of its index, by name."""
    digest = hashlib.sha256()
    for path in sorted([*out.glob("*.safetensors"), *out.glob("*.index.json")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="The hashes are written there.")
    parser.add_argument("--against", type=Path, help="Hashes of another version to compare with.")
    arguments = parser.parse_args()
    hashes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as room:
        for dtype in DTYPES:
            directory = Path(room) / dtype
            write_models(directory, "float32" if dtype == "bfloat16" else dtype)
            if dtype == "bfloat16":
                as_bfloat16(directory)
            torch.manual_seed(0)
            for name, config in configs(directory):
                out = Path(room) / "out"
                merge(
                    config,
                    out,
                    seed=7,
                    overwrite=True,
                    memory="1GiB",
                    threads=2,
                    kernels=True,
                    progress=False,
                )
                hashes[f"{dtype}: {name}"] = weights_hash(out)
    arguments.file.write_text(json.dumps(hashes, indent=1) + "\n")
    if arguments.against is None:
        print(f"{len(hashes)} merges hashed")
        return 0
    before = json.loads(arguments.against.read_text())
    differing = [name for name in hashes if before.get(name) not in (None, hashes[name])]
    missing = sorted(set(before) ^ set(hashes))
    print(f"{len(hashes)} merges hashed, {len(differing)} differ, {len(missing)} in one set only")
    for name in (*differing, *missing):
        print(f"  {name}")
    return int(bool(differing or missing))


if __name__ == "__main__":
    sys.exit(main())
