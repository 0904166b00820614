"""Hostile quantised models: what is declared, what lies in the file, and what the numbers are do not fit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.checkpoint.quantized.formats import compressed, stored, write_entries
from tests.laws.hostile.case import Build, Case

Entries = dict[str, tuple[str, list[int], bytes]]
Change = Callable[[Entries, dict[str, Any]], None]
DOWN = "model.layers.0.mlp.down_proj"
NAN, INFINITY, NEGATIVE = float("nan"), float("inf"), -1.0


def models(name: str, change: Change) -> Build:
    """Give both models a format; `change` makes the second one hostile."""

    def build(d: Path) -> None:
        for i, model in enumerate("ab"):
            tensors, _, config = stored(name, i)
            entries, config = dict(tensors), json.loads(json.dumps(config))
            if model == "b":
                change(entries, config)
            write_entries(d / model, entries, config)

    return build


def without(end: str) -> Change:
    return lambda entries, config: entries.__delitem__(DOWN + end)


def replaced(end: str, dtype: str, shape: list[int], raw: bytes) -> Change:
    return lambda entries, config: entries.__setitem__(DOWN + end, (dtype, shape, raw))


def reshaped(end: str, shape: list[int]) -> Change:
    """Say that a tensor has another shape, of the same number of elements."""

    def change(entries: Entries, config: dict[str, Any]) -> None:
        dtype, _, raw = entries[DOWN + end]
        entries[DOWN + end] = (dtype, shape, raw)

    return change


def number(end: str, place: int, raw: bytes) -> Change:
    """Put bytes in the place of an element."""

    def change(entries: Entries, config: dict[str, Any]) -> None:
        dtype, shape, before = entries[DOWN + end]
        at = place * len(raw)
        entries[DOWN + end] = (dtype, shape, before[:at] + raw + before[at + len(raw) :])

    return change


def declared(**settings: Any) -> Change:
    return lambda entries, config: config["quantization_config"].update(settings)


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


def bf16(value: float) -> bytes:
    return f32(value)[2:]


def shapes() -> Iterator[Case]:
    fp8, packed, gptq, awq, nvfp4, nf4 = (
        "fp8 blocks F32", "pack-quantized 4 bits", "gptq 4 bits", "awq", "nvfp4", "nf4",
    )  # fmt: skip
    for name, end, shape in (
        (fp8, ".weight_scale_inv", [3, 2]),
        (packed, ".weight_scale", [2, 48]),
        (packed, ".weight_packed", [64, 6]),
        (gptq, ".scales", [64, 3]),
        (gptq, ".qzeros", [8, 3]),
        (gptq, ".qweight", [64, 12]),
        (awq, ".scales", [64, 3]),
        (awq, ".qzeros", [8, 3]),
        (nvfp4, ".weight_scale", [4, 48]),
        (nvfp4, ".weight_packed", [64, 24]),
        (nf4, ".weight.absmax", [6, 6]),
    ):
        expect = "either" if end == ".weight.absmax" else "refused"  # Its shape says nothing.
        yield Case(f"{name}: {end[1:]} of {shape}", models(name, reshaped(end, shape)), "", expect)
    for name, end in (
        (packed, ".weight_scale"),
        (packed, ".weight_shape"),
        ("pack-quantized 4 bits, zero points", ".weight_zero_point"),
        (gptq, ".scales"),
        (gptq, ".qzeros"),
        (awq, ".qzeros"),
        (nvfp4, ".weight_scale"),
        (nvfp4, ".weight_global_scale"),
        (nf4, ".weight.absmax"),
        (nf4, ".weight.quant_map"),
        ("nf4 nested", ".weight.nested_absmax"),
    ):
        yield Case(f"{name} without {end[1:]}", models(name, without(end)), "is missing")
    for name in (fp8, "int-quantized channel"):
        end = ".weight_scale_inv" if name == fp8 else ".weight_scale"
        yield Case(f"{name} without {end[1:]}", models(name, without(end)), DOWN)
    for columns in (63, 1 << 40, 0, -64, 65):
        raw = struct.pack("<2q", 48, columns)
        words = "does not fit" if columns < 1 else "do not fill" if columns != 63 else ""
        expect = "either" if columns == 63 else "refused"  # 63 fill as many words as 64.
        yield Case(
            f"weight_shape says {columns} columns",
            models(packed, replaced(".weight_shape", "I64", [2], raw)), words, expect,
        )  # fmt: skip
    yield Case(
        "weight_shape of three",
        models(packed, replaced(".weight_shape", "I64", [3], bytes(24))),
        "does not fit",
    )
    yield Case(
        "weight_shape of a megabyte",
        models(packed, replaced(".weight_shape", "I64", [1 << 17], bytes(1 << 20))), "at most 4096",
    )  # fmt: skip
    yield Case("zero points of another shape", models(
        "pack-quantized 4 bits, zero points", reshaped(".weight_zero_point", [5, 6])), "does not fit")  # fmt: skip
    yield Case("g_idx too short", models(gptq, replaced(".g_idx", "I32", [3], bytes(12))), "does not fit")


def numbers() -> Iterator[Case]:
    for what, value in (("NaN", NAN), ("infinite", INFINITY), ("negative", NEGATIVE)):
        words = "which no scale can be"
        for name, end, raw in (
            ("fp8 blocks F32", ".weight_scale_inv", f32(value)),
            ("fp8 blocks BF16", ".weight_scale_inv", bf16(value)),
            ("pack-quantized 4 bits", ".weight_scale", bf16(value)),
            ("int-quantized channel", ".weight_scale", bf16(value)),
            ("gptq 4 bits", ".scales", struct.pack("<e", value)),
            ("awq", ".scales", struct.pack("<e", value)),
            ("nvfp4", ".weight_global_scale", f32(value)),
            ("nvfp4 modelopt", ".weight_scale_2", f32(value)),
            ("nf4", ".weight.absmax", f32(value)),
            ("nf4 nested", ".weight.nested_absmax", f32(value)),
        ):
            yield Case(f"{name}: a scale is {what}", models(name, number(end, 0, raw)), words)
    for code in (0x7F, 0xFF, 0x81):
        change = number(".weight_scale", 3, bytes([code]))
        yield Case(f"nvfp4: a scale is {code:#x}", models("nvfp4", change), "which no scale can be")
    yield Case("E8M0 255", models("mxfp8", number(".weight_scale", 5, b"\xff")), "which no scale can be")
    yield Case(
        "nvfp4: a global scale of zero", models("nvfp4", number(".weight_global_scale", 0, f32(0))), "is 0"
    )
    for name, end, raw in (
        ("fp8 blocks F32", ".weight_scale_inv", f32(0)),
        ("gptq 4 bits", ".scales", bytes(2)),
        ("nvfp4", ".weight_scale", b"\0"),
        ("nvfp4", ".weight_scale", b"\x80"),
        ("nf4", ".weight.absmax", f32(0)),
    ):
        yield Case(f"sound: {name}, a scale of zero", models(name, number(end, 0, raw)), expect="accepted")
    for index in (5, -1, 1 << 30, -(1 << 31)):
        raw = struct.pack("<i", index)
        yield Case(
            f"gptq: a group of {index}", models("gptq 4 bits", number(".g_idx", 7, raw)), "are 3 groups"
        )
        change = number(".weight_g_idx", 7, raw)
        yield Case(f"packed: a group of {index}", models("pack-quantized g_idx", change), "are 5 groups")
    yield Case(
        "gptq: a zero point that loaders read differently",
        models("gptq 4 bits", wrapped), "zero point of 16",
    )  # fmt: skip
    yield Case(
        "nf4: a table of NaN", models("nf4", number(".weight.quant_map", 1, f32(NAN))), "no scale can be"
    )


def wrapped(entries: Entries, config: dict[str, Any]) -> None:
    """Store zero points of 0 as GPTQModel does in format 1."""
    number(".qzeros", 0, b"\xff\xff\xff\xff")(entries, config)
    declared(sym=False, meta={"quantizer": ["gptqmodel:4.2.0"]})(entries, config)


def declarations() -> Iterator[Case]:
    for kind in ("marlin-24", "sparse-24-bitmask", "mxfp6-pack-quantized", "", None, 7, "x" * 5000):
        yield Case(
            f"format {str(kind)[:20]}", models("pack-quantized 4 bits", declared(format=kind)), "is not read"
        )
    for what, groups in (
        ("none", {}), ("a list", []), ("no weights", {"g": {"targets": ["Linear"]}}),
        ("weights that are null", {"g": {"targets": ["Linear"], "weights": None}}),
        ("targets that are a number", {"g": {"targets": 3, "weights": {}}}),
        ("17 bits", {"g": {"targets": ["Linear"], "weights": {"num_bits": 17}}}),
        ("groups of -3", {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": -3}}}),
        ("a block of 0", {"g": {"targets": ["Linear"], "weights": {"block_structure": [0, 1]}}}),
    ):  # fmt: skip
        change = declared(config_groups=groups)
        yield Case(f"config_groups: {what}", models("pack-quantized 4 bits", change), "config.json")
    two = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
    group = two["quantization_config"]["config_groups"]["group_0"]
    for target in ("re:(a+)+$", "re:(", "re:(?R)", "re:.*" + "(x|y)" * 40):
        groups = {"a": {**group, "targets": [target]}, "b": {**group, "targets": [target]}}
        change = declared(config_groups=groups)
        yield Case(f"target {target[:20]}", models("pack-quantized 4 bits", change), "too free")
    change = declared(config_groups={"a": {**group, "targets": ["x"]}, "b": {**group, "targets": ["y"]}})
    yield Case("targets that match nothing", models("pack-quantized 4 bits", change), "match its layer")
    for kind in ("marlin", "gptq_p", 4):
        yield Case(f"gptq: {kind}", models("gptq 4 bits", declared(checkpoint_format=kind)), "is not read")
    yield Case("gptq: other bits", models("gptq 4 bits", declared(bits=8)), "4 bits an element")
    for version, bits in (("gemv", 4), ("llm-awq", 4), ("gemm", 3), ([], 4), ("gemm", True)):
        change = declared(version=version, bits=bits)
        yield Case(
            f"awq {version} {bits}",
            models("awq", change),
            "" if version == [] else "AWQ is read as",
            "refused" if version != [] else "either",
        )
    for what, text in (
        ("no JSON", b"{"), ("no object", b"[]"), ("not UTF-8", b"\xff"), ("nothing in it", b"{}"),
        ("shape of text", b'{"shape": "x", "blocksize": 64}'),
        ("shape of nothing", b'{"shape": [], "blocksize": 64}'),
        ("shape of 2^60", b'{"shape": [1152921504606846976, 64], "blocksize": 64}'),
        ("shape of zeros", b'{"shape": [0, 5], "blocksize": 64}'),
        ("blocks of 0", b'{"shape": [45, 51], "blocksize": 0}'),
        ("blocks of 63", b'{"shape": [45, 51], "blocksize": 63}'),
        ("blocks of 2^70", b'{"shape": [45, 51], "blocksize": 1180591620717411303424}'),
        ("twice the same key", b'{"shape": [45, 51], "shape": [51, 45], "blocksize": 64}'),
        ("a nested offset of text", b'{"shape": [45, 51], "blocksize": 64, "nested_blocksize": 256, "nested_offset": "x"}'),
        ("10000 brackets", b"[" * 4000),
    ):  # fmt: skip
        end = ".weight.quant_state.bitsandbytes__nf4"
        yield Case(f"nf4 state: {what}", models("nf4", replaced(end, "U8", [len(text)], text)), DOWN)

    def undeclared(entries: Entries, config: dict[str, Any]) -> None:
        entries["model.layers.9.x.weight"] = ("U8", [4, 4], bytes(16))

    yield Case("an undeclared U8 weight", models("fp8 blocks F32", undeclared), "codes without a scale")


def all_cases() -> Iterator[Case]:
    """Yield every case; those of `few` go through the command, all of them through what reads a model."""
    yield from shapes()
    yield from numbers()
    yield from declarations()


def few() -> Iterator[Case]:
    """Yield one case of each kind."""
    wanted = (
        "pack-quantized 4 bits: weight_scale of [2, 48]",
        "gptq 4 bits without scales",
        "weight_shape says 65 columns",
        "fp8 blocks F32: a scale is NaN",
        "nvfp4: a global scale of zero",
        "E8M0 255",
        "gptq: a group of 5",
        "sound: gptq 4 bits, a scale of zero",
        "format marlin-24",
        "target re:(a+)+$",
        "nf4 state: shape of 2^60",
        "an undeclared U8 weight",
    )
    found = {case.what: case for case in all_cases()}
    yield from (found[what] for what in wanted)
