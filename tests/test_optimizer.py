"""SparseStep: the rule exactly once per optimizer step, masks and flips after it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Adafactor

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.masks import apply_mask, magnitude_mask, pack_bits
from hf_nmsparse.optimizer import Flips, SparseStep, check_method
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.schedule import Schedule
from hf_nmsparse.sparse_model import sparsify
from hf_nmsparse.srste import METHODS as REGISTERED
from tests.tiny import kept

PATTERN = NMPattern(2, 4)
METHODS = [("sr-ste", 0.25), ("sr-ste-decoupled", 0.25), ("ste", None), ("asp", None)]


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    sparsify(model, NMSparseConfig(PATTERN))
    return model


def layers_of(model: nn.Module) -> list[NMLinear]:
    return [module for module in model.modules() if isinstance(module, NMLinear)]


def state_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def close(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(first, second, strict=True))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x).square().mean()
    return result


def one_row(values: list[float]) -> NMLinear:
    """A layer of one group, whose gradient the tests write themselves."""
    layer = NMLinear.from_stock(nn.Linear(len(values), 1, bias=False), PATTERN)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return layer


@pytest.mark.parametrize(("method", "decay"), METHODS)
def test_accumulation_makes_no_difference(method: str, decay: float | None) -> None:
    start, x = network(), torch.randn(8, 8)
    results = []
    for parts in (1, 4):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        SparseStep(model, optimizer, method, decay)
        for _ in range(5):
            optimizer.zero_grad()
            for part in x.chunk(parts):
                (loss(model, part) / parts).backward()
            optimizer.step()
        results.append(state_of(model))
    assert close(*results)
    assert not close(results[0], state_of(start))


def test_the_term_comes_after_clipping() -> None:
    layer = one_row([4.0, 3.0, 2.0, -1.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    SparseStep(layer, optimizer, "sr-ste", 0.5)
    layer.weight.grad = torch.tensor([[0.0, 3000.0, 0.0, 4000.0]])
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 5.0)
    optimizer.step()
    # the clipped gradient is 0, 3, 0, 4; a term added before it would have vanished in the norm
    expected = torch.tensor([[4.0, 3.0 - 3.0, 2.0 - 0.5 * 2.0, -1.0 - 4.0 + 0.5 * 1.0]])
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-4)


def train(model: nn.Module, scale: float | None, fused: bool, method: str, decay: float | None) -> list[Tensor]:
    """Three steps of AdamW, under a loss scaler of a fixed scale if one is given."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    SparseStep(model, optimizer, method, decay)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss(model, torch.full((2, 8), 1.0 + step))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return state_of(model)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("method", "decay"), METHODS)
def test_an_unscaled_loss_scaler_makes_no_difference(method: str, decay: float | None, fused: bool) -> None:
    start = network()
    without = train(copy.deepcopy(start), None, fused, method, decay)
    assert same(train(copy.deepcopy(start), 2.0**10, fused, method, decay), without)  # powers of two round nothing


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("method", "decay"), METHODS)
def test_a_step_that_the_scaler_skips_changes_nothing(method: str, decay: float | None, fused: bool) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    step = SparseStep(model, optimizer, method, decay)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def scaled_step(infinite: bool) -> None:
        optimizer.zero_grad()
        scaler.scale(loss(model, torch.ones(2, 8))).backward()
        first = layers_of(model)[0].weight.grad
        assert first is not None
        if infinite:
            first[0, 0] = math.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    before = state_of(model)
    scaled_step(infinite=True)
    assert same(state_of(model), before)
    assert step.take_flips() == {}
    scaled_step(infinite=False)
    assert not same(state_of(model), before)
    masks, before = [layer.current_mask().clone() for layer in layers_of(model)], state_of(model)
    assert set(step.take_flips()) == {"0", "2"}
    scaled_step(infinite=True)
    assert same(state_of(model), before)
    assert same([layer.current_mask() for layer in layers_of(model)], masks)
    assert step.take_flips() == {}


