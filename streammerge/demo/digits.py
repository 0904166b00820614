"""
Four views of the same handwritten digits, and the accuracy of a network on each.

`base` was trained on plain 8x8 digits and then fine-tuned, with one shared ten-way head, to four views of
them. Each fine-tune reads its own view and little else; a merge has to read all four. No image shipped here
was seen in any training.
`tools/make/make_demo_models.py` makes the data.

Images: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, CC BY 4.0,
as packaged by scikit-learn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streammerge.numerics.casts import F32, widened

Floats = NDArray[np.float32]

TASKS: tuple[str, ...] = ("edges", "haze", "mirrored", "shifted")
MODELS: tuple[str, ...] = ("base", *TASKS)


def view(task: str, images: NDArray[np.uint8]) -> Floats:
    """
    Images with pixels 0..16, [n, 8, 8], as the network of `task` sees them: floats 0..1, [n, 8, 8].

    edges is the size of the gradient, haze is 0.4 of the contrast over light grey, mirrored swaps left and
    right, shifted moves one column to the right (into black; the last column is lost). plain changes nothing.
    """
    x = images.astype(np.float32) / np.float32(16)
    if task == "plain":
        return x
    if task == "edges":
        p = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        right, down = p[:, 1:-1, 2:] - p[:, 1:-1, :-2], p[:, 2:, 1:-1] - p[:, :-2, 1:-1]
        size: Floats = np.sqrt(right * right + down * down) / np.float32(1.5)
        return np.minimum(size, np.float32(1))
    if task == "haze":
        return np.float32(0.6) + np.float32(0.4) * x
    if task == "mirrored":
        return np.ascontiguousarray(x[:, :, ::-1])
    if task == "shifted":
        return np.pad(x, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
    raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")


def model_dir(name: str) -> Path:
    """Directory of a shipped model: `base`, or the name of a task."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    return _data() / name


def fisher_path(task: str) -> Path:
    """Path of the shipped Fisher diagonal of a fine-tune, computed exactly over its training images."""
    return _data() / "fisher" / f"{task}.safetensors"


def load_model(directory: str | Path) -> dict[str, Floats]:
    """Read every tensor of every .safetensors file in a directory as float32; merged models may be bf16."""
    weights: dict[str, Floats] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        weights |= _read(path.read_bytes())
    if not weights:
        raise FileNotFoundError(f"{directory}: no .safetensors file")
    return weights


def accuracy(weights: Mapping[str, Floats], task: str) -> float:
    """Fraction of the shipped test images whose digit is read correctly when seen through `task`."""
    images, labels = test_images()
    return float((logits(weights, view(task, images)).argmax(axis=1) == labels).mean())


def logits(weights: Mapping[str, Floats], x: Floats) -> Floats:
    """Ten scores for each image: two 3x3 convolutions (the second with stride 2) and two linear layers."""
    x = x[:, :, :, None]  # [n, row, column, channel]
    for name, stride in (("conv1", 1), ("conv2", 2)):
        x = _convolve(x, weights[f"{name}.weight"], stride)
        x += weights[f"{name}.bias"]
        np.maximum(x, 0, out=x)
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # Channels first, as the linear layer was trained.
    x = np.maximum(x @ weights["hidden.weight"].T + weights["hidden.bias"], 0)
    return x @ weights["head.weight"].T + weights["head.bias"]


@cache
def test_images() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The shipped images, [n, 8, 8] with pixels 0..16, and their digits, [n]."""
    with np.load(_data() / "tests.npz") as file:
        return file["images"], file["labels"]


def _data() -> Path:
    return Path(str(files("streammerge.demo"))) / "data"


def _convolve(x: Floats, kernel: Floats, stride: int) -> Floats:
    """Same-size 3x3 convolution, as one matrix product: kernel [out, in, 3, 3], x and result channels last."""
    _, height, width, _ = x.shape
    p = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [p[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    columns = np.concatenate(taps, axis=3)
    flat = columns.reshape(-1, columns.shape[3]) @ kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))
    return flat.reshape(*columns.shape[:3], len(kernel))


def _read(content: bytes) -> dict[str, Floats]:
    """Tensors of one safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors: dict[str, Floats] = {}
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        raw = np.frombuffer(content[first:last], np.uint8)
        tensors[name] = widened(raw, entry["dtype"], F32).reshape(entry["shape"])
    return tensors
