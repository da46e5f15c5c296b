"""Rows of a weight rounded to int8, each with a scale of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_nmsparse.packed_format import CLIPS, INT8_LARGEST

__all__ = ["quantize_rows"]


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to int8 with one scale, which is the one of a few whose squared error is least.

    Scales have 16 significant bits, so that ``values * scale`` is exact in fp32, and quantizing it again gives the same
    values and scale.

    Args:
        weight: ``[rows, columns]``, floating point and finite.

    Returns:
        int8 ``[rows, columns]`` within -127 to 127, and the scales, fp32 ``[rows]``; a row of zeros has the scale 1.
    """
    weight = weight.detach().to(torch.float32)
    largest = weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scale = torch.ones_like(largest)
    error = torch.full_like(largest, torch.inf, dtype=torch.float64)
    for clip in CLIPS:
        bits = (largest * clip / INT8_LARGEST).view(torch.int32)
        short = ((bits + 0x80) & ~0xFF).view(torch.float32)
        short = torch.where(torch.isfinite(short * INT8_LARGEST), short, (bits & ~0xFF).view(torch.float32))
        short = torch.where(short > torch.finfo(torch.float32).tiny, short, 1.0)
        rounded = _round_rows(weight, short)
        # In units of the largest magnitude, so that no square overflows; in fp64, so that no order of summing decides.
        new = (rounded.mul_(short[:, None]) - weight).div_(largest[:, None]).square_().sum(dim=1, dtype=torch.float64)
        scale, error = torch.where(new < error, short, scale), torch.minimum(new, error)
    return _round_rows(weight, scale).to(torch.int8), scale


def _round_rows(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale[:, None]).round_().clamp_(-INT8_LARGEST, INT8_LARGEST)
