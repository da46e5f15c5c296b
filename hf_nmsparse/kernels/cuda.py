"""Masks and decay of weights on GPUs: one pass over the weight each, where torch's operators take a dozen.

The kernels are Triton's, which comes with torch's builds for GPUs. Where it is missing everything works in plain torch,
more slowly. Nothing here waits for the GPU.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hf_nmsparse.kernels.native import check_mask
from hf_nmsparse.pattern import TRANSPOSABLE, NMPattern

__all__ = ["can_rank", "decay_pruned", "masked", "rank", "rank_transposable", "soft_threshold"]

_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024
_TILES = 16  # blocks of 4x4 that a program searches


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from hf_nmsparse.kernels import triton_kernels

    return triton_kernels


def can_rank(weight: Tensor) -> bool:
    """Whether the kernels take this weight: on a GPU, in fp32, bf16 or fp16, an ordinary tensor without gaps."""
    return (
        weight.is_cuda
        and type(weight) in (Tensor, torch.nn.Parameter)
        and weight.dtype in _NUMBERS
        and weight.is_contiguous()
        and not torch.compiler.is_compiling()
        and _has_triton()
    )


def rank(weight: Tensor, mask: Tensor, pattern: NMPattern) -> Tensor:
    """Writes the magnitude mask of ``weight`` over ``mask``.

    Args:
        weight: ``[..., in_features]`` that `can_rank` takes; ``in_features`` is a multiple of ``pattern.m``.
        mask: Its bits of before, as `masks` lays them out.
        pattern: The pattern.

    Returns:
        How many bits of ``mask`` changed, a 0-d fp64 tensor on the device; NaN where a weight is NaN, and ``mask``
        is undefined then.
    """
    check_mask(weight, mask)
    changed = torch.zeros((), dtype=torch.float64, device=weight.device)
    if weight.numel():
        with torch.cuda.device_of(weight):
            _kernels().rank[_blocks(weight)](
                weight.detach(), mask, changed, weight.numel(), pattern.n, pattern.m, _BLOCK // 8
            )
    return changed


def rank_transposable(weight: Tensor, mask: Tensor) -> Tensor:
    """Writes the mask of ``weight`` that is 2:4 along rows and columns over ``mask``.

    Args:
        weight: ``[out_features, in_features]`` that `can_rank` takes, both multiples of 4.
        mask: As in `rank`.

    Returns:
        As `rank`. It takes two launches: a byte of the mask may be shared by blocks of 4x4 in different rows.
    """
    check_mask(weight, mask)
    changed = torch.zeros((), dtype=torch.float64, device=weight.device)
    if weight.numel():
        columns, blocks = weight.shape[1], weight.numel() // 16
        best = torch.empty(blocks, dtype=torch.int32, device=weight.device)
        with torch.cuda.device_of(weight):
            _kernels().best_patterns[(-(-blocks // _TILES),)](
                weight.detach(), _patterns(weight.device), best, changed, blocks, columns // 4, _TILES
            )
            _kernels().renew[_blocks(weight)](best, mask, changed, mask.numel(), columns // 4, _BLOCK // 8)
    return changed


@lru_cache
def _patterns(device: torch.device) -> Tensor:
    """The 90 patterns, sixteen bits each, and then zeros up to 128."""
    patterns = [*TRANSPOSABLE, *[0] * (128 - len(TRANSPOSABLE))]
    return torch.tensor(patterns, dtype=torch.int32, device=device)


def decay_pruned(weight: Tensor, mask: Tensor, gradient: Tensor, decay: float) -> None:
    """``gradient += decay * weight`` where ``mask`` prunes; both are contiguous and of one shape."""
    check_mask(weight, mask)
    assert gradient.is_contiguous()
    assert gradient.shape == weight.shape
    if weight.numel():
        with torch.cuda.device_of(weight):
            _kernels().decay_pruned[_blocks(weight)](weight.detach(), mask, gradient, decay, weight.numel(), _BLOCK)


def masked(
    weight: Tensor,
    mask: Tensor,
    dtype: torch.dtype | None = None,
    pruned_scale: float = 0.0,
    transient: bool = False,
) -> Tensor:
    """As `native.masked`; torch's allocator keeps freed memory of GPUs, so that ``transient`` changes nothing."""
    check_mask(weight, mask)
    kept = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    if weight.numel():
        with torch.cuda.device_of(weight):
            _kernels().masked[_blocks(weight)](weight.detach(), mask, kept, pruned_scale, weight.numel(), _BLOCK)
    return kept


def soft_threshold(weight: Tensor, mask: Tensor, pattern: NMPattern, transient: bool = False) -> Tensor:
    """As `native.soft_threshold`; ``transient`` changes nothing here."""
    check_mask(weight, mask)
    soft = torch.empty_like(weight, requires_grad=False)
    if weight.numel():
        with torch.cuda.device_of(weight):
            _kernels().soft_threshold[_blocks(weight)](weight.detach(), mask, soft, weight.numel(), pattern.m, _BLOCK)
    return soft


def _blocks(weight: Tensor) -> tuple[int]:
    return (-(-weight.numel() // _BLOCK),)
