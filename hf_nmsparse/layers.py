"""The sparse linear layers: NMLinear for training, PackedLinear for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_nmsparse.kernels import reference
from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.packing import pack, packed_shapes, unpack
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.srste import straight_through

__all__ = ["NMLinear", "PackedLinear", "sparse_layers"]


class NMLinear(nn.Linear):
    """A linear layer with a dense master weight and an N:M sparse forward.

    It is an ``nn.Linear`` whose class is changed in place, so that state-dict keys, ties, optimizers built earlier,
    autocast, gradient checkpointing, torch.compile and DDP see what they know.

    Attributes:
        pattern: The layer's N:M pattern.
        mask: The mask in use, a boolean of the weight's shape, one byte a weight; None ranks the weights anew in
            every forward, which is right in any training loop. `SparseStep` keeps it, once per optimizer step, which
            is cheaper. It is no buffer: DDP would broadcast it before every forward.
        fixed_mask: Whether the mask is part of the method (ASP) and survives the loading of other weights.
    """

    pattern: NMPattern
    mask: Tensor | None
    fixed_mask: bool

    @classmethod
    def from_linear(cls, linear: nn.Linear, pattern: NMPattern) -> NMLinear:
        """Turns ``linear`` itself into an NMLinear.

        Raises:
            ValueError: ``in_features`` does not divide into groups.
        """
        pattern.groups(linear.in_features)
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.pattern = pattern
        linear.mask = None
        linear.fixed_mask = False
        return linear

    def to_linear(self) -> nn.Linear:
        """Turns the layer itself back into an ``nn.Linear`` that remembers its pattern."""
        del self.mask, self.fixed_mask
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def current_mask(self) -> Tensor:
        """The mask that the next forward uses, ``[out_features, in_features]``."""
        return magnitude_mask(self.weight, self.pattern) if self.mask is None else self.mask

    def forward(self, input: Tensor) -> Tensor:
        """``input`` is ``[..., in_features]``; returns ``[..., out_features]``."""
        return F.linear(input, straight_through(self.weight, self.current_mask()), self.bias)

    @torch.no_grad()
    def finalize(self) -> None:
        """Writes the mask into the weight: pruned weights become +0.0."""
        self.weight.copy_(apply_mask(self.weight, self.current_mask()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NMLinear:
        super()._apply(fn, recurse)
        if self.mask is not None:
            self.mask = fn(self.mask).bool()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.fixed_mask:
            self.mask = None

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{super().extra_repr()}, pattern={self.pattern}"


class PackedLinear(nn.Module):
    """A linear layer that holds its weight packed and never dense.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        pattern: The N:M pattern of the weight.
        bias: Whether the layer has a bias.
        device: Where the tensors lie.
        dtype: Dtype of values and bias.

    Attributes:
        weight: The kept values, ``[out_features, in_features / M * N]``.
        weight_indices: Their places, uint8; see `packing`.
        bias: ``[out_features]`` or None.
        pattern: The N:M pattern.

    Raises:
        ValueError: ``in_features`` does not divide into groups.
    """

    weight_indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: NMPattern,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.pattern = in_features, out_features, pattern
        values, codes = packed_shapes(out_features, in_features, pattern)
        self.weight = nn.Parameter(torch.zeros(values, device=device, dtype=dtype))
        self.register_buffer("weight_indices", torch.zeros(codes, device=device, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, pattern: NMPattern, name: str = "weight") -> PackedLinear:
        """Packs ``linear``, whose weight is ``pattern`` sparse; its bias is shared, not copied.

        Raises:
            ValueError: The weight breaks the pattern; ``name`` is what the message calls it.
        """
        packed = cls(linear.in_features, linear.out_features, pattern, bias=False, device="meta")
        tensors = pack(linear.weight, pattern, name)
        packed.weight = nn.Parameter(tensors["weight"], requires_grad=linear.weight.requires_grad)
        packed.weight_indices = tensors["weight_indices"]
        packed.bias = linear.bias
        return packed.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the same weight, dense, that remembers its pattern; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dense_weight(), requires_grad=self.weight.requires_grad)
        linear.bias = self.bias  # type: ignore[assignment]
        linear.pattern = self.pattern  # type: ignore[assignment]
        return linear.train(self.training)

    def dense_weight(self) -> Tensor:
        """The weight as a stock layer holds it, ``[out_features, in_features]``, detached."""
        return unpack(self.weight.detach(), self.weight_indices, self.pattern)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` is ``[..., in_features]``; returns ``[..., out_features]``."""
        return reference.linear(input, self.weight, self.weight_indices, self.bias, self.pattern)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}"
        )


def sparse_layers(model: nn.Module) -> dict[str, NMPattern]:
    """The pattern of each layer of ``model`` that has one, by name: in training, packed, or unpacked to nn.Linear."""
    patterns = ((name, getattr(module, "pattern", None)) for name, module in model.named_modules())
    return {name: pattern for name, pattern in patterns if isinstance(pattern, NMPattern)}
