"""
Train the demo's base network and its fine-tunes, estimate their Fisher diagonals, and write `streammerge/demo/data/`.

Needs torch and scikit-learn. The digits are split once, by a fixed seed, into images to train on, images to
choose merge settings on, and the test images that are shipped; every model is trained on the first part only.

Run `python tools/make/make_demo_models.py`; it takes about fifteen seconds on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from streammerge.demo import digits

N_TRAIN, N_VALIDATION = 1000, 200  # The other 597 images are the test.
BATCH = 32
CONFIG = {
    "model_type": "digits_convnet",
    "image_size": 8,
    "channels": [16, 32],
    "hidden_size": 64,
    "num_labels": 10,
}


class ConvNet(nn.Module):
    """The network that `digits.logits` evaluates, with dropout while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.hidden = nn.Linear(512, 64)
        self.head = nn.Linear(64, 10)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [n, 10] of images [n, 8, 8]."""
        x = self.conv2(self.conv1(x[:, None]).relu()).relu()
        x = self.hidden(self.dropout(x.flatten(1))).relu()
        return self.head(self.dropout(x))


def split(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of `train`, `validation` and `test`, disjoint."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    parts = np.split(order, [N_TRAIN, N_TRAIN + N_VALIDATION])
    images, labels = data.images.astype(np.uint8), data.target.astype(np.uint8)
    return {
        name: (images[i], labels[i]) for name, i in zip(("train", "validation", "test"), parts, strict=True)
    }


def train(model: ConvNet, x: np.ndarray, labels: np.ndarray, *, epochs: int, lr: float, seed: int) -> ConvNet:
    """Train a copy of `model` with AdamW and a learning rate that falls linearly to zero."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model).train()
    images, targets = torch.from_numpy(x), torch.from_numpy(labels).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    n_steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=n_steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), targets[batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def save(model: ConvNet, directory: Path, task: str) -> dict[str, np.ndarray]:
    """Write one model as a directory and give its weights back."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    path = directory / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)
    (directory / "config.json").write_text(json.dumps(CONFIG | {"task": task}, indent=2) + "\n")
    return {name: tensor.numpy() for name, tensor in weights.items()}


def exact_diagonal(weights: dict[str, Tensor], task: str, seed: int) -> dict[str, Tensor]:
    """
    The Fisher diagonal of a fine-tune over all training images, as the task sees them.

    The mean over images of the sum over labels y of p(y|x) (d log p(y|x) / d theta)^2: the exact estimator of
    Matena and Raffel, section 3.3.
    """
    net = ConvNet().eval()
    images, _ = split(seed)["train"]

    def log_p(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(net, weights, (image[None],))[0].log_softmax(0)

    total = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    with torch.no_grad():
        for part_of_x in torch.from_numpy(digits.view(task, images)).split(20):
            gradients = vmap(jacrev(log_p), (None, 0))(weights, part_of_x)  # [n, label, *shape]
            p = functional_call(net, weights, (part_of_x,)).softmax(1)
            for name, g in gradients.items():
                total[name] += torch.einsum("ny,ny...->...", p, g.square())
    return {name: tensor / len(images) for name, tensor in total.items()}


def save_diagonal(weights: dict[str, np.ndarray], task: str, seed: int, directory: Path) -> None:
    """Write the diagonal of a fine-tune, as bf16: it is shipped, and no merge of these tells the difference."""
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    diagonal = {name: t.bfloat16() for name, t in exact_diagonal(tensors, task, seed).items()}
    directory.mkdir(exist_ok=True)
    save_file(diagonal, directory / f"{task}.safetensors")
    (directory / f"{task}.safetensors").chmod(0o644)


def main() -> None:
    """Train, write and print the accuracies, in percent."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(digits.__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # One order of every sum, so that the same seed gives the same files.
    parts = split(arguments.seed)
    images, labels = parts["train"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    test_images, test_labels = parts["test"]
    np.savez_compressed(arguments.out / "tests.npz", images=test_images, labels=test_labels)

    torch.manual_seed(arguments.seed)
    base = train(ConvNet(), digits.view("plain", images), labels, epochs=60, lr=2e-3, seed=arguments.seed)
    views = ("plain", *digits.TASKS)
    print("".ljust(10), *(name.rjust(9) for name in views))
    for name in digits.MODELS:
        model = base
        if name != "base":
            model = train(base, digits.view(name, images), labels, epochs=20, lr=1e-3, seed=arguments.seed)
        weights = save(model, arguments.out / name, "plain" if name == "base" else name)
        hits = (
            digits.logits(weights, digits.view(v, test_images)).argmax(axis=1) == test_labels for v in views
        )
        if name != "base":
            save_diagonal(weights, name, arguments.seed, arguments.out / "fisher")
        print(name.ljust(10), *(f"{100 * hit.mean():9.1f}" for hit in hits), flush=True)


if __name__ == "__main__":
    main()
