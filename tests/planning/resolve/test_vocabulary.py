"""Vocabularies put in one order: which rows each model gives, whatever the tokenizers and wherever a tensor is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from streammerge.api import merge, plan, verify
from streammerge.checkpoint.refs.rows import GatheredRef
from streammerge.errors import ConfigError, ModelError, OutputError, StreammergeError
from streammerge.io import local_file
from streammerge.io.reader import Reader
from streammerge.planning.resolve import vocabulary
from streammerge.tensors import gathered as gathered_module
from streammerge.tensors.read import read_elements
from tests.checkpoint.adapters.scene import in_order, write_adapter
from tests.checkpoint.tokenizers.scene import EMBEDDING, HEAD, OTHER, Model, rows_by_token, words, write
from tests.conftest import read_tensors


def linear(models: list[Model], **top: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "base_model": str(models[0].path),
        "models": [{"model": str(m.path), "parameters": {"weight": 1.0}} for m in models],
        **top,
    }


def output_ids(out: Path) -> dict[str, int]:
    data = json.loads((out / "tokenizer.json").read_text())
    return {**data["model"]["vocab"], **{entry["content"]: entry["id"] for entry in data["added_tokens"]}}


@st.composite
def vocabularies(draw: st.DrawFn) -> list[tuple[dict[str, int], int]]:
    """Return of two or three models the tokens, numbered anyhow, and the rows of the embedding."""
    found = []
    for _ in range(draw(st.integers(2, 3))):
        texts = draw(st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=8, unique=True))
        spread = draw(st.integers(0, 3))
        numbers = draw(st.permutations(range(len(texts) + spread)))[: len(texts)]
        ids = dict(sorted(zip(texts, numbers, strict=True), key=lambda item: item[1]))
        found.append((ids, max(1, max(numbers) + draw(st.integers(-1, 4)))))
    return found


@given(vocabularies(), st.sampled_from(["union", "base", 1]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_row_is_that_of_its_token(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[tuple[dict[str, int], int]],
    source: str | int,
    head: bool,
) -> None:
    room = tmp_path_factory.mktemp("models")
    models = [write(room / f"m{i}", ids, n_rows=n, seed=i, head=head) for i, (ids, n) in enumerate(drawn)]
    named = str(models[source].path) if isinstance(source, int) else source
    merge(linear(models, tokenizer_source=named), room / "out")
    ids = output_ids(room / "out")
    owner = models[source if isinstance(source, int) else 0]
    assert {text: ids[text] for text in owner.ids} == owner.ids
    assert set(ids) == (set().union(*(m.ids for m in models)) if source == "union" else set(owner.ids))
    assert len(set(ids.values())) == len(ids)
    found = read_tensors(room / "out")
    n_rows = max(max(ids.values()) + 1, owner.n_rows)
    assert json.loads((room / "out" / "config.json").read_text())["vocab_size"] == n_rows
    for name in (EMBEDDING, HEAD) if head else (EMBEDDING,):
        rows = rows_by_token(models, 0, ids, n_rows, name)
        assert found[name].shape == rows[0].shape
        assert torch.allclose(found[name].double(), torch.stack(rows).mean(dim=0), rtol=1e-6, atol=1e-6), name
    assert (HEAD in found) == head
    mean = torch.stack([m.tensors[OTHER].double() for m in models]).mean(dim=0)
    assert torch.allclose(found[OTHER].double(), mean, atol=1e-6)


@pytest.fixture
def three(tmp_path: Path) -> list[Model]:
    """Return models of which the last two have tokens that the base lacks, one of them in common."""
    return [
        write(tmp_path / "base", words("abcdefgh"), n_rows=10, seed=1),
        write(tmp_path / "one", words("hgfedcba"), added={"<x>": 8, "<y>": 9}, seed=2),
        write(tmp_path / "two", words("abcdefgh"), added={"<x>": 8}, n_rows=12, seed=3, dtype=torch.bfloat16),
    ]


def gathered(models: list[Model], **top: Any) -> list[GatheredRef]:
    decided = plan(linear(models, **top), memory="1GiB")
    return [ref for job in decided.jobs for ref in job.inputs if isinstance(ref, GatheredRef)]


@pytest.mark.parametrize("top", [{"tokenizer_source": "union"}, {"tokenizer": {"pad_to_multiple_of": 16}}])
def test_any_range_of_elements_is_that_of_the_whole(
    top: dict[str, Any], three: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = gathered(three, **top)
    assert len(refs) >= 4
    reader = Reader()
    rng = np.random.default_rng(5)
    for ref in refs:
        width = ref.nbytes // ref.n_elements
        whole = read_elements(reader, ref, 0, ref.n_elements).reshape(-1, width)
        for span, gap, views in ((1, 0, 1), (60, 30, 2), (1 << 20, 1 << 14, 1024)):
            monkeypatch.setattr(gathered_module, "_SPAN_BYTES", span)
            monkeypatch.setattr(gathered_module, "_GAP_BYTES", gap)
            monkeypatch.setattr(local_file, "_MOST_VIEWS", views)
            for _ in range(20):
                start, stop = sorted(rng.choice(ref.n_elements + 1, 2, replace=False).tolist())
                part = read_elements(reader, ref, start, stop).reshape(-1, width)
                assert np.array_equal(part, whole[start:stop]), (ref.name, start, stop)
    reader.close()


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties", "model_stock", "sce"])
def test_a_merge_is_that_of_models_written_out(method: str, three: list[Model], tmp_path: Path) -> None:
    models = three[:2] if method == "slerp" else three
    union = {**words("abcdefgh"), "<x>": 8, "<y>": 9}
    copies = []
    for i, model in enumerate(models):
        tensors = {name: t for name, t in model.tensors.items() if name == OTHER}
        rows = {
            name: rows_by_token(models, 0, union, 10, name)[i].float()
            for name, t in model.tensors.items()
            if name != OTHER
        }
        copy = write(tmp_path / f"copy{i}", union, n_rows=10)
        save_file({**tensors, **rows}, copy.path / "model.safetensors")
        copies.append(copy)
    found = []
    for name, some, top in (("aligned", models, {"tokenizer_source": "union"}), ("copied", copies, {})):
        config: dict[str, Any] = linear(some, dtype="float32", seed=4, **top)
        config["merge_method"] = method
        if method != "linear":
            config["models"] = [
                {"model": m["model"], "alias": f"m{i}"} for i, m in enumerate(config["models"]) if i
            ]
            config["parameters"] = {
                "slerp": {"t": 0.3},
                "ties": {"density": 0.4},
                "dare_ties": {"density": 0.4},
            }.get(method, {})
        merge(config, tmp_path / name)
        found.append(read_tensors(tmp_path / name))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_rows_of_other_dtypes_are_lent_exactly(three: list[Model], tmp_path: Path) -> None:
    """The base has fp32, the last model bf16: its matrix is gathered in fp32, and comes out as bf16 where it is alone."""
    dtypes = {ref.source.dtype: ref.dtype for ref in gathered(three, tokenizer_source="union")}
    assert dtypes["BF16"] == "F32"


def test_a_vocabulary_is_padded_with_the_mean_of_its_rows(three: list[Model], tmp_path: Path) -> None:
    merge(
        linear(three, tokenizer={"source": "base", "pad_to_multiple_of": 16}, dtype="float64"),
        tmp_path / "out",
    )
    found = read_tensors(tmp_path / "out")[EMBEDDING]
    assert found.shape[0] == 16
    rows = torch.stack(rows_by_token(three, 0, words("abcdefgh"), 10, EMBEDDING))
    assert torch.allclose(found[10:], rows.mean(dim=(0, 1)).expand(6, -1), atol=2e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 16


SOURCES: dict[str, tuple[dict[str, Any], Callable[[list[Model]], torch.Tensor]]] = {
    "a model's row": ({"source": "{one}"}, lambda m: m[1].tensors[EMBEDDING][7]),
    "another token": (
        {"source": {"kind": "model_token", "model": "{two}", "token": "c"}},
        lambda m: m[2].tensors[EMBEDDING][2].float(),
    ),
    "a row by number": (
        {"source": {"kind": "model_token", "model": "{two}", "token_id": 11}},
        lambda m: m[2].tensors[EMBEDDING][11].float(),
    ),
    "zeros": ({"source": {"kind": "zero"}}, lambda m: torch.zeros(6)),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("force", [True, False])
def test_a_token_may_have_a_source_of_its_own(
    kind: str, force: bool, three: list[Model], tmp_path: Path
) -> None:
    """Forced, all models have that row; else those that lack the token."""
    entry, row = SOURCES[kind]
    text = json.dumps(entry).replace("{one}", str(three[1].path)).replace("{two}", str(three[2].path))
    chosen = {**json.loads(text), "force": force}
    tokens = {"a": chosen, "<new>": chosen} if kind != "a model's row" else {"a": chosen}
    merge(linear(three, tokenizer={"source": "base", "tokens": tokens}, dtype="float32"), tmp_path / "out")
    found, ids = read_tensors(tmp_path / "out")[EMBEDDING], output_ids(tmp_path / "out")
    plain = torch.stack([m.tensors[EMBEDDING][m.ids["a"]].double() for m in three]).mean(dim=0)
    wanted = row(three)
    assert torch.allclose(found[ids["a"]].double(), wanted.double() if force else plain, atol=1e-6)
    if "<new>" in tokens:
        assert torch.equal(found[ids["<new>"]], wanted)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"<x>": {"source": "nowhere"}}, "'nowhere' is not one of the models being merged"),
        ({"<y>": {"source": "{base}"}}, "has no row for the token '<y>'"),
        (
            {"a": {"source": {"kind": "model_token", "model": "{base}", "token_id": 10}}},
            "has no row for the token 10",
        ),
        (
            {"a": {"source": {"kind": "model_token", "model": "{base}", "token": "zz"}}},
            "has no row for the token 'zz'",
        ),
    ],
)
def test_a_source_that_is_not_there_is_refused(tokens: Any, message: str, three: list[Model]) -> None:
    text = json.dumps(tokens).replace("{base}", str(three[0].path))
    with pytest.raises(StreammergeError, match=message):
        plan(linear(three, tokenizer={"source": "union", "tokens": json.loads(text)}))


@pytest.mark.parametrize("top", [{"tokenizer_source": "unoin"}, {"tokenizer": {"source": "unoin"}}])
def test_a_source_misspelt_is_told_from_a_model(top: dict[str, Any], three: list[Model]) -> None:
    with pytest.raises(
        ConfigError, match=r"'unoin' is not `union`, `base` or an available model \(did you mean 'union'\?\)"
    ):
        plan(linear(three, **top))


def test_without_a_tokenizer_of_its_own_each_vocabulary_must_fit(three: list[Model], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"vocabularies differ: align them with `tokenizer_source: union`"):
        plan(linear(three))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.complex64, torch.float8_e8m0fnu])
@pytest.mark.parametrize("top", [{}, {"exclude": ["embed|head"]}])
def test_rows_that_are_no_floats_are_refused(
    dtype: torch.dtype, top: dict[str, Any], three: list[Model], tmp_path: Path
) -> None:
    other = write(tmp_path / "other", words("hgfedcba"), dtype=dtype)
    with pytest.raises(ModelError, match=r"is not|cannot be reordered for a different vocabulary"):
        plan(linear([other, three[0]], tokenizer_source=str(three[0].path), **top))


def test_equal_vocabularies_are_read_as_they_lie(tmp_path: Path) -> None:
    models = [write(tmp_path / name, words("abcd"), n_rows=8, seed=i) for i, name in enumerate("xy")]
    assert gathered(models, tokenizer_source="union") == []
    merge(linear(models, tokenizer_source="union"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        models[0].path / "tokenizer.json"
    ).read_bytes()


def test_of_many_models_few_tokenizers_are_held_and_like_ones_share_a_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    class Watched(vocabulary.OrderedDict[str, Any]):
        def popitem(self, last: bool = True) -> Any:
            held.append(len(self))
            return super().popitem(last)

    monkeypatch.setattr(vocabulary, "OrderedDict", Watched)
    models = [
        write(tmp_path / f"m{i}", words("abcd" if i % 2 else "abcdefgh"[i:] + "abcdefgh"[:i]), seed=i)
        for i in range(8)
    ]
    refs = gathered(models, tokenizer_source="union")
    assert max(held) == 4  # one more than are kept
    assert len({id(ref.map) for ref in refs if ref.source.shape[0] == 4}) == 1
    assert len(refs) == 2 * 7


def test_the_identity_of_a_merge_has_its_vocabulary(three: list[Model], tmp_path: Path) -> None:
    config = linear(three, tokenizer_source="union")
    merge(config, tmp_path / "out")
    assert merge(config, tmp_path / "out").already_complete
    assert not verify(tmp_path / "out", against=config, sample=None).problems
    data = json.loads((three[1].path / "tokenizer.json").read_text())
    data["model"]["vocab"] = words("hgfedcab")
    (three[1].path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(OutputError, match="a different tokenizer"):
        merge(config, tmp_path / "out")


def test_numbers_of_tokens_follow_the_tokenizer(tmp_path: Path) -> None:
    special = {
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "pad_token_id": 3,
        "text_config": {"image_token_id": 2},
    }
    base = write(tmp_path / "base", words("abcd"), config=special)
    (base.path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.5}))
    other = write(tmp_path / "other", words("cbaz"), seed=1)
    merge(linear([base, other], tokenizer_source=str(other.path)), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["bos_token_id"], found["eos_token_id"], found["text_config"]["image_token_id"]) == (
        2,
        [1, 0],
        0,
    )
    assert found["pad_token_id"] == 3  # which the output's tokenizer lacks: told, and left
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 1, "temperature": 0.5}
    notes = plan(linear([base, other], tokenizer_source=str(other.path))).warnings
    assert any("pad_token_id: the output's tokenizer lacks this token" in note for note in notes)


def test_a_diagonal_does_not_follow_rows_that_were_moved(three: list[Model], tmp_path: Path) -> None:
    models = []
    for model in three[:2]:
        save_file(
            {name: torch.rand(t.shape) for name, t in model.tensors.items()},
            model.path.with_suffix(".safetensors"),
        )
        models.append({"model": str(model.path), "fisher": str(model.path.with_suffix(".safetensors"))})
    decided = plan({"merge_method": "fisher", "models": models, "tokenizer_source": "union"})
    assert any("reordered rows" in note for note in decided.warnings)
    assert {job.name: len(job.fishers) for job in decided.jobs} == {EMBEDDING: 0, HEAD: 0, OTHER: 2}


def test_rows_with_an_adapter_are_gathered_too(three: list[Model], tmp_path: Path) -> None:
    """The embedding of the model that the others borrow from is itself computed as it is read."""
    generator = torch.Generator().manual_seed(9)
    b, a = (torch.randn(shape, generator=generator) for shape in ((three[1].n_rows, 2), (2, 6)))
    parts = {"model.embed_tokens.lora_A.weight": a, "model.embed_tokens.lora_B.weight": b}
    adapter = write_adapter(tmp_path / "adapter", parts, r=2, lora_alpha=3)
    config = linear(three[:2], tokenizer_source="union")
    config["models"][1]["model"] += f"+{adapter}"
    merge(config, tmp_path / "out")
    three[1].tensors[EMBEDDING] = in_order(three[1].tensors[EMBEDDING], a, b, 1.5)
    rows = rows_by_token(three[:2], 0, output_ids(tmp_path / "out"), 10, EMBEDDING)
    found = read_tensors(tmp_path / "out")[EMBEDDING].double()
    assert torch.allclose(found, torch.stack(rows).mean(dim=0), rtol=1e-6, atol=1e-6)


def test_rows_that_are_different_tokens_are_told_and_refused_where_they_are_most(tmp_path: Path) -> None:
    """Nothing aligns the vocabularies here; the sizes are equal, so that the shapes tell nothing."""
    texts = [f"w{i}" for i in range(20)]
    one = {text: i for i, text in enumerate(texts)}
    two = {**one, "w18": 19, "w19": 18}
    other = {text: i for i, text in enumerate(reversed(texts))}
    paths = []
    for i, ids in enumerate((one, two, other)):
        path = tmp_path / str(i)
        path.mkdir()
        save_file(
            {"model.embed_tokens.weight": torch.full((20, 4), float(i)), "x": torch.ones(3)},
            path / "model.safetensors",
        )
        (path / "config.json").write_text("{}")
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}, "added_tokens": []}))
        paths.append(path)

    def of(*numbers: int, **top: Any) -> dict[str, Any]:
        models = [{"model": str(paths[i]), "parameters": {"weight": 1.0}} for i in numbers]
        return {"merge_method": "linear", "models": models, **top}

    (line,) = [line for line in plan(of(0, 1, 0)).warnings if "token" in line]
    assert "2 rows of their vocabularies are different tokens (first: 18, 'w19' and 'w18')" in line
    with pytest.raises(ModelError, match=r"20 rows .* are different tokens .*: `tokenizer_source: base`"):
        plan(of(0, 2))
    assert not [line for line in plan(of(0, 2, tokenizer_source="union")).warnings if "token" in line]
    assert not [line for line in plan(of(0, 2, exclude=["embed"])).warnings if "token" in line]
    (paths[2] / "tokenizer.json").write_text("{")
    assert not [line for line in plan(of(0, 2)).warnings if "token" in line]
