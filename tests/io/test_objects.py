"""Models in object stores: what is asked of the store, and what is said when it cannot give it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

obstore = pytest.importorskip("obstore")

from streammerge.api import plan  # noqa: E402
from streammerge.checkpoint.index import open_model  # noqa: E402
from streammerge.cli.entry import cli  # noqa: E402
from streammerge.errors import InputError, ModelError, StreammergeError, WorldError  # noqa: E402
from streammerge.io import object_file, object_stores, volumes  # noqa: E402
from streammerge.io.object_errors import explained, is_passing  # noqa: E402
from streammerge.io.reader import Reader  # noqa: E402
from tests.conftest import config_for, write_models  # noqa: E402


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket in memory, ``s3://b``."""
    store = obstore.store.MemoryStore()
    monkeypatch.setattr(object_stores, "_STORES", {("s3", "b", patient): store for patient in (False, True)})
    volumes.forget("s3://b")
    yield store
    volumes.forget("s3://b")


def put_models(store: Any, tmp_path: Path, n: int = 1) -> list[Path]:
    paths = write_models(tmp_path / "models", n)
    for path in paths:
        for file in path.iterdir():
            obstore.put(store, f"models/{path.name}/{file.name}", file.read_bytes())
    return paths


def test_a_model_in_a_store_is_the_model_in_the_directory(bucket: Any, tmp_path: Path) -> None:
    (local, _) = put_models(bucket, tmp_path)
    here, there = open_model(local), open_model("s3://b/models/base/")
    assert {name: (ref.shape, ref.dtype) for name, ref in there.items()} == {
        name: (ref.shape, ref.dtype) for name, ref in here.items()
    }
    assert there.config == here.config
    assert str(there.directory) == "s3://b/models/base"
    one = open_model("s3://b/models/base/model.safetensors")
    assert list(one) == list(here)
    assert {stamp.path for stamp in one.stamps} == {"s3://b/models/base/model.safetensors"}


def test_every_range_is_that_of_the_file(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all of the reader's functions, in one request or several, through small chunks."""
    data = np.random.default_rng(0).integers(0, 256, 70_000, np.uint8)
    obstore.put(bucket, "x", data.tobytes())
    monkeypatch.setattr(object_file, "PIECE", 1000)
    monkeypatch.setattr(object_file, "_BATCH", 5)
    reader, rng = Reader(), np.random.default_rng(1)
    for _ in range(30):
        start, stop = sorted(rng.choice(data.size + 1, 2, replace=False).tolist())
        target = np.zeros(stop - start, np.uint8)
        reader.read_into("s3://b/x", start, target)
        assert np.array_equal(target, data[start:stop])
        slot = np.zeros(data.size + 8192, np.uint8)
        begins = reader.read_slot("s3://b/x", start, stop - start, slot)
        assert np.array_equal(slot[begins : begins + stop - start], data[start:stop])
    rows = [np.zeros(700, np.uint8) for _ in range(60)]
    reader.read_parts(
        "s3://b/x", ((i * 2100, [row.data for row in rows[3 * i : 3 * i + 3]]) for i in range(20))
    )
    assert np.array_equal(np.concatenate(rows), data[: 60 * 700])
    whole = np.zeros(data.size + 4096, np.uint8)
    assert reader.read_file("s3://b/x", whole) == data.size
    assert np.array_equal(whole[: data.size], data)
    reader.close()


def test_an_object_that_changed_fails_at_its_next_read(bucket: Any, tmp_path: Path) -> None:
    put_models(bucket, tmp_path)
    index = open_model("s3://b/models/base")
    ref = index["model.embed_tokens.weight"].plain
    assert ref is not None
    obstore.put(bucket, "models/base/model.safetensors", bytes(1 << 20))
    reader = Reader()
    with pytest.raises(WorldError, match=r"s3://b/models/base/model\.safetensors: an input changed"):
        reader.read_into(ref.path, ref.offset, np.zeros(100, np.uint8))
    obstore.delete(bucket, "models/base/model.safetensors")
    with pytest.raises(WorldError, match="is gone"):
        reader.read_into(ref.path, ref.offset, np.zeros(100, np.uint8))
    with pytest.raises(ModelError, match="no model here"):
        open_model("s3://b/models/base")  # looks anew


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("s3://user:hunter2@b/models", "a user, a password or a query"),
        ("s3://b/models?X-Amz-Signature=hunter2", "a user, a password or a query"),
        ("s3://b/models+s3://user:hunter2@b/adapter", "a user, a password or a query"),
        ("https://host/hunter2", "https://…: models are read from"),
        ("hf://org/hunter2", "hf://…: models are read from"),
        ("s3:///models", "names no bucket"),
        ("s3://b/nothing", "nothing lies there"),
        ("s3://b/nothing.safetensors", "nothing lies there"),
        ("s3://b/a//b", "nothing lies there"),
    ],
)
def test_a_url_that_names_no_model_is_refused_without_its_secrets(bucket: Any, url: str, what: str) -> None:
    with pytest.raises(ModelError, match=what) as caught:
        open_model(url)
    assert "hunter2" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_without_obstore_the_cure_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_stores, "find_spec", lambda name: None)
    monkeypatch.setattr(object_stores, "_STORES", {})
    with pytest.raises(InputError, match=r"pip install 'streammerge\[objects\]'"):
        open_model("s3://elsewhere/model")


