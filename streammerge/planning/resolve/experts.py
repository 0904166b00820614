"""Convert the experts of a layer between two layouts: one tensor per expert, or all experts fused into one tensor.

Fused: ``P.gate_up_proj`` [E, 2 I, H] stacks each expert's gate on its up projection, and ``P.down_proj`` is [E, H, I], as
in transformers 5; some models exchange the last two axes of both (Llama 4, Qwen3-VL-MoE). One by one:
``P.3.gate_proj.weight``, ``P.3.up_proj.weight`` [I, H] and ``P.3.down_proj.weight`` [H, I], or Mixtral's ``w1``, ``w3``,
``w2``. Names and shapes determine the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.refs.blocks import Block, BlocksRef
from streammerge.dtypes import FLOATS, itemsize
from streammerge.formats.refs import SourceRef, TensorRef
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

_WORDS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("fc1", "fc3", "fc2"))
"""Known names of an expert's projections, in the order gate, up, down."""
_GATE, _UP, _DOWN = range(3)
_ONE = late_pattern(r"^(.*)\.(experts)\.(\d{1,6})\.(\w+)\.weight$")
_FUSED = late_pattern(r"^(.*)\.(experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?$")
_TOGETHER = ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"}, {"gate_proj", "up_proj", "down_proj"})
"""Tensors that hold all experts of a layer."""
_INTERLEAVED = "gate_up_proj_bias"
"""Names of experts with biases (gpt-oss), which interleave the rows of gate and up projection: a different arithmetic."""


@dataclass(frozen=True)
class Layout:
    """The layout of a model's experts."""

    fused: bool
    parent: str
    """The module that contains them: ``mlp``, ``block_sparse_moe``."""
    words: tuple[str, ...]
    """Stored one by one: the names of gate, up and down projection."""
    tensors: tuple[str, ...]
    """Fused: the names of the tensors."""
    flipped: bool
    """Fused: whether matrices are stored as (in, out)."""
    suffix: str
    """Fused: the suffix of the names: empty, or ``.weight``."""


@dataclass(frozen=True)
class _Matrix:
    """A projection of one expert, [out, in], and the position of its elements; see `Block`."""

    tensor: SourceRef
    rows: int
    columns: int
    start: int
    pitch: int
    flipped: bool = False


@dataclass
class _Group:
    """The experts of one layer."""

    prefix: str
    """``model.layers.0.mlp.experts``."""
    layout: Layout
    names: list[str]
    matrices: dict[int, list[_Matrix]]
    """The tensors of each projection, by expert."""


def layout_of(index: Mapping[str, SourceRef]) -> Layout | None:
    """Return the layout of most experts of a model; None if it has no known experts."""
    counts: dict[Layout, int] = {}
    for group in _groups(index):
        counts[group.layout] = counts.get(group.layout, 0) + 1
    return max(counts, key=lambda layout: counts[layout]) if counts else None


def are_interleaved(names: Iterable[str]) -> bool:
    """Return whether experts of these names interleave the rows of gate and up projection, as gpt-oss does."""
    return any(name.endswith(f".experts.{_INTERLEAVED}") for name in names)


def n_experts(names: Iterable[str]) -> int:
    """Return the largest number of experts in a layer, by the names of experts stored one by one."""
    return max((int(match[3]) + 1 for name in names if (match := _ONE.match(name)) is not None), default=0)


def has_experts(index: Iterable[str]) -> bool:
    """Return whether any name is that of an expert's tensor."""
    return any(".experts." in name for name in index)


