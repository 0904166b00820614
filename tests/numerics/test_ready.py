"""Loops that are called without numba compute what numba's do, and leave to numba what they do not serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streammerge.kernels import deltas, fisher, merge
from streammerge.kernels.operands import CODES, Operand, Operands
from streammerge.numerics import exporting, ready
from streammerge.numerics.compiled import Cache, kernel_cache
from streammerge.numerics.ready import Loop

N = 1000


@pytest.fixture(scope="module", autouse=True)
def exported() -> None:
    """Have the files of the loops that are called here."""
    merge.weighted_sum(*summands())
    deltas.words_between(*window())
    fisher.sums(diagonal(), N)
    exporting.export()


def summands(dtype: str = "BF16") -> list[Any]:
    bits = np.random.default_rng(0).standard_normal(3 * N).astype(np.float32).view(np.uint32)
    half = (bits >> 16).astype(np.uint16)
    half = np.concatenate([half, half[: len(half) % 2]])
    places, codes = np.array([0, 2 * N], np.int64), np.full(2, CODES[dtype], np.int64)
    full = half.view(np.uint32)
    models, out = Operands(half, full, places, codes), Operand(half, full, 4 * N, CODES[dtype])
    return [models, np.array([0.25, 0.5]), 1.5, N, out]


def window() -> list[Any]:
    room = np.zeros(N, np.int64)
    return [0, N, np.arange(4, dtype=np.uint32), 1 << 30, 1 << 31, room, room.copy()]


def diagonal() -> Operand:
    values = np.random.default_rng(1).gamma(0.3, size=N).astype(np.float32)
    return Operand(values.view(np.uint16), values.view(np.uint32), 0, CODES["F32"])


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where a loop is left to numba."""

    def left(name: str) -> None:
        raise AssertionError(name)

    with monkeypatch.context() as patch:
        patch.setattr(ready, "import_module", left)
        yield


@pytest.mark.usefixtures("no_numba")
def test_the_bits_and_results_are_those_of_numbas_functions() -> None:
    (mine, theirs), results = (summands(), summands()), []
    for call, arguments in ((Loop("kernels.merge", "weighted_sum"), mine), (merge.weighted_sum, theirs)):
        results.append(call(*arguments))
    assert results[0] == results[1] == 0
    assert mine[-1].half.tobytes() == theirs[-1].half.tobytes()
    drawn, known = window(), window()
    assert Loop("kernels.deltas", "words_between")(*drawn) == deltas.words_between(*known)
    assert all(np.array_equal(one, other) for one, other in zip(drawn[-2:], known[-2:], strict=True))
    assert Loop("kernels.fisher", "sums")(diagonal(), N) == fisher.sums(diagonal(), N)


def replaced(at: int, value: Any) -> list[Any]:
    arguments = summands()
    arguments[at] = value
    return arguments


@pytest.mark.parametrize(
    "arguments",
    [
        replaced(1, np.array([0.25, 0.5], np.float32)),
        replaced(1, np.array([0.25, 0.0, 0.5, 0.0])[::2]),
        replaced(1, np.array([[0.25, 0.5]])),
        replaced(1, (0.25, 0.5)),
        replaced(2, 2),
        replaced(3, True),
        replaced(3, 1 << 63),
        summands()[:-1],
    ],
    ids=["dtype", "steps", "rank", "no array", "int", "bool", "large", "fewer"],
)
def test_arguments_of_other_types_are_left_to_numba(
    arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Left(Exception):
        pass

    def left(name: str) -> None:
        raise Left(name)

    monkeypatch.setattr(ready, "import_module", left)
    with pytest.raises(Left, match=r"streammerge\.kernels\.merge"):
        Loop("kernels.merge", "weighted_sum")(*arguments)


def test_a_read_only_array_is_left_to_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.array([0.25, 0.5])
    weights.flags.writeable = False
    monkeypatch.setattr(ready, "import_module", lambda name: pytest.fail("left"))
    with pytest.raises(pytest.fail.Exception, match="left"):
        Loop("kernels.merge", "weighted_sum")(*replaced(1, weights))


@pytest.mark.parametrize("damage", ["empty", "short", "long", "flipped"])
def test_a_broken_file_is_left_to_numba(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = kernel_cache().directory
    assert directory is not None
    (path,) = directory.glob("kernels.merge.weighted_sum-*.ready")
    whole = path.read_bytes()
    flipped = whole[:-500] + bytes([whole[-500] ^ 1]) + whole[-499:]
    content = {"empty": b"", "short": whole[:-1], "long": whole + b"x", "flipped": flipped}[damage]
    (tmp_path / path.name).write_bytes(content)
    monkeypatch.setattr(ready, "kernel_cache", lambda: Cache(tmp_path))
    monkeypatch.setattr(ready, "_LOADED", {})
    assert ready._overloads("kernels.merge.weighted_sum") == ()
    assert Loop("kernels.merge", "weighted_sum")(*summands()) == 0


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty directory in which files of loops are written and looked for."""
    for module in (ready, exporting):
        monkeypatch.setattr(module, "kernel_cache", lambda: Cache(tmp_path))
    monkeypatch.setattr(ready, "_LOADED", {})
    return tmp_path


@pytest.mark.usefixtures("no_numba")
def test_what_a_different_process_has_cached_meanwhile_is_called_by_its_own_name(kept: Path) -> None:
    """Two processes that compile one loop at once give it different names; the cache keeps the later one's."""
    loop: Any = fisher.sums
    ((signature, mine),) = loop.overloads.items()
    theirs = loop._compiler._compile_core(signature, mine.signature.return_type)
    assert theirs.fndesc.llvm_func_name != mine.fndesc.llvm_func_name
    loop._cache.save_overload(signature, theirs)
    assert exporting.export() > 0
    assert list(kept.glob("kernels.fisher.sums-*.ready"))
    assert Loop("kernels.fisher", "sums")(diagonal(), N) == fisher.sums(diagonal(), N)


def test_a_file_whose_loop_is_missing_is_not_loaded(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM gives what it does not find the address 0, and a call there ends the process."""
    unpacking = exporting._unpacking
    monkeypatch.setattr(
        exporting,
        "_unpacking",
        lambda compiled, symbol, kinds, entry: unpacking(compiled, f"{symbol}.absent", kinds, entry),
    )
    loop: Any = fisher.sums
    ((signature, mine),) = loop.overloads.items()
    told, objects = exporting._exported("kernels.fisher.sums", loop, signature, mine, "types")
    told["loop"] += ".absent"
    with pytest.raises(ValueError, match="no function"):
        ready.write_code(kept / "kernels.fisher.sums-types.ready", told, objects)
    assert list(kept.iterdir()) == []
