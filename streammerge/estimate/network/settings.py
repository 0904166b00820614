"""Settings of every estimate that passes examples through a network."""

from __future__ import annotations

import os

from streammerge.checkpoint.index import TensorIndex
from streammerge.estimate.network.examples import Example, read_examples, too_few
from streammerge.estimate.network.skeleton import Skeleton
from streammerge.estimate.network.tokenizing import reading_for
from streammerge.events import Control
from streammerge.records import dataclass


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Settings of a run over examples."""

    examples: int | None = None
    """Number of examples, from the first; None: all."""
    max_length: int = 512
    """Examples are truncated to this number of tokens."""
    batch_size: int = 16
    """Examples that are read and written at a time; the values do not depend on it."""
    memory: int | None = None
    """Bound of the peak resident memory in bytes; None: half of what is free."""
    device: str = "cpu"

    def read(
        self,
        data: str | os.PathLike[str],
        skeleton: Skeleton,
        index: TensorIndex,
        control: Control,
        *,
        with_labels: bool = False,
    ) -> list[Example]:
        """Read the examples, shortest first; warn if there are fewer than were asked for.

        Raises
        ------
        ModelError
            If the file or one of its lines is malformed.
        """
        path = os.fspath(data)
        reading = reading_for(skeleton, index, self.max_length, with_labels=with_labels)
        taken = read_examples(path, self.examples, reading)
        if (few := too_few(path, self.examples, len(taken))) is not None:
            control.warn(few)
        return taken
