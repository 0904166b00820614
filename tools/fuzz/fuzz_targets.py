"""The fuzzer's targets: readers of files from strangers, the inputs they start from, and what must hold of each.

A target's `check` returns quietly where the input was accepted and is read rightly, or refused as promised: an
error of our own, in one bounded line that a terminal can show. Everything else leaves it as an exception. No
fuzzing engine is needed: `examine` runs one input, as the tests do.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
import re
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import fuzz_mutate
from fuzz_models import AdapterSettings, TokenizerFile

from streammerge.checkpoint.companions import open_fisher
from streammerge.checkpoint.hub import find_snapshot, parse_name
from streammerge.checkpoint.index import open_model
from streammerge.checkpoint.names import count_layers, layer_fraction
from streammerge.checkpoint.shards import INDEX_NAME
from streammerge.config import config_from_mapping, parse_config
from streammerge.config.settings import value_for
from streammerge.config.strict_yaml import dump_yaml, load_yaml
from streammerge.dtypes import itemsize
from streammerge.errors import ConfigError, InputError, ModelError, StreammergeError
from streammerge.formats.refs import StridedRef
from streammerge.formats.safetensors import read_header
from streammerge.formats.torch_file import read_pickle
from streammerge.formats.zarr_chunks import _decode
from streammerge.formats.zarr_store import GROUP_FILE
from streammerge.io.reader import Reader
from streammerge.io.strict_json import parse_object
from streammerge.output.check import verify
from streammerge.output.edits import find_edits
from streammerge.output.journal import _line, _load
from streammerge.output.manifest import MANIFEST, read_manifest, seal
from streammerge.tensors.read import read_elements
from streammerge.units import format_size, parse_size

MAX_NBYTES = 1 << 16
"""Longest input."""
MAX_SECONDS = 1.0
"""The most seconds of CPU time that one input may take."""
MAX_GROWTH = 64 << 20
"""Bytes by which one input may raise the peak memory of the process."""
MAX_LINE = 1000
"""Characters of a refusal."""

ROOT = Path(__file__).resolve().parents[2]


class Finding(AssertionError):
    """Something that must hold does not; the message says what."""


def require(holds: bool, otherwise: str) -> None:
    """Raise a `Finding` unless something holds."""
    if not holds:
        raise Finding(otherwise)


def refused(error: Exception, *kinds: type[Exception], limit: int = MAX_LINE) -> str:
    """Return the line of a refusal that is as promised: of a kind that may come, one line, bounded."""
    line = str(error)
    require(type(error) in kinds, f"{type(error).__name__}: {line[:200]!r}")
    require(0 < len(line) <= limit, f"a refusal of {len(line)} characters: {line[:100]!r}")
    require(line.isprintable(), f"a refusal that is not one printable line: {line[:200]!r}")
    return line


@dataclass(frozen=True)
class Target:
    """One reader."""

    name: str
    about: str
    seeds: Callable[[], Iterable[bytes]]
    check: Callable[[bytes], None]
    change: Callable[[bytes, Random, fuzz_mutate.Blind], bytes | None] | None = None
    """Changes an input so that its frame stays whole."""


def examine(target: Target, raw: bytes) -> str | None:
    """Run one input; return what is wrong, or None."""
    peak, began = _peak(), time.process_time()
    try:
        target.check(raw)
    except StreammergeError as error:
        return f"{type(error).__name__} where none may come: {str(error)[:200]!r}"
    except Finding as finding:
        return str(finding)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r} at {_where(error)}"
    seconds, growth = time.process_time() - began, _peak() - peak
    if seconds > MAX_SECONDS:
        return f"took {seconds:.1f} s of CPU time"
    return f"took {growth >> 20} MiB of memory" if growth > MAX_GROWTH else None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _where(error: Exception) -> str:
    trace = error.__traceback__
    frames = []
    while trace is not None:
        frames.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(frames[-3:])


def _table(module: str, name: str) -> list[tuple]:
    """Return a table of one of the test modules."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return getattr(importlib.import_module(f"tests.{module}"), name)


