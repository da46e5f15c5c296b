"""SR-STE: the straight-through forward and the decay rules, each one short function.

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021, arXiv 2102.04010.
Their update is ``W <- W - lr * (grad(mask * W) + decay * (1 - mask) * W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hf_nmsparse.kernels import native
from hf_nmsparse.masks import apply_mask

__all__ = ["METHODS", "Method", "Rule", "straight_through"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return apply_mask(weight, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(weight: Tensor, mask: Tensor) -> Tensor:
    """The masked weight, whose gradient reaches every weight, pruned ones included (STE).

    Args:
        weight: ``[out_features, in_features]``, the dense master.
        mask: Booleans of the same shape; True keeps.
    """
    masked: Tensor = _StraightThrough.apply(weight, mask)
    return masked


Rule = Callable[[Tensor, Tensor, Tensor, float, float], None]
"""``rule(weight, grad, mask, lr, decay)`` edits ``weight`` or ``grad`` in place right before the optimizer steps.

It runs once a step. By then gradients are averaged over processes and accumulation steps, unscaled and clipped, so
that ``decay`` means the same whatever these are. A rule runs without autograd.
"""


def no_decay(weight: Tensor, grad: Tensor, mask: Tensor, lr: float, decay: float) -> None:
    """STE: the dense gradient as it is; SR-STE with decay 0."""


def add_to_gradient(weight: Tensor, grad: Tensor, mask: Tensor, lr: float, decay: float) -> None:
    """SR-STE: ``grad += decay * (1 - mask) * weight``, coupled: the term runs through momentum and Adam's moments."""
    if native.can_rank(weight) and native.can_rank(grad) and mask.is_contiguous():
        native.decay_pruned(weight, mask, grad, decay)
    else:
        grad.add_(apply_mask(weight, ~mask), alpha=decay)


def shrink_weight(weight: Tensor, grad: Tensor, mask: Tensor, lr: float, decay: float) -> None:
    """Decoupled SR-STE: ``weight -= lr * decay * (1 - mask) * weight``, beside the optimizer as AdamW's decay is.

    Adam divides the coupled term by the gradient's RMS and not this one, so that a decay which matches SGD's effect
    is larger here by orders of magnitude: about 0.4 at a learning rate of 5e-4.
    """
    weight.sub_(apply_mask(weight, ~mask), alpha=lr * decay)


def mask_gradient(weight: Tensor, grad: Tensor, mask: Tensor, lr: float, decay: float) -> None:
    """ASP: pruned weights get no gradient, so that they stay at zero (NVIDIA's automatic sparsity)."""
    grad.masked_fill_(~mask, 0.0)  # a product would turn an infinite gradient into NaN


@dataclass(frozen=True)
class Method:
    """How masked weights are trained.

    Attributes:
        rule: Runs on every sparse weight right before the optimizer steps.
        fixed_mask: Masks are taken once, pruned weights set to zero, and never changed. Otherwise masks follow the
            weights after every optimizer step.
        default_decay: lambda where the user gives none; None if ``rule`` reads no ``decay``.
    """

    rule: Rule
    fixed_mask: bool = False
    default_decay: float | None = None


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ste": Method(no_decay),
        "sr-ste": Method(add_to_gradient, default_decay=2e-4),
        "sr-ste-decoupled": Method(shrink_weight, default_decay=0.4),
        "asp": Method(mask_gradient, fixed_mask=True),
    }
)
"""The training methods by the name that ``SparseTrainingArguments.sparse_method`` takes."""
