"""SR-STE and its relatives: the straight-through forwards and the rules of each method, each one short function.

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021, arXiv 2102.04010.
Their update is ``W <- W - lr * (grad(mask * W) + decay * (1 - mask) * W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_nmsparse.kernels.choice import kernels_for
from hf_nmsparse.masks import apply_mask
from hf_nmsparse.pattern import NMPattern

__all__ = [
    "METHODS",
    "Method",
    "Rule",
    "StepContext",
    "masked_linear",
    "soft_scale",
    "soft_threshold",
    "sparse_weight",
    "straight_through",
]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, used: Tensor) -> Tensor:
        return used

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(weight: Tensor, used: Tensor) -> Tensor:
    """``used``, whose gradient reaches every weight unchanged, pruned ones included (STE).

    Args:
        weight: ``[out_features, in_features]``, the dense master.
        used: What the forward uses of it, a tensor of its own and of the same shape.
    """
    result: Tensor = _StraightThrough.apply(weight, used)
    return result


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        pattern: NMPattern,
        soft: bool,
        pruned_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.rule = pattern, soft, pruned_scale
        used = sparse_weight(weight, mask, pattern, soft, pruned_scale, x.dtype, transient=True)
        return F.linear(x, used, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        rows = grads[0].reshape(-1, len(weight))  # [rows, out_features]
        to_x = to_weight = to_bias = None
        if wants_x:
            pattern, soft, pruned_scale = ctx.rule
            twice = torch.is_grad_enabled()  # a gradient of this gradient needs the sparse weight later
            with torch.no_grad():
                used = sparse_weight(weight, mask, pattern, soft, pruned_scale, rows.dtype, transient=not twice)
            to_x = rows.mm(straight_through(weight, used) if twice else used).reshape(x.shape)
        if wants_weight:
            to_weight = rows.t().mm(x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if wants_bias:
            to_bias = rows.sum(dim=0).to(weight.dtype)
        return to_x, to_weight, to_bias, None, None, None, None


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    pattern: NMPattern,
    soft: bool = False,
    pruned_scale: float = 0.0,
) -> Tensor:
    """``x @ used.T + bias`` for the `sparse_weight` of ``weight``, whose gradient is straight through.

    The sparse weight is made anew in the backward, so that between the two nothing is kept of it: as a saved copy of
    every layer it would be the largest part of what sparsity costs in memory. Under autocast the product is in the
    number type of autocast, made from the master as it is.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, the dense master.
        bias: ``[out_features]`` or None.
        mask: The mask of ``weight``, as `masks` lays it out.
        pattern: The N:M pattern.
        soft: As in `sparse_weight`.
        pruned_scale: As in `sparse_weight`.

    Returns:
        ``[..., out_features]``.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != weight.dtype:
        raise ValueError(f"NMLinear: the weight is {weight.dtype}, got an input of {x.dtype}; cast one of them")
    result: Tensor = _MaskedLinear.apply(x, weight, bias, mask, pattern, soft, pruned_scale)
    return result


def sparse_weight(
    weight: Tensor,
    mask: Tensor,
    pattern: NMPattern,
    soft: bool = False,
    pruned_scale: float = 0.0,
    dtype: torch.dtype | None = None,
    transient: bool = False,
) -> Tensor:
    """What a forward uses of a weight, a tensor of its own unless ``transient``.

    Args:
        weight: ``[..., in_features]``, the dense master.
        mask: Its mask.
        pattern: The N:M pattern.
        soft: Whether kept weights go through `soft_threshold`.
        pruned_scale: What pruned weights are multiplied with: 0 leaves the pattern.
        dtype: Number type of the result; None is the weight's.
        transient: As in `apply_mask`.
    """
    if not soft:
        return apply_mask(weight, mask, dtype, pruned_scale, transient)
    used = soft_threshold(weight, mask, pattern, transient)
    return used if dtype is None else used.to(dtype)


