"""Padding rows that are zero stay zero, whatever steps the model; every other weight trains as if they were no part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import T5Config, T5ForConditionalGeneration

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.padding import ZeroPadding, padding_rows
from hf_nmsparse.sharding import local
from hf_nmsparse.sparse_model import sparsify
from tests.tiny import bart, hf, marian, t5

PAD = 5

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd up": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9, maximize=True, foreach=True),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw fused": lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1, fused=True),
    "adafactor": lambda weights: torch.optim.Adafactor(weights, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.1),
    "adadelta": lambda weights: torch.optim.Adadelta(weights, lr=1.0),
    "nadam": lambda weights: torch.optim.NAdam(weights, lr=0.1),
    "radam": lambda weights: torch.optim.RAdam(weights, lr=0.1),
    "adamax": lambda weights: torch.optim.Adamax(weights, lr=0.1),
    "rprop": lambda weights: torch.optim.Rprop(weights, lr=0.1),
    "asgd": lambda weights: torch.optim.ASGD(weights, lr=0.1),
}


class Tied(nn.Module):
    """An embedding that is the output projection too, and a layer between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8, padding_idx=PAD)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(self.embed(tokens))))
        return logits


def backward(model: nn.Module) -> None:
    tokens = torch.randint(0, 6, (16,))
    nn.functional.cross_entropy(model(tokens), tokens.roll(1) % PAD).backward()


def trained(model: Tied, make: Callable[[Any], torch.optim.Optimizer], by_hand: bool, clip: float) -> dict[str, Tensor]:
    """Ten steps; by hand, with the row's gradient set to zero before it is clipped."""
    optimizer = make(model.parameters())
    if not by_hand:
        ZeroPadding(model, optimizer)
    torch.manual_seed(1)
    for _ in range(10):
        optimizer.zero_grad()
        for _ in range(2):
            backward(model)
        if by_hand:
            assert model.embed.weight.grad is not None
            model.embed.weight.grad[PAD] = 0
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_row_stays_zero_and_the_rest_trains_as_without_its_gradient(optimizer: str) -> None:
    start = Tied()
    found, by_hand = (
        trained(copy.deepcopy(start), OPTIMIZERS[optimizer], by_hand, clip=0.05) for by_hand in (False, True)
    )
    assert torch.equal(found["embed.weight"][PAD], torch.zeros(8))
    assert all(torch.equal(found[name], by_hand[name]) for name in by_hand)
    assert not any(torch.equal(found[name], value) for name, value in start.state_dict().items())


@pytest.mark.parametrize("number", [1e-30, float("nan")])
def test_a_row_that_is_not_zero_trains_as_ever(number: float) -> None:
    plain, watched = Tied(), Tied()
    watched.load_state_dict(plain.state_dict())
    weights = []
    for model in (plain, watched):
        with torch.no_grad():
            model.embed.weight[PAD, 3] = number
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        if model is watched:
            ZeroPadding(model, optimizer)
        torch.manual_seed(1)
        backward(model)
        assert model.embed.weight.grad is not None
        assert bool(model.embed.weight.grad[PAD].any())
        optimizer.step()
        weights.append(model.embed.weight.detach())
    assert torch.equal(weights[0].nan_to_num(7), weights[1].nan_to_num(7))


def test_momentum_of_earlier_steps_does_not_move_the_row() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    with torch.no_grad():
        model.embed.weight[PAD] = 0
    ZeroPadding(model, optimizer)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert not model.embed.weight[PAD].any()


def test_embeddings_that_are_frozen_or_replaced_later() -> None:
    model = Tied()
    model.embed.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    padding = ZeroPadding(model, optimizer)
    backward(model)
    optimizer.step()
    model.embed.weight.requires_grad_(True)
    backward(model)
    optimizer.step()
    assert not model.embed.weight[PAD].any()
    model.embed.weight = model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    padding.attach()
    backward(model)
    assert model.embed.weight.grad is not None
    assert not model.embed.weight.grad[PAD].any()
    assert model.embed.weight.grad.any()


def test_remove_takes_the_hooks_off() -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ZeroPadding(model, optimizer).remove()
    backward(model)
    optimizer.step()
    assert model.embed.weight[PAD].any()


def test_a_sparse_gradient_has_no_row_for_padding() -> None:
    model = nn.Sequential(nn.Embedding(6, 8, padding_idx=PAD, sparse=True), nn.Linear(8, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ZeroPadding(model, optimizer)
    backward(model)
    optimizer.step()
    weight = model.get_parameter("0.weight")
    assert not weight[PAD].any()
    assert weight[:PAD].any()


def test_a_loss_scaler_that_skips_a_step_changes_nothing() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    ZeroPadding(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for spoiled in (PAD, 0):
        before = model.embed.weight.detach().clone()
        tokens = torch.arange(6)
        scaler.scale(nn.functional.cross_entropy(model(tokens), tokens)).backward()
        assert model.embed.weight.grad is not None
        if spoiled != PAD:
            model.embed.weight.grad[spoiled, 0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.embed.weight) == (spoiled != PAD)
        assert not model.embed.weight[PAD].any()


def test_sparse_step_keeps_the_row_of_a_marian_model() -> None:
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = SparseStep(model, optimizer, "sr-ste")
    tokens = torch.tensor([[5, 6, 7, 1]])
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert not model.model.shared.weight[0].any()
    step.remove()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert model.model.shared.weight[0].any()


def test_which_rows_are_padding() -> None:
    tied = Tied()
    assert padding_rows(tied) == [(tied.embed, PAD)]
    assert padding_rows(nn.Linear(8, 8)) == []
    # T5 gives its embedding no padding_idx; the row is named by the configuration.
    model = T5ForConditionalGeneration(T5Config(**t5(60, d_model=16, layers=1)))
    assert padding_rows(model) == [(model.shared, 0)]
    model.config.pad_token_id = 60
    assert padding_rows(model) == []
    apart = hf.MarianMTModel(hf.MarianConfig(**bart(60, d_model=16, layers=1), share_encoder_decoder_embeddings=False))
    held = {module.weight.data_ptr() for module, _ in padding_rows(apart)}
    assert held == {
        apart.model.encoder.embed_tokens.weight.data_ptr(),
        apart.model.decoder.embed_tokens.weight.data_ptr(),
    }
    no_input = nn.Linear(8, 8)
    no_input.config = apart.config

    def none() -> nn.Module:
        raise NotImplementedError

    no_input.get_input_embeddings = none  # type: ignore[assignment]
    assert padding_rows(no_input) == []


@pytest.mark.parametrize("early", [False, True])
def test_a_sharded_row_stays_zero(tmp_path: Path, early: bool) -> None:
    """FSDP2 swaps the weights, before the optimizer is there or, as accelerate does it, after."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Tied()
        plain = copy.deepcopy(model)
        if early:
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        padding = ZeroPadding(model, optimizer)
        if not early:
            fully_shard(model)
            optimizer.param_groups[0]["params"] = list(model.parameters())
            padding.attach()
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            assert not local(model.embed.weight)[PAD].any()
        reference = torch.optim.AdamW(plain.parameters(), lr=0.1)
        ZeroPadding(plain, reference)
        torch.manual_seed(1)
        for _ in range(3):
            reference.zero_grad()
            backward(plain)
            nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
            reference.step()
        torch.testing.assert_close(local(model.embed.weight), plain.embed.weight.detach(), rtol=0, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()
