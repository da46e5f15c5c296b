"""Rounding to int8 and bf16, and weights of other patterns as 2:4 ones, as arrays of NumPy. This needs no torch.

What `packing` and `rounding` do to tensors, bit by bit.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_nmsparse.packed_format import CLIPS, INT8_LARGEST, read_ranks
from hf_nmsparse.pattern import NMPattern

__all__ = ["as_2_of_4", "bf16_bits", "dense_rows", "from_bf16", "quantize_rows"]

Array = NDArray[Any]

_PIECE = 1 << 16  # numbers that stay in a core's cache while they are looked at
_TINY = np.finfo(np.float32).tiny


def from_bf16(bits: Array) -> Array:
    """fp32 of bf16, whose bits stand in uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_bits(numbers: Array) -> Array:
    """fp32 that is finite, rounded to bf16, halves to even; the bits stand in uint16."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def quantize_rows(weight: Array) -> tuple[Array, Array]:
    """`rounding.quantize_rows` of an fp32 array ``[rows, columns]``: int8 of that shape, and fp32 ``[rows]``."""
    values, scales = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
    rows = max(1, _PIECE // max(1, weight.shape[1]))
    with np.errstate(all="ignore"):  # of rows of zeros, and of numbers that are nearly infinite
        for start in range(0, len(weight), rows):
            piece = slice(start, start + rows)
            values[piece], scales[piece] = _quantize(weight[piece])
    return values, scales


def _quantize(weight: Array) -> tuple[Array, Array]:
    largest = np.abs(weight).max(axis=1, initial=0)
    scale, error = np.ones_like(largest), np.full(largest.shape, np.inf)
    for clip in CLIPS:
        bits = (largest * np.float32(clip) / np.float32(INT8_LARGEST)).view(np.int32)
        short = ((bits + 0x80) & ~0xFF).view(np.float32)
        short = np.where(np.isfinite(short * np.float32(INT8_LARGEST)), short, (bits & ~0xFF).view(np.float32))
        short = np.where(short > _TINY, short, np.float32(1))
        off = _round(weight, short)
        off *= short[:, None]
        off -= weight
        off /= largest[:, None]
        off *= off
        new = off.sum(axis=1, dtype=np.float64)
        scale, error = np.where(new < error, short, scale), np.minimum(new, error)
    return _round(weight, scale).astype(np.int8), scale


def _round(weight: Array, scale: Array) -> Array:
    rounded = weight / scale[:, None]
    np.rint(rounded, out=rounded)
    return np.clip(rounded, -INT8_LARGEST, INT8_LARGEST, out=rounded)


def dense_rows(values: Array, codes: Array, pattern: NMPattern) -> Array:
    """The dense weight of kept values and their checked codes, zero where nothing was kept."""
    groups = values.shape[1] // pattern.n
    mask = _kept(read_ranks(codes, pattern)[:, :groups], pattern)
    dense = np.zeros((len(values), groups * pattern.m), values.dtype)
    dense[mask] = values.reshape(-1)
    return dense


def _kept(ranks: Array, pattern: NMPattern) -> Array:
    """The mask that codes stand for, ``[rows, groups]`` to booleans ``[rows, groups * M]``."""
    later = comb(pattern.m, pattern.n) - 1 - ranks.astype(np.int64)
    missing = np.full_like(later, pattern.n)
    mask = np.empty((*ranks.shape, pattern.m), bool)
    for position in range(pattern.m):
        rest = pattern.m - 1 - position
        beyond = np.array([comb(rest, left) for left in range(pattern.n + 1)])[missing]
        kept = (beyond <= later) & (missing > 0)
        mask[..., position] = kept
        later -= beyond * kept
        missing -= kept
    return mask.reshape(len(ranks), -1)


_PAIRS = np.array(list(combinations(range(4), 2)))  # by their codes
_CODE_OF_MASK = np.zeros(16, np.uint8)
_CODE_OF_MASK[(1 << _PAIRS).sum(axis=1)] = range(6)
_COUNT = np.array([mask.bit_count() for mask in range(16)])


def _filled(mask: int) -> int:
    """Two places of four: what a group lacks it fills up with the lowest of the others."""
    others = [1 << place for place in range(4) if not mask >> place & 1]
    return mask | sum(others[: max(0, 2 - mask.bit_count())])


_FILLED = np.array([_filled(mask) for mask in range(16)])


def as_2_of_4(dense: Array) -> tuple[Array, Array]:
    """Kept values ``[rows, columns / 2]`` and codes of a weight ``[rows, columns]`` with two non-zeros of four at most.

    Raises:
        ValueError: A group has more.
    """
    rows, columns = dense.shape
    groups = dense.reshape(rows, columns // 4, 4)
    masks = ((groups != 0) << np.arange(4)).sum(axis=2)
    if (_COUNT[masks] > 2).any():
        raise ValueError("as_2_of_4: a group of four holds more than two weights; compute it dense")
    ranks = _CODE_OF_MASK[_FILLED[masks]]
    values = np.take_along_axis(groups, _PAIRS[ranks], axis=2).reshape(rows, columns // 2)
    bits = np.unpackbits(ranks[..., None], axis=2, count=3, bitorder="little").reshape(rows, -1)
    return values, np.packbits(bits, axis=1, bitorder="little")
