"""Tensors of different models find each other by names and shapes; models that are not of one kind are told as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.api import plan
from streammerge.engine.precheck import check_beforehand
from streammerge.errors import ConfigError, ModelError
from streammerge.formats.refs import TensorRef
from streammerge.planning.resolve.modules import owner
from streammerge.planning.resolve.prefixes import find_rules
from tests.conftest import write_fisher
from tests.planning.resolve.named_models import LAYER, Tensors, linear, merged, normal, text, tower, write


def assert_is(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def mix(a: Tensors, b: Tensors, begins: Mapping[str, str]) -> Tensors:
    """A quarter of each tensor of `a`, three of that of `b` whose name begins otherwise; what `b` lacks as it is."""
    found = {}
    for name, tensor in a.items():
        own = next((begins[p] + name[len(p) :] for p in begins if name.startswith(p)), name)
        found[name] = 0.25 * tensor + 0.75 * b[own] if own in b else tensor
    return found


@pytest.mark.parametrize(
    ("prefix", "other"),
    [
        ("model.", ""),
        ("", "model."),
        ("bert.", ""),
        ("model.", "language_model.model."),
        ("model.language_model.", "language_model.model."),
        ("transformer.", "base_model.model.model."),
        ("0.auto_model.", ""),
    ],
)
def test_names_that_begin_otherwise_are_matched_and_the_output_has_the_first_models(
    prefix: str, other: str, tmp_path: Path
) -> None:
    a, b = text(1, prefix, head=""), text(2, other, head="")
    config = linear(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert_is(merged(config, tmp_path / "out"), mix(a, b, {prefix: other}))
    notes = [line for line in plan(config, memory="1GiB").warnings if "names are matched" in line]
    assert len(notes) == 1
    common = "model." if prefix and other.endswith(prefix) else ""
    assert f"{other.removesuffix(common)}* is {prefix.removesuffix(common)}* (8 tensors)" in notes[0]


def test_the_heads_of_wrapped_models_move_with_them(tmp_path: Path) -> None:
    old = text(2, "language_model.model.", "language_model.lm_head.weight") | tower(
        2, "vision_tower.", "multi_modal_projector."
    )
    new = text(1, "model.language_model.") | tower(1)
    config = linear(write(tmp_path / "new", new), write(tmp_path / "old", old))
    begins = {
        "model.language_model.": "language_model.model.",
        "lm_head": "language_model.lm_head",
        "model.": "",
    }
    assert_is(merged(config, tmp_path / "out"), mix(new, old, begins))


def test_a_text_model_is_merged_into_the_text_part_of_a_vision_language_model(tmp_path: Path) -> None:
    whole, part = text(1, "model.language_model.") | tower(1), text(2)
    config = linear(write(tmp_path / "vlm", whole), write(tmp_path / "text", part))
    assert_is(merged(config, tmp_path / "out"), mix(whole, part, {"model.language_model.": "model."}))
    (note,) = [line for line in plan(config, memory="1GiB").warnings if "copied, not merged" in line]
    assert note.startswith("model.vision_tower (3 tensors), model.multi_modal_projector.linear.weight: only ")


def test_the_text_part_of_a_vision_language_model_is_merged_into_a_text_model(tmp_path: Path) -> None:
    whole, part = text(1, "model.language_model.") | tower(1), text(2)
    config = linear(write(tmp_path / "text", part), write(tmp_path / "vlm", whole))
    assert_is(merged(config, tmp_path / "out"), mix(part, whole, {"model.": "model.language_model."}))
    (note,) = [line for line in plan(config, memory="1GiB").warnings if "left out" in line]
    assert "4 tensors that" in note
    assert "model.vision_tower (3 tensors), model.multi_modal_projector" in note


def test_a_change_of_text_is_brought_into_a_vision_language_model(tmp_path: Path) -> None:
    whole, part, base = text(1, "model.language_model.") | tower(1), text(2), text(3)
    paths = [write(tmp_path / n, t) for n, t in (("vlm", whole), ("part", part), ("base", base))]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(paths[0]),
        "models": [
            {"model": str(paths[1]), "parameters": {"weight": 0.5}},
            {"model": str(paths[2]), "parameters": {"weight": -0.5}},
        ],
    }
    begin = "model.language_model."
    wanted = {}
    for name, tensor in whole.items():
        own = "model." + name[len(begin) :] if name.startswith(begin) else name
        wanted[name] = tensor + 0.5 * (part[own] - base[own]) if own in part else tensor
    found = merged(config, tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_tower_that_another_model_has_too_is_not_copied_from_the_first(tmp_path: Path) -> None:
    vlms = [write(tmp_path / f"v{i}", text(i, "model.language_model.") | tower(i)) for i in range(2)]
    part = write(tmp_path / "text", text(3))
    message = (
        r"text: tensor model\.multi_modal_projector\S+ and 3 more are missing, .*v0 has them \(model\.vision_tower \(3 tensors\), "
        r"model\.multi_modal_projector\S+\); list them under `exclude:`"
    )
    with pytest.raises(ModelError, match=message):
        plan(linear(*vlms, part), memory="1GiB")
    plan(linear(*vlms, part, exclude=["vision_tower", "projector"]), memory="1GiB")


def test_a_tower_under_the_same_names_is_copied_where_one_model_is_without(tmp_path: Path) -> None:
    whole = text(1) | tower(1, "visual.", "visual.merger.")
    config = linear(write(tmp_path / "vlm", whole), write(tmp_path / "text", part := text(2)))
    assert_is(merged(config, tmp_path / "out"), mix(whole, part, {}))
    notes = plan(config, memory="1GiB").warnings
    assert any(line.startswith("visual (4 tensors): only ") for line in notes)


def test_two_places_that_fit_equally_well_are_refused(tmp_path: Path) -> None:
    twice = text(1, "talker.", head="") | text(2, "thinker.", head="")
    config = linear(write(tmp_path / "twice", twice), write(tmp_path / "one", text(3, "model.", head="")))
    with pytest.raises(
        ModelError, match=r"one: model\.\* fits both talker\.\* and thinker\.\* of .*twice: list"
    ):
        plan(config, memory="1GiB")
    chosen = plan({**config, "exclude": ["talker"]}, memory="1GiB")
    assert {job.name.split(".")[0] for job in chosen.jobs if len(job.sources) == 2} == {"thinker"}


def test_two_parts_of_a_model_that_fit_one_place_equally_well_are_refused(tmp_path: Path) -> None:
    layers = {f"layers.{i}.q.weight": (8, 8) for i in range(4)}
    a = write(tmp_path / "a", normal(1, layers))
    both = normal(
        2, {f"{part}.{name}": shape for part in ("query", "document") for name, shape in layers.items()}
    )
    b = write(tmp_path / "b", both)
    with pytest.raises(ModelError, match=r"document\.\* and query\.\* both fit \* of .*`exclude:`"):
        plan(linear(a, b))
    found = merged(linear(a, b, exclude=["^document"]), tmp_path / "out")
    one = normal(1, layers)
    assert_is(found, {name: 0.25 * one[name] + 0.75 * both[f"query.{name}"] for name in layers})


SPELT = [("LayerNorm.gamma", "LayerNorm.weight"), ("conv.weight_g", "conv.parametrizations.weight.original0")]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("old", "new"), SPELT)
def test_ends_that_versions_of_a_library_spell_differently_are_one(
    tmp_path: Path, old: str, new: str, turned: bool
) -> None:
    own, other = (new, old) if turned else (old, new)
    shapes = {f"layer.{i}.dense.weight": (8, 8) for i in range(2)}
    a = normal(1, shapes | {f"layer.{i}.{own}": (8,) for i in range(2)})
    b = normal(2, {f"bert.{name}": shape for name, shape in shapes.items()})
    b |= normal(3, {f"bert.layer.{i}.{other}": (8,) for i in range(2)})
    found = merged(linear(write(tmp_path / "a", a), write(tmp_path / "b", b)), tmp_path / "out")
    assert_is(found, {n: 0.25 * t + 0.75 * b["bert." + n.replace(own, other)] for n, t in a.items()})


def test_shapes_tell_which_of_two_places_is_meant(tmp_path: Path) -> None:
    twice = text(1, "talker.", head="", h=6) | text(2, "thinker.", head="")
    config = linear(
        write(tmp_path / "twice", twice),
        write(tmp_path / "one", one := text(3, "model.", head="")),
        exclude=["talker"],
    )
    assert_is(merged(config, tmp_path / "out"), mix(twice, one, {"thinker.": "model."}))


def test_a_diagonal_is_found_by_its_own_models_names(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a", text(1)),
        write(tmp_path / "b", text(2, "language_model.model.", "language_model.lm_head.weight")),
    ]
    config = {
        "merge_method": "fisher",
        "models": [{"model": str(p), "fisher": str(write_fisher(p))} for p in paths],
    }
    jobs = plan(config, memory="1GiB").jobs
    assert all(len(job.fishers) == 2 for job in jobs)
    for job in jobs:
        assert [ref.name for ref in job.fishers] == [ref.name for ref in job.sources]


def test_slices_of_models_of_different_names_are_stacked(tmp_path: Path) -> None:
    a, b = text(1), text(2, "language_model.model.", "language_model.lm_head.weight")
    paths = [write(tmp_path / n, t, num_hidden_layers=2) for n, t in (("a", a), ("b", b))]
    slices = [{"sources": [{"model": str(p), "layer_range": [i, i + 1]}]} for i, p in enumerate(paths)]
    found = merged({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    assert torch.equal(
        found["model.layers.1.mlp.up_proj.weight"], b["language_model.model.layers.1.mlp.up_proj.weight"]
    )
    assert torch.equal(found["lm_head.weight"], b["language_model.lm_head.weight"])


# ---- the same model twice -------------------------------------------------------------------------


def test_the_same_model_twice_is_fine_where_nothing_is_random(tmp_path: Path) -> None:
    a, b = (write(tmp_path / n, text(i)) for i, n in enumerate("ab"))
    once = {
        "merge_method": "linear",
        "models": [
            {"model": str(a), "parameters": {"weight": 0.75}},
            {"model": str(b), "parameters": {"weight": 0.25}},
        ],
    }
    twice = {
        "merge_method": "linear",
        "models": [
            {"model": str(p), "parameters": {"weight": w}} for p, w in ((a, 0.5), (b, 0.25), (a, 0.25))
        ],
    }
    assert_is(merged(twice, tmp_path / "twice"), merged(once, tmp_path / "once"))
    trimmed = {
        "merge_method": "ties",
        "base_model": str(b),
        "models": [str(a), str(a)],
        "parameters": {"density": 0.5, "weight": 1.0},
    }
    plan(trimmed, memory="1GiB")


@pytest.mark.parametrize("copied", [True, False])
def test_two_models_of_the_same_content_are_refused_by_plan_where_drops_are_random(
    copied: bool, tmp_path: Path
) -> None:
    base, a = write(tmp_path / "base", text(0)), write(tmp_path / "a", text(1))
    b = write(tmp_path / "b", text(1)) if copied else a
    config: dict[str, Any] = {
        "merge_method": "dare_linear",
        "base_model": str(base),
        "parameters": {"density": 0.5, "weight": 1.0},
        "models": [{"model": str(a)}, {"model": str(b)}],
    }
    with pytest.raises(ConfigError, match=r"models\[1\]: .*give one of them its own `alias`"):
        check_beforehand(plan(config, memory="1GiB"), None)
    config["models"][1]["alias"] = "other"
    check_beforehand(plan(config, memory="1GiB"), None)


# ---- modules of vision-language models --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("visual.merger.mlp.0.weight", 2),
        ("model.visual.merger.ln_q.weight", 2),
        ("model.visual.deepstack_merger_list.0.norm.weight", 2),
        ("thinker.visual.merger_list.1.mlp.0.weight", 2),
        ("model.visual.blocks.0.attn.qkv.weight", 1),
        ("model.visual.patch_embed.proj.weight", 1),
        ("model.connector.modality_projection.proj.weight", 2),
        ("mlp1.0.weight", 2),
        ("aligner.fc1.weight", 2),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", 1),
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("lm_head.weight", 0),
    ],
)
def test_projectors_are_told_from_towers_by_their_names(name: str, place: int) -> None:
    assert owner(name, ["text_decoder", "vision_tower", "multi_modal_projector"]) == place


def test_a_projector_within_a_tower_belongs_to_it_where_no_module_is_for_projectors() -> None:
    assert owner("model.visual.merger.ln_q.weight", ["text_decoder", "vision_tower"]) == 1


# ---- any prefix, any model --------------------------------------------------------------------------

WORD = st.sampled_from(["model", "language_model", "transformer", "bert", "inner", "wrap"])


PREFIX = st.lists(WORD, max_size=3).map(lambda words: "".join(f"{word}." for word in words))


def refs(prefix: str, layers: int, heads: Mapping[str, str]) -> dict[str, TensorRef]:
    shapes = {f"{prefix}{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()}
    shapes |= {f"{prefix}norm.weight": (8,)} | {heads.get(n, n): (32, 8) for n in ("lm_head.weight",)}
    return {name: TensorRef(name, "F32", shape, "x", 0, 0) for name, shape in shapes.items()}


@given(PREFIX, PREFIX, st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_any_prefix_is_found(own: str, template: str, layers: int) -> None:
    rules = find_rules(a := refs(own, layers, {}), b := refs(template, layers, {}), "a", "b")
    called = {name: rule.template + name[len(rule.own) :] for rule in rules for name in rule.names}
    assert {called.get(name, name) for name in a} == set(b)
    assert len(set(called.values())) == len(called)


def test_names_of_many_parts_cost_no_more_than_others() -> None:
    """A name may have 4096 characters, all of them dots."""
    many = {f"{i}{'.' * 4000}w": TensorRef("w", "F32", (1,), "x", 0, 0) for i in range(300)}
    other = {f"{i}{'.' * 3999}w": TensorRef("w", "F32", (1,), "x", 0, 0) for i in range(300)}
    assert find_rules(many, other, "a", "b") == []


@pytest.mark.parametrize("whole_layer", [False, True])
def test_a_first_model_with_a_hole_in_its_layers_is_refused(whole_layer: bool, tmp_path: Path) -> None:
    """The output would have the hole too; what lies in no other of its layers is only left out, as a head is."""
    whole = text(1, "model.") | {"model.layers.1.extra.weight": torch.ones(2)}
    lost = [n for n in whole if n.startswith("model.layers.0.")][: None if whole_layer else 1]
    holed = {name: tensor for name, tensor in text(2, "model.").items() if name not in lost}
    config = linear(write(tmp_path / "holed", holed), write(tmp_path / "whole", whole))
    with pytest.raises(
        ModelError, match=r"holed: tensor model.layers.0\..* missing, where other layers and .*whole have"
    ):
        plan(config, memory="1GiB")
    assert not merged({**config, "exclude": ["layers.0"]}, tmp_path / "out").keys() & {
        *lost,
        "model.layers.1.extra.weight",
    }


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod."])
def test_the_names_of_a_wrapper_in_the_first_model_are_told_with_a_cure_that_works(
    prefix: str, tmp_path: Path
) -> None:
    a, b = (
        text(1, f"{prefix}model.", head=f"{prefix}lm_head.weight"),
        text(2, f"{prefix}model.", head=f"{prefix}lm_head.weight"),
    )
    config = linear(write(tmp_path / "a", a, model_type="llama"), write(tmp_path / "b", b))
    (line,) = [line for line in plan(config, memory="1GiB").warnings if "strip:" in line]
    assert f'write `strip: "{prefix}"` beside this model' in line
    config["models"][0]["strip"] = prefix
    assert not [line for line in plan(config, memory="1GiB").warnings if "strip:" in line]
    found = merged(config, tmp_path / "out")
    assert_is(
        found, {name.removeprefix(prefix): 0.25 * tensor + 0.75 * b[name] for name, tensor in a.items()}
    )


def test_a_hole_in_the_first_source_of_a_slice_is_refused(tmp_path: Path) -> None:
    whole, lost = text(1, "model."), "model.layers.1.mlp.up_proj.weight"
    holed = {name: tensor for name, tensor in text(2, "model.").items() if name != lost}
    paths = write(tmp_path / "holed", holed), write(tmp_path / "whole", whole)

    def sliced(*ranges: list[int]) -> dict[str, Any]:
        sources = [{"model": str(path), "layer_range": r} for path, r in zip(paths, ranges, strict=True)]
        return {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 1.0}}

    with pytest.raises(
        ModelError, match=rf"holed: tensor {lost} is missing, where other layers and .*whole have"
    ):
        plan(sliced([0, 2], [0, 2]), memory="1GiB")
    plan({**sliced([0, 2], [0, 2]), "exclude": ["up_proj"]}, memory="1GiB")
    plan(sliced([0, 1], [0, 1]), memory="1GiB")
