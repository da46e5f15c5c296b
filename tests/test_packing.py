from __future__ import annotations

import math
import struct
from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_nmsparse.masks import apply_mask, magnitude_mask, pack_bits
from hf_nmsparse.number_types import VALUE_DTYPES
from hf_nmsparse.packed_format import VALUE_TYPES, code_bits, packed_bytes, packed_shapes
from hf_nmsparse.packing import decode, encode, pack, unpack
from hf_nmsparse.pattern import NMPattern
from tests.packed_models import check_tensors

TWO_OF_FOUR = NMPattern(2, 4)
PATTERNS = [NMPattern(n, m) for m in range(2, 17) for n in range(1, m)]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 3.0, -3.0, 2.0**-20, -(2.0**-20), 60000.0]


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(BITS[left.dtype]), right.view(BITS[right.dtype]))


def row_of_codes(codes: list[int], bits: int) -> list[int]:
    """The definition: one long number, least significant bit first."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


def test_codes_of_two_of_four_are_those_of_the_format() -> None:
    mask = [
        [1, 1, 0, 0],  # 0 = {0, 1}
        [1, 0, 1, 0],  # 1 = {0, 2}
        [1, 0, 0, 1],  # 2 = {0, 3}
        [0, 1, 1, 0],  # 3 = {1, 2}
        [0, 1, 0, 1],  # 4 = {1, 3}
        [0, 0, 1, 1],  # 5 = {2, 3}
        [1, 1, 0, 0],
        [1, 0, 1, 0],
    ]
    one_row = torch.tensor(mask, dtype=torch.bool).reshape(1, 32)
    assert encode(one_row, TWO_OF_FOUR).tolist() == [[0b10_001_000, 0b1_100_011_0, 0b001_000_10]]
    a_group_a_row = torch.tensor(mask, dtype=torch.bool)
    assert encode(a_group_a_row, TWO_OF_FOUR).tolist() == [[0], [1], [2], [3], [4], [5], [0], [1]]


def test_pack_by_hand() -> None:
    weight = torch.tensor(
        [
            [0.0, 5.0, 0.0, -2.0, 3.0, 0.0, 4.0, 0.0],
            [0.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    packed = pack(weight, TWO_OF_FOUR)
    assert packed["weight"].tolist() == [[5.0, -2.0, 3.0, 4.0], [0.0, 7.0, 0.0, 0.0]]
    assert packed["weight_indices"].tolist() == [[4 | 1 << 3], [2 | 0 << 3]]
    assert same_bits(unpack(packed["weight"], packed["weight_indices"], TWO_OF_FOUR), weight)


def test_free_places_go_to_negative_zeros_first() -> None:
    weight = torch.tensor([[0.0, 0.0, 1.0, -0.0], [-0.0, 0.0, 0.0, -0.0], [-0.0, -0.0, -0.0, 2.0]])
    packed = pack(weight, TWO_OF_FOUR)
    assert packed["weight_indices"].tolist() == [[5], [2], [2]]
    back = unpack(packed["weight"], packed["weight_indices"], TWO_OF_FOUR)
    assert same_bits(back[:2], weight[:2])
    # Three -0.0 beside a number do not fit into two places: the last two lose their sign.
    assert same_bits(back[2], torch.tensor([-0.0, 0.0, 0.0, 2.0]))


def test_codes_of_one_of_four_are_the_position() -> None:
    weight = torch.eye(4).reshape(1, 16)  # group i keeps its position i
    assert pack(weight, NMPattern(1, 4))["weight_indices"].tolist() == [[0b11_10_01_00]]


def test_codes_of_four_of_eight_cross_bytes_and_leave_padding() -> None:
    mask = [
        [1, 1, 1, 1, 0, 0, 0, 0],  # 0, the first
        [1, 1, 1, 0, 1, 0, 0, 0],  # 1 = {0, 1, 2, 4}
        [0, 1, 1, 1, 1, 0, 0, 0],  # 35: the binomial(7, 3) sets with 0 come before
        [0, 0, 0, 0, 1, 1, 1, 1],  # 69, the last
    ]
    # 28 bits: 0000000, 0000001, 0100011 and 1000101 from the right, then four of padding.
    expected = [0b1_0000000, 0b11_000000, 0b101_01000, 0b0000_1000]
    assert encode(torch.tensor(mask, dtype=torch.bool).reshape(1, 32), NMPattern(4, 8)).tolist() == [expected]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_codes_are_lexicographic_ranks(pattern: NMPattern) -> None:
    sets = list(combinations(range(pattern.m), pattern.n))
    assert code_bits(pattern) == max(1, (len(sets) - 1).bit_length())
    step = max(1, len(sets) // 500)
    ranks = [*range(0, len(sets), step), len(sets) - 1]
    mask = torch.zeros(1, len(ranks), pattern.m, dtype=torch.bool)
    for place, rank in enumerate(ranks):
        mask[0, place, list(sets[rank])] = True
    mask = mask.reshape(1, -1)
    codes = encode(mask, pattern)
    assert codes.tolist() == [row_of_codes(ranks, code_bits(pattern))]
    assert torch.equal(decode(codes, pattern, len(ranks)), mask)


@pytest.mark.parametrize("pattern", [NMPattern(16, 32), NMPattern(1, 32), NMPattern(31, 32), NMPattern(9, 25)], ids=str)
def test_wide_patterns_need_no_table(pattern: NMPattern) -> None:
    first = [1] * pattern.n + [0] * (pattern.m - pattern.n)
    mask = torch.tensor([first, first[::-1]], dtype=torch.bool)
    bits = code_bits(pattern)
    codes = encode(mask, pattern)
    assert codes.tolist() == [row_of_codes([0], bits), row_of_codes([comb(pattern.m, pattern.n) - 1], bits)]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 11 * pattern.m, generator=generator)
    weight = apply_mask(weight, magnitude_mask(weight, pattern))
    packed = pack(weight, pattern)
    assert same_bits(unpack(packed["weight"], packed["weight_indices"], pattern), weight)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_round_trip_is_exact(data: st.DataObject) -> None:
    pattern = data.draw(st.sampled_from(PATTERNS))
    rows, groups = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 19))
    kind = data.draw(st.sampled_from([kind for kind, dtype in VALUE_DTYPES.items() if dtype.is_floating_point]))
    dtype = VALUE_DTYPES[kind]
    seed = data.draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor(data.draw(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=6)))
    picks = torch.randint(len(pool), (rows, groups * pattern.m), generator=generator)
    master = pool[picks]
    weight = apply_mask(master, magnitude_mask(master, pattern)).to(dtype)

    packed = pack(weight, pattern)
    values, codes = packed["weight"], packed["weight_indices"]
    assert (values.shape, codes.shape) == packed_shapes(rows, groups * pattern.m, pattern)
    assert values.dtype == dtype
    size = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
    assert size == packed_bytes(rows, groups * pattern.m, pattern, kind)
    check_tensors(values, codes, pattern, VALUE_TYPES[kind], (rows, groups * pattern.m))
    back = unpack(values, codes, pattern)
    assert same_bits(back, weight)
    again = pack(back, pattern)
    assert same_bits(again["weight"], values)
    assert torch.equal(again["weight_indices"], codes)


@settings(max_examples=100)
@given(st.data())
def test_round_trip_of_wide_patterns_is_exact(data: st.DataObject) -> None:
    m = data.draw(st.integers(17, 32))
    pattern = NMPattern(data.draw(st.integers(1, m - 1)), m)
    ranks = data.draw(st.lists(st.integers(0, comb(m, pattern.n) - 1), min_size=1, max_size=11))
    codes = torch.tensor([row_of_codes(ranks, code_bits(pattern))], dtype=torch.uint8)
    mask = decode(codes, pattern, len(ranks))
    assert encode(mask, pattern).tolist() == codes.tolist()
    weight = apply_mask(-torch.rand(mask.shape) - 1, pack_bits(mask))
    packed = pack(weight, pattern)
    assert packed["weight_indices"].tolist() == codes.tolist()
    assert same_bits(unpack(packed["weight"], codes, pattern), weight)


@settings(max_examples=200)
@given(st.data())
def test_bytes_are_those_of_a_slow_writer(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 10))
    pattern = NMPattern(data.draw(st.integers(1, m - 1)), m)
    sets = list(combinations(range(m), pattern.n))
    row: list[float] = []
    values: list[float] = []
    ranks: list[int] = []
    for _ in range(data.draw(st.integers(1, 11))):
        group = data.draw(st.lists(st.sampled_from([0.0, -0.0]), min_size=m, max_size=m))
        for place in data.draw(st.sampled_from(sets))[data.draw(st.integers(0, pattern.n)) :]:
            group[place] = data.draw(st.sampled_from([1.0, -1.0, 0.5, -3.0]))
        # Numbers first, then -0.0, then +0.0; sorting leaves the lower index in front.
        order = sorted(range(m), key=lambda i: (group[i] == 0, math.copysign(1.0, group[i]) > 0 and group[i] == 0))
        kept = tuple(sorted(order[: pattern.n]))
        row += group
        values += [group[place] for place in kept]
        ranks.append(sets.index(kept))
    packed = pack(torch.tensor([row]), pattern)
    assert struct.pack(f"{len(values)}f", *packed["weight"][0].tolist()) == struct.pack(f"{len(values)}f", *values)
    assert packed["weight_indices"].tolist() == [row_of_codes(ranks, code_bits(pattern))]


def test_gradients_reach_the_values() -> None:
    packed = pack(torch.tensor([[0.0, 5.0, 0.0, -2.0]]), TWO_OF_FOUR)
    values = packed["weight"].requires_grad_()
    (unpack(values, packed["weight_indices"], TWO_OF_FOUR) * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[2.0, 4.0]]


def test_writer_refuses_what_it_would_have_to_round() -> None:
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"^pack: fc1.weight has 2 groups with more than 2 non-zero weights"):
        pack(weight, TWO_OF_FOUR, "fc1.weight")
    with pytest.raises(ValueError, match=r"fc1\.weight holds NaN or infinity"):
        pack(torch.tensor([[float("inf"), 0.0, 0.0, 0.0]]), TWO_OF_FOUR, "fc1.weight")
    with pytest.raises(ValueError, match="must be a matrix in fp32, fp16, bf16 or int8"):
        pack(torch.zeros(4, 4, dtype=torch.float64), TWO_OF_FOUR)
    with pytest.raises(ValueError, match="in_features 6 is not a multiple of 4"):
        pack(torch.zeros(4, 6), TWO_OF_FOUR)
    with pytest.raises(ValueError, match="keeps exactly 2"):
        encode(torch.tensor([[True, False, False, False]]), TWO_OF_FOUR)


def test_unpack_never_reads_beyond_its_input() -> None:
    values, codes = torch.ones(1, 4), torch.tensor([[0o00]], dtype=torch.uint8)
    for code in (6, 7):
        with pytest.raises(ValueError, match=f"code {code} is out of range; 2:4 has the codes 0 to 5"):
            unpack(values, codes + (code << 3), TWO_OF_FOUR)
    with pytest.raises(ValueError, match="need uint8 codes of 1 bytes a row"):
        unpack(values, torch.zeros(1, 2, dtype=torch.uint8), TWO_OF_FOUR)
    with pytest.raises(ValueError, match="need uint8 codes"):
        unpack(values, codes.to(torch.int8), TWO_OF_FOUR)
    with pytest.raises(ValueError, match="multiple of 2 columns"):
        unpack(torch.ones(1, 3), codes, TWO_OF_FOUR)
    with pytest.raises(ValueError, match="2 rows of values and 1 rows of codes"):
        unpack(torch.ones(2, 4), codes, TWO_OF_FOUR)


def test_int8_by_hand() -> None:
    weight = torch.tensor([[0, 5, 0, -2, 127, 0, -127, 0], [0, 0, 0, 7, 0, 0, 0, 0]], dtype=torch.int8)
    packed = pack(weight, TWO_OF_FOUR)
    assert packed["weight"].dtype == torch.int8
    assert packed["weight"].tolist() == [[5, -2, 127, -127], [0, 7, 0, 0]]
    assert packed["weight_indices"].tolist() == [[4 | 1 << 3], [2 | 0 << 3]]
    assert torch.equal(unpack(packed["weight"], packed["weight_indices"], TWO_OF_FOUR), weight)
    check_tensors(packed["weight"], packed["weight_indices"], TWO_OF_FOUR, "I8", (2, 8), scale=torch.ones(2))
    assert packed_bytes(2, 8, TWO_OF_FOUR, "int8") == 2 * (4 + 1)


@settings(max_examples=100)
@given(st.data())
def test_round_trip_of_int8_is_exact(data: st.DataObject) -> None:
    pattern = data.draw(st.sampled_from(PATTERNS))
    rows, groups = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 19))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    master = torch.randint(-127, 128, (rows, groups * pattern.m), generator=generator).float()
    weight = apply_mask(master, magnitude_mask(master, pattern)).to(torch.int8)
    packed = pack(weight, pattern)
    assert torch.equal(unpack(packed["weight"], packed["weight_indices"], pattern), weight)
    check_tensors(
        packed["weight"],
        packed["weight_indices"],
        pattern,
        "I8",
        (rows, groups * pattern.m),
        scale=torch.rand(rows) + 0.5,
    )
