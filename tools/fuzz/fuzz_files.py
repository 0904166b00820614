"""Targets that read a model's files: headers, JSON, shard indexes, names in the hub cache, PyTorch checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

import fuzz_json
import fuzz_mutate
from fuzz_promises import encoded, refused, require, table_of

from streammerge.checkpoint.hub import find_snapshot, parse_name
from streammerge.checkpoint.index import open_model
from streammerge.checkpoint.shards import INDEX_NAME
from streammerge.dtypes import itemsize
from streammerge.errors import ModelError
from streammerge.formats.safetensors import read_header
from streammerge.formats.strided_refs import StridedRef
from streammerge.formats.torch_file import read_pickle
from streammerge.io.reader import Reader
from streammerge.io.strict_json import parse_object
from streammerge.tensors.read import read_elements

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
            row[1] for name in ("HOSTILE", "ACCEPTED") for row in table_of("formats.test_safetensors", name)
        ]
        many = {f"t{i}": ("F32" if i % 2 else "BF16", (i % 5, 3)) for i in range(40)}
        return encoded([*rows, table_of("formats.safetensors_files", "sound")(many, {"format": "pt"})])


# --- JSON, and the index of a model in shards


def same_json(ours: object, theirs: object) -> bool:
    """Return whether two readers of JSON found the same value."""
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
    require(same_json(value, json.loads(text)), "read otherwise than json reads it")
    json.dumps(value, ensure_ascii=False).encode()  # no lone surrogate came through


def json_seeds() -> list[bytes]:
    """Return the tables of the readers of JSON, once for each choice of numbers."""
    rows = [row[1][8:] for row in table_of("formats.safetensors_cases", "HOSTILE")]
    rows += [row[1] for row in table_of("checkpoint.test_index_refused", "HOSTILE_INDEX")]
    return [bytes([i % 3]) + row for i, row in enumerate(encoded(rows))]


def change_json(raw: bytes, rng: Random, blind: fuzz_json.Blind) -> bytes | None:
    """Change the text behind the byte that chooses the numbers."""
    changed = fuzz_json.json_text(raw[1:], rng, blind) if raw else None
    return None if changed is None else raw[:1] + changed


_A, _B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


NAMES = [
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
        sound = table_of("formats.safetensors_files", "sound")
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
            require(ref.nbytes == 8 and ref.offset + 8 <= os.path.getsize(ref.path), "another size")

    @staticmethod
    def seeds() -> list[bytes]:
        """Return the tables of the index's tests, and sound ones."""
        maps = [{"w.0": _A, "w.1": _A, "w.2": _B}, {"w.3": "other.safetensors"}]
        maps += [{"w.0": row[1]} for row in table_of("checkpoint.test_index_refused", "HOSTILE_SHARD_NAMES")]
        rows = [json.dumps({"metadata": {"total_size": 24}, "weight_map": m}) for m in maps]
        return encoded(
            [*rows, *(row[1] for row in table_of("checkpoint.test_index_refused", "HOSTILE_INDEX"))]
        )


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
        return encoded(names)


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

        archive = table_of("formats.torch_bytes", "archive")
        rows = [archive(row[1]) for row in table_of("formats.test_torch_hostile", "PROGRAMS")]
        rows += [
            row[1]
            for module, table in (("hostile", "ARCHIVES"), ("legacy", "LEGACY"))
            for row in table_of(f"formats.test_torch_{module}", table)
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
        return encoded(rows)
