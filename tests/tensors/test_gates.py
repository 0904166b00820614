"""Tensors of mixtures that no file contains: their elements depend on neither the cut nor the order of reading."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from streammerge.checkpoint.index import open_model
from streammerge.checkpoint.refs.gates import DRAWN_BLOCK, ChangedRef, DrawnRef, GateRef, Gates
from streammerge.formats.refs import SourceRef
from streammerge.io.reader import Reader
from streammerge.numerics.normal import normal_of, uniform_of
from streammerge.numerics.philox import derive_key, words
from streammerge.tensors.read import read_elements
from streammerge.testing.models import write_model

SHAPE = (5, DRAWN_BLOCK // 4 + 3)
KEY = derive_key(3, "test", "", "w")
N = SHAPE[0] * SHAPE[1]


@pytest.fixture(scope="module")
def weight(tmp_path_factory: pytest.TempPathFactory) -> SourceRef:
    tensors = {"w": torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()}
    return open_model(write_model(tmp_path_factory.mktemp("model"), tensors))["w"]


def refs(weight: SourceRef) -> dict[str, SourceRef]:
    gates = Gates((), 2, values=np.random.default_rng(0).normal(size=(2, 7, SHAPE[1])).astype(np.float32))
    return {
        "gate": GateRef(weight, "gate", SHAPE, gates, 1, 2),
        "normal": DrawnRef(weight, "drawn", SHAPE, "normal", KEY),
        "uniform": DrawnRef(weight, "drawn", SHAPE, "uniform", KEY, 0.25),
        "zero": DrawnRef(weight, "zero", SHAPE, "zero"),
        "changed": ChangedRef(weight, "changed", 0.5, -3.0, KEY),
        "scaled": ChangedRef(weight, "changed", 0.0, 0.7, KEY),
    }


@pytest.mark.parametrize("kind", ["gate", "normal", "uniform", "zero", "changed", "scaled"])
def test_elements_do_not_depend_on_the_cut(weight: SourceRef, kind: str, tmp_path: Path) -> None:
    reader, ref = Reader(), refs(weight)[kind]
    whole = read_elements(reader, ref, 0, N).view(np.float32)
    cuts = [0, 1, 5, DRAWN_BLOCK - 1, DRAWN_BLOCK + 2, N - 3, N]
    parts = [read_elements(reader, ref, a, b).view(np.float32) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole)
    reader.close()


def test_values_are_those_of_the_formula(weight: SourceRef) -> None:
    reader, known = Reader(), refs(weight)
    found = {kind: read_elements(reader, ref, 0, N).view(np.float32) for kind, ref in known.items()}
    gate = known["gate"]
    assert isinstance(gate, GateRef)
    assert gate.gates.values is not None
    assert np.array_equal(found["gate"], gate.gates.values[1, 2:7].ravel())
    assert not found["zero"].any()
    normal = torch.special.ndtri((words(KEY, 0, N).double() + 0.5) / 2**32).numpy()
    np.testing.assert_allclose(found["normal"], normal, rtol=1e-6)
    raw = read_elements(reader, weight, 0, N)
    plain = torch.from_numpy(raw).view(torch.bfloat16).double().numpy()
    np.testing.assert_allclose(found["changed"], (plain + 0.5 * normal) * -3.0, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["scaled"], plain * 0.7, rtol=1e-6)
    uniform = ((words(KEY, 0, N).double() + 0.5) / 2**31 - 1).numpy() / 4
    np.testing.assert_allclose(found["uniform"], uniform, rtol=1e-6, atol=1e-12)
    reader.close()


def test_normal_numbers_are_the_quantiles_of_all_words() -> None:
    chosen = torch.tensor(
        [0, 1, 2**20, 2**28, 321_912_832, 322_122_548, 2**31 - 1, 2**31, 3_972_844_750, 2**32 - 1]
    )
    expected = torch.special.ndtri(uniform_of(chosen))
    torch.testing.assert_close(normal_of(chosen), expected, rtol=1e-14, atol=1e-15)
