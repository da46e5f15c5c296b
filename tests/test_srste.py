"""Each method against its update written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.masks import apply_mask, magnitude_mask, pack_bits, unpack_bits
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.schedule import Schedule
from hf_nmsparse.sparse_model import sparsify
from hf_nmsparse.srste import METHODS, StepContext, soft_scale, soft_threshold, straight_through
from tests.tiny import kept

WEIGHT = [[4.0, -1.0, 2.0, -3.0], [0.5, 1.0, -1.0, 0.25]]
MASK = [[True, False, False, True], [False, True, True, False]]
INPUT = [1.0, 2.0, 4.0, 8.0]
# The loss of `layer` is the sum of its outputs, so that both rows have the input as their gradient.
LR, DECAY = 0.5, 0.25


def layer(soft: bool = False) -> NMLinear:
    linear = nn.Linear(4, 2, bias=False)
    linear.weight = nn.Parameter(torch.tensor(WEIGHT))
    sparsify(linear, NMSparseConfig("2:4", soft=soft))
    assert isinstance(linear, NMLinear)
    return linear


def step_once(
    method: str, decay: float | None, schedule: Schedule | None = None, at: int = 0, adam: bool = False
) -> Tensor:
    """The weight after step ``at`` of 4."""
    linear = layer(METHODS[method].soft)
    kind = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = kind(linear.parameters(), lr=LR)
    SparseStep(linear, optimizer, method, decay, schedule).start(at, 4)
    linear(torch.tensor(INPUT)).sum().backward()
    optimizer.step()
    return linear.weight.detach()


def test_the_forward_uses_the_masked_weight() -> None:
    assert layer()(torch.tensor(INPUT)).tolist() == [4 * 1 - 3 * 8, 1 * 2 - 1 * 4]


def test_straight_through_passes_the_dense_gradient() -> None:
    weight = torch.tensor(WEIGHT, requires_grad=True)
    masked = straight_through(weight, apply_mask(weight.detach(), pack_bits(torch.tensor(MASK))))
    assert masked.tolist() == [[4, 0, 0, -3], [0, 1, -1, 0]]
    gradient = torch.arange(8.0).reshape(2, 4)
    masked.backward(gradient)
    assert weight.grad is not None
    assert torch.equal(weight.grad, gradient)


def test_straight_through_is_differentiable_twice() -> None:
    weight = torch.tensor(WEIGHT, requires_grad=True)
    masked = straight_through(weight, apply_mask(weight.detach(), pack_bits(torch.tensor(MASK))))
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


@pytest.mark.parametrize("method", ["sr-ste", "sr-ste-decoupled", "masked-decay"])
@pytest.mark.parametrize("coupled", [0.0, 0.125])
def test_an_optimizer_that_maximizes_shrinks_what_is_pruned_too(method: str, coupled: float) -> None:
    """Up the gradient of the loss is down the gradient of its negative, in every group by itself."""
    weights = []
    for sign in (1, -1):
        first, second = layer(), layer()
        groups: list[dict[str, Any]] = [{"params": [first.weight], "maximize": sign < 0}, {"params": [second.weight]}]
        optimizer = torch.optim.Adam(groups, lr=LR, weight_decay=coupled)
        SparseStep(nn.ModuleList([first, second]), optimizer, method, DECAY)
        for _ in range(3):
            optimizer.zero_grad()
            (sign * first(torch.tensor(INPUT)).sum() + second(torch.tensor(INPUT)).sum()).backward()
            optimizer.step()
        weights.append([first.weight.detach(), second.weight.detach()])
    assert torch.equal(weights[0][0], weights[1][0])
    assert torch.equal(weights[0][0], weights[0][1])
    assert torch.equal(weights[0][1], weights[1][1])


@pytest.mark.parametrize("method", ["sr-ste", "sr-ste-decoupled"])
def test_maximize_by_hand(method: str) -> None:
    linear = layer()
    optimizer = torch.optim.SGD(linear.parameters(), lr=LR, maximize=True)
    SparseStep(linear, optimizer, method, DECAY)
    linear(torch.tensor(INPUT)).sum().backward()
    optimizer.step()
    # W + 0.5 * (g - 0.25 * (1 - m) * W): the pruned -1, 2 and 0.5, 0.25 lose 0.125 of themselves as ever
    assert linear.weight.tolist() == [[4.5, 0.125, 3.75, 1.0], [0.9375, 2.0, 1.0, 4.21875]]


def test_asp() -> None:
    # The mask is applied to the weight, then to its gradient.
    assert step_once("asp", None).tolist() == [[3.5, 0.0, 0.0, -7.0], [0.0, 0.0, -3.0, 0.0]]


def test_masked_decay() -> None:
    # Adam's first step is -0.5 * sign(g); pruned weights lose 0.5 * 0.25 / |g| of themselves beside, g = 1, 2, 4, 8.
    expected = [[3.5, -1.5 + 0.125 / 2, 1.5 - 0.25 / 4, -3.5], [0.0 - 0.0625, 0.5, -1.5, -0.25 - 0.03125 / 8]]
    assert step_once("masked-decay", DECAY, adam=True).tolist() == [pytest.approx(row, abs=1e-6) for row in expected]


def test_masked_decay_goes_to_zero_and_not_beyond() -> None:
    linear = layer()
    optimizer = torch.optim.Adam(linear.parameters(), lr=LR)
    SparseStep(linear, optimizer, "masked-decay", DECAY)
    linear.weight.grad = torch.zeros(2, 4)
    optimizer.step()
    assert linear.weight.tolist() == [[4, 0, 0, -3], [0, 1, -1, 0]]


def test_masked_decay_leaves_the_moments_to_the_loss() -> None:
    """The coupled term of SR-STE is in them."""
    moments = []
    for method in ("masked-decay", "ste", "sr-ste"):
        linear = layer()
        optimizer = torch.optim.AdamW(linear.parameters(), lr=LR)
        SparseStep(linear, optimizer, method, None if method == "ste" else DECAY)
        linear(torch.tensor(INPUT)).sum().backward()
        optimizer.step()
        moments.append(optimizer.state[linear.weight]["exp_avg"])
    assert torch.equal(moments[0], moments[1])
    assert not torch.equal(moments[0], moments[2])


def test_the_soft_threshold_by_hand() -> None:
    # The largest pruned magnitude is 2 in the first group and 0.5 in the second.
    weight, mask = torch.tensor(WEIGHT), pack_bits(torch.tensor(MASK))
    assert soft_threshold(weight, mask, NMPattern(2, 4)).tolist() == [[2, 0, 0, -1], [0, 0.5, -0.5, 0]]
    # <w, S> = 8 + 3 + 0.5 + 0.5 over 4 + 1 + 0.25 + 0.25
    assert float(soft_scale(weight, mask, NMPattern(2, 4))) == pytest.approx(12 / 5.5)
    zero = torch.zeros(1, 4)
    assert float(soft_scale(zero, magnitude_mask(zero, NMPattern(2, 4)), NMPattern(2, 4))) == 1


@given(values=st.lists(st.floats(-4, 4, width=32), min_size=16, max_size=16), n=st.integers(1, 7))
def test_the_soft_threshold_is_idempotent_and_homogeneous(values: list[float], n: int) -> None:
    weight, pattern = torch.tensor(values).reshape(2, 8), NMPattern(n, 8)
    soft = soft_threshold(weight, magnitude_mask(weight, pattern), pattern)
    assert torch.equal(soft_threshold(soft, magnitude_mask(soft, pattern), pattern), soft)
    doubled = soft_threshold(2 * weight, magnitude_mask(2 * weight, pattern), pattern)
    assert torch.equal(doubled, 2 * soft)
    assert (soft.abs() <= weight.abs()).all()


def test_the_soft_threshold_does_not_jump_where_two_weights_change_places() -> None:
    pattern = NMPattern(2, 4)
    below, above = torch.tensor([[4.0, 2.0, 1.999, 1.0]]), torch.tensor([[4.0, 1.999, 2.0, 1.0]])
    soft = [soft_threshold(weight, magnitude_mask(weight, pattern), pattern) for weight in (below, above)]
    assert (soft[0] - soft[1]).abs().max() < 0.0011
    hard = [apply_mask(weight, magnitude_mask(weight, pattern)) for weight in (below, above)]
    assert (hard[0] - hard[1]).abs().max() == 2


def test_s_ste() -> None:
    # The masters are scaled once, by 12 / 5.5; then W - 0.5 * g, and the forward takes the threshold.
    scale = 12 / 5.5
    expected = [[scale * w - LR * g for w, g in zip(row, INPUT, strict=True)] for row in WEIGHT]
    assert step_once("s-ste", None).tolist() == [pytest.approx(row, abs=1e-6) for row in expected]
    assert layer(soft=True)(torch.tensor(INPUT)).tolist() == pytest.approx([scale * (2 - 8), scale * (1 - 2)])


def test_decaying_mask() -> None:
    # In step 1 of 4, of which 2 fade, pruned weights count half: W - 0.5 * (m + 0.5 * (1 - m)) * g.
    expected = [[3.5, -1.5, 1.0, -7.0], [0.25, 0.0, -3.0, -1.75]]
    assert step_once("decaying-mask", None, at=1).tolist() == expected
    # At the end they count and learn nothing.
    assert step_once("decaying-mask", None, at=2).tolist() == [[3.5, -1.0, 2.0, -7.0], [0.5, 0.0, -3.0, 0.25]]
    linear = layer()
    SparseStep(linear, torch.optim.SGD(linear.parameters(), lr=LR), "decaying-mask").start(1, 4)
    assert linear(torch.tensor(INPUT)).tolist() == [4 - 24 + 0.5 * (-2 + 8), 2 - 4 + 0.5 * (0.5 + 2)]


def test_random_masks_are_drawn_and_kept() -> None:
    masks = []
    for seed in range(40):
        torch.manual_seed(seed)
        torch.rand(seed)  # what was drawn before does not matter
        linear = layer()
        SparseStep(linear, torch.optim.SGD(linear.parameters(), lr=LR), "random")
        assert linear.mask is not None
        assert torch.equal(linear.weight, apply_mask(torch.tensor(WEIGHT), linear.mask))
        masks.append(linear.mask)
    torch.manual_seed(39)
    again = layer()
    SparseStep(again, torch.optim.SGD(again.parameters(), lr=LR), "random")
    assert again.mask is not None
    assert torch.equal(again.mask, masks[-1])
    keeps = unpack_bits(torch.cat(masks), torch.Size([80, 4]))
    assert (keeps.sum(dim=1) == 2).all()
    # 80 groups: each of the four places is kept in half of them, give or take 5 standard deviations.
    assert ((keeps.sum(dim=0) - 40).abs() < 5 * math.sqrt(80 * 0.25)).all()


@pytest.mark.parametrize(("at", "share"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.0)])
def test_a_ramp(at: int, share: float) -> None:
    ramped = step_once("sr-ste", DECAY, Schedule(ramp=0.5), at=at)
    assert torch.equal(ramped, step_once("sr-ste", share * DECAY))


def test_a_dense_head_and_tail_have_the_dense_step() -> None:
    for at in (0, 3):
        linear = layer()
        step = SparseStep(
            linear,
            torch.optim.SGD(linear.parameters(), lr=LR),
            "sr-ste",
            DECAY,
            Schedule(dense_head=0.25, dense_tail=0.25),
        )
        step.start(at, 4)
        assert linear(torch.tensor(INPUT)).tolist() == [4 - 2 + 8 - 24, 0.5 + 2 - 4 + 2]
        schedule = Schedule(dense_head=0.25, dense_tail=0.25)
        assert torch.equal(step_once("sr-ste", DECAY, schedule, at), step_once("ste", None))
    assert torch.equal(step_once("sr-ste", DECAY, schedule, 1), step_once("sr-ste", DECAY))


def test_decay_zero_is_ste() -> None:
    assert torch.equal(step_once("sr-ste", 0.0), step_once("ste", None))
    assert not torch.equal(step_once("sr-ste", None), step_once("ste", None))


@pytest.mark.parametrize(("method", "decay"), [("sr-ste", 2e-4), ("sr-ste-decoupled", 0.4), ("masked-decay", 2e-4)])
def test_the_default_decay(method: str, decay: float) -> None:
    assert METHODS[method].default_decay == decay
    assert torch.equal(step_once(method, None, adam=True), step_once(method, decay, adam=True))


def test_asp_gives_pruned_weights_no_gradient_even_where_it_is_infinite() -> None:
    gradient = torch.tensor([[1.0, math.inf, -math.inf, 2.0]])
    METHODS["asp"].rule(torch.zeros(1, 4), gradient, pack_bits(torch.tensor([MASK[0]])), StepContext(LR))
    assert gradient.tolist() == [[1.0, 0.0, 0.0, 2.0]]


def test_the_methods_cannot_be_edited() -> None:
    assert list(METHODS) == [
        "ste",
        "sr-ste",
        "sr-ste-decoupled",
        "masked-decay",
        "s-ste",
        "decaying-mask",
        "asp",
        "random",
    ]
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
        assert not torch.equal(self.mask(linear.weight), self.mask(self.start))
        return linear.weight.detach()

    @staticmethod
    def mask(weight: Tensor) -> Tensor:
        return kept(weight, NMPattern(2, 4))


def test_the_coupled_term_runs_through_momentum() -> None:
    problem = Problem()
    weight, momentum = problem.start.clone(), torch.zeros(4, 8, dtype=torch.float64)
    for _ in range(10):
        gradient = problem.gradient(weight) + DECAY * torch.where(problem.mask(weight), 0.0, weight)
        momentum = 0.9 * momentum + gradient
        weight = weight - 0.1 * momentum
    trained = problem.train(torch.optim.SGD, "sr-ste", lr=0.1, momentum=0.9)
    torch.testing.assert_close(trained, weight, rtol=1e-12, atol=1e-12)


def adam_by_hand(problem: Problem, method: str, lr: float, weight_decay: float) -> Tensor:
    weight = problem.start.clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 11):
        pruned = torch.where(problem.mask(weight), 0.0, weight)
        gradient = problem.gradient(weight)
        if method == "sr-ste":
            gradient = gradient + DECAY * pruned
        elif method == "sr-ste-decoupled":
            weight = weight - lr * DECAY * pruned
        else:
            moment = 0.999 * second + 0.001 * gradient**2
            denominator = (moment / (1 - 0.999**step)).sqrt() + 1e-8
            weight = weight - pruned * (lr * DECAY / denominator).clamp(max=1)
        weight = weight * (1 - lr * weight_decay)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weight = weight - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


IN_ADAM = ("sr-ste", "sr-ste-decoupled", "masked-decay")


@pytest.mark.parametrize("method", IN_ADAM)
def test_the_term_in_adam(method: str) -> None:
    problem = Problem()
    trained = problem.train(torch.optim.AdamW, method, lr=0.1, weight_decay=0.01)
    by_hand = adam_by_hand(problem, method, lr=0.1, weight_decay=0.01)
    torch.testing.assert_close(trained, by_hand, rtol=1e-12, atol=1e-12)
    for other in set(IN_ADAM) - {method}:
        assert (trained - adam_by_hand(problem, other, lr=0.1, weight_decay=0.01)).abs().max() > 1e-3
