"""The sparse linear layers: NMLinear for training, PackedLinear for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.srste import straight_through

__all__ = ["NMLinear", "sparse_layers"]


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


def sparse_layers(model: nn.Module) -> dict[str, NMPattern]:
    """The pattern of each layer of ``model`` that has one, by name: in training, packed, or unpacked to nn.Linear."""
    patterns = ((name, getattr(module, "pattern", None)) for name, module in model.named_modules())
    return {name: pattern for name, pattern in patterns if isinstance(pattern, NMPattern)}
