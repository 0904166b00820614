"""Every quantised format as a builder: random codes and scales, packed, with the values that they stand for.

The values are taken before anything is packed, so they share nothing with a reader. A weight is described from the
outside only: what lies in the file, what config.json says, what the numbers are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoint.quantized.numbers import (
    E2M1,
    E4M3,
    TABLES,
    Entry,
    Values,
    bytes_of,
    dense_words,
    finite_codes,
    floats_of,
    nibbles,
    over,
    scales,
    words_of,
)
from tests.laws.hostile.case import file_of

Rng = np.random.Generator


@dataclass(frozen=True)
class Weight:
    """One quantised weight."""

    parts: Mapping[str, Entry]
    """Its tensors in the file, by the end of their names: what follows the module's name."""
    values: Values
    """What its elements are, [outputs, inputs], before the one rounding to fp32."""
    logical: str = ".weight"
    """The end of its name in a model that is not quantised."""

    @property
    def single(self) -> np.ndarray:
        """The values rounded once to fp32."""
        with np.errstate(over="ignore"):
            return self.values.astype(np.float32)


@dataclass(frozen=True)
class Format:
    """One way to store a weight."""

    build: Callable[[Rng, int, int], Weight]
    """Of so many outputs and inputs."""
    declared: Mapping[str, Any] = field(default_factory=dict)
    """What config.json holds of it, next to the model's own keys."""
    rows: int = 48
    columns: int = 64
    """A shape that the format can have."""
    modules: tuple[str, ...] = ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj")


FORMATS: dict[str, Format] = {}


