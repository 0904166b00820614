"""The table: every threat to the command, what it must get, and the words that tell the user."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.checkpoint import test_index as model_tables
from tests.config import test_schema as schema_tables
from tests.config import test_yaml as yaml_tables
from tests.formats import test_safetensors as header_tables
from tests.formats import test_torch_file as pickle_tables
from tests.laws.hostile.case import CONFIG, Build, Case, file_of, tensor

Tensors = dict[str, tuple[str, list[int], bytes]]
SHARD = "model.safetensors"


def file(path: str, raw: bytes | str) -> Build:
    """Put a file there, whatever was there."""

    def build(d: Path) -> None:
        target = d / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_bytes(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"))

    return build


def both(raw: bytes) -> Build:
    """Give both models the same file."""

    def build(d: Path) -> None:
        for name in ("a", "b"):
            (d / name / SHARD).write_bytes(raw)

    return build


def config(text: bytes | str) -> Build:
    """Write the config."""
    return file("config.yml", text)


def with_tensors(a: Tensors, b: Tensors) -> Build:
    """Give each model its tensors."""

    def build(d: Path) -> None:
        (d / "a" / SHARD).write_bytes(file_of(a))
        (d / "b" / SHARD).write_bytes(file_of(b))

    return build


def nothing(d: Path) -> None:
    """Leave the sound models as they are."""


def in_place_of_shard(make: Any) -> Build:
    """Put something that is no regular file where a shard should be."""

    def build(d: Path) -> None:
        (d / "b" / SHARD).unlink()
        make(d / "b" / SHARD)

    return build


def headers() -> Iterator[Case]:
    for what, raw, words in header_tables.HOSTILE:
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
                model_tables.write_model(d / name, model_tables.SHARDS, model_tables.MAP)
            model_tables.write_model(d, {"secret.safetensors": {"w.2": f32}})
            index = d / "b" / "model.safetensors.index.json"
            index.write_bytes(json.dumps({"weight_map": weight_map}).encode() if raw is None else raw)
            (d / "b" / "config.json").write_text("{}")

        return build

    for what, shard, words in model_tables.HOSTILE_SHARD_NAMES:
        yield Case(f"a shard: {what}", sharded({**model_tables.MAP, "w.2": shard}), words)
    for what, raw, words in model_tables.HOSTILE_INDEX:
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
    saved = pickle_tables.archive(pickle_tables.SOUND)
    yield Case("a model that torch saved, of other names", only(saved), "is missing")
    yield Case("evil beside sound", file("b/pytorch_model.bin", evil[0]), expect="mean")
    for number, program in enumerate(evil[::9]):
        yield Case(f"code, {number}, in a model", only(pickle_tables.archive(program)), "pytorch_model.bin")
        yield Case(
            f"code, {number}, in an archive",
            file("x.bin", pickle_tables.archive(program)),
            "x.bin",
            arguments=arguments,
        )
        yield Case(f"code, {number}, as a file", file("x.bin", program), "x.bin", arguments=arguments)
    for what, program, words in pickle_tables.PROGRAMS:
        yield Case(
            f"a program: {what}", file("x.bin", pickle_tables.archive(program)), words, arguments=arguments
        )
    for what, raw, words in (*pickle_tables.ARCHIVES, *pickle_tables.LEGACY):
        yield Case(f"an archive: {what}", file("x.bin", raw), words, arguments=arguments)


def single_files() -> Iterator[Case]:
    """Models that are one file, and OUT that is one."""
    sound = {"w": ("F32", [2, 3], tensor(3.0)), "n": ("F32", [6], tensor(3.0))}
    raw = file_of(sound)
    arguments = ("merge", "config.yml", "mix.safetensors", "--memory", "512MiB")

    def model(name: str, raw: bytes) -> Build:
        def build(d: Path) -> None:
            file("config.yml", CONFIG.replace("model: b", f"model: {name}"))(d)
            file(name, raw)(d)

        return build

    def refused(what: str, build: Build, words: str) -> Case:
        return Case(what, build, words, arguments=arguments)

    yield Case("a sound file among folders", model("c.safetensors", raw), expect="mean")
    yield refused("half of a file", model("c.safetensors", raw[: len(raw) - 20]), "truncated")
    longer = raw.replace(b"[24, 48]", b"[24, 99]")
    yield refused("a size that lies", model("c.safetensors", longer), "its 75 bytes are not those of F32")
    same = raw.replace(b"[24, 48]", b"[12, 36]")
    yield refused("two tensors on one range", model("c.safetensors", same), "overlap")
    titled = file_of(sound, {"modelspec.title": "\ud800"})
    yield refused("a title that is no text", model("c.safetensors", titled), "c.safetensors")
    saved = pickle_tables.archive(pickle_tables.SOUND)
    for name in ("c.ckpt", "c.bin"):
        yield refused(f"half of {name}", model(name, saved[: len(saved) // 2]), name)
    evil = next(iter(pickle_tables.calls("evil")))
    yield refused("a program in a checkpoint", model("c.ckpt", pickle_tables.archive(evil)), "c.ckpt")
    yield refused(
        "a pipe",
        lambda d: (model("c.ckpt", b"")(d), (d / "c.ckpt").unlink(), os.mkfifo(d / "c.ckpt")),
        "not a regular file",
    )
    yield refused("OUT is someone's file", file("mix.safetensors", raw), "did not make it")
    yield refused("OUT's manifest is someone's", file("mix.safetensors.json", "{}"), "did not make it")
    yield refused(
        "OUT's journal lies among others",
        file("mix.safetensors.streammerge/notes", "x"),
        "did not make (notes)",
    )
    yield refused("OUT's journal is a file", file("mix.safetensors.streammerge", "x"), "is not a directory")
    yield refused(
        "OUT is a model's file", lambda d: os.link(d / "a" / SHARD, d / "mix.safetensors"), "did not make it"
    )
    inside = ("merge", "config.yml", "a/model.safetensors", "--overwrite")
    yield Case("OUT is an input's file", nothing, "is a file of the input", arguments=inside)


def configs() -> Iterator[Case]:
    for number, (text, words) in enumerate(yaml_tables.REFUSED):
        yield Case(f"YAML {number}: {text[:20]!r}", config(text), words)
    for number, text in enumerate(yaml_tables.HUGE):
        yield Case(f"huge YAML {number}", config(text), "config.yml")
    for number, (text, words) in enumerate(schema_tables.REFUSED):
        yield Case(f"schema {number}: {text[-30:]!r}", config(text), words)
    ab = CONFIG

    def parameters(text: str, method: str = "linear", base: str = "") -> Build:
        return config(
            ab.replace("linear", method)
            + (f"base_model: {base}\n" if base else "")
            + f"parameters: {{{text}}}\n"
        )

    yield Case("an unknown method", config(ab.replace("linear", "lineer")), "did you mean 'linear'")
    yield Case("a misspelt parameter", parameters("wieght: 1"), "did you mean 'weight'")
    yield Case(
        "a weight for one model", config(ab + "    parameters: {weight: 1}\n"), "give a weight to all or none"
    )
    for value in ("true", "x", "null", "'1'", ".inf", "1e999", "[]", "[x, y]"):
        yield Case(f"weight: {value}", parameters(f"weight: {value}"), "weight")
    yield Case("weights that sum to zero", parameters("weight: 0"), "sum to 0")
    for value in ("1.5", "-0.1", ".nan", "x"):
        yield Case(f"density: {value}", parameters(f"density: {value}", "ties", "a"), "density")
    yield Case("lambda: nan", parameters("lambda: .nan", "ties", "a"), "lambda")
    yield Case("normalize: 3", parameters("normalize: 3"), "normalize")
    yield Case("ties without a base", config(ab.replace("linear", "ties")), "base_model")
    yield Case("a base that is not there", parameters("density: 0.5", "ties", "nowhere"), "nowhere")
    yield Case("slerp of three", config(ab.replace("linear", "slerp") + "  - model: c\nbase_model: a\n"), "c")
    yield Case(
        "slerp without t", config("merge_method: slerp\nbase_model: a\nmodels: [b]\n"), "'t' is missing"
    )
    yield Case("the same model twice", config(ab + "  - {model: a, alias: again}\n"), expect="accepted")
    for what, text in (
        ("CRLF", ab.replace("\n", "\r\n")),
        ("a byte order mark", "\ufeff" + ab),
        ("comments", "# x\n" + ab + "# y"),
        ("a gradient of weights", ab + "parameters: {weight: [1, 1]}"),
        ("no end of line", ab.rstrip()),
    ):
        yield Case(f"sound: {what}", config(text), expect="mean")
    yield Case("a pipe for a config", _pipe_config, "not a regular file")


def _pipe_config(d: Path) -> None:
    (d / "config.yml").unlink()
    os.mkfifo(d / "config.yml")


def options() -> Iterator[Case]:
    def memory(value: str, words: str, expect: str = "refused") -> Case:
        return Case(
            f"--memory={value}", nothing, words, expect, ("merge", "config.yml", "out", f"--memory={value}")
        )

    for value in ("0", "-1", "text", "nan", "", "1e999", "-5GiB"):
        yield memory(value, f"'{value}' is not a {'positive ' * (value == '0')}size")
    yield memory("1KiB", "give at least")
    yield memory("1024TiB", "", "mean")
    yield Case(
        "an unknown device", nothing, "tpu", arguments=("merge", "config.yml", "out", "--device", "tpu")
    )
    yield Case(
        "an unknown option", nothing, "--memry", arguments=("merge", "config.yml", "out", "--memry", "1")
    )
    yield Case("--threads 0", nothing, "threads", arguments=("merge", "config.yml", "out", "--threads", "0"))
    yield Case("--seed -1", nothing, "seed", arguments=("merge", "config.yml", "out", "--seed", "-1"))
    yield Case(
        "--shard-size x", nothing, "size", arguments=("merge", "config.yml", "out", "--shard-size", "x")
    )
    yield Case("no config", nothing, "nowhere.yml", arguments=("merge", "nowhere.yml", "out"))

    def out(make: Any) -> Build:
        def build(d: Path) -> None:
            make(d / "out")

        return build

    def foreign(p: Path) -> None:
        p.mkdir()
        (p / SHARD).write_bytes(file_of({"w": ("F32", [1], bytes(4))}))

    yield Case("OUT is a file", out(lambda p: p.write_text("x")), "not a directory", keep_out=True)
    yield Case("OUT holds another model", out(foreign), "did not make", keep_out=True)
    yield Case(
        "OUT holds a stranger's file",
        out(lambda p: (p.mkdir(), (p / "notes").write_text("x"))),
        "did not make",
        keep_out=True,
    )
    yield Case("OUT is empty", out(Path.mkdir), expect="mean")
    yield Case("OUT is an input", nothing, "holds the input", arguments=("merge", "config.yml", "b"))
    yield Case(
        "OUT is a link to an input", out(lambda p: p.symlink_to("b")), "holds the input", keep_out=True
    )
    yield Case("OUT is below a file", nothing, "", "failed", ("merge", "config.yml", "config.yml/out"))
    yield Case("OUT is in /proc", nothing, "", "failed", ("merge", "config.yml", "/proc/out"))
    yield Case("OUT has a name too long", nothing, "", "failed", ("merge", "config.yml", "n" * 300))


SECTIONS = {
    "file and header": headers,
    "tensors": tensors,
    "index, shards, directories": directories,
    "pickles": pickles,
    "single files": single_files,
    "config": configs,
    "options and OUT": options,
}
