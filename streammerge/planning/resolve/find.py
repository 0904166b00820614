"""Find the models' tensors that an output tensor is merged from, or their substitutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streammerge.checkpoint.names import in_component, shared_as, tied_to
from streammerge.errors import ModelError, printable
from streammerge.formats.refs import SourceRef
from streammerge.lazy import late_pattern
from streammerge.planning.resolve.agreement import counted, lacking
from streammerge.planning.resolve.assemble import Indexes, OutputTensor
from streammerge.planning.resolve.modules import of_a_tower
from streammerge.planning.resolve.vocabulary import Alignment

_BUFFER = late_pattern(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids)$")
"""Buffers that some versions of `transformers` stored in addition to the parameters."""


class Finder:
    """Finds the models' tensors that an output tensor is merged from.

    Parameters
    ----------
    prefixes
        For models with different names, the prefixes of the names that they share with the template model.
    """

    def __init__(
        self, indexes: Indexes, alignment: Alignment | None, prefixes: Mapping[str, tuple[str, ...]]
    ) -> None:
        self._indexes, self._alignment, self._prefixes = indexes, alignment, prefixes
        self._tied: dict[str, str] = {}
        self._towers: dict[str, bool] = {}
        self._buffers: set[str] = set()
        self._alone: dict[str, str] = {}

    def check(self, outputs: Sequence[OutputTensor]) -> None:
        """Refuse a model that lacks tensors of the output; the message summarises them."""
        missing: dict[str, list[OutputTensor]] = {}
        for output in outputs:
            places = dict.fromkeys(_places(output))
            without = [place for place in places if self.find(*place) is None]
            if without and _BUFFER.search(output.name) and self.find(*output.template) is not None:
                self._buffers.add(output.name)
                continue
            if without and self._is_alone(output, [reference for reference, _ in without], len(places)):
                self._alone[output.name] = output.template[0]
                continue
            for reference, _ in without:
                missing.setdefault(reference, []).append(output)
        for reference in (reference for reference in self._indexes if reference in missing):
            raise lacking(
                reference, _name_in(missing[reference][0], reference), missing[reference], self._indexes
            )

    def _is_alone(self, output: OutputTensor, without: Sequence[str], n_places: int) -> bool:
        """Return whether a tensor is in a part that only the template model has: a tower, a component, an own head."""
        others = n_places - (output.template[0] not in without and output.template in _places(output))
        if len(without) < others or self.find(*output.template) is None:
            return False
        return all(self._is_without(reference, output.name) for reference in without)

    def _is_without(self, reference: str, name: str) -> bool:
        begins = self._prefixes.get(reference)
        if begins is not None and not name.startswith(begins):
            return True
        folders = self._indexes[reference].folders
        if folders and (component := in_component(name)[0]) and component[:-1] not in folders:
            return True
        if not of_a_tower(name):
            return False
        if reference not in self._towers:
            self._towers[reference] = any(map(of_a_tower, self._indexes[reference]))
        return not self._towers[reference]

    def is_copied(self, output: OutputTensor) -> bool:
        """Return whether a tensor is copied because not all models have it."""
        return output.name in self._buffers or output.name in self._alone

    def template_of(self, output: OutputTensor) -> SourceRef:
        """Return the tensor that determines dtype and shape."""
        found = self.find(*output.template)
        if found is None:
            reference, name = output.template
            raise ModelError(
                f"{printable(reference)}: tensor {printable(name)} is missing, and `exclude:` asks to copy it from this "
                "model: remove the pattern, or choose a different base"
            )
        return found

    def inputs(self, output: OutputTensor) -> tuple[SourceRef | None, tuple[SourceRef, ...]]:
        """Return the base's tensor, if any, and each source's."""
        if self.is_copied(output):
            return None, ()
        base = None if output.part.base is None else self.find(output.part.base.reference, output.base)
        sources = [self.find(spec.reference, name) for spec, name in output.models]
        return base, tuple(ref for ref in sources if ref is not None)

    def find(self, reference: str, name: str) -> SourceRef | None:
        """Return a model's tensor, or its substitute; None if the model has neither."""
        found = self._stored(reference, name)
        if found is None or self._alignment is None:
            return found
        return self._alignment.gather(reference, name, found, lambda other: self._stored(other, name))

    def _stored(self, reference: str, name: str) -> SourceRef | None:
        index = self._indexes[reference]
        if name in index:
            return index[name]
        if (shared := shared_as(index, name)) is not None:
            return index[shared]
        embedding = tied_to(index, index.config, name)
        if embedding is None:
            return None
        self._tied[reference] = name
        return index[embedding]

    def warnings(self) -> list[str]:
        """Return warnings about all output tensors together."""
        lines = [
            f"{printable(reference)}: has no {printable(name)}; its embedding takes part instead (they are tied)"
            for reference, name in self._tied.items()
        ]
        if self._buffers:
            lines.append(
                f"{len(self._buffers)} buffers that not all models store are copied, not merged "
                f"(first: {printable(min(self._buffers))})"
            )
        for holder in dict.fromkeys(self._alone.values()):
            names = [name for name, having in self._alone.items() if having == holder]
            others = next(index for reference, index in self._indexes.items() if reference != holder)
            lines.append(
                f"{counted(names, others)}: only {printable(holder)} has {'them' if len(names) > 1 else 'it'}, "
                "copied, not merged"
            )
        return lines


def _places(output: OutputTensor) -> list[tuple[str, str]]:
    """Return every model of an output tensor, with the tensor's name there."""
    base = [] if output.part.base is None else [(output.part.base.reference, output.base)]
    return [*base, *((spec.reference, name) for spec, name in output.models)]


def _name_in(output: OutputTensor, reference: str) -> str:
    return next(name for place, name in _places(output) if place == reference)
