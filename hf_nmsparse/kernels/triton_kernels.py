"""The Triton kernels behind `cuda`, each one pass over a weight. Importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["decay_pruned", "masked", "rank"]


@triton.jit
def rank(
    weight,
    mask,
    changed,
    groups,
    n: tl.constexpr,
    m: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Writes the mask of ``block`` groups of ``m`` weights and adds to ``changed`` what is new in it.

    A weight stays where fewer than ``n`` others of its group beat it. ``width`` is the power of two that holds ``m``,
    and ``changed`` a double, which a NaN among the weights turns into NaN for good.
    """
    group = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    member = tl.arange(0, width)[None, :]
    place = group[:, None] * m + member
    there = (group < groups)[:, None] & (member < m)
    own = tl.abs(tl.load(weight + place, mask=there, other=0.0))
    lost = tl.zeros([block, width], tl.int32)
    for rival in tl.static_range(m):
        other = tl.abs(tl.load(weight + group * m + rival, mask=group < groups, other=0.0))[:, None]
        lost += ((other > own) | ((other == own) & (rival < member))).to(tl.int32)
    kept = lost < n
    before = tl.load(mask + place, mask=there, other=0) != 0
    tl.store(mask + place, kept, mask=there)
    flips = tl.sum(tl.sum(((kept != before) & there).to(tl.int32), axis=1), axis=0).to(tl.float64)
    broken = tl.sum(tl.sum((own != own).to(tl.int32), axis=1), axis=0)
    tl.atomic_add(changed, tl.where(broken > 0, float("nan"), flips))


@triton.jit
def decay_pruned(weight, mask, gradient, decay, count, block: tl.constexpr):
    """Adds ``decay`` times the weight to the gradient of pruned weights; the others' gradient is not touched."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = place < count
    pruned = (tl.load(mask + place, mask=there, other=1) == 0) & there
    weights = tl.load(weight + place, mask=pruned, other=0.0).to(tl.float32)
    gradients = tl.load(gradient + place, mask=pruned, other=0.0).to(tl.float32)
    tl.store(gradient + place, (gradients + decay * weights).to(gradient.dtype.element_ty), mask=pruned)


@triton.jit
def masked(weight, mask, kept, count, block: tl.constexpr):
    """Writes the kept weights in the number type of ``kept``, +0.0 for the others."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = place < count
    keeps = (tl.load(mask + place, mask=there, other=0) != 0) & there
    weights = tl.load(weight + place, mask=keeps, other=0.0)
    tl.store(kept + place, weights.to(kept.dtype.element_ty), mask=there)
