"""The law of stages: byte for byte what running the documents one after the other gives, and nothing else is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from streammerge.api import merge, plan, verify
from streammerge.engine.merge import Options, execute
from streammerge.engine.streaming import Streamer
from streammerge.engine.worker import Worker
from streammerge.errors import BudgetError, InputError, WorldError
from streammerge.events import Control
from streammerge.methods.registry import get_method
from streammerge.output.shards import ShardWriter
from streammerge.planning.job import Job
from tests.checkpoint.tokenizers.scene import write_tokenizer
from tests.conftest import config_for, write_model, write_models
from tests.laws.resume.traps import Trap, guarded
from tests.laws.test_methods import VARIANTS

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (300, 32),
    "model.layers.0.mlp.down_proj.weight": (48, 130),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.mlp.down_proj.weight": (48, 130),
    "model.layers.1.input_layernorm.weight": (64,),
}
Document = Mapping[str, Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A base and three fine-tunes of it in the working directory: base, m1, m2, m3."""
    monkeypatch.chdir(tmp_path)
    return [Path(path.name) for path in write_models(tmp_path, 3, shapes=SHAPES)]


def fused(documents: Iterable[Document], out: str, **options: Any) -> dict[str, bytes]:
    """Merge documents as stages; no folder of theirs may appear."""
    text = yaml.safe_dump_all(documents, sort_keys=False)
    before = set(Path().iterdir())
    merge(text, out, **options)
    assert set(Path().iterdir()) - before - {Path("__pycache__")} == {Path(out)}
    return comparable(Path(out))


def one_by_one(documents: Iterable[Document], out: str, **options: Any) -> dict[str, bytes]:
    """Merge documents one after the other, each into a folder of its name; the last into `out`."""
    folders = []
    for document in documents:
        own = dict(document)
        folders.append(own.pop("name", out))
        merge(own, folders[-1], **options)
    for folder in folders[:-1]:
        shutil.rmtree(folder)
    return comparable(Path(out))


def comparable(out: Path) -> dict[str, bytes]:
    """Return the files of an output that do not tell of how it was made."""
    told = ("README.md", "streammerge.json", "streammerge_config.yml")
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in told}


def check(documents: list[Document], **options: Any) -> None:
    assert fused(documents, "fused", **options) == one_by_one(documents, "plain", **options)


@pytest.mark.parametrize(("method", "parameters"), VARIANTS)
def test_every_method_is_a_stage_and_takes_one(
    here: list[Path], method: str, parameters: dict[str, Any]
) -> None:
    first = {"name": "one", **config_for(method, here[:3], parameters=parameters, dtype="bfloat16")}
    registered = get_method(method)
    second, given = (method, parameters)
    if registered.fisher or registered.gram:
        second, given = "linear", {}
    check([first, config_for(second, [here[0], Path("one"), here[3]], parameters=given)])


@pytest.mark.parametrize(("capacity", "threads"), [(400_000, 1), (700_000, 3)])
def test_in_little_memory_stages_are_streamed(
    here: list[Path], small_capacity: Callable[[int, int], None], capacity: int, threads: int
) -> None:
    documents = chain()
    small_capacity(capacity, threads)
    check(documents)


def chain() -> list[Document]:
    """Statistics at every level: thresholds of a stage's result, of a tensor and of the whole model."""
    ties = {"density": 0.3, "trim_scope": "model", "ties": "index"}
    return [
        {
            "name": "a",
            "merge_method": "ties",
            "base_model": "base",
            "models": ["m1", "m2"],
            "parameters": ties,
        },
        {
            "name": "b",
            "merge_method": "dare_ties",
            "base_model": "base",
            "models": ["a", "m3"],
            "parameters": {"density": 0.5},
            "dtype": "float16",
        },
        {"merge_method": "ties", "base_model": "base", "models": ["b", "m2"], "parameters": ties},
    ]


