"""Lines become examples, and a bad line is named by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streammerge.errors import ModelError
from streammerge.estimate.network.examples import Reading, digest, read_examples, too_few


def reading(**changes: Any) -> Reading:
    def tokenizer() -> Any:
        return lambda text: [len(word) for word in text.split()]

    how = {"max_length": 4, "min_length": 2, "vocabulary": 10, "tokenize": tokenizer, "labels": None}
    return Reading(**{**how, **changes})


def test_examples_come_shortest_first_and_keep_their_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input_ids": [1, 2, 3]}\n\n{"text": "a bc"}\n{"input_ids": [9, 8, 7, 6, 5]}\n')
    found = read_examples(str(path), None, reading())
    assert [(e.number, e.ids.tolist()) for e in found] == [(1, [1, 2]), (0, [1, 2, 3]), (2, [9, 8, 7, 6])]
    assert [e.number for e in read_examples(str(path), 1, reading())] == [0]


def test_labels_are_numbers_or_names(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input_ids": [1, 2], "label": "no"}\n{"input_ids": [1, 2], "label": 0}\n')
    found = read_examples(str(path), None, reading(labels={"yes": 0, "no": 1}))
    assert [e.label for e in found] == [1, 0]


BAD = {
    "line 2 is not JSON": "{",
    "line 2 is not a JSON object": "[]",
    "line 2 has neither text": '{"txt": "a b"}',
    "line 2 has neither": '{"text": 5}',
    "line 2 its input_ids are not": '{"input_ids": [1, 10]}',
    "ids from 0 to 9": '{"input_ids": [true, 1]}',
    "line 2 has 1 tokens, but an example needs at least 2": '{"input_ids": [1]}',
    "the tokenizer returns id 11": '{"text": "a elevenchars"}',
    "its label None is not a number from 0 to 1": '{"input_ids": [1, 2]}',
    "its label 2 is not": '{"input_ids": [1, 2], "label": 2}',
    "or one of yes, no": '{"input_ids": [1, 2], "label": "maybe"}',
    "line 2 is not UTF-8": '{"text": "\udcff"}',
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_line_is_named_by_its_number(message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        f'{{"input_ids": [1, 2], "label": 0}}\n{BAD[message]}\n'.encode(errors="surrogateescape")
    )
    with pytest.raises(ModelError, match=message):
        read_examples(str(path), None, reading(labels={"yes": 0, "no": 1}))


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n \n")
    with pytest.raises(ModelError, match="contains no example"):
        read_examples(str(path), None, reading())


def test_the_digest_is_of_the_tokens_not_of_the_file(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    paths[0].write_text('{"input_ids": [1, 2]}\n{"input_ids": [3, 4]}\n')
    paths[1].write_text('{"text": "a bb"}\n' + json.dumps({"input_ids": [3, 4], "note": 1}) + "\n\n")
    paths[2].write_text('{"input_ids": [3, 4]}\n{"input_ids": [1, 2]}\n')
    found = [digest(read_examples(str(path), None, reading())) for path in paths]
    assert found[0] == found[1] != found[2]


def test_fewer_examples_than_were_asked_for_are_told() -> None:
    assert too_few("math.jsonl", 512, 3) == "math.jsonl: has 3 examples, 512 were asked for: all 3 are used"
    assert too_few("math.jsonl", 3, 3) is None
    assert too_few("math.jsonl", None, 3) is None