def _declared(quant_method: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": quant_method, **more}}


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    """Return the declaration of compressed-tensors with one group for all linear layers."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return _declared(
        "compressed-tensors",
        format=kind,
        config_groups={"group_0": group},
        ignore=["lm_head"],
        quantization_status="compressed",
        kv_cache_scheme=None,
    )


# FP8, with all the scales that occur


def fp8(
    dtype: str, scale: str, grid: Callable[[int, int], tuple[int, ...]], block: tuple[int, int], end: str
) -> Callable[[Rng, int, int], Weight]:
    """Return a builder of FP8 weights; `grid` gives the shape of the scales, `block` what one of them serves."""

    def build(rng: Rng, rows: int, columns: int) -> Weight:
        codes = finite_codes(rng, (rows, columns), dtype)
        shape = grid(rows, columns)
        entry, values = scales(rng, shape, scale)
        plane = values.reshape(shape if len(shape) == 2 else (-1, 1))
        sizes = (rows if plane.shape[0] == 1 else block[0], columns if plane.shape[1] == 1 else block[1])
        return Weight(
            {".weight": bytes_of(codes, dtype), end: entry},
            TABLES[dtype][codes] * over(plane, (rows, columns), sizes),
        )

    return build


def blocks(height: int, width: int) -> Callable[[int, int], tuple[int, int]]:
    """Return what gives the shape of a grid of blocks, those at the edges partial."""
    return lambda rows, columns: (-(-rows // height), -(-columns // width))


_BLOCK = _declared("fp8", fmt="e4m3", weight_block_size=[32, 32], activation_scheme="dynamic")
_E8M0 = _declared("fp8", fmt="e4m3", weight_block_size=[32, 32], scale_fmt="ue8m0")
for _scale in ("F32", "BF16", "F16", "F8_E8M0", "U8"):
    FORMATS[f"fp8 blocks {_scale}"] = Format(
        fp8("F8_E4M3", _scale, blocks(32, 32), (32, 32), ".weight_scale_inv"),
        _E8M0 if _scale == "U8" else _BLOCK,
        48,
        80,
    )
FORMATS["fp8 blocks e5m2"] = Format(
    fp8("F8_E5M2", "F32", blocks(32, 32), (32, 32), ".weight_scale_inv"), _BLOCK, 48, 80
)
for _name, _grid in {
    "scalar": lambda r, c: (),
    "one": lambda r, c: (1,),
    "vector": lambda r, c: (r,),
    "column": lambda r, c: (r, 1),
}.items():
    FORMATS[f"fp8 {_name}"] = Format(
        fp8("F8_E4M3", "F32", _grid, (1, 1), ".weight_scale"),
        _declared("fp8", activation_scheme="static"),
    )
FORMATS["deepseek v4 dense"] = Format(
    fp8("F8_E4M3", "F8_E8M0", blocks(32, 32), (32, 32), ".scale"),
    {**_declared("fp8", fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[32, 32]), "expert_dtype": "fp4"},
    64,
    96,
    ("layers.0.attn.wq_a", "layers.0.attn.wo_b"),
)


# FP4


def fp4(kind: str, end: str, group: int, scale: str, **more: Callable[[Rng], tuple[Entry, Values]]) -> Any:
    """Return a builder of FP4 weights in groups along the inputs; `more` are scales of the whole tensor.

    `weight_global_scale` divides, any other multiplies.
    """

    def build(rng: Rng, rows: int, columns: int) -> Weight:
        codes = rng.integers(0, 16, (rows, columns))
        entry, values = scales(rng, (rows, columns // group), scale)
        packed = nibbles(codes)
        parts = {end: bytes_of(packed, kind), ".scale" if kind == "I8" else ".weight_scale": entry}
        result = E2M1[codes] * over(values, (rows, columns), (1, group))
        for name, make in more.items():
            parts[f".{name}"], factor = make(rng)
            result = result / factor if name == "weight_global_scale" else result * factor
        return Weight(parts, result)

    return build


FORMATS["deepseek v4 experts"] = Format(
    fp4("I8", ".weight", 32, "F8_E8M0"),
    {**_declared("fp8", fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[32, 32]), "expert_dtype": "fp4"},
    48,
    96,
    ("layers.0.ffn.experts.0.w1", "layers.0.ffn.experts.1.w2"),
)
FORMATS["nvfp4"] = Format(
    fp4(
        "U8",
        ".weight_packed",
        16,
        "F8_E4M3",
        weight_global_scale=lambda rng: floats_of(rng.uniform(3000, 9000, (1,)), "F32"),
        # A factor of activations is no part of the weight.
    ),
    compressed(
        "nvfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
    ),
)
FORMATS["nvfp4 modelopt"] = Format(
    fp4(
        "U8",
        ".weight",
        16,
        "F8_E4M3",
        weight_scale_2=lambda rng: floats_of(rng.uniform(1e-4, 3e-4, ()), "F32"),
    ),
    _declared("modelopt", quant_algo="NVFP4", producer={"name": "modelopt", "version": "0.37"}),
)
for _scale in ("U8", "F8_E8M0"):
    FORMATS[f"mxfp4 {_scale}"] = Format(
        fp4("U8", ".weight_packed", 32, _scale),
        compressed(
            "mxfp4-pack-quantized",
            num_bits=4,
            type="float",
            strategy="group",
            group_size=32,
            symmetric=True,
            scale_dtype="torch.uint8",
        ),
    )
FORMATS["mxfp8"] = Format(
    fp8("F8_E4M3", "U8", lambda r, c: (r, c // 32), (1, 32), ".weight_scale"),
    compressed(
        "mxfp8-quantized",
        num_bits=8,
        type="float",
        strategy="group",
        group_size=32,
        symmetric=True,
        scale_dtype="torch.uint8",
    ),
)
FORMATS["fp8 modelopt"] = Format(
    fp8("F8_E4M3", "F32", lambda r, c: (), (1, 1), ".weight_scale"),
    _declared("modelopt", quant_algo="FP8"),
)


# compressed-tensors: floats and integers that are not packed


for _strategy, _grid2, _block2, _more in (
    ("tensor", lambda r, c: (1,), (1, 1), {}),
    ("channel", lambda r, c: (r, 1), (1, 1), {}),
    ("group", lambda r, c: (r, c // 16), (1, 16), {"group_size": 16}),
    ("block", blocks(32, 32), (32, 32), {"block_structure": [32, 32]}),
):
    FORMATS[f"float-quantized {_strategy}"] = Format(
        fp8("F8_E4M3", "BF16", _grid2, _block2, ".weight_scale"),
        compressed("float-quantized", num_bits=8, type="float", strategy=_strategy, symmetric=True, **_more),
    )


def integers(group: int | None, asymmetric: bool, scale: str = "BF16") -> Callable[[Rng, int, int], Weight]:
    """Return a builder of weights in 8-bit integers, one scale per row or per group of inputs."""

    def build(rng: Rng, rows: int, columns: int) -> Weight:
        codes = rng.integers(-128, 128, (rows, columns))
        size = group or columns
        entry, values = scales(rng, (rows, columns // size), scale)
        parts = {".weight": bytes_of(codes, "I8"), ".weight_scale": entry}
        zeros = np.zeros(values.shape, np.int64)
        if asymmetric:
            zeros = rng.integers(-128, 128, values.shape)
            parts[".weight_zero_point"] = bytes_of(zeros, "I8")
        shape = (rows, columns)
        return Weight(parts, (codes - over(zeros, shape, (1, size))) * over(values, shape, (1, size)))

    return build


FORMATS["int-quantized channel"] = Format(
    integers(None, False),
    compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
)
FORMATS["int-quantized asymmetric"] = Format(
    integers(None, True),
    compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
)
FORMATS["naive-quantized group"] = Format(
    integers(16, True, "F32"),
    compressed("naive-quantized", num_bits=8, type="int", strategy="group", group_size=16, symmetric=False),
)


# compressed-tensors: packed integers


def packed(
    bits: int, group: int | None, asymmetric: bool = False, by_index: bool = False, scale: str = "BF16"
) -> Callable[[Rng, int, int], Weight]:
    """Return a builder of weights in packed integers; `by_index`: the group of a column is listed."""

    def build(rng: Rng, rows: int, columns: int) -> Weight:
        half = 1 << (bits - 1)
        codes = rng.integers(-half, half, (rows, columns))
        size = group or columns
        entry, values = scales(rng, (rows, columns // size), scale)
        parts = {
            ".weight_packed": words_of(dense_words(codes + half, bits)),
            ".weight_scale": entry,
            ".weight_shape": words_of(np.array([rows, columns]), "I64"),
        }
        index = np.arange(columns) // size
        if by_index:
            index = rng.permutation(index)
            parts[".weight_g_idx"] = words_of(index)
        zeros = np.zeros(values.shape, np.int64)
        if asymmetric:
            zeros = rng.integers(-half, half, values.shape)
            parts[".weight_zero_point"] = words_of(
                np.ascontiguousarray(dense_words((zeros + half).T, bits).T)
            )
        return Weight(parts, (codes - zeros[:, index]) * values[:, index])

    return build


def _packed_declared(bits: int, group: int | None, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return compressed("pack-quantized", num_bits=bits, type="int", symmetric=symmetric, **strategy, **more)


for _bits in (2, 3, 4, 5, 6, 7, 8):
    FORMATS[f"pack-quantized {_bits} bits"] = Format(packed(_bits, 32), _packed_declared(_bits, 32))
FORMATS["pack-quantized channel"] = Format(packed(4, None), _packed_declared(4, None), 47, 59)
for _bits in (3, 4, 8):
    FORMATS[f"pack-quantized {_bits} bits, zero points"] = Format(
        packed(_bits, 16, True), _packed_declared(_bits, 16, False), 43, 80
    )
FORMATS["pack-quantized g_idx"] = Format(
    packed(4, 16, True, True, "F16"), _packed_declared(4, 16, False, actorder="group"), 43, 80
)


# gpt-oss


def gpt_oss(n_experts: int) -> Callable[[Rng, int, int], Weight]:
    """Return a builder of experts in MXFP4; the values are as transformers has them: [experts, inputs, outputs]."""

    def build(rng: Rng, rows: int, columns: int) -> Weight:
        codes = rng.integers(0, 16, (n_experts, rows, columns))
        exponents = rng.integers(116, 124, (n_experts, rows, columns // 32))
        parts = {
            "_blocks": bytes_of(nibbles(codes).reshape(n_experts, rows, columns // 32, 16), "U8"),
            "_scales": bytes_of(exponents, "U8"),
        }
        values = E2M1[codes] * over(2.0 ** (exponents - 127.0), codes.shape, (1, 1, 32))
        return Weight(parts, np.ascontiguousarray(values.transpose(0, 2, 1)), "")

    return build


FORMATS["gpt-oss"] = Format(
    gpt_oss(3),
    _declared("mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"]),
    48,
    64,
    ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"),
)


def fused_experts(n_experts: int, block: int | None) -> Callable[[Rng, int, int], Weight]:
    """Return a builder of experts in FP8 as transformers 5 fuses them; `block` None: one scale an expert."""

    def build(rng: Rng, rows: int, columns: int) -> Weight:
        codes = finite_codes(rng, (n_experts, rows, columns), "F8_E4M3")
        grid = (1, 1) if block is None else (-(-rows // block), -(-columns // block))
        entry, values = scales(rng, (n_experts, *grid), "F32")
        sizes = (1, block or rows, block or columns)
        parts = {"": bytes_of(codes, "F8_E4M3"), "_scale_inv": entry}
        return Weight(parts, E4M3[codes] * over(values, codes.shape, sizes), "")

    return build


for _name2, _size2 in (("blocks", 32), ("one scale each", None)):
    FORMATS[f"fp8 fused experts, {_name2}"] = Format(
        fused_experts(3, _size2),
        _BLOCK,
        48,
        80,
        ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"),
    )


# GPTQ, AWQ, bitsandbytes


def gptq(bits: int, group: int, plus: int, by_index: bool) -> Callable[[Rng, int, int], Weight]:
    """Return a builder of GPTQ weights; a zero point is stored as itself less `plus`."""

    def build(rng: Rng, rows: int, columns: int) -> Weight:
        codes = rng.integers(0, 1 << bits, (columns, rows))
        entry, values = scales(rng, (columns // group, rows), "F16")
        zeros = rng.integers(0, 1 << bits, values.shape) + plus
        index = np.arange(columns) // group
        if by_index:
            index = rng.permutation(index)
        parts = {
            ".qweight": words_of(np.ascontiguousarray(dense_words(codes.T, bits).T)),
            ".qzeros": words_of(dense_words(zeros - plus, bits)),
            ".scales": entry,
            ".g_idx": words_of(index),
        }
        return Weight(parts, np.ascontiguousarray(((codes - zeros[index]) * values[index]).T))

    return build


def _gptq_declared(bits: int, kind: str, desc_act: bool = False) -> dict[str, Any]:
    return _declared(
        "gptq", bits=bits, group_size=32, checkpoint_format=kind, desc_act=desc_act, sym=kind == "gptq"
    )


for _bits in (2, 3, 4, 8):
    FORMATS[f"gptq {_bits} bits"] = Format(gptq(_bits, 32, 1, False), _gptq_declared(_bits, "gptq"), 64, 96)
FORMATS["gptq v2"] = Format(gptq(4, 32, 0, False), _gptq_declared(4, "gptq_v2"), 64, 96)
FORMATS["gptq by index"] = Format(gptq(4, 32, 1, True), _gptq_declared(4, "gptq", True), 64, 96)


def awq(rng: Rng, rows: int, columns: int) -> Weight:
    """Return a weight of AWQ's GEMM layout: eight outputs to a word, in an order of their own."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    group = 32
    codes = rng.integers(0, 16, (columns, rows))
    entry, values = scales(rng, (columns // group, rows), "F16")
    zeros = rng.integers(0, 16, values.shape)

    def words(matrix: Any) -> Entry:
        mixed = matrix.reshape(len(matrix), -1, 8)[:, :, order].reshape(len(matrix), -1)
        return words_of(dense_words(mixed, 4))

    index = np.arange(columns) // group
    parts = {".qweight": words(codes), ".qzeros": words(zeros), ".scales": entry}
    return Weight(parts, np.ascontiguousarray(((codes - zeros[index]) * values[index]).T))


FORMATS["awq"] = Format(awq, _declared("awq", bits=4, group_size=32, version="gemm", zero_point=True), 64, 96)

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32)  # fmt: skip


FP4 = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], np.float32)
"""The magnitude of each code of bitsandbytes' FP4, whose highest bit is the sign."""


