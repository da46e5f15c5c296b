"""NMLinear, the sparse linear layer of a training, and which layers of a model have a pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_nmsparse.masks import magnitude_mask
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.sharding import local
from hf_nmsparse.srste import masked_linear, sparse_weight

__all__ = ["NMLinear", "sparse_layers"]


class NMLinear(nn.Linear):
    """A linear layer with a dense master weight and an N:M sparse forward.

    It is an ``nn.Linear`` whose class is changed in place, so that state-dict keys, ties, optimizers built earlier,
    autocast, gradient checkpointing, torch.compile and DDP see what they know.

    Attributes:
        pattern: The layer's N:M pattern.
        mask: The mask in use, one bit a weight, as `masks` lays it out; None ranks the weights anew in every forward,
            which is right in any training loop. `SparseStep` keeps it, once per optimizer step, which is cheaper. It
            is no buffer: DDP would broadcast it before every forward. A copy of the layer (deepcopy, pickle) goes
            without, since nobody renews it there.
        fixed_mask: Whether the mask is part of the method (ASP) and survives the loading of other weights, and copies.
        soft: Whether kept weights move towards zero by the group's threshold (S-STE).
        pruned_scale: What pruned weights are multiplied with in the forward: 0 is N:M, 1 is dense. `SparseStep` sets
            it where a `Schedule` asks for it.
        master_dtype: Number type of the master, where the forward may see a copy in another and would have to rank
            that; None where it is the master itself.
    """

    pattern: NMPattern
    mask: Tensor | None
    fixed_mask: bool
    soft: bool
    pruned_scale: float
    master_dtype: torch.dtype | None

    @classmethod
    def from_linear(cls, linear: nn.Linear, pattern: NMPattern, soft: bool = False) -> NMLinear:
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
        linear.soft = soft
        linear.pruned_scale = 0.0
        linear.master_dtype = None
        return linear

    def to_linear(self) -> nn.Linear:
        """Turns the layer itself back into an ``nn.Linear`` that remembers its pattern."""
        del self.mask, self.fixed_mask, self.soft, self.pruned_scale, self.master_dtype
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def current_mask(self) -> Tensor:
        """The mask that the next forward uses, of the rows that lie on this process."""
        return magnitude_mask(local(self.weight), self.pattern) if self.mask is None else self.mask

    def forward(self, input: Tensor) -> Tensor:
        """``input`` is ``[..., in_features]``; returns ``[..., out_features]``.

        Raises:
            ValueError: The TorchScript tracer records it, or a copy in another number type than the master's arrives.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise ValueError(
                "NMLinear: torch.jit.trace and the ONNX exporter that rests on it would record a layer in training "
                "with the masks of now, and wrongly; trace what save_packed or export_dense has written"
            )
        weight = self.weight
        if self.pruned_scale == 1:
            return F.linear(input, weight, self.bias)
        if self.master_dtype is not None and self.master_dtype != weight.dtype:
            raise ValueError(
                f"NMLinear: masks are ranked on the master in {self.master_dtype}, got a copy in {weight.dtype}; "
                "give FSDP2 no param_dtype and train under autocast"
            )
        mask = self.current_mask()
        return masked_linear(input, weight, self.bias, mask, self.pattern, self.soft, self.pruned_scale)

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The N:M sparse weight that the layer makes of ``weight`` and its mask."""
        return sparse_weight(weight, mask, self.pattern, self.soft)

    @torch.no_grad()
    def finalize(self) -> None:
        """Writes what the forward uses into the weight: pruned weights become +0.0.

        Raises:
            ValueError: The forward is not N:M sparse.
        """
        self.check_sparse()
        weight = local(self.weight)
        weight.copy_(self.masked(weight, self.current_mask()))

    def check_sparse(self) -> None:
        """Refuses a layer whose forward uses pruned weights.

        Raises:
            ValueError: It does.
        """
        if self.pruned_scale:
            raise ValueError(
                f"a layer of {self.out_features}x{self.in_features} computes with its pruned weights times "
                f"{self.pruned_scale:g}, so it is not {self.pattern} sparse: its schedule has a dense tail or has not "
                "come to its end"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NMLinear:
        super()._apply(fn, recurse)
        if self.mask is not None:
            self.mask = fn(self.mask).to(torch.uint8)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.fixed_mask:
            self.mask = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of; a mask that follows from the weights is ranked anew there."""
        return self.__dict__ | {"mask": self.mask if self.fixed_mask else None}

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{super().extra_repr()}, pattern={self.pattern}"


def sparse_layers(model: nn.Module) -> dict[str, NMPattern]:
    """The pattern of each layer of ``model`` that has one, by name: in training, packed, or unpacked to nn.Linear."""
    patterns = ((name, getattr(module, "pattern", None)) for name, module in model.named_modules())
    return {name: pattern for name, pattern in patterns if isinstance(pattern, NMPattern)}
