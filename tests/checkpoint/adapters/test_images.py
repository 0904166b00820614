"""LoRA files of image models: every way to name a module, the scales, pipelines and single files, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge import merge, verify
from streammerge.checkpoint.index import open_model
from streammerge.errors import ModelError
from tests.checkpoint.pipelines import Tensors, tensors_of, write_component, write_pipeline

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CHANGED = {
    f"unet/{Q}": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "unet/down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k": "input_blocks.8.1.transformer_blocks.1.attn2.to_k",
    "unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "middle_block.1.transformer_blocks.0.attn1.to_q",
    "unet/up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q": "output_blocks.5.1.transformer_blocks.0.attn1.to_q",
    "unet/up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
    "unet/conv_in": "input_blocks.0.0",
    "text_encoder/text_model.encoder.layers.0.self_attn.q_proj": "text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2/text_model.encoder.layers.1.mlp.fc1": "text_model.encoder.layers.1.mlp.fc1",
}
"""Modules that the adapters change, and their names in single files, in the part that they belong to."""
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
RANK, ALPHA = 3, 1.5


def factors(base: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the two factors of each module."""
    g, found = torch.Generator().manual_seed(5), {}
    for module in CHANGED:
        out, *rest = base[f"{module}.weight"].shape
        shape = (out, RANK, *(1 for _ in rest[1:]))
        found[module] = torch.randn(RANK, *rest, generator=g), torch.randn(shape, generator=g)
    return found


def changed(base: Tensors, scale: float) -> Tensors:
    """Return the model with the changes, by the formula in fp64."""
    result = dict(base)
    for module, (a, b) in factors(base).items():
        w = base[f"{module}.weight"]
        change = (b.double().flatten(1) @ a.double().flatten(1)).view(w.shape)
        result[f"{module}.weight"] = (w.double() + scale * change).float()
    return result


def written(path: Path, base: Tensors, style: str, *, alpha: bool = True, **metadata: str) -> Path:
    """Write the adapter in a style of names: ``diffusers``, ``old``, ``kohya`` or ``sgm``."""
    ends = {
        "diffusers": (".lora_A.weight", ".lora_B.weight"),
        "old": (".lora.down.weight", ".lora.up.weight"),
    }
    down, up = ends.get(style, (".lora_down.weight", ".lora_up.weight"))
    tensors = {}
    for module, (a, b) in factors(base).items():
        component, _, inner = module.partition("/")
        name = f"{component}.{inner}"
        if style in ("kohya", "sgm"):
            inner = CHANGED[module] if style == "sgm" else inner
            name = KOHYA[component] + inner.replace(".", "_")
        tensors |= {name + down: a, name + up: b}
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata)
    return path


def merged(model: str, out: Path) -> Tensors:
    merge({"merge_method": "passthrough", "models": [model], "dtype": "float32"}, out, progress=False)
    if (out / "model_index.json").exists():
        return tensors_of(out)
    (file,) = [out] if out.is_file() else out.glob("*.safetensors")
    return load_file(file)


def near(found: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    """Compare: what is not adapted has its bits, what is adapted is rounded once or twice."""
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("images")
    write_pipeline(home / "p", 1)
    return home


def test_a_pipeline_is_changed_alike_by_every_way_to_name_its_modules(place: Path) -> None:
    base = tensors_of(place / "p")
    first = None
    for style in ("diffusers", "old", "kohya", "sgm"):
        file = written(place / style / "pytorch_lora_weights.safetensors", base, style)
        adapter = file if style == "kohya" else file.parent  # a file, or the folder of diffusers
        found = merged(f"{place / 'p'}+{adapter}", place / f"out-{style}")
        near(found, changed(base, ALPHA / RANK))
        first = first or found
        assert all(torch.equal(found[name], first[name]) for name in first), style
        untouched = base.keys() - {f"{module}.weight" for module in CHANGED}
        assert all(torch.equal(found[name], base[name]) for name in untouched)
    assert not verify(str(place / "out-kohya")).problems


def test_without_alpha_the_scale_is_one_or_that_of_the_recorded_configuration(place: Path) -> None:
    base = tensors_of(place / "p")
    plain = written(place / "plain.safetensors", base, "diffusers", alpha=False)
    near(merged(f"{place / 'p'}+{plain}", place / "out-plain"), changed(base, 1.0))
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6}
    text = {f"{part}.{key}": value for part in KOHYA for key, value in settings.items()}
    recorded = written(
        place / "recorded.safetensors", base, "diffusers", alpha=False, lora_adapter_metadata=json.dumps(text)
    )
    near(merged(f"{place / 'p'}+{recorded}", place / "out-recorded"), changed(base, 6 / RANK))


