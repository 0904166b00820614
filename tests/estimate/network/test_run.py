"""A model run stage by stage gives the logits of the model run at once, and what is no stack of layers is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from streammerge.checkpoint.index import open_model
from streammerge.errors import ModelError
from streammerge.estimate.network.examples import Example
from streammerge.estimate.network.loader import Loader
from streammerge.estimate.network.resident import Resident
from streammerge.estimate.network.run import Network
from streammerge.estimate.network.skeleton import Skeleton
from streammerge.io.reader import Reader
from tests.estimate.network.tiny import MODELS, make_model

CPU = torch.device("cpu")
REFUSED = ("albert", "deberta")


def network_of(directory: Path) -> tuple[Network, Loader]:
    index = open_model(directory)
    skeleton = Skeleton(index)
    return Network(skeleton, CPU), Loader(skeleton, index, Reader())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_stage_by_stage_the_logits_are_those_of_the_whole_model_to_the_bit(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    network, loader = network_of(tmp_path)
    example = Example(0, np.array([5, 7, 9, 11, 5]))
    skeleton = network.skeleton
    with torch.no_grad():
        hidden = network.embed(example, Resident(loader, CPU, skeleton.outer, "embed"))
        for i, block in enumerate(skeleton.blocks):
            weights = Resident(loader, CPU, list(block.parameters()), f"layer {i}")
            hidden = network.block(i, hidden, network.call(i, example), weights)
        logits = network.head(example, hidden, Resident(loader, CPU, skeleton.outer, "head"))
        expected = model(input_ids=torch.from_numpy(example.ids)[None]).logits
    assert torch.equal(logits, expected)


def test_a_skeleton_holds_no_weights_and_real_buffers(tmp_path: Path) -> None:
    make_model("gemma3", tmp_path)
    skeleton = Skeleton(open_model(tmp_path))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    buffers = dict(skeleton.model.named_buffers())
    assert buffers
    assert not any(buffer.is_meta for buffer in buffers.values())


def test_the_layers_of_one_kind_get_the_masks_of_that_kind(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    network, _ = network_of(tmp_path)
    short, long = Example(0, np.arange(3, 7)), Example(1, np.arange(3, 12))
    shapes = [network.call(0, example).kwargs["position_embeddings"][0].shape[1] for example in (short, long)]
    assert shapes == [4, 9]


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_do_not_run_once_each_are_refused(name: str, tmp_path: Path) -> None:
    make_model(name, tmp_path)

    def run_head() -> None:
        network, loader = network_of(tmp_path)
        weights = Resident(loader, CPU, network.skeleton.outer, "head")
        network.head(Example(0, np.array([5, 7, 9])), torch.zeros(1, 3, 32), weights)

    with pytest.raises(ModelError, match="cannot be run layer by layer"):
        run_head()


def test_a_weight_of_another_stage_is_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    network, loader = network_of(tmp_path)
    example = Example(0, np.array([5, 7, 9]))
    of_layer_1 = Resident(loader, CPU, list(network.skeleton.blocks[1].parameters()), "layer 0")
    with pytest.raises(ModelError, match=r"layer 0 uses model\.layers\.0"):
        network.block(0, torch.zeros(1, 3, 32), network.call(0, example), of_layer_1)


def test_a_parameter_without_a_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model("bert", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"classifier\.weight of BertForSequenceClassification is missing"):
        network_of(tmp_path)


def test_a_config_of_another_size_is_named(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40'))
    with pytest.raises(ModelError, match=r"has shape \[.*\], but config.json requires"):
        network_of(tmp_path)


@pytest.mark.parametrize(
    ("architectures", "message"),
    [(["BertForMaskedLM"], "BertForMaskedLM"), ([], "not said"), (["NoSuchForCausalLM"], "cannot build")],
)
def test_what_no_likelihood_is_known_of_is_refused(
    architectures: list[str], message: str, tmp_path: Path
) -> None:
    import json

    make_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = architectures
    if message == "cannot build":
        config["model_type"] = "no_such"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        network_of(tmp_path)