def soft_threshold(weight: Tensor, mask: Tensor, pattern: NMPattern, transient: bool = False) -> Tensor:
    """S-STE's sparse weight: kept weights move towards zero by the largest magnitude that is pruned in their group.

    So the forward is continuous where a kept and a pruned weight change places (Hu et al., "S-STE: Continuous Pruning
    Function for Efficient 2:4 Sparse Pre-training", NeurIPS 2024). A weight that is N:M sparse already stays as it is.

    Args:
        weight: ``[..., in_features]``.
        mask: Its magnitude mask.
        pattern: The N:M pattern.
        transient: As in `apply_mask`.
    """
    kernels = kernels_for(weight)
    if kernels is not None:
        soft: Tensor = kernels.soft_threshold(weight, mask, pattern, transient)
        return soft
    pruned = apply_mask(weight, ~mask, transient=True).abs_().reshape(-1, pattern.m)
    threshold = pruned[:, 0]
    for member in range(1, pattern.m):  # columns: a reduction over rows of M has no room for a vector unit
        threshold = torch.maximum(threshold, pruned[:, member])
    shrunk = weight - weight.sign() * threshold.repeat_interleave(pattern.m).reshape(weight.shape)
    return apply_mask(shrunk, mask)


def soft_scale(weight: Tensor, mask: Tensor, pattern: NMPattern) -> Tensor:
    """S-STE's scale ``<w, S(w)> / |S(w)|^2``, which brings the thresholded weight closest to the weight, 0-d.

    S-STE takes it once, at the start, and multiplies the thresholded weight with it in every forward. The threshold
    is homogeneous, ``S(b * w) = b * S(w)``, so that `sparsify` multiplies the masters with it instead, and nothing
    has to be remembered.
    """
    soft = soft_threshold(weight, mask, pattern)
    square = soft.square().sum()
    return torch.where(square > 0, (weight * soft).sum() / square, torch.ones_like(square))


@dataclass(frozen=True)
class StepContext:
    """What a rule knows of the optimizer step that it runs before.

    Attributes:
        lr: Learning rate of the weight; None where the optimizer finds its own, as Adafactor can.
        decay: lambda at this step.
        pruned_scale: What the forward multiplied pruned weights with: 0 in an N:M forward, 1 in a dense one.
        maximize: Whether the optimizer goes up the gradient.
        adam_denominator: ``sqrt(v) + eps`` of Adam at this step, bias-corrected, for methods that ask for it.
    """

    lr: float | None
    decay: float = 0.0
    pruned_scale: float = 0.0
    maximize: bool = False
    adam_denominator: Tensor | None = None


Rule = Callable[[Tensor, Tensor, Tensor, StepContext], None]
"""``rule(weight, grad, mask, step)`` edits ``weight`` or ``grad`` in place right before the optimizer steps.

It runs once a step. By then gradients are averaged over processes and accumulation steps, unscaled and clipped, so
that ``decay`` means the same whatever these are. A rule runs without autograd.
"""


def no_decay(weight: Tensor, grad: Tensor, mask: Tensor, step: StepContext) -> None:
    """STE: the dense gradient as it is; SR-STE with decay 0."""


def add_to_gradient(weight: Tensor, grad: Tensor, mask: Tensor, step: StepContext) -> None:
    """SR-STE: ``grad += decay * (1 - mask) * weight``, coupled: the term runs through momentum and Adam's moments.

    Where the optimizer goes up the gradient the term has the other sign, so that the weight shrinks there as well.
    """
    decay = -step.decay if step.maximize else step.decay
    kernels = kernels_for(weight, grad)
    if kernels is not None:
        kernels.decay_pruned(weight, mask, grad, decay)
    else:
        grad.add_(apply_mask(weight, ~mask, transient=True), alpha=decay)


def shrink_weight(weight: Tensor, grad: Tensor, mask: Tensor, step: StepContext) -> None:
    """Decoupled SR-STE: ``weight -= lr * decay * (1 - mask) * weight``, beside the optimizer as AdamW's decay is.

    Adam divides the coupled term by the gradient's RMS and not this one, so that a decay which matches SGD's effect
    is larger here by orders of magnitude: about 0.4 at a learning rate of 5e-4.
    """
    assert step.lr is not None
    weight.sub_(apply_mask(weight, ~mask, transient=True), alpha=step.lr * step.decay)