def test_gradients_that_are_still_scaled_are_refused() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    SparseStep(model, optimizer, "sr-ste", 0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = state_of(model)
    scaler.scale(loss(model, torch.ones(2, 8))).backward()
    message = r"still scaled; call scaler.unscale_\(optimizer\) before scaler.step\(optimizer\)"
    with pytest.raises(ValueError, match=message):
        scaler.step(optimizer)
    assert same(state_of(model), before)


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_refused(keyword: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SparseStep(model, optimizer, "sr-ste", 0.1)

    def closure() -> float:
        raise AssertionError("the step went on")

    arguments: tuple[list[Any], dict[str, Any]] = ([], {"closure": closure}) if keyword else ([closure], {})
    with pytest.raises(ValueError, match="a closure computes gradients after the rule has run"):
        optimizer.step(*arguments[0], **arguments[1])
    loss(model, torch.ones(2, 8)).backward()
    before = state_of(model)
    optimizer.step(None)  # accelerate passes it on
    assert not same(state_of(model), before)


@pytest.mark.parametrize(("method", "decay"), [("sr-ste", 0.5), ("sr-ste-decoupled", 0.5)])
def test_frozen_weights_are_left_alone(method: str, decay: float) -> None:
    outside, frozen, no_gradient, trained = (one_row([4.0, 3.0, 2.0, 1.0]) for _ in range(4))
    model = nn.ModuleList([outside, frozen, no_gradient, trained])
    frozen.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([layer.weight for layer in (frozen, no_gradient, trained)], lr=0.5)
    SparseStep(model, optimizer, method, decay)
    outside.weight.grad = torch.zeros(1, 4)
    trained.weight.grad = torch.zeros(1, 4)
    optimizer.step()
    for layer in (outside, frozen, no_gradient):
        assert layer.weight.tolist() == [[4.0, 3.0, 2.0, 1.0]]
    assert outside.weight.grad.tolist() == [[0.0] * 4]
    assert trained.weight.tolist() == [[4.0, 3.0, 1.5, 0.75]]


def test_each_weight_decays_at_the_rate_of_its_group() -> None:
    first, second = one_row([4.0, 3.0, 2.0, 1.0]), one_row([4.0, 3.0, 2.0, 1.0])
    optimizer = torch.optim.SGD([{"params": [first.weight], "lr": 0.5}, {"params": [second.weight], "lr": 0.25}])
    SparseStep(nn.ModuleList([first, second]), optimizer, "sr-ste-decoupled", 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2.0**-step)
    for _ in range(2):
        first.weight.grad, second.weight.grad = torch.zeros(1, 4), torch.zeros(1, 4)
        optimizer.step()
        scheduler.step()
    assert first.weight.tolist() == [[4.0, 3.0, 2 * (1 - 0.5) * (1 - 0.25), (1 - 0.5) * (1 - 0.25)]]
    assert second.weight.tolist() == [[4.0, 3.0, 2 * (1 - 0.25) * (1 - 0.125), (1 - 0.25) * (1 - 0.125)]]


@pytest.mark.parametrize("fused", [False, True])
def test_masks_follow_the_weights(fused: bool) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=fused)
    step = SparseStep(model, optimizer, "sr-ste")
    before = [layer.current_mask().clone() for layer in layers_of(model)]
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, torch.randn(4, 8)).backward()
        optimizer.step()
        for layer in layers_of(model):
            assert layer.mask is not None
            assert torch.equal(layer.mask, magnitude_mask(layer.weight, PATTERN))
    assert not same([layer.current_mask() for layer in layers_of(model)], before)
    assert sum(flips.sad for flips in step.take_flips().values()) > 0


def set_weight(layer: NMLinear, optimizer: torch.optim.Optimizer, values: list[float]) -> None:
    """A step of SGD at rate 1 that leads to ``values``."""
    layer.weight.grad = layer.weight.detach() - torch.tensor([values])
    optimizer.step()
    assert layer.weight.tolist() == [values]


