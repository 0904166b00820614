"""A model with a LoRA adapter is estimated, and merged by its diagonal, as the same model written out is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file

from streammerge.api import compute_fisher, merge
from tests.checkpoint.adapters.scene import factors, in_order, write_adapter
from tests.conftest import read_tensors
from tests.estimate.network.tiny import make_lines, make_model, write_lines

ADAPTED = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("module", [ADAPTED, "model.embed_tokens"])
def test_a_model_with_an_adapter_is_estimated_as_if_written_out(module: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    make_model("llama", tmp_path / "base")
    make_model("llama", tmp_path / "written")
    rows = 32 if module == ADAPTED else 96
    parts = factors(module, 32, rows, 4)
    adapter = write_adapter(tmp_path / "adapter", parts, r=4, lora_alpha=1)
    tensors = read_tensors(tmp_path / "base")
    save_file(
        {**tensors, f"{module}.weight": in_order(tensors[f"{module}.weight"], *parts.values(), 0.25)},
        tmp_path / "written" / "model.safetensors",
    )
    data = write_lines(tmp_path / "data.jsonl", make_lines(4))
    references = {"read": f"{tmp_path / 'base'}+{adapter}", "written": str(tmp_path / "written")}
    for name, reference in references.items():
        compute_fisher(reference, data, tmp_path / f"{name}.zarr", labels="empirical")
    read, written = (zarr.open_group(str(tmp_path / f"{name}.zarr"), mode="r") for name in references)
    assert set(read.array_keys()) == set(written.array_keys())
    for name in read.array_keys():
        assert np.array_equal(read[name][...], written[name][...]), name
    models = [
        {"model": reference, "fisher": str(tmp_path / f"{name}.zarr")}
        for name, reference in references.items()
    ]
    merge({"merge_method": "fisher", "models": models}, tmp_path / "out")
    found = read_tensors(tmp_path / "out")[f"{module}.weight"]
    assert torch.allclose(found, read_tensors(tmp_path / "written")[f"{module}.weight"], rtol=1e-6)
