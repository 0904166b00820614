"""The table: every threat to the command, what it must get, and the words that tell the user."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.config import test_schema as schema_tables
from tests.config import test_yaml as yaml_tables
from tests.formats import dcp_files as dcp_tables
from tests.formats import torch_bytes
from tests.formats.test_torch_hostile import calls
from tests.laws.hostile import quantised
from tests.laws.hostile.builds import (
    SHARD,
    config,
    file,
    nothing,
)
from tests.laws.hostile.case import CONFIG, Build, Case, file_of, tensor
from tests.laws.hostile.model_cases import directories, headers, pickles, tensors


def distributed() -> Iterator[Case]:
    def only(write: Any) -> Build:
        def build(d: Path) -> None:
            shutil.rmtree(d / "b")
            write(d / "b")

        return build

    for what, write, words in dcp_tables.HOSTILE[::5]:  # all of them: tests/formats/test_torch_dcp.py
        yield Case(f"DCP: {what}", only(write), words)


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
    saved = torch_bytes.archive(torch_bytes.SOUND)
    for name in ("c.ckpt", "c.bin"):
        yield refused(f"half of {name}", model(name, saved[: len(saved) // 2]), name)
    evil = next(iter(calls("evil")))
    yield refused("a program in a checkpoint", model("c.ckpt", torch_bytes.archive(evil)), "c.ckpt")
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
    yield refused("OUT's journal is a file", file("mix.safetensors.streammerge", "x"), "must be a directory")
    yield refused(
        "OUT is a model's file", lambda d: os.link(d / "a" / SHARD, d / "mix.safetensors"), "did not make it"
    )
    inside = ("merge", "config.yml", "a/model.safetensors", "--overwrite")
    yield Case("OUT is an input's file", nothing, "is a file of the input", arguments=inside)


def configs() -> Iterator[Case]:
    for number, (text, words) in enumerate(yaml_tables.REFUSED):
        staged = words == yaml_tables.TWO  # a config may have several documents
        yield Case(f"YAML {number}: {text[:20]!r}", config(text), "unknown key 'a'" if staged else words)
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
    for value in ("true", "x", "null", "'1x'", ".inf", "1e999", "[]", "[x, y]"):
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
    yield Case("OUT holds another model", out(foreign), "did not write", keep_out=True)
    yield Case(
        "OUT holds a stranger's file",
        out(lambda p: (p.mkdir(), (p / "notes").write_text("x"))),
        "did not write",
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
    "torch DCP": distributed,
    "single files": single_files,
    "config": configs,
    "options and OUT": options,
    "quantised": quantised.few,
}
