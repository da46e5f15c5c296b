"""Losses: by hand, and the smoothed cross-entropy against torch's own."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, M2M100Config, M2M100ForConditionalGeneration

from hf_nmsparse import losses
from hf_nmsparse.losses import decoder_inputs, distillation_loss, smoothed_cross_entropy, token_loss


def torchs(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=smoothing)


def case(rows: int = 13, vocabulary: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::4] = -100
    return (3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype).requires_grad_(), labels


def test_token_loss_by_hand() -> None:
    logits = torch.zeros(1, 3, 4)
    labels = torch.tensor([[1, 2, -100]])
    log4 = torch.log(torch.tensor(4.0)).item()
    assert token_loss({"logits": logits}, labels).item() == pytest.approx(log4)
    assert token_loss({"logits": logits}, labels, num_items_in_batch=8).item() == pytest.approx(log4 / 4)


def test_smoothing_by_hand() -> None:
    # ln(1 + 3) - (0.8 * ln 3 + 0.2 * (ln 1 + ln 3) / 2); probabilities 1/4 and 3/4 against 0.1 and 0.9
    logits = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
    loss = smoothed_cross_entropy(logits, torch.tensor([1]), 0.2)
    assert loss.item() == pytest.approx(math.log(4) - 0.9 * math.log(3))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [pytest.approx([0.25 - 0.1, 0.75 - 0.9])]


@pytest.mark.parametrize("block", [1, 20, 10**6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_cross_entropy_is_torchs(smoothing: float, block: int) -> None:
    (ours, labels), (theirs, _) = case(), case()
    with mock.patch.object(losses, "_CPU_BLOCK", block):
        loss = smoothed_cross_entropy(ours, labels, smoothing)
        (loss / 5).backward()
    expected = torchs(theirs, labels, smoothing)
    (expected / 5).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_loss() -> None:
    logits, labels = case(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda given: smoothed_cross_entropy(given, labels, 0.1), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_widened(dtype: torch.dtype) -> None:
    ours, labels = case(dtype=dtype)
    theirs = ours.detach().clone().requires_grad_()
    loss, expected = smoothed_cross_entropy(ours, labels, 0.1), torchs(theirs.float(), labels, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    assert ours.grad is not None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_word_may_be_ruled_out() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf], [-math.inf, 0.0, 0.0]], requires_grad=True)
    loss = smoothed_cross_entropy(logits, torch.tensor([1, -100]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]


def test_no_target_at_all_is_no_loss() -> None:
    logits, _ = case()
    loss = smoothed_cross_entropy(logits, torch.full((13,), -100), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_distillation_loss_by_hand() -> None:
    labels = torch.tensor([[1, 0, -100]])
    same = torch.randn(1, 3, 2)
    assert distillation_loss({"logits": same}, same, labels).item() == pytest.approx(0, abs=1e-7)
    student, teacher = torch.zeros(1, 3, 2), torch.tensor([[[math.log(3.0), 0.0]] * 3])
    # KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln(3/2) + 1/4 ln(1/2), for two tokens
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found: list[Any] = [distillation_loss({"logits": student}, teacher, labels, *items) for items in ((), (8,))]
    assert found[0].item() == pytest.approx(expected)
    assert found[1].item() == pytest.approx(expected / 4)


@pytest.mark.parametrize("block", [1, 20, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss_is_torchs(temperature: float, block: int) -> None:
    (ours, labels), (theirs, _) = case(), case()
    teacher = torch.randn(13, 7, generator=torch.Generator().manual_seed(1))
    with mock.patch.object(losses, "_CPU_BLOCK", block):
        loss = distillation_loss({"logits": ours[None]}, teacher[None], labels[None], 5, temperature)
        loss.backward()
    student, target = (F.log_softmax(logits[labels != -100] / temperature, dim=1) for logits in (theirs, teacher))
    expected = F.kl_div(student, target, reduction="sum", log_target=True) * temperature**2 / 5
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_distillation_is_that_of_the_loss() -> None:
    logits, labels = case(dtype=torch.float64)
    teacher = torch.randn(13, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def of(given: Tensor) -> Tensor:
        return distillation_loss({"logits": given[None]}, teacher[None], labels[None], 3, 2.0)

    assert torch.autograd.gradcheck(of, logits)


def test_decoder_inputs_are_the_models_own() -> None:
    settings: dict[str, Any] = {
        "vocab_size": 30,
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
    }
    labels = torch.tensor([[5, 6, 2], [7, 2, -100]])
    expected = torch.tensor([[2, 5, 6], [2, 7, 2]])
    m2m = M2M100ForConditionalGeneration(M2M100Config(**settings))
    assert not hasattr(m2m, "prepare_decoder_input_ids_from_labels")
    for model in (m2m, BartForConditionalGeneration(BartConfig(**settings))):
        assert torch.equal(decoder_inputs(model, labels), expected)
        model.eval()
        with torch.no_grad():
            by_model = model(input_ids=labels.clamp(min=1), labels=labels).logits
            by_us = model(input_ids=labels.clamp(min=1), decoder_input_ids=decoder_inputs(model, labels)).logits
        assert torch.equal(by_model, by_us)
