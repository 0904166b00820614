"""A pipeline of diffusers is one model: its components' tensors under the names of their folders; hostile ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from streammerge import plan
from streammerge.checkpoint.index import open_model
from streammerge.errors import ConfigError, ModelError
from streammerge.planning.description import describe
from streammerge.report.tables import inspect_text, inspect_values
from tests.checkpoint.pipelines import INDEX, SHAPES, UNET, stem_of, write_component, write_pipeline


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "p", 1)


def test_tensors_have_the_names_of_their_components(pipeline: Path) -> None:
    index = open_model(pipeline)
    assert set(index) == {f"{folder}/{name}" for folder, some in SHAPES.items() for name in some}
    assert index.folders == ("unet", "vae", "text_encoder", "text_encoder_2")
    assert index.config["_class_name"] == "StableDiffusionXLPipeline"
    assert index["vae/decoder.conv_out.bias"].shape == (3,)
    assert not index.notes


def test_full_precision_is_taken_before_a_variant_and_a_variant_before_nothing(pipeline: Path) -> None:
    unet = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    write_component(pipeline / "unet", {name: tensor.half() for name, tensor in unet.items()}, ".fp16")
    index = open_model(pipeline)
    assert index["unet/conv_in.weight"].dtype == "F32"
    (note,) = index.notes
    assert note.startswith("unet/: its weights are there more than once")
    assert "diffusion_pytorch_model.fp16.safetensors" in note
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert open_model(pipeline)["unet/conv_in.weight"].dtype == "F16"


def test_a_component_in_shards_and_one_that_is_pickled_are_read(pipeline: Path) -> None:
    unet = pipeline / "unet"
    tensors = load_file(unet / "diffusion_pytorch_model.safetensors")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tensors, unet / "diffusion_pytorch_model.bin")
    assert {name for name in open_model(pipeline) if name.startswith("unet/")} == {
        f"unet/{name}" for name in UNET
    }


def listing(**changes: Any) -> Callable[[Path], None]:
    def change(pipeline: Path) -> None:
        (pipeline / "model_index.json").write_text(json.dumps({**INDEX, **changes}))

    return change


def text(raw: str) -> Callable[[Path], None]:
    return lambda pipeline: (pipeline / "model_index.json").write_text(raw) and None


def elsewhere(name: str) -> Callable[[Path], None]:
    """Move a part of the pipeline out of its folder, and leave a link to it."""

    def change(pipeline: Path) -> None:
        target = pipeline.parent / "elsewhere"
        shutil.move(pipeline / name, target)
        (pipeline / name).symlink_to(target)

    return change


def without(name: str) -> Callable[[Path], None]:
    def change(pipeline: Path) -> None:
        path = pipeline / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def into_onnx(pipeline: Path) -> None:
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").rename(pipeline / "vae" / "model.onnx")


def into_a_file(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "scheduler")
    (pipeline / "scheduler").write_text("x")


def of_settings_alone(pipeline: Path) -> None:
    for folder in SHAPES:
        shutil.rmtree(pipeline / folder)
    (pipeline / "model_index.json").write_text(json.dumps({"scheduler": INDEX["scheduler"]}))


PAIR = ["diffusers", "X"]
HOSTILE = [
    ("a component above the folder", listing(**{"../other": PAIR}), "'../other' is not a plain folder name"),
    ("a component by its path", listing(**{"/etc": PAIR}), "'/etc' is not a plain folder name"),
    ("a component below another", listing(**{"unet/x": PAIR}), "is not a plain folder name"),
    ("the folder itself", listing(**{".": PAIR}), "'.' is not a plain folder name"),
    ("a NUL", listing(**{"a\0b": PAIR}), "is not a plain folder name"),
    ("a name of a megabyte", listing(**{"x" * 2**20: PAIR}), "is not a plain folder name"),
    ("escape sequences", listing(**{"\x1b[31m": PAIR}), "is not a plain folder name"),
    ("a component that is not there", listing(transformer=PAIR), "'transformer' ('X') is missing"),
    ("100000 components", listing(**{f"c{i}": PAIR for i in range(10**5)}), "is missing"),
    ("a component twice", text('{"unet": ["a", "b"], "unet": ["a", "b"]}'), "the key 'unet' twice"),
    ("a list of nothing", text("{}"), "without any weights"),
    ("no JSON", text("{"), "is not JSON"),
    ("no object", text("[]"), "model_index.json"),
    (
        "values of all kinds",
        text('{"a": 3, "b": [1, 2], "c": ["x"], "_d": ["x", "y"], "e": {}}'),
        "without any weights",
    ),
    (
        "a component without its folder",
        without("text_encoder_2"),
        "'text_encoder_2' ('CLIPTextModelWithProjection') is missing",
    ),
    (
        "a component without its weights",
        without("unet/diffusion_pytorch_model.safetensors"),
        "no weights of the component",
    ),
    ("weights of a kind that is not read", into_onnx, "ONNX"),
    ("a file for a folder", into_a_file, "'scheduler' ('EulerDiscreteScheduler') is not a folder"),
    ("a folder elsewhere", elsewhere("unet"), "a link that leads out of the pipeline's folder"),
    ("weights elsewhere", elsewhere("vae/diffusion_pytorch_model.safetensors"), "a link that leads out"),
    ("settings elsewhere", elsewhere("vae/config.json"), "a link that leads out"),
    ("the list elsewhere", elsewhere("model_index.json"), "a link that leads out"),
    ("no weights at all", of_settings_alone, "without any weights"),
]


@pytest.mark.parametrize(("what", "change", "words"), HOSTILE, ids=[row[0] for row in HOSTILE])
def test_what_is_no_sound_pipeline_is_refused_in_one_line(
    what: str, change: Callable[[Path], None], words: str, pipeline: Path
) -> None:
    change(pipeline)
    with pytest.raises(ModelError) as caught:
        open_model(pipeline)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_checker_that_was_deleted_is_told_of(pipeline: Path) -> None:
    listing(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])(pipeline)
    (note,) = open_model(pipeline).notes
    assert "safety_checker=None" in note


def test_the_blobs_of_a_cache_are_followed(pipeline: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--x"
    blob = repository / "blobs" / ("a1" * 32)
    blob.parent.mkdir(parents=True)
    snapshot = repository / "snapshots" / "1"
    snapshot.parent.mkdir()
    pipeline.rename(snapshot)
    weights = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(blob)
    weights.symlink_to(f"../../../blobs/{blob.name}")
    assert "unet/conv_in.weight" in open_model(snapshot)


def merging(*models: Path, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(path)} for path in models],
        "parameters": {"weight": 0.5},
        **more,
    }


def test_a_component_that_only_the_first_has_is_copied_and_named(tmp_path: Path) -> None:
    a = write_pipeline(tmp_path / "a", 1)
    b = write_pipeline(
        tmp_path / "b", 2, shapes={name: some for name, some in SHAPES.items() if name != "vae"}
    )
    made = plan(merging(a, b))
    kinds = {job.name: job.kind for job in made.jobs}
    assert {kind for name, kind in kinds.items() if name.startswith("vae/")} == {"copy"}
    assert kinds["unet/conv_in.weight"] == "merge"
    assert [line for line in made.warnings if "vae/ (2 tensors): only" in line]


def test_a_component_that_only_some_have_is_refused_with_the_cure(tmp_path: Path) -> None:
    a, c = write_pipeline(tmp_path / "a", 1), write_pipeline(tmp_path / "c", 3)
    b = write_pipeline(
        tmp_path / "b", 2, shapes={name: some for name, some in SHAPES.items() if name != "vae"}
    )
    with pytest.raises(ModelError, match=r"vae/.* missing.*exclude"):
        plan(merging(a, b, c))
    assert plan(merging(a, b, c, exclude=["^vae/"])).jobs


def test_a_component_that_the_first_lacks_is_left_out_and_named(tmp_path: Path) -> None:
    a = write_pipeline(
        tmp_path / "a", 1, shapes={name: some for name, some in SHAPES.items() if name != "vae"}
    )
    b = write_pipeline(tmp_path / "b", 2)
    made = plan(merging(a, b))
    assert not [job for job in made.jobs if job.name.startswith("vae/")]
    assert [line for line in made.warnings if "left out" in line and "vae/ (2 tensors)" in line]


def test_a_unet_alone_is_merged_into_a_pipeline_and_the_rest_is_copied(tmp_path: Path) -> None:
    a, b = write_pipeline(tmp_path / "a", 1), write_pipeline(tmp_path / "b", 2)
    made = plan(merging(a, b / "unet"))
    assert {job.kind for job in made.jobs if job.name.startswith("unet/")} == {"merge"}
    assert {job.kind for job in made.jobs if not job.name.startswith("unet/")} == {"copy"}
    assert [line for line in made.warnings if f"is unet/* ({len(UNET)} tensors)" in line]
    made = plan(merging(b / "unet", a))
    assert {job.name for job in made.jobs} == set(UNET)
    assert {job.kind for job in made.jobs} == {"merge"}


def test_a_single_file_and_a_pipeline_have_different_names(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    a = write_pipeline(tmp_path / "a", 1)
    names = [
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ]
    save_file({name: torch.ones(8) for name in names}, tmp_path / "sd.safetensors")
    for models in ((a, tmp_path / "sd.safetensors"), (tmp_path / "sd.safetensors", a)):
        with pytest.raises(ModelError, match="from_single_file"):
            plan(merging(*models))


def test_plan_and_inspect_show_the_components(tmp_path: Path) -> None:
    a, b = write_pipeline(tmp_path / "a", 1), write_pipeline(tmp_path / "b", 2)
    values = describe(plan(merging(a, b, exclude=["^vae/"])))
    assert values["components"] == {
        "unet": {"merge": 12},
        "vae": {"copy": 2},
        "text_encoder": {"merge": 4},
        "text_encoder_2": {"merge": 4},
    }
    index = open_model(a)
    assert {one["file"] for one in inspect_values(index)} == {
        f"{folder}/{stem_of(folder)}.safetensors" for folder in SHAPES
    }
    text = inspect_text(index)
    assert text.startswith("StableDiffusionXLPipeline: 22 tensors")
    assert "  vae             2 tensors, " in text


def test_an_output_has_the_components_of_the_first_model_and_all_of_them(tmp_path: Path) -> None:
    a, b = write_pipeline(tmp_path / "a", 1), write_pipeline(tmp_path / "b", 2)
    some = {name: shapes for name, shapes in SHAPES.items() if name != "vae"}
    c = write_pipeline(tmp_path / "c", 3, shapes=some)
    with pytest.raises(ModelError, match=r"has no component vae: name a model that has it first"):
        plan(merging(c, a, b, tensors="any"))
    with pytest.raises(ModelError, match=r"component vae would be in the output.*exclude"):
        plan(merging(a, b, c, tensors="common"))
    made = plan(merging(a, b, c, tensors="common", exclude=["^vae/"]))
    assert {job.kind for job in made.jobs if job.name.startswith("vae/")} == {"copy"}
    assert {job.kind for job in plan(merging(a, b, c, tensors="any")).jobs} == {"merge"}


def test_components_may_be_modules_with_models_of_their_own(tmp_path: Path) -> None:
    a, b = write_pipeline(tmp_path / "a", 1), write_pipeline(tmp_path / "b", 2)
    both, one = [{"model": str(a)}, {"model": str(b)}], [{"model": str(b)}]
    modules = {name: {"models": one if name == "vae" else both} for name in SHAPES}
    made = plan({"merge_method": "linear", "parameters": {"weight": 0.5}, "modules": modules})
    sources = {job.name.split("/")[0]: [ref.path for ref in job.sources] for job in made.jobs}
    assert [Path(path).parents[1].name for path in sources["vae"]] == ["b"]
    assert [Path(path).parents[1].name for path in sources["unet"]] == ["a", "b"]
    del modules["text_encoder"]
    with pytest.raises(ModelError, match="component text_encoder would be in the output"):
        plan({"merge_method": "linear", "parameters": {"weight": 0.5}, "modules": modules})


@pytest.mark.parametrize("key", ["tokenizer_source", "chat_template"])
def test_a_pipeline_has_more_than_one_tokenizer(key: str, tmp_path: Path) -> None:
    a, b = write_pipeline(tmp_path / "a", 1), write_pipeline(tmp_path / "b", 2)
    with pytest.raises(ConfigError, match=f"{key}: .* is a pipeline"):
        plan(merging(a, b, **{key: "union" if key == "tokenizer_source" else "chatml"}))
