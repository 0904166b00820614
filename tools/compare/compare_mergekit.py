"""Run the same configs, unmodified, through mergekit and through this program, and write down what differs.

    python -m venv mk && mk/bin/pip install mergekit==0.1.5 torch==2.13.0
    python tools/compare/compare_mergekit.py mk            # writes docs/results/mergekit-comparison.md

Tiny llama-shaped models, in float32 and in float64, since mergekit computes in the dtype of the merge. Exits with 1 where
something differs that `mergekit_cases.py` does not explain.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from mergekit_cases import CASES, RANDOM_CASES
from mergekit_differences import Array, Case, Difference, RandomCase
from mergekit_models import HIDDEN, IGNORED_FIELDS, LAYERS, SPREADS, VOCAB, write_models
from mergekit_report import PRECISIONS, Compared, Kept, RandomRow, Row, page
from safetensors.numpy import load_file

from streammerge.api import merge
from streammerge.errors import StreammergeError

PAGE = Path(__file__).parents[2] / "docs" / "results" / "mergekit-comparison.md"


# --- running


class Mergekit:
    """mergekit in its own environment: one process for all cases."""

    def __init__(self, environment: Path) -> None:
        driver = Path(__file__).with_name("mergekit_driver.py")
        command = [str(environment / "bin" / "python"), str(driver), "run_yaml"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, config: Path, out: Path) -> str | None:
        """Merge; return the error, if there is one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        flags = [
            "--no-copy-tokenizer",
            "--quiet",
            "--random-seed",
            "7",
            "--lora-merge-cache",
            str(out.with_name("loras")),
        ]
        self._process.stdin.write(json.dumps([str(config), str(out), *flags]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("mergekit ended: is it installed in this environment?")
        found: str | None = json.loads(answer)
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


_REFERENCES = ("model", "base_model", "source", "tokenizer_source", "path", "lora")


def placed(config: Any, directory: Path) -> Any:
    """Return a config in which models are directories."""
    names = (*SPREADS, "base", "adapter")
    if isinstance(config, str) and all(part in names for part in config.split("+")):
        return "+".join(str(directory / part) for part in config.split("+"))
    if isinstance(config, Mapping):
        return {
            key: placed(value, directory) if key in _REFERENCES or not isinstance(value, str) else value
            for key, value in config.items()
        }
    return [placed(value, directory) for value in config] if isinstance(config, list) else config


def inputs_of(config: Any) -> list[str]:
    """Return the models that a config names, each once: the base first."""
    found: dict[str, None] = {}

    def look(value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in sorted(value.items()):
                found.update(
                    {inner: None} if key in ("base_model", "model") and isinstance(inner, str) else {}
                )
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(config)
    return list(found)


@dataclass(frozen=True)
class Output:
    """The output of a merge, or the reason why there is none."""

    tensors: Mapping[str, Array] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    ids: Mapping[str, int] = field(default_factory=dict)
    """The ids of its tokens, where it has a tokenizer."""


def read(out: Path) -> Output:
    """Return what lies in an output directory."""
    tensors: dict[str, Array] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors.update(load_file(file))
    config = json.loads((out / "config.json").read_text())
    ids: dict[str, int] = {}
    if (out / "tokenizer.json").exists():
        data = json.loads((out / "tokenizer.json").read_text())
        ids = {**data["model"]["vocab"], **{entry["content"]: entry["id"] for entry in data["added_tokens"]}}
    kept = {key: value for key, value in config.items() if key not in IGNORED_FIELDS}
    return Output(tensors, kept, ids=ids)


def by_token(tensor: Array, name: str, ids: Mapping[str, int], wanted: Mapping[str, int]) -> Array:
    """Return a tensor with its rows in the order of another numbering of the same tokens: new ones come in any order."""
    if ids.keys() != wanted.keys() or not name.startswith(("model.embed_tokens", "lm_head")):
        return tensor
    rows = tensor.copy()
    for token, number in wanted.items():
        rows[number] = tensor[ids[token]]
    return rows


class Workshop:
    """The models, and both programs."""

    def __init__(self, work: Path, environment: Path | None) -> None:
        self.work = work
        for dtype in PRECISIONS:
            for old in (work / dtype, work / "loras"):
                shutil.rmtree(old, ignore_errors=True)
            write_models(work / dtype, dtype)
        self._mergekit = Mergekit(environment) if environment is not None else None

    def close(self) -> None:
        """End mergekit."""
        if self._mergekit is not None:
            self._mergekit.close()

    def _written(self, config: Mapping[str, Any], dtype: str) -> Path:
        path = self.work / "config.yml"
        path.write_text(
            yaml.safe_dump({**placed(config, self.work / dtype), "dtype": dtype}, sort_keys=False)
        )
        return path

    def theirs(self, config: Mapping[str, Any], dtype: str) -> Output:
        """Return mergekit's result."""
        assert self._mergekit is not None
        out = self.work / "theirs"
        shutil.rmtree(out, ignore_errors=True)
        error = self._mergekit.run(self._written(config, dtype), out)
        return Output(error=error) if error is not None else read(out)

    def ours(self, config: Mapping[str, Any], dtype: str, more: Mapping[str, Any] | None = None) -> Output:
        """Return this program's result, with parameters beside those of the config."""
        if more:
            config = {**config, "parameters": {**config.get("parameters", {}), **more}}
        out = self.work / "ours"
        shutil.rmtree(out, ignore_errors=True)
        try:
            merge(self._written(config, dtype), out, memory="1GiB", device="cpu")
        except StreammergeError as error:
            return Output(error=str(error).splitlines()[0])
        return read(out)

    def models(self, config: Mapping[str, Any], dtype: str) -> list[Mapping[str, Array]]:
        """Return the tensors of the models that a config names, the base first where there is one."""
        names = dict.fromkeys(name.partition("+")[0] for name in inputs_of(config))
        return [load_file(self.work / dtype / name / "model.safetensors") for name in names]


# --- comparing


def ulp_difference(a: Array, b: Array, operands: Sequence[Array]) -> Array:
    """Return abs(a - b) in units of the spacing of numbers as large as the largest operand."""
    size = np.abs(np.stack([a, b, *operands])).max(axis=0)
    spacing = np.spacing(np.maximum(size, np.finfo(a.dtype).tiny))
    return np.abs(a.astype(np.float64) - b.astype(np.float64)) / spacing.astype(np.float64)


def compare(
    a: Output, b: Output, inputs: Sequence[Mapping[str, Array]], bound: float, *, moved: bool = False
) -> Compared:
    """Compare two outputs, element by element where that can be done."""
    both = [name for name in a.tensors if name in b.tensors]
    same_shape = [name for name in both if a.tensors[name].shape == b.tensors[name].shape]
    worst, beyond, total = 0.0, 0, 0
    for name in same_shape:
        x, y = a.tensors[name], by_token(b.tensors[name], name, b.ids, a.ids)
        if x.dtype != y.dtype:
            y = y.astype(x.dtype)
        operands = [m[name].astype(x.dtype) for m in inputs if name in m and m[name].shape == x.shape]
        if moved:
            operands = [np.full_like(x, np.sqrt(np.square(x.astype(np.float64)).mean()))]
        difference = ulp_difference(x, y, operands)
        difference = np.where(np.isnan(difference), np.inf, difference)
        worst = max(worst, float(difference.max(initial=0.0)))
        beyond, total = beyond + int((difference > bound).sum()), total + x.size
    return Compared(
        a.tensors.keys() == b.tensors.keys() and (not b.ids or a.ids.keys() == b.ids.keys()),
        len(same_shape) == len(both),
        all(a.tensors[name].dtype == b.tensors[name].dtype for name in both),
        a.config == b.config,
        worst,
        beyond / max(1, total),
    )


def judge(workshop: Workshop, case: Case) -> Row:
    """Run a case through both programs and say whether they agree, or differ as is meant."""
    found: dict[str, Compared] = {}
    differing: list[str] = []
    for dtype in PRECISIONS:
        theirs, ours = workshop.theirs(case.config, dtype), workshop.ours(case.config, dtype)
        if theirs.error or ours.error:
            verdict = f"DIFFERENT: mergekit: {theirs.error or 'merges'}; here: {ours.error or 'merges'}"
            return Row(case, found, verdict, False)
        found[dtype] = compare(
            ours, theirs, workshop.models(case.config, dtype), case.bound, moved=case.moved
        )
        if found[dtype].ulp > case.bound:
            differing.append(dtype)
    structure = all(one.names and one.shapes and one.dtypes and one.config for one in found.values())
    if not structure:
        return Row(case, found, "DIFFERENT: names, shapes, dtypes or config", False)
    if case.differs is not None:
        if not differing:
            return Row(case, found, "EQUAL, though a difference is noted for it", False)
        fault = disproof(workshop, case, case.differs, differing)
        most = max(found, key=lambda dtype: found[dtype].differing)
        share = f"{100 * found[most].differing:.3g} % of the elements in {most}"
        said = f"as documented: {case.differs.where}, {share}"
        return Row(case, found, fault or said, fault is None)
    if differing:
        return Row(case, found, "DIFFERENT", False)
    return Row(
        case,
        found,
        "equal" if all(one.ulp == 0 for one in found.values()) else "equal but for rounding",
        True,
    )


def disproof(workshop: Workshop, case: Case, meant: Difference, differing: Sequence[str]) -> str | None:
    """Return why the difference of a case is not the one that is meant, or None if it is."""
    for dtype in differing:
        inputs, theirs = workshop.models(case.config, dtype), workshop.theirs(case.config, dtype)
        if meant.cure:
            other = workshop.ours(case.config, dtype, meant.cure)
        elif meant.theirs is not None:
            wide = [{name: tensor.astype(np.float64) for name, tensor in one.items()} for one in inputs]
            made = {name: meant.theirs(*(one[name] for one in wide)).astype(dtype) for name in wide[0]}
            other = Output(made, theirs.config)
        elif dtype == "float64":
            return "DIFFERENT in float64 too"
        else:
            continue
        left = compare(other, theirs, inputs, case.bound, moved=case.moved).ulp
        if other.error or left > case.bound:
            return f"DIFFERENT by {left:.3g} ulp in {dtype} beside what is meant"
    return None


# --- random drops


def kept_of(output: Output, base: Mapping[str, Array], tuned: Mapping[str, Array]) -> Kept:
    """Measure an output; halves are those of the magnitudes of each row."""
    kept, low, high, added, whole = [], [], [], 0.0, 0.0
    for name, before in base.items():
        delta, moved = (m[name].astype(np.float64) - before for m in (tuned, output.tensors))
        mask = (moved != 0).reshape(-1, before.shape[-1])
        ranks = np.abs(delta).reshape(mask.shape).argsort(axis=1).argsort(axis=1)
        below = ranks < mask.shape[1] // 2
        kept.append(mask.ravel())
        low.append(mask[below])
        high.append(mask[~below])
        added, whole = added + float(np.abs(moved).sum()), whole + float(np.abs(delta).sum())
    fraction, smaller, larger = (float(np.concatenate(masks).mean()) for masks in (kept, low, high))
    return Kept(fraction, smaller, larger, added / whole)


def judge_random(workshop: Workshop, case: RandomCase) -> RandomRow:
    """Measure a random case in float32 and say whether what is left is what the config asks for."""
    base, tuned = workshop.models(case.config, "float32")
    outputs = [
        workshop.theirs(case.config, "float32"),
        workshop.ours(case.config, "float32"),
        workshop.ours(case.config, "float32", case.cure),
    ]
    if error := next((one.error for one in outputs if one.error), None):
        raise SystemExit(f"{case.name}: {error}")
    theirs, ours, cured = (kept_of(one, base, tuned) for one in outputs)
    n = sum(tensor.size for tensor in base.values())
    deviation = 5 * (case.density * (1 - case.density) / n) ** 0.5
    halves = [(one.smaller_half, one.larger_half) for one in (theirs, ours, cured)]
    problems = [abs(one.fraction - case.density) > deviation for one in (theirs, ours, cured)] + [
        abs((high - low) - case.spread) > 3 * deviation for low, high in halves
    ]
    # mergekit gives the norm back exactly; dividing by probabilities does so on average.
    if case.cure:
        problems += [abs(one.norm - 1) > 1e-4 for one in (theirs, cured)] + [abs(ours.norm - 1) > 0.05]
    verdict = "DIFFERENT" if any(problems) else "same statistics"
    return RandomRow(case, theirs, ours, cured, verdict, not any(problems))


def main() -> None:
    """Compare, print, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environment", type=Path, help="a virtual environment with mergekit")
    parser.add_argument(
        "--work", type=Path, help="where models and outputs go (default: a temporary directory)"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this; the page is not written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workshop = Workshop(options.work or Path(temporary), options.environment)
        rows, random_rows = [], []
        for case in CASES:
            if options.only in case.name:
                rows.append(judge(workshop, case))
                found = {dtype: one.ulp for dtype, one in rows[-1].found.items()}
                print(
                    f"{case.name:60} {found.get('float32', -1):10.3g} {found.get('float64', -1):10.3g}  {rows[-1].verdict}",
                    flush=True,
                )
        for random_case in RANDOM_CASES:
            if options.only in random_case.name:
                random_rows.append(judge_random(workshop, random_case))
                print(f"{random_case.name:60} {random_rows[-1].verdict}", flush=True)
        workshop.close()
    if not options.only:
        PAGE.write_text(page(rows, random_rows, f"{LAYERS} layers of {HIDDEN}, {VOCAB} tokens"))
    wrong = [row for row in (*rows, *random_rows) if not row.explained]
    print(f"{len(rows)} cases, {len(random_rows)} random ones, {len(wrong)} that are not explained")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
