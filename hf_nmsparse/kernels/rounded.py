"""The product with a dense weight rounded to int8 as it stands, as the torch operator ``nmsparse::rounded_linear``.

The float weight is the only one. Its copy in int8 is kept with it and made anew when the weight has changed, so that
exported and compiled graphs, copies and other processes know the float weight alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_nmsparse.kernels import cpu, native
from hf_nmsparse.kernels.order import WIDEST_INT8
from hf_nmsparse.kernels.watched import WatchedParameter, state_of
from hf_nmsparse.rounding import quantize_rows

__all__ = ["RoundedParameter", "linear", "rounded"]


class RoundedParameter(WatchedParameter):
    """A parameter that keeps its rows in int8 beside itself: an ``nn.Parameter`` whose class is changed in place."""

    _kept: tuple[Any, Tensor] | None = None

    def rounded(self) -> Tensor:
        """Its rows as they are now, as `native.repack` lays out ``"dense_int8"``."""
        state = state_of(self)
        if self._kept is None or self._kept[0] != state:
            self._kept = state, _round(self)
        return self._kept[1]


def rounded(weight: Tensor) -> Tensor:
    """The rows of ``weight`` in int8, as `native.repack` lays them out.

    Raises:
        ValueError: The weight is too wide or does not lie on the CPU, or the native library is not used.
    """
    if not weight.is_cpu:
        raise ValueError(f"kernels: the head lies on {weight.device}, not on the CPU; choose head='dense'")
    if type(weight) in (nn.Parameter, WatchedParameter) and not weight.is_inference():
        weight.__class__ = RoundedParameter
    return weight.rounded() if isinstance(weight, RoundedParameter) else _round(weight)


def _round(weight: Tensor) -> Tensor:
    if weight.shape[1] > WIDEST_INT8:
        raise ValueError(f"kernels: int8 takes up to {WIDEST_INT8} inputs, got {weight.shape[1]}; keep it dense")
    values, scale = quantize_rows(weight)
    return native.repack("dense_int8", weight.shape[1], values, scale=scale)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.is_inference():  # nothing counts the changes of tensors that were made in inference mode
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return native.multiply(x, rounded(weight), bias, "dense_int8", weight.shape[0])


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cpu.shape(x, weight.shape[0])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the product without rounding (straight through)."""
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, weight.shape[0])
    return (
        grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None,
        (rows.T @ x.reshape(-1, weight.shape[1])).to(weight.dtype) if ctx.needs_input_grad[1] else None,
        rows.sum(dim=0) if ctx.needs_input_grad[2] else None,
    )


_OPERATORS = torch.library.Library("nmsparse", "FRAGMENT")
_OPERATORS.define("rounded_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_OPERATORS.impl("rounded_linear", _multiply, "CPU")
torch.library.register_fake("nmsparse::rounded_linear", _shape)
torch.library.register_autograd("nmsparse::rounded_linear", _backward, setup_context=_keep_for_backward)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` with the rows of ``weight`` rounded to int8 as they are now.

    It has the errors of `native.multiply` and `rounded`, and is differentiable in all three as if nothing was rounded.
    """
    if not cpu.needs_dispatch(x):
        return _multiply(x, weight, bias)
    result: Tensor = torch.ops.nmsparse.rounded_linear(x, weight, bias)
    return result
