"""The options of `mergekit-yaml` under their own names, so that existing scripts run unchanged."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from streammerge.cli.options import MERGEKIT, MOST_SEED, OUTPUT, Whole, option, path
from streammerge.errors import InputError
from streammerge.units import parse_size

_DECIMAL = {"k": 1000, "m": 1000**2, "b": 1000**3}
_SAME = {"random_seed": "seed", "num_threads": "threads"}
"""Options that have a different name here."""
_NEEDLESS = {
    "allow_crimes": "tensors are matched by name and shape, whatever the architecture",
    "trust_remote_code": "no model's code is ever run",
    "lora_merge_cache": "adapters are applied while the rows are read, no merged copy is written",
    "lora_merge_dtype": "adapters are applied in float32",
    "low_cpu_memory": "`--memory` bounds the memory",
    "read_to_gpu": "`--device cuda` decides what is on the GPU",
    "multi_gpu": "`--device cuda` takes all GPUs",
    "lazy_unpickle": "PyTorch files are always read lazily",
    "clone_tensors": "layers may be repeated in any case",
    "async_write": "reading, computing and writing always overlap",
    "write_threads": "`--threads` sets the number of CPUs",
    "verbose": "`--json` reports events as they happen",
}
"""Options without effect, with the reason."""


def mergekit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command; `translate` converts their values to the command's own options."""
    hidden: dict[str, Any] = {"hidden": True, "group": MERGEKIT}
    off: dict[str, Any] = {**hidden, "default": None}
    options = [
        option(
            "--copy-tokenizer/--no-copy-tokenizer",
            default=True,
            group=OUTPUT,
            help="Copy the tokenizer  [default: yes]",
        ),
        option(
            "--write-model-card/--no-write-model-card",
            default=True,
            group=OUTPUT,
            help="Write README.md  [default: yes]",
        ),
        option("--cuda/--no-cuda", **off),
        option("--gpu-rich", is_flag=True, **hidden),
        option("--random-seed", type=Whole(0, MOST_SEED), **hidden),
        option("-j", "--num-threads", type=Whole(1, 1024), **hidden),
        option("--out-shard-size", **hidden),
        option("--transformers-cache", type=path(file_okay=False), **hidden),
        option("--safe-serialization/--no-safe-serialization", **off),
        option("--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings", **off),
        *(
            option(f"--{name}/--no-{name}", **off)
            for name in (
                "allow-crimes",
                "trust-remote-code",
                "low-cpu-memory",
                "read-to-gpu",
                "multi-gpu",
                "lazy-unpickle",
                "clone-tensors",
                "async-write",
            )
        ),
        option("--lora-merge-cache", **hidden),
        option("--lora-merge-dtype", **hidden),
        option("--write-threads", **hidden),
        option("--no-quiet", is_flag=True, **hidden),
        option("-v", "--verbose", count=True, **hidden),
    ]
    for add in reversed(options):
        command = add(command)
    return command


def translate(options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the command's own options, and warnings on mergekit's options without effect.

    ``--transformers-cache`` sets the cache of this process through its environment variable.

    Raises
    ------
    click.UsageError
        If an option is not supported, or contradicts the option it is translated to.
    """
    given = dict(options)
    given.pop("no_quiet")
    if given.pop("safe_serialization") is False:
        raise click.UsageError("--no-safe-serialization: outputs are safetensors")
    if given.pop("unsafe_truncate_embeddings"):
        raise click.UsageError(
            "--unsafe-truncate-embeddings: rows are never dropped by position: write `tokenizer: {source: base}` in the config"
        )
    for theirs, ours in _SAME.items():
        _set(given, ours, given.pop(theirs), theirs)
    size = given.pop("out_shard_size")
    if size is not None:
        try:
            given["shard_size"] = _shard_size(size)
        except InputError as error:
            raise InputError(f"--out-shard-size: {error}") from None
    cuda, rich = given.pop("cuda"), given.pop("gpu_rich")
    if cuda is not None or rich:
        wanted = "cuda" if cuda or rich else "cpu"
        if given["device"] == "auto":
            given["device"] = wanted
    cache = given.pop("transformers_cache")
    if cache is not None:
        os.environ["HF_HUB_CACHE"] = cache
    notes = [
        f"--{name.replace('_', '-')}: ignored: {why}"
        for name, why in _NEEDLESS.items()
        if given.pop(name) not in (None, False, 0)
    ]
    return given, notes


def _set(given: dict[str, Any], ours: str, value: Any, theirs: str) -> None:
    if value is None:
        return
    if given[ours] not in (None, value):
        raise click.UsageError(f"--{ours} {given[ours]} and --{theirs.replace('_', '-')} {value}")
    given[ours] = value


def _shard_size(text: str) -> int:
    """Return a size as mergekit counts: k, m and b are thousands, millions and billions of bytes.

    >>> _shard_size("5B"), _shard_size("500m"), _shard_size("2GiB")
    (5000000000, 500000000, 2147483648)
    """
    number, unit = text[:-1], text[-1:].lower()
    if unit in _DECIMAL and number.isascii() and number.isdigit() and len(number) < 20 and int(number):
        return int(number) * _DECIMAL[unit]
    return parse_size(text)