def test_flips_by_hand_over_three_steps() -> None:
    layer = one_row([4.0, 3.0, 2.0, 1.0, 4.0, 3.0, 2.0, 1.0])  # 1100 1100
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    step = SparseStep(layer, optimizer, "ste")
    assert step.take_flips() == {}
    set_weight(layer, optimizer, [4.0, 2.0, 3.0, 1.0, 4.0, 3.0, 2.0, 1.0])  # 1010 1100: 2 entries
    set_weight(layer, optimizer, [1.0, 3.0, 2.0, 4.0, 1.0, 2.0, 3.0, 4.0])  # 0101 0011: 4 + 4
    set_weight(layer, optimizer, [1.0, 4.0, 2.0, 3.0, 2.0, 1.0, 4.0, 3.0])  # 0101 0011: 0
    assert step.take_flips() == {"": Flips(sad=10 / 3, weights=8)}
    assert step.take_flips() == {}
    set_weight(layer, optimizer, [1.0, 4.0, 3.0, 2.0, 2.0, 1.0, 4.0, 3.0])  # 0110 0011: 2
    (flips,) = step.take_flips().values()
    assert (flips.sad, flips.weights, flips.rate) == (2.0, 8, 0.25)


def test_flips_go_by_layer() -> None:
    model = nn.ModuleDict({"still": one_row([4.0, 3.0, 2.0, 1.0]), "moving": one_row([4.0, 3.0, 2.0, 1.0])})
    moving = model["moving"]
    assert isinstance(moving, NMLinear)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = SparseStep(model, optimizer, "ste")
    set_weight(moving, optimizer, [1.0, 2.0, 3.0, 4.0])
    assert step.take_flips() == {"still": Flips(0.0, 4), "moving": Flips(4.0, 4)}


