"""Measure merges against what the disk can do, and against mergekit.

    bash tools/bench WORKDIR                          # 4 models of 1.7 GB, every method, 5 cold runs of each
    bash tools/bench WORKDIR --methods linear,ties --runs 3 --mergekit VENV --warm
    bash tools/bench WORKDIR --methods ties --sizes 1.7GB,5GB,10GB --memory 512MiB,4GiB
    bash tools/bench WORKDIR --methods ties --device cpu,cuda --memory 4GiB
    bash tools/bench WORKDIR --methods ties --against ../before    # another checkout of this repository
    bash tools/bench --render WORKDIR/bench.json      # the report and the plot from earlier figures

A shared disk's speed varies severalfold within minutes, so every merge runs right after its own limit: the time of
direct reads of the files it merges beside direct writes of the bytes it writes (disk_limit.py), which computes
nothing. The merge then begins with a dropped page cache (which needs root; without, and with --no-drop, the report
says so). --warm adds as many pairs with the inputs in the page cache. --against runs an earlier checkout right after
each merge, in the same interpreter. Writes bench.md, bench.json after each run and, where matplotlib is installed,
bench.png, all of it, models included, in WORKDIR. Models and Fisher stores are made once and kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_measure import (
    Case,
    Run,
    Usage,
    drop_caches,
    fill_cache,
    gpu,
    machine,
    measure,
    measure_limit,
    meminfo,
)
from bench_place import METHODS, STREAMMERGE, TINY, Workplace, check_space, say
from bench_report import GB, MIB, Results, plot, report

from streammerge.errors import InputError
from streammerge.units import parse_size

MAIN = "from streammerge.cli import main; main()"
COMPILE = "from streammerge.backends.cpu.compile import ensure_compiled; sys.exit(ensure_compiled())"


@dataclass(frozen=True)
class Bench:
    """The settings of a benchmark."""

    place: Workplace
    mergekit: Path | None
    """The virtual environment that holds mergekit."""
    drop: bool = True
    """True if the page cache may be dropped."""
    against: Path | None = None
    """An earlier checkout of this repository."""

    @property
    def ours(self) -> tuple[str, ...]:
        """This checkout, and the earlier one where one is named."""
        return ("streammerge",) if self.against is None else ("streammerge", "before")

    def interpreter(self, program: str, code: str) -> list[str | Path]:
        """Return the command line of Python code; in an earlier checkout, whatever else is installed."""
        if program == "before":
            assert self.against is not None
            return [
                sys.executable,
                "-c",
                f"import sys; sys.path.insert(0, sys.argv.pop(1)); {code}",
                self.against,
            ]
        return [sys.executable, "-c", f"import sys; {code}"]

    def command(self, case: Case, config: Path) -> list[str | Path]:
        """Return the command line of a case."""
        if case.program == "mergekit":
            assert self.mergekit is not None
            program = self.mergekit / "bin" / "mergekit-yaml"
            return [program, config, self.place.out, "--quiet", "--no-copy-tokenizer"]
        options = ["--memory", case.memory, "--quiet", "--device", case.device]
        program = self.interpreter("before", MAIN) if case.program == "before" else STREAMMERGE
        return [*program, "merge", config, self.place.out, *options]

    def environment(self, program: str) -> dict[str, str]:
        """Return what keeps a program's caches below WORKDIR, and mergekit off the network.

        Python's byte code is cached even where the caller's environment forbids it: a package installed by
        pip, as mergekit is, comes with it, one run from its sources does not.
        """
        cache = self.place.path / ("cache-before" if program == "before" else "cache")
        if program == "mergekit":
            return {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        byte_code = {"PYTHONPYCACHEPREFIX": str(cache / "python"), "PYTHONDONTWRITEBYTECODE": ""}
        return {"XDG_CACHE_HOME": str(cache), **byte_code}

    def merge(self, case: Case) -> tuple[Usage, str]:
        """Run a case and remove its output; return what it used, and what went wrong if anything did."""
        config, out = self.place.write_config(case.method, case.size), self.place.out
        shutil.rmtree(out, ignore_errors=True)
        usage, words = measure(self.command(case, config), self.environment(case.program))
        written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        shutil.rmtree(out, ignore_errors=True)
        words = self.place.scrub(words)
        failure = f"exit code {usage.exit_code}\n{words}" if usage.exit_code else ""
        if not failure and abs(written - self.place.nbytes(case.size)) > MIB:
            failure = f"wrote {written} bytes instead of {self.place.nbytes(case.size)}\n{words}"
        return usage, failure

    def pair(self, case: Case, number: int, warm: bool = False) -> Run:
        """Measure a limit and, right after it, the merge it belongs to."""
        inputs = self.place.inputs(METHODS[case.method], case.size)
        nbytes = self.place.nbytes(case.size)

        def prepare() -> str:
            if warm:
                os.sync()
                fill_cache(inputs)
                return "warm"
            return "cold" if self.drop and drop_caches() else "as found"

        prepare()
        limit = measure_limit(self.place.path / "zeros", inputs, nbytes)
        cache = prepare()
        usage, failure = self.merge(case)
        read = sum(path.stat().st_size for path in inputs)
        run = Run(case, number, cache, nbytes, limit, usage, failure, read)
        say(
            f"{case.program} {case.method} {case.memory} {case.device}, {nbytes / GB:.2f} GB, run {number + 1}, {cache}: "
            f"limit {limit.limit_s:.2f} s, wall {usage.wall_s:.2f} s, peak {usage.peak_nbytes / MIB:.0f} MiB"
            + (f", FAILED: {failure}" if failure else "")
        )
        return run

    def start(self, methods: Sequence[str], memory: str, devices: Sequence[str]) -> dict[str, float]:
        """Compile all kernels, which merges of tiny models would not, and merge such: with every method, and once more.

        The last one tells what starting costs: the seconds by program. A method that fails here fails in its runs as
        well, where it is reported.
        """
        say("compiling the kernels")
        for program in self.ours:
            usage, words = measure(self.interpreter(program, COMPILE), self.environment(program))
            if usage.exit_code:
                sys.exit(f"the kernels cannot be compiled:\n{words}")
        self.place.make_models(TINY)
        if any(METHODS[method].fisher for method in methods):
            self.place.make_stores(TINY)
        for method in methods:
            for program in self.ours:
                self.merge(Case(program, method, TINY, memory))
        start = {}
        for device in devices:
            case = Case("streammerge", methods[0], TINY, memory, device)
            self.merge(case)
            start["streammerge" if device == "cpu" else f"streammerge on {device}"] = self.merge(case)[
                0
            ].wall_s
        shared = [method for method in methods if METHODS[method].shared]
        if self.mergekit is not None and shared:
            case = Case("mergekit", shared[0], TINY, "")
            self.merge(case)
            start["mergekit"] = self.merge(case)[0].wall_s
        return start

    def runs(self, args: argparse.Namespace) -> Iterator[Run]:
        """Yield every run; what is to be compared stands next to each other in time."""
        for size in args.sizes:
            self.place.make_models(size)
            if any(METHODS[method].fisher for method in args.methods):
                self.place.make_stores(size)
            for method in args.methods:
                cases = [
                    Case(program, method, size, memory, device)
                    for memory in args.memory
                    for device in args.device
                    for program in self.ours
                ]
                if self.mergekit is not None and METHODS[method].shared:
                    cases.append(Case("mergekit", method, size, ""))
                yield from (self.pair(case, number) for number in range(args.runs) for case in cases)
                if args.warm and self.fits_cache(method, size):
                    yield from (
                        self.pair(case, number, True) for number in range(args.runs) for case in cases
                    )

    def fits_cache(self, method: str, size: str) -> bool:
        """Return whether inputs and output lie in the page cache together, beside a merge of 4 GiB."""
        inputs = sum(path.stat().st_size for path in self.place.inputs(METHODS[method], size))
        fits = inputs + self.place.nbytes(size) + (4 << 30) < meminfo("MemAvailable")
        if not fits:
            say(f"no warm run of {method} at {size}: it does not fit in the page cache")
        return fits


def comma_list(text: str) -> list[str]:
    """Return the parts of a comma-separated list, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path, nargs="?", help="for models, outputs, caches and the report")
    parser.add_argument(
        "--sizes", default="1.7GB", help="size of each of the four models, one or more [1.7GB]"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {','.join(METHODS)} [all]")
    parser.add_argument("--memory", default="512MiB", help="one or more [512MiB]")
    parser.add_argument("--device", default="cpu", help="one or more of cpu, cuda[:N] [cpu]")
    parser.add_argument("--runs", type=int, default=5, help="pairs of each [5]")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="measure that one, too")
    parser.add_argument("--warm", action="store_true", help="and as many with a warm page cache")
    parser.add_argument("--mergekit", type=Path, metavar="VENV", help="measure the mergekit installed there")
    parser.add_argument(
        "--no-drop", action="store_true", help="leave the page cache alone: a trial, not a figure"
    )
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing; report earlier figures")
    args = parser.parse_args(arguments)
    if (args.workdir is None) == (args.render is None):
        parser.error("give either WORKDIR or --render JSON")
    for option in ("sizes", "methods", "memory", "device"):
        setattr(args, option, comma_list(getattr(args, option)))
        if not getattr(args, option):
            parser.error(f"--{option} is empty")
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"--methods: unknown {', '.join(sorted(unknown))}; known: {', '.join(METHODS)}")
    try:
        for text in (*args.sizes, *args.memory):
            parse_size(text)
    except InputError as error:
        parser.error(str(error))
    if args.runs < 1:
        parser.error("--runs takes a number from 1")
    return args


