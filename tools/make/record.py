"""Record a merge in a terminal, Ctrl-C and the same command again, as an animated SVG.

    python tools/make/record.py WORKDIR --svg docs/results/merge-and-resume.svg

A shell in a pseudo-terminal is typed into, so all that is seen is what the programs printed. WORKDIR gets three models
of 3.2 GB (made once), the config, the output and `session.cast`, an asciicast of version 2 that any player of
asciinema plays. `--cast FILE` draws an earlier recording anew. Drawing takes pyte, a terminal emulator (`pip install pyte`).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

from record_svg import draw

COLUMNS, ROWS = 104, 25
PROMPT = b"\x1b]133;A\x07"
"""The sequence that terminals take for the mark of a prompt, and do not show."""
KEY_SECONDS = 0.035
PATIENCE = 300.0
"""Seconds that a step may take."""
MERGE = "streammerge merge ties.yml merged --memory 1GiB"
CONFIG = """\
merge_method: ties
base_model: llama-base
models: [llama-math, llama-code]
parameters: {density: 0.2}
dtype: bfloat16
"""
TOOLS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Step:
    """A line that is typed."""

    line: str
    interrupt_at: str = ""
    """A regular expression of what is on the screen when Ctrl-C is pressed."""
    pause: float = 1.5
    """Seconds to read what it printed."""


STEPS = (
    Step("cat ties.yml", pause=2.0),
    Step(MERGE, interrupt_at=r"\b(5[5-9]|[6-9]\d)%", pause=2.0),
    Step(MERGE, pause=2.5),
    Step("streammerge verify merged", pause=4.0),
)


class Terminal:
    """A shell in a pseudo-terminal, and the times of all that it printed."""

    def __init__(self, folder: Path) -> None:
        environment = {
            **os.environ,
            "PS1": r"\[\e]133;A\a\e[1;32m\]$\[\e[0m\] ",
            "TERM": "xterm-256color",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        for name in ("COLUMNS", "LINES", "NO_COLOR", "PROMPT_COMMAND"):
            environment.pop(name, None)
        self.events: list[tuple[float, str, str]] = []
        self._pid, self._master = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self._began = time.monotonic()

    def play(self, step: Step) -> None:
        """Type a line, wait for the next prompt."""
        for key in step.line:
            os.write(self._master, key.encode())
            self.rest(KEY_SECONDS)
        self.rest(0.4)
        os.write(self._master, b"\n")
        self.wait(step.interrupt_at)
        self.rest(step.pause)

    def wait(self, interrupt_at: str = "") -> None:
        """Read until a prompt is there; press Ctrl-C once when the screen says so."""
        seen, began = b"", time.monotonic()
        while PROMPT not in seen:
            if time.monotonic() - began > PATIENCE:
                raise TimeoutError(seen[-500:].decode(errors="replace"))
            seen += (new := self._read(0.05))
            if interrupt_at and re.search(interrupt_at, new.decode(errors="replace")):
                os.write(self._master, b"\x03")
                self.events.append((time.monotonic() - self._began, "i", "\x03"))
                interrupt_at = ""
        if interrupt_at:
            raise RuntimeError(f"done before Ctrl-C: nothing matched {interrupt_at}")

    def rest(self, seconds: float) -> None:
        """Record for so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._read(left)

    def close(self) -> None:
        """Leave the shell."""
        os.kill(self._pid, signal.SIGHUP)
        os.close(self._master)
        os.waitpid(self._pid, 0)

    def _read(self, seconds: float) -> bytes:
        ready, _, _ = select.select([self._master], [], [], seconds)
        if not ready:
            return b""
        data = os.read(self._master, 1 << 16)
        self.events.append((time.monotonic() - self._began, "o", data.decode(errors="replace")))
        return data


def prepare(folder: Path) -> None:
    """Make the models once; remove an earlier output."""
    if not (folder / "llama-base").exists():
        made = folder / "made"
        command = [sys.executable, TOOLS / "make_models.py", made, "--models", "2", "--layers", "28"]
        subprocess.run(command, check=True)
        for old, new in (("tuned1", "llama-math"), ("tuned2", "llama-code"), ("base", "llama-base")):
            (made / old).rename(folder / new)
    (folder / "ties.yml").write_text(CONFIG)
    subprocess.run(["rm", "-rf", folder / "merged"], check=True)
    # Not seen: the kernels are compiled once on a machine, here by a merge that is thrown away.
    command = [Path(sys.executable).with_name("streammerge"), *MERGE.split()[1:], "--quiet"]
    subprocess.run(command, cwd=folder, check=True)
    subprocess.run(["rm", "-rf", folder / "merged"], check=True)


def record(folder: Path) -> Path:
    """Play the steps; return the asciicast."""
    terminal = Terminal(folder)
    terminal.wait()
    for step in STEPS:
        terminal.play(step)
    terminal.close()
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": "streammerge"}
    lines = [json.dumps(header), *(json.dumps([round(at, 3), *event]) for at, *event in terminal.events)]
    cast = folder / "session.cast"
    cast.write_text("\n".join(lines) + "\n")
    return cast


def main() -> None:
    """Record and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--svg", type=Path, default=Path("docs/results/merge-and-resume.svg"))
    parser.add_argument("--cast", type=Path, help="draw this recording; record nothing")
    args = parser.parse_args()
    if args.cast is None:
        args.folder.mkdir(parents=True, exist_ok=True)
        prepare(args.folder.resolve())
        args.cast = record(args.folder.resolve())
    args.svg.write_text(draw(args.cast.read_text()))
    print(f"{args.svg}: {args.svg.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
