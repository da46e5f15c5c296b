"""SparseStep: what happens to N:M layers around ``optimizer.step``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn

from hf_nmsparse.layers import NMLayer, channel_dim
from hf_nmsparse.masks import apply_mask, pack_bits, random_mask, unpack_bits, update_mask
from hf_nmsparse.padding import ZeroPadding
from hf_nmsparse.schedule import Schedule
from hf_nmsparse.sharding import is_sharded, local
from hf_nmsparse.srste import METHODS, StepContext
from hf_nmsparse.wrappers import unwrapped

__all__ = ["Flips", "LayerState", "SparseStep", "torch_optimizer"]


@dataclass(frozen=True)
class Flips:
    """Mask changes of a layer, or of a model, since they were last taken.

    Attributes:
        sad: Mask entries that differ between consecutive optimizer steps, averaged over the steps.
        weights: Weights counted.
    """

    sad: float
    weights: int

    @property
    def rate(self) -> float:
        """The flip rate: the fraction of mask entries that a step changes."""
        return self.sad / self.weights


@dataclass(frozen=True)
class LayerState:
    """What a layer looks like at a step.

    Attributes:
        kept: Mean magnitude of the kept weights.
        pruned: Mean magnitude of the pruned ones.
        changed: Share of the groups whose mask has changed since the training began; None where it is not tracked.
    """

    kept: float
    pruned: float
    changed: float | None


_STEPS: WeakSet[SparseStep] = WeakSet()
"""Those whose hooks are on an optimizer."""


class SparseStep:
    """Adds a method's rule before every optimizer step and renews the masks after it.

    Both run as hooks of the torch optimizer, inside ``optimizer.step()``: gradients are averaged, unscaled and
    clipped by then, and a step that a loss scaler skips is skipped here too. So the rule applies exactly once per
    step, whatever the number of processes or accumulation steps. In a training loop without Trainer this object is
    all that SR-STE needs::

        sparsify(model, NMSparseConfig("2:4"))
        optimizer = torch.optim.AdamW(model.parameters())
        step = SparseStep(model, optimizer, method="sr-ste", decay=2e-4)

    While it trains, the layers keep their masks from step to step. Whoever goes on with another optimizer calls
    `release_masks` or `remove` first, as `SparseTrainer` does at the end of a training.

    A run that goes on from a checkpoint calls `load_state_dict`, or `start` with its step where the schedule is the
    default one.

    Weights that FSDP2 has sharded by rows keep their groups whole on one process: each ranks and decays its own rows,
    and only the counts of `take_flips` and `layer_states`, which all processes call together, are summed over them.

    Padding rows of embeddings that are zero stay zero, as `ZeroPadding` says.

    Another one for the same layers and the same optimizer, as of a notebook's cell that runs again, takes the place of
    the earlier one, which it removes; so it does where the earlier optimizer is gone.

    Args:
        model: A model after `sparsify`, or what torch.compile or DDP made of it.
        optimizer: It holds the sparse weights that train; a frozen one is left alone. What accelerate wraps around an
            optimizer is looked through.
        method: A key of `METHODS`.
        decay: lambda of SR-STE; None takes the method's default.
        schedule: When masks and lambda change.
        steps: Optimizer steps of the whole run; a schedule with fractions needs them, here or in `start`.
        track_groups: Whether to remember which groups ever changed their mask, at one byte a group and one more pass
            over the masks each step.

    Raises:
        ValueError: The method is unknown or fits neither decay, schedule, optimizer nor layers, nothing is sparse, all
            that is sparse is frozen, or the optimizer is none of torch or holds none of the sparse weights, then or in
            a step. In a step: gradients are still scaled, or come from a closure, or the length of the run is not
            known. Weights are sharded and masks have to be kept from step to step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: str,
        decay: float | None = None,
        schedule: Schedule | None = None,
        steps: int = 0,
        track_groups: bool = False,
    ) -> None:
        self.decay, self.schedule = check_method(method, decay, schedule or Schedule())
        self.method = METHODS[method]
        model, optimizer = unwrapped(model), torch_optimizer(optimizer)
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NMLayer)}
        if not self.layers:
            raise ValueError("SparseStep: the model has no N:M layer; call sparsify(model, config) first")
        if any(layer.soft != self.method.soft for layer in self.layers.values()):
            raise ValueError(
                f"SparseStep: method {method!r} takes layers {'with' if self.method.soft else 'without'} a soft "
                f"threshold; call sparsify(model, NMSparseConfig(..., soft={self.method.soft}))"
            )
        if self.method.needs_adam and not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            raise ValueError(
                f"SparseStep: {method!r} reads the moments of torch's Adam or AdamW, got {type(optimizer).__name__}"
            )
        if self.method.needs_lr and any(group["lr"] is None for group in optimizer.param_groups):
            raise ValueError(
                f"SparseStep: {method!r} reads the learning rate, and this {type(optimizer).__name__} finds its own; "
                "give it lr and relative_step=False"
            )
        self._parameter_groups(optimizer)
        self._shards: dict[str, Tensor] = {}  # masks of sharded weights, for the length of a step
        self._name, self._track_groups = method, track_groups
        self._check_shards()
        self._flips: dict[str, Tensor | int] = {}
        self._counted = 0
        self._changed: dict[str, Tensor] | None = None
        self.hooked = ref(optimizer)
        self._replace_earlier()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _STEPS.add(self)
        self._padding = ZeroPadding(model, optimizer)
        with torch.no_grad():
            if self.method.fixed_mask:
                self._fix_masks()
            if track_groups:
                self._changed = {
                    name: layer.weight.new_zeros(layer.weight.numel() // layer.pattern.m, dtype=torch.bool)
                    for name, layer in self.layers.items()
                }
        self.start(0, steps)

    def start(self, step: int, steps: int) -> None:
        """Sets where the run is: before optimizer step ``step`` of ``steps``, counted from 0.

        Raises:
            ValueError: Weights have been sharded since and masks have to be kept from step to step.
        """
        self._check_shards()
        self._padding.attach()
        self.step, self.steps = step, steps
        self._set_pruned_scale()

    def remove(self) -> None:
        """Takes the hooks off; the layers go back to masks ranked in every forward. Once more, it does nothing."""
        if self not in _STEPS:
            return
        _STEPS.discard(self)
        for handle in self._handles:
            handle.remove()
        self._padding.remove()
        for layer in self.layers.values():
            layer.mask, layer.fixed_mask, layer.pruned_scale, layer.master_dtype = None, False, 0.0, None

    def release_masks(self) -> None:
        """Lets the layers rank the masks that follow from their weights in every forward, until the next step.

        It changes no number: masks of a fixed-mask method, and of a schedule with intervals, stay.
        """
        if self._follows_from_weights():
            for layer in self.layers.values():
                layer.mask = None

    def take_flips(self) -> dict[str, Flips]:
        """The flips of each layer since the last call, then counts from zero. Empty before the first step.

        Raises:
            ValueError: A weight has become NaN: on a GPU no step waits to find out.
        """
        steps, counts = self._counted, self._flips
        self._counted, self._flips = 0, {}
        flips = {}
        for name, count in counts.items():
            weight = self.layers[name].weight
            sad = float(_over_shards(torch.as_tensor(count), weight))
            if math.isnan(sad):
                raise ValueError(f"SparseStep: the weight of {name} holds NaN, which has no rank; check the loss")
            flips[name] = Flips(sad / steps, weight.numel())
        return flips

    @torch.no_grad()
    def layer_states(self) -> dict[str, LayerState]:
        """What each layer looks like now."""
        states = {}
        for name, layer in self.layers.items():
            magnitude, mask = layer.rows().abs(), layer.current_mask()
            sums = [apply_mask(magnitude, mask).sum(dtype=torch.float64), magnitude.sum(dtype=torch.float64)]
            sums.append(unpack_bits(mask, magnitude.shape).sum())
            kept, all_weights, number = _over_shards(torch.stack(sums), layer.weight).tolist()
            pruned = (all_weights - kept) / max(layer.weight.numel() - number, 1)
            changed = None if self._changed is None else float(self._changed[name].float().mean())
            states[name] = LayerState(kept / number, pruned, changed)
        return states

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside weights and optimizer, as tensors.

        Masks are among it where they do not follow from the weights, one bit a weight.
        """
        state = {"step": torch.tensor(self.step)}
        if not self._follows_from_weights():
            state |= {f"{name}.mask": layer.current_mask().clone() for name, layer in self.layers.items()}
        if self._changed is not None:
            state |= {f"{name}.changed": pack_bits(changed) for name, changed in self._changed.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where `state_dict` was taken; weights and optimizer are loaded elsewhere.

        Raises:
            ValueError: The state is of other layers, another method or another schedule.
        """
        for key in sorted(self.state_dict().keys() ^ state.keys()):
            raise ValueError(
                f"SparseStep: {key!r} is in one of the saved state and this run only; resume with the model and the "
                "arguments that the run began with"
            )
        self.load_masks(state)
        for name, layer in self.layers.items():
            if self._changed is not None:
                changed = unpack_bits(state[f"{name}.changed"], self._changed[name].shape)
                self._changed[name] = changed.to(layer.weight.device)
        self.start(int(state["step"]), self.steps)

    def load_masks(self, state: Mapping[str, Tensor]) -> None:
        """Takes the masks alone from what `state_dict` gave; there are none where they follow from the weights.

        Raises:
            ValueError: The state is of other layers.
        """
        for name, layer in self.layers.items():
            if f"{name}.mask" in state:
                mask = state[f"{name}.mask"]
                unpack_bits(mask, layer.rows().shape)  # refuses the mask of another layer
                layer.mask = mask.to(layer.weight.device, copy=True)

    def _follows_from_weights(self) -> bool:
        return not self.method.fixed_mask and self.schedule.interval == 1

    def _replace_earlier(self) -> None:
        layers = set(self.layers.values())
        for earlier in list(_STEPS):
            if earlier.hooked() in (None, self.hooked()) and not layers.isdisjoint(earlier.layers.values()):
                earlier.remove()
        for layer in layers:
            if layer.fixed_mask and not self.method.fixed_mask:  # what an earlier method has left
                layer.mask, layer.fixed_mask = None, False

    def _check_shards(self) -> None:
        """Some engines shard the weights once the optimizer is there."""
        for layer in self.layers.values():
            if is_sharded(layer.weight):
                if channel_dim(layer) == 0:
                    raise ValueError(
                        f"SparseStep: FSDP2 would cut the groups of a {type(layer).__name__}, whose input channels "
                        "are its rows; train under DDP"
                    )
                if layer.transposable:
                    raise ValueError(
                        "SparseStep: FSDP2 may cut the blocks of transposable masks, which are four rows high; train "
                        "under DDP"
                    )
                if self._track_groups or not self._follows_from_weights():
                    raise ValueError(
                        f"SparseStep: method {self._name!r}, interval {self.schedule.interval} and track_groups "
                        f"{self._track_groups} keep masks, which sharded weights do not; train under DDP"
                    )
                layer.master_dtype = layer.weight.dtype

    def _fix_masks(self) -> None:
        # From the seed itself, so that all processes draw alike whatever they have drawn before.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        for layer in self.layers.values():
            layer.mask = layer.current_mask()
            # Weights that keep to the pattern already keep their mask: those of a run that goes on.
            if self.method.random_mask and not torch.equal(layer.masked(layer.weight, layer.mask), layer.weight):
                layer.mask = random_mask(layer.rows(), layer.pattern, generator, layer.transposable)
            layer.fixed_mask = True
            layer.finalize()

    def _set_pruned_scale(self) -> None:
        scale = self.schedule.pruned_scale(self.step, self.steps)
        for layer in self.layers.values():
            if layer.pruned_scale != scale:  # a module takes its time over each attribute
                layer.pruned_scale = scale

    def _parameter_groups(self, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
        """The group of each parameter, by identity; some engines give an optimizer other parameters later."""
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(layer.weight) in groups for layer in self.layers.values()):
            if not any(layer.weight.requires_grad for layer in self.layers.values()):
                raise ValueError(
                    "SparseStep: every sparse weight is frozen, so that no rule has anything to do; unfreeze them or "
                    "train without it, in SparseTrainer with sparse_method='dense'"
                )
            raise ValueError("SparseStep: the optimizer holds no sparse weight; build it from this model's parameters")
        return groups

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(value is not None for value in (*args[1:2], kwargs.get("closure"))):
            raise ValueError("SparseStep: a closure computes gradients after the rule has run; call step() without one")
        # A fused optimizer would unscale inside its kernel, after the rule.
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ValueError(
                "SparseStep: gradients are still scaled; call scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        if self.schedule.needs_length and not self.steps:
            raise ValueError("SparseStep: this schedule needs the length of the run; give steps")
        if _skips(optimizer):
            return
        groups = self._parameter_groups(optimizer)
        decay = self.schedule.decay(self.decay, self.step, self.steps)
        for name, layer in self.layers.items():
            weight, grad = layer.weight, layer.weight.grad
            mask = layer.current_mask()
            if is_sharded(weight):
                self._shards[name] = mask
            elif layer.mask is None:
                layer.mask = mask
            group = groups.pop(id(weight), None)  # taken out, so that a weight which two layers share decays once
            if grad is not None and group is not None:
                lr = None if group["lr"] is None else float(group["lr"])
                context = StepContext(lr, decay, layer.pruned_scale, bool(group.get("maximize")))
                if self.method.needs_adam:
                    denominator = layer.in_rows(_adam_denominator(optimizer, group, weight))
                    context = replace(context, adam_denominator=denominator)
                self.method.rule(layer.in_rows(weight), layer.in_rows(grad), mask, context)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if _skips(optimizer):
            return
        renewed = not self.method.fixed_mask and self.schedule.renews_masks(self.step)
        for name, layer in self.layers.items():
            weight = layer.weight
            mask = self._shards.pop(name) if is_sharded(weight) else layer.mask
            assert mask is not None
            flips: Tensor | int = 0
            if renewed:
                before = None if self._changed is None else mask.clone()
                flips = update_mask(mask, layer.rows(), layer.pattern, layer.transposable)
                if self._changed is not None and before is not None:
                    flipped = unpack_bits(before ^ mask, layer.rows().shape)
                    self._changed[name] |= flipped.reshape(-1, layer.pattern.m).any(dim=1)
            if self.method.fixed_mask:
                layer.finalize()  # momentum of earlier steps moves pruned weights too
            self._flips[name] = self._flips.get(name, 0) + flips
        self._counted += 1
        self.step += 1
        self._set_pruned_scale()


def _over_shards(counts: Tensor, weight: Tensor) -> Tensor:
    """The sum of ``counts`` over the processes that hold parts of ``weight``; its copies count once."""
    if not is_sharded(weight):
        return counts
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(weight, DTensor)
    sums = [Partial() if placement.is_shard() else Replicate() for placement in weight.placements]
    return DTensor.from_local(counts.to(local(weight).device), weight.device_mesh, sums).full_tensor()


def _adam_denominator(optimizer: torch.optim.Optimizer, group: dict[str, Any], weight: Tensor) -> Tensor:
    """``sqrt(v) + eps`` as Adam will divide by it in the step that is about to come, bias-corrected."""
    if group.get("amsgrad"):
        raise ValueError("SparseStep: 'masked-decay' does not know the second moment of amsgrad; train without it")
    grad, state, beta = weight.grad, optimizer.state.get(weight, {}), group["betas"][1]
    assert grad is not None
    if group.get("maximize"):
        grad = grad.neg()
    if group["weight_decay"] and not group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)):
        grad = grad.add(weight, alpha=group["weight_decay"])
    moment = grad.square().mul_(1 - beta)
    if "exp_avg_sq" in state:
        moment.add_(state["exp_avg_sq"], alpha=beta)
    step = float(state.get("step", 0)) + 1
    return moment.div_(1 - beta**step).sqrt_().add_(group["eps"])


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch inside of what accelerate wraps around it.

    Raises:
        ValueError: It is none, or one that never called the constructor of its base class and so takes no hooks.
    """
    inner = optimizer
    while any(kind.__module__.startswith("accelerate.") for kind in type(inner).__mro__) and hasattr(
        inner, "optimizer"
    ):
        inner = inner.optimizer
    try:
        torch.optim.Optimizer.register_step_pre_hook(inner, lambda *_: None).remove()
    except AttributeError:
        raise ValueError(
            f"SparseStep: needs an optimizer of torch, got {type(optimizer).__name__}; give the optimizer itself"
        ) from None
    assert isinstance(inner, torch.optim.Optimizer)
    return inner


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` will leave the weights alone: a loss scaler leaves that to the kernel of a fused optimizer."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def check_method(method: str, decay: float | None, schedule: Schedule) -> tuple[float, Schedule]:
    """Refuses an unknown method, and a decay or a schedule that it would not use.

    Returns:
        The decay; the method's own where it is None, 0 where the method has none. The schedule, with the method's own
        fade where it has none.

    Raises:
        ValueError: As said.
    """
    if method not in METHODS:
        raise ValueError(f"sparse_method: got {method!r}; the methods are {', '.join(METHODS)}")
    known = METHODS[method]
    if decay is not None and not (isinstance(decay, int | float) and 0 <= decay < float("inf")):
        raise ValueError(f"sparse_decay: needs a finite number >= 0, got {decay!r}")
    if decay and known.default_decay is None:
        raise ValueError(f"sparse_decay: {method!r} has no decay, got {decay!r}; leave it at 0 or choose 'sr-ste'")
    if schedule.ramp and known.default_decay is None:
        raise ValueError(f"sparse_ramp: {method!r} has no decay to ramp; leave it at 0 or choose 'sr-ste'")
    if (known.fixed_mask or known.soft) and schedule != Schedule():
        raise ValueError(f"sparse_method: {method!r} has no schedule of masks; leave interval, head, tail and fade out")
    if known.default_fade and not schedule.fade:
        schedule = replace(schedule, fade=known.default_fade)
    return (known.default_decay or 0.0) if decay is None else decay, schedule
