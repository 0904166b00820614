"""The merges that `compare_mergekit.py` runs through both programs: configs as data, and what is expected to differ.

A case is a config of mergekit's, unmodified; models are named ``base``, ``a``, ``b``, ``c`` and become directories. To add
one, add a row. Where the programs are meant to differ, `differs` says why, and `proof` how that is shown to be all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_differences import (
    CLAMPED,
    FUSION,
    SCE_FLOOR,
    SLERP_LINE,
    Case,
    RandomCase,
    _in_float32,
    _with_eps,
)


def models(names: Sequence[str], **per_model: Any) -> list[dict[str, Any]]:
    """Return the `models` of a config: one per letter; a list gives each its own value of a parameter."""
    listed = []
    for place, name in enumerate(names):
        values = {k: v[place] if isinstance(v, list) else v for k, v in per_model.items()}
        listed.append({"model": name, **({"parameters": values} if values else {})})
    return listed


def merge(
    method: str, names: str, base: bool = True, parameters: Mapping[str, Any] | None = None, **per_model: Any
) -> dict[str, Any]:
    """Return a config of whole models."""
    config: dict[str, Any] = {"merge_method": method, "models": models(names, **per_model)}
    if base:
        config["base_model"] = "base"
    if parameters:
        config["parameters"] = dict(parameters)
    return config


def with_base(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that lists its base among the models too, without parameters, as many of mergekit's do."""
    return {**config, "models": [{"model": "base"}, *config["models"]]}


# --- the cases


def _plain() -> Iterator[Case]:
    yield Case("linear, equal weights", merge("linear", "abc", base=False, weight=1.0))
    yield Case("linear, weights", merge("linear", "abc", base=False, weight=[0.5, 0.3, 0.2]))
    yield Case(
        "linear, not normalized", merge("linear", "ab", False, {"normalize": False}, weight=[0.6, 0.3])
    )
    yield Case("linear, a negative weight", merge("linear", "ab", base=False, weight=[1.5, -0.5]))
    yield Case("linear, one model", merge("linear", "a", base=False, weight=0.7))
    yield Case("passthrough", merge("passthrough", "a", base=False))
    yield Case("passthrough, scaled", merge("passthrough", "a", base=False, scale=0.3))
    scale = [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]
    yield Case(
        "passthrough, one tensor of each layer scaled", merge("passthrough", "a", False, {"scale": scale})
    )
    yield Case("task_arithmetic", merge("task_arithmetic", "abc", weight=[0.5, 0.3, 0.2]))
    yield Case(
        "task_arithmetic, lambda", merge("task_arithmetic", "ab", parameters={"lambda": 0.7}, weight=0.6)
    )
    yield Case(
        "task_arithmetic, normalized",
        merge("task_arithmetic", "ab", parameters={"normalize": True}, weight=[0.7, 0.2]),
    )
    yield Case("task_arithmetic, negation", merge("task_arithmetic", "a", weight=-1.0))
    yield Case("task_arithmetic, analogy", merge("task_arithmetic", "abc", weight=[-1.0, 1.0, 1.0]))
    yield Case(
        "task_arithmetic, weights that cancel",
        merge("task_arithmetic", "ab", parameters={"normalize": True}, weight=[0.5, -0.5]),
    )
    yield Case(
        "task_arithmetic, the base listed", with_base(merge("task_arithmetic", "ab", weight=[0.5, 0.3]))
    )
    yield Case("nearswap", merge("nearswap", "a", parameters={"t": 1e-3}))
    yield Case("nearswap, all of it", merge("nearswap", "a", parameters={"t": 1.0}))