def test_a_diamond_with_a_stage_as_base(here: list[Path]) -> None:
    documents: list[Document] = [
        {"name": "top", "merge_method": "linear", "models": ["base", "m1"], "dtype": "float32"},
        {
            "name": "left",
            "merge_method": "task_arithmetic",
            "base_model": "top",
            "models": ["m2"],
            "parameters": {"weight": 0.5},
        },
        {
            "name": "right",
            "merge_method": "ties",
            "base_model": "top",
            "models": ["m3", "m2"],
            "parameters": {"density": 0.4},
        },
        {"merge_method": "slerp", "base_model": "left", "models": ["right"], "parameters": {"t": 0.3}},
    ]
    check(documents)
    shuffled = [documents[i] for i in (2, 3, 0, 1)]
    assert fused(shuffled, "shuffled") == comparable(Path("fused"))


def test_slices_of_stages_and_tensors_that_are_copied(here: list[Path]) -> None:
    check(
        [
            {
                "name": "long",
                "merge_method": "passthrough",
                "slices": [
                    {"sources": [{"model": "m1", "layer_range": [0, 2]}]},
                    {"sources": [{"model": "m2", "layer_range": [0, 1]}]},
                ],
            },
            {
                "name": "mean",
                "merge_method": "linear",
                "models": ["m2", "m3"],
                "exclude": ["norm"],
                "dtype": "float32",
            },
            {
                "merge_method": "linear",
                "slices": [
                    {
                        "sources": [
                            {"model": "long", "layer_range": [1, 3]},
                            {"model": "mean", "layer_range": [0, 2]},
                        ]
                    },
                ],
                "dtype": "bfloat16",
            },
        ]
    )


def test_a_stage_with_an_adapter(here: list[Path]) -> None:
    from tests.checkpoint.adapters.scene import factors, write_adapter

    name = "model.layers.1.mlp.down_proj"
    write_adapter(Path("lora"), factors(name, 130, 48, 8, 3))
    check(
        [
            {"name": "mean", "merge_method": "linear", "models": ["m1", "m2"]},
            {
                "merge_method": "ties",
                "base_model": "base",
                "models": ["mean+lora", "m3"],
                "parameters": {"density": 0.3},
            },
        ]
    )


def test_a_method_that_must_see_whole_tensors(here: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import streammerge\n"
        '@streammerge.method("halves", access="tensor", base="none", models=(1, None))\n'
        "def halves(models, base):\n"
        "    return sum(model.flip(0) for model in models) / 2\n"
    )
    documents: list[Document] = [
        {"name": "one", "merge_method": "halves", "models": ["m1", "m2"], "dtype": "float32"},
        {"merge_method": "halves", "models": ["one", "m3"]},
    ]
    check(documents, methods="mine.py")


def test_a_base_that_two_stages_use_is_read_once(here: list[Path]) -> None:
    """Elementwise: each input byte is read once, though three stages take the base."""
    for path in here:  # large enough to tell
        generator = torch.Generator().manual_seed(len(path.name))
        write_model(path, {"w.weight": torch.randn((512, 1024), generator=generator).bfloat16()})
    documents: list[Document] = [
        {"name": "a", "merge_method": "task_arithmetic", "base_model": "base", "models": ["m1"]},
        {"name": "b", "merge_method": "task_arithmetic", "base_model": "base", "models": ["m2"]},
        {"merge_method": "linear", "models": ["a", "b"]},
    ]
    text = yaml.safe_dump_all(documents)
    summary = merge(text, "fused")
    nbytes = 512 * 1024 * 2
    assert 3 * nbytes <= summary.bytes_read <= 3.1 * nbytes
    assert plan(text).bytes_to_read() == 3 * nbytes
    assert comparable(Path("fused")) == one_by_one(documents, "plain")