def _texts(rows: Iterable[bytes | str]) -> list[bytes]:
    found = (row if isinstance(row, bytes) else row.encode("utf-8", "surrogatepass") for row in rows)
    return [row for row in found if len(row) <= MAX_NBYTES]


# --- the header of a safetensors file

STRICTER = (
    "holds no tensors",
    "twice",
    "the header is not a JSON object: not",
    "unknown field",
    "empty name",
    "characters, more than",
    "__metadata__ is not a map of strings",
    "dimensions, more than",
    "negative number",
    "has an integer of",
    "where only whole numbers",
    "lone surrogate",
    "its 0 bytes are not those",
)
"""Files that the reference library accepts and we refuse, by a part of the message: see formats/safetensors.py. It passes over the
numbers and strings of unknown fields, and stops multiplying sizes at a zero."""


class Header:
    """Whatever we accept, the safetensors library reads to the same tensors; it refuses all else but a table."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "model.safetensors"

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        import safetensors

        self._path.write_bytes(raw)
        try:
            expected = dict(safetensors.deserialize(raw))
        except safetensors.SafetensorError:
            expected = None
        try:
            tensors, metadata, stamp = read_header(self._path)
        except Exception as error:
            line = refused(error, ModelError)
            require(
                expected is None or any(part in line for part in STRICTER),
                f"stricter than the reference: {line}",
            )
            return
        require(expected is not None, f"accepted, the reference refuses: {list(tensors)[:3]}")
        found = {n: (r.dtype, list(r.shape), raw[r.offset : r.offset + r.nbytes]) for n, r in tensors.items()}
        want = {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in expected.items()}
        require(found == want, "read otherwise than the reference reads it")
        with safetensors.safe_open(self._path, framework="np") as file:
            require(metadata == (file.metadata() or {}), "other metadata than the reference reads")
        require(stamp.nbytes == len(raw), "a stamp of another size")

    @staticmethod
    def seeds() -> list[bytes]:
        """Return the tables of the header's tests."""
        rows = [
            row[1] for name in ("HOSTILE", "ACCEPTED") for row in _table("formats.test_safetensors", name)
        ]
        many = {f"t{i}": ("F32" if i % 2 else "BF16", (i % 5, 3)) for i in range(40)}
        return _texts([*rows, _table("formats.safetensors_files", "sound")(many, {"format": "pt"})])


# --- JSON, and the index of a model in shards


def _same_json(ours: object, theirs: object) -> bool:
    return repr(ours) == repr(theirs)  # NaN is not equal to itself; 1 and 1.0 are told apart


def check_json(raw: bytes) -> None:
    """Accepted text reads as `json` reads it; the first byte chooses the numbers allowed."""
    numbers = ("natural", "finite", "any")[raw[0] % 3] if raw else "any"
    text = raw[1:]
    try:
        value = parse_object(text, "x.json", "the file", numbers)
    except Exception as error:
        refused(error, ModelError)
        return
    require(_same_json(value, json.loads(text)), "read otherwise than json reads it")
    json.dumps(value, ensure_ascii=False).encode()  # no lone surrogate came through


def _json_seeds() -> list[bytes]:
    rows = [row[1][8:] for row in _table("formats.test_safetensors", "HOSTILE")]
    rows += [row[1] for row in _table("checkpoint.test_index", "HOSTILE_INDEX")]
    return [bytes([i % 3]) + row for i, row in enumerate(_texts(rows))]


def _change_json(raw: bytes, rng: Random, blind: fuzz_mutate.Blind) -> bytes | None:
    changed = fuzz_mutate.json_text(raw[1:], rng, blind) if raw else None
    return None if changed is None else raw[:1] + changed


_A, _B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_NAMES = [
    "w.0",
    "w.1",
    "w.2",
    "w.3",
    _A,
    _B,
    "other.safetensors",
    "../other.safetensors",
    "config.json",
    "weight_map",
]