def _trimmed() -> Iterator[Case]:
    for density in (0.01, 0.3, 0.5, 0.9):
        yield Case(f"ties, density {density}", merge("ties", "abc", weight=[0.5, 0.3, 0.2], density=density))
    yield Case("ties, densities", merge("ties", "abc", weight=1.0, density=[0.2, 0.5, 1.0]))
    yield Case("ties, not trimmed", merge("ties", "abc", weight=[0.5, 0.3, 0.2]))
    yield Case(
        "ties, not normalized", merge("ties", "ab", parameters={"normalize": False}, weight=0.6, density=0.5)
    )
    yield Case("ties, lambda", merge("ties", "ab", parameters={"lambda": 1.3}, weight=0.6, density=0.5))
    yield Case("ties, rescaled", merge("ties", "ab", parameters={"rescale": True}, weight=0.6, density=0.5))
    yield Case(
        "ties, int8_mask", merge("ties", "ab", parameters={"int8_mask": True}, weight=0.6, density=0.5)
    )
    yield Case("ties, a negative weight", merge("ties", "ab", weight=[1.0, -0.5], density=0.5))
    yield Case("ties, nothing kept of one", merge("ties", "ab", weight=1.0, density=[0.0, 0.5]))
    yield Case("ties, the base listed", with_base(merge("ties", "ab", weight=0.6, density=0.5)))
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        yield Case(f"{method}, nothing pruned", merge(method, "abc", weight=[0.5, 0.3, 0.2]))
        yield Case(method, merge(method, "abc", weight=[0.5, 0.3, 0.2], density=0.9))
        yield Case(f"{method}, gamma", merge(method, "abc", weight=0.4, density=0.5, gamma=[0.1, 0.2, 0.0]))
        yield Case(f"{method}, more than all", merge(method, "ab", weight=0.4, density=0.9, gamma=0.5))
        yield Case(
            f"{method}, normalized",
            merge(method, "ab", parameters={"normalize": True}, weight=0.4, density=0.6),
        )
        yield Case(
            f"{method}, rescaled",
            merge(method, "ab", parameters={"rescale": True, "lambda": 0.5}, weight=0.4, density=0.6),
        )
    for method in ("dare_linear", "dare_ties", "della", "della_linear"):
        yield Case(f"{method}, nothing dropped", merge(method, "abc", weight=[0.5, 0.3, 0.2]))
        yield Case(
            f"{method}, nothing dropped, not normalized",
            merge(method, "ab", parameters={"normalize": False, "lambda": 0.7}, weight=[0.5, 0.3]),
        )
        yield Case(f"{method}, everything dropped", merge(method, "ab", weight=0.5, density=0.0))


def _geometric() -> Iterator[Case]:
    for t in (0.0, 0.35, 1.0):
        yield Case(f"slerp, t {t}", merge("slerp", "c", parameters={"t": t}))
    yield Case("slerp, the base listed", with_base(merge("slerp", "c", parameters={"t": 0.5})))
    yield Case("slerp, a gradient", merge("slerp", "c", parameters={"t": [0, 0.5, 0.3, 1]}))
    filters = [
        {"filter": "self_attn", "value": [0, 0.5, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0]},
        {"value": 0.5},
    ]
    yield Case("slerp, filters with gradients", merge("slerp", "c", parameters={"t": filters}))
    yield Case("slerp, models close to each other", merge("slerp", "d", parameters={"t": 0.35}), SLERP_LINE)
    for base in (False, True):
        of = " of task vectors" if base else ""
        for name, flags in {
            "": {},
            " by rows": {"nuslerp_flatten": False},
            " by columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            ", row_wise without effect": {"nuslerp_row_wise": True},
        }.items():
            yield Case(f"nuslerp{of}{name}", merge("nuslerp", "ab", base, flags, weight=[0.6, 0.3]))
    yield Case("nuslerp, weights that cancel", merge("nuslerp", "ab", base=False, weight=[-0.5, 0.5]))
    yield Case("nuslerp, a negative weight", merge("nuslerp", "ab", weight=[1.0, -0.25]))
    three = [0.5, 0.3, 0.2]
    yield Case(
        "multislerp", merge("multislerp", "abc", base=False, weight=three), _with_eps(three, base=False)
    )
    yield Case(
        "multislerp of task vectors", merge("multislerp", "abc", weight=three), _with_eps(three, base=True)
    )
    yield Case("multislerp of two", merge("multislerp", "ab", weight=1.0), _with_eps([0.5, 0.5], base=True))
    yield Case(
        "multislerp, weights as they are",
        merge("multislerp", "ab", False, {"normalize_weights": False}, weight=[0.5, 0.3]),
        _with_eps([0.5, 0.3], base=False),
    )
    yield Case("multislerp of one", merge("multislerp", "a", base=False, weight=1.0))
    yield Case("karcher", merge("karcher", "abc", base=False))
    yield Case("karcher, the base averaged in", merge("karcher", "ab"))
    yield Case("karcher, few steps", merge("karcher", "abc", False, {"max_iter": 2, "tol": 1e-9}))
    yield Case("model_stock", merge("model_stock", "abc"))
    yield Case("model_stock of two", merge("model_stock", "ab"))
    yield Case("model_stock by rows", merge("model_stock", "abc", parameters={"filter_wise": True}))
    yield Case("model_stock, small changes", merge("model_stock", "de"), CLAMPED)