def test_weights_loaded_between_steps_get_their_own_masks() -> None:
    layer = one_row([4.0, 3.0, 2.0, 1.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    SparseStep(layer, optimizer, "sr-ste", 0.5)
    set_gradient = torch.zeros(1, 4)
    layer.weight.grad = set_gradient.clone()
    optimizer.step()
    layer.load_state_dict({"weight": torch.tensor([[1.0, 2.0, 3.0, 4.0]])})
    layer.weight.grad = set_gradient.clone()
    optimizer.step()
    assert layer.weight.tolist() == [[0.5, 1.0, 3.0, 4.0]]


def test_remove_takes_the_hooks_off() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = SparseStep(model, optimizer, "sr-ste", 0.5)
    loss(model, torch.ones(2, 8)).backward()
    optimizer.step()
    step.take_flips()
    step.remove()
    assert all(layer.mask is None for layer in layers_of(model))
    before = state_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert same(state_of(model), before)
    assert step.take_flips() == {}


def test_a_removed_asp_step_lets_masks_follow_again() -> None:
    layer = one_row([4.0, 3.0, 2.0, 1.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    SparseStep(layer, optimizer, "asp").remove()
    assert not layer.fixed_mask
    set_weight(layer, optimizer, [1.0, 2.0, 3.0, 4.0])
    assert layer.current_mask().tolist() == [0b1100]


@pytest.mark.parametrize("fused", [False, True])
def test_asp_keeps_pruned_weights_at_exactly_zero(fused: bool) -> None:
    model = network()
    masks = [kept(layer.weight, PATTERN) for layer in layers_of(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=fused)
    step = SparseStep(model, optimizer, "asp")
    before = state_of(model)
    for _ in range(20):
        optimizer.zero_grad()
        loss(model, torch.randn(4, 8)).backward()
        optimizer.step()
        for layer, mask in zip(layers_of(model), masks, strict=True):
            assert torch.equal(layer.weight[~mask], torch.zeros(int((~mask).sum())))
            assert torch.equal(layer.current_mask(), pack_bits(mask))
    assert all(
        (after[mask] != start[mask]).all()
        for after, start, mask in zip(
            [layer.weight for layer in layers_of(model)], [before[0], before[2]], masks, strict=True
        )
    )
    assert all(flips.sad == 0 for flips in step.take_flips().values())


OF_TORCH: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"fused": True},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adafactor": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "ASGD": {},
    "Muon": {},
}


def test_every_optimizer_of_torch_is_tried() -> None:
    kinds = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    # One takes sparse gradients alone, the other a closure.
    assert kinds - {"Optimizer", "SparseAdam", "LBFGS"} == OF_TORCH.keys()


@pytest.mark.parametrize("method", ["asp", "random"])
@pytest.mark.parametrize("kind", OF_TORCH)
def test_what_an_optimizer_remembers_moves_no_pruned_weight(kind: str, method: str) -> None:
    """Momentum and moments of a dense training that went before."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.05, **OF_TORCH[kind])

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss(model, torch.randn(4, 8)).backward()
            optimizer.step()

    steps(3)
    sparsify(model, NMSparseConfig(PATTERN))
    SparseStep(model, optimizer, method)
    masks = [layer.current_mask().clone() for layer in layers_of(model)]
    before = state_of(model)
    for _ in range(3):
        steps(1)
        for layer, mask in zip(layers_of(model), masks, strict=True):
            assert torch.equal(layer.weight, apply_mask(layer.weight, mask))
            assert torch.equal(layer.current_mask(), mask)
    assert not same(before, state_of(model))


@given(
    momentum=st.floats(0, 0.99),
    decay=st.floats(0, 1),
    maximize=st.booleans(),
    foreach=st.booleans(),
    state=st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8),
)
def test_asp_holds_whatever_the_momentum_holds(
    momentum: float, decay: float, maximize: bool, foreach: bool, state: list[float]
) -> None:
    layer = one_row([4.0, 3.0, 2.0, 1.0, -1.0, 2.0, -3.0, 4.0])
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=0.5, momentum=momentum, weight_decay=decay, maximize=maximize, foreach=foreach
    )
    optimizer.state[layer.weight]["momentum_buffer"] = torch.tensor([state])
    SparseStep(layer, optimizer, "asp")
    layer.weight.grad = torch.ones(1, 8)
    optimizer.step()
    assert layer.weight[0, [2, 3, 4, 5]].tolist() == [0.0] * 4
    assert not layer.weight[0, [2, 3, 4, 5]].signbit().any()


def test_asp_survives_the_loading_of_a_checkpoint() -> None:
    layer = one_row([1.0, 2.0, 3.0, 4.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    SparseStep(layer, optimizer, "asp")
    assert layer.weight.tolist() == [[0.0, 0.0, 3.0, 4.0]]
    # A kept weight became zero: a ranking of the checkpoint would keep the first of its zeros instead.
    layer.load_state_dict({"weight": torch.tensor([[0.0, 0.0, 0.0, 4.0]])})
    layer.weight.grad = torch.tensor([[-1.0, -1.0, -1.0, 0.0]])
    optimizer.step()
    assert layer.weight.tolist() == [[0.0, 0.0, 1.0, 4.0]]


def test_a_module_used_twice_gets_the_term_once() -> None:
    layer = one_row([4.0, 3.0, 2.0, 1.0])
    model = nn.Sequential(layer, nn.ReLU(), layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = SparseStep(model, optimizer, "sr-ste", 0.5)
    layer.weight.grad = torch.zeros(1, 4)
    optimizer.step()
    assert layer.weight.tolist() == [[4.0, 3.0, 1.0, 0.5]]
    assert list(step.take_flips()) == ["0"]


def test_a_weight_tied_after_sparsify_gets_the_term_once() -> None:
    first, second = one_row([4.0, 3.0, 2.0, 1.0]), one_row([0.0] * 4)
    second.weight = first.weight
    model = nn.ModuleList([first, second])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    SparseStep(model, optimizer, "sr-ste", 0.5)
    first.weight.grad = torch.zeros(1, 4)
    optimizer.step()
    assert first.weight.tolist() == [[4.0, 3.0, 1.0, 0.5]]


def test_nan_is_found_at_the_step_that_makes_it() -> None:
    layer = one_row([4.0, 3.0, 2.0, 1.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    SparseStep(layer, optimizer, "ste")
    layer.weight.grad = torch.tensor([[0.0, math.nan, 0.0, 0.0]])
    with pytest.raises(ValueError, match="holds NaN, which has no rank; check the loss"):
        optimizer.step()


@pytest.mark.parametrize(
    ("method", "decay", "message"),
    [
        ("sgd", None, "got 'sgd'; the methods are ste, sr-ste, sr-ste-decoupled, masked-decay, s-ste"),
        ("dense", 0.0, "got 'dense'"),
        ("sr-ste", -1e-4, "needs a finite number >= 0, got -0.0001"),
        ("sr-ste", math.nan, "needs a finite number >= 0, got nan"),
        ("sr-ste-decoupled", math.inf, "needs a finite number >= 0, got inf"),
        ("ste", 0.1, "'ste' has no decay, got 0.1; leave it at 0 or choose 'sr-ste'"),
        ("asp", 0.1, "'asp' has no decay, got 0.1"),
    ],
)
def test_bad_arguments_are_refused(method: str, decay: float | None, message: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        SparseStep(model, optimizer, method, decay)
    with pytest.raises(ValueError, match=message):
        check_method(method, decay, Schedule())


@pytest.mark.parametrize(
    ("method", "given", "used"),
    [("sr-ste", None, 2e-4), ("sr-ste", 0.0, 0.0), ("sr-ste", 0.3, 0.3), ("ste", None, 0.0), ("ste", 0.0, 0.0)],
)
def test_the_decay_in_use(method: str, given: float | None, used: float) -> None:
    assert check_method(method, given, Schedule()) == (used, Schedule())


def test_a_method_brings_its_own_fade() -> None:
    assert check_method("decaying-mask", None, Schedule()) == (0.0, Schedule(fade=0.5))
    assert check_method("decaying-mask", None, Schedule(fade=0.25)) == (0.0, Schedule(fade=0.25))


@pytest.mark.parametrize(
    ("method", "schedule", "message"),
    [
        ("ste", Schedule(ramp=0.1), "sparse_ramp: 'ste' has no decay to ramp"),
        ("asp", Schedule(interval=2), "'asp' has no schedule of masks"),
        ("random", Schedule(dense_head=0.1), "'random' has no schedule of masks"),
        ("s-ste", Schedule(fade=0.1), "'s-ste' has no schedule of masks"),
    ],
)
def test_a_schedule_that_a_method_would_not_follow_is_refused(method: str, schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_method(method, None, schedule)


def test_soft_layers_and_methods_must_fit() -> None:
    soft = nn.Sequential(nn.Linear(8, 4))
    sparsify(soft, NMSparseConfig(PATTERN, soft=True))
    with pytest.raises(ValueError, match=r"'sr-ste' takes layers without a soft threshold; .*soft=False"):
        SparseStep(soft, torch.optim.SGD(soft.parameters(), lr=0.1), "sr-ste")
    hard = network()
    with pytest.raises(ValueError, match=r"'s-ste' takes layers with a soft threshold; .*soft=True"):
        SparseStep(hard, torch.optim.SGD(hard.parameters(), lr=0.1), "s-ste")


def test_masked_decay_asks_for_adam_without_amsgrad() -> None:
    model = network()
    with pytest.raises(ValueError, match="'masked-decay' reads the moments of torch's Adam or AdamW, got SGD"):
        SparseStep(model, torch.optim.SGD(model.parameters(), lr=0.1), "masked-decay")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    SparseStep(model, optimizer, "masked-decay")
    loss(model, torch.ones(2, 8)).backward()
    with pytest.raises(ValueError, match="does not know the second moment of amsgrad"):
        optimizer.step()


def test_adafactor_that_finds_its_own_rate() -> None:
    """transformers' Adafactor has no learning rate then: SR-STE reads none, and the decoupled variant has to."""
    layer = one_row([4.0, 3.0, 2.0, 1.0])
    optimizer = Adafactor(layer.parameters())
    SparseStep(layer, optimizer, "sr-ste", decay=0.5)
    layer.weight.grad = torch.zeros(1, 4)
    optimizer.step()
    assert layer.weight.grad.tolist() == [[0.0, 0.0, 1.0, 0.5]]
    with pytest.raises(ValueError, match="'sr-ste-decoupled' reads the learning rate, and this Adafactor finds its"):
        SparseStep(layer, Adafactor(layer.parameters()), "sr-ste-decoupled")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_masked_decay_divides_by_what_adam_divides_by(kind: type[torch.optim.Adam], fused: bool) -> None:
    """A pruned weight whose gradient's first moment is 0 moves by the decay alone."""
    layer = one_row([4.0, 3.0, 2.0, 1.0])
    coupled = 0.0 if kind is torch.optim.AdamW else 0.125
    optimizer = kind(layer.parameters(), lr=0.5, weight_decay=coupled, fused=fused)
    # Adam takes its coupled weight decay from the weight that the term has moved, by at most 0.5 * 0.25 * 2 / 3.
    tolerance = 1e-6 + 0.5 * coupled * 0.25 / 3
    SparseStep(layer, optimizer, "masked-decay", 0.25)
    for gradient in ([1.0, 1.0, 3.0, 1.0], [1.0, 1.0, 5.0, 1.0]):
        weight = layer.weight.detach().clone()
        layer.weight.grad = torch.tensor([gradient])
        pruned = torch.where(kept(weight, PATTERN), 0.0, weight)
        optimizer.step()
        state, step = optimizer.state[layer.weight], float(optimizer.state[layer.weight]["step"])
        denominator = (state["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8
        moved = (state["exp_avg"] / (1 - 0.9**step)) + 0.25 * pruned
        torch.testing.assert_close(layer.weight.detach(), weight - 0.5 * moved / denominator, rtol=0, atol=tolerance)


def test_masks_are_renewed_at_intervals() -> None:
    layer = one_row([4.0, 3.0, 2.0, 1.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    step = SparseStep(layer, optimizer, "ste", schedule=Schedule(interval=3))
    masks = []
    for _ in range(6):
        layer.weight.grad = torch.tensor([[0.0, 0.0, -1.0, 0.0]])  # the third weight grows by 1 a step
        optimizer.step()
        masks.append(int(layer.current_mask()))
    assert masks == [0b0011] * 2 + [0b0101] * 4
    assert step.take_flips()[""] == Flips(2 / 6, 4)


def test_a_schedule_with_fractions_needs_the_length() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SparseStep(model, optimizer, "sr-ste", schedule=Schedule(ramp=0.5))
    loss(model, torch.ones(2, 8)).backward()
    with pytest.raises(ValueError, match="this schedule needs the length of the run; give steps"):
        optimizer.step()


def test_a_dense_tail_leaves_nothing_to_finalise() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = SparseStep(model, optimizer, "ste", schedule=Schedule(dense_head=0.25, dense_tail=0.25), steps=4)
    scales = []
    for _ in range(4):
        scales.append(layers_of(model)[0].pruned_scale)
        loss(model, torch.ones(2, 8)).backward()
        optimizer.step()
    assert scales == [1, 0, 0, 1]
    with pytest.raises(ValueError, match=r"a layer of 16x8 computes with its pruned weights times 1, so it is not 2:4"):
        layers_of(model)[0].finalize()
    step.remove()
    assert layers_of(model)[0].pruned_scale == 0


def test_groups_that_ever_changed() -> None:
    layer = NMLinear.from_stock(nn.Linear(8, 1, bias=False), PATTERN)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0] * 2]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    step = SparseStep(layer, optimizer, "ste", track_groups=True)
    shares = []
    for change in (0.0, -2.0, 2.0):  # the third weight of the second group comes and goes
        layer.weight.grad = torch.tensor([[0.0] * 6 + [change, 0.0]])
        optimizer.step()
        shares.append(step.layer_states()[""].changed)
    assert shares == [0, 0.5, 0.5]
    state = step.layer_states()[""]
    assert (state.kept, state.pruned) == (3.5, 1.5)


@pytest.mark.parametrize(
    ("method", "schedule"),
    [("ste", Schedule(interval=3)), ("sr-ste", Schedule(ramp=0.5, dense_head=0.25)), ("random", Schedule())],
)
def test_a_run_goes_on_from_its_state(method: str, schedule: Schedule) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()

    start, x = network(), torch.randn(8, 8)
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = SparseStep(model, optimizer, method, schedule=schedule, steps=8, track_groups=True)
    run(model, optimizer, 4)
    # Everything that a checkpoint holds, by value.
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), step.state_dict()])
    run(model, optimizer, 4)

    resumed = network()
    resumed.load_state_dict(saved[0])
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.1)
    again = SparseStep(resumed, optimizer, method, schedule=schedule, steps=8, track_groups=True)
    optimizer.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    run(resumed, optimizer, 4)
    assert same(state_of(resumed), state_of(model))
    assert again.layer_states() == step.layer_states()


def test_a_state_of_another_run_is_refused() -> None:
    model = network()
    step = SparseStep(model, torch.optim.SGD(model.parameters(), lr=0.1), "ste", schedule=Schedule(interval=2))
    state = step.state_dict()
    with pytest.raises(ValueError, match=r"'0.mask' is in one of the saved state and this run only; resume with"):
        step.load_state_dict({key: value for key, value in state.items() if key != "0.mask"})
    with pytest.raises(ValueError, match=r"128 booleans take 16 bytes, got torch\.uint8 of"):
        step.load_state_dict({**state, "0.mask": torch.zeros(3, dtype=torch.uint8)})


def test_a_dense_model_is_refused() -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="the model has no N:M layer; call sparsify"):
        SparseStep(model, torch.optim.SGD(model.parameters(), lr=0.1), "ste")


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer holds no sparse weight; build it from this model's parameters"):
        SparseStep(model, optimizer, "sr-ste")


