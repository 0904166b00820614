"""What a store may answer over HTTP, from a small server that is told what to do: too much asked, cut, changed, denied."""

from __future__ import annotations

import base64
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("obstore")

from streammerge.api import merge
from streammerge.checkpoint.index import open_model
from streammerge.errors import ModelError, Stopped, StreammergeError, WorldError
from streammerge.events import Event
from streammerge.io import (
    object_file,
    object_leftovers,
    object_stores,
    object_upload,
    object_waiting,
    volumes,
)
from streammerge.io.object_errors import CREDENTIALS
from streammerge.io.object_file import ObjectFile
from streammerge.io.objects import ObjectStatus

DATA = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
SECRET = "hunter2hunter2"
Handler = http.server.BaseHTTPRequestHandler


def whole(request: Handler) -> None:
    """Answer the range that is asked for."""
    first, last = request.headers["Range"].removeprefix("bytes=").split("-")
    part = DATA[int(first) : int(last) + 1]
    begin(request, int(first), len(part))
    request.wfile.write(part)


def begin(request: Handler, first: int, nbytes: int) -> None:
    request.send_response_only(206)
    request.send_header("Content-Length", str(nbytes))
    request.send_header("Content-Range", f"bytes {first}-{first + nbytes - 1}/{len(DATA)}")
    request.send_header("ETag", '"1"')
    request.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
    request.end_headers()


def cut(request: Handler) -> None:
    """Answer a part of the range, and end the connection."""
    first, last = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
    begin(request, first, last + 1 - first)
    request.wfile.write(DATA[first : first + 70_000])
    request.wfile.flush()
    request.connection.shutdown(socket.SHUT_RDWR)
    request.close_connection = True


