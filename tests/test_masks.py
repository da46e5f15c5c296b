"""Masks: by hand as rows, against a stable sort for every pattern, and what is counted on them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_nmsparse.masks import (
    apply_mask,
    count_flips,
    count_violations,
    magnitude_mask,
    pack_bits,
    random_mask,
    unpack_bits,
)
from hf_nmsparse.pattern import NMPattern
from tests.tiny import kept

INF = math.inf


def bits(text: str) -> list[bool]:
    return [digit == "1" for digit in text.replace(" ", "")]


def mask_of(*rows: str) -> Tensor:
    return pack_bits(torch.tensor([bits(row) for row in rows]))


@pytest.mark.parametrize(
    ("pattern", "row", "expected"),
    [
        ("2:4", [1, 2, 3, 4], "0011"),
        ("2:4", [4, 3, 2, 1], "1100"),
        ("2:4", [-4, 3, -2, 1], "1100"),
        ("2:4", [1, -3, 2, -4], "0101"),
        ("2:4", [1, 1, 1, 1], "1100"),
        ("2:4", [1, -1, 1, -1], "1100"),
        ("2:4", [1, 2, 2, 2], "0110"),
        ("2:4", [2, 1, 1, 2], "1001"),
        ("2:4", [2, 1, 1, 1], "1100"),
        ("2:4", [1, 1, 1, 2], "1001"),
        ("2:4", [0, 0, 0, 0], "1100"),
        ("2:4", [-0.0, 0.0, -0.0, 0.0], "1100"),
        ("2:4", [0.0, -0.0, 5, 0], "1010"),
        ("2:4", [INF, 1, -INF, 2], "1010"),
        ("2:4", [INF, INF, -INF, INF], "1100"),
        ("2:4", [1e-45, 0, 0, 1e-44], "1001"),  # subnormals
        ("2:4", [1, 2, 3, 4, 4, 3, 2, 1], "0011 1100"),  # each group for itself
        ("1:4", [1, 2, 3, 4], "0001"),
        ("1:4", [-3, 3, -3, 1], "1000"),
        ("1:4", [0, 0, 0, -0.0], "1000"),
        ("3:4", [1, 2, 1, 1], "1110"),
        ("1:2", [1, -2, 2, 2, 0, 0], "01 10 10"),
        ("2:3", [3, 1, 2, 1, 1, 1], "101 110"),
        ("4:8", [1, 2, 3, 4, 5, 6, 7, 8], "00001111"),
        ("4:8", [8, 1, 7, 2, 6, 3, 5, 4], "10101010"),
        ("4:8", [1, 1, 1, 1, 1, 1, 1, 1], "11110000"),
        ("4:8", [9, 0, 0, 0, 0, 0, 0, 9], "11100001"),
    ],
)
def test_by_hand(pattern: str, row: list[float], expected: str) -> None:
    weight = torch.tensor([row], dtype=torch.float32)
    assert kept(weight, NMPattern.parse(pattern)).tolist() == [bits(expected)]


def test_groups_do_not_cross_rows() -> None:
    weight = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    assert kept(weight, NMPattern(2, 4)).tolist() == [bits("1100"), bits("0011")]


def stable_sort_mask(weight: Tensor, pattern: NMPattern) -> Tensor:
    """The definition: of a stable descending order by magnitude, the first N."""
    groups = weight.abs().reshape(-1, pattern.m)
    order = torch.sort(groups, dim=1, descending=True, stable=True).indices
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, order[:, : pattern.n], True).reshape(weight.shape)


def check_against_the_definition(weight: Tensor, pattern: NMPattern) -> None:
    before = weight.clone()
    mask = magnitude_mask(weight, pattern)
    assert (mask.dtype, mask.shape) == (torch.uint8, (-(-weight.numel() // 8),))
    expected = stable_sort_mask(weight, pattern)
    assert (expected.reshape(-1, pattern.m).sum(dim=1) == pattern.n).all()
    assert torch.equal(unpack_bits(mask, weight.shape), expected)
    assert torch.equal(mask, pack_bits(expected))  # zeros fill the last byte
    assert torch.equal(weight, before)


# Few values, so that ties, both zeros and infinities meet in most groups.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 1e-45, INF, -INF]) | st.floats(
    allow_nan=False, width=32
)


@st.composite
def grouped_rows(draw: st.DrawFn, m: int) -> Tensor:
    rows, groups = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    count = rows * groups * m
    values = draw(st.lists(VALUES, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, groups * m)


@pytest.mark.parametrize("m", range(2, 17))
@settings(max_examples=30)
@given(data=st.data())
def test_every_pattern_to_16_is_the_stable_sort(m: int, data: st.DataObject) -> None:
    weight = data.draw(grouped_rows(m))
    for n in range(1, m):
        check_against_the_definition(weight, NMPattern(n, m))


@settings(max_examples=200)
@given(grouped_rows(8))
def test_the_usual_patterns_are_the_stable_sort(weight: Tensor) -> None:
    for pattern in (NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)):
        check_against_the_definition(weight, pattern)


@pytest.mark.parametrize("m", [24, 31, 32])
def test_wide_groups_are_the_stable_sort(m: int) -> None:
    for n in (1, 2, m // 2, m - 1):
        weight = torch.randint(-5, 6, (8, 3 * m)).float()
        check_against_the_definition(weight, NMPattern(n, m))


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(4, 8), NMPattern(1, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, pattern: NMPattern) -> None:
    weight = (torch.randn(32, 64) * 3).to(dtype)  # bf16 has ties here
    check_against_the_definition(weight, pattern)


def test_fp16_whose_sum_overflows_is_no_nan() -> None:
    weight = torch.tensor([[60000.0, -60000.0, 1.0, 2.0]], dtype=torch.float16)
    assert kept(weight, NMPattern(2, 4)).tolist() == [bits("1100")]


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(1, 16)], ids=str)
def test_weights_that_are_not_contiguous(pattern: NMPattern) -> None:
    tall = torch.randn(32, 8)
    check_against_the_definition(tall.t(), pattern)
    check_against_the_definition(torch.randn(8, 64)[:, ::2], pattern)
    check_against_the_definition(torch.randn(1, 32).expand(3, 32), pattern)


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (0, 8), (3, 0)])
def test_any_leading_shape_down_to_no_rows(shape: tuple[int, ...]) -> None:
    check_against_the_definition(torch.randn(shape), NMPattern(2, 4))
    check_against_the_definition(torch.randn(shape), NMPattern(4, 8))


def test_a_mask_takes_no_gradient() -> None:
    weight = torch.randn(2, 8, requires_grad=True)
    assert not magnitude_mask(weight, NMPattern(2, 4)).requires_grad


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(4, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_refused_wherever_it_is(dtype: torch.dtype, pattern: NMPattern) -> None:
    for column in range(8):
        weight = torch.ones(2, 8, dtype=dtype)
        weight[0, 0] = INF
        weight[1, column] = math.nan
        with pytest.raises(ValueError, match=r"weight of shape \[2, 8\] holds NaN"):
            magnitude_mask(weight, pattern)


def test_a_row_that_does_not_divide_is_refused() -> None:
    # The tensor divides into groups, its rows do not.
    with pytest.raises(ValueError, match="in_features 6 is not a multiple of 4"):
        magnitude_mask(torch.randn(2, 6), NMPattern(2, 4))
    with pytest.raises(ValueError, match="in_features 6 is not a multiple of 4"):
        count_violations(torch.randn(2, 6), NMPattern(2, 4))


def test_apply_mask_makes_no_negative_zero() -> None:
    weight = torch.tensor([[-1.0, -2.0, -INF, -0.0]])
    masked = apply_mask(weight, mask_of("0100"))
    assert masked.tolist() == [[0.0, -2.0, 0.0, 0.0]]
    assert torch.signbit(masked).tolist() == [bits("0100")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_mask_keeps_dtype_and_bits(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8).to(dtype)
    keeps = torch.rand(4, 8) < 0.5
    masked = apply_mask(weight, pack_bits(keeps))
    assert masked.dtype is dtype
    assert torch.equal(masked[keeps], weight[keeps])
    assert not torch.signbit(masked[~keeps]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pruned_weights_may_fade_instead(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, INF, -0.0]]).to(dtype)
    masked = apply_mask(weight, mask_of("100", "010"), pruned_scale=0.5)
    assert masked.dtype is dtype
    assert masked.tolist() == [[1.0, -1.0, 1.5], [-2.0, INF, 0.0]]
    assert torch.signbit(masked).tolist() == [bits("010"), bits("101")]


@pytest.mark.parametrize(
    ("pattern", "row", "violations"),
    [
        ("2:4", [1, 0, 0, 2, 1, 1, 0, 0], 0),
        ("2:4", [1, 0, 3, 2, 1, 1, 0, 0], 1),
        ("2:4", [1, 1, 1, 0, 1, 1, 1, 1], 2),
        ("2:4", [-1, -1, -1, -0.0, 0, 0, 0, 0], 1),
        ("2:4", [1, -0.0, -0.0, -0.0, 0, 0, 0, 0], 0),
        ("2:4", [0, 0, 1, 1, 1, 1, 0, 0], 0),  # four in a row, but in two groups
        ("2:4", [1, 2, math.nan, 0, 0, 0, 0, 0], 1),
        ("1:4", [1, 0, 0, 2, 1, 0, 0, 0], 1),
        ("4:8", [1, 1, 1, 1, 0, 0, 0, 0], 0),
        ("4:8", [1, 1, 1, 1, 1, 0, 0, 0], 1),
    ],
)
def test_violations_by_hand(pattern: str, row: list[float], violations: int) -> None:
    assert count_violations(torch.tensor([row]), NMPattern.parse(pattern)) == violations


def test_flips_by_hand() -> None:
    old = mask_of("1100", "0011")
    assert count_flips(old, old).item() == 0
    assert count_flips(old, mask_of("1010", "0011")).item() == 2
    assert count_flips(old, mask_of("0011", "1100")).item() == 8
    counted = count_flips(old, ~old)
    assert (counted.shape, counted.dtype) == ((), torch.int64)


@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back(values: list[bool]) -> None:
    booleans = torch.tensor(values, dtype=torch.bool)
    mask = pack_bits(booleans)
    assert mask.dtype is torch.uint8
    padded = values + [False] * (-len(values) % 8)
    by_hand = [sum(padded[start + i] << i for i in range(8)) for start in range(0, len(padded), 8)]
    assert mask.tolist() == by_hand
    assert torch.equal(unpack_bits(mask, booleans.shape), booleans)


def test_every_byte_comes_back() -> None:
    mask = torch.arange(256, dtype=torch.uint8)
    booleans = unpack_bits(mask, torch.Size([2048]))
    assert booleans.view(torch.uint8).max() == 1  # other bytes are no booleans, though torch does not say so
    assert torch.equal(pack_bits(booleans), mask)


def test_bits_by_hand() -> None:
    booleans = torch.tensor([[True, False, False, True, False], [True, False, False, False, True]])
    assert pack_bits(booleans).tolist() == [0b00101001, 0b10]
    assert torch.equal(unpack_bits(torch.tensor([0b00101001, 0b10], dtype=torch.uint8), booleans.shape), booleans)


def test_bits_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"10 booleans take 2 bytes, got torch\.uint8 of"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), torch.Size([2, 5]))
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        unpack_bits(torch.zeros(2, dtype=torch.int64), torch.Size([2, 5]))


def test_random_masks_keep_n_of_m() -> None:
    generator = torch.Generator().manual_seed(1)
    mask = random_mask(torch.zeros(64, 32), NMPattern(3, 8), generator)
    assert (unpack_bits(mask, torch.Size([256, 8])).sum(dim=1) == 3).all()
    assert not torch.equal(mask, random_mask(torch.zeros(64, 32), NMPattern(3, 8), generator))
