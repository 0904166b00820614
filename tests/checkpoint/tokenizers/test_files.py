"""Tokenizer files: every kind that is read, those that are written, chat templates, and what strangers put there."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from streammerge.api import merge, plan
from streammerge.checkpoint.tokenizer import read_tokenizer
from streammerge.config.tokenizer import TEMPLATES
from streammerge.errors import BudgetError, ConfigError, ModelError
from tests.checkpoint.tokenizers.scene import EMBEDDING, Model, words, write, write_tokenizer
from tests.conftest import read_tensors
from tests.planning.resolve.test_vocabulary import linear, output_ids

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def pieces(texts: list[str]) -> bytes:
    """Return a sentencepiece model: pieces with a score and a type, and a trainer's settings behind them."""
    out = b""
    for text in texts:
        raw = text.encode()
        entry = b"\x0a" + varint(len(raw)) + raw + b"\x15" + struct.pack("<f", -1.5) + b"\x18\x01"
        out += b"\x0a" + varint(len(entry)) + entry
    return out + b"\x12\x02\x18\x05"


KINDS: dict[str, dict[str, bytes]] = {
    "vocab.json": {"vocab.json": json.dumps(words("abc")).encode(), "merges.txt": b""},
    "vocab.txt": {"vocab.txt": b"a\nb\nc\n"},
    "vocab.txt without an end": {"vocab.txt": b"a\r\nb\r\nc"},
    "sentencepiece": {"tokenizer.model": pieces(["a", "b", "c"])},
    "Unigram": {
        "tokenizer.json": json.dumps(
            {"model": {"type": "Unigram", "vocab": [["a", 0], ["b", -1.5], ["c", -2]]}}
        ).encode()
    },
    "WordPiece": {
        "tokenizer.json": json.dumps({"added_tokens": None, "model": {"vocab": words("abc")}}).encode()
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_vocabulary_is_read(kind: str, tmp_path: Path) -> None:
    for name, data in KINDS[kind].items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "added_tokens.json").write_text('{"<x>": 5}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"3": {"content": "<y>", "special": true}}}'
    )
    found = read_tokenizer(tmp_path)
    assert found is not None
    assert dict(found.ids) == {**words("abc"), "<y>": 3, "<x>": 5}
    assert found.added["<y>"]["special"] is True
    assert found.n_rows == 6


def test_a_directory_without_one_has_none(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None


HOSTILE: dict[str, tuple[str, bytes, str]] = {
    "no object": ("tokenizer.json", b"[]", "not a JSON object"),
    "no model": ("tokenizer.json", b"{}", "has no model.vocab"),
    "a vocabulary that is text": ("tokenizer.json", b'{"model": {"vocab": "a"}}', "has no model.vocab"),
    "a number below zero": (
        "tokenizer.json",
        b'{"model": {"vocab": {"a": -1}}}',
        "'-1' is not the number of a token",
    ),
    "a number without end": (
        "tokenizer.json",
        b'{"model": {"vocab": {"a": 2097152}}}',
        "is not the number of a token",
    ),
    "a fraction": ("tokenizer.json", b'{"model": {"vocab": {"a": 1.5}}}', "is not the number of a token"),
    "true": ("tokenizer.json", b'{"model": {"vocab": {"a": true}}}', "is not the number of a token"),
    "a list of numbers": ("tokenizer.json", b'{"model": {"vocab": [1, 2]}}', "a token that is no text"),
    "an empty entry": ("tokenizer.json", b'{"model": {"vocab": [[]]}}', "a token that is no text"),
    "added tokens that are none": (
        "tokenizer.json",
        b'{"model": {"vocab": {}}, "added_tokens": [3]}',
        "an entry that is not an object",
    ),
    "an added token without text": (
        "tokenizer.json",
        b'{"model": {"vocab": {}}, "added_tokens": [{"id": 3}]}',
        "no text",
    ),
    "a text without end": ("vocab.json", json.dumps({"a" * 70000: 1}).encode(), "a text without end"),
    "nested": ("tokenizer.json", b'{"model": ' + b"[" * 100_000, "nested too deeply"),
    "twice": ("tokenizer.json", b'{"model": {"vocab": {"a": 1, "a": 2}}}', "has the key 'a' twice"),
    "no sentencepiece": ("tokenizer.model", b"IQ== 0\nIg== 1\n", "not a sentencepiece model"),
    "an empty sentencepiece": ("tokenizer.model", b"", "not a sentencepiece model"),
    "cut sentencepiece": ("tokenizer.model", pieces(["abc"])[:6], "not a sentencepiece model"),
    "a length without end": (
        "tokenizer.model",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        "not a sentencepiece model",
    ),
    "a piece that is no text": ("tokenizer.model", b"\x0a\x03\x0a\x01\xff", "not a sentencepiece model"),
    "lines that are no text": ("vocab.txt", b"a\n\xff\n", "not UTF-8 (byte 2)"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_malformed_tokenizer_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    name, data, message = HOSTILE[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError) as caught:
        read_tokenizer(tmp_path)
    text = str(caught.value)
    assert message in text
    assert name in text
    assert len(text) < 1000
    assert "\n" not in text


@pytest.mark.parametrize(
    "decoder", ['{"x": {"content": "a"}}', '{"1": 3}', '{"1": {}}', '{"1": {"content": 7}}']
)
def test_a_malformed_list_of_added_tokens_is_refused(decoder: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, words("abc"))
    (tmp_path / "tokenizer_config.json").write_text(f'{{"added_tokens_decoder": {decoder}}}')
    with pytest.raises(ModelError, match=r"tokenizer_config.json"):
        read_tokenizer(tmp_path)


def test_a_model_without_a_tokenizer_or_an_embedding_is_named(tmp_path: Path) -> None:
    base, other = (write(tmp_path / name, words("abcd")) for name in ("base", "other"))
    (other.path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"other: no readable tokenizer"):
        plan(linear([base, other], tokenizer_source="union"))
    write_tokenizer(other.path, words("abcd"))
    from safetensors.torch import save_file

    save_file({"x": other.tensors[EMBEDDING]}, other.path / "model.safetensors")
    with pytest.raises(ModelError, match=r"other: no tensor has a known name of a token embedding"):
        plan(linear([base, other], tokenizer_source="union"))


def test_a_tokenizer_may_come_from_elsewhere(tmp_path: Path) -> None:
    models = [write(tmp_path / name, words("abcd"), seed=i) for i, name in enumerate("xy")]
    write_tokenizer(tmp_path / "elsewhere", words("dcba"), model_max_length=99)
    merge(linear(models, tokenizer_source=str(tmp_path / "elsewhere")), tmp_path / "out")
    assert output_ids(tmp_path / "out") == words("dcba")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 99
    mean = sum(m.tensors[EMBEDDING].double() for m in models) / 2
    assert abs(read_tensors(tmp_path / "out")[EMBEDDING].double() - mean.flip(0)).max() < 1e-6
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match="has no readable tokenizer"):
        plan(linear(models, tokenizer_source=str(tmp_path / "nothing")))


@pytest.mark.parametrize("full", [True, False])
def test_new_tokens_are_listed_where_a_loader_looks(full: bool, tmp_path: Path) -> None:
    base = write(
        tmp_path / "base", words("abcd"), added_tokens_decoder={"3": {"content": "d", "special": False}}
    )
    other = write(tmp_path / "other", words("abcd"), added={"<x>": 4}, seed=1)
    if not full:
        (base.path / "tokenizer.json").unlink()
        (base.path / "vocab.json").write_text(json.dumps(words("abcd")))
    merge(linear([base, other], tokenizer_source="union"), tmp_path / "out")
    found = read_tokenizer(tmp_path / "out")
    assert found is not None
    assert found.ids["<x>"] == 4
    decoder = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder["4"] == {
        "content": "<x>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    assert (tmp_path / "out" / "added_tokens.json").exists() == (not full)


def chatty(directory: Path, template: str | None, seed: int) -> Model:
    return write(
        directory, words("abcd"), seed=seed, **({} if template is None else {"chat_template": template})
    )


def template_of(out: Path) -> Any:
    return json.loads((out / "tokenizer_config.json").read_text()).get("chat_template")


def test_the_chat_template_that_most_models_have_is_taken(tmp_path: Path) -> None:
    other = CHAT + "{# another #}"
    templates = [None, CHAT, other, other]
    models = [chatty(tmp_path / f"m{i}", template, i) for i, template in enumerate(templates)]
    merge(linear(models, chat_template="auto"), tmp_path / "out")
    assert template_of(tmp_path / "out") == other
    merge(linear(models[:2]), tmp_path / "kept")
    assert template_of(tmp_path / "kept") is None
    assert any("no model has one" in note for note in plan(linear(models[:1], chat_template="auto")).warnings)


@pytest.mark.parametrize("name", [*TEMPLATES, CHAT])
def test_a_chat_template_by_name_or_written_out(name: str, tmp_path: Path) -> None:
    model = chatty(tmp_path / "m", None, 0)
    (model.path / "chat_template.jinja").write_text("an older one")
    merge(linear([model], chat_template=name), tmp_path / "out")
    assert template_of(tmp_path / "out") == TEMPLATES.get(name, name)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATES.get(name, name)


SPOKEN = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
]
RENDERED = {
    "alpaca": "<s>S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "exaone": "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    "mistral": "<s>S\n\n[INST] U [/INST] A</s>",
}


def test_merged_models_load_and_speak(tmp_path: Path) -> None:
    """transformers gives the added tokens the numbers of their rows, and renders every template."""
    from transformers import AutoTokenizer

    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    base = write(tmp_path / "base", words("abcd", 2), added={"<s>": 0, "</s>": 1}, **special)
    other = write(
        tmp_path / "other",
        words("dcba", 2),
        added={"<s>": 0, "</s>": 1, "<|im_start|>": 6, "<|im_end|>": 7},
        seed=1,
        **special,
    )
    for name, text in RENDERED.items():
        merge(linear([base, other], tokenizer_source="union", chat_template=name), tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert loaded.encode("a<|im_start|>b<|im_end|>", add_special_tokens=False) == [2, 6, 3, 7]
        assert loaded.decode([6, 2, 7]).replace(" ", "") == "<|im_start|>a<|im_end|>"
        assert len(loaded) == 8 == read_tensors(tmp_path / name)[EMBEDDING].shape[0]
        assert loaded.apply_chat_template(SPOKEN, tokenize=False) == text


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"tokenizer_source": "union", "tokenizer": {}}, "cannot both be set"),
        ({"tokenizer_source": 3}, "tokenizer_source: must be a string"),
        ({"tokenizer": "union"}, "tokenizer: must be a map"),
        ({"tokenizer": {"sources": "union"}}, "unknown key 'sources' (did you mean 'source'"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "must be an integer from 1"),
        ({"tokenizer": {"pad_to_multiple_of": True}}, "must be an integer from 1"),
        ({"tokenizer": {"pad_to_multiple_of": 2**40}}, "must be an integer from 1"),
        ({"tokenizer": {"tokens": ["a"]}}, "tokens: must be a map"),
        ({"tokenizer": {"tokens": {"a": "b"}}}, "tokens.a: must be a map"),
        ({"tokenizer": {"tokens": {"a": {"force": True}}}}, "source: is missing"),
        ({"tokenizer": {"tokens": {"a": {"source": "b", "force": 1}}}}, "force: must be true or false"),
        ({"tokenizer": {"tokens": {"a": {"source": {"kind": "one"}}}}}, "'one' is none of model_token, zero"),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "model": "m"}}}}},
            "one of 'token' and 'token_id'",
        ),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "token": "m"}}}}},
            "'model' is missing",
        ),
        (
            {
                "tokenizer": {
                    "tokens": {"a": {"source": {"kind": "model_token", "model": "m", "token_id": -1}}}
                }
            },
            "must be the number of a token",
        ),
        ({"chat_template": "chatmll"}, "did you mean 'chatml'?"),
        ({"chat_template": "{{x}}"}, "is not a template"),
        ({"chat_template": ["a"]}, "must be a string"),
    ],
)
def test_mistakes_are_named(top: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan({"merge_method": "linear", "models": [{"model": "m"}], **top})
    assert message in str(caught.value)


@pytest.mark.parametrize("full", [True, False])
def test_tokens_that_only_one_file_lists_keep_their_numbers(full: bool, tmp_path: Path) -> None:
    """A loader that reads another file would number all that follows otherwise."""
    from transformers import AutoTokenizer

    base = write(tmp_path / "base", words("abcd"), n_rows=6)
    (base.path / "added_tokens.json").write_text('{"<q>": 4, "<r>": 5}')
    if not full:
        data = json.loads((base.path / "tokenizer.json").read_text())
        (base.path / "tokenizer.json").unlink()
        (base.path / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
        (base.path / "merges.txt").write_text("#version: 0.2\n")
        (base.path / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "GPT2Tokenizer", "unk_token": "a", "bos_token": "a", "eos_token": "a"}'
        )
    other = write(tmp_path / "other", words("abcd"), added={"<x>": 4}, seed=1)
    merge(linear([base, other], tokenizer_source="union"), tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {t: loaded.convert_tokens_to_ids(t) for t in ("<q>", "<r>", "<x>")} == {
        "<q>": 4,
        "<r>": 5,
        "<x>": 6,
    }


def test_a_token_without_text_is_passed_over(tmp_path: Path) -> None:
    base = write(tmp_path / "base", words("abcd"))
    other = write(tmp_path / "other", {"a": 0, "": 1, "x": 2}, seed=1)
    merge(linear([base, other], tokenizer_source="union"), tmp_path / "out")
    assert output_ids(tmp_path / "out") == {**words("abcd"), "x": 4}
    with pytest.raises(ConfigError, match="a token without text"):
        plan(linear([base], tokenizer={"tokens": {"": {"source": {"kind": "zero"}}}}))


def test_more_new_tokens_than_there_is_room_for_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [
        write(tmp_path / name, words(texts), seed=i)
        for i, (name, texts) in enumerate({"x": "abcd", "y": "efgh"}.items())
    ]
    monkeypatch.setattr("streammerge.planning.make.NEW_TOKEN_NBYTES", 1 << 28)
    with pytest.raises(
        BudgetError, match=r"adding 4 tokens to the tokenizer needs 1.0 GiB: give at least --memory"
    ):
        plan(linear(models, tokenizer_source="union"), memory="512MiB")