def test_a_run_that_was_stopped_goes_on_and_takes_no_statistics_twice(
    here: list[Path], small_capacity: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ties = {"density": 0.3, "ties": "index"}
    documents: list[Document] = [
        {
            "name": "a",
            "merge_method": "ties",
            "base_model": "base",
            "models": ["m1", "m2"],
            "parameters": ties,
        },
        {"merge_method": "ties", "base_model": "base", "models": ["a", "m3"], "parameters": ties},
    ]
    small_capacity(400_000, 1)
    asked: list[str] = []
    answer = Streamer.answer

    def counted(self: Streamer, job: Job, outputs: Sequence[Worker]) -> None:
        asked.append(f"{self._plan.name}/{job.name}")
        answer(self, job, outputs)

    monkeypatch.setattr(Streamer, "answer", counted)
    monkeypatch.setattr("streammerge.engine.scheduler._SYNC_SECONDS", 0.01)
    text = yaml.safe_dump_all(documents)
    trap = Trap(WorldError("the disk is gone"), 4, once=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "write", guarded(ShardWriter.write, trap))
        with pytest.raises(WorldError):
            merge(text, "fused", threads=1)
    first, asked[:] = set(asked), []
    summary = merge(text, "fused", threads=1)
    assert summary.bytes_resumed > 0
    assert len(asked) == len(set(asked)) < len(SHAPES) + len(first)
    assert comparable(Path("fused")) == one_by_one(documents, "plain")


def test_stages_are_computed_in_other_processes_too(here: list[Path]) -> None:
    from tests.engine import process_executor  # noqa: F401  (registers it)

    text = yaml.safe_dump_all(chain())
    decided = plan(text)
    control = Control()
    execute(decided, Path("apart"), Options(executor="processes"), control, lambda plan: "")
    assert comparable(Path("apart")) == one_by_one(chain(), "plain")


def test_stages_that_are_kept_are_what_they_would_be_alone(here: list[Path]) -> None:
    text = yaml.safe_dump_all(chain())
    merge(text, "out", keep_stages="kept")
    assert comparable(Path("out")) == one_by_one(chain(), "plain")
    assert sorted(path.name for path in Path("kept").iterdir()) == ["a", "b"]
    assert not verify("kept/b").problems


def test_a_later_stage_is_refused_before_an_earlier_one_is_kept(here: list[Path]) -> None:
    documents = chain()
    documents[-1]["models"] = ["b", "nowhere"]
    with pytest.raises(InputError, match="nowhere"):
        merge(yaml.safe_dump_all(documents), "out", keep_stages="kept")
    assert not Path("kept").exists()


def test_the_output_is_recomputed_from_the_config_of_its_stages(here: list[Path]) -> None:
    Path("stages.yml").write_text(yaml.safe_dump_all(chain()))
    merge("stages.yml", "out")
    found = verify("out", against="stages.yml", sample=None)
    assert not found.problems
    with Path("out/model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x7f")
    assert verify("out", against="stages.yml", sample=None).problems


def test_what_reads_its_inputs_too_often_is_refused_with_both_numbers(here: list[Path]) -> None:
    text = yaml.safe_dump_all(chain())
    with pytest.raises(BudgetError, match=r"the stages read their inputs \d\.\d times .*--keep-stages DIR"):
        plan(text, max_reads=2)
    assert plan(text, max_reads=20).bytes_to_read() > 0


def test_a_vocabulary_that_a_stage_has_made_is_read_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = {"model.embed_tokens.weight": (4, 16), "lm_head.weight": (4, 16)}
    words = [{"<s>": 0, "</s>": 1, "a": 2, "b": 3}, {"<s>": 0, "a": 1, "</s>": 2, "c": 3}]
    for path, vocabulary in zip(write_models(tmp_path, 2, shapes=shapes), [words[0], *words], strict=True):
        write_tokenizer(path, vocabulary)
    check(
        [
            {"name": "union", "merge_method": "linear", "models": ["m1", "m2"], "tokenizer_source": "union"},
            {
                "merge_method": "linear",
                "models": ["union", "base"],
                "tokenizer_source": "union",
                "dtype": "float32",
            },
        ]
    )
