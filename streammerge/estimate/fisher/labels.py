"""The labels whose log-likelihood is differentiated, as gradients with respect to the logits.

The Fisher information is the expectation of the squared score s = d log p(y|x) / d theta over labels y drawn from the
model itself (Martens 2020, "New insights and perspectives on the natural gradient method", section 5).

``sampled``
    Labels are drawn from the model: one for a classifier; for a language model one at every position, given the
    example's own tokens before it. Cross terms between positions then vanish in expectation, so the square of the sum
    over positions is an unbiased estimate of the sum of the expected squares.
``exact``
    The sum over all labels of a classifier, weighted by probability (Matena and Raffel 2022, section 3.3).
``empirical``
    The labels of the data. This is not the Fisher information unless they follow the model's distribution.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from streammerge.errors import InputError, printable
from streammerge.estimate.network.examples import Example
from streammerge.estimate.network.skeleton import CAUSAL, CLASSIFIER
from streammerge.numerics.philox import derive_key, words

Labels = Literal["sampled", "empirical", "exact"]
_CHUNK = 1 << 19
"""Number of logits that are processed in fp64 at a time."""


def choose(labels: str | None, kind: str) -> Labels:
    """Return the kind of labels: by default ``exact`` for a classifier, else ``sampled``.

    Raises
    ------
    InputError
        If models of this kind do not support these labels.
    """
    if labels is None:
        return "exact" if kind == CLASSIFIER else "sampled"
    for known in get_args(Labels):
        if labels == known and not (known == "exact" and kind == CAUSAL):
            return known
    if labels == "exact":
        raise InputError(
            "--labels exact sums over all labels, which are too many for a language model: use --labels sampled"
        )
    raise InputError(f"--labels {printable(labels)!r} is not one of {', '.join(get_args(Labels))}")


def n_scores(labels: Labels, kind: str, n_labels: int) -> int:
    """Return the number of scores per example: 1, or one per label that is summed over."""
    return n_labels if labels == "exact" and kind == CLASSIFIER else 1


def token_scores(logits: Tensor, example: Example, labels: Labels, seed: int) -> Tensor:
    """Return the gradient of an example's log-likelihood with respect to a language model's logits.

    Parameters
    ----------
    logits
        fp32 [1, tokens, vocabulary]; the last token's logits predict nothing.

    Returns
    -------
    Tensor
        Same shape as the logits: at each position one-hot minus probabilities, which are computed in fp64.
    """
    n = example.length - 1
    scores = torch.zeros_like(logits)
    uniform = _uniform(seed, example.number, n) if labels == "sampled" else None
    step = max(1, _CHUNK // logits.shape[2])
    for first in range(0, n, step):
        end = min(n, first + step)
        p = logits[0, first:end].double().softmax(-1)
        if uniform is None:
            tokens = torch.from_numpy(example.ids[first + 1 : end + 1]).to(p.device)
        else:
            tokens = draw(p, uniform[first:end].to(p.device))
        p.neg_()
        p[torch.arange(end - first, device=p.device), tokens] += 1.0
        scores[0, first:end] = p
    return scores


def label_scores(logits: Tensor, example: Example, labels: Labels, seed: int) -> list[Tensor]:
    """Return the gradients of log p of a classifier's labels with respect to its logits, one per score.

    Each is multiplied by the square root of its probability, so that squares of later gradients are weighted by it.

    Parameters
    ----------
    logits
        fp32 [1, labels].
    """
    p = logits.double().softmax(-1)
    one_hot = torch.eye(p.shape[1], dtype=torch.float64, device=p.device)
    if labels == "exact":
        return [(p[0, y].sqrt() * (one_hot[y] - p)).float() for y in range(p.shape[1])]
    if labels == "empirical":
        assert example.label is not None
        y = example.label
    else:
        y = int(draw(p, _uniform(seed, example.number, 1).to(p.device))[0])
    return [(one_hot[y] - p).float()]


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index from each row of probabilities, fp64 [n, choices], given one number in [0, 1) per row."""
    sums = p.cumsum(-1)
    found = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]
    return found.clamp_(max=p.shape[1] - 1)


def _uniform(seed: int, number: int, n: int) -> Tensor:
    """Return `n` numbers in [0, 1), fp64, that depend only on the seed and the example's position in the file."""
    found = words(derive_key(seed, "fisher labels", "", str(number)), 0, 2 * n).view(n, 2)
    return ((found[:, 0] << 21) + (found[:, 1] >> 11)).double() / 2.0**53
