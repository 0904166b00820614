"""The checkpoints of a training run are told apart from what else lies in its directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.checkpoint.runs import find_run
from streammerge.errors import ModelError

TRAINER = [
    *(f"checkpoint-{n}/model.safetensors" for n in (100, 1000, 900)),
    *("checkpoint-100/optimizer.pt", "runs/events.out.tfevents.1", "training_args.bin", "trainer_state.json"),
]
OF_TRAINER = ["checkpoint-100", "checkpoint-900", "checkpoint-1000"]


def tree(directory: Path, names: list[str]) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"")
    return directory


@pytest.mark.parametrize(
    ("names", "pattern", "found", "words"),
    [
        (TRAINER, None, OF_TRAINER, ""),
        ([*TRAINER, "model.safetensors", "config.json"], None, OF_TRAINER, ""),  # and a final model
        ([*TRAINER, "final/model.safetensors"], None, OF_TRAINER, "'final' left out"),
        ([*TRAINER, "checkpoint-1100/optimizer.pt"], None, OF_TRAINER, ""),  # pruned, or being written
        (
            [*TRAINER, "checkpoint-1100/optimizer.pt"],
            "checkpoint-*",
            OF_TRAINER,
            "'checkpoint-1100' left out",
        ),
        (
            [*TRAINER, "checkpoint-1100/model-00001-of-00002.safetensors"],
            None,
            [*OF_TRAINER, "checkpoint-1100"],
            "",
        ),
        ([*TRAINER, ".checkpoint-7/model.safetensors"], None, OF_TRAINER, ""),
        (TRAINER, "checkpoint-9*", ["checkpoint-900"], ""),
        (["step-10/.metadata", "step-9/.metadata"], None, ["step-9", "step-10"], ""),  # torch DCP
        (
            ["epoch_1/model_index.json", "epoch_0/model_index.json"],
            None,
            ["epoch_0", "epoch_1"],
            "",
        ),  # diffusers
        (["a/model.safetensors", "b/pytorch_model.bin"], None, ["a", "b"], ""),
        (
            ["epoch=0-step=9.ckpt", "epoch=1-step=10.ckpt", "last.ckpt"],
            None,
            ["epoch=0-step=9.ckpt", "epoch=1-step=10.ckpt"],
            "'last.ckpt' left out",
        ),
        (
            ["xl-000002.safetensors", "xl-000010.safetensors"],
            None,
            ["xl-000002.safetensors", "xl-000010.safetensors"],
            "",
        ),
        (["step_2.pt", "step_1.pt", "optimizer.pt", "rng_state_0.pth"], None, ["step_1.pt", "step_2.pt"], ""),
        (  # an average that was written there before, or is being written
            [*TRAINER, "last-3/model.safetensors", "last-3/streammerge.json"],
            None,
            OF_TRAINER,
            "'last-3' left out of the average: an output of streammerge",
        ),
        (
            [*TRAINER, "checkpoint-8/model.safetensors", "checkpoint-8/.streammerge/journal.jsonl"],
            "checkpoint-*",
            OF_TRAINER,
            "'checkpoint-8' left out of the average: an output of streammerge",
        ),
        (
            ["xl-1.safetensors", "xl-2.safetensors", "xl-3.safetensors", "xl-3.safetensors.json"],
            None,
            ["xl-1.safetensors", "xl-2.safetensors"],
            "'xl-3.safetensors' left out of the average: an output of streammerge",
        ),
        (  # outputs alone are what is meant
            [f"seed-{n}/{name}" for n in (1, 2) for name in ("model.safetensors", "streammerge.json")],
            None,
            ["seed-1", "seed-2"],
            "",
        ),
        (["model.safetensors", "config.json"], None, [], ""),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None, [], ""),
        (["notes.txt", "runs/log"], None, [], ""),
    ],
)
def test_a_run_has_these_checkpoints(
    names: list[str], pattern: str | None, found: list[str], words: str, tmp_path: Path
) -> None:
    run = find_run(tree(tmp_path, names), pattern)
    assert list(run.names) == found
    assert words in " ".join(run.notes)
    assert bool(run.notes) == bool(words)


def test_checkpoints_of_two_kinds_are_refused_until_a_pattern_says_which(tmp_path: Path) -> None:
    tree(tmp_path, [*TRAINER, "epoch_1/model.safetensors", "epoch_2/model.safetensors"])
    with pytest.raises(ModelError, match=r"several kinds \('checkpoint-\*', 'epoch_\*'\).*pattern"):
        find_run(tmp_path)
    assert find_run(tmp_path, "epoch_*").names == ("epoch_1", "epoch_2")


def test_a_link_to_a_checkpoint_counts_once(tmp_path: Path) -> None:
    tree(tmp_path, TRAINER)
    (tmp_path / "checkpoint-9999").symlink_to("checkpoint-900")
    (tmp_path / "checkpoint-2").symlink_to("/nowhere")
    run = find_run(tmp_path)
    assert list(run.names) == OF_TRAINER
    assert "'checkpoint-9999' left out" in run.notes[0]


def test_a_run_says_whether_a_model_lies_in_it(tmp_path: Path) -> None:
    assert not find_run(tree(tmp_path, TRAINER)).has_model
    assert find_run(tree(tmp_path, ["model.safetensors"])).has_model
