"""The page on image models, on a tiny SDXL that diffusers itself writes, loads and runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from streammerge import merge, verify
from tests.checkpoint.pipelines import Tensors, tensors_of

PAGE = Path(__file__).parents[2] / "docs" / "use" / "image-models.md"
TWO_PIPELINES, SINGLE_FILES, BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]


def write_sdxl(directory: Path, seed: int) -> None:
    """Write a pipeline with SDXL's blocks, in a few thousand parameters."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        norm_num_groups=2,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=2,
        sample_size=8,
    )
    text = CLIPTextConfig(
        vocab_size=6,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(directory, model_max_length=16)
    diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        add_watermarker=False,
    ).save_pretrained(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `models/pipeline-a` and `models/pipeline-b`."""
    home = tmp_path_factory.mktemp("diffusers")
    for seed, name in enumerate("ab"):
        write_sdxl(home / "models" / f"pipeline-{name}", seed)
    return home


def merged(text: str, home: Path, out: str, **options: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        merge({**yaml.safe_load(text), "dtype": "float32"}, out, progress=False, **options)
    return home / out


def test_the_documented_merge_of_two_pipelines_loads_and_runs_a_step(models: Path) -> None:
    import diffusers

    out = merged(TWO_PIPELINES, models, "two", shard_size="20KB")
    assert (out / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    a, b = (tensors_of(models / "models" / f"pipeline-{name}") for name in "ab")
    result = tensors_of(out)
    assert result.keys() == a.keys()
    for name, tensor in result.items():
        want = (
            a[name] if name.startswith("vae/") else (0.6 * a[name].double() + 0.4 * b[name].double()).float()
        )
        assert torch.equal(tensor, want), name
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(out)
    for name, parameter in pipeline.unet.named_parameters():
        assert torch.equal(parameter, result[f"unet/{name}"])
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a b", num_inference_steps=1, height=16, width=16, guidance_scale=1.0, output_type="pt"
    ).images
    assert torch.isfinite(images).all()
    assert images.std() > 0
    assert not verify(out).problems
    card = (out / "README.md").read_text()
    assert 'pipeline = StableDiffusionXLPipeline.from_pretrained("path/to/this/folder"' in card
    assert "library_name: diffusers" in card


def share(name: str) -> float:
    """Return the weight of a tensor of the UNet by the page's words: IN00 to IN08, MID, OUT00 to OUT08, BASE."""
    inward = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    if name.startswith("conv_in."):
        return inward[0]
    if name.startswith("mid_block."):
        return 0.5
    if match := re.match(r"down_blocks\.(\d)\.(?:resnets|attentions)\.(\d)\.", name):
        return inward[3 * int(match[1]) + int(match[2]) + 1]
    if match := re.match(r"down_blocks\.(\d)\.downsamplers\.", name):
        return inward[3 * int(match[1]) + 3]
    if match := re.match(r"up_blocks\.(\d)\.(?:resnets|attentions)\.(\d)\.", name):
        return inward[8 - 3 * int(match[1]) - int(match[2])]
    if match := re.match(r"up_blocks\.(\d)\.upsamplers\.", name):
        return inward[6 - 3 * int(match[1])]
    assert name.startswith(("time_embedding.", "add_embedding.", "conv_norm_out.", "conv_out."))
    return 0.25


def check(a: Tensors, b: Tensors, result: Tensors, name: str, weight: float) -> None:
    want = a[name].double() + weight * (b[name] - a[name]).double()
    assert torch.allclose(result[name].double(), want, rtol=2**-23, atol=1e-12), name


def test_the_documented_block_weights_of_a_pipeline_reach_their_blocks(models: Path) -> None:
    out = merged(BLOCKS, models, "blocks")
    a, b = (tensors_of(models / "models" / f"pipeline-{name}") for name in "ab")
    result = tensors_of(out)
    for name in result:
        component, _, inner = name.partition("/")
        weight = share(inner) if component == "unet" else 0.0 if component == "vae" else 0.25
        check(a, b, result, name, weight)


def test_the_documented_block_weights_of_single_files_reach_their_blocks(tmp_path: Path) -> None:
    weights = {f"input_blocks.{k}.0.in_layers.2.weight": k / 10 for k in range(9)}
    weights |= {f"output_blocks.{k}.1.proj_in.weight": (8 - k) / 10 for k in range(9)}
    weights |= {"middle_block.1.norm.weight": 0.5, "time_embed.0.weight": 0.25, "out.2.weight": 0.25}
    weights = {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}
    weights |= {
        "first_stage_model.decoder.conv_in.weight": 0.0,
        "conditioner.embedders.1.model.ln_final.weight": 0.25,
    }
    (tmp_path / "models").mkdir()
    made = []
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        made.append({name: torch.randn(4, 4, generator=generator) for name in weights})
        save_file(made[-1], tmp_path / "models" / f"sdxl-{name}.safetensors")
    result = load_file(merged(SINGLE_FILES, tmp_path, "sdxl-mix.safetensors"))
    assert result.keys() == weights.keys()
    for name, weight in weights.items():
        check(*made, result, name, weight)
