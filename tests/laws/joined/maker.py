"""What processes that fork merges have in common: how they are set up, and who writes models and configs for them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process of one thread may be forked

from streammerge.engine import scheduler
from streammerge.output.heartbeat import STALE_SECONDS
from streammerge.planning.memory import budget
from tests.fixed_budget import Fixed
from tests.laws.joined.scene import SHAPES, STALE, Scene
from tests.laws.resume.forks import fork, wait, warm

DARE = ("dare_linear", {"density": 0.4})
MAJORITY = ("ties", {"density": 0.4, "zero_sign": "majority", "ties": "drop", "weight": 0.3})
"""Statistics of each tensor, then of the whole model."""
WHOLE = ("ties", {"density": 0.3, "trim_scope": "model", "ties": "index"})
"""Two rounds over the whole model, several passes each, the last of them over a few elements."""
PLAIN = {method for method, _ in (DARE, MAJORITY, WHOLE)}
"""Methods that need no stores."""
_ROOM = tempfile.TemporaryDirectory()
_TEMPLATE = Path(_ROOM.name)
"""Models, and a config over them for each plain method. They are copied, because writing them needs torch: a second each."""


def use(capacity: int) -> None:
    """Give later merges buffers of so many bytes."""
    budget.make_budget = lambda memory, n, reserve: Fixed(reserve + capacity, reserve, 1)


def prepare() -> None:
    """Set up this process and all its forks, and compile the kernels."""
    os.environ[STALE_SECONDS] = str(STALE)
    scheduler._SYNC_SECONDS = 0.02
    for name in ("fsync", "fdatasync"):
        setattr(os, name, lambda descriptor: None)  # nothing here cuts the power
    use(1 << 17)  # so small that the work is cut to pieces
    assert wait(fork(_write_template), 300) == 0
    warm(join=True)


def _write_template() -> None:
    from tests.conftest import config_for, write_models

    paths = write_models(_TEMPLATE, n_models=3, shapes=SHAPES)
    for path in paths:
        (path / "tokenizer.json").write_text(f"{{}} of {path.name}")
    for method in PLAIN:
        (_TEMPLATE / f"{method}.json").write_text(json.dumps(config_for(method, paths, seed=3)))


class Maker:
    """Writes models and configs, and makes scenes of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, cases: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        """Write the config of each case, and the models and stores that it names."""
        paths = [self.directory / name for name in ("base", "m1", "m2", "m3")]
        if not paths[0].exists():
            for path in paths:
                shutil.copytree(_TEMPLATE / path.name, path)

        def with_stores() -> None:
            from tests.conftest import config_for

            for name, (method, parameters) in cases.items():
                config = config_for(method, paths, parameters=parameters, seed=3)
                (self.directory / f"{name}.json").write_text(json.dumps(config, default=str))

        if not {method for method, _ in cases.values()} <= PLAIN:
            assert wait(fork(with_stores), 300) == 0  # torch has threads
            return
        for name, (method, parameters) in cases.items():
            text = (_TEMPLATE / f"{method}.json").read_text().replace(str(_TEMPLATE), str(self.directory))
            (self.directory / f"{name}.json").write_text(
                json.dumps({**json.loads(text), "parameters": parameters})
            )

    def config(self, name: str) -> dict[str, Any]:
        """Return the config of a case."""
        found: dict[str, Any] = json.loads((self.directory / f"{name}.json").read_text())
        return found

    def __call__(self, method: str, parameters: dict[str, Any]) -> Scene:
        """Return the scene of one case."""
        self.write({"out": (method, parameters)})
        return Scene(self.directory, self.config("out"))