def test_weights_that_are_all_frozen_are_told() -> None:
    """As those below adapters are."""
    model = network()
    model.requires_grad_(False)
    adapter = nn.Linear(8, 8)
    with pytest.raises(
        ValueError, match=r"every sparse weight is frozen, so that no rule has anything to do; unfreeze"
    ):
        SparseStep(model, torch.optim.SGD(adapter.parameters(), lr=0.1), "sr-ste")


@pytest.mark.parametrize("no_optimizer", [None, [], "sgd", nn.Linear(2, 2)])
def test_what_is_no_optimizer_is_refused(no_optimizer: Any) -> None:
    with pytest.raises(ValueError, match=rf"needs an optimizer of torch, got {type(no_optimizer).__name__}; give the"):
        SparseStep(network(), no_optimizer, "sr-ste")


class Around(torch.optim.Optimizer):
    """What wraps an optimizer and leaves the constructor of its base class out, as accelerate's does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class Lookahead(torch.optim.Optimizer):
    """A wrapper with a step of its own after that of the optimizer inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.optimizer.step()
        for group in self.param_groups:
            for weight in group["params"]:
                weight.add_(1.0)


def test_wrappers_of_others() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="needs an optimizer of torch, got Around; give the optimizer itself"):
        SparseStep(model, Around(optimizer), "asp")
    lookahead = Lookahead(optimizer)
    SparseStep(model, lookahead, "asp")
    loss(model, torch.ones(2, 8)).backward()
    lookahead.step()
    for layer in layers_of(model):
        assert torch.equal(layer.weight, apply_mask(layer.weight, layer.current_mask()))


