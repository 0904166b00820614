"""`compare`: against float64 sums of our own, the same bits however it is cut, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streammerge
from streammerge.errors import InputError, ModelError
from streammerge.report.comparison import Comparison, comparison_text, comparison_values, shares_of_signs
from streammerge.report.pages.comparison import comparison_page
from tests.conftest import as_float64, write_model, write_models

quiet: dict[str, Any] = {"on_event": lambda event: None}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base, three fine-tunes on the bf16 lattice (full of ties), one of them with a tensor of the base."""
    made = write_models(tmp_path_factory.mktemp("models"), 3)
    tensors = {name: torch.from_numpy(values) for name, values in as_float64(made[2]).items()}
    tensors = {name: values.bfloat16() for name, values in tensors.items() if name != "position_ids"}
    tensors["model.layers.1.input_layernorm.weight"] = torch.from_numpy(
        as_float64(made[0])["model.layers.1.input_layernorm.weight"]
    ).bfloat16()
    write_model(made[2], {**tensors, "position_ids": torch.arange(16)})
    return made


@pytest.fixture(scope="module")
def found(paths: list[Path]) -> Comparison:
    return streammerge.compare(paths[1:], paths[0], **quiet)


@pytest.fixture(scope="module")
def deltas(paths: list[Path]) -> list[dict[str, np.ndarray]]:
    base, *models = [as_float64(path) for path in paths]
    return [{name: model[name] - base[name] for name in base if name != "position_ids"} for model in models]


def largest(delta: np.ndarray, share: float) -> np.ndarray:
    """Return a delta with all but its largest entries at 0; of equal ones the first count."""
    flat = delta.ravel()
    kept = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(share * flat.size))]
    out = np.zeros_like(flat)
    out[kept] = flat[kept]
    return out


def signs(vectors: list[np.ndarray]) -> tuple[int, int]:
    stacked = np.sign(np.stack([vector.ravel() for vector in vectors]))
    several = (stacked != 0).sum(axis=0) >= 2
    conflict = (stacked > 0).any(axis=0) & (stacked < 0).any(axis=0)
    return int((several & ~conflict).sum()), int(conflict.sum())


def test_norms_cosines_and_top_shares_are_those_of_float64(
    found: Comparison, deltas: list[dict[str, np.ndarray]], paths: list[Path]
) -> None:
    values = comparison_values(found)
    base = {name: v for name, v in as_float64(paths[0]).items() if name != "position_ids"}
    whole = [np.concatenate([d.ravel() for d in delta.values()]) for delta in deltas]
    for entry, delta, vector in zip(values["models"], deltas, whole, strict=True):
        assert entry["norm"] == pytest.approx(np.linalg.norm(vector), rel=1e-12)
        base_norm = np.sqrt(sum((v**2).sum() for v in base.values()))
        assert entry["relative"] == pytest.approx(np.linalg.norm(vector) / base_norm, rel=1e-12)
        for share, part in entry["top_share"].items():
            squares = sum((largest(d, float(share)) ** 2).sum() for d in delta.values())
            assert part == pytest.approx(squares / (vector**2).sum(), rel=1e-12)
        for name, tensor in entry["tensors"].items():
            assert tensor["norm"] == pytest.approx(np.linalg.norm(delta[name]), rel=1e-12)
            assert tensor["identical"] == (not delta[name].any())
        mlp = [name for name in delta if ".mlp." in name]
        assert entry["kinds"]["mlp"] == pytest.approx(
            np.sqrt(sum((delta[name] ** 2).sum() for name in mlp)), rel=1e-12
        )
        assert [layer["layer"] for layer in entry["layers"]] == [0, 1]
        first = np.sqrt(sum((d**2).sum() for name, d in delta.items() if ".0." in name))
        assert entry["layers"][0]["norm"] == pytest.approx(first, rel=1e-12)
    for i, one in enumerate(whole):
        for j, other in enumerate(whole):
            expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            assert values["cosines"][i][j] == pytest.approx(expected, abs=1e-12)


def test_signs_are_counted_exactly(found: Comparison, deltas: list[dict[str, np.ndarray]]) -> None:
    for counts, share in ((found.total.signs, 1.0), (found.total.top_signs, 0.2)):
        each = [signs([largest(delta[name], share) for delta in deltas]) for name in deltas[0]]
        assert (counts.agree, counts.conflict) == (sum(a for a, _ in each), sum(c for _, c in each))


def test_magnitudes_are_counted_by_power_of_two(
    found: Comparison, deltas: list[dict[str, np.ndarray]]
) -> None:
    for i, delta in enumerate(deltas):
        flat = np.concatenate([d.ravel() for d in delta.values()]).astype(np.float32)
        expected = np.bincount((np.abs(flat).view(np.uint32) >> 23), minlength=256)
        assert found.total.exponents[i].tolist() == expected.tolist()