def decay_in_numerator(weight: Tensor, grad: Tensor, mask: Tensor, step: StepContext) -> None:
    """Masked decay: ``weight -= lr * decay * (1 - mask) * weight / (sqrt(v) + eps)``, beside Adam's own step.

    The moments are those of the loss gradient alone and the term is divided as its first moment is (Huang et al.,
    "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training", AAAI 2025). Weight decay of AdamW
    comes after this term. It takes a weight to zero at most: where gradients are next to nothing the quotient would
    throw it far beyond.
    """
    assert step.lr is not None
    assert step.adam_denominator is not None
    share = (step.lr * step.decay / step.adam_denominator).clamp_(max=1.0)
    weight.sub_(apply_mask(weight, ~mask, transient=True) * share)


def mask_gradient(weight: Tensor, grad: Tensor, mask: Tensor, step: StepContext) -> None:
    """ASP: pruned weights get no gradient, so that they stay at zero (NVIDIA's automatic sparsity)."""
    grad.copy_(apply_mask(grad, mask, transient=True))


def fade_gradient(weight: Tensor, grad: Tensor, mask: Tensor, step: StepContext) -> None:
    """Decaying mask: pruned weights get the gradient of the forward that fades them, so none at the end.

    Kao et al., "Training Recipe for N:M Structured Sparsity with Decaying Pruning Mask", 2022, arXiv 2209.07617.
    """
    grad.copy_(apply_mask(grad, mask, pruned_scale=step.pruned_scale, transient=True))


@dataclass(frozen=True)
class Method:
    """How masked weights are trained.

    Attributes:
        description: One line for readers of model cards and README files.
        rule: Runs on every sparse weight right before the optimizer steps.
        fixed_mask: Masks are taken once, pruned weights set to zero, and never changed. Otherwise masks follow the
            weights after optimizer steps.
        random_mask: The fixed masks are drawn at random rather than ranked.
        default_decay: lambda where the user gives none; None if ``rule`` reads no ``decay``.
        default_fade: `Schedule.fade` where the user gives none.
        needs_adam: ``rule`` reads ``adam_denominator``.
        needs_lr: ``rule`` reads ``lr``.
        soft: The forward takes the soft threshold, which is a matter of `NMSparseConfig` too.
    """

    description: str
    rule: Rule
    fixed_mask: bool = False
    random_mask: bool = False
    default_decay: float | None = None
    default_fade: float = 0.0
    needs_adam: bool = False
    needs_lr: bool = False
    soft: bool = False


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ste": Method("STE: the forward pass uses the masked weights, and every weight gets the gradient", no_decay),
        "sr-ste": Method(
            "SR-STE (Zhou et al., ICLR 2021): straight-through gradients, and pruned weights decay",
            add_to_gradient,
            default_decay=2e-4,
        ),
        "sr-ste-decoupled": Method(
            "decoupled SR-STE: straight-through gradients, and pruned weights decay beside the optimizer",
            shrink_weight,
            default_decay=0.4,
            needs_lr=True,
        ),
        "masked-decay": Method(
            "masked decay (Huang et al., AAAI 2025): straight-through gradients, and pruned weights decay in Adam's "
            "numerator",
            decay_in_numerator,
            default_decay=2e-4,
            needs_adam=True,
            needs_lr=True,
        ),
        "s-ste": Method(
            "S-STE (Hu et al., NeurIPS 2024): a soft threshold in every group, and straight-through gradients",
            no_decay,
            soft=True,
        ),
        "decaying-mask": Method(
            "decaying mask (Kao et al., 2022): pruned weights fade out of the forward pass, and their gradients with "
            "them",
            fade_gradient,
            default_fade=0.5,
        ),
        "asp": Method("ASP (NVIDIA): the mask is taken once and kept", mask_gradient, fixed_mask=True),
        "random": Method("a random mask that is kept, as a control", mask_gradient, fixed_mask=True, random_mask=True),
    }
)
"""The training methods by the name that ``SparseTrainingArguments.sparse_method`` takes.

``asp`` belongs after a dense training: its masks are those of the weights it starts from. ``random`` is a control: what
a network of that many weights learns if nothing chooses them.
"""
