"""LoRA on parameters that are not a module's weight (`target_parameters`): fused experts of transformers.

PEFT stacks the factors of all experts: A is [rank · experts, in], with the ranks of an expert consecutive; B is
[out, rank · experts], with the experts of a rank consecutive. The base stores the experts either fused, as
[experts, out, in] or [experts, in, out], or one by one; then each expert gets its slice of the factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from streammerge.checkpoint.adapters.files import Adapter, Parts
from streammerge.checkpoint.adapters.names import Names
from streammerge.checkpoint.names import LANGUAGE_PARTS
from streammerge.checkpoint.refs.adapted import AdaptedRef, Factor
from streammerge.dtypes import FLOATS
from streammerge.formats.refs import SourceRef, TensorRef
from streammerge.io.files import bad, quoted
from streammerge.records import dataclass

_ONE_BY_ONE = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
    "up_proj": (("up_proj",), ("fc1",)),
}
"""Names of the parts of a fused parameter where experts are stored one by one, in the order of its rows."""
IN_ORDER = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "up_proj",
    "up_proj_bias",
    "down_proj",
    "down_proj_bias",
    "w1",
    "v1",
    "w2",
)
"""Parameters in the order in which transformers declares them and PEFT nests their factors."""
IN_OUT = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""Models whose experts PEFT treats as [experts, in, out]."""
MOST_RANK = 1 << 16
_MOST_NESTED = 4
_TURNED_UNTIL = (0, 19)
"""The first version of PEFT that does not treat all experts as [experts, in, out]."""
Target = tuple[str, Parts]


@dataclass(frozen=True)
class _Stored:
    """The tensors in which a base stores a parameter of experts."""

    pieces: tuple[tuple[str, int, int], ...]
    """Name, expert, and first row within the expert's matrix of each tensor; for a fused tensor only its name."""
    fused: bool
    n_experts: int
    sides: tuple[int, int]
    """Rows and columns of the matrix of one expert."""


