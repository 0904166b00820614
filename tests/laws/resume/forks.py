"""A warm process that forks merges of the command line, to kill them, to signal them, and to start several at once.

    python -m tests.laws.resume.forks WORKDIR [--kills N] [--signals N] [--starts N] [--seed S]

A fork starts in milliseconds where Python takes a second. Prints the figures of each action as JSON; any failure is an
exception.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process of one thread may be forked

import numpy as np
import yaml
from safetensors.numpy import save_file

import streammerge.api
import streammerge.cli.merging
from streammerge.backends.cpu.compile import compile_kernels
from streammerge.cli import main
from streammerge.engine import scheduler as run
from streammerge.methods.catalog import load_builtin
from streammerge.output.place import JOURNAL as NAME
from streammerge.output.place import STATE
from streammerge.planning.memory import budget
from tests.fixed_budget import Fixed
from tests.patience import PATIENCE

MODEL_SCOPE = {"density": 0.3, "trim_scope": "model"}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "linear, 1 shard": ("linear", {}, "5GB"),
    "ties, 5 shards": ("ties", MODEL_SCOPE, "700KB"),
    "dare_ties, 2 shards": ("dare_ties", {"density": 0.5}, "1500KB"),
    "fisher, 1 shard": ("fisher", {}, "5GB"),
}
SHAPES: dict[str, tuple[int, ...]] = {f"layers.{i}.weight": (512, 256) for i in range(10)} | {"norm": (256,)}
CHANGES = (
    "pwrite",
    "write",
    "replace",
    "fsync",
    "fdatasync",
    "unlink",
    "mkdir",
    "rmdir",
    "open",
)


def fork(action: Callable[[], object], stderr: Path | None = None) -> int:
    """Do something in a process of its own; return its number."""
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        if stderr is not None:
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        action()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(number: int, seconds: float = PATIENCE) -> int:
    """Return the exit code of a process, negative for a signal; one that hangs is killed and an error."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    raise AssertionError(f"it did not end within {seconds} s")


def warm(**options: Any) -> None:
    """Compile the kernels, and import what a merge does, so that no fork does it again."""
    compile_kernels()
    load_builtin()
    with tempfile.TemporaryDirectory() as place:
        for name in "ab":
            (Path(place) / name).mkdir()
            save_file({"w": np.zeros(8, np.float32)}, Path(place) / name / "model.safetensors")
            (Path(place) / name / "config.json").write_text("{}")
        config = {"merge_method": "linear", "models": [str(Path(place) / name) for name in "ab"]}
        streammerge.api.merge(config, Path(place) / "out", on_event=lambda event: None, **options)
    assert len(os.listdir("/proc/self/task")) == 1, "a process of several threads is not forked"
    gc.collect()
    gc.freeze()  # a fork that collects garbage would copy all of the memory


def contents(directory: Path) -> dict[str, bytes]:
    """Return the files of a directory, those below it too."""
    if not directory.exists():
        return {}
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def prepare(directory: Path) -> dict[str, Any]:
    """Write the models and return a config for each case; runs in a fork, because torch has threads."""
    from tests.conftest import config_for, write_models

    paths = write_models(directory, n_models=2, shapes=SHAPES)
    (paths[0] / "tokenizer.json").write_text("{}")
    return {
        name: config_for(method, paths, parameters=parameters)
        for name, (method, parameters, _) in CASES.items()
    }