def test_a_scheduler_is_no_optimizer() -> None:
    model = network()
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters(), lr=0.1), lambda step: 1.0)
    with pytest.raises(ValueError, match="needs an optimizer of torch, got LambdaLR; give the optimizer"):
        SparseStep(model, scheduler, "sr-ste")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("before", [False, True])
def test_a_loop_of_accelerate_is_that_of_torch(before: bool, precision: str) -> None:
    """`SparseStep` before or after ``prepare``, with a schedule of the rate, clipping and accumulation."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def run(prepared: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model: nn.Module = network()
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        if before:
            SparseStep(model, optimizer, "sr-ste", 0.25)
        if prepared:
            model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        if not before:
            SparseStep(model, optimizer, "sr-ste", 0.25)
        for part in torch.randn(6, 4, 8):
            with accelerator.accumulate(model):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and not prepared):
                    value = loss(model, part)
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                if prepared or accelerator.sync_gradients:
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        return state_of(model)

    AcceleratorState._reset_state(reset_partial_state=True)  # what a trainer in this process has left, maybe in bf16
    try:
        results = [run(prepared) for prepared in (False, True)]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert same(*results)
    torch.manual_seed(0)
    assert not close(results[0], state_of(network()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # in torch.compile itself
def test_wrapped_models_are_looked_through() -> None:
    results = []
    for wrap in (None, lambda model: torch.compile(model, backend="eager"), nn.DataParallel):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        wrapped: Any = model if wrap is None else wrap(model)
        step = SparseStep(wrapped, optimizer, "sr-ste", 0.25)
        for _ in range(2):
            optimizer.zero_grad()
            loss(wrapped, torch.ones(2, 8)).backward()
            optimizer.step()
        assert step.take_flips().keys() == {"0", "2"}
        results.append(state_of(model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_an_optimizer_that_is_given_other_weights_is_refused_in_its_step() -> None:
    """As an engine does that trains flattened copies of the weights."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SparseStep(model, optimizer, "sr-ste")
    optimizer.param_groups[0]["params"] = list(copy.deepcopy(model).parameters())
    with pytest.raises(ValueError, match="the optimizer holds no sparse weight; build it from this model's parameters"):
        optimizer.step()


