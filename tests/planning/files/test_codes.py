"""config.json keeps the declaration of a quantisation by what the output holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.api import merge, plan
from streammerge.planning.resolve.codes import holds_codes

M = "layers.0.mlp.down_proj"
CODES, HALF = torch.ones(4, 4, dtype=torch.int32), torch.ones(4, dtype=torch.float16)
BYTES, F8 = torch.ones(4, 4, dtype=torch.uint8), torch.ones(4, 4).to(torch.float8_e4m3fn)
KEPT: dict[str, Mapping[str, torch.Tensor]] = {
    "GPTQ": {f"{M}.qweight": CODES, f"{M}.qzeros": CODES, f"{M}.scales": HALF},
    "packed": {f"{M}.weight_packed": CODES, f"{M}.weight_scale": HALF},
    "NF4": {f"{M}.weight": BYTES, f"{M}.weight.absmax": HALF, f"{M}.weight.quant_map": HALF},
    "int8": {f"{M}.weight": BYTES.to(torch.int8), f"{M}.SCB": HALF},
    "FP8": {f"{M}.weight": F8, f"{M}.weight_scale_inv": HALF},
    "MXFP4": {"experts.gate_up_proj_blocks": BYTES, "experts.gate_up_proj_scales": BYTES},
}
LEFT: dict[str, Mapping[str, torch.Tensor]] = {
    "floats": {f"{M}.weight": HALF},
    "positions that are called weight": {"position_weight": torch.arange(8), f"{M}.weight": HALF},
    "masks": {"h.0.attn.bias": BYTES, f"{M}.weight": HALF},
    "counts": {"bn.num_batches_tracked": torch.tensor(3), f"{M}.weight": HALF},
}


def config_of(tmp_path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    directory = tmp_path / "m"
    directory.mkdir()
    save_file({name: t.clone() for name, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(
        json.dumps({"model_type": "x", "quantization_config": {"quant_method": "x"}})
    )
    return {"merge_method": "passthrough", "models": [{"model": str(directory)}]}


@pytest.mark.parametrize("kind", KEPT)
def test_codes_are_known_by_their_scales(kind: str, tmp_path: Path) -> None:
    assert _holds(config_of(tmp_path, KEPT[kind]))


def _holds(config: dict[str, object]) -> bool:
    """Return the verdict on what a plan copies; one that is refused as quantised has an answer of its own."""
    return holds_codes(plan(config).jobs)


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_not_quantised_is_not_declared_so(kind: str, tmp_path: Path) -> None:
    merge(config_of(tmp_path, LEFT[kind]), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "x"}
