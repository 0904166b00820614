"""A config of several documents: which is the output, in which order, and what is refused."""

from __future__ import annotations

import re

import pytest

from streammerge.config.reading import parse_config
from streammerge.errors import ConfigError

A = "name: a\nmerge_method: linear\nmodels: [m1, m2]\n"
B = "name: b\nmerge_method: linear\nmodels: [a, m3]\n"
OUT = "merge_method: linear\nmodels: [b, m4]\n"


def documents(*texts: str) -> str:
    return "---\n".join(texts)


@pytest.mark.parametrize(
    "texts", [(A, B, OUT), (OUT, A, B), (B, OUT, A), (A, B, f"name: last\n{OUT}"), (A, "", B, OUT)]
)
def test_the_order_of_the_documents_is_free(texts: tuple[str, ...]) -> None:
    config = parse_config(documents(*texts))
    assert [stage.name for stage in config.stages] == ["a", "b"]
    assert [spec.reference for spec in config.models] == ["b", "m4"]
    assert config.name is None


def test_a_name_stands_wherever_a_model_does() -> None:
    out = (
        "merge_method: ties\nbase_model: a\nmodels: [b+lora, m1]\n"
        "tokenizer: {source: c, tokens: {x: {source: d}}}\n"
    )
    named = [f"name: {name}\nmerge_method: linear\nmodels: [m1, m2]\n" for name in "abcd"]
    assert [stage.name for stage in parse_config(documents(*named, out)).stages] == list("abcd")


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ((A, A.replace("m1", "m9"), OUT), "two stages are called 'a': rename one"),
        ((OUT, OUT), "two documents have no `name:`: only the output goes without one; name the other"),
        (
            (A, B.replace("[a", "[x"), OUT),
            "'a' and the document without a name are not used by any stage, so there are 2 outputs",
        ),
        (
            (A.replace("m1", "b"), B, OUT),
            "stages form a cycle: ",
        ),
        ((A.replace("m1", "a"), OUT.replace("b", "a")), "form a cycle: a → a"),
        (
            ("name: [x]\nmerge_method: linear\nmodels: [m]\n", OUT),
            "document 1: name: must be a string, not a list",
        ),
        (
            ("name: x+y\nmerge_method: linear\nmodels: [m]\n", OUT),
            "'+' in 'x+y' (it divides model and adapter)",
        ),
        (("name: a\nmodels: [m]\n", OUT.replace("b", "a")), "(stage a): 'merge_method' is missing"),
        (("just text\n", OUT), "document 1: a config is a map of keys"),
        (tuple(A.replace("name: a", f"name: a{i}") for i in range(70)), "70 documents, at most 64"),
    ],
)
def test_what_has_no_one_meaning_is_refused_in_one_line(texts: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        parse_config(documents(*texts), "c.yml")
    assert str(caught.value).startswith("c.yml")
    assert "\n" not in str(caught.value)


def test_one_document_with_a_name_is_a_config_like_any_other() -> None:
    config = parse_config(A)
    assert not config.stages
    assert any("`name`" in note or "name:" in note for note in config.notes)