@dataclass
class Merge:
    """One case: how to start it and what it gives."""

    name: str
    config: Path
    out: Path

    def start(self, before: Callable[[], object] = lambda: None, out: Path | None = None, *more: str) -> int:
        """Start the command in a fork, after something else; its standard error goes beside the output."""

        def action() -> None:
            before()
            place = str(out or self.out)
            sys.argv = [
                "streammerge",
                "merge",
                str(self.config),
                place,
                "--shard-size",
                CASES[self.name][2],
                "--quiet",
                *more,
            ]
            main()

        return fork(action, self.stderr)

    @property
    def stderr(self) -> Path:
        return self.out.with_suffix(".err")

    def finish(self) -> None:
        """Run to the end and compare."""
        code = wait(self.start())
        assert code == 0, (code, self.stderr.read_text())
        said = self.stderr.read_text()
        assert all(line.startswith("warning: ") for line in said.splitlines()), said
        assert contents(self.out) == self.expected, "the bytes differ, or something is left over"

    @property
    def expected(self) -> dict[str, bytes]:
        return contents(self.out.with_suffix(".expected"))

    def assert_nothing_torn(self) -> str:
        """See that no final name lies; return how far the merge was."""
        expected, found = self.expected, contents(self.out)
        final = {
            name: data for name, data in found.items() if not name.endswith(".partial") and STATE not in name
        }
        assert all(expected.get(name) == data for name, data in final.items()), sorted(final)
        if {"model.safetensors", "model.safetensors.index.json"} & set(final):
            assert final == expected
            return "all but the end of the commit"
        if final:
            return "in the commit"
        done = found.get(f"{STATE}/{NAME}", b"").count(b'"done"')
        return "some work recorded" if done else "nothing recorded" if found else "nothing there"


def merges(directory: Path) -> list[Merge]:
    """Prepare the cases and merge each once."""
    run._SYNC_SECONDS = 0.02
    budget.make_budget = lambda memory, n, reserve: Fixed(reserve + (1 << 20), reserve, 1)
    made = directory / "configs.json"
    assert wait(fork(lambda: made.write_text(json.dumps(prepare(directory)))), 300) == 0
    warm()
    result = []
    for number, (name, config) in enumerate(json.loads(made.read_text()).items()):
        path = directory / f"{number}.yml"
        path.write_text(yaml.safe_dump(config))
        merge = Merge(name, path, directory / f"out{number}")
        code = wait(merge.start(out=merge.out.with_suffix(".expected")))
        assert code == 0, merge.stderr.read_text()
        result.append(merge)
    return result


# --- kills


