"""Files of JSON beside a model: strict where it matters, lenient where Python's own writer is."""

import math

import pytest

from streammerge.errors import ModelError
from streammerge.io.strict_json import read_object


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "config.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_what_transformers_writes_is_read(write):
    # Mamba's configs have Infinity; tokenizers write 31 digits for "no limit".
    path = write('{"limit": [0.0, Infinity], "model_max_length": 1000000000000000019884624838656}')
    found = read_object(path)
    assert found == {"limit": [0.0, math.inf], "model_max_length": 1000000000000000019884624838656}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' twice"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": %s}' % ("1" * 5000), "5000 digits"),
        (b"\xff", "not UTF-8"),
        ("\ufeff{}", "not JSON"),
    ],
)
def test_what_is_ambiguous_or_endless_is_refused(write, text, message):
    path = write(text)
    with pytest.raises(ModelError, match=message) as caught:
        read_object(path)
    assert str(caught.value).startswith(f"{path}: the file ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}'])
def test_numbers_must_be_finite_where_that_is_asked_for(write, text):
    with pytest.raises(ModelError):
        read_object(write(text), "finite")
    assert read_object(write('{"a": -1.5}'), "finite") == {"a": -1.5}


def test_a_pair_of_escapes_is_one_character_and_no_surrogate(write):
    assert read_object(write('{"\\ud83d\\ude00": "\\ud83d\\ude00"}')) == {"😀": "😀"}
