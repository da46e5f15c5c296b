"""The Triton kernels behind `cuda`, each one pass over a weight. Importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["best_patterns", "decay_pruned", "masked", "rank", "renew", "soft_threshold"]


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
def best_patterns(weight, patterns, best, changed, count, across, tiles: tl.constexpr):
    """Writes the best transposable pattern of ``tiles`` of ``count`` blocks of 4x4, ``across`` to a row.

    ``patterns`` are 128, of which those that are 0 are none. The rule is that of `masks.transposable_mask`. ``changed``
    turns NaN where a weight is.
    """
    tile = tl.program_id(0).to(tl.int64) * tiles + tl.arange(0, tiles)
    there = tile < count
    corner = (tile // across * across * 4 + tile % across) * 4
    place = tl.arange(0, 128)[None, :]
    pattern = tl.load(patterns + place)
    upper = tl.zeros([tiles, 128], tl.float64)
    lower = tl.zeros([tiles, 128], tl.float64)
    broken = tl.zeros([tiles], tl.int32)
    for row in tl.static_range(4):
        total = tl.zeros([tiles, 128], tl.float64)
        for column in tl.static_range(4):
            own = tl.abs(tl.load(weight + corner + row * across * 4 + column, mask=there, other=0.0).to(tl.float32))
            broken += (own != own).to(tl.int32)
            finite = tl.where(own < 3.4028234663852886e38, own, 3.4028234663852886e38).to(tl.float64)
            total += tl.where((pattern >> (4 * row + column) & 1) != 0, finite[:, None], 0.0)
        if row < 2:
            upper += total
        else:
            lower += total
    sums = tl.where(pattern != 0, upper + lower, -1.0)
    # Patterns with the same upper rows follow each other: the first of the best sums says which these are.
    largest = sums == tl.max(sums, axis=1)[:, None]
    first = tl.min(tl.where(largest, place, 127), axis=1)
    above = tl.load(patterns + first) & 255
    rest = tl.where((pattern & 255) == above[:, None], tl.where(pattern != 0, lower, -1.0), -1.0)
    chosen = tl.min(tl.where(rest == tl.max(rest, axis=1)[:, None], place, 127), axis=1)
    tl.store(best + tile, tl.load(patterns + chosen), mask=there)
    tl.atomic_add(changed, tl.where(tl.sum(broken, axis=0) > 0, float("nan"), 0.0).to(tl.float64))


@triton.jit
def renew(best, mask, changed, count, across, block: tl.constexpr):
    """Writes ``block`` of the ``count`` bytes of a mask from patterns of blocks, and adds how many bits are new."""
    byte = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = byte < count
    bits = tl.zeros([block], tl.int32)
    for half in tl.static_range(2):
        four = byte * 2 + half  # four weights of a row of a block
        row = four // across
        pattern = tl.load(best + row // 4 * across + four % across, mask=there, other=0)
        bits |= (pattern >> (row % 4 * 4).to(tl.int32) & 15) << 4 * half
    before = tl.load(mask + byte, mask=there, other=0).to(tl.int32)
    tl.store(mask + byte, bits.to(tl.uint8), mask=there)
    new = bits ^ before
    flips = tl.zeros([block], tl.int32)
    for bit in tl.static_range(8):
        flips += new >> bit & 1
    tl.atomic_add(changed, tl.sum(flips, axis=0).to(tl.float64))


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
