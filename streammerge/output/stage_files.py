"""The small files of a stage's result, in a temporary folder while the program runs. Its weights are never written."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from streammerge.checkpoint.sidecars import unreadable
from streammerge.io.durable import world_errors
from streammerge.planning.files.config_json import spelled
from streammerge.planning.plan import MergePlan


def stage_folder(plan: MergePlan) -> Path:
    """Return a folder with the config.json, the tokenizer and all other files of the plan's output except weights.

    Links do not work: those that lead out of a model's folder are not trusted. The folder is removed when the program
    ends.

    Raises
    ------
    WorldError
        If the system has no room for temporary files.
    """
    where = Path(tempfile.gettempdir())
    with world_errors(where):
        folder = Path(tempfile.mkdtemp(prefix="streammerge-stage-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        made = {} if plan.tokenizer is None else dict(plan.tokenizer.changed)
        for name in plan.settings.keys() & plan.beside.files.keys():
            made[name] = spelled(plan.settings[name], _read(plan.beside.files[name].path))
        for name, data in made.items():
            _in_folder(folder, name).write_bytes(data)
        for name, stamp in plan.beside.files.items():
            if name not in made:
                shutil.copyfile(stamp.path, _in_folder(folder, name))
    return folder


def _in_folder(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