@pytest.mark.parametrize(
    ("endpoint", "what"),
    [
        ("http://example.org:9000", "plain HTTP to example.org.*--insecure-endpoint"),
        ("http://127.0.0.1.example.org", "plain HTTP"),
        ("https://user:hunter2@example.org", "not an address"),
        ("ftp://example.org", "not an address"),
        ("example.org", "not an address"),
    ],
)
def test_an_endpoint_that_is_not_safe_is_refused(
    endpoint: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_stores, "_STORES", {})
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(InputError, match=what) as caught:
        object_stores.store_of("s3://c/model")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "https://example.org"]
)
def test_plain_http_is_for_this_machine_or_on_request(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_stores, "_STORES", {})
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert object_stores.store_of("s3://c/a/b")[1] == "a/b"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://example.org")
    monkeypatch.setenv(object_stores.INSECURE, "1")
    object_stores.close_stores()
    assert object_stores.store_of("s3://c/a/b")[1] == "a/b"


def _answer(status: int, code: str = "") -> Exception:
    return RuntimeError(
        f"Server returned non-2xx status code: {status} X: <Error><Code>{code}</Code></Error>"
    )


@pytest.mark.parametrize(
    ("error", "kind", "what"),
    [
        (_answer(404, "NoSuchBucket"), ModelError, "there is no bucket b"),
        (_answer(404, "NoSuchKey"), FileNotFoundError, "No such file"),
        (_answer(403, "InvalidAccessKeyId"), ModelError, r"denied \(403 InvalidAccessKeyId\)"),
        (_answer(401), ModelError, "AWS_ACCESS_KEY_ID"),
        (_answer(412), WorldError, "changed during the merge"),
        (_answer(301, "PermanentRedirect"), ModelError, "AWS_REGION"),
        (_answer(503, "SlowDown"), WorldError, "asked for more than it gives"),
        (_answer(429), WorldError, "asked for more than it gives"),
        (_answer(500, "InternalError"), WorldError, "the store failed"),
        (RuntimeError("HTTP error: operation timed out"), WorldError, "did not answer in time"),
        (RuntimeError("HTTP error: error sending request"), WorldError, "cannot be reached"),
        (RuntimeError("http://169.254.169.254/latest"), ModelError, "there are no credentials"),
        (RuntimeError("secret=hunter2"), WorldError, "the store gave an error"),
    ],
)
def test_what_a_store_answers_is_one_line_with_a_cure(error: Exception, kind: type, what: str) -> None:
    found = explained("s3://b/key", error)
    assert type(found) is kind
    assert "s3://b/key" in str(found)
    with pytest.raises(kind, match=what):
        raise found
    if isinstance(found, StreammergeError):
        assert ": " in str(found)
        assert "hunter2" not in str(found)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (_answer(503, "SlowDown"), True),
        (_answer(500), True),
        (_answer(429), True),
        (_answer(412), False),
        (_answer(403), False),
        (obstore.exceptions.GenericError("HTTP error: error sending request"), True),
        (obstore.exceptions.PreconditionError("changed"), False),
        (obstore.exceptions.NotFoundError("gone"), False),
    ],
)
def test_only_what_may_pass_is_asked_again(error: Exception, passes: bool) -> None:
    assert is_passing(error) is passes


def test_a_store_without_etags_is_refused(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    obstore.put(bucket, "m/model.safetensors", b"x")
    real: Callable[..., Any] = obstore.head
    monkeypatch.setattr(obstore, "head", lambda *args: {**real(*args), "e_tag": None})
    with pytest.raises(ModelError, match="gives no ETag"):
        open_model("s3://b/m/model.safetensors")


def test_the_number_of_connections_is_checked_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    some = object_file.requests_nbytes()
    monkeypatch.setenv(object_file.CONNECTIONS, "64")
    assert object_file.requests_nbytes() == some + 48 * (3 << 20)
    for wrong in ("0", "257", "-1", "many", "1e3"):
        monkeypatch.setenv(object_file.CONNECTIONS, wrong)
        with pytest.raises(InputError, match="whole number from 1 to 256"):
            object_file.connections()


def test_a_store_counts_in_the_memory_of_a_plan(bucket: Any, tmp_path: Path) -> None:
    paths = put_models(bucket, tmp_path, 2)
    local = config_for("linear", paths)
    there = {**local, "models": [{"model": f"s3://b/models/m{i}"} for i in (1, 2)]}
    here, far, out = plan(local), plan(there), plan(local, out="s3://b/out")
    assert far.budget.reserve - here.budget.reserve == object_file.requests_nbytes()
    assert out.budget.reserve > here.budget.reserve + (50 << 20)
    assert out.streamed


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["sweep", "CONFIG", "s3://b/out"], "a sweep"),
        (["merge", "CONFIG", "s3://b/model", "--report", "s3://b/out"], "a page"),
        (["fisher", "import", "model", "diagonal.safetensors", "--out", "s3://b/out"], "a store"),
        (["fisher", "compute", "model", "--data", "data.jsonl", "--out", "s3://b/out"], "a store"),
        (["gram", "compute", "model", "--data", "data.jsonl", "--out", "s3://b/out"], "a store"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_written_to_a_disk_only_says_so_before_anything_is_asked(
    command: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yml"
    config.write_text("merge_method: linear\nmodels: [a, b]\nparameters: {weight: 0.5}\n")
    if command[0] == "sweep":
        config.write_text(config.read_text() + "sweep: {weight: [0.3, 0.5]}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        cli.main([str(config) if word == "CONFIG" else word for word in command], standalone_mode=False)
    assert str(caught.value) == f"s3://b/out: {what} is written to a disk only: name a directory or a file"
    assert caught.value.exit_code == 2
