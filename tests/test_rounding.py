"""Rows rounded to int8 by hand, and what holds of any row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nmsparse.rounding import quantize_rows
from tests.packed_models import check_int8_tensors


class TestQuantizeRows:
    def test_by_hand(self) -> None:
        weight = torch.tensor(
            [
                [127.0, -64.0, 0.0, 1.0],  # whole numbers already
                [-254.0, 3.0, -3.0, 4.8],  # steps of 2; halves go to the even one
                [1.27, 0.006, -0.014, -1.27],
                [0.0, -0.0, 0.0, 0.0],
            ]
        )
        values, scale = quantize_rows(weight)
        assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
        assert values.tolist() == [[127, -64, 0, 1], [-127, 2, -2, 2], [127, 1, -1, -127], [0, 0, 0, 0]]
        assert scale[[0, 1, 3]].tolist() == [1.0, 2.0, 1.0]
        assert scale[2].item() == pytest.approx(0.01, rel=2**-16)

    def test_an_outlier_is_clipped_where_that_costs_less(self) -> None:
        # Steps of 1 are off by 0.5 at each 9.5, in squares 0.25 * 199 = 49.75 in all. Steps of 0.95 hit these, and
        # cost 127 - 127 * 0.95 = 6.35 at the outlier alone, 40.3 in squares.
        values, scale = quantize_rows(torch.tensor([[127.0] + [9.5] * 199]))
        assert scale.item() == pytest.approx(0.95, rel=2**-16)
        assert values.tolist() == [[127] + [10] * 199]
        # With fewer of them the outlier counts for more: 0.25 * 150 = 37.5.
        values, scale = quantize_rows(torch.tensor([[127.0] + [9.5] * 150]))
        assert scale.tolist() == [1.0]
        assert values.tolist() == [[127] + [10] * 150]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_it_takes_every_number_type(self, dtype: torch.dtype) -> None:
        weight = torch.randn(5, 40).to(dtype)
        for ours, expected in zip(quantize_rows(weight), quantize_rows(weight.float()), strict=True):
            assert torch.equal(ours, expected)

    def test_rows_without_numbers(self) -> None:
        for shape in ((0, 4), (3, 0)):
            values, scale = quantize_rows(torch.zeros(shape))
            assert values.shape == shape
            assert scale.tolist() == [1.0] * shape[0]

    @pytest.mark.parametrize("largest", [1e-36, 1e-40, 1e-45])
    def test_rows_too_small_for_a_scale_become_zero(self, largest: float) -> None:
        # The scale would be below the smallest normal number.
        values, scale = quantize_rows(torch.tensor([[largest, -largest / 2, 0.0, 0.0]]))
        assert values.tolist() == [[0, 0, 0, 0]]
        assert scale.tolist() == [1.0]

    @pytest.mark.parametrize("largest", [1e-35, 1e-20, 1e-3, 1e18, 1e23, 1e30, 3e38, torch.finfo(torch.float32).max])
    def test_rows_of_any_magnitude(self, largest: float) -> None:
        row = torch.tensor([[1.0, -0.75, 0.52, 0.001]]) * largest
        values, scale = quantize_rows(row)
        assert values.tolist() == [[127, -95, 66, 0]]
        assert scale.item() == pytest.approx(largest / 127, rel=2**-16)
        check_int8_tensors(values, scale)

    @settings(max_examples=200)
    @given(st.data())
    def test_properties(self, data: st.DataObject) -> None:
        rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 80))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        weight = torch.randn(rows, columns, generator=generator)
        weight *= torch.rand(weight.shape, generator=generator) < data.draw(st.sampled_from([0.05, 0.5, 1.0]))
        weight = weight ** data.draw(st.sampled_from([1, 3, 9]))  # tails from light to heavy
        weight *= 2.0 ** data.draw(st.integers(-90, 30))
        values, scale = quantize_rows(weight)
        assert values.min() >= -127
        check_int8_tensors(values, scale)
        back = values * scale[:, None]
        assert torch.equal(back.double(), values.double() * scale.double()[:, None])  # no rounding in fp32
        again = quantize_rows(back)
        assert torch.equal(again[0], values)
        assert torch.equal(again[1], scale)
        # No worse than the largest magnitude over 127, but for the 16 bits that a scale has.
        wide = weight.double()
        plain = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-300) / 127
        most = ((wide / plain).round() * plain - wide).norm(dim=1)
        assert ((back.double() - wide).norm(dim=1) <= most * (1 + 1e-6) + 2.0**-16 * wide.norm(dim=1)).all()
