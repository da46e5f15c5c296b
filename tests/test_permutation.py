"""The order of input channels: what it gains, and that the model stays the same."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.permutation import best_order, kept_magnitude, permute_channels
from hf_nmsparse.sparse_model import select_layers, sparsify
from tests.tiny import bart, hf, marian, t5

TWO_OF_FOUR = NMPattern(2, 4)
BART, T5 = bart(40, d_model=32, layers=1), t5(40, d_model=32, layers=1)


def test_an_order_by_hand() -> None:
    """All that is large stands in one group: two of it change places with two of the other."""
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    order = best_order(weight, TWO_OF_FOUR)
    assert (kept_magnitude(weight, TWO_OF_FOUR), kept_magnitude(weight[:, order], TWO_OF_FOUR)) == (7, 10)
    assert sorted(order.tolist()) == list(range(8))


def test_nothing_to_gain() -> None:
    for weight in (torch.ones(3, 8), torch.zeros(3, 8), torch.tensor([[1.0, 2, 0, 0, 1, 2, 0, 0]])):
        assert torch.equal(best_order(weight, TWO_OF_FOUR), torch.arange(8))
    assert torch.equal(best_order(torch.rand(3, 4), TWO_OF_FOUR), torch.arange(4))  # one group


@given(st.sampled_from(["1:2", "2:4", "3:4", "2:8", "4:8"]), st.integers(0, 1000))
def test_an_order_never_loses(text: str, seed: int) -> None:
    pattern, generator = NMPattern.parse(text), torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 32, generator=generator) * torch.rand(32, generator=generator).exp()
    order = best_order(weight, pattern)
    assert sorted(order.tolist()) == list(range(32))
    assert kept_magnitude(weight[:, order], pattern) >= kept_magnitude(weight, pattern)


def test_the_best_of_all_orders_is_near() -> None:
    weight = torch.randn(2, 6).square()
    pattern = NMPattern(1, 3)
    best = max(kept_magnitude(weight[:, list(order)], pattern) for order in permutations(range(6)))
    assert kept_magnitude(weight[:, best_order(weight, pattern)], pattern) >= 0.97 * best


FAMILIES: dict[str, Any] = {
    "marian": lambda: marian(init_std=0.5),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**BART)),
    "m2m_100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**BART)),
    "pegasus": lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**BART)),
    "fsmt": lambda: hf.FSMTForConditionalGeneration(
        hf.FSMTConfig(langs=["en", "de"], src_vocab_size=40, tgt_vocab_size=40, **BART)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5 gated": lambda: hf.T5ForConditionalGeneration(hf.T5Config(feed_forward_proj="gated-gelu", **T5)),
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)),
    "umt5": lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_stays_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    given: dict[str, Any] = {"input_ids": torch.tensor([[5, 6, 7, 2]]), "decoder_input_ids": torch.tensor([[8, 9, 2]])}
    chosen, _ = select_layers(model, NMSparseConfig("2:4"))
    with torch.no_grad():
        before = model(**given).logits
        kept = {layer: kept_magnitude(one.weight, TWO_OF_FOUR) for layer, one in chosen.items()}
        done = permute_channels(model, chosen, TWO_OF_FOUR)
        after = model(**given).logits
    layers = len([layer for layer in chosen if layer.rpartition(".")[2] in ("fc2", "out_proj", "wo", "o")])
    assert len(done) == layers > 0
    assert all(kept_magnitude(chosen[layer].weight, TWO_OF_FOUR) > kept[layer] for layer in done)
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_channels_stay_in_their_head() -> None:
    """And where a group would reach into the next head, they stay where they are."""
    model = marian()
    attention = model.model.encoder.layers[0].self_attn
    before = attention.v_proj.weight.clone()
    chosen, _ = select_layers(model, NMSparseConfig("2:4"))
    permute_channels(model, chosen, TWO_OF_FOUR)
    for head in (slice(0, 16), slice(16, 32)):
        rows = {tuple(row) for row in before[head].tolist()}
        assert rows == {tuple(row) for row in attention.v_proj.weight[head].tolist()}
    assert not torch.equal(before, attention.v_proj.weight)
    done = permute_channels(model, chosen, NMPattern(2, 32))
    assert all(name.endswith("fc2") for name in done)


def test_what_is_shared_or_no_target_stays() -> None:
    model = marian()
    layer = model.model.encoder.layers[0]
    layer.fc1.weight = model.model.encoder.layers[1].fc1.weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparsify(model, NMSparseConfig("2:4", targets=["encoder.*.fc2"]), permute=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_unknown_model_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"permute: knows the models bart, .*umt5, got None; leave it out"):
        sparsify(nn.Sequential(nn.Linear(8, 8)), NMSparseConfig("2:4"), permute=True)
