"""The local Hugging Face cache: found as huggingface_hub finds it, and never left."""

from pathlib import Path

import pytest

from streammerge.checkpoint import open_model
from streammerge.checkpoint.hub import HubName, cache_directory, parse_name
from streammerge.errors import ModelError
from tests.formats.safetensors_files import write_model

OLD, NEW = "0a1b2c3d" * 5, "0a1bffff" * 5
SINGLE = {"model.safetensors": {"w": ("F32", (2,))}}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as `hf download` leaves it: two snapshots, files linked to blobs."""
    cache = tmp_path / "hub"
    repo = cache / "models--org--name"
    for commit in (OLD, NEW):
        snapshot = write_model(repo / "snapshots" / commit, SINGLE)
        blob = repo / "blobs" / f"blob-{commit}"
        blob.parent.mkdir(exist_ok=True)
        (snapshot / "model.safetensors").rename(blob)
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    for ref, commit in {"main": NEW, "v1": OLD, "refs/pr/7": OLD}.items():
        path = repo / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return cache


def refusal(reference, **options):
    with pytest.raises(ModelError) as caught:
        open_model(reference, **options)
    line = str(caught.value)
    assert line.isprintable()
    return line


@pytest.mark.parametrize(
    ("reference", "commit"),
    [
        ("org/name", NEW),  # main
        ("org/name@main", NEW),
        ("org/name@v1", OLD),
        ("org/name@refs/pr/7", OLD),
        (f"org/name@{OLD}", OLD),
        ("org/name@0a1b2", OLD),  # The beginning of a hash.
    ],
)
def test_a_cached_model_is_found_by_name_and_revision(cache, reference, commit):
    index = open_model(reference)
    assert index.directory == cache / "models--org--name" / "snapshots" / commit
    assert index.reference == reference
    assert set(index) == {"w"}


def test_a_model_without_an_organisation_is_found(cache):
    repo = cache / "models--gpt2"
    write_model(repo / "snapshots" / OLD, SINGLE)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(OLD + "\n")
    assert open_model("gpt2").directory == repo / "snapshots" / OLD


def test_a_local_directory_goes_before_the_cache(cache):
    write_model(Path("org/name"), {"model.safetensors": {"local": ("F32", (1,))}})
    assert set(open_model("org/name")) == {"local"}


def test_the_cache_may_be_given(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert set(open_model("org/name", cache=cache)) == {"w"}


def test_what_is_not_cached_is_refused_with_both_places_and_the_cure(cache):
    line = refusal("org/other")
    assert "org/other: no such directory, and no model of that name in the Hugging Face cache" in line
    assert str(cache) in line
    assert "`hf download org/other`" in line
    assert "`hf download org/other --revision v2`" in refusal("org/other@v2")


def test_a_revision_that_is_not_cached_is_refused_with_those_that_are(cache):
    line = refusal("org/name@v2")
    assert "revision 'v2' is not in this cache" in line
    assert OLD[:12] in line
    assert "`hf download org/name --revision v2`" in line
    assert "2 snapshots begin with '0a1b'" in refusal("org/name@0a1b")
    assert "is not in this cache" in refusal("org/name@0a1")  # Too short to mean a hash.


def test_a_cache_in_disorder_is_refused_by_name(cache):
    repo = cache / "models--org--name"
    for text in ("../../../secret", "", "a b", "x" * 5000, "é"):
        (repo / "refs" / "main").write_text(text)
        assert "refs/main: does not hold the hash of a snapshot" in refusal("org/name")
    (repo / "refs" / "main").write_text("f" * 40)
    assert "refs/main: its snapshot 'ffff" in refusal("org/name")
    (repo / "refs" / "main").unlink()
    assert "revision 'main' is not in this cache" in refusal("org/name")
    (cache / "models--org--bare").mkdir()
    assert "which has nothing" in refusal("org/bare")


def test_an_incomplete_snapshot_is_refused(cache):
    (cache / "models--org--name" / "blobs" / f"blob-{NEW}").unlink()
    assert "a symbolic link to a file that is missing: download" in refusal("org/name")


@pytest.mark.parametrize(
    "text",
    [
        "../name",
        "org/../name",
        "/org/name",
        "org/name/more",
        "org//name",
        "org/",
        "./name",
        "org/name@",
        "org/name@../x",
        "org/name@a/../b",
        "org/name@/x",
        "org/name@a//b",
        "org/na--me",
        "org/na..me",
        "-org/name",
        ".org/name",
        "org/name.",
        "org/n\0",
        "org/n\n",
        "orgé/name",
        "org\\name",
        "o" * 500,
        "",
        "a b",
        "org/name@v1@v2",
    ],
)
def test_a_text_that_could_lead_out_of_the_cache_is_no_name(text, cache):
    assert parse_name(text) is None
    refusal(text)


def test_names_as_the_hub_has_them_are_read():
    assert parse_name("meta-llama/Llama-3.1_8B") == HubName("meta-llama/Llama-3.1_8B", "main")
    assert parse_name("a/b@refs/pr/1") == HubName("a/b", "refs/pr/1")
    assert parse_name("x") == HubName("x", "main")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "/home/me/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({"HF_HOME": "/hf", "XDG_CACHE_HOME": "/xdg"}, "/hf/hub"),
        ({"HF_HOME": "~/hf"}, "/home/me/hf/hub"),
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/hf"}, "/c"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/hf"}, "/old"),
        ({"HF_HUB_CACHE": "", "HF_HOME": ""}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_environment_says(environment, expected, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "HOME": "/home/me"}.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(expected)
