"""Merge from and to a store of each kind, by processes of which one is killed, and compare with a directory.

    python tools/prove/stores.py s3 [WEED]
    python tools/prove/stores.py az AZURITE-BLOB      (npm install azurite)
    python tools/prove/stores.py gs                   (Google's XML API in front of SeaweedFS; see google_xml_api.py)

Starts the server, puts models there, and then: a merge from the store, one into it, one from and to it by three processes of
which one is killed with `kill -9`, `status`, `verify --join`, an object that changes on the way, a name that is taken, wrong
keys. Every output must have the bytes, the index and the manifest of a merge between directories; nothing may be left, and
no key may be in any message.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import obstore

from streammerge.api import merge
from streammerge.backends.cpu.compile import ensure_compiled
from streammerge.io.object_small import create_object, list_objects, read_small
from streammerge.io.object_stores import close_stores, store_of
from streammerge.testing.models import config_for, output_bytes, write_models
from tests.s3_server import KEY, SECRET, Server, free_ports
from tools.prove.google_xml_api import serving

SHAPES = {f"model.layers.{i}.weight": (1000, 2000) for i in range(8)}
SHARD = 20_000_000
"""Bytes: with parts of 8 MiB a shard is uploaded in several."""
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key of the emulator's account, which its documentation prints."""

Started = tuple[str, Mapping[str, str], str]
"""A URL to work below, the environment that leads there, and a secret."""
SERVERS: dict[str, Callable[[Path, str], Any]] = {}


def serves(scheme: str) -> Callable[[Callable[[Path, str], Iterator[Started]]], Any]:
    """Register the server of a scheme."""

    def register(function: Callable[[Path, str], Iterator[Started]]) -> Any:
        SERVERS[scheme] = contextmanager(function)
        return function

    return register


@serves("s3")
def seaweed(place: Path, program: str) -> Iterator[Started]:
    """Start SeaweedFS."""
    server = Server(place)
    server.start()
    try:
        yield "s3://bench", server.environment(), SECRET
    finally:
        server.kill()
    assert KEY


@serves("az")
def azurite(place: Path, program: str) -> Iterator[Started]:
    """Start Azurite."""
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}/devstoreaccount1"
    environment = {
        "AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1",
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        "AZURE_STORAGE_ENDPOINT": endpoint,
    }
    with _running(
        [program, "--blobPort", str(port), "--location", str(place), "--silent", "--skipApiVersionCheck"],
        place,
    ):
        _until(lambda: _azure_container(endpoint, "bench"))
        yield "az://bench", environment, AZURE_KEY


@serves("gs")
def google(place: Path, program: str) -> Iterator[Started]:
    """Start Google's XML API in front of SeaweedFS."""
    server, account = Server(place), place / "account.json"
    server.start()
    with serving(server.endpoint.removeprefix("http://"), KEY, SECRET) as endpoint:
        told = {"gcs_base_url": endpoint, "disable_oauth": True, "client_email": "", "private_key": ""}
        account.write_text(json.dumps({**told, "private_key_id": ""}))
        try:
            yield "gs://bench", {"GOOGLE_SERVICE_ACCOUNT": str(account), "GOOGLE_BASE_URL": endpoint}, SECRET
        finally:
            server.kill()


def _azure_container(endpoint: str, name: str) -> None:
    """Create a container with a signed request."""
    import base64
    import hashlib
    import hmac
    from email.utils import formatdate

    date, account = formatdate(usegmt=True), "devstoreaccount1"
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
    resource = f"/{account}/{account}/{name}\nrestype:container"
    to_sign = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-08-06\n" + resource
    digest = hmac.digest(base64.b64decode(AZURE_KEY), to_sign.encode(), "sha256")
    headers["Authorization"] = f"SharedKey {account}:{base64.b64encode(digest).decode()}"
    assert hashlib
    url = f"{endpoint}/{name}?restype=container"
    _send(
        urllib.request.Request(url, b"", {**headers, "Content-Length": "0", "Content-Type": ""}, method="PUT")
    )


@contextmanager
def _running(command: list[str], place: Path) -> Iterator[None]:
    with (place / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=place)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def _send(request: urllib.request.Request) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(request, timeout=5).read()


