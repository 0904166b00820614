"""`fisher compute`: the values of the plain loop, whatever the memory, the batch, or an interruption."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from streammerge.api import compute_fisher, merge
from streammerge.checkpoint.companions import open_fisher
from streammerge.errors import BudgetError, InputError, OutputError, Stopped
from streammerge.estimate.fisher.labels import draw
from streammerge.formats.zarr_store import ATTRIBUTE
from tests.conftest import read_tensors
from tests.estimate.fisher import naive
from tests.estimate.network.tiny import MODELS, make_lines, make_model, write_lines

CASES = [
    *((name, "empirical", naive.of_tokens) for name in MODELS if MODELS[name][0].endswith("CausalLM")),
    *((name, "empirical", naive.of_label) for name in ("bert", "llama classifier")),
    *((name, "exact", naive.of_every_label) for name in ("bert", "llama classifier")),
]


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here loses power; and threads that wait for each other are slow where others run."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arrays(store: Path) -> dict[str, np.ndarray]:
    group = zarr.open_group(str(store), mode="r")
    return {name: np.asarray(group[name][...]) for name in group.array_keys()}


def tree(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("name", "labels", "terms"), CASES, ids=[f"{n}, {k}" for n, k, _ in CASES])
def test_the_diagonal_is_that_of_the_plain_loop(
    name: str, labels: str, terms: naive.Terms, tmp_path: Path
) -> None:
    model, lines = make_model(name, tmp_path / "model"), make_lines()
    data = write_lines(tmp_path / "data.jsonl", lines)
    compute_fisher(tmp_path / "model", data, tmp_path / "store.zarr", labels=labels)
    found = arrays(tmp_path / "store.zarr")
    assert naive.worst_difference(found, naive.diagonal(model, lines, terms)) < 1e-4


def test_unseen_tokens_have_certainty_zero_where_the_embedding_is_not_tied(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", [{"input_ids": [5, 6, 5, 7]}, {"input_ids": [7, 90]}])
    compute_fisher(tmp_path / "model", data, tmp_path / "s.zarr")
    rows = arrays(tmp_path / "s.zarr")["model.embed_tokens.weight"].any(axis=1)
    # Row 90 is seen, but only as a last token, after which nothing is predicted.
    assert np.flatnonzero(rows).tolist() == [5, 6, 7]


def test_the_store_says_how_it_was_estimated_and_a_merge_takes_it(tmp_path: Path) -> None:
    make_model("qwen2, tied", tmp_path / "model", torch.bfloat16)
    data = write_lines(tmp_path / "data.jsonl", make_lines(6))
    computed = compute_fisher(
        tmp_path / "model", data, tmp_path / "s.zarr", seed=7, examples=4, dtype="bfloat16"
    )
    about = dict(zarr.open_group(str(tmp_path / "s.zarr"), mode="r").attrs[ATTRIBUTE])
    expected = {
        "estimator": "sampled",
        "examples": 4,
        "seed": 7,
        "kind": "causal language model",
        "dtype": "BF16",
        "missing": [],
        "max_length": 512,
    }
    assert {key: about[key] for key in expected} == expected
    assert computed.tensors == len(open_fisher(tmp_path / "s.zarr")) == len(read_tensors(tmp_path / "model"))
    (tmp_path / "same").symlink_to(tmp_path / "model")
    models = [
        {"model": str(tmp_path / name), "fisher": str(tmp_path / "s.zarr")} for name in ("model", "same")
    ]
    merge({"merge_method": "fisher", "models": models}, tmp_path / "out", memory="1GiB")
    merged, given = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "model")
    assert all(torch.equal(merged[name], tensor) for name, tensor in given.items())


# --- sampled labels


def test_draws_follow_their_probabilities() -> None:
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2]], dtype=torch.float64)
    uniform = (torch.arange(1000) + 0.5).double() / 1000
    counts = draw(p.expand(1000, -1), uniform).bincount(minlength=4).tolist()
    assert counts == [500, 0, 300, 200]


def test_sampled_labels_are_unbiased(tmp_path: Path) -> None:
    """Student's t of the sum over each layer, over 9 estimates of independent draws; the data's own labels fail it."""
    model = make_model("llama", tmp_path / "model")
    line = make_lines(1, longest=6, seed=3)[0]
    data = write_lines(tmp_path / "data.jsonl", [line] * 16)
    expected = naive.diagonal(model, [line], naive.of_every_token)

    def traces(labels: str, seed: int) -> list[float]:
        compute_fisher(
            tmp_path / "model", data, tmp_path / "s.zarr", labels=labels, seed=seed, overwrite=True
        )
        found = arrays(tmp_path / "s.zarr")
        return [float(found[name].sum(dtype=np.float64) / expected[name].sum()) for name in expected]

    ratios = np.array([traces("sampled", seed) for seed in range(9)])
    error = ratios.std(axis=0, ddof=1) / math.sqrt(len(ratios))
    t = (ratios.mean(axis=0) - 1) / error
    assert np.abs(t).max() < 5
    assert error.max() < 0.1
    biased = (np.array(traces("empirical", 0)) - 1) / error
    assert np.abs(biased).max() > 5


# --- the same bits


def test_the_bytes_depend_on_neither_memory_nor_batch_size(tmp_path: Path) -> None:
    make_model("gpt2", tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", make_lines())
    trees = []
    for n, (memory, batch_size) in enumerate((("1GiB", 16), ("600MiB", 1), ("4GiB", 3))):
        store = tmp_path / f"{n}.zarr"
        compute_fisher(tmp_path / "model", data, store, memory=memory, batch_size=batch_size)
        trees.append(tree(store))
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.parametrize("name", ["qwen2, tied", "bloom", "bert"])
def test_stopped_anywhere_it_continues_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.estimate.network.progress import Progress

    make_model(name, tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", make_lines(5))
    compute_fisher(tmp_path / "model", data, tmp_path / "whole.zarr")
    tick = Progress.tick
    stopped = 0
    for share in (0.0, 0.1, 0.3, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        stop = threading.Event()

        def stopping(self: Any, work: int, stop: threading.Event = stop, share: float = share) -> None:
            if self.done >= share * self.total:
                stop.set()
            tick(self, work)

        monkeypatch.setattr(Progress, "tick", stopping)
        try:
            compute_fisher(tmp_path / "model", data, tmp_path / "parts.zarr", stop=stop)
            break
        except Stopped:
            stopped += 1
            assert not (tmp_path / "parts.zarr").exists()
    monkeypatch.undo()
    assert stopped >= 8
    compute_fisher(tmp_path / "model", data, tmp_path / "parts.zarr")
    assert tree(tmp_path / "parts.zarr") == tree(tmp_path / "whole.zarr")


def test_each_weight_is_read_twice_whatever_the_number_of_examples(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    read = []
    for n in (2, 20):
        data = write_lines(tmp_path / "data.jsonl", [{"input_ids": [5, 6, 7]}] * n)
        read.append(compute_fisher(tmp_path / "model", data, tmp_path / f"{n}.zarr").bytes_read)
    tensors = read_tensors(tmp_path / "model")
    layers = sum(t.nbytes for name, t in tensors.items() if ".layers." in name)
    after = tensors["lm_head.weight"].nbytes + tensors["model.norm.weight"].nbytes
    fingerprint = sum(min(4096, t.nbytes) for t in tensors.values())

    def rows(n: int) -> int:
        return 2 * n * 3 * 32 * 4  # looked up forward and backward, 3 tokens of width 32

    assert read == [2 * layers + after + fingerprint + rows(n) for n in (2, 20)]


# --- refusals


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": "exact"}, InputError, "which are too many for a language model"),
        ({"labels": "gold"}, InputError, "'gold' is not one of sampled, empirical, exact"),
        ({"dtype": "float16"}, InputError, "'float16' is not one of float32, bfloat16"),
        ({"memory": "100MiB"}, BudgetError, "is too little"),
        ({"memory": "512MiB", "batch_size": 100000}, BudgetError, "--memory is 512 MiB"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_byte_is_written(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    make_model("llama", tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", make_lines(3))
    with pytest.raises(error, match=message):
        compute_fisher(tmp_path / "model", data, tmp_path / "s.zarr", **changes)
    assert not list(tmp_path.glob("s.zarr*"))


def test_an_unfinished_estimate_of_other_examples_is_not_continued(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", make_lines(3))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        compute_fisher(tmp_path / "model", data, tmp_path / "s.zarr", stop=stop)
    with pytest.raises(OutputError, match="unfinished store of something else"):
        compute_fisher(tmp_path / "model", data, tmp_path / "s.zarr", seed=1)
    compute_fisher(tmp_path / "model", data, tmp_path / "s.zarr", seed=1, overwrite=True)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", [{"text": "a b c"}])
    with pytest.raises(InputError, match="cannot load a tokenizer for text"):
        compute_fisher(tmp_path / "model", data, tmp_path / "s.zarr")


def test_tensors_that_are_no_parameters_are_told_and_recorded(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model("llama", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(weights), "extra": torch.ones(3)}, weights)
    data = write_lines(tmp_path / "data.jsonl", make_lines(2))
    events: list[Any] = []
    computed = compute_fisher(tmp_path / "model", data, tmp_path / "s.zarr", on_event=events.append)
    assert computed.about["missing"] == ["extra"]
    assert [e.values["message"] for e in events if e.kind == "warning"] == [
        f"1 tensors of {tmp_path / 'model'} are not parameters of LlamaForCausalLM (first: extra); they get no diagonal"
    ]


# --- the command


def run_command(*arguments: str) -> list[dict[str, Any]]:
    """Run `fisher compute --json`; return its events."""
    command = [sys.executable, "-m", "streammerge.cli", "fisher", "compute", *arguments, "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_command_runs_in_the_memory_that_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = (
        *MODELS["llama"][:2],
        {
            **MODELS["llama"][2],
            "vocab_size": 40000,
            "hidden_size": 256,
            "head_dim": 64,
            "max_position_embeddings": 256,
        },
    )
    monkeypatch.setitem(MODELS, "wide", wide)
    make_model("wide", tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", [{"input_ids": [n, *range(200)]} for n in range(3)])
    with pytest.raises(BudgetError, match="the part after the layers needs") as refused:
        compute_fisher(tmp_path / "model", data, tmp_path / "s.zarr", memory="512MiB")
    needed = re.search(r"give at least (\d+) MiB", str(refused.value))
    assert needed is not None
    memory = f"{needed[1]}MiB"
    events = run_command(
        str(tmp_path / "model"), "--data", str(data), "--out", str(tmp_path / "s.zarr"), "--memory", memory
    )
    assert 512 << 20 < events[-1]["peak_resident_bytes"] < int(needed[1]) << 20
    assert events[0]["event"] == "progress"
    assert events[0]["elements"] <= events[0]["elements_total"]
    assert {key: events[-1][key] for key in ("event", "estimator", "tokens")} == {
        "event": "done",
        "estimator": "sampled",
        "tokens": 603,
    }
