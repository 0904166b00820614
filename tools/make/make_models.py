"""Make llama-shaped bf16 checkpoints of any size: a base and fine-tunes of it, or headers only.

    python tools/make/make_models.py OUT --models 3 --layers 14             # 1.7 GB each
    python tools/make/make_models.py OUT --models 3 --layers 1 --vocab 1000000 --tied  # one 4 GB tensor
    python tools/make/make_models.py OUT --models 3 --preset 405b --sparse   # true headers, no data (7b, 70b too)

Weights are normal with deviation 0.02, fine-tunes add normal noise of 1e-3; all rounded to bf16, so that the
deltas lie on the lattice of real checkpoints. Blocks are generated one at a time, by a process for each CPU:
memory stays small.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

BLOCK = 1 << 22
SHARD = 5_000_000_000
PRESETS = {
    "7b": (32, 4096, 11008, 4096, 32000, False),
    "13b": (40, 5120, 13824, 5120, 32000, False),
    "70b": (80, 8192, 28672, 1024, 128256, False),
    "405b": (126, 16384, 53248, 1024, 128256, False),
}
"""Layers, width, width of the MLP, of keys and values, vocabulary, tied: Llama 2 7B, Llama 3 70B and 405B."""


def shapes(
    layers: int, hidden: int, inter: int, kv: int, vocab: int, tied: bool = False
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a llama model in its own order."""
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (hidden,)
        yield p + "mlp.down_proj.weight", (hidden, inter)
        yield p + "mlp.gate_proj.weight", (inter, hidden)
        yield p + "mlp.up_proj.weight", (inter, hidden)
        yield p + "post_attention_layernorm.weight", (hidden,)
        yield p + "self_attn.k_proj.weight", (kv, hidden)
        yield p + "self_attn.o_proj.weight", (hidden, hidden)
        yield p + "self_attn.q_proj.weight", (hidden, hidden)
        yield p + "self_attn.v_proj.weight", (kv, hidden)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocab, hidden)


def nbytes(shape: tuple[int, ...]) -> int:
    """Return the bf16 bytes of a shape."""
    return 2 * int(np.prod(shape))


def split(tensors: list[tuple[str, tuple[int, ...]]]) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Cut the tensors into shards of at most SHARD bytes, as transformers does."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors:
        if shards[-1] and filled + nbytes(shape) > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += nbytes(shape)
    return shards


def header(tensors: list[tuple[str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """Return a shard's header and the bytes of its data; tensors in name order, as the library writes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in sorted(tensors):
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + nbytes(shape)]}
        offset += nbytes(shape)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def bf16(values: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16 patterns, to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def fill(paths: Sequence[Path], position: int, name: str, shape: tuple[int, ...]) -> None:
    """Write one tensor of every model at its position in the files."""
    seed = int.from_bytes(name.encode()[-8:], "little")
    files = [path.open("r+b") for path in paths]
    for file in files:
        file.seek(position)
    for block, start in enumerate(range(0, nbytes(shape) // 2, BLOCK)):
        n = min(BLOCK, nbytes(shape) // 2 - start)
        random = np.random.default_rng([seed, len(name), block])
        base = random.standard_normal(n, np.float32) * np.float32(0.02)
        files[0].write(bf16(base).tobytes())
        for file in files[1:]:
            file.write(bf16(base + random.standard_normal(n, np.float32) * np.float32(1e-3)).tobytes())
    for file in files:
        file.close()


def main() -> None:
    """Write the models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inter", type=int, default=5632)
    parser.add_argument("--kv", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--tied", action="store_true", help="no lm_head beside the embedding")
    parser.add_argument("--preset", choices=sorted(PRESETS))
    parser.add_argument("--sparse", action="store_true")
    args = parser.parse_args()
    size = (args.layers, args.hidden, args.inter, args.kv, args.vocab, args.tied)
    if args.preset:
        size = PRESETS[args.preset]
    shards = split(list(shapes(*size)))
    names = ["base", *(f"tuned{i + 1}" for i in range(args.models))]
    for name in names:
        (args.out / name).mkdir(parents=True, exist_ok=True)
        (args.out / name / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}\n')
    weight_map = {}
    for number, shard in enumerate(shards):
        one = len(shards) == 1
        file_name = "model.safetensors" if one else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        start, data = header(shard)
        paths = [args.out / name / file_name for name in names]
        for path in paths:
            path.write_bytes(start)
            os.truncate(path, len(start) + data)
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            filled, position = [], len(start)
            for name, shape in sorted(shard):
                if not args.sparse:
                    filled.append(pool.submit(fill, paths, position, name, shape))
                position += nbytes(shape)
                weight_map[name] = file_name
            for future in filled:
                future.result()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(nbytes(s) for _, s in shapes(*size))},
            "weight_map": weight_map,
        }
        for name in names:
            (args.out / name / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{args.out}: {len(names)} models of {sum(nbytes(s) for _, s in shapes(*size)) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
