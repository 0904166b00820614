"""Where the working files of an output lie: in its directory, or in the store that holds it."""

from __future__ import annotations

from pathlib import Path

from streammerge.io.volumes import is_url
from streammerge.output.object_volume import ObjectFolder
from streammerge.output.volume import Folder, Volume


def working_files(state: Path, run: str = "") -> Volume:
    """Return the volume of the working files of an output.

    Parameters
    ----------
    state
        Their directory or URL, `Place.state`.
    run
        The run that this process takes part in; empty if it only looks.
    """
    return ObjectFolder(str(state), run) if is_url(state) else Folder(state)