def write_report(results: Results, path: Path) -> None:
    """Print and write the report, and draw the plot."""
    text = report(results)
    path.write_text(text)
    drawn = plot(results, path.with_suffix(".png"))
    say(
        f"wrote {path}"
        if drawn
        else f"wrote {path}; no plot: install matplotlib, then --render the JSON file"
    )
    print(text, end="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; the exit code tells whether every run was good."""
    args = parse_args(arguments)
    if args.render is not None:
        write_report(Results.load(args.render), args.render.with_suffix(".md"))
        return 0
    args.workdir.mkdir(parents=True, exist_ok=True)
    place = Workplace(args.workdir.resolve())
    check_space(place, args.sizes, any(METHODS[method].fisher for method in args.methods))
    mergekit = Path(os.path.abspath(args.mergekit)) if args.mergekit else None
    data = machine(mergekit)
    if not args.no_drop and not drop_caches():
        say("the page cache cannot be dropped (no permission): the runs will not be cold")
    bench = Bench(place, mergekit, not args.no_drop, args.against and args.against.resolve())
    if set(args.device) != {"cpu"}:
        data |= gpu()
    results = Results(data, bench.start(args.methods, args.memory[0], args.device), [])
    for run in bench.runs(args):
        results.runs.append(run)
        results.save(place.path / "bench.json")
    write_report(results, place.path / "bench.md")
    return 1 if any(run.failure for run in results.runs) else 0


if __name__ == "__main__":
    sys.exit(main())