def laid_out(index: TensorIndex, layout: Layout) -> TensorIndex:
    """Return a model with its experts in `layout`, converted as they are read; the same model if nothing changes."""
    groups = [group for group in _groups(index) if group.layout != layout]
    if not groups:
        return index
    made: dict[str, dict[str, SourceRef]] = {}
    replaced: set[str] = set()
    renamed: dict[str, str] = {}
    for group in groups:
        parent = group.prefix.removesuffix(".experts")
        stem = parent.removesuffix(group.layout.parent) + layout.parent
        tensors = _tensors(group, f"{stem}.experts", layout)
        if tensors is None:
            continue
        replaced.update(group.names)
        made[group.names[0]] = tensors
        if stem != parent:
            renamed[parent + "."] = stem + "."
    found: dict[str, SourceRef] = {}
    for name, ref in index.items():
        if name in made:
            found |= made[name]
        elif name not in replaced:
            found[_renamed(name, renamed)] = ref
    return replace(index, tensors=found)


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """Return a name with the module of its experts renamed."""
    if prefixes:
        at = 0
        while (at := name.find(".", at) + 1) > 0:
            if name[:at] in prefixes:
                return prefixes[name[:at]] + name[at:]
    return name


def _groups(index: Mapping[str, SourceRef]) -> Iterator[_Group]:
    """Yield the experts of each layer that is complete."""
    single: dict[str, dict[int, dict[str, str]]] = {}
    fused: dict[str, dict[str, str]] = {}
    interleaved: set[str] = set()
    for name in index:
        if ".experts." not in name:
            continue
        if (match := _ONE.match(name)) is not None:
            prefix = f"{match[1]}.{match[2]}"
            single.setdefault(prefix, {}).setdefault(int(match[3]), {})[match[4]] = name
        elif (match := _FUSED.match(name)) is not None:
            fused.setdefault(f"{match[1]}.{match[2]}", {})[match[3]] = name
        elif name.endswith(f".{_INTERLEAVED}"):
            interleaved.add(name.removesuffix(f".{_INTERLEAVED}"))
    for prefix, experts in single.items():
        if prefix not in fused and (group := _one_by_one(index, prefix, experts)) is not None:
            yield group
    for prefix, names in fused.items():
        if prefix not in single and prefix not in interleaved:
            group = _fused(index, prefix, names)
            if group is not None:
                yield group


def _one_by_one(
    index: Mapping[str, SourceRef], prefix: str, experts: Mapping[int, Mapping[str, str]]
) -> _Group | None:
    if set(experts) != set(range(len(experts))):
        return None
    first = experts[0]
    words = next((words for words in _WORDS if words[_DOWN] in first and words[_UP] in first), None)
    if words is None or any(set(expert) != set(first) for expert in experts.values()):
        return None
    roles = [role for role in range(3) if words[role] in first]
    if len(roles) != len(first):
        return None
    matrices: dict[int, list[_Matrix]] = {role: [] for role in roles}
    for number in range(len(experts)):
        for role in roles:
            ref = index[experts[number][words[role]]]
            if len(ref.shape) != 2 or ref.dtype not in FLOATS:
                return None
            matrices[role].append(_Matrix(ref, ref.shape[0], ref.shape[1], 0, ref.shape[1]))
    if any(len({(m.rows, m.columns) for m in found}) != 1 for found in matrices.values()):
        return None
    names = [experts[number][word] for number in sorted(experts) for word in experts[number]]
    layout = Layout(False, _parent(prefix), words, (), flipped=False, suffix="")
    return _Group(prefix, layout, names, matrices)


def _fused(index: Mapping[str, SourceRef], prefix: str, names: Mapping[str, str]) -> _Group | None:
    refs: dict[str, SourceRef] = {}
    for role, name in names.items():
        ref = index[name]
        if len(ref.shape) != 3 or ref.dtype not in FLOATS:
            return None
        refs[role] = ref
    shapes = {role: ref.shape for role, ref in refs.items()}
    flipped = _is_flipped(shapes)
    if flipped is None:
        return None
    matrices: dict[int, list[_Matrix]] = {}
    for role, ref in refs.items():
        for at, part in enumerate(_roles(role)):
            matrices[part] = _slices(ref, at, len(_roles(role)), flipped=flipped)
    suffix = ".weight" if next(iter(names.values())).endswith(".weight") else ""
    layout = Layout(True, _parent(prefix), (), tuple(sorted(refs)), flipped, suffix)
    return _Group(prefix, layout, list(names.values()), matrices)


def _roles(fused: str) -> tuple[int, ...]:
    return (_GATE, _UP) if fused == "gate_up_proj" else (_WORDS[0].index(fused),)


