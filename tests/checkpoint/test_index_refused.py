"""Indices and shards that are refused: hostile names, malformed tables, contradictions, links that lead nowhere."""

import os

import pytest

from tests.checkpoint.sharded import F32, MAP, SHARDS, A, B, refusal
from tests.formats.safetensors_files import framed, write_model


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no cache"))


# The index.

HOSTILE_SHARD_NAMES = [
    ("parent", "../secret.safetensors", "plain file name"),
    ("inner parent", "x/../../secret.safetensors", "plain file name"),
    ("subdirectory", "sub/x.safetensors", "plain file name"),
    ("absolute", "/etc/x.safetensors", "plain file name"),
    ("backslash", "..\\x.safetensors", "plain file name"),
    ("NUL", "x\0.safetensors", "plain file name"),
    ("empty", "", "plain file name"),
    ("dot", ".", "plain file name"),
    ("two dots", "..", "plain file name"),
    ("5000 characters", "x" * 5000 + ".safetensors", "plain file name"),
    ("a number", 1, "is not a string"),
    ("null", None, "is not a string"),
    ("a list", [A], "is not a string"),
    ("an object", {}, "is not a string"),
    ("a surrogate", "\ud800.safetensors", "surrogate"),
    ("another file of the model", "config.json", "not a .safetensors file"),
    ("a pickle", "pytorch_model.bin", "not a .safetensors file"),
    ("missing", "model-00003-of-00003.safetensors", "is missing: download"),
    ("escape", "\x1b[31m\n.safetensors", "is missing"),
]


@pytest.mark.parametrize(("shard", "message"), [pytest.param(*r[1:], id=r[0]) for r in HOSTILE_SHARD_NAMES])
def test_a_shard_that_is_no_file_of_the_directory_is_refused(tmp_path, shard, message):
    write_model(tmp_path, {"secret.safetensors": {"w.2": F32}})
    model = write_model(tmp_path / "m", SHARDS, {**MAP, "w.2": shard})
    (model / "config.json").write_text("{}")
    line = refusal(model)
    assert message in line
    assert "model.safetensors.index.json: " in line


HOSTILE_INDEX = [
    ("empty", b"", "not JSON"),
    ("truncated", b'{"weight_map": {"w.0"', "not JSON"),
    ("not an object", b"[]", "not a JSON object"),
    ("not UTF-8", b'{"weight_map":{"\xff":"x"}}', "not UTF-8"),
    ("no weight_map", b'{"metadata": {}}', "no weight_map"),
    ("weight_map is a list", b'{"weight_map": []}', "no weight_map"),
    ("weight_map is null", b'{"weight_map": null}', "no weight_map"),
    ("weight_map is empty", b'{"weight_map": {}}', "weight_map is empty"),
    ("a tensor twice", b'{"weight_map": {"w": "a", "w": "b"}}', "'w' twice"),
    ("two weight_maps", b'{"weight_map": {}, "weight_map": {}}', "'weight_map' twice"),
    ("deep", b'{"weight_map":' + b"[" * 200_000, "nested too deeply"),
    ("NaN", b'{"metadata": NaN}', "NaN"),
    ("1e999", b'{"metadata": 1e999}', "too large"),
    ("5000 digits", b'{"metadata": %s}' % (b"9" * 5000), "5000 digits"),
    ("a surrogate as a name", b'{"weight_map": {"\\udfff": "x"}}', "surrogate"),
    ("a million lists", b"[%s]" % (b"[]," * 3_000_000), "brackets"),
]


@pytest.mark.parametrize(("raw", "message"), [pytest.param(*r[1:], id=r[0]) for r in HOSTILE_INDEX])
def test_a_malformed_index_is_refused(tmp_path, raw, message):
    write_model(tmp_path, SHARDS)
    (tmp_path / "model.safetensors.index.json").write_bytes(raw)
    line = refusal(tmp_path)
    assert message in line
    assert "model.safetensors.index.json: " in line


def test_an_index_above_the_limit_is_refused_unread(tmp_path):
    write_model(tmp_path, SHARDS)
    (tmp_path / "model.safetensors.index.json").touch()
    os.truncate(tmp_path / "model.safetensors.index.json", 2**40)
    assert f"has {2**40} bytes" in refusal(tmp_path)


def test_an_index_that_is_a_pipe_a_directory_or_a_broken_link_is_refused(tmp_path):
    write_model(tmp_path, SHARDS)
    path = tmp_path / "model.safetensors.index.json"
    os.mkfifo(path)
    assert "a pipe" in refusal(tmp_path)
    path.unlink()
    path.mkdir()
    assert "a directory" in refusal(tmp_path)
    path.rmdir()
    path.symlink_to("nowhere")
    assert "a symbolic link to a file that is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({**MAP, "w.9": A}, f"tensor 'w.9' is not in its shard '{A}'"),
        ({**MAP, "w.2": A}, f"tensor 'w.2' is not in its shard '{A}'"),
        ({**MAP, "w.0": B}, f"tensor 'w.0' is not in its shard '{B}', but in '{A}'"),
        ({**MAP, "": A}, f"tensor '' is not in its shard '{A}'"),
        ({**MAP, "__metadata__": A}, "tensor '__metadata__' is not in its shard"),
    ],
)
def test_an_index_that_the_shards_contradict_is_refused(tmp_path, weight_map, message):
    line = refusal(write_model(tmp_path, SHARDS, weight_map))
    assert message in line
    assert "index.json: weight_map: " in line


def test_a_bad_shard_is_named(tmp_path):
    write_model(tmp_path, SHARDS, MAP)
    whole = (tmp_path / B).read_bytes()
    (tmp_path / B).write_bytes(whole[:-1])
    assert f"{B}: truncated" in refusal(tmp_path)
    (tmp_path / B).write_bytes(framed("{}", b""))
    assert f"{B}: holds no tensors" in refusal(tmp_path)
    (tmp_path / B).unlink()
    (tmp_path / B).mkdir()
    assert f"{B}: a directory" in refusal(tmp_path)
    (tmp_path / B).rmdir()
    (tmp_path / B).symlink_to("../../blobs/gone")
    assert f"{B}: a symbolic link to a file that is missing" in refusal(tmp_path)


# Directories and files that are not models.


def test_a_missing_directory_a_file_and_an_empty_directory_are_refused(tmp_path):
    assert "no such directory" in refusal(tmp_path / "none")
    assert "no such file" in refusal(tmp_path / "none.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    assert "neither a model directory nor" in refusal(tmp_path / "notes.txt")
    assert "no such directory" in refusal(tmp_path / "notes.txt" / "below")
    (tmp_path / "empty").mkdir()
    assert "no model here" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "nul\0", "\ud800", "x" * 5000, "a\nb", "\x1b[31m", "../.."])
def test_a_reference_that_can_be_no_model_is_refused_in_one_line(text, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert refusal(text)


def test_broken_and_looping_links_are_named_as_such(tmp_path):
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert "link to a file that is missing" in refusal(tmp_path / "broken")
    assert "leads back to itself" in refusal(tmp_path / "loop")
