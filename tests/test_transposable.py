"""Masks that are 2:4 along rows and columns, from a weight to a packed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_nmsparse import NMSparseConfig, SparseStep, finalize, save_packed, sparsify
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.loading import load_seq2seq
from hf_nmsparse.masks import count_flips, transposable_mask, unpack_bits, update_mask
from hf_nmsparse.pattern import NMPattern
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
    whole = transposable_mask(weight)
    monkeypatch.setattr("hf_nmsparse.masks._BLOCKS", 3)
    assert torch.equal(transposable_mask(weight), whole)
    assert torch.equal(transposable_mask(weight.double()), whole)


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
