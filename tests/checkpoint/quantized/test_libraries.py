"""The builders of the other tests hold what the libraries say: their own decompression gives the same values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from safetensors.torch import load_file

from tests.checkpoint.quantized.formats import FORMATS, write

COMPRESSED = [
    name
    for name, made in FORMATS.items()
    if made.declared["quantization_config"]["quant_method"] == "compressed-tensors"
    and name != "pack-quantized g_idx"
]  # The library has dropped column indices; they are one indexing away from the rest.


def decompressed(directory: Path, module: str, kind: str, weights: dict[str, object]) -> np.ndarray:
    """Return a weight as compressed-tensors decompresses it, in fp64 where it lets its dtype be chosen."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    tensors = load_file(directory / "model.safetensors")
    state = {key.removeprefix(f"{module}."): t for key, t in tensors.items() if key.startswith(f"{module}.")}
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    if "fp4" in kind:
        packed, scale = state["weight_packed"], state["weight_scale"]
        values = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1]).double()
        mx = scale.view(torch.uint8).double() - 127
        scale = scale.double() if "nvfp4" in kind else 2.0**mx
        whole = state.get("weight_global_scale")
        found = dequantize(values, scale, args=args, global_scale=None if whole is None else whole.double())
        return found.float().numpy()
    if state["weight_scale"].dtype != torch.uint8:
        state["weight_scale"] = state["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(kind)
    return compressor.decompress(state, scheme)["weight"].float().numpy()


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_gives_the_values_of_the_builders(tmp_path: Path, name: str) -> None:
    values = write(tmp_path, name)
    declared = FORMATS[name].declared["quantization_config"]
    weights = declared["config_groups"]["group_0"]["weights"]
    for module in FORMATS[name].modules:
        found = decompressed(tmp_path, module, declared["format"], weights)
        assert np.array_equal(found, values[f"{module}.weight"])


def test_transformers_gives_the_values_of_the_experts_of_gpt_oss(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    values = write(tmp_path, "gpt-oss")
    tensors = load_file(tmp_path / "model.safetensors")
    for module in FORMATS["gpt-oss"].modules:
        found = convert_moe_packed_tensors(
            tensors[f"{module}_blocks"], tensors[f"{module}_scales"], dtype=torch.float32
        )
        assert np.array_equal(found.numpy(), values[module])
