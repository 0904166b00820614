"""Tensors of codes are told by the model's declaration and by the tensors next to them; no merge mixes them."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge import merge, plan
from streammerge.checkpoint.quantization import quantization_of
from streammerge.errors import ModelError


@dataclass
class Ref:
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_elements(self):
        n = 1
        for size in self.shape:
            n *= size
        return n


def model(**tensors):
    return {name.replace("__", "."): Ref(dtype, shape) for name, (dtype, shape) in tensors.items()}


M = (8, 16)
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}

# (format, the tensors, config.json, codes, companions)
FORMATS = [
    ("GPTQ", {"x__qweight": ("I32", M), "x__qzeros": ("I32", (1, 2)), "x__scales": ("F16", (1, 16)), "x__g_idx": ("I32", (64,))},
     {"quantization_config": {"quant_method": "gptq"}}, {"x.qweight"}, {"x.qzeros", "x.scales", "x.g_idx"}),
    ("GPTQ or AWQ", {"x__qweight": ("I32", M), "x__qzeros": ("I32", (1, 2)), "x__scales": ("F16", (1, 16))}, {},
     {"x.qweight"}, {"x.qzeros", "x.scales"}),
    ("FP8 with scales", {"x__weight": ("F8_E4M3", M), "x__weight_scale_inv": ("F32", (1, 1))}, FP8,
     {"x.weight"}, {"x.weight_scale_inv"}),
    ("quantised F8_E4M3", {"x__weight": ("F8_E4M3", M), "x__weight_scale": ("F32", (1,)), "x__input_scale": ("F32", (1,))}, {},
     {"x.weight"}, {"x.weight_scale", "x.input_scale"}),
    ("quantised F8_E4M3", {"x__weight": ("F8_E4M3", M), "x__scale_weight": ("F32", (1,))}, {}, {"x.weight"}, {"x.scale_weight"}),
    ("FP8 with scales", {"w1__weight": ("I8", M), "w1__scale": ("F8_E8M0", (8, 1))}, {"expert_dtype": "fp4"},
     {"w1.weight"}, {"w1.scale"}),
    ("FP8 with scales", {"e__gate_up_proj": ("F8_E4M3", (2, *M)), "e__gate_up_proj_scale_inv": ("F32", (2, 1, 1))}, FP8,
     {"e.gate_up_proj"}, {"e.gate_up_proj_scale_inv"}),
    ("MXFP4", {"e__up_blocks": ("U8", (2, 8, 1, 16)), "e__up_scales": ("U8", (2, 8, 1)), "e__up_bias": ("BF16", (2, 8))}, {},
     {"e.up_blocks"}, {"e.up_scales"}),
    ("MXFP4", {"mlp1_weight__blocks": ("U8", (2, 8, 1, 16)), "mlp1_weight__scales": ("U8", (2, 8, 1))}, {},
     {"mlp1_weight.blocks"}, {"mlp1_weight.scales"}),
    ("compressed-tensors (pack-quantized)",
     {"x__weight_packed": ("I32", M), "x__weight_scale": ("BF16", (8, 4)), "x__weight_shape": ("I64", (2,))},
     {"text_config": {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}},
     {"x.weight_packed"}, {"x.weight_scale", "x.weight_shape"}),
    ("quantised U8", {"x__weight": ("U8", M), "x__weight_scale": ("F8_E4M3", (8, 1)), "x__weight_scale_2": ("F32", ())}, {},
     {"x.weight"}, {"x.weight_scale", "x.weight_scale_2"}),
    ("bitsandbytes U8", {"x__weight": ("U8", (64, 1)), "x__weight__absmax": ("F32", (2,)), "x__weight__quant_map": ("F32", (16,)),
      "x__weight__quant_state__bitsandbytes__nf4": ("U8", (80,))}, {}, {"x.weight"},
     {"x.weight.absmax", "x.weight.quant_map", "x.weight.quant_state.bitsandbytes.nf4"}),
    ("quantised I8", {"x__weight": ("I8", M), "x__SCB": ("F32", (8,)), "x__weight_format": ("U8", ())}, {},
     {"x.weight"}, {"x.SCB", "x.weight_format"}),
    ("EXL2", {"x__q_weight": ("I32", M), "x__q_scale": ("I32", M), "x__q_scale_max": ("F16", (4,)), "x__q_groups": ("I16", (8,))}, {},
     {"x.q_weight"}, {"x.q_scale", "x.q_scale_max", "x.q_groups"}),
    ("VPTQ", {"x__indices": ("I32", (1, *M)), "x__centroids__weight": ("F16", (1, 64)), "x__weight_bias": ("F16", (8,))}, {},
     {"x.indices"}, {"x.centroids.weight", "x.weight_bias"}),
    ("Nunchaku or HIGGS", {"x__qweight": ("I8", M), "x__wscales": ("BF16", (1, 8))}, {}, {"x.qweight"}, {"x.wscales"}),
    ("I8 without a scale", {"x__weight": ("I8", M)}, {}, {"x.weight"}, set()),
    ("FP8 with scales", {"x__weight": ("F8_E4M3", M)}, FP8, {"x.weight"}, set()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "tensors", "config", "codes", "companions"),
    FORMATS,
    ids=[f"{i}: {r[0]}" for i, r in enumerate(FORMATS)],
)
def test_codes_and_what_belongs_to_them_are_known(kind, tensors, config, codes, companions):
    found = quantization_of(model(**tensors, norm__weight=("BF16", (8,))), config)
    assert found is not None
    assert (found.format, found.codes, found.companions) == (kind, codes, companions)
    assert not found.covers("norm.weight")
    assert all(found.covers(name) for name in (*codes, *companions))


PLAIN = [
    {"embeddings__position_ids": ("I64", (1, 8)), "embeddings__token_type_ids": ("I64", (1, 8))},
    {
        "bn__num_batches_tracked": ("I64", ()),
        "bn__weight": ("F32", (8,)),
        "mask": ("BOOL", M),
        "table": ("U8", M),
    },
    {
        "attn__relative_position_index": ("I32", M),
        "attn__scale": ("F32", (1,)),
        "attn__scales": ("F32", (1,)),
    },
    {"x__weight": ("F8_E4M3", M), "x__bias": ("BF16", (8,))},
    {"x__weight": ("BF16", M), "x__scale": ("BF16", (8,)), "x__input_scale": ("F32", (1,))},
]


@pytest.mark.parametrize("tensors", PLAIN, ids=[next(iter(row)) for row in PLAIN])
def test_ordinary_buffers_and_floats_are_no_codes(tensors):
    assert quantization_of(model(**tensors), {}) is None


def test_a_declaration_alone_makes_no_codes():
    assert (
        quantization_of(model(x__weight=("BF16", M)), {"quantization_config": {"load_in_4bit": True}}) is None
    )


def write(path, seed, declared=True):
    g = torch.Generator().manual_seed(seed)
    path.mkdir()
    tensors = {
        "l.0.q.qweight": torch.randint(-9, 9, (8, 16), dtype=torch.int32, generator=g),
        "l.0.q.qzeros": torch.randint(0, 9, (1, 2), dtype=torch.int32, generator=g),
        "l.0.q.scales": torch.rand(1, 16, generator=g).half(),
        "l.0.q.g_idx": torch.zeros(64, dtype=torch.int32),
        "norm.weight": torch.rand(8, generator=g),
    }
    save_file(tensors, path / "model.safetensors")
    # A method that nothing decodes, in the layout that it shares with GPTQ.
    entry = {"quantization_config": {"quant_method": "auto-round", "bits": 4}} if declared else {}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **entry}))
    return tensors


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def linear(*names, **more):
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    return {"merge_method": "linear", "models": models, "dtype": "float32", **more}


@pytest.mark.parametrize("declared", [True, False])
def test_codes_are_never_merged_however_they_are_declared(here, declared):
    for seed, name in enumerate(("a", "b")):
        write(here / name, seed, declared)
    for run in (plan, lambda config: merge(config, "out")):
        with pytest.raises(
            ModelError,
            match=r"tensor l\.0\.q\.qweight is quantised \(quantisation: (AutoRound|GPTQ).*dequantise",
        ):
            run(linear("a", "b"))
        with pytest.raises(ModelError, match=r"l\.0\.q\.qzeros belongs to quantised tensors"):
            run(linear("a", "b", exclude=["qweight", "scales", "g_idx"]))
    assert not (here / "out").exists()


def test_a_quantised_model_beside_a_plain_one_is_refused_for_that_reason(here):
    write(here / "a", 1)
    (here / "b").mkdir()
    save_file(
        {"l.0.q.weight": torch.ones(16, 64), "norm.weight": torch.ones(8)}, here / "b" / "model.safetensors"
    )
    for order in (("a", "b"), ("b", "a")):
        with pytest.raises(ModelError, match=r"a: tensor l\.0\.q\.qweight is quantised"):
            plan(linear(*order))


@pytest.mark.parametrize("method", ["passthrough", "linear"])
def test_codes_may_be_copied_with_all_that_belongs_to_them(here, method):
    a = write(here / "a", 1)
    b = write(here / "b", 2)
    config = (
        {"merge_method": "passthrough", "models": [{"model": "a"}], "dtype": "float32"}
        if method == "passthrough"
        else linear("a", "b", exclude=[r"l\.0\.q\."])
    )
    merge(config, "out")
    found = load_file("out/model.safetensors")
    for name, tensor in a.items():
        if name != "norm.weight":
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    want = a["norm.weight"] if method == "passthrough" else (a["norm.weight"] + b["norm.weight"]) / 2
    assert torch.allclose(found["norm.weight"], want)
    assert "quantization_config" in json.loads((here / "out" / "config.json").read_text())


def test_codes_are_not_scaled(here):
    write(here / "a", 1)
    config = {"merge_method": "passthrough", "models": [{"model": "a", "parameters": {"scale": 0.5}}]}
    with pytest.raises(ModelError, match="it cannot be scaled"):
        plan(config)


def test_an_adapter_goes_on_no_codes(here):
    write(here / "a", 1)
    (here / "lora").mkdir()
    with pytest.raises(
        ModelError, match=r"a is quantised \(AutoRound\), and an adapter goes on float weights: dequantise"
    ):
        plan(linear("a+lora", "a"))


def test_codes_whose_scale_is_missing_are_told_from_those_of_unknown_formats(here):
    for seed, name in enumerate(("a", "b")):
        (here / name).mkdir()
        codes = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)).to(torch.float8_e4m3fn)
        save_file({"l.0.q.weight": codes}, here / name / "model.safetensors")
        (here / name / "config.json").write_text(json.dumps({"model_type": "llama", **FP8}))
    with pytest.raises(ModelError, match=r"a: tensor l\.0\.q\.weight holds F8_E4M3 codes without a scale"):
        plan(linear("a", "b"))


@pytest.mark.parametrize(
    ("tensors", "method"),
    [
        ({"l.0.q.weight_qdata": torch.int8, "l.0.q.weight_scale": torch.float32}, "torchao"),
        ({"l.0.q.W_q": torch.uint8, "l.0.q.meta_scale": torch.float32}, None),
        ({"l.0.q.weight": torch.int8, "l.0.q.stretch": torch.float32}, "wonder"),
        ({"l.0.q.dense_weights": torch.int64}, "spqr"),
    ],
    ids=["torchao", "HQQ undeclared", "unknown", "other names"],
)
def test_codes_of_a_format_that_is_not_read_are_called_so_and_not_incomplete(here, tensors, method):
    (here / "a").mkdir()
    save_file(
        {name: torch.ones(8, 8, dtype=dtype) for name, dtype in tensors.items()}, here / "a/model.safetensors"
    )
    declared = {} if method is None else {"quantization_config": {"quant_method": method}}
    (here / "a/config.json").write_text(json.dumps({"model_type": "llama", **declared}))
    (here / "b").mkdir()
    save_file({"l.0.q.weight": torch.ones(8, 8)}, here / "b/model.safetensors")
    with pytest.raises(
        ModelError, match=r"a: .*(cannot be merged yet|which is not read): dequantise the model first"
    ):
        plan(linear("b", "a"))
