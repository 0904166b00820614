"""Random words that depend only on (seed, purpose, model, tensor, element).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) run as a
counter-based generator: it has no state, so the words do not depend on chunks, threads, devices, shards or
interruptions. `SCHEME` names the version of the scheme.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING

from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch

SCHEME = "streammerge-rng-1"
_MASK = 0xFFFFFFFF

Key = tuple[int, int, int, int]


@dataclass(frozen=True)
class RandomKeys:
    """The seed of a merge, and the models' names in the random stream."""

    seed: int
    models: tuple[str, ...]
    """Alias of each model, or a fingerprint of its content; neither its position in the list nor its path."""
    members: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Indices of the models that a tensor is merged from, in order; None: all of them."""

    def key(self, purpose: str, model: int | None, tensor: str) -> Key:
        """Return the four 32-bit key words of one model's tensor for one purpose.

        `model` None means the stream that all models share.
        """
        if model is not None and tensor in self.members:
            model = self.members[tensor][model]
        return derive_key(self.seed, purpose, "" if model is None else self.models[model], tensor)


def derive_key(seed: int, purpose: str, model: str, tensor: str) -> Key:
    """Hash the coordinates of a random stream; length prefixes separate the parts.

    >>> [f"{k:08x}" for k in derive_key(42, "dare", "a", "model.layers.0.mlp.down_proj.weight")]
    ['126847ae', '098fef67', 'f184abc8', '35ae414f']
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(SCHEME.encode())
    for part, after in ((purpose, struct.pack("<Q", seed)), (model, b""), (tensor, b"")):
        encoded = part.encode()
        digest.update(struct.pack("<I", len(encoded)) + encoded + after)
    return struct.unpack("<4I", digest.digest())


def threshold(probability: float) -> int:
    """Return T such that a 32-bit word lies below T with this probability, to within 2**-33."""
    return math.floor(probability * 2**32 + 0.5)


def words(key: Key, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the random words of elements ``start`` to ``stop`` as int64, on any torch device.

    Element e has word ``e & 3`` of the block with counter ``e >> 2``. The 32 x 32 -> 64 bit products
    wrap around in int64; their bits equal those of the unsigned products.
    """
    import torch

    group = torch.arange(start >> 2, (stop + 3) >> 2, dtype=torch.int64, device=device)
    first = (start >> 2) << 2
    return torch.stack(_blocks(key, group), dim=1).flatten()[start - first : stop - first]


def words_at(key: Key, elements: torch.Tensor) -> torch.Tensor:
    """Return the random words of some elements, int64 like `elements`, on their device."""
    import torch

    blocks = torch.stack(_blocks(key, elements >> 2), dim=1)
    return blocks.gather(1, (elements & 3).unsqueeze(1)).squeeze(1)


def _blocks(key: Key, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the four words of each block of four elements."""
    import torch

    c0, c1 = group & _MASK, group >> 32
    c2, c3 = torch.full_like(group, key[2]), torch.full_like(group, key[3])
    k0, k1 = key[0], key[1]
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3
