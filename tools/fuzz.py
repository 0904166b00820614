"""Fuzz every parser of what strangers or a crash may have written, guided by coverage.

    python tools/fuzz.py header --runs 200000        # one target; see --help for all
    python tools/fuzz.py --all --seconds 240         # each target for that long, one after the other

Needs atheris (``pip install atheris``). Only the documented error may come out, with one printable line of bounded
length; each input within 5 s and 1 GiB; a header we accept the safetensors library must read alike. The first
corpus is made from the tests' tables. What breaks a rule is written to WORKDIR as crash-*, and the exit code is 1;
give it the file's bytes again with --replay.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "index")]

Target = Callable[[bytes, Path], None]
"""Takes an input and a directory of its own; raises if a rule is broken."""
TARGETS: dict[str, Target] = {}
_LONGEST = 2000
"""Characters of a message; a terminal shows them."""


def target(function: Target) -> Target:
    """Register a target under its function's name."""
    TARGETS[function.__name__] = function
    return function


@contextlib.contextmanager
def refused_in_one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Let the documented errors pass, if their message is fit to be shown."""
    try:
        yield
    except kinds as error:
        line = str(error)
        assert line.isprintable(), f"not one printable line: {line!r:.300}"
        assert 0 < len(line) <= _LONGEST, f"{len(line)} characters"


def place(path: Path, raw: bytes) -> Path:
    """Write a file in place: truncating one first is slow on some file systems."""
    path.touch()
    with path.open("r+b") as file:
        file.write(raw)
        file.truncate()
    return path


@target
def header(raw: bytes, work: Path) -> None:
    """A safetensors file; where the first bit is set, its length word is put right."""
    import safetensors

    from streammerge.errors import ModelError
    from streammerge.index.header import read_header

    if raw[:1] > b"\x7f":
        text, _, data = raw[1:].partition(b"\0")
        raw = len(text).to_bytes(8, "little") + text + data
    path = place(work / "model.safetensors", raw)
    with refused_in_one_line(ModelError):
        tensors, _, _ = read_header(path)
        reference = dict(safetensors.deserialize(raw))
        assert tensors.keys() == reference.keys()
        for name, ref in tensors.items():
            theirs = reference[name]
            assert (ref.dtype, list(ref.shape)) == (theirs["dtype"], list(theirs["shape"])), name
            assert raw[ref.offset : ref.offset + ref.nbytes] == bytes(theirs["data"]), name


@target
def index(raw: bytes, work: Path) -> None:
    """The index of a model of two shards."""
    from safetensors_files import sound

    from streammerge.errors import ModelError
    from streammerge.index.model import open_model

    model = work / "model"
    if not model.exists():
        model.mkdir()
        for shard, tensor in (("a", "x"), ("b", "y")):
            (model / f"{shard}.safetensors").write_bytes(sound({tensor: ("BF16", (2, 3))}))
    place(model / "model.safetensors.index.json", raw)
    with refused_in_one_line(ModelError):
        assert set(open_model(model)) <= {"x", "y"}


@target
def pickles(raw: bytes, work: Path) -> None:
    """A PyTorch file; where the first bit is set, the input is the program in a sound archive."""
    from test_index_pickles import archive

    from streammerge.errors import ModelError
    from streammerge.index.pickles import read_pickle

    if raw[:1] > b"\x7f":
        raw = archive(raw[1:])
    path = place(work / "pytorch_model.bin", raw)
    with refused_in_one_line(ModelError):
        tensors, _ = read_pickle(path)
        assert all(0 <= ref.offset <= ref.offset + ref.nbytes <= len(raw) for ref in tensors.values())


@target
def config(raw: bytes, work: Path) -> None:
    """A config file."""
    from streammerge.config.schema import parse_config
    from streammerge.errors import ConfigError

    with refused_in_one_line(ConfigError):
        parsed = parse_config(raw)
        assert parsed.models
        hash(parsed)


@target
def journal(raw: bytes, work: Path) -> None:
    """A journal; where the first bit is set, each line's checksum is put right."""
    from streammerge.engine.journal import _load

    if raw[:1] > b"\x7f":
        raw = b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in raw[1:].split(b"\n"))
    progress, _ = _load(place(work / "journal.jsonl", raw))
    if progress is not None:
        assert isinstance(progress.receipts, list)


@target
def manifest(raw: bytes, work: Path) -> None:
    """A manifest; where the first bit is set, its seal is put right."""
    from streammerge.engine.checksum import crc32
    from streammerge.engine.output import MANIFEST, check_contents, is_complete, read_manifest
    from streammerge.errors import OutputError

    if raw[:1] > b"\x7f":
        body = raw[1:]
        raw = body + b'\n"manifest_crc32": "%08x"\n}\n' % crc32(body)
    place(work / MANIFEST, raw)
    is_complete(work, read_manifest(work))
    with refused_in_one_line(OutputError):
        check_contents(work)


@target
def fisher(raw: bytes, work: Path) -> None:
    """The table of a store of Fisher diagonals."""
    from streammerge.errors import InputError
    from streammerge.index.fishers import open_fisher

    store = work / "store.zarr"
    store.mkdir(exist_ok=True)
    place(store / "zarr.json", raw)
    with refused_in_one_line(InputError):
        open_fisher(store)


@target
def sizes(raw: bytes, work: Path) -> None:
    """A size on the command line."""
    from streammerge.errors import InputError
    from streammerge.units import parse_size

    with refused_in_one_line(InputError):
        assert parse_size(raw.decode("utf-8", "replace")) >= 0


