"""NMLayer, a layer in sparse training: linear ones and convolutions. And which layers of a model have a pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hf_nmsparse.masks import magnitude_mask, transposable_mask
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.sharding import local
from hf_nmsparse.srste import masked_linear, sparse_weight, straight_through

__all__ = ["NMConv1d", "NMConv2d", "NMLayer", "NMLinear", "channel_dim", "sparse_layers"]

Layer = TypeVar("Layer", bound="NMLayer")


class NMLayer(nn.Module):
    """A layer with a dense master weight and an N:M sparse forward, beside the stock class that it has as a base too.

    It is a stock layer whose class is changed in place, so that state-dict keys, ties, optimizers built earlier,
    autocast, gradient checkpointing, torch.compile and DDP see what they know.

    Groups lie along the input channels. So everything that looks at groups sees the weight as `rows`, a view with the
    input channels last, whatever the stock layout is.

    Attributes:
        stock: The class that the layer had, and has again after `to_stock`.
        weight: The dense master in the layout of the stock class.
        pattern: The layer's N:M pattern.
        mask: The mask in use, one bit a weight, as `masks` lays it out; None ranks the weights anew in every forward,
            which is right in any training loop. `SparseStep` keeps it, once per optimizer step, which is cheaper. It
            is no buffer: DDP would broadcast it before every forward. A copy of the layer (deepcopy, pickle) goes
            without, since nobody renews it there.
        fixed_mask: Whether the mask is part of the method (ASP) and survives the loading of other weights, and copies.
        transposable: Whether the mask is 2:4 along the columns of the weight too.
        soft: Whether kept weights move towards zero by the group's threshold (S-STE).
        pruned_scale: What pruned weights are multiplied with in the forward: 0 is N:M, 1 is dense. `SparseStep` sets
            it where a `Schedule` asks for it.
        master_dtype: Number type of the master, where the forward may see a copy in another and would have to rank
            that; None where it is the master itself.
    """

    stock: ClassVar[type[nn.Module]]

    weight: Tensor
    pattern: NMPattern
    mask: Tensor | None
    fixed_mask: bool
    transposable: bool
    soft: bool
    pruned_scale: float
    master_dtype: torch.dtype | None

    @classmethod
    def from_stock(
        cls: type[Layer], layer: nn.Module, pattern: NMPattern, soft: bool = False, transposable: bool = False
    ) -> Layer:
        """Turns ``layer`` itself, which is of the stock class, into an N:M layer.

        Raises:
            ValueError: The input channels do not divide into groups.
        """
        weight: Any = layer.weight
        pattern.groups(weight.shape[channel_dim(layer)])
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.pattern = pattern
        layer.mask = None
        layer.fixed_mask = False
        layer.transposable = transposable
        layer.soft = soft
        layer.pruned_scale = 0.0
        layer.master_dtype = None
        return layer

    def to_stock(self) -> Any:
        """Turns the layer itself back into one of its stock class that remembers its pattern."""
        del self.mask, self.fixed_mask, self.transposable, self.soft, self.pruned_scale, self.master_dtype
        self.__class__ = self.stock  # type: ignore[assignment]
        return self

    def rows(self) -> Tensor:
        """The weight that lies on this process, with its input channels last: a view, which may have gaps."""
        return self.in_rows(self.weight)

    def in_rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape, as its gradient is, likewise."""
        return local(tensor).movedim(channel_dim(self), -1)

    def current_mask(self) -> Tensor:
        """The mask that the next forward uses, of the rows that lie on this process."""
        return self.mask_of(self.rows()) if self.mask is None else self.mask

    def mask_of(self, rows: Tensor) -> Tensor:
        """The mask that follows from a weight, given with its input channels last."""
        return transposable_mask(rows) if self.transposable else magnitude_mask(rows, self.pattern)

    def forward(self, input: Tensor) -> Tensor:
        """Input and output are those of the stock layer.

        Raises:
            ValueError: The TorchScript tracer records it, or a copy in another number type than the master's arrives.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise ValueError(
                f"{type(self).__name__}: torch.jit.trace and the ONNX exporter that rests on it would record a layer "
                "in training with the masks of now, and wrongly; trace what save_packed or export_dense has written"
            )
        if self.pruned_scale == 1:
            dense: Tensor = super().forward(input)  # the stock class comes next
            return dense
        if self.master_dtype is not None and self.master_dtype != self.weight.dtype:
            raise ValueError(
                f"{type(self).__name__}: masks are ranked on the master in {self.master_dtype}, got a copy in "
                f"{self.weight.dtype}; give FSDP2 no param_dtype and train under autocast"
            )
        return self.sparse_forward(input)

    def sparse_forward(self, input: Tensor) -> Tensor:
        """The forward with the masked weight, whose gradient is straight through."""
        raise NotImplementedError

    def masked(self, weight: Tensor, mask: Tensor, pruned_scale: float = 0.0) -> Tensor:
        """What the layer makes of ``weight``, which has the stock layout, and its mask: N:M sparse where nothing fades.

        It has the strides of ``weight``, and its number type.
        """
        used = sparse_weight(self.in_rows(weight), mask, self.pattern, self.soft, pruned_scale)
        used = used.movedim(-1, channel_dim(self))
        return used if used.stride() == weight.stride() else torch.empty_like(weight).copy_(used)

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
                f"a layer of {'x'.join(map(str, self.weight.shape))} computes with its pruned weights times "
                f"{self.pruned_scale:g}, so it is not {self.pattern} sparse: its schedule has a dense tail or has not "
                "come to its end"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
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


class NMLinear(NMLayer, nn.Linear):
    """A linear layer in sparse training; its weight is ``[out_features, in_features]``."""

    stock = nn.Linear

    def sparse_forward(self, input: Tensor) -> Tensor:
        """``input`` is ``[..., in_features]``; returns ``[..., out_features]``."""
        mask = self.current_mask()
        return masked_linear(input, self.weight, self.bias, mask, self.pattern, self.soft, self.pruned_scale)


class _NMConvolution(NMLayer):
    """A convolution over all input channels; each output channel and place of its kernel has groups of its own."""

    bias: Tensor | None
    _conv_forward: Any  # the stock class's, which pads as it is told

    def sparse_forward(self, input: Tensor) -> Tensor:
        """Input and output are those of the stock layer; a weight that lies channels-last stays so."""
        with torch.no_grad():
            used = self.masked(self.weight, self.current_mask(), self.pruned_scale)
        result: Tensor = self._conv_forward(input, straight_through(self.weight, used), self.bias)
        return result


class NMConv1d(_NMConvolution, nn.Conv1d):
    """A convolution in sparse training; its weight is ``[out_channels, in_channels, length]``."""

    stock = nn.Conv1d


class NMConv2d(_NMConvolution, nn.Conv2d):
    """A convolution in sparse training; its weight is ``[out_channels, in_channels, height, width]``."""

    stock = nn.Conv2d


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a layer's weight that holds the input channels: the second, but in transformers' ``Conv1D``."""
    return 1 if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) else 0


def sparse_layers(model: nn.Module) -> dict[str, NMPattern]:
    """The pattern of each layer of ``model`` that has one, by name: in training, packed, or unpacked to stock."""
    patterns = ((name, getattr(module, "pattern", None)) for name, module in model.named_modules())
    return {name: pattern for name, pattern in patterns if isinstance(pattern, NMPattern)}