class Model:
    """An index beside sound shards: every tensor of the model is one that the named shard of it has."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "model"
        shards = {_A: ("w.0", "w.1"), _B: ("w.2",), "other.safetensors": ("w.0", "w.3")}
        self._directory.mkdir(exist_ok=True)
        sound = _table("formats.safetensors_files", "sound")
        for file, names in shards.items():
            (self._directory / file).write_bytes(sound(dict.fromkeys(names, ("F32", (2,)))))
        self._shards = shards

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        (self._directory / INDEX_NAME).write_bytes(raw)
        try:
            model = open_model(self._directory)
        except Exception as error:
            refused(error, ModelError)
            return
        wanted = json.loads(raw)["weight_map"]
        require(set(model) == set(wanted), "other tensors than the weight_map has")
        for name, ref in model.items():
            shard = os.path.basename(ref.path)
            require(shard == wanted[name] and name in self._shards[shard], f"{name} from {shard}")
            require(os.path.dirname(ref.path) == str(self._directory), f"{ref.path} is outside")
            require(len(model.view(name)) == ref.nbytes == 8, "another size")

    @staticmethod
    def seeds() -> list[bytes]:
        """Return the tables of the index's tests, and sound ones."""
        maps = [{"w.0": _A, "w.1": _A, "w.2": _B}, {"w.3": "other.safetensors"}]
        maps += [{"w.0": row[1]} for row in _table("checkpoint.test_index", "HOSTILE_SHARD_NAMES")]
        rows = [json.dumps({"metadata": {"total_size": 24}, "weight_map": m}) for m in maps]
        return _texts([*rows, *(row[1] for row in _table("checkpoint.test_index", "HOSTILE_INDEX"))])


