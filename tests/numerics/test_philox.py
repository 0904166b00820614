"""The random words: known answers, independence of everything, and a proof that masks are Bernoulli.

Known answers are those of METHODS section 3 (the first three philox vectors are Random123's own);
the battery is that of section 4, with fixed seeds, and is itself tested on masks that are wrong.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from streammerge.algebra.task_vectors import TaskVector
from streammerge.kernels import blocks
from streammerge.methods.drop import Drop
from streammerge.numerics.philox import Key, RandomKeys, derive_key, threshold, words, words_at
from tests.methods import reference

NAME = "model.layers.0.mlp.down_proj.weight"
KEY = derive_key(42, "dare", "a", NAME)


def kernel_words(key: Key, start: int, stop: int) -> np.ndarray:
    out = np.empty(stop - start + 7, np.uint32)
    shift = blocks.words(start, stop - start, np.array(key, np.uint32), out)
    return out[shift : shift + stop - start]


def kernel_words_at(key: Key, start: int, places: list[int]) -> np.ndarray:
    padded, out = np.zeros(len(places) + 7, np.int64), np.empty(len(places) + 7, np.uint32)
    padded[: len(places)] = places
    blocks.words_at(start, padded, len(places), np.array(key, np.uint32), out)
    return out[: len(places)]


def numpy_words(key: Key, start: int, stop: int) -> np.ndarray:
    return words(key, start, stop).numpy()


# --- known answers


@njit
def call_philox(c, k):
    return blocks.philox(c[0], c[1], c[2], c[3], k[0], k[1])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    c, k, answer = ([int(part, 16) for part in text.split()] for text in (counter, key, expected))
    assert [int(x) for x in call_philox(np.array(c, np.uint64), np.array(k, np.uint64))] == answer
    assert reference.philox(c, k) == answer


def test_a_key_is_the_hash_of_its_coordinates() -> None:
    assert " ".join(f"{k:08x}" for k in KEY) == "126847ae 098fef67 f184abc8 35ae414f"
    assert list(KEY) == reference.key_of(42, "dare", "a", NAME)
    assert RandomKeys(42, ("b", "a")).key("dare", 1, NAME) == KEY


@given(st.integers(0, 2**64 - 1), st.sampled_from(["dare", "ties"]), st.text(max_size=8), st.text(max_size=8))
def test_any_key_is_that_of_the_reference(seed: int, purpose: str, model: str, tensor: str) -> None:
    assert list(derive_key(seed, purpose, model, tensor)) == reference.key_of(seed, purpose, model, tensor)


def test_no_two_coordinates_share_a_key() -> None:
    coordinates = [
        (0, "dare", "a", "bc"),
        (0, "dare", "ab", "c"),
        (0, "dare", "", "abc"),
        (0, "dare", "abc", ""),
        (0, "darea", "", "bc"),
        (0, "ties", "a", "bc"),
        (1, "dare", "a", "bc"),
        (2**63, "dare", "a", "bc"),
        (struct.unpack("<Q", b"\1\0\0\0a\0\0\0")[0], "dare", "", "bc"),
    ]
    assert len({derive_key(*c) for c in coordinates}) == len(coordinates)


def test_words_are_the_known_ones_in_torch_in_the_kernel_and_in_the_reference() -> None:
    known = "a1df93c2 179be786 ea09a0d8 2759acf4 68744dd3 4f84f20c d6711d86 26248171"
    for implementation in (kernel_words, numpy_words):
        assert " ".join(f"{w:08x}" for w in implementation(KEY, 0, 8)) == known
        assert implementation(KEY, 2**34 + 1, 2**34 + 2).tolist() == [0x1C05DC2D]
    assert " ".join(f"{w:08x}" for w in reference.all_words(8, KEY)) == known
    assert reference.word(2**34 + 1, KEY) == 0x1C05DC2D
    assert kernel_words_at(KEY, 2**34, [1])[0] == 0x1C05DC2D


@pytest.mark.parametrize(
    ("p", "limit", "keep"),
    [
        (0.5, 2147483648, "10100010010001100101101000001101"),
        (0.9, 3865470566, "00100000000000100000000000001000"),
    ],
)
def test_masks_are_the_known_ones(p: float, limit: int, keep: str) -> None:
    assert threshold(p) == limit
    for implementation in (kernel_words, numpy_words):
        assert "".join(str(int(w >= limit)) for w in implementation(KEY, 0, 32)) == keep


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.0, 0), (2.0**-32, 1), (0.1, 429496730), (0.5, 2**31), (0.9, 3865470566), (1.0, 2**32)],
)
def test_thresholds_have_full_resolution(p: float, expected: int) -> None:
    assert threshold(p) == expected
    steps = Drop((p,), (1.0 - p,), "none", "bernoulli", shared=False).steps()
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value == [TaskVector(0, drop=expected)]


# --- independence of where and how


@given(
    start=st.one_of(
        st.integers(0, 5000),
        st.integers(2**32 - 9, 2**32 + 9),
        st.integers(2**34 - 9, 2**34 + 9),
        st.integers(2**40, 2**41),
    ),
    n=st.integers(0, 700),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_torch_and_kernel_words_agree_for_any_start_and_length(start: int, n: int, seed: int) -> None:
    key = derive_key(seed, "ties", "m", "t")
    by_kernel = kernel_words(key, start, start + n)
    assert (numpy_words(key, start, start + n) == by_kernel).all()
    if n:
        place = n // 2
        assert reference.word(start + place, key) == by_kernel[place]
        places = list(range(0, n, 3))
        assert (kernel_words_at(key, start, places) == by_kernel[places]).all()


@given(st.integers(0, 2**40), st.lists(st.integers(0, 5000), max_size=50))
def test_words_of_some_elements_are_those_of_all(start: int, places: list[int]) -> None:
    key = derive_key(1, "ties", "m", "t")
    some = words_at(key, torch.tensor(places, dtype=torch.int64) + start)
    assert torch.equal(some, words(key, start, start + 5001)[places])


@pytest.mark.parametrize("size", [1, 3, 7, 4096, 10_001])
@pytest.mark.parametrize("implementation", [kernel_words, numpy_words])
def test_words_do_not_depend_on_the_chunks(size: int, implementation: Callable[..., np.ndarray]) -> None:
    n = 10_001 if size > 7 else 600
    parts = [implementation(KEY, a, min(n, a + size)) for a in range(0, n, size)]
    assert (np.concatenate(parts) == reference.all_words(n, KEY)).all()


def test_a_smaller_drop_rate_keeps_a_superset() -> None:
    w = kernel_words(KEY, 0, 1 << 16)
    rates = [0.0, 2**-32, 0.1, 0.5, 0.9, 0.99, 1.0]
    kept = [w >= threshold(p) for p in rates]  # uint32 against Python integers: 2**32 included
    assert kept[0].all()
    assert not kept[-1].any()
    for more, less in pairwise(kept):
        assert not (less & ~more).any()


# --- the statistical battery

N = 1 << 20
ROW = 1000
RATES = [0.1, 0.5, 0.9, 0.99]
FAIL = 1e-6

Mask = Callable[[int, str, str, int, float], np.ndarray]
"""(seed, model, tensor, n, drop rate) -> which elements survive."""


def product_mask(seed: int, model: str, tensor: str, n: int, p: float) -> np.ndarray:
    return kernel_words(derive_key(seed, "dare", model, tensor), 0, n) >= threshold(p)


def normal(z: float) -> float:
    """Two-sided p-value of a standard normal."""
    return math.erfc(abs(z) / math.sqrt(2))


def chi_square(statistic: float, df: int) -> float:
    """Two-sided p-value by Wilson and Hilferty's cube root."""
    return normal(((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df)))