@pytest.mark.parametrize(("capacity", "threads"), [(700_000, 1), (260_000, 2)])
def test_bits_do_not_depend_on_memory_or_threads(
    found: Comparison,
    paths: list[Path],
    small_capacity: Callable[[int, int], None],
    capacity: int,
    threads: int,
) -> None:
    small_capacity(capacity, threads)
    again = streammerge.compare(paths[1:], paths[0], **quiet)
    assert json.dumps(comparison_values(again)) == json.dumps(comparison_values(found))


def test_kernels_and_formulas_agree(
    found: Comparison, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streammerge.planning.prepare.unusable_kernels", lambda names: "numba is not there")
    again = streammerge.compare(paths[1:], paths[0], **quiet)
    assert json.dumps(comparison_values(again)) == json.dumps(comparison_values(found))


def test_without_a_base_the_first_model_is_it(paths: list[Path], found: Comparison) -> None:
    again = streammerge.compare(paths, **quiet)
    assert json.dumps(comparison_values(again)) == json.dumps(comparison_values(found))


def test_one_model_alone_has_no_signs_to_agree(paths: list[Path]) -> None:
    values = comparison_values(streammerge.compare([paths[1]], paths[0], **quiet))
    assert values["signs"] == {
        "all": {"agree": None, "conflict": None},
        "top20": {"agree": None, "conflict": None},
    }
    assert values["cosines"] == [[1.0]]


def test_a_model_that_is_the_base_has_no_direction(paths: list[Path], tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(v).bfloat16() for name, v in as_float64(paths[0]).items()}
    write_model(tmp_path / "copy", {**tensors, "position_ids": torch.arange(16)})
    found = streammerge.compare([tmp_path / "copy", paths[1]], paths[0], **quiet)
    values = comparison_values(found)
    assert values["models"][0]["norm"] == 0.0
    assert all(tensor["identical"] for tensor in values["models"][0]["tensors"].values())
    assert values["cosines"] == [[None, None], [None, 1.0]]
    assert "–" in comparison_text(found)


def test_tensors_that_the_models_do_not_share_are_left_out_by_name(
    paths: list[Path], tmp_path: Path, found: Comparison
) -> None:
    tensors = {name: torch.from_numpy(v).bfloat16() for name, v in as_float64(paths[1]).items()}
    embeddings = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embeddings, embeddings[:1]])
    lost = "model.layers.0.input_layernorm.weight"
    del tensors[lost]
    other = write_model(tmp_path / "other", {**tensors, "extra.weight": torch.ones(3).bfloat16()})
    fewer = streammerge.compare([other, *paths[2:]], paths[0], **quiet)
    assert set(fewer.left_out) == {"position_ids", "model.embed_tokens.weight", lost, "extra.weight"}
    assert {tensor.name for tensor in fewer.tensors} == {tensor.name for tensor in found.tensors} - set(
        fewer.left_out
    )
    assert "not compared, since the models do not all have them alike: " in comparison_text(fewer)
    assert comparison_values(fewer)["left_out"] == dict(fewer.left_out)
    assert "left_out" not in comparison_values(found)


def test_the_page_shows_every_model_layer_and_tensor(paths: list[Path], found: Comparison) -> None:
    pytest.importorskip("vl_convert", reason="the extra `pages` is not installed")
    page = comparison_page(found)
    for figure in ("Norm by layer", "Norm by kind of tensor", "Cosines between task vectors"):
        assert f"<figcaption>{figure}" in page
    for figure in ("Conflicting signs by layer", "Magnitudes of the changes", "Held by the largest entries"):
        assert f"<figcaption>{figure}" in page
    assert page.count("<svg") == 6
    for i, path in enumerate(paths[1:]):
        assert f"{path.name}, layer 1: {list(found.by_layer().values())[1].norm(i):.4g}" in page
    conflict = shares_of_signs(next(iter(found.by_layer().values())).top_signs)["conflict"]
    assert conflict is not None
    assert f"largest 20 %, layer 0: {100 * conflict:.3g} %" in page
    exponents = found.total.exponents[1]
    largest = int(exponents.argmax())
    assert f"{int(exponents[largest]):,} entries from 2^{largest - 127} to" in page
    assert all(tensor.name in page for tensor in found.tensors)
    assert "1 tensor of m2 identical to the base" in page


def test_the_text_fits_a_screen(found: Comparison) -> None:
    lines = comparison_text(found).splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 100


def test_what_cannot_be_compared_is_refused(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name at least two models, or give --base"):
        streammerge.compare([paths[0]], **quiet)
    tensors = {name: torch.from_numpy(v).float() for name, v in as_float64(paths[1]).items()}
    tensors["model.embed_tokens.weight"][3, 4] = float("nan")
    broken = write_model(tmp_path / "broken", tensors)
    with pytest.raises(
        ModelError,
        match=r"embed_tokens\.weight holds NaN or infinity at element 196 \[.*\]: repair the model$",
    ):
        streammerge.compare([broken, paths[2]], paths[0], **quiet)
