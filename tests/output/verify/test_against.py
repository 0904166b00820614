"""`verify --against`: an output is computed once more from its inputs, and every bit that differs is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from streammerge import verify
from streammerge.api import merge, plan
from streammerge.cli import cli
from streammerge.engine.recompute import pieces_of
from streammerge.errors import InputError, StreammergeError, WorldError
from streammerge.formats.safetensors import read_header
from streammerge.output.manifest import load_manifest
from tests.conftest import config_for, read_tensors, use_capacity, write_model, write_models
from tests.output.verify.forge import change_element, reseal

Make = Callable[..., list[Path]]
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (300, 64),
    "layers.0.weight": (64, 130),
    "norm": (64,),
    "none": (0, 4),
}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "trim_scope": "model"}),
    ("dare_ties", {"density": 0.5}),
    ("fisher", {}),
    ("slerp", {"t": 0.3}),
    ("della", {"density": 0.5}),
    ("sce", {"select_topk": 0.4}),
    ("arcee_fusion", {}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
]


LITTLE = 1 << 20
"""A capacity in which no tensor is held whole beside the temporaries of a formula: statistics are streamed."""


@pytest.fixture
def out(make_models: Make, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A finished merge in shards and its config."""
    config = config_for("ties", make_models(shapes=SHAPES), parameters={"density": 0.3})
    merge(config, tmp_path / "out", shard_size=20_000)
    return tmp_path / "out", config


