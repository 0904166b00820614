"""Hostile models: headers, tensors, directories, pickles."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.checkpoint import sharded as model_tables
from tests.checkpoint import test_index_refused as index_tables
from tests.formats import safetensors_cases, torch_bytes
from tests.formats import test_safetensors as header_tables
from tests.formats import test_torch_hostile as pickle_tables
from tests.formats.safetensors_files import write_model
from tests.formats.test_torch_legacy import LEGACY
from tests.laws.hostile.builds import (
    SHARD,
    Tensors,
    both,
    file,
    in_place_of_shard,
    with_tensors,
)
from tests.laws.hostile.case import Build, Case, tensor


def headers() -> Iterator[Case]:
    for what, raw, words in safetensors_cases.HOSTILE:
        yield Case(what, file(f"b/{SHARD}", raw), words)
    for what, raw in header_tables.ACCEPTED:
        yield Case(f"sound: {what}", both(raw), expect="accepted")
    yield Case("a pipe", in_place_of_shard(os.mkfifo), "a pipe")
    yield Case("a directory", in_place_of_shard(Path.mkdir), "a directory")
    yield Case("/dev/zero", in_place_of_shard(lambda p: p.symlink_to("/dev/zero")), "a device")
    yield Case("a dangling link", in_place_of_shard(lambda p: p.symlink_to("nowhere")), "missing")
    yield Case("a link to itself", in_place_of_shard(lambda p: p.symlink_to(SHARD)), "b")
    yield Case("missing", in_place_of_shard(lambda p: None), "no model here")

    def blob(d: Path) -> None:
        (d / "blobs").mkdir()
        (d / "b" / SHARD).rename(d / "blobs" / "0123")
        (d / "b" / SHARD).symlink_to("../../" + d.name + "/blobs/0123")

    yield Case("a link to a blob, as in the hub's cache", blob, expect="mean")


def tensors() -> Iterator[Case]:
    one: Tensors = {"w": ("F32", [2, 3], tensor(1.0)), "n": ("F32", [6], tensor(1.0))}
    three: Tensors = {"w": ("F32", [2, 3], tensor(3.0)), "n": ("F32", [6], tensor(3.0))}

    def extra(name: str, entry: tuple[str, list[int], bytes], other: Any = None) -> Build:
        return with_tensors({**one, name: entry}, {**three, name: other or entry})

    yield from dtypes(one, three)
    for what, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        yield Case(what, extra("z", ("F32", [2], tensor(value, 2))), "holds NaN or infinity at element 0")
    for what, name in (
        ("unicode", "模型.😀"),
        ("quotes", 'it\'s "it"'),
        ("a path", "../../x"),
        ("an absolute path", "/abs"),
        ("a terminal escape", "\x1b[31mred\n"),
        ("4096 characters", "n" * 4096),
        ("a line separator", "a\u2028b"),
        ("text that runs backwards", "\u202egnp"),
    ):
        yield Case(f"a name with {what}", extra(name, ("F32", [1], tensor(1.0, 1))), expect="accepted")
        other = ("F32", [2], tensor(1.0, 2))
        yield Case(
            f"a bad tensor whose name has {what}", extra(name, ("F32", [1], tensor(1.0, 1)), other), "tensor"
        )
    yield Case("a tensor that one model lacks", with_tensors({**one, "z": one["n"]}, three), "z is missing")
    yield Case(
        "a tensor that only one model has",
        with_tensors(one, {**three, "z": three["n"]}),
        "left out (first: z)",
        "accepted",
    )
    yield from kinds(one, three)
    for what, shape, n in (
        ("another shape", [3, 3], 9),
        ("transposed", [3, 2], 6),
        ("another rank", [6], 6),
        ("a larger vocabulary", [4, 3], 12),
    ):
        yield Case(what, with_tensors(one, {**three, "w": ("F32", shape, tensor(3.0, n))}), "tensor w")


def dtypes(one: Tensors, three: Tensors) -> Iterator[Case]:
    """Shapes and dtypes: those that are averaged, copied where they are equal, and refused."""

    def extra(name: str, entry: tuple[str, list[int], bytes], other: Any = None) -> Build:
        return with_tensors({**one, name: entry}, {**three, name: other or entry})

    yield Case("a zero size", extra("z", ("F32", [0, 3], b"")), expect="mean")
    yield Case("a scalar", extra("z", ("F32", [], tensor(1.0, 1))), expect="mean")
    yield Case("five dimensions of one", extra("z", ("F32", [1] * 5, tensor(1.0, 1))), expect="mean")
    yield Case("64-bit floats", extra("z", ("F64", [2], bytes(16))), expect="mean")
    yield Case("equal integers", extra("z", ("I64", [2], bytes(16))), expect="mean")
    yield Case("equal booleans", extra("z", ("BOOL", [2], b"\1\0")), expect="mean")
    yield Case("mixed floats", extra("z", ("BF16", [2], bytes(4)), ("F16", [2], bytes(4))), expect="mean")
    yield Case("floats and integers", extra("z", ("F32", [2], bytes(8)), ("I32", [2], bytes(8))), "z")
    yield Case("integer dtypes that differ", extra("z", ("I64", [2], bytes(16)), ("I32", [2], bytes(8))), "z")
    for dtype in ("F8_E4M3", "F8_E5M2"):
        yield Case(f"{dtype}, which is a float", extra("z", (dtype, [4], bytes(4))), expect="mean")
        yield Case(f"{dtype}, not a number", extra("z", (dtype, [4], b"\x7f" * 4)), "z")
        codes = {"z.weight": (dtype, [2, 2], bytes(4))}
        scaled = {**codes, "z.weight_scale": ("F32", [1], tensor(2.0, 1))}
        yield Case(
            f"{dtype} with a scale", with_tensors({**one, **scaled}, {**three, **scaled}), expect="mean"
        )
        for value in (float("nan"), float("inf"), -1.0):
            bad = {**codes, "z.weight_scale": ("F32", [1], tensor(value, 1))}
            yield Case(
                f"{dtype} with a scale of {value}",
                with_tensors({**one, **bad}, {**three, **bad}),
                "z.weight_scale",
            )
        for scale in (("F32", [3], bytes(12)), ("I32", [1], bytes(4))):
            bad = {**codes, "z.weight_scale": scale}
            yield Case(
                f"{dtype} with scales {scale[:2]}",
                with_tensors({**one, **bad}, {**three, **bad}),
                "z.weight_scale",
            )
    for dtype, nbytes in (("F8_E8M0", 4), ("F4", 2), ("C64", 32)):
        yield Case(f"{dtype}, which is not averaged", extra("z", (dtype, [4], bytes(nbytes))), "dequantise")
    for dtype, nbytes in (("U8", 4), ("U64", 32)):
        yield Case(f"{dtype}, equal", extra("z", (dtype, [4], bytes(nbytes))), expect="mean")


def kinds(one: Tensors, three: Tensors) -> Iterator[Case]:
    """Models whose tensors must find each other, or be told from each other."""

    def named(stems: list[str], n: int = 4, size: int = 2) -> Tensors:
        return {f"{stem}{i}.w.weight": ("F32", [size], tensor(1.0, size)) for stem in stems for i in range(n)}

    escape = "\x1b[31m\n\u202e."
    yield Case(
        "names that begin otherwise",
        with_tensors(named(["model."]), named(["bert."])),
        "bert.* is model.*",
        "accepted",
    )
    yield Case(
        "names that begin with an escape",
        with_tensors(named(["model."]), named([escape])),
        "is model.*",
        "accepted",
    )
    yield Case(
        "two places that fit",
        with_tensors(named(["x.", "y."]), named([escape])),
        ": list one of these under",
    )
    yield Case(
        "other architectures",
        with_tensors(named(["x."]), {f"y.{i}": t for i, t in enumerate(one.values())}),
        "share 0 of 2 tensors: different architectures",
    )
    yield Case("another depth", with_tensors(named(["x."], 4), named(["x."], 5)), "has 5 layers")
    yield Case(
        "another depth, the deeper first", with_tensors(named(["x."], 5), named(["x."], 4)), "has 4 layers"
    )
    yield Case(
        "other widths", with_tensors(named(["x."]), named(["x."], size=3)), "4 of 4 tensors differ in shape"
    )
    dots = {f"{i}{'.' * 4000}w": t for i, t in enumerate(named(["x"], 40).values())}
    yield Case(
        "names of 4000 dots", with_tensors({**one, **dots}, {f"z{n}": t for n, t in dots.items()}), "tensor"
    )
    huge = {
        "m.experts.999999.w1.weight": ("F32", [1, 1], tensor(1.0, 1)),
        "m.experts.0.w2.weight": ("F32", [1, 1], tensor(1.0, 1)),
    }
    fused = {
        "m.experts.gate_up_proj": ("F32", [0, 2, 1], b""),
        "m.experts.down_proj": ("F32", [0, 1, 1], b""),
    }
    yield Case(
        "experts without number or end", with_tensors({**one, **huge}, {**three, **fused}), "tensor m.experts"
    )


def directories() -> Iterator[Case]:
    f32 = model_tables.F32

    def sharded(weight_map: Any, raw: bytes | None = None) -> Build:
        def build(d: Path) -> None:
            for name in ("a", "b"):
                shutil.rmtree(d / name)
                write_model(d / name, model_tables.SHARDS, model_tables.MAP)
            write_model(d, {"secret.safetensors": {"w.2": f32}})
            index = d / "b" / "model.safetensors.index.json"
            index.write_bytes(json.dumps({"weight_map": weight_map}).encode() if raw is None else raw)
            (d / "b" / "config.json").write_text("{}")

        return build

    for what, shard, words in index_tables.HOSTILE_SHARD_NAMES:
        yield Case(f"a shard: {what}", sharded({**model_tables.MAP, "w.2": shard}), words)
    for what, raw, words in index_tables.HOSTILE_INDEX:
        yield Case(f"an index: {what}", sharded(None, raw), words)
    a, b = model_tables.A, model_tables.B
    for what, weight_map, words in (
        ("a tensor that the shard lacks", {**model_tables.MAP, "w.9": a}, "is not in its shard"),
        ("another shard's tensor", {**model_tables.MAP, "w.0": b}, "but in"),
    ):
        yield Case(what, sharded(weight_map), words)
    yield Case(
        "a wrong total_size",
        sharded(None, json.dumps({"metadata": {"total_size": -7}, "weight_map": model_tables.MAP}).encode()),
        expect="accepted",
    )
    left_out = {k: v for k, v in model_tables.MAP.items() if k != "w.1"}
    yield Case("a tensor that the index leaves out", sharded(left_out), "w.1", expect="either")

    def damaged(change: Any) -> Build:
        def build(d: Path) -> None:
            sharded(model_tables.MAP)(d)
            change(d / "b" / b)

        return build

    yield Case("a shard is missing", damaged(Path.unlink), "missing")
    yield Case("a shard is cut", damaged(lambda p: p.write_bytes(p.read_bytes()[:-1])), "truncated")
    yield Case("a shard is a directory", damaged(lambda p: (p.unlink(), p.mkdir())), "a directory")
    yield Case(
        "the same name in two shards, no index",
        damaged(
            lambda p: (
                p.write_bytes((p.parent / a).read_bytes()),
                (p.parent / "model.safetensors.index.json").unlink(),
            )
        ),
        "is in",
    )
    yield Case(
        "shards without an index",
        damaged(lambda p: (p.parent / "model.safetensors.index.json").unlink()),
        expect="accepted",
    )
    yield from odd_places()
    yield from files_beside()
    yield from odd_names()


def odd_places() -> Iterator[Case]:
    """Places where a model should be, and is none."""

    def gone(d: Path) -> None:
        shutil.rmtree(d / "b")

    def emptied(d: Path) -> None:
        (d / "b" / SHARD).unlink()
        (d / "b" / "config.json").unlink()

    def a_file(d: Path) -> None:
        gone(d)
        (d / "b").write_text("x")

    yield Case("no such model", gone, "b")
    yield Case("an empty directory", emptied, "no model here")
    yield Case("a file for a model", a_file, "b")


def files_beside() -> Iterator[Case]:
    """Files beside the weights that are not what their names say."""
    for what, raw in (
        ("broken", b"{"),
        ("deep", b'{"a":' + b"[" * 100_000),
        ("no object", b"[]"),
        ("binary", b"\xff\xfe"),
    ):
        yield Case(f"a config.json that is {what}", file("a/config.json", raw), "config.json")
    for what, raw in (
        ("leads out", '[{"path": "../b"}, {"path": "/etc"}, {"path": "x\\u0000"}]'),
        ("a bomb", "[" * 100_000),
        ("of lone surrogates", '[{"path": "\\ud800"}]'),
        ("endless digits", "9" * 100_000),
        ("no text", b"\xff\xfe"),
    ):
        yield Case(f"a modules.json that is {what}", file("a/modules.json", raw), expect="mean")
        yield Case(
            f"a tokenizer_config.json that is {what}", file("a/tokenizer_config.json", raw), expect="mean"
        )
        yield Case(f"a README that is {what}", file("a/README.md", raw), expect="mean")


def odd_names() -> Iterator[Case]:
    """Directories whose names a shell or a format would act on."""
    for name in ("it's", "$(touch evil)", "%s%n", "-rf", "模型", "a b", "`id`"):

        def odd(d: Path, name: str = name) -> None:
            (d / "b").rename(d / name)
            (d / "config.yml").write_text(
                f"merge_method: linear\nmodels:\n  - model: a\n  - model: {json.dumps('./' + name)}\n"
            )

        yield Case(f"a directory called {name}", odd, expect="mean")


def pickles() -> Iterator[Case]:
    def only(raw: bytes) -> Build:
        def build(d: Path) -> None:
            (d / "b" / SHARD).unlink()
            (d / "b" / "pytorch_model.bin").write_bytes(raw)

        return build

    arguments = ("fisher", "import", "b", "x.bin", "--out", "out", "--memory", "512MiB")
    evil = list(pickle_tables.calls("evil"))

    def sound(d: Path) -> None:
        import torch

        (d / "b" / SHARD).unlink()
        tensors = {"w": torch.full((2, 3), 3.0), "n": torch.full((6,), 3.0)}
        torch.save(tensors, d / "b" / "pytorch_model.bin")

    yield Case("a sound model that torch saved", sound, expect="mean")
    saved = torch_bytes.archive(torch_bytes.SOUND)
    yield Case("a model that torch saved, of other names", only(saved), "is missing")
    yield Case("evil beside sound", file("b/pytorch_model.bin", evil[0]), expect="mean")
    for number, program in enumerate(evil[::9]):
        yield Case(f"code, {number}, in a model", only(torch_bytes.archive(program)), "pytorch_model.bin")
        yield Case(
            f"code, {number}, in an archive",
            file("x.bin", torch_bytes.archive(program)),
            "x.bin",
            arguments=arguments,
        )
        yield Case(f"code, {number}, as a file", file("x.bin", program), "x.bin", arguments=arguments)
    for what, program, words in pickle_tables.PROGRAMS:
        yield Case(
            f"a program: {what}", file("x.bin", torch_bytes.archive(program)), words, arguments=arguments
        )
    for what, raw, words in (*pickle_tables.ARCHIVES, *LEGACY):
        yield Case(f"an archive: {what}", file("x.bin", raw), words, arguments=arguments)
