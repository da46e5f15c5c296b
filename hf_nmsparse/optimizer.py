"""SparseStep: what happens to N:M layers around ``optimizer.step``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_nmsparse.layers import NMLinear
from hf_nmsparse.masks import magnitude_mask, update_mask
from hf_nmsparse.srste import METHODS

__all__ = ["Flips", "SparseStep"]


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


class SparseStep:
    """Adds a method's rule before every optimizer step and renews the masks after it.

    Both run as hooks of the torch optimizer, inside ``optimizer.step()``: gradients are averaged, unscaled and
    clipped by then, and a step that a loss scaler skips is skipped here too. So the rule applies exactly once per
    step, whatever the number of processes or accumulation steps. In a training loop without Trainer this object is
    all that SR-STE needs::

        sparsify(model, NMSparseConfig("2:4"))
        optimizer = torch.optim.AdamW(model.parameters())
        step = SparseStep(model, optimizer, method="sr-ste", decay=2e-4)

    Args:
        model: A model after `sparsify`.
        optimizer: It holds the sparse weights that train; a frozen one is left alone.
        method: A key of `METHODS`.
        decay: lambda of SR-STE; None takes the method's default.

    Raises:
        ValueError: The method is unknown, the decay is negative or of no use to the method, nothing is sparse, or the
            optimizer holds none of the sparse weights, then or in a step. In a step: gradients are still scaled, or
            come from a closure.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, method: str, decay: float | None = None
    ) -> None:
        self.decay = check_method(method, decay)
        self.method = METHODS[method]
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NMLinear)}
        if not self.layers:
            raise ValueError("SparseStep: the model has no N:M layer; call sparsify(model, config) first")
        self._learning_rates(optimizer)
        self._flips: dict[str, Tensor] = {}
        self._steps = 0
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if self.method.fixed_mask:
            self._fix_masks()

    def remove(self) -> None:
        """Takes the hooks off; the layers go back to masks ranked in every forward."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers.values():
            layer.mask, layer.fixed_mask = None, False

    def take_flips(self) -> dict[str, Flips]:
        """The flips of each layer since the last call, then counts from zero. Empty before the first step."""
        steps, flips = self._steps, self._flips
        self._steps, self._flips = 0, {}
        return {name: Flips(int(count) / steps, self.layers[name].weight.numel()) for name, count in flips.items()}

    @torch.no_grad()
    def _fix_masks(self) -> None:
        for layer in self.layers.values():
            layer.mask, layer.fixed_mask = layer.current_mask(), True
            layer.finalize()

    def _learning_rates(self, optimizer: torch.optim.Optimizer) -> dict[int, Any]:
        """The learning rate of each parameter, by identity; some engines give an optimizer other parameters later."""
        lr = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(layer.weight) in lr for layer in self.layers.values()):
            raise ValueError("SparseStep: the optimizer holds no sparse weight; build it from this model's parameters")
        return lr

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(value is not None for value in (*args[1:2], kwargs.get("closure"))):
            raise ValueError("SparseStep: a closure computes gradients after the rule has run; call step() without one")
        # A fused optimizer would unscale inside its kernel, after the rule.
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ValueError(
                "SparseStep: gradients are still scaled; call scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        if _skips(optimizer):
            return
        lr = self._learning_rates(optimizer)
        for layer in self.layers.values():
            weight, grad = layer.weight, layer.weight.grad
            if layer.mask is None:
                layer.mask = magnitude_mask(weight, layer.pattern)
            weight_lr = lr.pop(id(weight), None)  # taken out, so that a weight which two layers share decays once
            if grad is not None and weight_lr is not None:
                self.method.rule(weight, grad, layer.mask, float(weight_lr), self.decay)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if _skips(optimizer):
            return
        self._steps += 1
        for name, layer in self.layers.items():
            assert layer.mask is not None
            if self.method.fixed_mask:
                flips = torch.zeros((), dtype=torch.int64)
            else:
                flips = update_mask(layer.mask, layer.weight, layer.pattern)
            self._flips[name] = self._flips[name] + flips if name in self._flips else flips


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` will leave the weights alone: a loss scaler leaves that to the kernel of a fused optimizer."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def check_method(method: str, decay: float | None) -> float:
    """Refuses an unknown method and a decay that it would not use.

    Returns:
        The decay; the method's own where it is None, 0 where the method has none.

    Raises:
        ValueError: As said.
    """
    if method not in METHODS:
        raise ValueError(f"sparse_method: got {method!r}; the methods are {', '.join(METHODS)}")
    if decay is None:
        return METHODS[method].default_decay or 0.0
    if not 0 <= decay < float("inf"):
        raise ValueError(f"sparse_decay: needs a finite number >= 0, got {decay!r}")
    if decay and METHODS[method].default_decay is None:
        raise ValueError(f"sparse_decay: {method!r} has no decay, got {decay!r}; leave it at 0 or choose 'sr-ste'")
    return decay