def _selected() -> Iterator[Case]:
    for topk in (1.0, 0.5, 0.1, 0.0):
        floor = None if topk == 0 else SCE_FLOOR
        yield Case(f"sce, select_topk {topk}", merge("sce", "abc", parameters={"select_topk": topk}))
        yield Case(
            f"sce, small changes, select_topk {topk}",
            merge("sce", "de", parameters={"select_topk": topk}),
            floor,
        )
    yield Case("sce, int8_mask", merge("sce", "ab", parameters={"int8_mask": True, "select_topk": 0.3}))
    yield Case("sce of one", merge("sce", "a"))
    yield Case("ram", merge("ram", "abc"))
    yield Case("ram, epsilon", merge("ram", "abc", parameters={"epsilon": 5e-3}))
    yield Case("ram of two", merge("ram", "ab", parameters={"epsilon": 3e-3}))
    yield Case("ramplus_tl", merge("ramplus_tl", "abc"))
    for name, letters, given in (
        ("epsilon", "abc", {"epsilon": 5e-3}),
        ("two models", "ab", {"epsilon": 3e-3}),
        ("r and alpha", "abc", {"r": 0.5, "alpha": 1.0, "epsilon": 5e-3}),
    ):
        yield Case(
            f"ramplus_tl, {name}", merge("ramplus_tl", letters, parameters=given), _in_float32(**given)
        )
    yield Case("arcee_fusion", merge("arcee_fusion", "a"), FUSION)
    yield Case("arcee_fusion, models far apart", merge("arcee_fusion", "c"), FUSION)


