"""The Triton kernels behind `cuda`, each one pass over a weight. Importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["decay_pruned", "masked", "rank", "soft_threshold"]


@triton.jit
def rank(weight, mask, changed, count, n: tl.constexpr, m: tl.constexpr, block: tl.constexpr):
    """Writes ``block`` bytes of the mask of ``count`` weights and adds to ``changed`` how many bits are new.

    A weight stays where fewer than ``n`` others of its group of ``m`` beat it. ``changed`` is a double, which a NaN
    among the weights turns into NaN for good.
    """
    byte = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    bit = tl.arange(0, 8)[None, :]
    place = byte[:, None] * 8 + bit
    there = place < count
    first = place // m * m
    own = tl.abs(tl.load(weight + place, mask=there, other=0.0))
    lost = tl.zeros([block, 8], tl.int32)
    for member in tl.static_range(m):
        rival = first + member
        other = tl.abs(tl.load(weight + rival, mask=there, other=0.0))
        lost += ((other > own) | ((other == own) & (rival < place))).to(tl.int32)
    kept = ((lost < n) & there).to(tl.int32)
    before = tl.load(mask + byte, mask=byte * 8 < count, other=0).to(tl.int32)
    tl.store(mask + byte, tl.sum(kept << bit, axis=1).to(tl.uint8), mask=byte * 8 < count)
    flips = tl.sum(tl.sum(kept ^ (before[:, None] >> bit & 1), axis=1), axis=0).to(tl.float64)
    broken = tl.sum(tl.sum((own != own).to(tl.int32), axis=1), axis=0)
    tl.atomic_add(changed, tl.where(broken > 0, float("nan"), flips))


@triton.jit
def _keeps(mask, place, there):
    """Whether ``mask`` keeps the weights at ``place``."""
    return (tl.load(mask + place // 8, mask=there, other=0).to(tl.int32) >> (place % 8).to(tl.int32) & 1) != 0


@triton.jit
def decay_pruned(weight, mask, gradient, decay, count, block: tl.constexpr):
    """Adds ``decay`` times the weight to the gradient of pruned weights; the others' gradient is not touched."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = place < count
    pruned = (_keeps(mask, place, there) == 0) & there
    weights = tl.load(weight + place, mask=pruned, other=0.0).to(tl.float32)
    gradients = tl.load(gradient + place, mask=pruned, other=0.0).to(tl.float32)
    tl.store(gradient + place, (gradients + decay * weights).to(gradient.dtype.element_ty), mask=pruned)


@triton.jit
def masked(weight, mask, kept, pruned_scale, count, block: tl.constexpr):
    """Writes weights in the number type of ``kept``, pruned ones times ``pruned_scale``, or +0.0 where that is 0."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = place < count
    keeps = _keeps(mask, place, there)
    weights = tl.load(weight + place, mask=there & (keeps | (pruned_scale != 0)), other=0.0)
    used = tl.where(keeps | (pruned_scale == 0), weights, (weights * pruned_scale).to(weights.dtype))
    tl.store(kept + place, used.to(kept.dtype.element_ty), mask=there)


@triton.jit
def soft_threshold(weight, mask, soft, count, m: tl.constexpr, block: tl.constexpr):
    """Writes kept weights, nearer to zero by the largest pruned magnitude of their group of ``m``, and +0.0."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = place < count
    first = place // m * m
    threshold = tl.zeros([block], tl.float32)
    for member in tl.static_range(m):
        rival = first + member
        magnitude = tl.abs(tl.load(weight + rival, mask=there, other=0.0).to(tl.float32))
        threshold = tl.maximum(threshold, tl.where(_keeps(mask, rival, there), 0.0, magnitude))
    weights = tl.load(weight + place, mask=there, other=0.0).to(tl.float32)
    nearer = tl.where(weights < 0, weights + threshold, weights - threshold)
    kept = tl.where(_keeps(mask, place, there), nearer, 0.0)
    tl.store(soft + place, kept.to(soft.dtype.element_ty), mask=there)
