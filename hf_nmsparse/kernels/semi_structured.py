"""The product with a 2:4 weight on the sparse tensor cores of NVIDIA GPUs, through torch's semi-structured tensors.

torch hands it to cuSPARSELt. Small products are bound by their launches and often slower than dense ones, so that
`is_faster` measures both where they will run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_nmsparse.pattern import NMPattern

__all__ = ["ROWS", "compress", "is_faster", "linear", "restore", "why_not"]

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
"""Rows of the products that `is_faster` times: from one beam of one sentence to the encoder's batch of documents."""

_STEP = 16  # cuSPARSELt takes 16-bit weights whose sides are multiples of it
_CALLS, _TURNS = 20, 5


def why_not(
    pattern: NMPattern, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a weight cannot be multiplied on sparse tensor cores; None if it can."""
    if not pattern.within_2_of_4:
        return f"{pattern} is no part of 2:4"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes fp16 and bf16 and the weight is {dtype}; load with dtype=torch.bfloat16"
    if out_features % _STEP or in_features % _STEP:
        return f"it takes multiples of {_STEP} and the weight is {out_features}x{in_features}"
    if device.type != "cuda":
        return f"the weight lies on {device}, not on a GPU"
    if not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no sparse tensor cores"
    return None


def compress(weight: Tensor) -> Tensor:
    """A 2:4 weight ``[out_features, in_features]`` as torch's semi-structured tensor: 9/16 of its bytes.

    It asks for cuSPARSELt by name: CUTLASS, torch's other way, does not know Hopper.

    The caller has asked `why_not`, and the weight is 2:4: what breaks the pattern would be lost.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype.*", category=UserWarning)
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(weight.detach().contiguous())


def restore(compressed: Tensor) -> Tensor:
    """The dense weight: products with ones and zeros, so exact."""
    return compressed.to_dense()


def linear(x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias``, differentiable in ``x`` and ``bias``.

    ``x`` is ``[..., in_features]`` on the weight's device and in its number type.

    Raises:
        ValueError: ``x`` has another device or number type.
    """
    if x.dtype != compressed.dtype or x.device != compressed.device:
        raise ValueError(
            f"semi_structured: the weight is {compressed.dtype} on {compressed.device}, got an input of {x.dtype} on "
            f"{x.device}; load the model anew for that, or choose compute='dense'"
        )
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        result: Tensor = _Product.apply(x, compressed, bias)
        return result
    return F.linear(x.contiguous(), compressed, bias)


class _Product(torch.autograd.Function):
    """The product with the gradients of the dense one, for which the weight is restored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.compressed = compressed
        return F.linear(x.contiguous(), compressed, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [grad] = grads
        x = grad @ restore(ctx.compressed) if ctx.needs_input_grad[0] else None
        bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if ctx.needs_input_grad[2] else None
        return x, None, bias


@lru_cache(maxsize=256)
def is_faster(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the sparse product is faster than the dense one for each number of rows in `ROWS`.

    Both are called as a model calls them, and each takes its best of a few turns. A shape is measured once a process.
    """
    pairs = torch.arange(in_features, device=device) % 4 < 2
    weight = torch.randn(out_features, in_features, dtype=dtype, device=device) * pairs
    compressed = compress(weight)
    for rows in ROWS:
        x = torch.randn(rows, in_features, dtype=dtype, device=device)
        if _seconds(partial(linear, x, compressed, None), device) >= _seconds(partial(F.linear, x, weight), device):
            return False
    return True


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of a call among others, on the GPU or on the way to it, whichever is longer."""
    best = float("inf")
    with torch.cuda.device(device), torch.inference_mode():
        for _ in range(_TURNS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call()
            torch.cuda.synchronize()
            start.record()
            for _ in range(_CALLS):
                call()
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) / 1000 / _CALLS)
    return best
