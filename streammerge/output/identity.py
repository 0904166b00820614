"""The identity of a merge: everything that its output depends on. Only the same identity is resumed or verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from streammerge.errors import ConfigError, printable
from streammerge.io.reader import Reader
from streammerge.numerics.philox import SCHEME, RandomKeys
from streammerge.planning.plan import MergePlan
from streammerge.records import dataclass
from streammerge.tensors.fingerprint import companion_digest, fingerprint
from streammerge.version import __version__

T = TypeVar("T")
Digests = dict[int, tuple[object, str]]
"""The digests of inputs by the identity of their index, with the index, so that it lives as long."""
VERSION = "version"
LAYOUT = "shard size"


@dataclass(frozen=True)
class Entry:
    """One thing that the output's bytes depend on."""

    name: str
    """The name in messages and in the journal; an input is named by its reference."""
    public: str
    """The name in the manifest; an input is named by its index, since paths are private."""
    value: str


@dataclass(frozen=True)
class Identity:
    """Everything that must be equal to resume a merge, or to compare an output with it."""

    entries: tuple[Entry, ...]
    fingerprints: tuple[str, ...]
    """A fingerprint of the content of each model that is read, in the plan's order."""
    keys: RandomKeys

    @property
    def named(self) -> dict[str, str]:
        """The values by name, for a journal."""
        return {entry.name: entry.value for entry in self.entries}

    @property
    def public(self) -> dict[str, str]:
        """The values by public name, for a manifest."""
        return {entry.public: entry.value for entry in self.entries}

    def changed(self, recorded: Mapping[str, str]) -> list[str]:
        """Return the names of the entries that differ from a manifest's record, those of it that this merge lacks included."""
        differ = [entry.name for entry in self.entries if recorded.get(entry.public) != entry.value]
        return [*differ, *sorted(recorded.keys() - self.public.keys())]


def identify(plan: MergePlan, reader: Reader, known: Digests | None = None) -> Identity:
    """Return the identity of a plan; read the parts of its inputs that identify them.

    Parameters
    ----------
    known
        The digests of inputs that are known from other plans of the same inputs; it receives the new ones.

    Raises
    ------
    ConfigError
        If two models have the same content and would draw the same random mask.
    """
    digests = {} if known is None else known

    def once(index: T, digest: Callable[[T, Reader], str]) -> str:
        if id(index) not in digests:
            digests[id(index)] = index, digest(index, reader)
        return digests[id(index)][1]

    fingerprints = tuple(once(index, fingerprint) for index in plan.inputs)
    fishers = {
        f"Fisher diagonal of model {place}": once(index, companion_digest)
        for place, index in enumerate(plan.fishers)
    }
    grams = {
        f"Gram matrices of model {place}": once(index, companion_digest)
        for place, index in enumerate(plan.grams)
    }
    shared = {VERSION: __version__, "random scheme": SCHEME, **plan.identity(), **fishers, **grams}
    inputs = [
        Entry(f"input {index.reference}", f"input {place}", digest)
        for place, (index, digest) in enumerate(zip(plan.inputs, fingerprints, strict=True))
    ]
    entries = (*(Entry(name, name, value) for name, value in shared.items()), *inputs)
    return Identity(entries, fingerprints, _random_keys(plan, fingerprints))


def _random_keys(plan: MergePlan, fingerprints: Sequence[str]) -> RandomKeys:
    specs = plan.config.models
    names = tuple(spec.alias or digest for spec, digest in zip(specs, fingerprints, strict=False))
    if plan.random and len(set(names)) < len(names):
        twin = next(i for i, name in enumerate(names) if name in names[:i])
        raise ConfigError(
            f"{specs[twin].path}: {printable(specs[twin].reference)} has the same content as a different model, so both "
            "would draw the same random mask; give one of them its own `alias`"
        )
    return RandomKeys(plan.seed, names, {job.name: job.members for job in plan.jobs if job.members})