def bitsandbytes(kind: str, nested: bool) -> Callable[[Rng, int, int], Weight]:
    """Return a builder of NF4 or FP4 weights in blocks of 64 elements; `nested`: the maxima are codes themselves."""
    codebook = NF4 if kind == "nf4" else np.concatenate([FP4, -FP4])

    def build(rng: Rng, rows: int, columns: int) -> Weight:
        n = rows * columns
        codes = rng.integers(0, 16, n + n % 2)
        n_blocks = -(-n // 64)
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": 64,
            "dtype": "bfloat16",
            "shape": [rows, columns],
        }
        parts = {
            ".weight": bytes_of(nibbles(codes, high_first=True).reshape(-1, 1), "U8"),
            ".weight.quant_map": floats_of(codebook, "F32")[0],
        }
        if nested:
            map_entry, table = floats_of(np.sort(rng.uniform(-1, 1, 256)), "F32")
            second = rng.integers(0, 256, n_blocks)
            inner_entry, inner = floats_of(rng.uniform(0.01, 0.02, -(-n_blocks // 256)), "F32")
            offset = 0.0625
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            parts[".weight.absmax"] = bytes_of(second, "U8")
            parts[".weight.nested_absmax"] = inner_entry
            parts[".weight.nested_quant_map"] = map_entry
            first = (table[second] * np.repeat(inner, 256)[:n_blocks]).astype(np.float32)
            absmax = (first + np.float32(offset)).astype(np.float64)
        else:
            parts[".weight.absmax"], absmax = floats_of(rng.uniform(0.01, 0.1, n_blocks), "F32")
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts[f".weight.quant_state.bitsandbytes__{kind}"] = bytes_of(text.astype(np.int64), "U8")
        values = codebook.astype(np.float64)[codes[:n]] * np.repeat(absmax, 64)[:n]
        return Weight(parts, values.reshape(rows, columns))

    return build


_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
_FP4 = {**_NF4, "bnb_4bit_quant_type": "fp4"}
FORMATS["nf4"] = Format(bitsandbytes("nf4", False), _declared("bitsandbytes", **_NF4), 45, 51)
FORMATS["fp4 of bitsandbytes"] = Format(bitsandbytes("fp4", False), _declared("bitsandbytes", **_FP4), 45, 51)
FORMATS["nf4 nested"] = Format(
    bitsandbytes("nf4", True), _declared("bitsandbytes", **_NF4, bnb_4bit_use_double_quant=True), 150, 130
)


def llm_int8(rng: Rng, rows: int, columns: int) -> Weight:
    """Return a weight of LLM.int8: a fraction of 127 of the largest magnitude of its row."""
    codes = rng.integers(-127, 128, (rows, columns))
    scale, largest = floats_of(rng.uniform(0.1, 2.0, rows), "F32")
    parts = {".weight": bytes_of(codes, "I8"), ".SCB": scale, ".weight_format": ("U8", [], b"\0")}
    return Weight(parts, codes * largest[:, None] / 127)


FORMATS["llm.int8"] = Format(llm_int8, _declared("bitsandbytes", load_in_8bit=True), 45, 51)


def write(
    path: Path,
    name: str,
    seed: int = 0,
    rows: int = 0,
    columns: int = 0,
    modules: tuple[str, ...] = (),
    plain: Mapping[str, np.ndarray] | None = None,
    **config: Any,
) -> dict[str, np.ndarray]:
    """Write a model whose modules are stored in a format, and a norm in bf16; return its values in fp32 by logical name.

    Parameters
    ----------
    rows, columns
        Of every module's weight; those of the format where they are not given.
    modules
        Theirs; two that the format is made for where they are not given.
    plain
        Further tensors, in fp32.
    config
        Further entries of config.json.
    """
    tensors, values, declared = stored(name, seed, rows, columns, modules)
    for key, array in (plain or {}).items():
        tensors[key], _ = floats_of(array, "F32")
        values[key] = array.astype(np.float32)
    write_entries(path, tensors, {**declared, **config})
    return values


def stored(
    name: str, seed: int = 0, rows: int = 0, columns: int = 0, modules: tuple[str, ...] = ()
) -> tuple[dict[str, Entry], dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors, the values by logical name and the declaration of such a model."""
    made = FORMATS[name]
    rng = np.random.default_rng(seed)
    tensors: dict[str, Entry] = {}
    values: dict[str, np.ndarray] = {}
    for module in modules or made.modules:
        weight = made.build(rng, rows or made.rows, columns or made.columns)
        tensors |= {f"{module}{end}": entry for end, entry in weight.parts.items()}
        values[f"{module}{weight.logical}"] = weight.single
    tensors["model.norm.weight"], norm = floats_of(rng.uniform(0.5, 1.5, 24), "BF16")
    values["model.norm.weight"] = norm.astype(np.float32)
    return tensors, values, dict(made.declared)


def write_out(path: Path, values: Mapping[str, np.ndarray], **config: Any) -> Path:
    """Write values as a model in fp32: what a quantised one stands for."""
    write_entries(path, {name: floats_of(array, "F32")[0] for name, array in values.items()}, config)
    return path


def write_entries(path: Path, tensors: Mapping[str, Entry], config: Mapping[str, Any]) -> None:
    """Write a model of given tensors; `config` adds to its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_bytes(file_of(dict(tensors), {"format": "pt"}))
    text = {"model_type": "llama", "torch_dtype": "bfloat16", **config}
    (path / "config.json").write_text(json.dumps(text))
