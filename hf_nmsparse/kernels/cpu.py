"""The product with a packed weight on CPUs, as the torch operator ``nmsparse::linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_nmsparse.kernels import native
from hf_nmsparse.number_types import VALUE_DTYPES

__all__ = ["linear", "needs_dispatch", "preferred_format"]

_OPERATORS = torch.library.Library("nmsparse", "DEF")
_OPERATORS.define("linear(Tensor x, Tensor packed, Tensor? bias, str format, SymInt out_features) -> Tensor")
_OPERATORS.define("weight(Tensor packed, str format, SymInt out_features, SymInt in_features) -> Tensor")
_OPERATORS.impl("linear", native.multiply, "CPU")


def weight(packed: Tensor, format: str, out_features: int, in_features: int) -> Tensor:
    """The dense weight, fp32 ``[out_features, in_features]``."""
    dense, scale = native.restore(packed, format, out_features, in_features)
    return dense.to(torch.float32) if scale is None else dense * scale[:, None]


_OPERATORS.impl("weight", weight, "CPU")


def shape(x: Tensor, out_features: int) -> Tensor:
    """What a graph knows of a product with a packed weight.

    Raises:
        ValueError: The graph is for ONNX.
    """
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            "kernels: ONNX has no products with packed weights; call set_compute(model, 'dense', head='dense') before "
            "torch.onnx.export"
        )
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_shape(x: Tensor, packed: Tensor, bias: Tensor | None, format: str, out_features: int) -> Tensor:
    return shape(x, out_features)


def _weight_shape(packed: Tensor, format: str, out_features: int, in_features: int) -> Tensor:
    return packed.new_empty((out_features, in_features), dtype=torch.float32)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, _, ctx.format, ctx.out_features = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(packed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of ``x`` and ``bias``; for int8 as if activations were not rounded (straight through)."""
    (packed,) = ctx.saved_tensors
    dense: Tensor = torch.ops.nmsparse.weight(packed, ctx.format, ctx.out_features, ctx.in_features)
    bias = grad.reshape(-1, ctx.out_features).sum(dim=0) if ctx.needs_input_grad[2] else None
    return grad @ dense.to(grad.dtype), None, bias, None, None


torch.library.register_fake("nmsparse::linear", _linear_shape)
torch.library.register_fake("nmsparse::weight", _weight_shape)
torch.library.register_autograd("nmsparse::linear", _backward, setup_context=_keep_for_backward)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, format: str, out_features: int) -> Tensor:
    """``x @ W.T + bias`` with the arguments and errors of `native.multiply`, differentiable in ``x`` and ``bias``.

    Where nothing needs torch's dispatcher the library is called past it: its time is a good part of a small product's.
    """
    if needs_dispatch(x):
        result: Tensor = torch.ops.nmsparse.linear(x, packed, bias, format, out_features)
        return result
    return native.multiply(x, packed, bias, format, out_features)


def needs_dispatch(x: Tensor) -> bool:
    """Whether a graph is built or traced; other tensors than plain ones have no memory, or record what is done."""
    return (
        torch.is_grad_enabled() or type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]  # a documented function that is not in torch's __all__
    )


# There is no format for fp16: its values are kept as they are in fp32.
_FASTEST = {dtype: name for name, dtype in VALUE_DTYPES.items()} | {torch.float16: "fp32"}


def preferred_format(values: torch.dtype) -> str:
    """The fastest format that keeps values of this number type as they are.

    Raises:
        ValueError: There is none.
    """
    if values not in _FASTEST:
        raise ValueError(
            f"kernels: models compute in fp32, fp16 or bf16, got {values}; choose one of these, or compute='dense'"
        )
    return _FASTEST[values]