class Reference:
    """The name of a model in the hub's cache never leads out of the cache."""

    def __init__(self, directory: Path) -> None:
        self._cache = directory / "cache" / "hub"
        repo = self._cache / "models--org--name"
        for commit in ("0123456789abcdef", "0123fedcba987654"):
            (repo / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        for ref, commit in (("main", "0123456789abcdef"), ("v1", "../../../../.."), ("pr/1", "absent")):
            (repo / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (repo / "refs" / ref).write_text(commit)

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        name = parse_name(raw.decode("utf-8", "surrogateescape"))
        if name is None:
            return
        try:
            found = find_snapshot(name, self._cache)
        except Exception as error:
            refused(error, ModelError)
            return
        if found is not None:
            require(found.resolve().is_relative_to(self._cache), f"{found} is outside the cache")
            require(found.parent.name == "snapshots", f"{found} is no snapshot")

    @staticmethod
    def seeds() -> list[bytes]:
        """Return names as people write them, and worse."""
        names = [
            "org/name",
            "org/name@main",
            "org/name@v1",
            "org/name@0123",
            "org/name@pr/1",
            "name",
            "a/b/c",
            "../name",
            "org/..",
            "org/name@../..",
            "org--x/name",
            "org/name@0123456789abcdef",
            "a" * 96,
            "org/name@refs/pr/1",
            "org/name@",
            "@x",
            "org/na\0me",
            "org/name\n",
        ]
        return _texts(names)


# --- pickled checkpoints


class Pickles:
    """Whatever we accept and torch's restricted unpickler accepts too is the same, byte for byte."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "pytorch_model.bin"

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        self._path.write_bytes(raw)
        try:
            tensors, stamp = read_pickle(self._path)
        except Exception as error:
            refused(error, ModelError)
            return
        require(stamp.nbytes == len(raw), "a stamp of another size")
        for name, ref in tensors.items():
            lies = ref.stored
            inside = name == ref.name and 0 <= lies.offset <= lies.offset + lies.nbytes <= len(raw)
            if isinstance(ref, StridedRef):
                span = sum((n - 1) * step for n, step in zip(ref.shape, ref.strides, strict=True))
                inside = inside and (1 + span) * itemsize(ref.dtype) <= lies.nbytes
            require(inside, f"{ref} is outside")
        self._compare(raw, tensors)

    def _compare(self, raw: bytes, tensors: dict) -> None:
        import torch

        try:
            loaded = torch.load(self._path, weights_only=True)
        except Exception:
            return  # It checks what we do not look at: the names of devices, hooks, checksums.
        for wrapper in ("state_dict", "model", "module"):
            if isinstance(loaded.get(wrapper), dict):
                loaded = loaded[wrapper]
                break
        else:
            if len(loaded) == 1 and isinstance(inner := next(iter(loaded.values())), dict):
                loaded = inner
        require(loaded.keys() == tensors.keys(), "other names than torch reads")
        for name, ref in tensors.items():
            tensor = loaded[name].detach()
            require(tuple(tensor.shape) == ref.shape, f"{name}: another shape than torch reads")
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if ref.nbytes else b""
            reader = Reader("read")
            found = read_elements(reader, ref, 0, ref.n_elements).tobytes() if ref.nbytes < 1 << 24 else data
            reader.close()
            require(data == found, f"{name}: other bytes than torch reads")

    @staticmethod
    def seeds() -> list[bytes]:
        """Return the tables of the tests, and what torch writes."""
        import io

        import torch

        archive = _table("formats.test_torch_file", "archive")
        rows = [archive(row[1]) for row in _table("formats.test_torch_file", "PROGRAMS")]
        rows += [
            row[1] for table in ("ARCHIVES", "LEGACY") for row in _table("formats.test_torch_file", table)
        ]
        x = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
        state = {"w": x, "tied": x, "row": x[1:], "b": torch.ones(3), "u": torch.ones(2).to(torch.uint16)}
        for value in (
            state,
            {"state_dict": state},
            torch.nn.Linear(2, 3).state_dict(),
            {"p": torch.nn.Parameter(x)},
            {"turned": x.T, "steps": x[::2, 1:], "more": x[0].expand(2, 4), "over": x.unfold(1, 2, 1)},
            {
                "state_dict": {"w": x},
                "epoch": 3,
                "lists": [1, 2.5, (None, "x")],
                "optimizer": {0: {"step": 1}},
            },
        ):
            for protocol, new in ((2, True), (4, True), (2, False), (5, False)):
                buffer = io.BytesIO()
                torch.save(value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
                rows.append(buffer.getvalue())
        rows += [fuzz_mutate.zipped(fuzz_mutate.unzip(row)) for row in rows if fuzz_mutate.unzip(row)]
        return _texts(rows)


# --- the config


def check_yaml(raw: bytes) -> None:
    """An accepted config can be written and read back; its strings can be encoded."""
    try:
        value = load_yaml(raw, "c.yml")
    except Exception as error:
        refused(error, ConfigError)
        return
    if len(raw) < 4096:  # Aliases written out take longer than they are worth here.
        text = dump_yaml(value)
        if len(text) < 1 << 20:
            require(_same_json(load_yaml(text, "c.yml"), value), "written and read back it is another value")


_TENSORS = [
    "model.embed.weight",
    "model.layers.0.mlp.up.weight",
    "model.layers.7.self_attn.q.weight",
    "lm_head",
]


def check_config(raw: bytes) -> None:
    """A config that is accepted is a plain value, gives each tensor its parameters, and is the same as a mapping."""
    try:
        config = parse_config(raw, "c.yml")
    except Exception as error:
        refused(error, ConfigError, limit=6000)
        return
    require(pickle.loads(pickle.dumps(config)) == config, "it does not pickle")
    hash(config)
    layers = count_layers(_TENSORS)
    for setting in (*config.parameters.values(), *(s for m in config.models for s in m.parameters.values())):
        for tensor in _TENSORS:
            value = value_for(setting, tensor, layer_fraction(tensor, layers))
            require(value is None or isinstance(value, bool | int | float | str), "no scalar")
            require(not isinstance(value, float) or math.isfinite(value), f"{value} for {tensor}")
    data = load_yaml(raw, "c.yml")
    again = config_from_mapping(data, "c.yml")
    for field in (
        "merge_method",
        "models",
        "base_model",
        "dtype",
        "out_dtype",
        "parameters",
        "seed",
        "exclude",
    ):
        require(repr(getattr(again, field)) == repr(getattr(config, field)), f"{field} differs as a mapping")


def _yaml_seeds() -> list[bytes]:
    rows = [row[0] for name in ("ACCEPTED", "REFUSED") for row in _table("config.test_yaml", name)]
    return _texts([*rows, *_table("config.test_yaml", "HUGE")])


def _config_seeds() -> list[bytes]:
    rows = [row[0] for row in _table("config.test_schema", "REFUSED")]
    models = "models: [{model: a, parameters: {weight: 0.5}}, {model: b, alias: c, parameters: {weight: [0, 1.5]}}]\n"
    tops = [
        "merge_method: ties\nbase_model: base\nparameters: {density: 0.2, normalize: true}\ndtype: bfloat16\n",
        "merge_method: linear\nparameters:\n  weight: [{filter: mlp, value: [0, 1]}, {value: 0.5}]\nseed: 7\n",
        "merge_method: dare_ties\nbase_model: {path: org/name, revision: main}\nexclude: ['lm_head', '^a.*$']\n",
    ]
    return _texts([*rows, *(top + models for top in tops)])


_WORDS = [
    b"merge_method: ",
    b"models:",
    b"- model: ",
    b"base_model: ",
    b"parameters:",
    b"weight: ",
    b"{filter: mlp, value: 1}",
    b"&a ",
    b"*a",
    b"<<: *a",
    b"!!int ",
    b"!!float ",
    b"!!str ",
    b"? ",
    b"| \n",
    b"> \n",
    b"\\x00",
    b"\\ud800",
    b"%YAML 1.1\n---\n",
    b"1e400",
    b".nan",
    b".inf",
    b"0x",
    b"0b",
    b"0o7",
    b"1_000",
    b"12:30:45",
    b"~",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
    b"seed: ",
    b"exclude: ",
    b"dtype: ",
    b"[[",
    b"]]",
    b"{",
    b"}",
    b",",
    b"\n  ",
    b"\t",
    b"'",
    b'"',
    b"#",
    b"(?:a{1,99}){1,99}",
]


def _change_yaml(raw: bytes, rng: Random, blind: fuzz_mutate.Blind) -> bytes | None:
    """Insert words of the language, move lines, or change bytes."""
    what = rng.randrange(4)
    if what == 0:
        return None
    if what == 1:
        lines = raw.split(b"\n")
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        if rng.random() < 0.5:
            lines[i], lines[j] = lines[j], lines[i]
        else:
            lines.insert(i, lines[j])
        return b"\n".join(lines)
    at = rng.randrange(len(raw) + 1)
    end = at if what == 2 else min(len(raw), at + rng.randrange(8))
    return raw[:at] + rng.choice(_WORDS) + raw[end:]


# --- what a merge leaves for the next


def _natural(value: object) -> bool:
    return type(value) is int and value >= 0


class JournalFile:
    """No journal stops the program: its sound beginning is believed, and everything in that has its type."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "journal.jsonl"

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        self._path.write_bytes(raw)
        progress, sound = _load(self._path)
        require(raw.startswith(sound), "sound lines that are not its beginning")
        if progress is None:
            require(not sound, "sound lines without progress")
            return
        names = [*progress.identity.keys(), *progress.identity.values()]
        require(all(isinstance(name, str) for name in names), "an identity that is no map of strings")
        for receipt in progress.receipts:
            numbers = (
                receipt.job,
                receipt.start,
                receipt.stop,
                receipt.crc,
                receipt.floored,
                receipt.not_finite,
                *receipt.kept,
            )
            require(all(_natural(n) for n in numbers), f"{receipt}")
            require(receipt.start <= receipt.stop and receipt.crc < 1 << 32, f"{receipt}")
        known = [text for file in progress.files.values() for text in (file.stamp, file.content)]
        require(all(isinstance(text, str) for text in (*progress.files, *known)), "files that are no texts")
        self._check_answers(progress.answers)
        self._path.write_bytes(sound)
        require(_load(self._path) == (progress, sound), "its sound part alone says something else")

    @staticmethod
    def _check_answers(answers: dict) -> None:
        from streammerge.engine.answers import plain, restored

        for job, rounds in answers.items():
            require(isinstance(job, str) and job.isascii() and job.isdigit(), f"answers of job {job!r}")
            for one in rounds:
                for answer in one:
                    with suppress(ValueError):
                        value = restored(answer)
                        require(repr(restored(plain(value))) == repr(value), f"the answer {answer!r}")

    @staticmethod
    def seeds() -> list[bytes]:
        """Return journals as merges write them."""
        files = {
            "of base/model.safetensors": ["ab" * 16, "cd" * 32],
            "beside base/config.json": ["ef" * 16, ""],
        }
        identity = {"version": "1", "config": "ab" * 16, "input base": "cd" * 16}
        first = _line({"identity": identity, "files": files})
        done = [
            _line({"done": [i, 4096 * i, 4096 * (i + 1), zlib.crc32(bytes([i])), 0, 0, 7, 9]})
            for i in range(5)
        ]
        plain = [
            {"threshold": [12345, 3, 2]},
            {"squares": [(0.5).hex(), 100]},
            {"float": (1.5).hex()},
            {"pair": [1, 2]},
            {"sums": [[(0.25).hex(), (3.0).hex()], 100]},
            {"touched": [[1, 0], [2, 2]]},
            7,
        ]
        answer = _line({"answer": ["3", [plain, [plain[0]]]]})
        whole = first + b"".join(done) + answer
        again = _line({"files": {"of base/model.safetensors": ["00" * 16, "cd" * 32]}})
        return [
            first,
            first + again + done[0],
            whole,
            whole[:-5],
            whole + b"\0" * 64,
            done[0] + first,
            first + first,
            b"",
            first + _line({"done": [-1, 0, 1, 0, 0, 0]}),
            first + _line({"other": 1}) + done[0],
        ]


class Manifest:
    """No manifest stops the program or `verify`; one that is believed has the fields that are used."""

    def __init__(self, directory: Path) -> None:
        self._out = directory / "out"
        self._out.mkdir(exist_ok=True)
        (self._out / "a").write_bytes(b"abc")

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        (self._out / MANIFEST).write_bytes(raw)
        manifest = read_manifest(self._out)
        if manifest is not None:
            find_edits(self._out, manifest["files"])
            require(_same_json(manifest, json.loads(raw)), "read otherwise than json reads it")
            for entry in manifest["files"].values():
                require(_natural(entry["nbytes"]) and re.fullmatch("[0-9a-f]{8}", entry["crc32"]), f"{entry}")
        try:
            verdict = verify(self._out)
        except Exception as error:
            require(MANIFEST in refused(error, ModelError), "the manifest is not named")
            require(manifest is None, "a manifest that is believed is refused")
            return
        require(manifest is not None, "a manifest that is not believed is verified")
        for problem in verdict.problems:
            require(
                problem.isprintable() and len(problem) <= MAX_LINE, f"a problem of {len(problem)} characters"
            )

    @staticmethod
    def seeds() -> list[bytes]:
        """Return manifests as merges write them."""
        files = {"a": {"nbytes": 3, "crc32": "352441c2"}, "b": {"nbytes": 1, "crc32": "00000000"}}
        tensor = {"dtype": "BF16", "shape": [2, 3], "crc32": "00000000"}
        whole = {
            "format": 2,
            "streammerge": "1",
            "method": "ties",
            "seed": 0,
            "identity": {"config": "ab"},
            "inputs": [{"role": "base", "fingerprint": "x", "tensors": 1, "nbytes": 2}],
            "densities": [],
            "floored": {"elements": 1, "of": 2, "fraction": 0.5},
            "not_finite": {"w": 1},
            "files": files,
            "tensors": {"w": tensor},
        }
        sealed = [
            seal(whole),
            seal({**whole, "files": {"a": files["a"]}}),
            seal({"files": []}),
            seal({"a": 1}),
        ]
        return [*sealed, sealed[0][:-9], b"", b"{}", sealed[0].replace(b"ties", b"diet")]


# --- stores of Fisher diagonals


class FisherTable:
    """The table of a store: every chunk of a tensor that is accepted is a file inside the store."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "store.zarr"
        self._directory.mkdir(exist_ok=True)

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        (self._directory / GROUP_FILE).write_bytes(raw)
        try:
            index = open_fisher(self._directory)
        except Exception as error:
            refused(error, ModelError)
            return
        for ref in index.values():
            require(os.path.dirname(ref.path) == str(self._directory), f"{ref.path} is outside")
            require(ref.nbytes >= 0 and math.isfinite(ref.square_sum) and ref.stored_nbytes >= 0, f"{ref}")
            require(1 <= ref.chunk_elements <= 1 << 29, f"a chunk of {ref.chunk_elements} elements")
            stop = min(ref.n_elements, 5 * ref.chunk_elements)
            position = 0
            for number, (path, first, end) in enumerate(ref.chunks(0, stop)):
                require(first == position < end, f"{ref}: chunk {number} from {first} to {end}")
                require(os.path.realpath(path).startswith(ref.path + "/"), f"{path} is outside")
                position = end
                if number > 100:
                    break
            else:
                require(position >= stop, f"{ref}: its chunks end at {position}")

    @staticmethod
    def seeds() -> list[bytes]:
        """Return tables as the importer writes them."""
        sums = {"sum": 1.5, "square_sum": 2.25, "largest": 0.5, "zeros": 3, "stored_nbytes": 100}
        rows = []
        for shape, chunk in (
            ([], []),
            ([10], [4]),
            ([3, 5], [2, 5]),
            ([2, 3, 7], [1, 1, 4]),
            ([0, 4], [1, 4]),
            ([6], [6]),
        ):
            entry = {"array": "a0", "dtype": "F32", "shape": shape, "chunk": chunk, **sums}
            about = {"format": 1, "model_fingerprint": "ab", "model_name": "x", "tensors": {"w": entry}}
            about["tensors"]["b"] = {**entry, "array": "a1", "dtype": "BF16"}
            rows.append({"zarr_format": 3, "node_type": "group", "attributes": {"streammerge_fisher": about}})
        rows += [{"zarr_format": 3, "attributes": {}}, {"zarr_format": 2}, {}]
        return [json.dumps(row).encode() for row in rows]


_STORE_WORDS = [
    *fuzz_mutate.TEXTS,
    "array",
    "shape",
    "chunk",
    "square_sum",
    "stored_nbytes",
    "tensors",
    "F32",
    "BF16",
]


def check_chunk(raw: bytes) -> None:
    """A chunk of a store that is damaged, or made to look sound, is refused; nothing is written beside its place."""
    import google_crc32c
    import numpy as np

    sealed = raw + google_crc32c.value(raw).to_bytes(4, "little")
    wanted = int.from_bytes(raw[4:8], "little") % (1 << 16) if len(raw) >= 8 else 64
    room = np.full(wanted + 128, 0xA5, np.uint8)
    for data in (raw, sealed):
        try:
            _decode("c/0", np.frombuffer(bytearray(data), np.uint8), room[64 : 64 + wanted])
        except Exception as error:
            refused(error, ModelError)
        require(
            bool((room[:64] == 0xA5).all() and (room[64 + wanted :] == 0xA5).all()), "wrote beside its place"
        )


def _chunk_seeds() -> list[bytes]:
    import numpy as np
    from numcodecs import Blosc

    arrays = [
        np.zeros(100, np.float32),
        np.arange(500, dtype=np.float32),
        np.random.default_rng(0).random(64, np.float32),
    ]
    codecs = [
        Blosc(cname, level, shuffle) for cname in ("zstd", "lz4") for level in (1, 5) for shuffle in (0, 1, 2)
    ]
    return [codec.encode(array) for array in arrays for codec in codecs]


# --- sizes


def check_size(raw: bytes) -> None:
    """A size is a positive number of bytes that can be shown."""
    text = raw.decode("utf-8", "surrogateescape")
    try:
        nbytes = parse_size(text)
    except Exception as error:
        refused(error, InputError, limit=500)
        return
    require(type(nbytes) is int and nbytes > 0, f"{nbytes!r}")
    require(len(format_size(nbytes)) < 100, "a long size")
    with suppress(ValueError):
        require(int(text) == nbytes, "plain bytes are not what they say")


def _size_seeds() -> list[bytes]:
    sizes = [
        "1",
        "512MiB",
        "2GiB",
        "5GB",
        "1.5 GiB",
        "0",
        "-1",
        "1e9",
        "nan",
        "inf",
        "",
        " 7 k ",
        "1024TiB",
        "0.1b",
        "9" * 64,
        "9" * 65,
        "1..5G",
        "１２",
        "5 \u00a0GB",
        "1\n",
        "0x10",
        "1_000",
        "9" * 50 + "." + "9" * 9 + "PiB",
    ]
    return _texts(sizes)


def make_targets(directory: Path) -> dict[str, Target]:
    """Return all targets by name; their inputs are written below `directory`."""
    model, journal, manifest, table = (
        Model(directory),
        JournalFile(directory),
        Manifest(directory),
        FisherTable(directory),
    )
    reference, pickles = Reference(directory), Pickles(directory)
    tokenizer = TokenizerFile(directory, require, refused)
    adapter = AdapterSettings(directory, require, refused, _table("formats.safetensors_files", "sound"))
    targets = [
        Target("header", "safetensors headers", Header.seeds, Header(directory), fuzz_mutate.header),
        Target("json", "strict JSON", _json_seeds, check_json, _change_json),
        Target(
            "model",
            "the index of a sharded model",
            Model.seeds,
            model,
            lambda raw, rng, blind: fuzz_mutate.json_text(raw, rng, blind, [*fuzz_mutate.TEXTS, *_NAMES]),
        ),
        Target("reference", "names in the hub cache", Reference.seeds, reference),
        Target("pickles", "PyTorch checkpoints", Pickles.seeds, pickles, fuzz_mutate.pickled),
        Target("yaml", "strict YAML", _yaml_seeds, check_yaml, _change_yaml),
        Target("config", "merge configs", _config_seeds, check_config, _change_yaml),
        Target("journal", "journals of unfinished merges", JournalFile.seeds, journal, fuzz_mutate.journal),
        Target("manifest", "manifests of finished merges", Manifest.seeds, manifest, fuzz_mutate.manifest),
        Target(
            "fisher",
            "tables of Fisher stores",
            FisherTable.seeds,
            table,
            lambda raw, rng, blind: fuzz_mutate.json_text(raw, rng, blind, _STORE_WORDS),
        ),
        Target("chunk", "compressed chunks of Fisher stores", _chunk_seeds, check_chunk),
        Target(
            "tokenizer", "vocabularies of tokenizers", TokenizerFile.seeds, tokenizer, TokenizerFile.change
        ),
        Target(
            "adapter", "settings of LoRA adapters", AdapterSettings.seeds, adapter, AdapterSettings.change
        ),
        Target("size", "sizes of memory and shards", _size_seeds, check_size),
    ]
    return {target.name: target for target in targets}
