"""A headless Chromium, driven over a pipe by the DevTools protocol: no port, no server, no package.

What a page does is recorded: requests, messages on the console, exceptions, violations of its policy.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)
_SECONDS = 60.0


def program() -> str | None:
    """Return the path of a Chromium, or None."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


@dataclass
class Seen:
    """What a page did while it was open."""

    requests: list[str] = field(default_factory=list)
    """The addresses that it asked for, also those that its policy blocked."""
    complaints: list[str] = field(default_factory=list)
    """Messages on the console, exceptions, and entries of the browser's log."""


class Browser:
    """A running browser with one page."""

    def __init__(self, to: int, answers: int) -> None:
        self._to, self._answers = to, answers
        self._buffer = b""
        self._last = 0
        self._session = ""
        self._seen = Seen()
        self._loaded = False
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1000, height: int = 900, dark: bool = False) -> Seen:
        """Open a file, with a window so wide, and return what it does; later events are added."""
        self._seen, self._loaded = Seen(), False
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=path.resolve().as_uri())
        self._wait(lambda: self._loaded)
        self.evaluate("new Promise(done => setTimeout(done, 50))")
        return self._seen

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in JavaScript; a promise is waited for."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def screenshot(self, path: Path, *, height: int | None = None) -> None:
        """Write a PNG of the page, or of its first `height` pixels."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        shot = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        found: list[dict[str, Any]] = []
        self._wait(lambda: bool(found), found)
        if "error" in found[0]:
            raise RuntimeError(f"{method}: {found[0]['error']}")
        result: dict[str, Any] = found[0]["result"]
        return result

    def _wait(self, done: Any, found: list[dict[str, Any]] | None = None) -> None:
        """Take messages until something has happened."""
        end = time.monotonic() + _SECONDS
        while not done():
            if b"\0" not in self._buffer:
                if not select.select([self._answers], [], [], max(0.0, end - time.monotonic()))[0]:
                    raise TimeoutError("the browser does not answer")
                part = os.read(self._answers, 1 << 20)
                if not part:
                    raise RuntimeError("the browser has ended")
                self._buffer += part
                continue
            raw, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(raw)
            if message.get("id") == self._last and found is not None:
                found.append(message)
            elif "method" in message:
                self._take(message["method"], message["params"])

    def _take(self, method: str, values: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self._seen.requests.append(values["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self._seen.complaints.append(str([one.get("value") for one in values["args"]]))
        elif method == "Runtime.exceptionThrown":
            self._seen.complaints.append(str(values["exceptionDetails"]["text"]))
        elif method == "Log.entryAdded":
            self._seen.complaints.append(str(values["entry"]["text"]))
        elif method == "Page.loadEventFired":
            self._loaded = True


def _pipe() -> tuple[int, int]:
    """Return a pipe whose descriptors are none of those that the protocol uses."""
    pair = os.pipe()
    reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pair)
    for end in pair:
        os.close(end)
    return reading, writing


@contextmanager
def browser() -> Iterator[Browser]:
    """Lend a browser with a profile of its own.

    Raises
    ------
    FileNotFoundError
        If there is no Chromium.
    """
    path = program()
    if path is None:
        raise FileNotFoundError("no Chromium: apt-get install chromium")
    ours_in, its_out = _pipe()
    its_in, ours_out = _pipe()
    with tempfile.TemporaryDirectory(prefix="pages-", ignore_cleanup_errors=True) as profile:
        # The protocol reads from descriptor 3 and writes to 4.
        script = f'exec "$0" "$@" 3<&{its_in} 4>&{its_out}'
        command = ["bash", "-c", script, path, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command,
            pass_fds=(its_in, its_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_in)
        os.close(its_out)
        try:
            yield Browser(ours_out, ours_in)
        finally:
            os.close(ours_out)  # a closed pipe ends it
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(ours_in)
