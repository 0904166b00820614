"""Feed the readers of foreign files with what a coverage-guided fuzzer (atheris) makes of the tests' tables.

    pip install atheris
    python tools/fuzz/fuzz.py header --runs 200000
    python tools/fuzz/fuzz.py pickles yaml --seconds 300
    python tools/fuzz/fuzz.py --all --runs 200000 --keep findings
    python tools/fuzz/fuzz.py header --replay findings/header-0a1b2c3d

Each target runs in a process of its own. An input that breaks a promise (see fuzz_promises.py) is a finding: it is
kept, once for each thing that can be wrong, and the run goes on. Exits 1 if there is any.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

CHILD = "STREAMMERGE_FUZZ_CHILD"
SLOW = "-slow"
"""How files of findings end that are only slow, or large: without instrumentation they may be neither."""
_STATUS = re.compile(r"#(\d+)\s+(\w+)\s+cov: (\d+) ft: (\d+)")
_MAX_NBYTES = 1 << 16


def child(name: str, work: Path, arguments: list[str]) -> None:
    """Fuzz one target in this process; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["streammerge", "yaml"]):
        import fuzz_promises
        import fuzz_targets
    target = fuzz_targets.make_targets(work)[name]
    corpus, findings = work / "corpus", work / "findings"
    for directory in (corpus, findings):
        directory.mkdir(exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.blake2b(seed, digest_size=8).hexdigest()).write_bytes(seed)
        fuzz_promises.examine(target, seed)  # Imports and caches are no growth of the first input.
    known: set[str] = set()

    def run(raw: bytes) -> None:
        if (what := fuzz_promises.examine(target, raw)) is None:
            return
        # The same complaint with other names and numbers is the same finding.
        kind = re.sub(r"['\"(].*|\d+", "", what.split(" at ")[0])[:40] + "".join(
            re.findall(r"\w+\.py:\d+", what)[-1:]
        )
        if kind not in known and len(known) < 50:
            known.add(kind)
            file = f"{name}-{hashlib.blake2b(raw, digest_size=4).hexdigest()}"
            slow = what.startswith("took")
            (findings / (file + SLOW * slow)).write_bytes(raw)
            print(f"{'SUSPECT' if slow else 'FINDING'} {name}: {what} ({file})", flush=True)

    def change(raw: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)

        def blind(data: bytes) -> bytes:
            return bytes(atheris.Mutate(data, min(most, len(data) + 64)))

        changed = target.change(raw, rng, blind) if target.change is not None and rng.random() < 0.8 else None
        if changed is None or len(changed) > most:
            changed = bytes(atheris.Mutate(raw, most))
        return changed

    options = [f"-max_len={_MAX_NBYTES}", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"]
    options += [f"-artifact_prefix={findings}/{name}-", "-len_control=20"]
    atheris.Setup([sys.argv[0], *options, *arguments, str(corpus)], run, custom_mutator=change)
    atheris.Fuzz()


def fuzz(name: str, arguments: list[str], keep: Path | None) -> bool:
    """Fuzz one target in a new process, say what came of it, and return whether all was well."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        work = Path(directory)
        process = subprocess.Popen(
            [sys.executable, __file__, name, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, CHILD: directory},
        )
        assert process.stdout is not None
        statuses, tail = [], []
        for line in process.stdout:
            tail = [*tail[-14:], line]
            if match := _STATUS.search(line):
                statuses.append((int(match[1]), match[2], int(match[3]), int(match[4])))
            if line.startswith(("FINDING", "SUSPECT")):
                print(line, end="", flush=True)
        code = process.wait()
        found = [path for path in sorted((work / "findings").glob("*")) if _confirmed(name, path)]
        _tell(name, statuses, len(found), work)
        for path in found:
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / path.name).write_bytes(path.read_bytes())
        if code:
            print(f"{name}: the fuzzer itself ended with {code}:\n{''.join(tail)}", flush=True)
        return not found and not code


def _confirmed(name: str, path: Path) -> bool:
    """Return whether an input that was slow is so in a process that counts no edges."""
    if SLOW not in path.name:
        return True
    command = [sys.executable, __file__, name, "--replay", str(path)]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode != 0


def _tell(name: str, statuses: list[tuple[int, str, int, int]], findings: int, work: Path) -> None:
    if not statuses:
        print(f"{name}: did not start")
        return
    first = next((s for s in statuses if s[1] == "INITED"), statuses[0])
    last = statuses[-1]
    inputs = len(list((work / "corpus").iterdir()))
    print(
        f"{name}: {last[0]} executions, {first[2]} -> {last[2]} edges, {first[3]} -> {last[3]} features, "
        f"{inputs} inputs kept, {findings} findings",
        flush=True,
    )


def replay(name: str, paths: list[Path]) -> bool:
    """Run kept inputs, without a fuzzer; return whether all was well."""
    import fuzz_promises
    import fuzz_targets

    well = True
    with tempfile.TemporaryDirectory() as directory:
        target = fuzz_targets.make_targets(Path(directory))[name]
        for seed in target.seeds():  # Imports and caches are no growth of the first input.
            fuzz_promises.examine(target, seed)
        for path in paths:
            what = fuzz_promises.examine(target, path.read_bytes())
            print(f"{path}: {what or 'fine'}")
            well &= what is None
    return well


def main() -> int:
    """Run what the arguments say."""
    if CHILD in os.environ:
        child(sys.argv[1], Path(os.environ[CHILD]), sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", help="targets by name; see make_targets in fuzz_targets.py")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--runs", type=int, help="executions of each target")
    parser.add_argument("--seconds", type=int, help="and at most so many seconds of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="directory for the inputs that break a promise")
    parser.add_argument("--replay", type=Path, nargs="+", help="run these inputs of one target only")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if args.replay:
        return 0 if replay(args.targets[0], args.replay) else 1
    names = args.targets
    if args.all:
        import fuzz_targets

        with tempfile.TemporaryDirectory() as directory:
            names = list(fuzz_targets.make_targets(Path(directory)))
    if not names or (args.runs is None and args.seconds is None):
        parser.error("name targets (or --all), and give --runs or --seconds")
    limits = [f"-seed={args.seed}"]
    limits += [f"-runs={args.runs}"] if args.runs is not None else []
    limits += [f"-max_total_time={args.seconds}"] if args.seconds is not None else []
    well = [fuzz(name, limits, args.keep) for name in names]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
