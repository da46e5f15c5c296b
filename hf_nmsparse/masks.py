"""Weights to N:M masks, and what can be counted on masks.

A mask is a flat uint8 tensor with a bit for each weight, set where it is kept: row after row, eight weights a byte, the
first in the lowest bit; zeros fill the last byte. So it takes a thirty-second of the memory of its fp32 weight.
`unpack_bits` makes booleans of it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from hf_nmsparse.kernels.choice import kernels_for
from hf_nmsparse.kernels.native import nan_error
from hf_nmsparse.pattern import TRANSPOSABLE, TWO_ROWS, NMPattern

__all__ = [
    "apply_mask",
    "count_flips",
    "count_violations",
    "magnitude_mask",
    "pack_bits",
    "random_mask",
    "transposable_mask",
    "unpack_bits",
    "update_mask",
]


def magnitude_mask(weight: Tensor, pattern: NMPattern) -> Tensor:
    """The mask that keeps the N largest magnitudes of every M weights in a row.

    Exactly N are kept in every group: of equal magnitudes the lower index wins, so that a mask is a function of the
    weights alone on every device. Groups are ranked by counting, for each weight, the pairs it loses; half of the
    M^2 comparisons decide both members of a pair. fp32 weights on the CPU go through the native library and those on a
    GPU through Triton, where they are there, in one pass and to the same mask.

    Args:
        weight: ``[..., in_features]``, floating point. Rank the fp32 master, never a 16-bit copy: the copy has ties
            that the master has not.
        pattern: ``in_features`` must be a multiple of ``pattern.m``.

    Returns:
        The mask, uint8 ``[ceil(weights / 8)]``.

    Raises:
        ValueError: The row does not divide into groups, or a weight is NaN.
    """
    pattern.groups(weight.shape[-1])
    weight = weight.contiguous()  # which a convolution's is not where its input channels are seen last
    if kernels_for(weight) is not None:
        mask = torch.zeros(-(-weight.numel() // 8), dtype=torch.uint8, device=weight.device)
        if math.isnan(update_mask(mask, weight, pattern)):
            raise nan_error(weight)
        return mask
    magnitude = weight.detach().abs()
    # Magnitudes cannot cancel, so that their sum is NaN only where one of them is. A compiled graph cannot branch on
    # it: there the next ranking outside of the graph, in SparseStep or finalize, finds the NaN.
    if not torch.compiler.is_compiling() and torch.isnan(magnitude.sum()):
        raise nan_error(weight)
    magnitude = magnitude.reshape(-1, pattern.m).t()  # [M, groups], a view
    if pattern.m > 8:
        # A column of wide groups touches a cache line per weight, M times over; one copy costs less.
        magnitude = magnitude.contiguous()
    kept = _two_of_four(magnitude) if pattern == NMPattern(2, 4) else _by_rank(magnitude, pattern)
    return pack_bits(torch.stack(kept, dim=1))


def update_mask(mask: Tensor, weight: Tensor, pattern: NMPattern, transposable: bool = False) -> Tensor | int:
    """Writes the magnitude mask of ``weight`` over ``mask``, or the transposable one.

    Returns:
        SAD: how many bits changed. From a GPU it is a 0-d tensor, NaN where a weight is, so that training need not
        wait for it.

    Raises:
        ValueError: As `magnitude_mask`, but for a NaN on a GPU.
    """
    weight = weight.contiguous()
    kernels = kernels_for(weight)
    if kernels is not None:
        changed: Tensor | int
        changed = kernels.rank_transposable(weight, mask) if transposable else kernels.rank(weight, mask, pattern)
        return changed
    new = transposable_mask(weight) if transposable else magnitude_mask(weight, pattern)
    flips = count_flips(mask, new)
    mask.copy_(new)
    return flips


_BLOCKS = 2**11  # that are searched at a time: the sums of all would be many times as large as the weight


def transposable_mask(weight: Tensor) -> Tensor:
    """The mask that is 2:4 along rows and along columns, and keeps the largest sum of magnitudes under that.

    So the transposed weight, which the gradient of a layer's input is made with, is 2:4 sparse too (Hubara et al.,
    "Accelerated Sparse Neural Training", NeurIPS 2021). Blocks of 4x4 have 90 such patterns and are independent of each
    other: the best of the 90 sums is exact, where the 2-approximation of the paper bounds what a search may lose. Of
    patterns with equal sums the one stays that keeps the lower indices in the first row where they differ.

    The rule on every device: sums are those of rows, of the two upper and of the two lower ones, then of all four, each
    rounded to fp64, which is exact for fp32 unless exponents lie far apart. Two lower rows have the largest sum that
    goes with the upper ones, two upper rows the largest that they and such lower ones have together, and of equal ones
    the first stays. Infinity counts as the largest number of fp32. Which weights take the native library or Triton is
    as in `magnitude_mask`.

    Args:
        weight: ``[out_features, in_features]``, floating point, both multiples of 4.

    Returns:
        The mask, uint8 ``[ceil(weights / 8)]``.

    Raises:
        ValueError: The weight does not divide into blocks, or a number is NaN.
    """
    if weight.dim() != 2 or weight.shape[0] % 4 or weight.shape[1] % 4:
        raise ValueError(f"mask: transposable 2:4 needs a matrix of multiples of 4, got {list(weight.shape)}")
    weight = weight.contiguous()
    kernels = kernels_for(weight)
    if kernels is not None:
        mask = torch.zeros(-(-weight.numel() // 8), dtype=torch.uint8, device=weight.device)
        if math.isnan(kernels.rank_transposable(weight, mask)):
            raise nan_error(weight)
        return mask
    magnitude = weight.detach().abs()
    if not torch.compiler.is_compiling() and torch.isnan(magnitude.sum()):
        raise nan_error(weight)
    rows, columns = weight.shape
    blocks = magnitude.reshape(rows // 4, 4, columns // 4, 4).permute(1, 3, 0, 2).reshape(4, 4, -1)
    best = torch.cat([_best_patterns(part) for part in blocks.split(_BLOCKS, dim=2)])
    kept = best[:, None] >> torch.arange(16, device=weight.device) & 1  # [blocks, 16]
    return pack_bits(kept.bool().reshape(rows // 4, columns // 4, 4, 4).transpose(1, 2))


def _best_patterns(magnitude: Tensor) -> Tensor:
    """Of blocks the best of `TRANSPOSABLE`: magnitudes ``[4, 4, blocks]``, rows first, to int64 ``[blocks]``."""
    magnitude = magnitude.double().clamp(max=torch.finfo(torch.float32).max)
    first, second = zip(*combinations(range(4), 2), strict=True)
    rows = magnitude[:, first] + magnitude[:, second]  # [4, 6, blocks]
    upper, lower = ((rows[i, :, None] + rows[i + 1]).flatten(0, 1) for i in (0, 2))  # [36, blocks]
    fits, halves = torch.tensor(_lower_rows(), device=rows.device), torch.tensor(TWO_ROWS, device=rows.device)
    rest, choice = lower[fits].max(dim=1)  # of equal ones max and argmax take the first
    above = (upper + rest).argmax(dim=0)
    below = fits[above, choice.gather(0, above[None]).squeeze(0)]
    return halves[above] | halves[below] << 8


@lru_cache(maxsize=1)
def _lower_rows() -> list[list[int]]:
    """For each of `TWO_ROWS` the places of those that fit below it: six, among which 1, 2 or 6 come again and again."""
    fits = [[k for k, below in enumerate(TWO_ROWS) if above | below << 8 in TRANSPOSABLE] for above in TWO_ROWS]
    return [(places * 6)[:6] for places in fits]


def _two_of_four(magnitude: Tensor) -> list[Tensor]:
    """A weight stays when it wins two of its three comparisons: the majority of three bits."""
    a, b, c, d = magnitude.unbind(0)
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d

    def majority(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        either = x | y
        either &= z  # in place: what a large weight waits for is fresh memory
        either |= x & y
        return either

    keep_a, keep_b, keep_c = majority(ab, ac, ad), majority(~ab, bc, bd), majority(~ac, ~bc, cd)
    return [keep_a, keep_b, keep_c, keep_a ^ keep_b ^ keep_c]  # two are kept: d where one of the others is


def _by_rank(magnitude: Tensor, pattern: NMPattern) -> list[Tensor]:
    """A weight stays when fewer than N others of its group beat it."""
    members = magnitude.unbind(0)
    # A weight starts as if it lost to all behind it; each of them that it beats takes one loss back.
    losses = [torch.full_like(member, pattern.m - 1 - i, dtype=torch.int8) for i, member in enumerate(members)]
    for i in range(pattern.m):
        for j in range(i + 1, pattern.m):
            first_wins = (members[i] >= members[j]).view(torch.int8)
            losses[j] += first_wins
            losses[i] -= first_wins
    return [count < pattern.n for count in losses]


def apply_mask(
    weight: Tensor,
    mask: Tensor,
    dtype: torch.dtype | None = None,
    pruned_scale: float = 0.0,
    transient: bool = False,
) -> Tensor:
    """``weight`` where ``mask`` keeps it, +0.0 elsewhere.

    A product would write -0.0 for negative weights, which some 2:4 compressors do not take for zero. It is no part of
    a graph of gradients: `straight_through` is.

    Args:
        weight: Floating point.
        mask: Its mask.
        dtype: Number type of the result; None is the weight's.
        pruned_scale: What pruned weights are multiplied with where it is not 0.
        transient: The caller is done with the result before this thread asks for the next one, and it may lie in
            memory that is used again.
    """
    kernels = kernels_for(weight)
    if kernels is not None:
        made: Tensor = kernels.masked(weight, mask, dtype, pruned_scale, transient)
        return made
    keeps, bits = unpack_bits(mask, weight.shape), _BITS.get(weight.dtype)
    if pruned_scale or bits is None or weight.device.type != "cpu":
        pruned = weight * pruned_scale if pruned_scale else weight.new_zeros(())
        kept = torch.where(keeps, weight, pruned)
    else:  # on CPUs a select takes several times as long as an "and" with all ones or none
        kept = (weight.view(bits) & keeps.to(bits).neg_()).view(weight.dtype)
    return kept if dtype in (None, kept.dtype) else kept.to(dtype)


_BITS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def random_mask(weight: Tensor, pattern: NMPattern, generator: torch.Generator, transposable: bool = False) -> Tensor:
    """A mask that keeps N of every M weights at random, each choice as likely as any other.

    Args:
        weight: Gives shape and device.
        pattern: The N:M pattern.
        generator: On the CPU, so that the mask does not depend on the device.
        transposable: Whether it is 2:4 along columns too.
    """
    drawn = torch.rand(weight.shape, generator=generator, device="cpu")
    return (transposable_mask(drawn) if transposable else magnitude_mask(drawn, pattern)).to(weight.device)


# Eight booleans, a byte each, are one little-endian int64: the first is its lowest byte.
_ONES = 0x0101010101010101
_DIAGONAL = 0x8040201008040201 - 2**64  # bit k of byte k


def pack_bits(booleans: Tensor) -> Tensor:
    """Booleans as a mask: eight a byte, the first in the lowest bit; zeros fill the last byte."""
    flat = booleans.flatten()
    if len(flat) % 8:
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    # Each factor of two moves one boolean to its place in the highest byte, and no two meet anywhere.
    return (flat.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def unpack_bits(mask: Tensor, shape: torch.Size) -> Tensor:
    """The booleans of a mask; the inverse of `pack_bits`.

    Raises:
        ValueError: They are fewer or more than ``shape`` holds.
    """
    if mask.dtype != torch.uint8 or mask.shape != (-(-shape.numel() // 8),):
        raise ValueError(
            f"unpack_bits: {shape.numel()} booleans take {-(-shape.numel() // 8)} bytes, got {mask.dtype} of "
            f"{list(mask.shape)}; the file belongs to another model"
        )
    # All eight bytes get all bits, byte k keeps bit k, and a carry into its highest bit tells whether that was set.
    bits = (mask.to(torch.int64) * _ONES & _DIAGONAL) + 0x7F * _ONES >> 7 & _ONES
    return bits.view(torch.bool)[: shape.numel()].reshape(shape)


def count_violations(weight: Tensor, pattern: NMPattern) -> int:
    """Groups of ``weight`` ([..., in_features]) with more than N non-zero weights."""
    pattern.groups(weight.shape[-1])
    nonzero = (weight.detach() != 0).reshape(-1, pattern.m).sum(dim=1)
    return int((nonzero > pattern.n).sum())


def count_flips(old: Tensor, new: Tensor) -> Tensor:
    """SAD, the sum of absolute differences of two masks: the bits that differ, as a 0-d int64 tensor.

    It stays a tensor so that counting on a GPU does not wait for it.
    """
    return unpack_bits(old ^ new, torch.Size([8 * len(old)])).sum()