def rate_test(mask: np.ndarray, q: float) -> float:
    """Test 1: the count."""
    return normal((int(mask.sum()) - mask.size * q) / math.sqrt(mask.size * q * (1 - q)))


def counts_test(counts: np.ndarray, size: int, q: float) -> float:
    """Tests 2, 3, 7: counts of groups of `size`, dispersed as binomials are, no less and no more."""
    return chi_square(float(((counts - size * q) ** 2).sum()) / (size * q * (1 - q)), counts.size)


def seeds_test(mask: Mask, p: float) -> float:
    counts = np.array([mask(seed, "a", "t", 4096, p).sum() for seed in range(200)])
    return counts_test(counts, 4096, 1 - p)


def serial_test(mask: np.ndarray, q: float) -> float:
    """Test 4: products at lags; the worst of ten, corrected."""
    x = (mask - q).astype(np.float32) / math.sqrt(q * (1 - q))
    lags = (1, 2, 3, 4, 5, 8, 64, ROW, 4096, 65_536)
    return min(
        1.0, len(lags) * min(normal(float(np.dot(x[:-g], x[g:])) / math.sqrt(x.size - g)) for g in lags)
    )


def gaps_test(mask: np.ndarray, q: float) -> float:
    """Test 5: gaps between survivors against the geometric distribution."""
    gaps = np.diff(np.flatnonzero(mask))
    classes = max(2, min(40, int(math.log(50 / gaps.size) / math.log(1 - q))))
    observed = np.bincount(np.minimum(gaps, classes + 1), minlength=classes + 2)[1:]
    chances = np.array([q * (1 - q) ** (g - 1) for g in range(1, classes + 1)] + [(1 - q) ** classes])
    expected = chances * gaps.size
    return chi_square(float(((observed - expected) ** 2 / expected).sum()), classes)


def independence_test(a: np.ndarray, b: np.ndarray, q: float) -> float:
    """Test 6: products of two masks, in place and shifted; the worst, corrected."""
    x, y = ((m - q).astype(np.float32) / math.sqrt(q * (1 - q)) for m in (a, b))
    zs = [float(np.dot(x, y)) / math.sqrt(x.size)]
    for shift in (1, 2, 4, 4096):
        zs += [float(np.dot(x[shift:], y[:-shift])) / math.sqrt(x.size - shift)]
        zs += [float(np.dot(y[shift:], x[:-shift])) / math.sqrt(x.size - shift)]
    return min(1.0, len(zs) * min(normal(z) for z in zs))