def refused(status: int, code: str) -> Callable[[Handler], None]:
    """Return what answers with an error, and with secrets in its text."""

    def answer(request: Handler) -> None:
        body = f"<Error><Code>{code}</Code><Message>key {SECRET}</Message></Error>".encode()
        request.send_response_only(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer


@contextmanager
def answering(*answers: Callable[[Handler], None], port: int = 0) -> Iterator[tuple[str, list[Any]]]:
    """Serve answers in turn, the last one for ever; yield the endpoint, and the headers of each request."""
    asked: list[Any] = []

    class Server(Handler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            asked.append(self.headers)
            answers[min(len(asked), len(answers)) - 1](self)

        do_GET = do_HEAD = do_DELETE = answer  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        object_stores.close_stores()


def leads(scheme: str, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set the variables that a user sets for a store."""
    key = base64.b64encode(SECRET.encode()).decode()
    account = tmp_path / "account.json"
    told = {"gcs_base_url": endpoint, "disable_oauth": True, "client_email": "", "private_key": SECRET}
    account.write_text(json.dumps({**told, "private_key_id": ""}))
    variables = {
        "s3": {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "A",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        },
        "az": {
            "AZURE_STORAGE_ENDPOINT": f"{endpoint}/account",
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_STORAGE_ACCOUNT_KEY": key,
        },
        "gs": {"GOOGLE_SERVICE_ACCOUNT": str(account), "GOOGLE_BASE_URL": endpoint},
    }
    for name, value in variables[scheme].items():
        monkeypatch.setenv(name, value)
    object_stores.close_stores()


def read(nbytes: int = len(DATA)) -> bytes:
    target = np.zeros(nbytes, np.uint8)
    ObjectFile("s3://b/x", ObjectStatus(len(DATA), '"1"')).read(0, target)
    return target.tobytes()


@pytest.mark.parametrize(
    "first",
    [refused(429, "TooManyRequests"), refused(503, "SlowDown"), refused(500, "InternalError"), cut],
    ids=["429", "503", "500", "cut"],
)
def test_what_passes_is_asked_again_from_where_it_stopped(
    first: Callable[[Handler], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(object_stores, "QUICK", {"max_retries": 0})
    monkeypatch.setattr(object_waiting, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(object_file, "_CHUNK", 10_000)
    with answering(first, first, whole) as (endpoint, asked):
        leads("s3", endpoint, monkeypatch, tmp_path)
        assert read() == DATA
    assert len(asked) == 3
    assert {headers["If-Match"] for headers in asked} == {'"1"'}
    starts = [int(headers["Range"].removeprefix("bytes=").split("-")[0]) for headers in asked]
    assert starts == sorted(starts)
    assert (starts[-1] > 0) == (first is cut)


@pytest.mark.parametrize(
    ("answer", "kind", "what"),
    [
        (refused(412, "PreconditionFailed"), WorldError, "an input changed during the merge"),
        (refused(404, "NoSuchKey"), WorldError, "an input is gone"),
        (refused(403, "AccessDenied"), WorldError, "access is denied"),
    ],
    ids=["changed", "gone", "denied"],
)
def test_what_does_not_pass_ends_a_merge_at_once(
    answer: Callable[[Handler], None],
    kind: type[StreammergeError],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(object_stores, "QUICK", {"max_retries": 0})
    with answering(answer) as (endpoint, asked):
        leads("s3", endpoint, monkeypatch, tmp_path)
        with pytest.raises(kind, match=what) as caught:
            read()
    assert len(asked) == 1
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_no_key_is_in_a_message_of_any_store(
    scheme: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with answering(refused(403, "AccessDenied")) as (endpoint, asked):
        leads(scheme, endpoint, monkeypatch, tmp_path)
        with pytest.raises(ModelError, match="access is denied") as caught:
            open_model(f"{scheme}://b/model")
    assert asked
    said = str(caught.value)
    assert SECRET not in said
    assert base64.b64encode(SECRET.encode()).decode() not in said
    assert "127.0.0.1" not in said
    assert CREDENTIALS[scheme].split(",")[0] in said


def test_parts_that_cannot_be_listed_are_left_and_no_redirect_is_followed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def elsewhere(request: Handler) -> None:
        request.send_response_only(307)
        request.send_header("Location", "/elsewhere")
        request.send_header("Content-Length", "0")
        request.end_headers()

    for answer in (refused(403, "AccessDenied"), elsewhere):
        with answering(answer) as (endpoint, asked):
            leads("s3", endpoint, monkeypatch, tmp_path)
            assert object_leftovers.abort_uploads("s3://b/out", {"model.safetensors"}) == 0
        assert len(asked) == 1
        assert SECRET not in str(asked[0])


def found(request: Handler) -> None:
    """Answer what an object is like."""
    begin(request, 0, len(DATA))


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[int]:
    """Return a port that refuses connections, and is that of the store."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port: int = some.getsockname()[1]
    monkeypatch.setattr(object_stores, "QUICK", {"max_retries": 0})
    monkeypatch.setattr(object_waiting, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(object_waiting, "_TOLD", {})
    monkeypatch.setattr(object_waiting, "_IN_VAIN", {})
    leads("s3", f"http://127.0.0.1:{port}", monkeypatch, tmp_path)
    yield port
    object_stores.close_stores()


def test_a_store_that_is_away_while_a_process_plans_is_waited_for_and_the_user_is_told_once(
    away: int,
) -> None:
    said: list[str] = []
    with ExitStack() as later:

        def tell(line: str) -> None:
            said.append(line)
            later.enter_context(answering(found, port=away))

        with object_waiting.listening(tell, lambda: None):
            assert volumes.stat("s3://b/x/y").st_size == len(DATA)
            volumes.forget("s3://b/x")
    assert said == [
        "s3://b/x/y: the store cannot be reached: check the network and the endpoint (AWS_ENDPOINT_URL); it is asked again "
        "for 3 minutes at most"
    ]


def test_a_store_that_stays_away_is_told_once_and_ends_the_command_as_a_failure_of_the_world(
    away: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(object_waiting, "PATIENCE", 0.1)
    said: list[Event] = []
    config = {"merge_method": "linear", "models": [{"model": "s3://b/one"}, {"model": "s3://b/two"}]}
    with pytest.raises(
        WorldError, match=r"s3://b/one.*cannot be reached.*run the same command again"
    ) as caught:
        merge(config, tmp_path / "out", on_event=said.append)
    assert caught.value.exit_code == 1
    assert [event.kind for event in said] == ["warning"]
    assert not (tmp_path / "out").exists()


def test_a_wait_ends_when_the_user_stops_the_command(away: int, tmp_path: Path) -> None:
    stop = threading.Event()
    config = {"merge_method": "linear", "models": [{"model": "s3://b/one"}, {"model": "s3://b/two"}]}
    with pytest.raises(Stopped):
        merge(config, tmp_path / "out", on_event=lambda event: stop.set(), stop=stop)


class Dying:
    """A library whose store dies a few times after some parts of an upload were taken."""

    def __init__(self, deaths: int, parts: int, there: dict[str, Any] | None = None) -> None:
        self.deaths, self.parts, self.there = deaths, parts, there
        self.sent: list[bytes] = []

    def head(self, store: Any, key: str) -> dict[str, Any]:
        """Answer as a store that is there again, after it was away once more."""
        if self.parts:
            self.parts = 0
            raise type("GenericError", (Exception,), {})("error sending request")
        if self.there is None:
            raise FileNotFoundError(key)
        return self.there

    def put(self, store: Any, key: str, parts: Iterator[bytes], **options: Any) -> dict[str, str]:
        self.sent = [
            part for _, part in zip(range(self.parts if self.deaths else 10**6), parts, strict=False)
        ]
        self.deaths -= 1
        if self.deaths >= 0:
            raise type("GenericError", (Exception,), {})("error sending request")
        return {"e_tag": '"1"'}


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Dying, Callable[..., str]]]:
    """Return a function that makes a library, and one that uploads ten bytes in parts of four with it."""
    monkeypatch.setattr(object_upload, "store_of", lambda url, patient=False: (None, "x"))
    monkeypatch.setattr(object_waiting, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(object_waiting, "_TOLD", {})
    monkeypatch.setattr(object_waiting, "_IN_VAIN", {})
    monkeypatch.setattr(object_upload, "PART", 4)

    def make(*how: Any) -> tuple[Dying, Callable[..., str]]:
        library = Dying(*how)
        monkeypatch.setattr(object_upload, "library", lambda scheme: library)

        def send(**more: Any) -> str:
            upload = object_upload.Upload("s3://b/x", 10, threading.Event(), **more)
            upload.write(b"0123456789")
            return upload.finish()

        return library, send

    return make


@pytest.mark.parametrize("parts", [0, 1])
def test_an_upload_that_fails_as_it_begins_is_begun_again(parts: int, dying: Any) -> None:
    library, send = dying(2, parts)
    assert send() == '"1"'
    assert library.sent == [b"0123", b"4567", b"89"]


@pytest.mark.parametrize(
    ("there", "was", "parts"),
    [
        (None, "", 9),
        ({"size": 10, "e_tag": '"0"'}, '"0"', 9),
        ({"size": 10, "e_tag": '"2"'}, None, 9),
        ({"size": 9, "e_tag": '"2"'}, "", 9),
        ({"size": 10, "e_tag": '"2"'}, "", 2),
    ],
    ids=[
        "none is there",
        "the one of before",
        "perhaps that of before",
        "a different one",
        "not the end yet",
    ],
)
def test_an_upload_that_breaks_off_is_waited_for_and_its_parts_are_freed(
    there: dict[str, Any] | None, was: str | None, parts: int, dying: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are gone, and the merge does the shard again."""
    _, send = dying(1, parts, there)
    said, freed = list[str](), list[Any]()
    monkeypatch.setattr(object_leftovers, "abort_uploads", lambda *what: freed.append(what))
    with pytest.raises(object_upload.UploadLostError, match="cannot be reached"):
        send(tell=said.append, was=was)
    assert freed == [("s3://b", {"x"})]
    assert said == [
        "s3://b/x: the store cannot be reached: check the network and the endpoint (AWS_ENDPOINT_URL); it is asked again "
        "for 3 minutes at most"
    ]


def test_an_upload_that_ended_though_its_answer_was_lost_is_not_done_again(dying: Any) -> None:
    _, send = dying(1, 9, {"size": 10, "e_tag": '"2"'})
    assert send(was='"0"') == '"2"'


def test_a_store_that_stays_away_ends_an_upload_as_a_failure_of_the_world(
    dying: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, send = dying(1, 9)
    monkeypatch.setattr(library, "head", lambda store, key: library.put(store, key, iter(())))
    library.deaths = 10**6
    monkeypatch.setattr(object_waiting, "PATIENCE", 0.1)
    with pytest.raises(WorldError, match="cannot be reached") as caught:
        send()
    assert type(caught.value) is WorldError
    assert object_waiting._IN_VAIN  # what tidies up waits no more
    assert not object_waiting.Patience("s3://b/y").wait(type("GenericError", (Exception,), {})("error"))