@pytest.mark.parametrize(("method", "parameters"), METHODS)
@pytest.mark.parametrize("capacity", [LITTLE, 1 << 28])
def test_what_the_kernels_merged_is_what_the_formulas_give_bit_for_bit(
    capacity: int, method: str, parameters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(method, write_models(tmp_path, shapes=SHAPES), parameters=parameters, seed=11)
    merge(config, tmp_path / "out", shard_size=30_000)
    give_memory(monkeypatch, capacity)
    forbid_kernels(monkeypatch)
    verdict = verify(tmp_path / "out", against=config, sample=None)
    assert verdict.problems == ()
    assert verdict.recomputed is not None
    assert verdict.recomputed.pieces == verdict.recomputed.of_pieces
    assert verdict.recomputed.elements == verdict.recomputed.of_elements == 300 * 64 + 64 * 130 + 64 + 16


def give_memory(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    """Give a capacity, and formulas blocks so small that they leave some of it."""
    use_capacity(monkeypatch, capacity, 2)
    monkeypatch.setattr("streammerge.backends.torch.backend.BLOCK_ELEMENTS", 4096)


def forbid_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(*arguments: object) -> None:
        raise AssertionError("a compiled kernel was used")

    monkeypatch.setattr("streammerge.backends.cpu.backend.KernelMath", used)


def test_the_tensor_and_the_element_that_differ_first_are_named(out: tuple[Path, dict[str, Any]]) -> None:
    directory, config = out
    for tensor, element in [("layers.0.weight", 8001), ("layers.0.weight", 130), ("embed.weight", 77)]:
        change_element(directory, tensor, element)
    assert verify(directory).problems == ()
    first, second = verify(directory, against=config, sample=None).problems
    assert "tensor embed.weight: element 77 is 0x" in first
    assert "tensor layers.0.weight: element 130 is 0x" in second
    assert second.endswith(", and 1 more elements differ")


def test_found_and_recomputed_bits_are_shown(make_models: Make, tmp_path: Path) -> None:
    paths = [
        write_model(tmp_path / f"m{i}", {"w": torch.full((4,), 1.0 + 2 * i, dtype=torch.bfloat16)})
        for i in range(2)
    ]
    config = {"merge_method": "linear", "models": [{"model": str(path)} for path in paths]}
    merge(config, tmp_path / "out")
    change_element(tmp_path / "out", "w", 3, bit=1)
    (problem,) = verify(tmp_path / "out", against=config).problems
    assert problem == ("model.safetensors: tensor w: element 3 is 0x4002, recomputed from the inputs 0x4000")


def test_a_copied_integer_and_an_excluded_tensor_are_compared_too(make_models: Make, tmp_path: Path) -> None:
    config = config_for("ties", make_models(shapes=SHAPES), exclude=["^norm$"])
    merge(config, tmp_path / "out")
    change_element(tmp_path / "out", "norm", 63)
    change_element(tmp_path / "out", "position_ids", 9)
    problems = "\n".join(verify(tmp_path / "out", against=config, sample=None).problems)
    assert "tensor norm: element 63 is" in problems
    assert "tensor position_ids: element 9 is" in problems


def test_a_damaged_bit_is_reported_and_its_element_found(out: tuple[Path, dict[str, Any]]) -> None:
    directory, config = out
    shard = next(path for path in directory.glob("model-*") if "embed.weight" in read_header(path)[0])
    raw = bytearray(shard.read_bytes())
    raw[-2] ^= 1
    shard.write_bytes(raw)
    damaged, differs = verify(directory, against=config, sample=None).problems
    assert "tensor embed.weight is damaged" in damaged
    assert "tensor embed.weight: element 19199 is" in differs


def test_where_no_header_can_be_read_the_damage_alone_is_told(out: tuple[Path, dict[str, Any]]) -> None:
    directory, config = out
    shard = sorted(directory.glob("model-*"))[0]
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    verdict = verify(directory, against=config)
    assert verdict.recomputed is None
    (problem,) = verdict.problems
    assert shard.name in problem


# --- the sample


def compared(
    monkeypatch: pytest.MonkeyPatch, directory: Path, config: Any, **options: Any
) -> list[tuple[str, int]]:
    """Verify and return (shard, offset) of every 8192 bytes that were compared."""
    found: list[tuple[str, int]] = []
    with monkeypatch.context() as patch:
        from streammerge.engine.recompute import _Comparer

        real = _Comparer.write

        def write(self: Any, shard: int, offset: int, data: Any) -> None:
            found.extend((shard, offset + i) for i in range(0, data.size, 8192))
            real(self, shard, offset, data)

        patch.setattr(_Comparer, "write", write)
        assert verify(directory, against=config, **options).problems == ()
    return sorted(found)


def test_a_sample_is_the_same_for_the_same_seed_whatever_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("streammerge.engine.recompute._PIECE", 4096)
    config = config_for("linear", write_models(tmp_path, shapes={"w": (100, 4096), "norm": (64,)}))
    merge(config, tmp_path / "out")
    give_memory(monkeypatch, LITTLE)
    first = compared(monkeypatch, tmp_path / "out", config, sample=5, seed=3)
    give_memory(monkeypatch, 1 << 28)
    assert compared(monkeypatch, tmp_path / "out", config, sample=5, seed=3) == first
    assert len(first) == 5
    other = compared(monkeypatch, tmp_path / "out", config, sample=5, seed=4)
    assert other != first
    assert (
        len(compared(monkeypatch, tmp_path / "out", config, sample=1000)) == 102
    )  # with the norm and the integers


def test_the_pieces_cover_every_element_once_and_do_not_depend_on_the_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("streammerge.engine.recompute._PIECE", 9000)
    paths = write_models(tmp_path, shapes=SHAPES)
    for method, parameters in METHODS:
        config = config_for(method, paths, parameters=parameters)
        found = []
        for capacity in (LITTLE, 1 << 28):
            give_memory(monkeypatch, capacity)
            decided = plan(config, kernels=False)
            found.append(pieces_of(decided))
        assert found[0] == found[1]
        for job in decided.jobs:
            mine = [piece for piece in found[0] if piece.job == job.ordinal]
            assert [e for p in mine for e in range(p.start, p.stop)] == list(range(job.n_elements))


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_one_piece_is_recomputed_with_the_statistics_of_all_of_its_tensor_or_model(
    method: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("streammerge.engine.recompute._PIECE", 4096)
    config = config_for(method, write_models(tmp_path, shapes=SHAPES), parameters=parameters, seed=11)
    merge(config, tmp_path / "out")
    give_memory(monkeypatch, LITTLE)
    for seed in range(3):
        if method == "ties" and not parameters.get("trim_scope"):
            assert "streamed" in [how.mode for how in plan(config, kernels=False).work]
        verdict = verify(tmp_path / "out", against=config, sample=1, seed=seed)
        assert verdict.problems == ()
        assert verdict.recomputed is not None
        assert verdict.recomputed.pieces == 1


# --- what it is compared with


def test_another_config_is_refused_and_named(out: tuple[Path, dict[str, Any]]) -> None:
    directory, config = out
    for change in ({"parameters": {"density": 0.4}}, {"seed": 5}, {"merge_method": "dare_ties"}):
        with pytest.raises(
            InputError, match=r"was made with a different config.* than the config gives now"
        ) as caught:
            verify(directory, against={**config, **change})
        assert caught.value.exit_code == 2


def test_other_inputs_are_refused_and_named(out: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    directory, config = out
    tensors = read_tensors(tmp_path / "m2")
    tensors["embed.weight"] += 1
    write_model(tmp_path / "m2", tensors)
    with pytest.raises(InputError, match=r"a different input .*m2 than"):
        verify(directory, against=config)


def test_a_change_of_an_input_that_its_fingerprint_does_not_see_shows_in_the_bits(
    out: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    directory, config = out
    tensors = read_tensors(tmp_path / "base")
    tensors["embed.weight"].view(-1)[5] += 1
    write_model(tmp_path / "base", tensors)
    (problem,) = verify(directory, against=config, sample=None).problems
    assert "tensor embed.weight: element 5 is" in problem


def test_a_seed_given_to_the_merge_is_the_manifests(make_models: Make, tmp_path: Path) -> None:
    config = config_for("dare_linear", make_models(shapes=SHAPES), parameters={"density": 0.5}, seed=1)
    merge(config, tmp_path / "out", seed=5)
    assert verify(tmp_path / "out", against=config, sample=None).problems == ()
    reseal(tmp_path / "out", seed=6)
    with pytest.raises(InputError, match="a different seed"):
        verify(tmp_path / "out", against=config)


def test_an_output_of_another_version_is_compared_and_the_versions_are_told(
    out: tuple[Path, dict[str, Any]],
) -> None:
    directory, config = out
    identity = {**load_manifest(directory)["identity"], "version": "0.0.9"}
    reseal(directory, identity=identity, streammerge="0.0.9")
    assert verify(directory, against=config, sample=None).problems == ()
    change_element(directory, "norm", 0)
    (problem,) = verify(directory, against=config, sample=None).problems
    assert problem.endswith("(made by version 0.0.9, this is 0.1.0)")


def test_what_the_manifest_tells_of_the_merge_is_recomputed_with_all(
    make_models: Make, tmp_path: Path
) -> None:
    config = config_for("dare_fisher", make_models(shapes=SHAPES), parameters={"density": 0.5})
    merge(config, tmp_path / "out")
    assert verify(tmp_path / "out", against=config, sample=None).problems == ()
    manifest = load_manifest(tmp_path / "out")
    assert manifest["densities"][0]["kept"] > 0
    manifest["densities"][0]["kept"] += 1
    reseal(tmp_path / "out", densities=manifest["densities"], floored={**manifest["floored"], "elements": 1})
    problems = verify(tmp_path / "out", against=config, sample=None).problems
    assert [problem.split("`")[1] for problem in problems] == ["densities", "floored"]


def test_values_that_were_accepted_as_not_finite_are_recomputed(make_models: Make, tmp_path: Path) -> None:
    paths = make_models(shapes=SHAPES)
    tensors = read_tensors(paths[1])
    tensors["embed.weight"].view(-1)[7] = torch.nan
    write_model(paths[1], tensors)
    config = config_for("ties", paths, parameters={"density": 0.3})
    merge(config, tmp_path / "out", nonfinite="warn")
    assert verify(tmp_path / "out", against=config, sample=None).problems == ()


def test_an_input_that_changes_meanwhile_is_the_worlds_failure(
    out: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    directory, config = out
    path = tmp_path / "m1" / "model.safetensors"
    with pytest.raises(WorldError, match=r"m1.*an input changed while it was read"):
        verify(directory, against=config, on_event=lambda event: path.touch())


# --- the command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def test_the_command_says_how_much_was_recomputed(out: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    directory, config = out
    (tmp_path / "c.yml").write_text(json.dumps(config))
    refused = run(directory, "--against", tmp_path / "c.yml")
    assert isinstance(refused.exception, InputError)  # another text is another config
    merge(tmp_path / "c.yml", directory, overwrite=True)
    done = run(directory, "--against", tmp_path / "c.yml", "--sample", 2, "--seed", 1, "--memory", "1GiB")
    assert (done.exit_code, done.output.splitlines()[1][:36]) == (0, "2 of 4 pieces recomputed from the in")
    everything = json.loads(run(directory, "--against", tmp_path / "c.yml", "--all", "--json").output)
    assert everything["recomputed"] == {
        "pieces": 4,
        "of_pieces": 4,
        "elements": 27600,
        "of_elements": 27600,
    }
    change_element(directory, "norm", 5)
    found = run(directory, "--against", tmp_path / "c.yml", "--all")
    assert isinstance(found.exception, StreammergeError)
    assert found.exception.exit_code == 2
    assert "tensor norm: element 5 is" in str(found.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--all"],
        ["--sample", "3"],
        ["--seed", "3"],
        ["--memory", "1GiB"],
        ["--against", "c", "--all", "--sample", "3"],
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str]) -> None:
    refused = run("out", *arguments)
    assert refused.exit_code == 2
    assert "--sample" in refused.output
