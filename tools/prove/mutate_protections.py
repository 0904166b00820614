"""Take the protections out, one at a time, and see that a test notices: that none of the promises is kept by luck.

    python tools/prove/mutate_protections.py [--only P2]

Each row changes one place of a copy of the package and runs the tests that stand for the promise; they must fail. Exits with 1
where they do not, or where the place is no longer to be found.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]


SECONDS = 300


def copy_of_the_repository(directory: Path) -> Path:
    """Copy what tests need; the environment's package is shadowed by the copy's."""
    copy = directory / "copy"
    copy.mkdir()
    for name in ("streammerge", "tests", "tools", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def missing(mutation: Mutation, root: Path) -> str:
    """Return why a protection cannot be taken out: its place is not there, or not the only one; or nothing."""
    path = root / mutation.file
    places = path.read_text().count(mutation.old) if path.is_file() else 0
    if places != 1:
        return f"NOT FOUND: {places} places in {mutation.file}"
    files = [word for word in shlex.split(mutation.tests) if word.startswith("tests")]
    return "".join(f"NO SUCH TEST: {word}" for word in files if not (root / word).exists())


def outcome(mutation: Mutation, copy: Path) -> str:
    """Take a protection out, run the tests, put it back; say which test noticed."""
    if said := missing(mutation, copy):
        return said
    path = copy / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {mutation.tests}"
    try:
        done = subprocess.run(
            command,
            shell=True,
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "noticed: the tests do not end"
    finally:
        path.write_text(text)
    if done.returncode == 0:
        return "NOT NOTICED"
    failed = [
        line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
    ]
    if done.returncode != 1 or not failed:
        return f"NO TEST RAN: pytest exits with {done.returncode}: {done.stdout[-200:]} {done.stderr[-200:]}"
    return "noticed: " + failed[0].split("::", 1)[-1].split("[")[0]


def main() -> None:
    """Try all, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a promise, such as P2, or words of a protection")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.only in (m.promise, "") or options.only in m.protection]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as directory:
        copy = copy_of_the_repository(Path(directory))
        for mutation in chosen:
            said = outcome(mutation, copy)
            unnoticed += not said.startswith("noticed")
            print(f"| {mutation.promise} | {mutation.protection} | {said} |", flush=True)
    print(f"{len(chosen)} protections taken out, {len(chosen) - unnoticed} noticed")
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