def meta_test(mask: Mask, p: float) -> float:
    """Test 9: Kolmogorov-Smirnov distance of 400 standardised counts from the normal distribution.

    Normal noise smooths the counts' lattice; its variance is taken out again.
    """
    n, q = 4096, 1 - p
    counts = np.array([mask(i % 20, "a", f"t{i // 20}", n, p).sum() for i in range(400)])
    variance = n * q * (1 - q)
    smooth = np.random.default_rng(0).uniform(-0.5, 0.5, counts.size)
    z = np.sort((counts - n * q + smooth) / math.sqrt(variance + 1 / 12))
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z])
    ranks = np.arange(counts.size)
    distance = max((cdf - ranks / counts.size).max(), ((ranks + 1) / counts.size - cdf).max())
    x = distance * (math.sqrt(counts.size) + 0.12 + 0.11 / math.sqrt(counts.size))
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101)))


def battery(mask: Mask, p: float, n: int = N) -> dict[str, float]:
    """Return the p-value of every test but 8."""
    q = 1 - p
    m = mask(0, "a", "layers.1.weight", n, p)
    view = m[: n // ROW * ROW].reshape(-1, ROW)
    return {
        "1 rate": rate_test(m, q),
        "2 dispersion": counts_test(m.reshape(-1, 1024).sum(1), 1024, q),
        "3 seeds": seeds_test(mask, p),
        "4 serial": serial_test(m, q),
        "5 gaps": gaps_test(m, q),
        "6 models": independence_test(m, mask(0, "b", "layers.1.weight", n, p), q),
        "6 tensors": independence_test(m, mask(0, "a", "layers.2.weight", n, p), q),
        "6 seeds": independence_test(m, mask(1, "a", "layers.1.weight", n, p), q),
        "7 rows": counts_test(view.sum(1), ROW, q),
        "7 columns": counts_test(view.sum(0), len(view), q),
        "9 meta": meta_test(mask, p),
    }


@pytest.mark.parametrize("p", RATES)
def test_masks_pass_the_battery(p: float) -> None:
    result = battery(product_mask, p)
    assert min(result.values()) > FAIL, result


def failed(mask: Mask, p: float = 0.5) -> set[str]:
    return {name for name, value in battery(mask, p, 1 << 18).items() if value <= FAIL}


def test_the_battery_finds_a_mask_with_an_exact_count() -> None:
    def exact(seed: int, model: str, tensor: str, n: int, p: float) -> np.ndarray:
        order = np.argsort(kernel_words(derive_key(seed, "dare", model, tensor), 0, n), kind="stable")
        mask = np.zeros(n, bool)
        mask[order[round(n * p) :]] = True
        return mask

    assert failed(exact) == {"3 seeds", "9 meta"}


def test_the_battery_finds_a_key_without_model_tensor_or_seed() -> None:
    def without(part: str) -> Mask:
        def mask(seed: int, model: str, tensor: str, n: int, p: float) -> np.ndarray:
            return product_mask(
                0 if part == "seed" else seed,
                "" if part == "model" else model,
                "" if part == "tensor" else tensor,
                n,
                p,
            )

        return mask

    assert failed(without("model")) == {"6 models"}
    assert "6 tensors" in failed(without("tensor"))
    assert "6 seeds" in failed(without("seed"))


def test_the_battery_finds_repeated_lanes_and_chunks() -> None:
    def lanes(seed: int, model: str, tensor: str, n: int, p: float) -> np.ndarray:
        return np.repeat(product_mask(seed, model, tensor, n // 4, p), 4)

    def chunks(seed: int, model: str, tensor: str, n: int, p: float) -> np.ndarray:
        return np.resize(product_mask(seed, model, tensor, 4096, p), n)

    assert {"2 dispersion", "3 seeds", "4 serial", "5 gaps", "7 rows"} <= failed(lanes)
    assert {"4 serial", "6 models"} & failed(chunks)


def test_the_battery_finds_a_multiplicative_hash_overlapping_streams_and_a_bias() -> None:
    def weak_hash(seed: int, model: str, tensor: str, n: int, p: float) -> np.ndarray:
        key = derive_key(seed, "dare", model, tensor)[0]
        w = (np.arange(n, dtype=np.uint64) + np.uint64(key)) * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)
        return w >= threshold(p)

    def overlapping(seed: int, model: str, tensor: str, n: int, p: float) -> np.ndarray:
        return product_mask(0, model, tensor, n + seed, p)[seed:]

    def biased(seed: int, model: str, tensor: str, n: int, p: float) -> np.ndarray:
        return product_mask(seed, model, tensor, n, p * 1.02)

    assert {"2 dispersion", "4 serial", "5 gaps", "7 rows"} <= failed(weak_hash)
    assert "6 seeds" in failed(overlapping)
    assert "1 rate" in failed(biased)
