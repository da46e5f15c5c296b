"""Masks that are 2:4 along rows and columns, from a weight to a packed model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_nmsparse import NMSparseConfig, SparseStep, finalize, save_packed, sparsify
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.loading import load_seq2seq
from hf_nmsparse.masks import count_flips, transposable_mask, unpack_bits, update_mask
from hf_nmsparse.pattern import TRANSPOSABLE, TWO_ROWS, NMPattern
from hf_nmsparse.srste import METHODS
from tests.tiny import marian

PATTERN = NMPattern(2, 4)


def kept(weight: Tensor) -> list[list[int]]:
    return unpack_bits(transposable_mask(weight), weight.shape).int().tolist()


def is_transposable(mask: Tensor) -> bool:
    rows, columns = mask.shape
    blocks = mask.reshape(rows // 4, 4, columns // 4, 4)
    return bool((blocks.sum(dim=1) == 2).all() and (blocks.sum(dim=3) == 2).all())


def test_masks_by_hand() -> None:
    """Row by row the two largest would fill the first two columns; of the two diagonal halves the larger sum stays."""
    half = [[9.0, -8, 1, 2], [-9, 8, 2, 1], [7, 6, -5, 4], [6, 7, 4, -5]]
    assert kept(torch.tensor(half)) == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    # 10 + 1 + 10 + 1 beats 9 + 9: taking the largest ones first, 10, 10, 9 and 9, ends there too.
    crossed = [[10.0, 0, 9, 0], [0, 10, 0, 9], [9, 0, 10, 0], [0, 9, 0, 10]]
    assert kept(torch.tensor(crossed)) == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    # Greedy takes 5 and is left with 0s in that row and column; the best sum goes without it.
    greedy = [[5.0, 4, 4, 0], [4, 0, 0, 4], [4, 0, 0, 4], [0, 4, 4, 0]]
    assert kept(torch.tensor(greedy)) == [[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]


def test_ties_and_infinity() -> None:
    first = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert kept(torch.ones(4, 4)) == first
    assert kept(torch.zeros(4, 4)) == first
    weight = torch.zeros(4, 4)
    weight[0, 3] = -torch.inf
    assert kept(weight)[0] == [1, 0, 0, 1]


def best_pattern(block: list[list[float]]) -> int:
    """The definition: of the sums of all patterns, rounded to fp64 as the rule says, the largest; ties to the first.

    Of lower rows whose sums differ by less than the rounding of all four the larger goes first.
    """
    finite = [[min(abs(number), 3.4028234663852886e38) for number in row] for row in block]

    def total(row: int, code: int) -> float:
        return sum(number for column, number in enumerate(finite[row]) if code >> 4 * row + column & 1)

    def key(code: int) -> tuple[float, int, float, int]:
        upper, lower = total(0, code) + total(1, code), total(2, code) + total(3, code)
        place = TRANSPOSABLE.index(code)
        return -(upper + lower), TWO_ROWS.index(code & 255), -lower, place

    return min(TRANSPOSABLE, key=key)


def rows_of(code: int) -> list[list[int]]:
    return [[code >> 4 * row + column & 1 for column in range(4)] for row in range(4)]


def blocks_of(weight: Tensor) -> Iterator[list[list[float]]]:
    for row in range(0, len(weight), 4):
        for column in range(0, weight.shape[1], 4):
            yield weight[row : row + 4, column : column + 4].tolist()


NUMBERS = [0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, 1e8, -3e38, 1e30, torch.inf, -torch.inf]


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Of few numbers, so that ties and sums that are rounded meet, or of many; either sign, any multiples of 4."""
    rows, columns = draw(st.sampled_from([(4, 4), (4, 12), (8, 8), (12, 4), (4, 72), (8, 132)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pool = torch.tensor(draw(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=5)))
    few = pool[torch.randint(0, len(pool), (rows, columns), generator=generator)]
    many = torch.randn(rows, columns, generator=generator)
    return torch.where(
        torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0])), many, few
    )