def test_the_loop_of_the_docstring_trains() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    SparseStep(model, optimizer, method="sr-ste", decay=2e-4)
    x = torch.randn(32, 8)
    target = x.roll(1, dims=1)[:, :4] * 0.5
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        value = (model(x) - target).square().mean()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]
    finalised = copy.deepcopy(model)
    for layer in layers_of(finalised):
        layer.finalize()
        assert torch.equal(layer.weight, apply_mask(layer.weight, magnitude_mask(layer.weight, PATTERN)))
    assert torch.equal(finalised(x), model(x))


@pytest.mark.parametrize("method", list(REGISTERED))
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("anew", [True, False])
def test_a_cell_that_runs_again_applies_the_rule_once(method: str, kept: bool, anew: bool) -> None:
    """With the optimizer of before or one anew, whether or not the earlier SparseStep has a name."""
    start = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    sparsify(start, NMSparseConfig(PATTERN, soft=REGISTERED[method].soft))
    x, results = torch.randn(8, 8), []
    for runs in (1, 3):
        model, steps = copy.deepcopy(start), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for run in range(runs):
            if anew and run:
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            step = SparseStep(model, optimizer, method, steps=5)
            if kept:
                steps.append(step)
            del step
        for _ in range(5):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
        for earlier in steps[:-1]:
            earlier.remove()  # which is done
        results.append([*state_of(model), *(layer.current_mask() for layer in layers_of(model))])
    assert same(*results)


def test_steps_of_other_layers_or_optimizers_stay() -> None:
    """Two models in one optimizer, and two optimizers of one model, are trained by both."""
    first, second = network(), network()
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    others = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers_of(first)]
    steps = [SparseStep(model, optimizer, "sr-ste", 0.1) for model in (first, second)]
    steps += [SparseStep(first, other, "sr-ste", 0.1) for other in others]
    (loss(first, torch.ones(1, 8)) + loss(second, torch.ones(1, 8))).backward()
    for each in (optimizer, *others):
        each.step()
    assert [step.step for step in steps] == [1, 1, 1, 1]


def test_masks_follow_the_weights_again_after_a_method_that_fixes_them() -> None:
    model = network()
    SparseStep(model, torch.optim.SGD(model.parameters(), lr=0.1), "asp")
    SparseStep(model, torch.optim.SGD(model.parameters(), lr=0.1), "sr-ste", 0.1)
    assert not any(layer.fixed_mask for layer in layers_of(model))