def _slices(*parts: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    """Return a slice: of some models the layers from one to another."""
    return {"sources": [{"model": name, "layer_range": [a, b]} for name, a, b in parts], **more}


def _stacked() -> Iterator[Case]:
    plain = {"merge_method": "passthrough", "slices": [_slices(("a", 0, 3)), _slices(("b", 1, 4))]}
    yield Case("slices, layers stacked", plain)
    yield Case("slices, one layer many times", {**plain, "slices": [_slices(("a", 2, 3))] * 5})
    two = [_slices(("base", 0, 2), ("c", 2, 4)), _slices(("base", 1, 4), ("c", 0, 3))]
    yield Case(
        "slices, slerp",
        {"merge_method": "slerp", "base_model": "base", "slices": two, "parameters": {"t": 0.4}},
    )
    gradients = [{**two[0], "parameters": {"t": [0, 0.5]}}, {**two[1], "parameters": {"t": [0.2, 1, 0]}}]
    yield Case(
        "slices, a gradient in each", {"merge_method": "slerp", "base_model": "base", "slices": gradients}
    )
    yield Case(
        "slices, ties",
        {
            "merge_method": "ties",
            "base_model": "base",
            "parameters": {"weight": 0.5, "density": 0.4},
            "slices": [
                _slices(("base", 0, 2), ("a", 0, 2), ("b", 0, 2)),
                _slices(("base", 2, 4), ("a", 2, 4), ("b", 1, 3)),
            ],
        },
    )
    filters = [{"filter": "self_attn", "value": [0.2, 0.9]}, {"filter": "norm", "value": 0.1}, {"value": 0.6}]
    yield Case(
        "task_arithmetic, filters by model", merge("task_arithmetic", "ab", weight=[filters, [0.1, 0.2, 0.9]])
    )
    yield Case(
        "ties, a gradient of densities",
        merge(
            "ties", "ab", weight=0.5, density=[[0.2, 0.8], [{"filter": "mlp", "value": 0.3}, {"value": 1}]]
        ),
    )
    yield Case(
        "linear, another dtype of the output",
        {**merge("linear", "ab", False, weight=0.5), "out_dtype": "float16"},
        bound=1.0,
    )
    yield Case(
        "ties, another dtype of the output",
        {**merge("ties", "ab", weight=0.5, density=0.5), "out_dtype": "float16"},
        bound=1.0,
    )
    path = {"model": {"path": "a"}}
    yield Case(
        "a reference that is a map",
        {"merge_method": "linear", "models": [{"model": path, "parameters": {"weight": 1}}]},
    )
    yield Case(
        "a LoRA adapter",
        {**merge("linear", "", False), "models": [{"model": "base+adapter", "parameters": {"weight": 0.5}}]},
    )
    yield Case(
        "ties, LoRA adapters beside models",
        {
            **merge("ties", "a", weight=0.5, density=0.5),
            "models": [
                {"model": m, "parameters": {"weight": 0.5, "density": 0.5}} for m in ("a", "base+adapter")
            ],
        },
    )


def _vocabularies() -> Iterator[Case]:
    weights = [0.3, 0.2, 0.3, 0.2]
    plain = {**merge("linear", "", weight=1.0), "models": models(["base", *"avw"], weight=weights)}
    for source in ("union", "base", "v", "w"):
        yield Case(f"tokenizer_source {source}", {**plain, "tokenizer_source": source})
    yield Case("tokenizer, a union", {**plain, "tokenizer": {"source": "union"}})
    yield Case("tokenizer, nothing said of it", {**plain, "tokenizer": {}})
    # The weights differ: of two models with equal ones, a token that the base lacks has changes that cancel exactly.
    for config in (
        merge("slerp", "v", parameters={"t": 0.4}),
        merge("task_arithmetic", "vw", weight=[0.6, 0.3]),
        merge("ties", "vw", weight=[0.6, 0.3], density=0.5),
        merge("nuslerp", "vw", weight=[0.6, 0.3]),
        merge("model_stock", "vw"),
    ):
        yield Case(f"tokenizer, {config['merge_method']}", {**config, "tokenizer_source": "union"})
    tokens = {
        "a model's row for all": {"t7": {"source": "v", "force": True}},
        "a model's row for those without": {"<|im_end|>": {"source": "w"}},
        "another token's row": {"<x>": {"source": {"kind": "model_token", "model": "v", "token": "t9"}}},
        "a row by number": {
            "<|im_start|>": {"source": {"kind": "model_token", "model": "base", "token_id": 5}, "force": True}
        },
        "zeros": {"<y>": {"source": {"kind": "zero"}}, "t3": {"source": {"kind": "zero"}, "force": True}},
    }
    for name, value in tokens.items():
        yield Case(f"tokenizer, {name}", {**plain, "tokenizer": {"source": "union", "tokens": value}})
    yield Case("tokenizer, padded", {**plain, "tokenizer": {"source": "union", "pad_to_multiple_of": 16}})


def _moved(cases: Iterable[Case]) -> Iterator[Case]:
    for case in cases:
        yield replace(case, moved=True)


CASES: tuple[Case, ...] = (
    *_plain(),
    *_trimmed(),
    *_geometric(),
    *_selected(),
    *_moved(_stacked()),
    *_moved(_vocabularies()),
)


def _random() -> Iterator[RandomCase]:
    cure = {"preset": "mergekit"}
    for method in ("dare_linear", "dare_ties"):
        for density in (0.1, 0.5, 0.9):
            yield RandomCase(
                f"{method}, density {density}", merge(method, "a", weight=1.0, density=density), density, cure
            )
        yield RandomCase(
            f"{method}, not rescaled",
            merge(method, "a", parameters={"rescale": False}, weight=1.0, density=0.5),
            0.5,
            {},
        )
    for method in ("della", "della_linear"):
        for density, epsilon in ((0.5, 0.15), (0.3, 0.25), (0.8, 0.1)):
            yield RandomCase(
                f"{method}, density {density}, epsilon {epsilon}",
                merge(method, "a", weight=1.0, density=density, epsilon=epsilon),
                density,
                cure,
                epsilon,
            )
        yield RandomCase(
            f"{method}, not rescaled",
            merge(method, "a", parameters={"rescale": False}, weight=1.0, density=0.5),
            0.5,
            {},
            0.15,
        )


RANDOM_CASES: tuple[RandomCase, ...] = tuple(_random())
