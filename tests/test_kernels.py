from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_nmsparse.kernels import reference
from hf_nmsparse.layers import PackedLinear, sparse_layers
from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.packing import pack
from hf_nmsparse.pattern import NMPattern

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(3, 5), NMPattern(16, 32)]


def sparse_linear(pattern: NMPattern, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(7 * pattern.m, 6, bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(apply_mask(linear.weight, magnitude_mask(linear.weight, pattern)))
    return linear


def inputs(linear: nn.Linear) -> Tensor:
    return torch.randn(2, 3, linear.in_features, generator=torch.Generator().manual_seed(1)).to(linear.weight.dtype)


def test_product_by_hand() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, -2.0], [1.0, 0.0, 0.0, 3.0]])
    packed = pack(weight, NMPattern(2, 4))
    x, bias = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([10.0, 20.0])
    out = reference.linear(x, packed["weight"], packed["weight_indices"], bias, NMPattern(2, 4))
    assert out.tolist() == [[10.0 + 5 * 2 - 2 * 4, 20.0 + 1 + 3 * 4]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layer_equals_the_dense_one(pattern: NMPattern, dtype: torch.dtype, bias: bool) -> None:
    linear = sparse_linear(pattern, bias, dtype)
    packed = PackedLinear.from_linear(linear, pattern)
    x = inputs(linear)
    assert torch.equal(packed(x), F.linear(x, linear.weight, linear.bias))
    back = packed.to_linear()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, linear.weight)
    assert back.bias is linear.bias
    assert sparse_layers(nn.Sequential(packed, back)) == {"0": pattern, "1": pattern}


def test_packed_layer_survives_what_modules_go_through() -> None:
    pattern = NMPattern(2, 4)
    linear = sparse_linear(pattern)
    packed = PackedLinear.from_linear(linear, pattern)
    x = inputs(linear)
    expected = packed(x)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert copied.pattern == pattern
        assert torch.equal(copied(x), expected)
    loaded = PackedLinear(linear.in_features, linear.out_features, pattern)
    loaded.load_state_dict(packed.state_dict())
    assert torch.equal(loaded(x), expected)
    assert "in_features=28, out_features=6, bias=True, pattern=2:4" in repr(packed)
    half = packed.to(torch.bfloat16)
    assert half.weight_indices.dtype == torch.uint8
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.to("meta").weight_indices.is_meta


def test_gradients_reach_values_bias_and_input() -> None:
    pattern = NMPattern(2, 4)
    linear = sparse_linear(pattern)
    packed = PackedLinear.from_linear(linear, pattern)
    x = inputs(linear).requires_grad_()
    packed(x).square().sum().backward()
    assert packed.weight.grad is not None
    assert packed.weight.grad.shape == (6, 14)
    assert packed.bias is not None
    assert packed.bias.grad is not None
    assert x.grad is not None


def test_packed_layer_follows_autocast_as_the_dense_one_does() -> None:
    pattern = NMPattern(2, 4)
    linear = sparse_linear(pattern)
    packed = PackedLinear.from_linear(linear, pattern)
    x = inputs(linear)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = packed(x), linear(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_a_first_call_in_inference_mode_spoils_no_later_gradient() -> None:
    pattern = NMPattern(3, 7)  # no other test fills this pattern's tables
    linear = sparse_linear(pattern)
    packed = PackedLinear.from_linear(linear, pattern)
    with torch.inference_mode():
        packed(inputs(linear))
    packed(inputs(linear)).sum().backward()
    assert packed.weight.grad is not None


def test_packed_layer_refuses_other_weights() -> None:
    with pytest.raises(ValueError, match="in_features 6 is not a multiple of 4"):
        PackedLinear(6, 4, NMPattern(2, 4))
    with pytest.raises(ValueError, match="fc1 has 4 groups"):
        PackedLinear.from_linear(nn.Linear(4, 4), NMPattern(2, 4), "fc1")