class Experts:
    """Applies an adapter's factors of parameters."""

    def __init__(
        self, adapter: Adapter, names: Names, base: Mapping[str, SourceRef], config: Mapping[str, Any]
    ) -> None:
        self._adapter, self._names, self._base, self._config = adapter, names, base, config
        self._settings = adapter.settings
        self._targets = sorted(set(adapter.settings.texts("target_parameters")))
        self._found: dict[str, _Stored | None] = {}

    def targets(self, module: str, levels: Sequence[Parts]) -> list[Target]:
        """Return the parameter of each of a module's changes; empty if they belong to its weight.

        Raises
        ------
        ModelError
            If the factors are ambiguous, or their number differs from that of the parameters.
        """
        leaves = self._leaves(module)
        if not leaves:
            return []
        path, listed = next(iter(levels[0].values())).path, ", ".join(leaves)
        if len(leaves) != len(levels):
            raise bad(
                path,
                f"module {quoted(module)}: {len(levels)} pairs of factors for the parameters {listed}: "
                "the file is not complete, or of another base model",
            )
        orders = permutations(leaves) if len(leaves) <= _MOST_NESTED else ()
        ways = [
            order
            for order in orders
            if all(self._ways(module, leaf, parts) for leaf, parts in zip(order, levels, strict=True))
        ]
        declared = tuple(leaf for leaf in IN_ORDER if leaf in leaves)
        if declared in ways:
            ways = [declared]
        if len(ways) != 1:
            cause = "in more than one way" if ways else "in no way: another base model's adapter"
            shapes = "; ".join(
                f"{list(b.shape)} and {list(a.shape)}"
                for _, a, b in (pair(module, parts) for parts in levels)
            )
            raise bad(path, f"module {quoted(module)}: factors {shapes} fit the parameters {listed} {cause}")
        return list(zip(ways[0], levels, strict=True))

    def adapted(
        self, module: str, leaf: str, parts: Parts, tensors: Mapping[str, SourceRef]
    ) -> dict[str, SourceRef]:
        """Return the tensors of a parameter with its factors applied: the fused one, or those of all experts."""
        plain = f"{module}.{leaf}"
        stored = self._find(plain)
        assert stored is not None
        _, a, b = pair(module, parts)
        rank = a.shape[0] // stored.n_experts
        scale = self._settings.scale(plain, rank)
        turned = self._is_turned(module, leaf, parts)
        found: dict[str, SourceRef] = {}
        for name, expert, row in stored.pieces:
            weight = tensors[name]
            if weight.dtype not in FLOATS:
                raise bad(
                    weight.path,
                    f"tensor {quoted(name)} is {weight.dtype}: an adapter goes on float weights; dequantise",
                )
            left, right = _factors(a, b, stored, rank, expert, row, turned=turned)
            blocks = stored.n_experts if stored.fused else 1
            found[name] = AdaptedRef(weight, left, right, rank, scale, blocks=blocks)
        return found

    def _leaves(self, module: str) -> list[str]:
        """Return the targeted parameters of a module that the base has, without its weight."""
        leaves = {
            target.rpartition(".")[2]
            for target in self._targets
            if f".{module}.{target.rpartition('.')[2]}".endswith(f".{target}")
        }
        return sorted(leaf for leaf in leaves if leaf != "weight" and self._find(f"{module}.{leaf}"))

    def _find(self, plain: str) -> _Stored | None:
        if plain not in self._found:
            name = self._names.find(plain, self._settings.path)
            self._found[plain] = self._fused(name) if name is not None else self._one_by_one(plain)
        return self._found[plain]

    def _fused(self, name: str) -> _Stored | None:
        shape = self._base[name].shape
        if len(shape) not in (2, 3) or not self._base[name].n_elements:
            return None
        n_experts = shape[0] if len(shape) == 3 else 1
        return _Stored(((name, 0, 0),), True, n_experts, (shape[-2], shape[-1]))

    def _one_by_one(self, plain: str) -> _Stored | None:
        module, _, leaf = plain.rpartition(".")
        for projections in _ONE_BY_ONE.get(leaf, ()):
            firsts = [
                self._names.find(f"{module}.0.{projection}.weight", self._settings.path)
                for projection in projections
            ]
            stems = {
                name.removesuffix(f".0.{projection}.weight")
                for name, projection in zip(firsts, projections, strict=True)
                if name is not None and name.endswith(f".0.{projection}.weight")
            }
            if len(stems) == 1 and None not in firsts:
                return self._all_of(stems.pop(), projections)
        return None

    def _all_of(self, stem: str, projections: Sequence[str]) -> _Stored | None:
        """Return the experts of one module, which have the shapes of the first."""
        pieces: list[tuple[str, int, int]] = []
        shapes = [self._base[f"{stem}.0.{projection}.weight"].shape for projection in projections]
        if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
            return None
        expert = 0
        while all(f"{stem}.{expert}.{projection}.weight" in self._base for projection in projections):
            row = 0
            for projection, shape in zip(projections, shapes, strict=True):
                name = f"{stem}.{expert}.{projection}.weight"
                if self._base[name].shape != shape:
                    return None
                pieces.append((name, expert, row))
                row += shape[0]
            expert += 1
        return _Stored(tuple(pieces), False, expert, (sum(shape[0] for shape in shapes), shapes[0][1]))

    def _ways(self, module: str, leaf: str, parts: Parts) -> list[bool]:
        """Return the orientations in which factors fit a parameter: False for [out, in], True for [in, out]."""
        stored = self._find(f"{module}.{leaf}")
        embedding, a, b = pair(module, parts)
        if stored is None or embedding or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            return []
        if a.shape[0] == 0 or a.shape[0] % stored.n_experts or a.shape[0] // stored.n_experts > MOST_RANK:
            return []
        fits = {False: (b.shape[0], a.shape[1]), True: (a.shape[1], b.shape[0])}
        return [turned for turned, sides in fits.items() if sides == stored.sides]

    def _is_turned(self, module: str, leaf: str, parts: Parts) -> bool:
        """Return whether A belongs to the rows of an expert's matrix.

        The shapes decide unless the matrix is square. Then the shapes of other parameters decide, or else the version
        of PEFT and the architecture.
        """
        ways = self._ways(module, leaf, parts)
        stored = self._find(f"{module}.{leaf}")
        if len(ways) == 1 or (
            stored is not None and len(self._base[stored.pieces[0][0]].shape) == 2 and stored.fused
        ):
            return ways[0]
        for other, levels in self._adapter.modules.items():
            if self._leaves(other):
                for name, some in self.targets(other, levels):
                    told = self._ways(other, name, some)
                    if len(told) == 1:
                        return told[0]
        version = str(self._settings.entries.get("peft_version") or "0").split(".")[:2]
        numbers = tuple(int(part) if part.isdigit() and len(part) < 9 else 0 for part in version)
        if numbers < _TURNED_UNTIL:
            return True
        return are_in_out(self._config)


def are_in_out(config: Mapping[str, Any]) -> bool:
    """Return whether PEFT treats the fused experts of a model as [experts, in, out], by its config.json."""
    parts = (part for key, part in config.items() if key in LANGUAGE_PARTS and isinstance(part, dict))
    return any(one.get("model_type") in IN_OUT for one in (config, *parts))


def pair(module: str, parts: Parts) -> tuple[bool, TensorRef, TensorRef]:
    """Return whether a change belongs to an embedding, and its two factors A and B.

    Raises
    ------
    ModelError
        If one is missing.
    """
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for part in (first, second):
        if part not in parts:
            path = next(iter(parts.values())).path
            raise bad(path, f"module {quoted(module)} has no {part}: the file is not complete")
    return embedding, parts[first], parts[second]


def _factors(
    a: TensorRef, b: TensorRef, stored: _Stored, rank: int, expert: int, row: int, *, turned: bool
) -> tuple[Factor, Factor]:
    """Return the factors of one expert's matrix from some row, or of all experts of a fused tensor."""
    n, (rows, columns) = stored.n_experts, stored.sides
    if turned:
        left = Factor(a, 1, rows, expert * rank * rows + row, rank * rows)
        return left, Factor(b, n, rank * n, expert, 1)
    left = Factor(b, rank * n, n, expert + row * rank * n, 1)
    return left, Factor(a, columns, 1, expert * rank * columns, rank * columns)
