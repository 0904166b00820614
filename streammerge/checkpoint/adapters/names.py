"""Match an adapter's module names with the names in the base's files.

Both name the same model. They differ in the enclosing modules (an adapter may be trained on the encoder only, or on the
language model of a larger model), and in renamings between files and modules by versions of transformers. An ambiguous
name is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from streammerge.io.files import bad, quoted

_AROUND = frozenset(
    {"base_model", "model", "module", "language_model", "text_model", "llm", "lm", "transformer", "backbone"}
)
"""Modules around a language model that do not identify a position within it."""
_VISION = frozenset({"visual", "vision_tower", "vision_model", "vision_encoder", "vit"})
"""Names of vision towers, which may be nested."""
_TOWER = "(vision)"
_RENAMED = (
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.self.query.", ".attention.q_proj."),
    (".attention.self.key.", ".attention.k_proj."),
    (".attention.self.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".self_attn.out_proj.", ".self_attn.o_proj."),
    (".self_attn.dense.", ".self_attn.o_proj."),
    (".mlp.fc1.", ".fc1."),
    (".mlp.fc2.", ".fc2."),
    (".block_sparse_moe.", ".mlp."),
    (".feed_forward.", ".mlp."),
    (".router.gate.", ".gate."),
    (".gate.wg.", ".gate."),
    (".mlp.router.", ".mlp.gate."),
    (".embed_out.", ".lm_head."),
    (".word_embeddings.", ".embed_tokens."),
    (".encoder.layer.", ".layers."),
)
"""Renamings of transformers between files and modules; both sides are converted to the second form."""
_MOST_AROUND = 3


class Names:
    """Finds the tensor of a base that an adapter refers to."""

    def __init__(self, names: Iterable[str], reference: str) -> None:
        self._names = dict.fromkeys(names)
        self._reference = reference
        self._tables: dict[Callable[[str], tuple[str, ...]], dict[str, list[str]]] = {}

    def find(self, plain: str, path: str, fits: Callable[[str], bool] = lambda name: True) -> str | None:
        """Return the base's name, or None.

        The closest match decides, in this order: the same name; the same except for modules around a language model;
        one name ends with the other; the same after transformers' renamings. A common ending alone, such as
        ``dense.weight`` of two heads, is not a match.

        Parameters
        ----------
        path
            The adapter's file, for messages.
        fits
            Function that tells whether a base tensor has a suitable shape.

        Raises
        ------
        ModelError
            If several tensors match.
        """
        if plain in self._names and fits(plain):
            return plain
        for found in self._ways(plain):
            fitting = [name for name in dict.fromkeys(found) if fits(name)]
            if len(fitting) > 1:
                some = ", ".join(quoted(name) for name in fitting[:3])
                raise bad(
                    path,
                    f"{quoted(plain)} may be any of {len(fitting)} tensors of {self._reference} ({some} …); "
                    "rename the adapter's tensors to say which",
                )
            if fitting:
                return fitting[0]
        return plain if plain in self._names else None

    def _ways(self, plain: str) -> Iterator[list[str]]:
        yield self._alike(_within, plain)
        yield self._alike(_tails, plain) or [tail for tail in _tails(plain) if tail in self._names]
        yield self._alike(_renamed, plain)
        called = _renamed(plain)[0]
        yield self._table(_renamed_tails).get(called) or [
            name for tail in _tails(called) for name in self._table(_renamed).get(tail, ())
        ]

    def _alike(self, key: Callable[[str], tuple[str, ...]], plain: str) -> list[str]:
        """Return the base's names that share a key with this name, best match first."""
        return self._table(key).get(key(plain)[0], [])

    def _table(self, key: Callable[[str], tuple[str, ...]]) -> dict[str, list[str]]:
        if key not in self._tables:
            table: dict[str, list[str]] = {}
            for name in self._names:
                for text in key(name):
                    table.setdefault(text, []).append(name)
            self._tables[key] = table
        return self._tables[key]


def _tails(name: str) -> tuple[str, ...]:
    """Return a name, and the name without up to three enclosing modules.

    Layer numbers and the word for vision towers are never removed.
    """
    found = []
    for _ in range(_MOST_AROUND + 1):
        found.append(name)
        outer, _, name = name.partition(".")
        if outer.isdigit() or outer == _TOWER or "." not in name:
            break
    return tuple(found)


def _within(name: str) -> tuple[str, ...]:
    """Return a name without the modules around a language model, and with a single word for vision towers."""
    parts: list[str] = []
    for part in name.split("."):
        word = _TOWER if part in _VISION else part
        if part not in _AROUND and (word != _TOWER or parts[-1:] != [word]):
            parts.append(word)
    return (".".join(parts),)


def _renamed(name: str) -> tuple[str, ...]:
    """Return a name after transformers' renamings."""
    text = f".{_within(name)[0]}."
    for old, new in _RENAMED:
        text = text.replace(old, new)
    return (text.strip("."),)


def _renamed_tails(name: str) -> tuple[str, ...]:
    return _tails(_renamed(name)[0])