@pytest.mark.parametrize("style", ["kohya", "sgm"])
def test_a_single_file_is_changed_by_both_sets_of_names(place: Path, tmp_path: Path, style: str) -> None:
    base = tensors_of(place / "p")
    begin = {"unet": "model.diffusion_model.", "text_encoder": "conditioner.embedders.0.transformer."}
    names = {
        module: begin[module.partition("/")[0]] + single
        for module, single in CHANGED.items()
        if not module.startswith("text_encoder_2/")
    }
    single = {f"{name}.weight": base[f"{module}.weight"] for module, name in names.items()}
    single["first_stage_model.decoder.conv_in.weight"] = torch.ones(2, 2)
    save_file(single, tmp_path / "sdxl.safetensors")
    file = written(tmp_path / "lora.safetensors", base, style)
    with pytest.raises(
        ModelError, match=r"'lora_te2_.*fc1', which is no module of .*sdxl.*: fuse it in diffusers"
    ):
        open_model(f"{tmp_path / 'sdxl.safetensors'}+{file}")
    save_file({k: t for k, t in load_file(file).items() if "_te2_" not in k}, file)
    found = merged(f"{tmp_path / 'sdxl.safetensors'}+{file}", tmp_path / "out.safetensors")
    want = changed(base, ALPHA / RANK)
    for module, name in names.items():
        torch.testing.assert_close(found[f"{name}.weight"], want[f"{module}.weight"], rtol=1e-6, atol=1e-6)


def test_a_component_alone_takes_its_part_of_a_file(place: Path, tmp_path: Path) -> None:
    base = tensors_of(place / "p")
    a, b = factors(base)[f"unet/{Q}"]
    save_file({f"unet.{Q}.lora_A.weight": a, f"unet.{Q}.lora_B.weight": b}, tmp_path / "lora.safetensors")
    unet = write_component(
        tmp_path / "unet", {k.removeprefix("unet/"): t for k, t in base.items() if k.startswith("unet/")}
    )
    found = merged(f"{unet}+{tmp_path / 'lora.safetensors'}", tmp_path / "out")
    want = changed(base, 1.0)[f"unet/{Q}.weight"]
    torch.testing.assert_close(found[f"{Q}.weight"], want, rtol=1e-6, atol=1e-6)


A, B = torch.zeros(2, 8), torch.zeros(8, 2)
GOOD = {f"unet.{Q}.lora_A.weight": A, f"unet.{Q}.lora_B.weight": B}
K = "unet.down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "LoHa": ({f"unet.{Q}.hada_w1_a": A}, {}, "hada_w1_a' is no factor of a plain LoRA: fuse it"),
    "DoRA of kohya": ({**GOOD, f"unet.{Q}.dora_scale": B}, {}, "dora_scale' is no factor"),
    "elsewhere": ({"unet.other.lora_A.weight": A}, {}, "'unet.other', which is no module of"),
    "of a text model": ({"base_model.model.a.lora_A.weight": A}, {}, "which is no module of"),
    "one factor": ({f"unet.{Q}.lora_A.weight": A}, {}, "lora_B"),
    "a shape": (
        {**GOOD, f"unet.{Q}.lora_B.weight": torch.zeros(7, 2)},
        {},
        r"do not fit the weight \[8, 8\]",
    ),
    "two names": (
        {**GOOD, f"lora_unet_{Q.replace('.', '_')}.lora_down.weight": A},
        {},
        "under two names",
    ),
    "ranks": (
        {**GOOD, f"{K}.lora_A.weight": torch.zeros(4, 8), f"{K}.lora_B.weight": torch.zeros(8, 4)},
        {},
        "different ranks and no alpha",
    ),
    "some alphas": (
        {**GOOD, f"{K}.lora_A.weight": A, f"{K}.lora_B.weight": B, f"{K}.alpha": torch.tensor(1.0)},
        {},
        "an alpha for 1 of 2 modules",
    ),
    "alpha": ({**GOOD, f"unet.{Q}.alpha": torch.tensor(float("nan"))}, {}, "is nan, which is no scale"),
    "alphas": ({**GOOD, f"unet.{Q}.alpha": torch.ones(2)}, {}, "where one number is expected"),
    "alpha alone": ({f"unet.{Q}.alpha": torch.tensor(1.0)}, {}, "an alpha without factors"),
    "integers": (
        {**GOOD, f"unet.{Q}.lora_A.weight": torch.zeros(2, 8, dtype=torch.int8)},
        {},
        "made of floats",
    ),
    "metadata": (GOOD, {"lora_adapter_metadata": "{"}, "lora_adapter_metadata"),
    "another start": (
        GOOD,
        {"lora_adapter_metadata": '{"unet.peft_type": "LORA", "unet.init_lora_weights": "pissa"}'},
        "modifies the base weights",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_lora_of_the_model_is_refused(name: str, place: Path, tmp_path: Path) -> None:
    tensors, metadata, said = REFUSED[name]
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "lora.safetensors", metadata)
    with pytest.raises(ModelError, match=said):
        open_model(f"{place / 'p'}+{tmp_path / 'lora.safetensors'}")


def test_an_adapter_of_peft_goes_on_one_component(place: Path, tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match=r"goes on one component: write PIPELINE/unet\+ADAPTER"):
        open_model(f"{place / 'p'}+{tmp_path}")
    with pytest.raises(ModelError, match="give the adapter's directory"):
        open_model(f"{place / 'p'}+{tmp_path / 'adapter_model.safetensors'}")
