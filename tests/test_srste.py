"""Each method against its update written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.sparsify import sparsify
from hf_nmsparse.srste import METHODS, straight_through

WEIGHT = [[4.0, -1.0, 2.0, -3.0], [0.5, 1.0, -1.0, 0.25]]
MASK = [[True, False, False, True], [False, True, True, False]]
INPUT = [1.0, 2.0, 4.0, 8.0]
# The loss of `layer` is the sum of its outputs, so that both rows have the input as their gradient.
LR, DECAY = 0.5, 0.25


def layer() -> NMLinear:
    linear = nn.Linear(4, 2, bias=False)
    linear.weight = nn.Parameter(torch.tensor(WEIGHT))
    sparsify(linear, NMSparseConfig("2:4"))
    assert isinstance(linear, NMLinear)
    return linear


def step_once(method: str, decay: float | None) -> Tensor:
    linear = layer()
    optimizer = torch.optim.SGD(linear.parameters(), lr=LR)
    SparseStep(linear, optimizer, method, decay)
    linear(torch.tensor(INPUT)).sum().backward()
    optimizer.step()
    return linear.weight.detach()


def test_the_forward_uses_the_masked_weight() -> None:
    assert layer()(torch.tensor(INPUT)).tolist() == [4 * 1 - 3 * 8, 1 * 2 - 1 * 4]


def test_straight_through_passes_the_dense_gradient() -> None:
    weight = torch.tensor(WEIGHT, requires_grad=True)
    masked = straight_through(weight, torch.tensor(MASK))
    assert masked.tolist() == [[4, 0, 0, -3], [0, 1, -1, 0]]
    gradient = torch.arange(8.0).reshape(2, 4)
    masked.backward(gradient)
    assert weight.grad is not None
    assert torch.equal(weight.grad, gradient)


def test_straight_through_is_differentiable_twice() -> None:
    weight = torch.tensor(WEIGHT, requires_grad=True)
    masked = straight_through(weight, torch.tensor(MASK))
    (gradient,) = torch.autograd.grad((masked**2).sum(), weight, create_graph=True)
    assert gradient.tolist() == [[8, 0, 0, -6], [0, 2, -2, 0]]
    (second,) = torch.autograd.grad(gradient.sum(), weight)
    assert second.tolist() == [[2] * 4, [2] * 4]


def test_ste() -> None:
    # W - 0.5 * g
    assert step_once("ste", None).tolist() == [[3.5, -2.0, 0.0, -7.0], [0.0, 0.0, -3.0, -3.75]]


def test_sr_ste() -> None:
    # W - 0.5 * (g + 0.25 * (1 - m) * W): the pruned -1, 2 and 0.5, 0.25 lose 0.125 of themselves beside
    assert step_once("sr-ste", DECAY).tolist() == [[3.5, -1.875, -0.25, -7.0], [-0.0625, 0.0, -3.0, -3.78125]]


def test_sr_ste_is_the_formula() -> None:
    weight, mask, gradient = torch.tensor(WEIGHT), torch.tensor(MASK).float(), torch.tensor([INPUT, INPUT])
    assert torch.equal(step_once("sr-ste", DECAY), weight - LR * (gradient + DECAY * (1 - mask) * weight))


def test_sr_ste_decoupled_is_the_same_under_sgd() -> None:
    assert torch.equal(step_once("sr-ste-decoupled", DECAY), step_once("sr-ste", DECAY))


def test_asp() -> None:
    # The mask is applied to the weight, then to its gradient.
    assert step_once("asp", None).tolist() == [[3.5, 0.0, 0.0, -7.0], [0.0, 0.0, -3.0, 0.0]]


def test_decay_zero_is_ste() -> None:
    assert torch.equal(step_once("sr-ste", 0.0), step_once("ste", None))
    assert not torch.equal(step_once("sr-ste", None), step_once("ste", None))


@pytest.mark.parametrize(("method", "decay"), [("sr-ste", 2e-4), ("sr-ste-decoupled", 0.4)])
def test_the_default_decay(method: str, decay: float) -> None:
    assert METHODS[method].default_decay == decay
    assert torch.equal(step_once(method, None), step_once(method, decay))


def test_asp_gives_pruned_weights_no_gradient_even_where_it_is_infinite() -> None:
    gradient = torch.tensor([[1.0, math.inf, -math.inf, 2.0]])
    METHODS["asp"].rule(torch.zeros(1, 4), gradient, torch.tensor([MASK[0]]), LR, 0.0)
    assert gradient.tolist() == [[1.0, 0.0, 0.0, 2.0]]


def test_the_methods_cannot_be_edited() -> None:
    assert list(METHODS) == ["ste", "sr-ste", "sr-ste-decoupled", "asp"]
    with pytest.raises(TypeError):
        METHODS["new"] = METHODS["ste"]  # type: ignore[index]


class Problem:
    """A linear regression in double precision whose masks change; its gradient is written out."""

    def __init__(self) -> None:
        self.start = torch.randn(4, 8, dtype=torch.float64)
        self.input = torch.randn(16, 8, dtype=torch.float64)
        self.target = torch.randn(16, 4, dtype=torch.float64)

    def gradient(self, weight: Tensor) -> Tensor:
        """Of half the squared error over the batch, at the masked weight."""
        masked = apply_mask(weight, magnitude_mask(weight, NMPattern(2, 4)))
        return (self.input @ masked.t() - self.target).t() @ self.input / 16

    def train(self, optimizer_class: type[torch.optim.Optimizer], method: str, **options: float) -> Tensor:
        linear = nn.Linear(8, 4, bias=False, dtype=torch.float64)
        linear.weight = nn.Parameter(self.start.clone())
        sparsify(linear, NMSparseConfig("2:4"))
        optimizer = optimizer_class(linear.parameters(), **options)  # type: ignore[arg-type]
        SparseStep(linear, optimizer, method, DECAY)
        for _ in range(10):
            optimizer.zero_grad()
            (0.5 * (linear(self.input) - self.target) ** 2).sum().div(16).backward()
            optimizer.step()
        assert not torch.equal(magnitude_mask(linear.weight, NMPattern(2, 4)), self.mask(self.start))
        return linear.weight.detach()

    @staticmethod
    def mask(weight: Tensor) -> Tensor:
        return magnitude_mask(weight, NMPattern(2, 4))


def test_the_coupled_term_runs_through_momentum() -> None:
    problem = Problem()
    weight, momentum = problem.start.clone(), torch.zeros(4, 8, dtype=torch.float64)
    for _ in range(10):
        gradient = problem.gradient(weight) + DECAY * torch.where(problem.mask(weight), 0.0, weight)
        momentum = 0.9 * momentum + gradient
        weight = weight - 0.1 * momentum
    trained = problem.train(torch.optim.SGD, "sr-ste", lr=0.1, momentum=0.9)
    torch.testing.assert_close(trained, weight, rtol=1e-12, atol=1e-12)


def adam_by_hand(problem: Problem, coupled: bool, lr: float, weight_decay: float) -> Tensor:
    weight = problem.start.clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 11):
        pruned = torch.where(problem.mask(weight), 0.0, weight)
        gradient = problem.gradient(weight)
        if coupled:
            gradient = gradient + DECAY * pruned
        else:
            weight = weight - lr * DECAY * pruned
        weight = weight * (1 - lr * weight_decay)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weight = weight - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


@pytest.mark.parametrize(("method", "coupled"), [("sr-ste", True), ("sr-ste-decoupled", False)])
def test_the_term_in_adam(method: str, coupled: bool) -> None:
    problem = Problem()
    trained = problem.train(torch.optim.AdamW, method, lr=0.1, weight_decay=0.01)
    by_hand = adam_by_hand(problem, coupled, lr=0.1, weight_decay=0.01)
    torch.testing.assert_close(trained, by_hand, rtol=1e-12, atol=1e-12)
    other = adam_by_hand(problem, not coupled, lr=0.1, weight_decay=0.01)
    assert (trained - other).abs().max() > 1e-3
