"""A model of two shards."""

import pytest

from streammerge.checkpoint import open_model
from streammerge.errors import ModelError
from tests.formats.safetensors_files import within

F32 = ("F32", (2,))


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


SHARDS = {A: {"w.1": F32, "w.0": F32}, B: {"w.2": F32}}


MAP = {"w.0": A, "w.1": A, "w.2": B}


def refusal(reference, **options):
    with within(20), pytest.raises(ModelError) as caught:
        open_model(reference, **options)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1000
    return line


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no cache"))
