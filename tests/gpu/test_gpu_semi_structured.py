"""Packed layers on sparse tensor cores: the product, the layer, and whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, MarianConfig, MarianMTModel

from hf_nmsparse import NMSparseConfig, NMSparseQuantizationConfig, finalize, save_packed, set_compute, sparsify
from hf_nmsparse.kernels import semi_structured
from hf_nmsparse.layers import sparse_layers
from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.packed_layers import PackedLinear, SemiStructuredLinear
from hf_nmsparse.pattern import NMPattern

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

TWO_OF_FOUR = NMPattern(2, 4)
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def needs_sparse_tensor_cores() -> None:
    reason = semi_structured.why_not(TWO_OF_FOUR, 64, 64, torch.bfloat16, torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)


def sparse_weight(out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(out_features, in_features)
    return apply_mask(weight, magnitude_mask(weight, TWO_OF_FOUR)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 33, 130])
@pytest.mark.parametrize("shape", [(16, 16), (64, 32), (512, 2048), (1024, 512)])
def test_the_product(shape: tuple[int, int], rows: int, bias: bool, dtype: torch.dtype) -> None:
    weight = sparse_weight(*shape, dtype)
    x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
    added = torch.randn(shape[0], device="cuda", dtype=dtype) if bias else None
    found = semi_structured.linear(x, semi_structured.compress(weight), added)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    assert found.dtype == dtype
    # fp32 sums and one rounding of the result: half a unit in the last place of bf16 is 2^-9 of it, of fp16 2^-12.
    bound = {torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert float((found.double() - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_the_weight_comes_back_exactly(dtype: torch.dtype) -> None:
    weight = sparse_weight(64, 128, dtype)
    assert torch.equal(semi_structured.restore(semi_structured.compress(weight)), weight)


def test_inputs_of_any_strides_and_dimensions() -> None:
    weight = sparse_weight(64, 32, torch.bfloat16)
    compressed = semi_structured.compress(weight)
    x = torch.randn(5, 32, 7, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    found = semi_structured.linear(x, compressed, None)
    assert found.shape == (5, 7, 64)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight), rtol=2e-2, atol=2e-2)


def test_the_shape_test_answers() -> None:
    for out_features, in_features in ((512, 512), (8192, 8192)):
        answer = semi_structured.is_faster(out_features, in_features, torch.bfloat16, torch.device("cuda", 0))
        assert answer in (True, False)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    config = MarianConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        pad_token_id=127,
        eos_token_id=0,
        decoder_start_token_id=127,
    )
    model = MarianMTModel(config)
    sparsify(model, NMSparseConfig("2:4"))
    finalize(model)
    save_packed(model, tmp_path / "packed", values="bf16")
    return tmp_path / "packed"


def load(path: Path, compute: str) -> Any:
    config = NMSparseQuantizationConfig(compute)
    return AutoModelForSeq2SeqLM.from_pretrained(path, quantization_config=config, device_map="cuda").eval()


def logits(model: Any) -> Tensor:
    ids = torch.arange(1, 61, device="cuda").reshape(3, 20)
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids, decoder_input_ids=ids[:, :7]).logits
    return found.double()


def test_a_model_loads_computes_generates_and_saves(packed: Path, tmp_path: Path) -> None:
    model, dense = load(packed, "semi_structured"), load(packed, "dense")
    layers = [model.get_submodule(name) for name in sparse_layers(model)]
    assert {type(layer) for layer in layers} == {SemiStructuredLinear}
    expected = logits(dense)
    assert float((logits(model) - expected).norm() / expected.norm()) < 2e-2
    ids = torch.arange(1, 21, device="cuda").reshape(2, 10)
    assert model.generate(input_ids=ids, max_new_tokens=8, num_beams=4).shape[0] == 2
    model.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes()
    set_compute(model, "dense")
    assert torch.equal(logits(model), expected)


def test_auto_loads_and_computes(packed: Path) -> None:
    expected = logits(load(packed, "dense"))
    assert float((logits(load(packed, "auto")) - expected).norm() / expected.norm()) < 2e-2


def test_fp32_is_refused() -> None:
    layer = PackedLinear(64, 64, TWO_OF_FOUR, device="cuda", dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"^semi_structured: it takes fp16 and bf16 and the weight is torch\.float32; "
    ):
        SemiStructuredLinear(layer)