@settings(max_examples=60, deadline=None)
@given(weights(), st.randoms(use_true_random=False))
def test_masks_are_those_of_the_definition(weight: Tensor, random: Any) -> None:
    """In the native library, which takes fp32 alone, and in torch; with flips and the old mask's bits renewed."""
    before = torch.tensor([random.randrange(256) for _ in range(weight.numel() // 8)], dtype=torch.uint8)
    for same in (weight, weight.double()):
        mask = before.clone()
        flips = update_mask(mask, same, PATTERN, transposable=True)
        booleans = unpack_bits(mask, weight.shape).int()
        assert [*blocks_of(booleans)] == [rows_of(best_pattern(block)) for block in blocks_of(weight)]
        assert flips == count_flips(before, mask)
        assert update_mask(mask, same, PATTERN, transposable=True) == 0


def test_sums_are_rounded_by_the_rule() -> None:
    """1e30 swallows the lower rows in fp64: of equal sums the upper rows are the first, the lower rows the largest."""
    weight = torch.zeros(4, 4)
    weight[0, 0] = 1e30
    weight[2:] = torch.tensor([[0.0, 1, 2, 2], [0, 1, 0, 0]])
    for same in (weight, weight.double()):
        assert kept(same) == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    weight[1, 1:3] = 1e30
    for same in (weight, weight.double()):  # of the two that fit below, the first has the smaller sum
        assert kept(same) == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]


@pytest.mark.parametrize("place", [0, 5, 67, 4 * 68 - 1])
def test_nan_is_refused_wherever_it_is(place: int) -> None:
    weight = torch.ones(8, 68)
    weight[0, 1] = torch.inf
    weight.view(-1)[place] = torch.nan
    for same in (weight, weight.double(), weight.bfloat16()):
        with pytest.raises(ValueError, match=r"a weight of shape \[8, 68\] holds NaN, which has no rank"):
            transposable_mask(same)


def test_no_pattern_keeps_more() -> None:
    """Of 90 patterns, counted here by another way: rows of two whose columns hold two as well."""
    codes = torch.arange(2**16)
    blocks = (codes[:, None] >> torch.arange(16) & 1).reshape(-1, 4, 4)
    patterns = blocks[((blocks.sum(dim=1) == 2) & (blocks.sum(dim=2) == 2)).all(dim=1)].double()
    assert len(patterns) == 90
    weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    mask = unpack_bits(transposable_mask(weight), weight.shape)
    assert is_transposable(mask)
    tiles = weight.abs().double().reshape(8, 4, 6, 4).transpose(1, 2).reshape(-1, 4, 4)
    sums = (mask * weight.abs().double()).reshape(8, 4, 6, 4).sum(dim=(1, 3)).flatten()
    assert torch.allclose(sums, torch.einsum("bij,pij->bp", tiles, patterns).amax(dim=1))
    assert torch.equal(unpack_bits(transposable_mask(weight.t()), weight.t().shape), mask.t())


def test_more_blocks_than_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))
    whole = transposable_mask(weight.double())
    monkeypatch.setattr("hf_nmsparse.masks._BLOCKS", 3)
    assert torch.equal(transposable_mask(weight.double()), whole)
    assert torch.equal(transposable_mask(weight.double().t().contiguous().t()), whole)


def test_flips() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    before = transposable_mask(weight)
    mask, after = before.clone(), transposable_mask(-weight.flip(0))
    assert update_mask(mask, weight.flip(0), PATTERN, transposable=True) == count_flips(before, after) > 0
    assert torch.equal(mask, after)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"transposable 2:4 needs a matrix of multiples of 4, got \[6, 8\]"):
        transposable_mask(torch.ones(6, 8))
    with pytest.raises(ValueError, match="holds NaN, which has no rank"):
        transposable_mask(torch.full((4, 4), torch.nan))
    configs: list[dict[str, Any]] = [{"pattern": "1:4"}, {"soft": True}, {"convolutions": True}]
    for config in configs:
        with pytest.raises(ValueError, match="config: transposable masks are 2:4 masks of linear layers"):
            NMSparseConfig(**{"pattern": "2:4", **config}, transposable=True)
    with pytest.raises(ValueError, match="sparsify: calibration and permute choose masks along rows alone"):
        sparsify(marian(), NMSparseConfig("2:4", transposable=True), permute=True)
    odd = nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 4))
    assert sparsify(odd, NMSparseConfig("2:4", transposable=True)) == {"0": "out_features 6 is not a multiple of 4"}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.soft])
def test_masks_stay_transposable_in_training(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    sparsify(model, NMSparseConfig("2:4", transposable=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = SparseStep(model, optimizer, method, steps=6)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()
    changed = step.take_flips()["0"].sad > 0
    assert changed != METHODS[method].fixed_mask
    for layer in (model[0], model[2]):
        assert isinstance(layer, NMLinear)
        assert is_transposable(unpack_bits(layer.current_mask(), layer.weight.shape))
    finalize(model)
    for layer in (model[0], model[2]):
        kept = layer.get_parameter("weight").detach().ne(0)
        blocks = kept.reshape(len(kept) // 4, 4, -1, 4)
        assert blocks.sum(dim=1).max() == blocks.sum(dim=3).max() == 2


def test_a_packed_model_is_the_masked_one(tmp_path: Path) -> None:
    """And a checkpoint of the training remembers what its masks are."""
    model = marian()
    sparsify(model, NMSparseConfig("2:4", transposable=True))
    model.save_pretrained(tmp_path / "checkpoint")
    save_packed(model, tmp_path / "packed")
    again, packed = load_seq2seq(str(tmp_path / "checkpoint")), load_seq2seq(str(tmp_path / "packed"))
    layer = again.get_submodule("model.encoder.layers.0.fc1")
    assert isinstance(layer, NMLinear)
    assert layer.transposable
    tokens = torch.tensor([[5, 6, 7, 8]])
    expected, found = (
        loaded.eval()(input_ids=tokens, decoder_input_ids=tokens).logits.detach() for loaded in (model, packed)
    )
    assert torch.allclose(expected, found, atol=1e-5)
    finalize(model)
    weight = model.get_submodule("model.encoder.layers.0.fc1").get_parameter("weight")
    assert is_transposable(weight.detach().ne(0))
