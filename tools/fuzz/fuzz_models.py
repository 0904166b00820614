"""Targets of the fuzzer for what lies beside a model's weights: tokenizers and LoRA adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

import fuzz_json

from streammerge.checkpoint.index import open_model
from streammerge.checkpoint.refs.adapted import AdaptedRef
from streammerge.checkpoint.refs.rows import PatchedRef
from streammerge.checkpoint.tokenizer import MOST_ROWS, read_tokenizer
from streammerge.errors import ModelError

Require = Callable[[bool, str], None]
Refused = Callable[..., str]

FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
)
SOUND = {"a": 0, "b": 1}
TOKENIZER_WORDS = [
    *fuzz_json.TEXTS,
    "model",
    "vocab",
    "added_tokens",
    "content",
    "id",
    "special",
    "added_tokens_decoder",
    "chat_template",
    "0",
    "<s>",
]
ADAPTER_WORDS = [
    *fuzz_json.TEXTS,
    "LORA",
    "TRAINABLE_TOKENS",
    "target_parameters",
    "trainable_token_indices",
    "token_indices",
    "peft_version",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "layers.0.q_proj",
    ".*q_proj",
    "(q|v)_proj",
    "^model.layers.\\d.q_proj$",
    "(.*.*)x",
]


class TokenizerFile:
    """A vocabulary that is accepted has a text for each of its numbers, all within bounds; the first byte chooses the file."""

    def __init__(self, directory: Path, require: Require, refused: Refused) -> None:
        self._directory = directory / "tokenizer"
        self._directory.mkdir(exist_ok=True)
        self._require, self._refused = require, refused

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        for name in FILES:
            (self._directory / name).unlink(missing_ok=True)
        name = FILES[raw[0] % len(FILES)] if raw else FILES[0]
        if name in FILES[4:]:
            (self._directory / FILES[1]).write_text(json.dumps(SOUND))
        (self._directory / name).write_bytes(raw[1:])
        try:
            found = read_tokenizer(self._directory)
        except Exception as error:
            self._refused(error, ModelError)
            return
        assert found is not None
        for text, number in found.ids.items():
            self._require(
                type(text) is str and type(number) is int and 0 <= number < MOST_ROWS, f"{text!r}: {number!r}"
            )
        self._require(set(found.added) <= set(found.ids), "an added token without a number")
        self._require(list(found.ids.values()) == sorted(found.ids.values()), "numbers out of order")

    @staticmethod
    def seeds() -> Iterable[bytes]:
        """Return files as tokenizers write them."""
        entry = {"id": 2, "content": "<s>", "special": True, "normalized": False}
        full = [
            {"added_tokens": [entry], "model": {"type": "BPE", "vocab": SOUND, "merges": ["a b"]}},
            {"model": {"type": "Unigram", "vocab": [["a", -1.5], ["b", 0]]}},
            {"model": {"vocab": {"a": -1}}},
            {"model": []},
            {},
        ]
        settings = {
            "added_tokens_decoder": {"2": entry},
            "chat_template": [{"name": "default", "template": "x"}],
        }
        pieces = b"\x0a\x05\x0a\x03abc\x0a\x08\x0a\x01b\x15\0\0\0\0\x12\x02\x18\x05"
        rows = [(0, json.dumps(value).encode()) for value in full]
        rows += [
            (1, b'{"a": 0}'),
            (2, b"a\nb\r\nc"),
            (3, pieces),
            (3, pieces[:-9]),
            (4, json.dumps(settings).encode()),
        ]
        rows += [(5, b'{"<x>": 7}'), (3, b"\x0a\xff\xff\xff\xff\x0f"), (2, b"\xff")]
        return [bytes([place]) + data for place, data in rows]

    @staticmethod
    def change(raw: bytes, rng: Random, blind: fuzz_json.Blind) -> bytes | None:
        """Change the JSON, where it is some."""
        changed = fuzz_json.json_text(raw[1:], rng, blind, TOKENIZER_WORDS) if raw else None
        return None if changed is None else raw[:1] + changed


class AdapterSettings:
    """An adapter that is accepted has a scale that is a number, and changes what its tensors say, whatever its settings."""

    def __init__(
        self, directory: Path, require: Require, refused: Refused, sound: Callable[..., bytes]
    ) -> None:
        self._base, self._plain, self._rich = (directory / name for name in ("base", "adapter", "rich"))
        experts = "model.layers.0.mlp.experts"
        factors = {
            f"base_model.model.model.layers.{i}_proj.lora_{part}.weight": ("F32", shape)
            for i in ("0.q", "1.v")
            for part, shape in (("A", (2, 3)), ("B", (4, 2)))
        }
        base = {
            "model.layers.0.q_proj.weight": ("F32", (4, 3)),
            "model.layers.1.v_proj.weight": ("F32", (4, 3)),
            "model.embed_tokens.weight": ("F32", (5, 3)),
            f"{experts}.down_proj": ("F32", (2, 3, 4)),
        }
        rich = {
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": ("F32", (2, 3)),
            f"base_model.model.{experts}.lora_A.weight": ("F32", (4, 4)),
            f"base_model.model.{experts}.lora_B.weight": ("F32", (3, 4)),
        }
        for path, name, tensors in (
            (self._base, "model", base),
            (self._plain, "adapter_model", factors),
            (self._rich, "adapter_model", factors | rich),
        ):
            path.mkdir(exist_ok=True)
            (path / f"{name}.safetensors").write_bytes(sound(tensors))
        self._require, self._refused = require, refused

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        for adapter in (self._plain, self._rich):
            (adapter / "adapter_config.json").write_bytes(raw)
            try:
                model = open_model(f"{self._base}+{adapter}")
            except Exception as error:
                self._refused(error, ModelError)
                continue
            adapted = [ref for ref in model.values() if isinstance(ref, AdaptedRef)]
            patched = [ref for ref in model.values() if isinstance(ref, PatchedRef)]
            for ref in adapted:
                self._require(ref.rank == 2 and math.isfinite(ref.scale), f"{ref}")
            for ref in patched:
                self._require(0 <= ref.rows[0] < ref.rows[1] < 5 and set(ref.places) == {0, 1}, f"{ref}")
            wanted = (2, 0) if adapter is self._plain else (3, 1)
            self._require((len(adapted), len(patched)) == wanted, f"{len(adapted)}, {len(patched)}")
            self._require(
                json.loads(raw)["peft_type"] in ("LORA", "TRAINABLE_TOKENS"), "another kind of adapter"
            )

    @staticmethod
    def seeds() -> Iterable[bytes]:
        """Return settings as PEFT writes them."""
        plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        rows = [
            plain,
            {**plain, "use_rslora": True},
            {**plain, "fan_in_fan_out": True},
            {**plain, "use_dora": True},
            {**plain, "alpha_pattern": {".*q_proj": 3, "layers.1.v_proj": 5}},
            {**plain, "rank_pattern": {"(q|v)_proj": 2}},
            {**plain, "lora_alpha": 1e308},
            {"peft_type": "LOHA"},
            {**plain, "target_parameters": ["x"]},
            {},
            {**plain, "target_parameters": ["experts.down_proj"], "trainable_token_indices": [4, 1]},
            {
                **plain,
                "target_parameters": ["down_proj"],
                "trainable_token_indices": {"embed_tokens": [0, 1]},
                "peft_version": "0.18.1",
            },
            {
                **plain,
                "target_parameters": ["down_proj"],
                "peft_type": "TRAINABLE_TOKENS",
                "token_indices": [3, 2],
            },
        ]
        return [json.dumps(row).encode() for row in rows]

    @staticmethod
    def change(raw: bytes, rng: Random, blind: fuzz_json.Blind) -> bytes | None:
        """Change the JSON."""
        return fuzz_json.json_text(raw, rng, blind, ADAPTER_WORDS)
