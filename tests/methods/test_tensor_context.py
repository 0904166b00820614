"""Methods know which tensor they are given, and declare what they need for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streammerge.api import merge, plan
from streammerge.backends.cpu.backend import CPU
from streammerge.backends.torch.backend import TORCH
from streammerge.errors import InputError
from streammerge.methods import registry
from tests.conftest import config_for, read_tensors
from tests.methods.users import config_of

# --- methods know where they are

PLACED = """
import streammerge
from streammerge.algebra.rules import CopyOf, WeightedSum

SEEN = []

@streammerge.method("placed", base="optional", access="{access}")
def placed(models, base, *, context):
    SEEN.append(context)
    mean = sum(models) / len(models)
    return models[0] + 0 if context.kind in ("embedding", "head", "norm") else mean * (1 + (context.depth or 0))

@streammerge.method("placed_rule", base="none")
def placed_rule(context):
    return CopyOf(1) if context.kind == "embedding" else WeightedSum((1.0,) * context.n_models, context.n_models)
"""


PLACES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (600, 64),
    "model.layers.0.self_attn.q_proj.weight": (96, 130),
    "model.layers.1.mlp.up_proj.weight": (96, 130),
    "model.layers.2.input_layernorm.weight": (64,),
    "scale": (),
}


@pytest.mark.parametrize("access", ["elementwise", "row", "tensor"])
def test_a_formula_knows_which_tensor_it_is_given_however_small_the_pieces(
    access: str,
    make_models: Callable[..., list[Path]],
    methods: Path,
    small_capacity: Callable[[int, int], None],
    tmp_path: Path,
) -> None:
    paths = make_models(shapes=PLACES, dtype=torch.float32)
    methods.write_text(PLACED.replace("{access}", access))
    small_capacity(1 << 23, 40)
    merge(config_for("placed", paths), tmp_path / "out", methods=methods)
    seen = {context.name: context for context in registry.get_method("placed").function.__globals__["SEEN"]}
    assert {name: context.shape for name, context in seen.items()} == PLACES
    assert [(c.kind, c.layer, c.n_layers, c.depth) for c in (seen[name] for name in PLACES)] == [
        ("embedding", None, None, None),
        ("attention", 0, 3, 0.0),
        ("mlp", 1, 3, 0.5),
        ("norm", 2, 3, 1.0),
        ("other", None, None, None),
    ]
    assert all(context.has_base and context.n_models == 3 for context in seen.values())
    merged, first = read_tensors(tmp_path / "out"), read_tensors(paths[1])
    assert torch.equal(merged["model.embed_tokens.weight"], first["model.embed_tokens.weight"])


def test_a_method_may_choose_its_rule_by_the_tensor(
    make_models: Callable[..., list[Path]], methods: Path, tmp_path: Path
) -> None:
    paths = make_models(shapes=PLACES, dtype=torch.float32)
    methods.write_text(PLACED.replace("{access}", "row"))
    merge(config_of("placed_rule", paths), tmp_path / "out", methods=methods)
    merged, *models = (read_tensors(path) for path in (tmp_path / "out", *paths[1:]))
    embedding, other = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(merged[embedding], models[1][embedding])
    torch.testing.assert_close(merged[other], sum(model[other] for model in models) / 3)


@pytest.mark.parametrize(
    ("workspace", "more"),
    [("100", 100 * 600 * 64), ("lambda context: 1000 * context.n_elements", 1000 * 600 * 64)],
)
def test_the_planner_counts_what_a_formula_declares(
    workspace: str, more: int, make_models: Callable[..., list[Path]], methods: Path
) -> None:
    paths = make_models(shapes=PLACES, dtype=torch.float32)
    found = []
    for declared in ("", f", workspace={workspace}"):
        methods.write_text(
            f"import streammerge\n@streammerge.method('big', access='tensor', base='none'{declared})\n"
            "def big(models, base):\n    return models[0]\n"
        )
        decided = plan(config_of("big", paths), methods=methods)
        found.append(
            next(w.workspace for j, w in zip(decided.jobs, decided.work, strict=True) if "embed" in j.name)
        )
    assert found[1] - found[0] == more


def test_a_users_method_reserves_what_torch_takes_whatever_rule_it_chooses(
    paths: list[Path], methods: Path
) -> None:
    methods.write_text(
        PLACED.replace("{access}", "row")
    )  # its rules have kernels; its code may call torch all the same
    reserves = {
        name: plan(config_of(name, paths), methods=methods, device="cpu", kernels=True).budget.reserve
        for name in ("linear", "placed_rule")
    }
    assert reserves["placed_rule"] - reserves["linear"] == TORCH.reserve - CPU.reserve


def test_a_workspace_that_is_no_number_of_bytes_is_one_line(paths: list[Path], methods: Path) -> None:
    methods.write_text(
        "import streammerge\n@streammerge.method('big', base='none', workspace=lambda context: 0.5)\n"
        "def big(models, base):\n    return models[0]\n"
    )
    with pytest.raises(
        InputError, match=r"method 'big': workspace\(context\) returned 0\.5 .* an int of 0 or more"
    ):
        plan(config_of("big", paths), methods=methods)