def _until(action: Callable[[], None], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            action()
            return
        except Exception:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


class Proof:
    """The checks of one store."""

    def __init__(self, url: str, work: Path, secret: str) -> None:
        self.url, self.work, self.secret = url, work, secret
        self.done: dict[str, Any] = {}

    def contents(self, name: str) -> dict[str, bytes | None]:
        """Return the objects below a folder."""
        place = f"{self.url}/{name}"
        return {key: read_small(f"{place}/{key}") for key in list_objects(place, 10_000)}

    def start(self, config: Path, name: str, *more: str) -> subprocess.Popen[str]:
        """Start a merge into the store."""
        command = [sys.executable, "-m", "streammerge", "merge", str(config), f"{self.url}/{name}"]
        command += ["--memory", "600MiB", "--threads", "1", "--shard-size", str(SHARD), *more]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ended(self, process: subprocess.Popen[str], *codes: int) -> str:
        """Wait for a process; return what it said."""
        said, _ = process.communicate(timeout=200)
        assert process.returncode in codes, (process.returncode, said[-1500:])
        assert self.secret not in said
        return said

    def run(self, *arguments: str) -> str:
        """Run a command that must succeed."""
        command = [sys.executable, "-m", "streammerge", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return self.ended(process, 0)

    def check(self, models: list[Path]) -> None:
        """Do all."""
        local = config_for("ties", models, parameters={"density": 0.4, "trim_scope": "model"})
        text = json.dumps(local, default=str)
        there = text.replace(str(self.work), f"{self.url}/in")
        alone = self.work / "alone"
        (self.work / "here.json").write_text(text)
        merge(self.work / "here.json", alone, shard_size=SHARD, threads=1, progress=False)
        expected = output_bytes(alone)
        store, _ = store_of(self.url)
        for model in models:
            for path in model.iterdir():
                obstore.put(store, f"in/{model.name}/{path.name}", path.read_bytes(), use_multipart=False)
        config = self.work / "there.json"
        config.write_text(there)

        merge(json.loads(there), self.work / "from", shard_size=SHARD, threads=1, progress=False)
        weights = [name for name in expected if name.endswith((".safetensors", ".index.json"))]
        found = output_bytes(self.work / "from")
        assert all(found[name] == expected[name] for name in weights)
        self.done["from it"] = "equal"

        self.ended(self.start(self.work / "here.json", "into"), 0)
        assert self.contents("into") == expected
        self.done["into it"] = "equal"

        running = [self.start(config, "shared", "--join") for _ in range(3)]
        until = time.monotonic() + 100
        while not any(name.endswith(".safetensors") for name in list_objects(f"{self.url}/shared", 100)):
            assert time.monotonic() < until
            time.sleep(0.05)
        running[0].kill()
        said = self.run("status", f"{self.url}/shared")
        for process in running:
            self.ended(process, 0, -signal.SIGKILL)
        shared = self.contents("shared")
        assert sorted(shared) == sorted(expected), sorted(shared)
        assert all(shared[name] == expected[name] for name in weights)
        self.done["shared, one killed"] = f"equal; {said.strip().splitlines()[0]}"
        assert "all as written" in (verdict := self.run("verify", f"{self.url}/shared", "--join")), verdict
        self.done["verify --join"] = "sound"

        assert create_object(f"{self.url}/taken", b"1")
        self.done["a name that is taken"] = (
            "refused" if not create_object(f"{self.url}/taken", b"2") else "not seen"
        )
        self._changed(there, models)

    def _changed(self, text: str, models: list[Path]) -> None:
        from streammerge.errors import WorldError
        from streammerge.io.object_file import ObjectFile

        store, _ = store_of(self.url)
        real = ObjectFile.read

        def read(own: ObjectFile, offset: int, target: Any) -> None:
            ObjectFile.read = real  # type: ignore[method-assign]
            other = (models[0] / "model.safetensors").read_bytes()
            for model in models:
                obstore.put(store, f"in/{model.name}/model.safetensors", other, use_multipart=False)
            real(own, offset, target)

        ObjectFile.read = read  # type: ignore[method-assign]
        said = "nothing"
        try:
            merge(json.loads(text), self.work / "changed", progress=False)
        except WorldError as error:
            said = str(error)
        assert "changed during the merge" in said, said
        self.done["an object that changes"] = "refused at the next read"


def main() -> None:
    """Run the proof and print what was seen as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scheme", choices=sorted(SERVERS))
    parser.add_argument("program", nargs="?", default="")
    args = parser.parse_args()
    ensure_compiled()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        (work / "server").mkdir()
        models = write_models(work, 2, shapes=SHAPES)
        with SERVERS[args.scheme](work / "server", args.program) as (url, environment, secret):
            os.environ.update(environment)
            close_stores()
            proof = Proof(url, work, secret)
            try:
                proof.check(models)
                peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
                proof.done["highest peak of a merge, MiB of 600"] = peak
            finally:
                print(json.dumps({**proof.done, "seconds": round(time.monotonic() - began, 1)}, indent=1))


if __name__ == "__main__":
    main()
