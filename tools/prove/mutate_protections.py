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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 300


@dataclass(frozen=True)
class Mutation:
    """A protection, how to take it out, and the tests that must fail then."""

    promise: str
    protection: str
    file: str
    old: str
    new: str
    tests: str


MEMORY_PLAN, MEMORY_SHAPES = "tests/laws/memory/test_projection.py", "tests/laws/memory/test_shapes.py"
MUTATIONS = [
    Mutation(
        "P1",
        "nothing is left behind",
        "streammerge/engine/merge.py",
        "                journal.remove()\n",
        "",
        "tests/laws/resume/test_signals.py -k killed_at_random",
    ),
    Mutation(
        "P1",
        "an index is taken away before work goes on",
        "streammerge/engine/merge.py",
        "            withdraw(self._place)\n",
        "            pass\n",
        "tests/laws/resume/test_damage.py tests/laws/resume/test_power_loss.py",
    ),
    Mutation(
        "P2",
        "pieces are synced before their receipts",
        "streammerge/output/shards.py",
        "                os.fdatasync(self._descriptors[shard])",
        "                pass",
        "tests/laws/resume/test_power_loss.py",
    ),
    Mutation(
        "P2",
        "names are synced with their directory",
        "streammerge/io/durable.py",
        "        os.fsync(descriptor)\n    except OSError as error:",
        "        pass\n    except OSError as error:",
        "tests/laws/resume/test_power_loss.py",
    ),
    Mutation(
        "P2",
        "a small file is synced before its name",
        "streammerge/io/durable.py",
        "            os.fsync(descriptor)\n        finally:",
        "            pass\n        finally:",
        "tests/laws/resume/test_power_loss.py",
    ),
    Mutation(
        "P2",
        "a header is written anew after a sync that failed",
        "streammerge/output/shards.py",
        "            _write_all(descriptor, shard.header, 0)\n",
        "            if number in self.fresh:\n                _write_all(descriptor, shard.header, 0)\n",
        "tests/laws/resume/test_power_loss.py",
    ),
    Mutation(
        "P3",
        "recorded work is not done again",
        "streammerge/engine/merge.py",
        "sound = self._believe(progress.receipts)",
        "sound = self._believe([])",
        "tests/laws/resume/test_continuing.py",
    ),
    Mutation(
        "P3",
        "a finished merge is known",
        "streammerge/output/finished.py",
        "    if manifest is None or (",
        "    if True or (",
        "tests/laws/resume/test_finished.py",
    ),
    Mutation(
        "P4",
        "a shard has a name of its own until it is finished",
        "streammerge/output/shards.py",
        "return self._place.partial(self._shards[number].name)",
        "return self._place.path(self._shards[number].name)",
        "tests/laws/resume/test_power_loss.py",
    ),
    Mutation(
        "P4",
        "the index comes after the shards",
        "streammerge/output/commit.py",
        "    for name, data in made.items():\n",
        "    for name, data in {**made, **index}.items():\n",
        "tests/laws/resume/test_power_loss.py",
    ),
    Mutation(
        "P5",
        "what could not be allocated is removed",
        "streammerge/output/shards.py",
        "                self._partial(number).unlink()",
        "                pass",
        "tests/laws/resume/test_faults.py",
    ),
    Mutation(
        "P5",
        "errors have a cure",
        "streammerge/io/durable.py",
        "_CURES.get(error.errno or 0, _KEPT)",
        "_KEPT",
        "tests/laws/resume/test_faults.py",
    ),
    Mutation(
        "P5",
        "a failure of the thread that syncs stops the merge",
        "streammerge/engine/scheduler.py",
        "                self._failure = error\n",
        "                pass\n",
        "tests/laws/resume/test_failures.py",
    ),
    Mutation(
        "P6",
        "signals set a flag, and pieces in hand are finished",
        "streammerge/cli/process.py",
        "        received.append(signum)\n        stop.set()\n",
        "        raise KeyboardInterrupt\n",
        "tests/laws/resume/test_signals.py",
    ),
    Mutation(
        "P7",
        "another merge is refused",
        "streammerge/output/journal.py",
        "    if changed:\n",
        "    if False:\n",
        "tests/laws/resume/test_changed_merges.py",
    ),
    Mutation(
        "P7",
        "an input is known by its ctime too",
        "streammerge/output/inputs.py",
        "repr((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino))",
        "repr((s.st_size, s.st_mtime_ns))",
        "tests/laws/resume/test_known_again.py",
    ),
    Mutation(
        "P7",
        "an input with another stamp is refused",
        "streammerge/output/inputs.py",
        "if file.stamp != before[key].stamp]",
        "if False]",
        "tests/laws/resume/test_changed_merges.py tests/laws/resume/test_known_again.py",
    ),
    Mutation(
        "P8",
        "inputs are looked at once more at the end",
        "streammerge/engine/merge.py",
        "                confirm(file, progress.files[file.key], self._hasher)",
        "                pass",
        "tests/laws/resume/test_changing_inputs.py",
    ),
    Mutation(
        "P9",
        "the directory is locked",
        "streammerge/io/lock.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "tests/laws/resume/test_one_writer.py",
    ),
    Mutation(
        "P10",
        "checksums are compared",
        "streammerge/output/check.py",
        'if f"{crc:08x}" != expected or damaged:',
        "if False:",
        "tests/output/verify/test_damage.py",
    ),
    Mutation(
        "P10",
        "the manifest's own checksum is compared",
        "streammerge/output/manifest.py",
        "    if raw != body + _SEAL",
        "    if False and raw != body + _SEAL",
        "tests/output/verify/test_damage.py",
    ),
    Mutation(
        "P10",
        "headers are held against the manifest",
        "streammerge/output/check.py",
        'if (ref.dtype, list(ref.shape)) != (recorded["dtype"], recorded["shape"]):',
        "if False:",
        "tests/output/verify/test_structure.py",
    ),
    Mutation(
        "P11",
        "receipts are held against the bytes",
        "streammerge/engine/merge.py",
        "strict=True) if fine]",
        "strict=True) if fine or True]",
        "tests/laws/resume/test_damage.py",
    ),
    Mutation(
        "P11",
        "lines of a journal have checksums",
        "streammerge/output/journal.py",
        "sound = int(line[:8], 16) == zlib.crc32(line[9:-1])",
        "sound = True",
        "tests/laws/resume/test_damage.py",
    ),
    Mutation(
        "P12",
        "a shard's name leads nowhere else",
        "streammerge/checkpoint/shards.py",
        '    if shard in ("", ".", "..") or any(c in shard for c in "/\\\\\\0") or len(shard) > 255:\n',
        "    if False:\n",
        "tests/checkpoint/test_index.py",
    ),
    Mutation(
        "P12",
        "what a terminal would act on is escaped",
        "streammerge/errors.py",
        "    if not line.isprintable():\n",
        "    if False:\n",
        "tests/laws/hostile",
    ),
    Mutation(
        "P12",
        "names of the outside world are few, and known",
        "streammerge/formats/torch_pickle.py",
        "KNOWN.get((module, name)) or Foreign(",
        'KNOWN.get((module, name), Known("dict")) or Foreign(',
        "tests/formats/test_torch_file.py",
    ),
    Mutation(
        "P12",
        "names that only mean harm are refused",
        "streammerge/formats/torch_pickle.py",
        '        if builtin or module.split(".")[0] in HARMFUL:\n',
        "        if False:\n",
        "tests/formats/test_torch_file.py",
    ),
    Mutation(
        "P12",
        "a header is no longer than the format allows",
        "streammerge/formats/safetensors.py",
        "    if nbytes > MAX_NBYTES:\n        raise",
        "    if False:\n        raise",
        "tests/formats/test_safetensors.py",
    ),
    Mutation(
        "P13",
        "a tensor that a model lacks is found before the first byte",
        "streammerge/planning/resolve/jobs.py",
        "    finder.check([output for output in assembly.outputs if output.name not in copied])\n",
        "",
        "tests/planning/test_plan.py tests/laws/hostile",
    ),
    Mutation(
        "P14",
        "random words are those of the element, not of the piece",
        "streammerge/engine/task.py",
        "tuple(models), base, job.name, start, stop - start",
        "tuple(models), base, job.name, 0, stop - start",
        "tests/laws/test_methods.py -k 'memory and dare'",
    ),
    Mutation(
        "P14",
        "the manifest knows no time",
        "streammerge/output/commit.py",
        '        "streammerge": __version__,\n',
        '        "streammerge": __version__ + str(__import__("time").time_ns()),\n',
        "tests/laws/test_methods.py -k memory",
    ),
    Mutation(
        "P14",
        "matrix products are summed in one thread",
        "streammerge/engine/gram_cache.py",
        "    torch.set_num_threads(1)\n",
        "",
        "tests/estimate/gram -k threads_of_matrix",
    ),
    Mutation(
        "P8",
        "rows of tokens are part of a merge's identity",
        "streammerge/planning/plan.py",
        'else {"tokenizer": self._tokenizer_digest()}',
        "else {}",
        "tests/planning/resolve/test_vocabulary.py -k identity",
    ),
    Mutation(
        "P12",
        "expressions of an adapter take no time",
        "streammerge/checkpoint/adapters/settings.py",
        '            if _SIMPLE.fullmatch(plain) is None or plain.count("(") > 3 or plain.count("|") > 20:\n',
        "            if False:\n",
        "tests/checkpoint/adapters/test_refusals.py -k for_ever",
    ),
    Mutation(
        "P12",
        "tokens have numbers within bounds",
        "streammerge/checkpoint/tokenizer.py",
        "not 0 <= number < MOST_ROWS",
        "False",
        "tests/checkpoint/tokenizers/test_files.py",
    ),
    Mutation(
        "P15",
        "an output is no input",
        "streammerge/output/directory.py",
        "        if target in (places if place.file is None else files):\n",
        "        if False:\n",
        "tests/cli/test_refusals.py -k output",
    ),
    Mutation(
        "P15",
        "files of others are left alone",
        "streammerge/output/directory.py",
        "    if foreign:\n",
        "    if False:\n",
        "tests/cli/test_refusals.py -k output",
    ),
    Mutation(
        "memory",
        "lists of tensors are counted",
        "streammerge/planning/memory/division.py",
        "allocate(self.budget, self.jobs, self.needs, self.lists,",
        "allocate(self.budget, self.jobs, self.needs, 0,",
        MEMORY_PLAN,
    ),
    Mutation(
        "memory",
        "statistics are counted",
        "streammerge/planning/memory/allocate.py",
        "_with_buffers(budget, statistics.nbytes + extra,",
        "_with_buffers(budget, extra,",
        MEMORY_PLAN,
    ),
    Mutation(
        "memory",
        "the most demanding tensor is named",
        "streammerge/planning/memory/allocate.py",
        "or error.needed > refused.needed else",
        "else",
        MEMORY_PLAN,
    ),
    Mutation(
        "memory",
        "what is asked for is found by trial",
        "streammerge/planning/memory/allocate.py",
        "    while True:\n        try:\n            divide(",
        "    while True:\n        return total\n        try:\n            divide(",
        MEMORY_PLAN,
    ),
    Mutation(
        "memory",
        "what is asked for is rounded up",
        "streammerge/units.py",
        "-(-math.ceil(nbytes) // (1 << 20))",
        "(math.ceil(nbytes) // (1 << 20))",
        MEMORY_PLAN,
    ),
    Mutation(
        "memory",
        "a warning of memory that is not there",
        "streammerge/api/deciding.py",
        "notes=() if warning is None else (warning,),",
        "notes=(),",
        MEMORY_PLAN,
    ),
    Mutation(
        "memory",
        "limits of control groups around count",
        "streammerge/machine.py",
        "(inner, *inner.parents)",
        "(root,)",
        MEMORY_PLAN,
    ),
    Mutation(
        "memory",
        "ranks of many models are streamed in small windows",
        "streammerge/planning/memory/allocate.py",
        "bins = max(FEWEST_BINS, min(MOST_BINS, share // of_one_bin))",
        "bins = MOST_BINS",
        MEMORY_SHAPES,
    ),
    Mutation(
        "memory",
        "a sample of many models is small",
        "streammerge/engine/answers.py",
        "max(16, loaded.n >> 16), fitting))",
        "max(16, loaded.n >> 16)))",
        MEMORY_SHAPES,
    ),
    Mutation(
        "memory",
        "few pieces wait for a slow one",
        "streammerge/engine/streaming.py",
        "for p in pieces), in_order=True)",
        "for p in pieces))",
        MEMORY_SHAPES,
    ),
    Mutation(
        "memory",
        "answers are forgotten with their tensor",
        "streammerge/engine/task.py",
        "                worker.answers.pop(job.ordinal, None)",
        "                pass",
        MEMORY_SHAPES,
    ),
    Mutation(
        "memory",
        "open files are shared out",
        "streammerge/machine.py",
        "return min(_MOST_INPUTS, n_threads + (allowed - least) // _EACH)",
        "return _MOST_INPUTS",
        MEMORY_SHAPES,
    ),
    Mutation(
        "memory",
        "too many shards are refused",
        "streammerge/machine.py",
        "    if allowed < least:\n",
        "    if False:\n",
        MEMORY_SHAPES,
    ),
    Mutation(
        "memory",
        "files are closed",
        "streammerge/engine/merge.py",
        "    finally:\n        reader.close()\n",
        "    finally:\n        pass\n",
        MEMORY_SHAPES,
    ),
]


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
