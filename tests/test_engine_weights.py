"""Weights as arrays: what they are rounded to and repacked from is, bit by bit, what tensors are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nmsparse.engine_weights import as_2_of_4, bf16_bits, dense_rows, from_bf16, quantize_rows
from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.packing import pack, unpack
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.rounding import quantize_rows as quantize_tensor

TWO_OF_FOUR = NMPattern(2, 4)


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.integers(0, 20), st.integers(0, 700), st.sampled_from([1e-44, 1e-30, 1.0, 1e5, 3e38]))
def test_rounding_to_int8_is_that_of_tensors(seed: int, rows: int, columns: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).clamp(-1, 1) * size
    weight[torch.rand(rows, columns, generator=generator) < 0.2] = 0.0
    if rows > 1:
        weight[1] = 0.0
    values, scale = quantize_rows(weight.numpy())
    expected, scales = quantize_tensor(weight)
    assert values.tobytes() == expected.numpy().tobytes()
    assert scale.tobytes() == scales.numpy().tobytes()


def test_large_weights_round_alike() -> None:
    weight = torch.randn(1500, 512, generator=torch.Generator().manual_seed(1))
    values, scale = quantize_rows(weight.numpy())
    expected, scales = quantize_tensor(weight)
    assert (values == expected.numpy()).all()
    assert (scale == scales.numpy()).all()


def test_bf16_rounds_as_torch_does() -> None:
    numbers = torch.cat(
        [
            torch.randn(10_000, generator=torch.Generator().manual_seed(0)),
            torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 1e-45, -1e-40, 3.3e38, 2.0**-126]),
        ]
    )
    expected = numbers.to(torch.bfloat16)
    bits = bf16_bits(numbers.numpy())
    assert bits.tobytes() == expected.view(torch.int16).numpy().tobytes()
    assert (from_bf16(bits) == expected.float().numpy()).all()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "1:16", "2:12", "1:32", "1:2", "1:3"])
def test_weights_within_2_of_4_become_2_of_4(pattern: str) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(2))
    weight[0, :8] = 0.0
    masked = apply_mask(weight, magnitude_mask(weight, NMPattern.parse(pattern)))
    both = pack(masked, NMPattern.parse(pattern))
    dense = dense_rows(both["weight"].numpy(), both["weight_indices"].numpy(), NMPattern.parse(pattern))
    assert (dense == masked.numpy()).all()
    values, codes = as_2_of_4(dense)
    assert torch.equal(unpack(torch.from_numpy(values), torch.from_numpy(codes), TWO_OF_FOUR), masked)


@pytest.mark.parametrize("pattern", ["4:8", "3:4", "16:32", "5:7"])
def test_other_patterns_become_dense(pattern: str) -> None:
    known = NMPattern.parse(pattern)
    weight = torch.randn(3, 4 * known.m, generator=torch.Generator().manual_seed(3))
    masked = apply_mask(weight, magnitude_mask(weight, known))
    both = pack(masked, known)
    assert (dense_rows(both["weight"].numpy(), both["weight_indices"].numpy(), known) == masked.numpy()).all()


def test_a_group_with_three_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^as_2_of_4: a group of four holds more than two weights"):
        as_2_of_4(np.ones((1, 4), np.float32))
