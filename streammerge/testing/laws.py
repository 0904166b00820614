"""The laws of methods; each is a function of one trial that raises AssertionError if the law is broken."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from streammerge.methods.registry import Method
from streammerge.testing.models import read_tensors
from streammerge.testing.trial import Trial, difference

INTERRUPTIONS = (2, 9)
"""Number of checks of the stop signal after which a merge is stopped: in its first pieces, and later."""

_MEASURE = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
to_log = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
_, status, usage = os.wait4(os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ, file_actions=to_log), 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10)
"""
"""Runs a command and prints its exit code and peak in bytes. It is small, since a child's peak begins at its parent's."""


def assert_same(trial: Trial, outputs: Mapping[str, bytes], name: str, law: str) -> None:
    """Raise AssertionError unless the files of a merge equal those of the merge with plenty of memory."""
    _assert_equal(trial, ("expected", trial.expected()), (name, outputs), law)


def _assert_equal(
    trial: Trial, one: tuple[str, Mapping[str, bytes]], other: tuple[str, Mapping[str, bytes]], law: str
) -> None:
    """Raise AssertionError unless two merges, each given by name and files, have the same files."""
    (first, expected), (second, outputs) = one, other
    if outputs == expected:
        return
    files = sorted(file for file in {*expected, *outputs} if expected.get(file) != outputs.get(file))
    where = difference(trial.tensors(first), trial.tensors(second)) or f"files {', '.join(files)}"
    raise AssertionError(f"{trial.title}: {law} ({where})")


def same_bytes_at_any_memory(trial: Trial) -> None:
    """Merge with the least memory that suffices, with many small pieces, and with other kinds of I/O."""
    least = trial.least()
    cure = _cure_of_cuts(trial.method)
    law = f"the bytes depend on how the tensors are cut; {cure}"
    assert_same(trial, trial.merge("streamed", least, 3), "streamed", law)
    assert_same(trial, trial.merge("mapped", least, 3, io="mmap"), "mapped", law)
    assert_same(trial, trial.merge("cut", max(least, 1 << 23), 40), "cut", law)


def _cure_of_cuts(method: Method) -> str:
    wider = {"elementwise": "row", "row": "tensor"}.get(str(method.access))
    if not method.is_formula or wider is None:
        return (
            "let each result depend only on the elements, the parameters and the statistics, in a fixed order"
        )
    return f'if elements depend on their neighbours, declare access="{wider}" (it is {str(method.access)!r})'


def same_bytes_when_interrupted(trial: Trial) -> None:
    """Stop the merge in the middle, and run it again."""
    least = trial.least()
    for questions in INTERRUPTIONS:
        name = f"interrupted {questions}"
        outputs = trial.interrupted(name, questions, nbytes=least)
        if outputs is not None:
            assert_same(trial, outputs, name, "an interrupted and resumed merge gives different bytes")


def same_bytes_in_torch(trial: Trial) -> None:
    """Merge by compiled kernels and by torch formulas."""
    kernels, formulas = trial.merge("kernels", kernels=True), trial.merge("torch", kernels=False)
    law = "the torch formulas give different bytes from the compiled kernels"
    _assert_equal(trial, ("kernels", kernels), ("torch", formulas), law)


def same_bytes_with_any_threads_of_torch(trial: Trial) -> None:
    """Merge while torch may use four threads, which must not change any sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        outputs = trial.merge("four threads")
    finally:
        torch.set_num_threads(before)
    assert_same(trial, outputs, "four threads", "the bytes depend on torch's threads")


def shapes_and_dtypes_are_kept(trial: Trial) -> None:
    """Compare names, shapes and dtypes with those of the first model."""
    trial.expected()
    template = trial.config.get("base_model") or trial.config["models"][0]["model"]
    merged = trial.tensors("expected")
    for name, tensor in read_tensors(Path(template)).items():
        assert name in merged, f"{trial.title}: tensor {name!r} is missing from the output"
        found = (tuple(merged[name].shape), merged[name].dtype)
        assert found == (tuple(tensor.shape), tensor.dtype), (
            f"{trial.title}: tensor {name!r} became {found}; return a tensor with the shape of models[0]"
        )


def order_matters_only_to_rounding(trial: Trial) -> None:
    """Merge with the models in reverse order; all models must have the same parameters."""
    config = {**trial.config, "models": list(reversed(trial.config["models"]))}
    turned = replace(trial, config=config, directory=trial.directory / "reversed", _outputs={})
    trial.expected()
    turned.expected()
    first, second = trial.tensors("expected"), turned.tensors("expected")
    for name, tensor in first.items():
        width = max(torch.finfo(tensor.dtype).eps, 2e-7) if tensor.is_floating_point() else 0.0
        close = torch.isclose(second[name].double(), tensor.double(), rtol=width, atol=1e-12)
        assert close.all(), f"{trial.title}: tensor {name!r} depends on the order of the models"


def plans_travel(trial: Trial) -> None:
    """Pickle and unpickle the plan, as for a worker in a different process."""
    decided = trial.plan()
    try:
        again = pickle.loads(pickle.dumps(decided))
    except Exception as error:
        raise AssertionError(
            f"{trial.title}: its plan does not pickle ({type(error).__name__}: {error}); define the method in a file"
        ) from error
    assert again.identity() == decided.identity(), f"{trial.title}: a pickled plan has a different identity"


def peak_is_within_memory(trial: Trial) -> None:
    """Merge in a separate process with the least memory of the plan, and measure the peak.

    The trial's models must be large: below some tens of MiB, the process's own memory hides the method's.
    """
    import streammerge

    decided = streammerge.plan(
        dict(trial.config), methods=trial.methods, device="cpu", memory="16GiB", threads=2
    )
    assert decided.division is not None
    least = decided.division.least()
    config, log = trial.directory / "peak.yml", trial.directory / "peak.log"
    config.write_text(yaml.safe_dump(dict(trial.config)))
    command = [sys.executable, "-m", "streammerge", "merge", str(config), str(trial.directory / "peak")]
    command += ["--memory", str(least), "--threads", "2", "--device", "cpu"]
    command += ["--methods", str(trial.methods)] if trial.methods else []
    done = subprocess.run(
        [sys.executable, "-S", "-c", _MEASURE, str(log), *command], check=False, stdout=subprocess.PIPE
    )
    code, peak = map(int, done.stdout.split())
    text = log.read_text(errors="replace")[-500:]
    assert code == 0, f"{trial.title}: the merge failed: {text}"
    assert peak <= least, (
        f"{trial.title}: used {peak >> 20} MiB with --memory {least >> 20}MiB; declare what the formula needs: "
        "@method(..., workspace=...)"
    )
