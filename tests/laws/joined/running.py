"""Runs the scenes of a module whose process forks merges, and tells how they ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from tests.laws.joined.maker import prepare

_Made = TypeVar("_Made")


def run_scenes(scenes: Mapping[str, Callable[[_Made], None]], made: Callable[[Path], _Made]) -> None:
    """Run the scenes that the command line names, or all; print as JSON how each ended.

    The command line has the directory to work in, and names.

    Parameters
    ----------
    made
        Makes what a scene is given, from a directory of its own; sets what the scenes have in common.
    """
    work, *names = sys.argv[1:]
    prepare()
    ended = {}
    for name in names or scenes:
        directory = Path(work) / name
        directory.mkdir(parents=True)
        began = time.monotonic()
        try:
            scenes[name](made(directory))
            ended[name] = ""
        except BaseException:
            ended[name] = traceback.format_exc()
            for number in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(number), signal.SIGKILL)
        print(name, f"{time.monotonic() - began:.1f} s", file=sys.stderr)
    print(json.dumps(ended))