def kill_at(call: int | None, count_into: Path | None = None, slow: float = 0.0) -> None:
    """Have the process kill itself at some call that changes the file system, in the middle of a write.

    Without a number the calls are counted, and their number is written to a file at the end.
    """
    numbers = itertools.count(1)

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def changing(*arguments: Any, **options: Any) -> Any:
            number = next(numbers)
            if count_into is not None and name == "rmdir":
                count_into.write_text(str(number))
            if number == call:
                if name == "pwrite":
                    descriptor, data, offset = arguments
                    real(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "pwrite" and slow:
                time.sleep(slow)
            return real(*arguments, **options)

        return changing

    for name in CHANGES:
        setattr(os, name, wrap(name, getattr(os, name)))


def kills(cases: Sequence[Merge], directory: Path, number: int, seed: int) -> dict[str, Any]:
    """Kill merges `number` times, one to three times each, at a random call or moment; then finish them.

    The first merge of each case is killed three times in a row for sure: each run ends within its first third.
    """
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    calls, seconds = {}, {}
    for merge in cases:
        counted = directory / "calls"
        began = time.monotonic()
        assert wait(merge.start(lambda counted=counted: kill_at(None, counted, slow=0.004))) == 0, (
            merge.stderr.read_text()
        )
        seconds[merge.name] = time.monotonic() - began
        calls[merge.name] = int(counted.read_text())
        shutil.rmtree(merge.out)
    for turn, merge in enumerate(itertools.cycle(cases)):
        for_sure = turn < len(cases)
        in_a_row = 3 if for_sure else chance.randint(1, 3)
        landed = 0
        for _ in range(in_a_row):
            if for_sure or chance.random() < 0.6:
                call = chance.randint(1, calls[merge.name] // (3 if for_sure else 1))
                code = wait(merge.start(lambda call=call: kill_at(call, slow=0.004)))
            else:
                process = merge.start()
                time.sleep(chance.uniform(0.0, seconds[merge.name]))
                os.kill(process, signal.SIGKILL)
                code = wait(process)
            assert code in (0, -signal.SIGKILL), (code, merge.stderr.read_text())
            if code == 0:
                break
            landed += 1
            figures[f"killed with {merge.assert_nothing_torn()}"] += 1
        merge.finish()
        shutil.rmtree(merge.out)
        figures["merges"] += 1
        figures["kills"] += landed
        figures["killed three times in a row"] += landed == 3
        if figures["kills"] >= number and not for_sure:
            return dict(figures)
    raise AssertionError


# --- signals


def signals(cases: Sequence[Merge], directory: Path, number: int, seed: int) -> dict[str, Any]:
    """Stop merges by SIGINT and SIGTERM at random moments; return the seconds they took to stop."""
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    seconds = []
    for turn, merge in enumerate(itertools.cycle(cases)):
        if turn == number:
            break
        which = chance.choice((signal.SIGINT, signal.SIGTERM))
        ready = directory / "ready"
        ready.unlink(missing_ok=True)
        # Handlers are there once the command reads its options; before that Python itself answers.
        process = merge.start(lambda ready=ready: (kill_at(None, slow=0.01), _note_when_stoppable(ready)))
        while not ready.exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.4))
        began = time.monotonic()
        os.kill(process, which)
        code = wait(process, 10.0)
        text = merge.stderr.read_text()
        assert "Traceback" not in text
        if code == 0:
            figures["ended before"] += 1
        else:
            assert code == 128 + which, (code, text)
            assert len(text.splitlines()) == 1
            assert "run the same command again" in text
            seconds.append(time.monotonic() - began)
            figures["stopped"] += 1
            merge.assert_nothing_torn()
        merge.finish()
        shutil.rmtree(merge.out)
    seconds.sort()
    times = {"median seconds": seconds[len(seconds) // 2], "longest seconds": seconds[-1]} if seconds else {}
    return {**figures, **{key: round(value, 3) for key, value in times.items()}}


def _note_when_stoppable(ready: Path) -> None:
    from streammerge.cli import merging

    real = merging.stop_on_signals

    def noting() -> Any:
        result = real()
        ready.touch()
        return result

    merging.stop_on_signals = noting


# --- starts


def starts(cases: Sequence[Merge], directory: Path, number: int, seed: int) -> dict[str, Any]:
    """Start three merges into one directory at once, `number` times: one wins, two are refused."""
    (merge,) = (one for one in cases if one.name == "ties, 5 shards")
    for turn in range(number):
        read, write = os.pipe()

        def together(read: int = read, write: int = write) -> None:
            os.close(write)
            os.read(read, 1)  # ends for all when the parent closes it
            kill_at(None, slow=0.05)

        processes, errors = [], []
        for place in range(3):
            errors.append(directory / f"{turn}-{place}.err")
            twin = Twin(merge.name, merge.config, merge.out, errors[-1])
            processes.append(twin.start(together, None, *["--overwrite"] * (turn % 2)))
        os.close(read)
        os.close(write)
        codes = [wait(process) for process in processes]
        assert sorted(codes) == [0, 2, 2], (codes, [error.read_text() for error in errors])
        for code, error in zip(codes, errors, strict=True):
            lines = error.read_text().splitlines()
            assert len(lines) == (code == 2), lines
            assert not lines or "a different merge is writing there" in lines[0]
        assert contents(merge.out) == merge.expected
        shutil.rmtree(merge.out)
    return {"rounds": number, "winners": number, "refused": 2 * number}


@dataclass
class Twin(Merge):
    """The same merge, started once more."""

    error: Path

    @property
    def stderr(self) -> Path:
        return self.error


ACTIONS: dict[str, Callable[[Sequence[Merge], Path, int, int], dict[str, Any]]] = {
    "kills": kills,
    "signals": signals,
    "starts": starts,
}


def command() -> None:
    """Run the actions of which some number is asked, and print their figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path)
    for name in ACTIONS:
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with contextlib.suppress(FileExistsError):
        args.workdir.mkdir(parents=True)
    cases, figures = merges(args.workdir), {}
    for name, action in ACTIONS.items():
        if number := getattr(args, name):
            began = time.monotonic()
            found = action(cases, args.workdir, number, args.seed)
            figures[name] = {**found, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(figures))


if __name__ == "__main__":
    command()
