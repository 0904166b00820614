"""Time and peak memory of `streammerge fisher compute`, beside the plain loop that holds all of a model.

    python tools/measure/bench_fisher.py WORKDIR                                  # 0.17B parameters, both ways
    python tools/measure/bench_fisher.py WORKDIR --size large --memory 3GiB       # 0.85B parameters; add --naive for the loop

The model is a llama of random bf16 weights, the examples are random tokens. The plain loop loads it in fp32 with
transformers and, example after example, backpropagates log p of the tokens and adds the squares of all gradients.
Both run in processes of their own, in turns, and the operating system's account of their peak is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 4000},
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 32000},
    "large": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 14, "vocab_size": 32000},
}

_NAIVE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
for n, line in enumerate(open(sys.argv[2])):
    ids = torch.tensor(json.loads(line)["input_ids"])[None]
    log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    log_p.gather(1, ids[0, 1:, None]).sum().backward()
    for name, p in model.named_parameters():
        sums[name].addcmul_(p.grad, p.grad)
    model.zero_grad(set_to_none=False)
means = {name: total.div_(n + 1) for name, total in sums.items()}
if len(sys.argv) > 3:
    from safetensors.torch import save_file
    save_file(means, sys.argv[3])
"""


def make_model(directory: Path, size: str) -> Path:
    """Write a llama of random weights, layer by layer, if it is not there."""
    if (directory / "config.json").exists():
        return directory
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    sizes = SIZES[size]
    config = LlamaConfig(
        **sizes, num_attention_heads=sizes["hidden_size"] // 64, architectures=["LlamaForCausalLM"]
    )
    hidden, inter, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    for i in range(sizes["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    torch.manual_seed(0)
    tensors = {
        f"{name}.weight": torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else (torch.randn(shape) * 0.02).bfloat16()
        for name, shape in shapes.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    return directory


def make_data(path: Path, n: int, tokens: int, vocab: int) -> Path:
    """Write `n` examples of random tokens, of half to all of `tokens`."""
    random = np.random.default_rng(0)
    lengths = random.integers(tokens // 2, tokens, n, endpoint=True)
    lines = [json.dumps({"input_ids": random.integers(0, vocab, length).tolist()}) for length in lengths]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(command: list[str]) -> tuple[float, float, int]:
    """Run a command; return its seconds, those of its CPUs, and its peak resident bytes."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def show(name: str, measured: tuple[float, float, int]) -> None:
    """Print one run."""
    seconds, cpu, peak = measured
    print(f"{name:12}{seconds:8.1f} s  CPU {cpu:8.1f} s  peak {peak / 2**20:7.0f} MiB", flush=True)


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--naive", action="store_true", help="run the plain loop for the large model too")
    parser.add_argument("--labels", default="empirical")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import bench_fisher as b; "
    )
    script += "b.make_model(Path(sys.argv[2]), sys.argv[3])"
    model = args.work / args.size
    # In a process of its own: the peak of a process that forks is handed on to its children.
    subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(model), args.size], check=True
    )
    data = make_data(args.work / "data.jsonl", args.examples, args.tokens, SIZES[args.size]["vocab_size"])
    ours, theirs = [], []
    for _ in range(args.pairs):
        command = [
            sys.executable,
            "-m",
            "streammerge.cli",
            "fisher",
            "compute",
            str(model),
            "--data",
            str(data),
            "--out",
            str(args.work / f"{args.size}.zarr"),
            "--labels",
            args.labels,
            "--memory",
            args.memory,
            "--overwrite",
            "--quiet",
        ]
        ours.append(run(command))
        show("streammerge", ours[-1])
        if args.size != "large" or args.naive:
            theirs.append(run([sys.executable, "-c", _NAIVE, str(model), str(data)]))
            show("plain loop", theirs[-1])
    if theirs:
        for place, what in enumerate(("time", "CPU time")):
            ratios = [a[place] / b[place] for a, b in zip(ours, theirs, strict=True)]
            print(
                f"{what} against the plain loop: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
