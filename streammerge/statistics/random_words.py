"""A statistic of the random stream: the word up to which exactly the wanted number of elements is dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Call
from streammerge.algebra.extent import Extent
from streammerge.algebra.task_vectors import TaskVector
from streammerge.numerics.compiled import is_compiled
from streammerge.numerics.philox import Key
from streammerge.numerics.philox import words as random_words
from streammerge.numerics.ready import Loops
from streammerge.records import dataclass
from streammerge.statistics.base import Known, Measurement, Source, Statistic, integers

_WORDS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class LowWords(Statistic[tuple[int, int]]):
    """The (word, element) below which exactly round(rate * n) elements of a tensor lie.

    The value (w, e) selects the elements whose word is below w, and those before element e whose word equals w. It
    depends only on the random stream; no data is read.
    """

    source = Source.NOTHING
    vector: TaskVector
    rate: float
    extent: Extent = Extent.TENSOR

    def calls(self) -> tuple[Call, ...]:
        """Return the kernel of the random stream that it calls."""
        return (Call("words_between"),)

    def count(self, n: int) -> int:
        """Return how many of `n` elements are dropped."""
        return round(self.rate * n)

    def placeholder(self) -> tuple[int, int]:
        """Return the lowest word."""
        return (1, 0)

    def reducer(self, over: Measurement) -> Known[tuple[int, int]]:
        """Return the value, computed from the random stream."""
        (tensor,) = over.tensors
        return Known(low_words(self, tensor.n, over.keys.key("dare", self.vector.stream, tensor.name)))

    def to_json(self, value: tuple[int, int]) -> object:
        """Return the word and the element."""
        return {"pair": list(value)}

    def from_json(self, plain: Any) -> tuple[int, int]:
        """Return the word and the element."""
        match plain:
            case {"pair": [int(word), int(element)]}:
                word, element = integers([word, element])
                return word, element
        raise ValueError("no word and element")


def low_words(statistic: LowWords, n: int, key: Key) -> tuple[int, int]:
    """Return the (word, element) below which the wanted number of `n` elements lies; see `LowWords`.

    The words are uniform, so the wanted word lies within a few standard deviations of its expectation. Words in a
    window around the expectation are sorted, and words below it counted. The counts prove that the wanted word lies
    in the window; otherwise the window grows.
    """
    count = statistic.count(n)
    if count <= 0:
        return 0, 0
    share = count / n
    width = 8.0 * (share * (1.0 - share) / n) ** 0.5 + 8.0 / n
    while True:
        low, high = (int(min(1.0, max(0.0, share + side * width)) * 2**32) for side in (-1, 1))
        room = int(n * min(1.0, 2.0 * width) * 1.5) + 64
        words, elements = np.empty(room, np.int64), np.empty(room, np.int64)
        below, found = _words_between(n, key, low, high, words, elements)
        if below < count <= below + found and found <= room:
            order = np.lexsort((elements[:found], words[:found]))
            last = order[count - below - 1]
            return int(words[last]), int(elements[last]) + 1
        width *= 4.0


def _words_between(
    n: int, key: Key, low: int, high: int, words: NDArray[np.int64], elements: NDArray[np.int64]
) -> tuple[int, int]:
    """Run the kernel of this name if it is compiled, else the same computation in torch."""
    if is_compiled("words"):
        loop = Loops("kernels.deltas").words_between
        below, found = loop(0, n, np.array(key, np.uint32), low, high, words, elements)
        return int(below), int(found)
    below, found = 0, 0
    for start in range(0, n, _WORDS_AT_ONCE):
        drawn = random_words(key, start, min(n, start + _WORDS_AT_ONCE)).numpy()
        below += int(np.count_nonzero(drawn < low))
        inside = np.flatnonzero((drawn >= low) & (drawn <= high))
        kept = inside[: max(0, len(words) - found)]
        words[found : found + kept.size] = drawn[kept]
        elements[found : found + kept.size] = start + kept
        found += inside.size
    return below, found