def _is_flipped(shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Return whether fused tensors are stored as (in, out); None if they are not experts, or it is unknown.

    Without a gate the shapes do not tell; (out, in) is assumed, as in transformers.
    """
    if set(shapes) not in _TOGETHER or len({shape[0] for shape in shapes.values()}) != 1:
        return None
    _, c, d = shapes["down_proj"]
    if "gate_up_proj" not in shapes:
        return False if all(shapes[role][1:] == (d, c) for role in set(shapes) - {"down_proj"}) else None
    _, a, b = shapes["gate_up_proj"]
    plain, flipped = (a, b) == (2 * d, c), (a, b) == (d, 2 * c)
    return flipped if plain != flipped else None


def _slices(ref: SourceRef, at: int, of: int, *, flipped: bool) -> list[_Matrix]:
    """Return one matrix per expert from a tensor of all experts: each expert's whole block, or one half of it."""
    n, a, b = ref.shape
    if flipped:
        rows, columns = b // of, a
        return [_Matrix(ref, rows, columns, e * a * b + at * rows, b, flipped=True) for e in range(n)]
    rows, columns = a // of, b
    return [_Matrix(ref, rows, columns, e * a * b + at * rows * b, b) for e in range(n)]


def _parent(prefix: str) -> str:
    return prefix.split(".")[-2]


def _tensors(group: _Group, prefix: str, layout: Layout) -> dict[str, SourceRef] | None:
    """Return the tensors of a layer's experts by their names in a layout; None if the layout cannot hold them."""
    n = len(group.matrices[_DOWN])
    if not layout.fused:
        return {
            name: _taken_out(name, group.matrices[role][number])
            for number in range(n)
            for role in sorted(group.matrices)
            for name in [f"{prefix}.{number}.{layout.words[role]}.weight"]
        }
    together = {word: _roles(word) for word in layout.tensors}
    if {role for roles in together.values() for role in roles} != set(group.matrices):
        return None
    found: dict[str, SourceRef] = {}
    for word, roles in together.items():
        name = f"{prefix}.{word}{layout.suffix}"
        found[name] = _put_together(
            name, [[group.matrices[role][e] for role in roles] for e in range(n)], layout
        )
    return found


def _taken_out(name: str, matrix: _Matrix) -> SourceRef:
    """Return one matrix as a tensor; if its elements are contiguous it is a plain range of a file."""
    shape, tensor = (matrix.rows, matrix.columns), matrix.tensor
    if tensor.shape == shape and not matrix.flipped:
        return tensor
    if (plain := tensor.plain) is not None and not matrix.flipped:
        width = itemsize(tensor.dtype)
        nbytes = matrix.rows * matrix.columns * width
        return TensorRef(name, plain.dtype, shape, plain.path, plain.offset + matrix.start * width, nbytes)
    return BlocksRef(name, tensor.dtype, shape, (_block(matrix, 0, 0, flipped=False),))


def _put_together(name: str, experts: list[list[_Matrix]], layout: Layout) -> SourceRef:
    """Return a tensor of all experts, each with one matrix or two stacked ones."""
    first = experts[0]
    rows, columns = sum(m.rows for m in first), first[0].columns
    a, b = (columns, rows) if layout.flipped else (rows, columns)
    blocks: list[Block] = []
    for e, matrices in enumerate(experts):
        done = 0
        for matrix in matrices:
            place = (e * a, done) if layout.flipped else (e * a + done, 0)
            blocks.append(_block(matrix, *place, flipped=layout.flipped))
            done += matrix.rows
    dtypes = {block.tensor.dtype for block in blocks}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
    return BlocksRef(name, dtype, (len(experts), a, b), tuple(blocks))


def _block(matrix: _Matrix, row: int, column: int, *, flipped: bool) -> Block:
    """Return a matrix, transposed if `flipped`, as a block at a position."""
    rows, columns = (matrix.columns, matrix.rows) if flipped else (matrix.rows, matrix.columns)
    return Block(
        matrix.tensor,
        matrix.start,
        matrix.pitch,
        row,
        column,
        rows,
        columns,
        transposed=matrix.flipped != flipped,
    )
