"""Cheap checks, so that `plan` refuses what `merge` would refuse before its first byte."""

from __future__ import annotations

from pathlib import Path

from streammerge.engine.object_session import check_streamable
from streammerge.engine.opening import with_stages
from streammerge.engine.session import Options
from streammerge.io import volumes
from streammerge.io.reader import Reader
from streammerge.io.volumes import is_url
from streammerge.output.directory import check_contents, check_target
from streammerge.output.identity import identify
from streammerge.output.object_place import check_object_target, present_in
from streammerge.output.place import place_of
from streammerge.planning.plan import MergePlan

_BLOCK = 512
"""Bytes; the unit of ``st_blocks``."""


def check_beforehand(plan: MergePlan, out: Path | None) -> None:
    """Refuse what a merge into `out` would refuse at its start; without `out`, what any merge would.

    If random numbers are drawn, samples of the models are read to detect models with the same content.

    Raises
    ------
    StreammergeError
        As the merge would.
    """
    if out is not None and is_url(out):
        check_object_target(place_of(out), [stamp.path for some in plan.stamped.values() for stamp in some])
        check_streamable(plan, Options())
        present_in(place_of(out))
    elif out is not None:
        place = place_of(out)
        check_target(place, plan.inputs, [index.reference for index in plan.stores])
        if place.folder.is_dir():
            check_contents(place)
    if plan.random and _have_data(plan):
        reader = with_stages(Reader(), plan)
        try:
            identify(plan, reader)
        finally:
            reader.close()


def _have_data(plan: MergePlan) -> bool:
    """Return whether all files have data; large models are often planned from headers without data."""
    return all(
        volumes.stat(stamp.path).st_blocks * _BLOCK >= stamp.nbytes // 2
        for index in plan.inputs
        for stamp in index.stamps
    )
