"""Where numba is missing everything works through torch, with the same bytes and a warning."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from streammerge.algebra.task_vectors import TaskVector
from streammerge.estimate.fisher.sums import DiagonalSums
from streammerge.numerics.compiled import missing_kernels
from streammerge.numerics.philox import derive_key
from streammerge.statistics.random_words import LowWords, low_words
from tests.conftest import config_for
from tests.patience import PATIENCE

WITHOUT = "import sys; sys.modules['numba'] = None; from streammerge.cli import main; main()"


def test_a_merge_without_numba_has_the_same_bytes_and_says_that_it_is_slower(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models()
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(config_for("dare_ties", paths, parameters={"density": 0.5})))
    outputs = []
    for name, code in (("with", "from streammerge.cli import main; main()"), ("without", WITHOUT)):
        out = tmp_path / name
        done = subprocess.run(
            [sys.executable, "-c", code, "merge", str(config), str(out)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert ("compiled kernels cannot be used" in done.stderr) == (name == "without")
        outputs.append({p.name: p.read_bytes() for p in out.iterdir() if p.suffix == ".safetensors"})
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("n", [5, 4099, (1 << 20) + 3])
def test_exact_drop_counts_agree(n: int, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    statistic, key = LowWords(TaskVector(0), density), derive_key(3, "dare", "m", "t")
    compiled = low_words(statistic, n, key)
    monkeypatch.setattr("streammerge.statistics.random_words.is_compiled", lambda name: False)
    assert low_words(statistic, n, key) == compiled


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("n", [1, 4096, 10_001])
def test_recorded_sums_of_a_diagonal_agree(n: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).gamma(0.3, size=n).astype(np.float32)
    values[::7] = 0
    stored = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(
            "streammerge.estimate.fisher.sums.is_compiled", lambda name, compiled=compiled: compiled
        )
        sums = DiagonalSums("t", dtype)
        sums.add(stored[: n // 2])
        sums.add(stored[n // 2 :])
        found.append(sums.values())
    assert found[0] == found[1]


def test_numba_is_here_for_the_other_tests() -> None:
    assert missing_kernels() is None
