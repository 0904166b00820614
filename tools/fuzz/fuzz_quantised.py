"""The fuzzer's target for what config.json declares of a quantisation: each format's tensors under any declaration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import fuzz_json

from streammerge.checkpoint.index import open_model
from streammerge.errors import ModelError
from streammerge.io.reader import Reader
from streammerge.tensors.read import read_elements

Require = Callable[[bool, str], None]
Refused = Callable[..., str]

KINDS = (
    "fp8 blocks F32",
    "deepseek v4 experts",
    "fp8 fused experts, blocks",
    "gpt-oss",
    "pack-quantized 3 bits, zero points",
    "pack-quantized g_idx",
    "int-quantized asymmetric",
    "float-quantized block",
    "nvfp4",
    "nvfp4 modelopt",
    "mxfp4 U8",
    "mxfp8",
    "gptq 4 bits",
    "awq",
    "nf4 nested",
)
WORDS = [
    *fuzz_json.TEXTS,
    "quantization_config",
    "compression_config",
    "text_config",
    "expert_dtype",
    "fp4",
    "quant_method",
    "fp8",
    "fbgemm_fp8",
    "mxfp4",
    "compressed-tensors",
    "modelopt",
    "gptq",
    "awq",
    "bitsandbytes",
    "torchao",
    "gguf",
    "format",
    "pack-quantized",
    "int-quantized",
    "nvfp4-pack-quantized",
    "mixed-precision",
    "config_groups",
    "targets",
    "re:.*down_proj",
    "re:(a+)+$",
    "Linear",
    "weights",
    "num_bits",
    "group_size",
    "block_structure",
    "strategy",
    "symmetric",
    "sparsity_config",
    "weight_block_size",
    "scale_fmt",
    "ue8m0",
    "checkpoint_format",
    "gptq_v2",
    "bits",
    "dynamic",
    "version",
]


class Declarations:
    """A model that is accepted is read to its end or refused, whatever is declared; the first byte chooses its tensors."""

    def __init__(
        self,
        directory: Path,
        require: Require,
        refused: Refused,
        stored: Callable[..., Any],
        write: Callable[..., None],
    ) -> None:
        self._require, self._refused = require, refused
        self._models = [directory / f"quantised-{i}" for i in range(len(KINDS))]
        for path, name in zip(self._models, KINDS, strict=True):
            tensors, _, declared = stored(name)
            write(path, tensors, declared)

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        path = self._models[raw[0] % len(self._models) if raw else 0]
        (path / "config.json").write_bytes(raw[1:])
        reader = Reader()
        try:
            for name, ref in open_model(path).items():
                nbytes = ref.n_elements * 4
                self._require(nbytes < 1 << 20, f"{name}: {ref.shape}")
                if ref.stored_format is not None:
                    self._require(len(read_elements(reader, ref, 0, ref.n_elements)) == nbytes, f"{ref}")
        except ModelError as error:
            self._refused(error, ModelError)
        finally:
            reader.close()

    @staticmethod
    def seeds_of(formats: Mapping[str, Any]) -> Iterable[bytes]:
        """Return the declarations that each format comes with, over the tensors of each."""
        texts = [json.dumps(formats[name].declared).encode() for name in KINDS]
        pairs = {(i, i) for i in range(len(KINDS))} | {
            (i, (5 * i + 1) % len(KINDS)) for i in range(len(KINDS))
        }
        return [bytes([i]) + texts[j] for i, j in sorted(pairs)]

    @staticmethod
    def change(raw: bytes, rng: Random, blind: fuzz_json.Blind) -> bytes | None:
        """Change the JSON, where it is some."""
        changed = fuzz_json.json_text(raw[1:], rng, blind, WORDS) if raw else None
        return None if changed is None else raw[:1] + changed