def seeds(name: str) -> Iterable[bytes]:
    """Return the first corpus of a target, from the tests' tables."""
    if name == "header":
        from safetensors_files import sound
        from test_index_header import HOSTILE

        rows = [raw for _, raw, _ in HOSTILE if len(raw) < 4000]
        rows.append(sound({"w.a": ("BF16", (2, 3)), "w.é": ("F4", (4,)), "s": ("F32", ())}, {"k": "v"}))
        return rows + [b"\x80" + raw[8:].replace(b"}}", b"}}\0", 1) for raw in rows]
    if name == "index":
        maps: list[Any] = [{"x": "a.safetensors", "y": "b.safetensors"}, {"x": "../a"}, {"x": 1}, {}, []]
        return [json.dumps({"metadata": {"total_size": 1}, "weight_map": value}).encode() for value in maps]
    if name == "pickles":
        from test_index_pickles import SOUND, archive, named, tensor

        programs = [SOUND, named(("w", tensor((2, 2), (1, 2)))), named(("w", tensor(skip=3)))]
        return [archive(program) for program in programs] + [b"\x80" + program for program in programs]
    if name == "config":
        blocks = [
            text for page in (ROOT / "docs").glob("*.md") for text in page.read_text().split("```yaml")[1:]
        ]
        return [block.split("```")[0].encode() for block in blocks]
    if name == "journal":
        lines = [
            {"identity": {"a": "b"}},
            {"done": [0, 0, 4, 7, 0, 0, 3]},
            {"answer": ["0", [[{"float": "0x1p0"}]]]},
        ]
        return [b"\xff" + b"\n".join(json.dumps(line).encode() for line in lines)]
    if name == "manifest":
        value = {
            "format": 1,
            "identity": {"a": "b"},
            "files": {"x": {"nbytes": 1, "crc32": "00"}},
            "tensors": {},
        }
        return [b"\xff" + json.dumps(value, indent=1).encode().removesuffix(b"\n}") + b","]
    if name == "fisher":
        from streammerge.index.fishers import ATTRIBUTE

        sums = {"sum": 1.0, "square_sum": 2.0, "largest": 1.0, "zeros": 0, "stored_nbytes": 24}
        entry = {"array": "w", "dtype": "F32", "shape": [2, 3], "chunk": [1, 3], **sums}
        about = {"format": 1, "model_fingerprint": "0", "model_name": "m", "tensors": {"w": entry}}
        return [
            json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: about}}).encode()
        ]
    return [b"2GiB", b"1.5 MB", b"0", b"-1", b"1e3", "１GiB".encode()]


def fuzz(name: str, runs: int | None, seconds: int | None, work: Path) -> int:
    """Fuzz one target in a process of its own; return its exit code."""
    corpus, scratch = work / f"corpus-{name}", work / f"scratch-{name}"
    for directory in (corpus, scratch):
        directory.mkdir(parents=True, exist_ok=True)
    for number, raw in enumerate(seeds(name)):
        (corpus / f"seed-{number:04d}").write_bytes(raw)
    options = [
        "-timeout=5",
        "-rss_limit_mb=1024",
        f"-artifact_prefix={work}/crash-{name}-",
        "-print_final_stats=1",
    ]
    options += [f"-runs={runs}"] if runs else []
    options += [f"-max_total_time={seconds}"] if seconds else []
    command = [sys.executable, __file__, name, "--inside", json.dumps([str(scratch), *options, str(corpus)])]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    lines = done.stderr.splitlines()
    last = next((line for line in reversed(lines) if " cov: " in line), "no coverage line")
    count = next((line.split()[-1] for line in lines if "number_of_executed_units" in line), "?")
    verdict = "nothing found" if done.returncode == 0 else "FOUND:\n" + "\n".join(lines[-40:])
    print(f"{name}: {count} executions; {' '.join(last.split()[1:8])}; {verdict}", flush=True)
    return done.returncode


def run_inside(name: str, scratch: Path, options: list[str]) -> None:
    """Hand a target to atheris, which does not return."""
    import atheris

    with (
        atheris.instrument_imports(include=["streammerge"], enable_loader_override=False),
        tempfile.TemporaryDirectory() as warm,
    ):
        for raw in seeds(name):  # imports what the target imports
            with contextlib.suppress(Exception):
                TARGETS[name](raw, Path(warm))
    atheris.Setup([sys.argv[0], *options], lambda raw: TARGETS[name](raw, scratch))
    atheris.Fuzz()


def main() -> int:
    """Fuzz, or replay what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS))
    parser.add_argument("--all", action="store_true", help="every target")
    parser.add_argument("--runs", type=int, help="executions of each target")
    parser.add_argument("--seconds", type=int, help="time of each target")
    parser.add_argument("--work", type=Path, help="for corpora and findings [a temporary directory]")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input and show what it breaks")
    parser.add_argument("--inside", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.target is None) == (not args.all):
        parser.error("give a target, or --all")
    if args.inside is not None:
        scratch, *options = args.inside
        run_inside(args.target, Path(scratch), options)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.replay is not None:
            TARGETS[args.target](args.replay.read_bytes(), work)
            return 0
        names = sorted(TARGETS) if args.all else [args.target]
        return max(fuzz(name, args.runs, args.seconds, work) for name in names)


if __name__ == "__main__":
    sys.exit(min(1, main()))
