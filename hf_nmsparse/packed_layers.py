"""The layers that hold a trained weight: as the file does, in the order of a kernel, or rounded beside an embedding."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_nmsparse.kernels import cpu, native, rounded, semi_structured
from hf_nmsparse.kernels.order import format_of, takes_codes
from hf_nmsparse.number_types import VALUE_DTYPES
from hf_nmsparse.packed_format import check_weight, packed_shapes
from hf_nmsparse.packing import pack, stored, unpack
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.rounding import quantize_rows

__all__ = ["Int8Head", "KernelLinear", "PackedLinear", "SemiStructuredLinear"]


class PackedLinear(nn.Module):
    """A linear layer that holds its weight as the packed file does, and never dense.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        pattern: The N:M pattern of the weight.
        bias: Whether the layer has a bias.
        device: Where the tensors lie.
        dtype: Number type of inputs and bias, and of the values if they are not int8.
        int8: Whether the values are int8 with a scale for each row.

    Attributes:
        weight: The kept values, ``[out_features, in_features / M * N]``.
        weight_indices: Their places, uint8; see `packing`.
        weight_scale: fp32 ``[out_features]`` with int8 values, else None.
        bias: ``[out_features]`` or None.
        pattern: The N:M pattern.
        dtype: Number type of inputs and outputs.

    Raises:
        ValueError: ``in_features`` does not divide into groups.
    """

    weight_indices: Tensor
    weight_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: NMPattern,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        int8: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.pattern = in_features, out_features, pattern
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        values, codes = packed_shapes(out_features, in_features, pattern)
        empty = torch.zeros(values, device=device, dtype=torch.int8 if int8 else dtype)
        self.weight = nn.Parameter(empty, requires_grad=not int8)
        self.register_buffer("weight_indices", torch.zeros(codes, device=device, dtype=torch.uint8))
        self.register_buffer(
            "weight_scale", torch.ones(out_features, device=device, dtype=torch.float32) if int8 else None
        )
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, pattern: NMPattern, name: str = "weight") -> PackedLinear:
        """Packs ``linear``, whose weight is ``pattern`` sparse; its bias is shared, not copied.

        Raises:
            ValueError: The weight breaks the pattern; ``name`` is what the message calls it.
        """
        packed = cls(linear.in_features, linear.out_features, pattern, False, "meta", linear.weight.dtype)
        tensors = pack(linear.weight, pattern, name)
        packed.weight = nn.Parameter(tensors["weight"], requires_grad=linear.weight.requires_grad)
        packed.weight_indices = tensors["weight_indices"]
        packed.bias = linear.bias
        return packed.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the same weight, dense, that remembers its pattern; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dense_weight())
        linear.bias = self.bias  # type: ignore[assignment]
        linear.pattern = self.pattern  # type: ignore[assignment]
        return linear.train(self.training)

    def dense_weight(self) -> Tensor:
        """The weight as a stock layer holds it, ``[out_features, in_features]`` of `dtype`, detached."""
        dense = unpack(self.weight.detach(), self.weight_indices, self.pattern)
        return dense if self.weight_scale is None else (dense * self.weight_scale[:, None]).to(self.dtype)

    def packed_tensors(self) -> dict[str, Tensor]:
        """The weight as the file holds it, by the last part of the keys."""
        tensors = {"weight": self.weight.detach(), "weight_indices": self.weight_indices}
        return tensors if self.weight_scale is None else tensors | {"weight_scale": self.weight_scale}

    def forward(self, input: Tensor) -> Tensor:
        """The product in plain torch, slow, and right by construction: what the kernels are checked against.

        ``input`` is ``[..., in_features]``; returns ``[..., out_features]``. Float values get their gradient.
        """
        if self.weight_scale is not None:
            return F.linear(input, self.dense_weight(), self.bias)
        return F.linear(input, unpack(self.weight, self.weight_indices, self.pattern), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if scale is not None and self.weight_scale is not None and self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)  # scales stay fp32 whatever the model is cast to
        return self

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        values = str(self.weight.dtype).removeprefix("torch.")
        return _describe(self, f"values={values}")


class KernelLinear(nn.Linear):
    """A linear layer that holds its weight, and nothing else of it, in the order of the CPU kernels.

    Its state dict has the tensors of the packed file, and it pickles as them, because the order in memory is of use to
    this machine's vector unit only. Processes of one machine hand each other the memory itself.
    It is an ``nn.Linear`` to PEFT and others who put layers around it: its input gets the gradient of the dense layer.

    Attributes:
        kernel_weight: The weight, flat bytes.
        bias: ``[out_features]`` or None.
        pattern: The N:M pattern.
        format: ``"fp32"``, ``"bf16"`` or ``"int8"``: the numbers in which it computes. With int8, inputs are rounded to
            eight bits as they come, each row with its own range.
        kernel_format: How the weight lies in memory, a key of `native.FORMATS`.
        dtype: Number type of inputs and outputs.
    """

    kernel_weight: Tensor

    def __init__(self, packed: PackedLinear, format: str) -> None:
        """Takes the weight of ``packed`` over; its bias is shared.

        Raises:
            ValueError: There is no kernel for the pattern or the number type, the weight does not lie on the CPU, or
                the native library is not used.
        """
        super(nn.Linear, self).__init__()  # which would make a dense weight
        self._check(packed, format)
        self.in_features, self.out_features, self.pattern = packed.in_features, packed.out_features, packed.pattern
        self.dtype, self.format = packed.dtype, format
        self.kernel_format = format_of(packed.pattern, packed.in_features, format) or format
        self.bias = packed.bias  # type: ignore[assignment]
        self.register_buffer("kernel_weight", self._repacked(packed.packed_tensors()), persistent=False)
        self.train(packed.training)

    def _check(self, packed: PackedLinear, format: str) -> None:
        cpu.preferred_format(packed.dtype)  # refuses what no kernel computes in
        if format_of(packed.pattern, packed.in_features, format) is None:
            raise ValueError(
                f"kernels: no {format} kernel for {packed.pattern} with {packed.in_features} inputs; choose "
                "compute='dense'"
            )
        if packed.weight.device.type != "cpu":
            raise ValueError(
                f"kernels: the weight lies on {packed.weight.device}, not on the CPU; choose compute='dense'"
            )

    def _repacked(self, tensors: dict[str, Tensor]) -> Tensor:
        """The weight of the file's tensors in the order of the kernels."""
        values, codes, scale = tensors["weight"], tensors["weight_indices"], tensors.get("weight_scale")
        if self.format == "int8":
            if scale is None:
                values, scale = quantize_rows(values)
        else:
            values = (values if scale is None else values * scale[:, None]).to(VALUE_DTYPES[self.format])
            scale = None
        if not takes_codes(self.kernel_format):
            dense = unpack(values, codes, self.pattern)
            return native.repack(self.kernel_format, self.in_features, dense, scale=scale)
        if self.pattern != NMPattern(2, 4):
            both = pack(unpack(values, codes, self.pattern), NMPattern(2, 4))
            values, codes = both["weight"], both["weight_indices"]
        return native.repack(self.kernel_format, self.in_features, values, codes, scale)

    def _restored(self) -> tuple[Tensor, Tensor | None]:
        """The dense weight, and the scales of int8."""
        return native.restore(self.kernel_weight, self.kernel_format, self.out_features, self.in_features)

    def packed_tensors(self) -> dict[str, Tensor]:
        """The weight as the file holds it, by the last part of the keys."""
        dense, scale = self._restored()
        tensors = pack(dense if scale is not None else dense.to(self.dtype), self.pattern)
        return tensors if scale is None else tensors | {"weight_scale": scale}

    def to_packed(self) -> PackedLinear:
        """The layer with its weight as the file holds it; the bias is shared."""
        packed = PackedLinear(
            self.in_features, self.out_features, self.pattern, False, "meta", self.dtype, self.format == "int8"
        )
        tensors = self.packed_tensors()
        packed.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        packed.weight_indices, packed.weight_scale = tensors["weight_indices"], tensors.get("weight_scale")
        packed.bias = self.bias
        return packed.train(self.training)

    def dense_weight(self) -> Tensor:
        """The weight as a stock layer holds it, ``[out_features, in_features]`` of `dtype`."""
        dense, scale = self._restored()
        return dense.to(self.dtype) if scale is None else (dense * scale[:, None]).to(self.dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Shape, number type and device of the dense weight, without its numbers: models and PEFT ask for these."""
        shape = torch.empty((self.out_features, self.in_features), dtype=self.dtype, device="meta")
        if torch.compiler.is_compiling():
            return shape
        weight = shape.as_subclass(_PackedAway)
        weight.place = self.kernel_weight.device
        return weight

    def requires_grad_(self, requires_grad: bool = True) -> KernelLinear:
        """As torch's; models do not ask it of their layers, and whoever asks it of this one wants the weight trained.

        Raises:
            ValueError: Gradients are asked for, and the weight can have none.
        """
        if requires_grad:
            raise ValueError(
                "kernels: a weight that lies packed cannot be trained; call prepare_for_training(model) to train the "
                "model, or load it with compute='dense' to train this layer"
            )
        super().requires_grad_(False)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """``input`` is ``[..., in_features]``; returns ``[..., out_features]``."""
        return cpu.linear(input, self.kernel_weight, self.bias, self.kernel_format, self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KernelLinear:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for key, tensor in self.packed_tensors().items():
            destination[prefix + key] = tensor
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        keys = ("weight", "weight_indices", *(["weight_scale"] if self.format == "int8" else []))
        tensors = {key: state_dict[prefix + key] for key in keys if prefix + key in state_dict}
        missing, unexpected, errors = args[2:5]
        missing += [prefix + key for key in keys if key not in tensors]
        known: list[str] = []
        rest: Any = (*args[:3], known, errors)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        unexpected += [key for key in known if key.removeprefix(prefix) not in keys]
        if len(tensors) == len(keys):
            shape = (self.out_features, self.in_features)
            try:
                held = {key: stored(tensor, "state dict") for key, tensor in tensors.items()}
                values, codes, scale = held["weight"], held["weight_indices"], held.get("weight_scale")
                check_weight(values, codes, self.pattern, values.dtype, shape, prefix[:-1], scale)
                self.kernel_weight = self._repacked(tensors)
            except ValueError as error:
                errors.append(f"{prefix}weight: {error}")
        elif "weight" in tensors:  # which a load that is not strict would leave out without a word
            errors.append(
                f"{prefix}weight: the layer is packed, got a weight without its codes or scale; load the model with "
                "compute='dense' to give it dense weights"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {"kernel_weight": None}
        return state | {"packed": self.packed_tensors()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = state.pop("packed")
        super().__setstate__(state)
        self.kernel_weight = self._repacked(tensors)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return _describe(self, f"format={self.format}")


class _PackedAway(Tensor):
    """What a layer shows as its weight: whoever asks for more than what kind of tensor it is gets an error."""

    place: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:
            return args[0].place
        if func not in _QUESTIONS:
            raise ValueError(
                "kernels: the numbers of a weight that lies packed are asked for; read them with layer.dense_weight(), "
                "or call prepare_for_training(model) before you add adapters that read or change them, as a merge does"
            )
        return super().__torch_function__(func, types, args, kwargs or {})


_QUESTIONS = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "layout", "ndim", "requires_grad", "is_meta", "is_cuda", "is_cpu", "is_leaf", "grad")
} | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.__len__,
    Tensor.__hash__,
    Tensor.__repr__,
}


def _describe(layer: PackedLinear | KernelLinear, more: str) -> str:
    return (
        f"in_features={layer.in_features}, out_features={layer.out_features}, bias={layer.bias is not None}, "
        f"pattern={layer.pattern}, {more}"
    )


def _rebuilt(kind: type[KernelLinear], state: dict[str, Any]) -> KernelLinear:
    layer = kind.__new__(kind)
    nn.Module.__setstate__(layer, state)
    return layer


def _handed_over(layer: KernelLinear) -> tuple[Any, ...]:
    """How a layer goes to another process of this machine: with the memory of its weight, which both share then."""
    return _rebuilt, (type(layer), layer.__dict__.copy())


ForkingPickler.register(KernelLinear, _handed_over)


class SemiStructuredLinear(KernelLinear):
    """A linear layer that computes on the sparse tensor cores of an NVIDIA GPU, in fp16 or bf16.

    Its weight stays in the number type and on the device that it was made with.
    """

    def __init__(self, packed: PackedLinear) -> None:
        """Takes the weight of ``packed`` over; its bias is shared.

        Raises:
            ValueError: The GPU, torch, the number type, the shape or the pattern does not allow it.
        """
        super().__init__(packed, "semi_structured")

    def _check(self, packed: PackedLinear, format: str) -> None:
        shape = packed.out_features, packed.in_features
        reason = semi_structured.why_not(packed.pattern, *shape, packed.dtype, packed.weight.device)
        if reason is not None:
            raise ValueError(f"semi_structured: {reason}; or choose compute='dense'")

    def _repacked(self, tensors: dict[str, Tensor]) -> Tensor:
        dense = unpack(tensors["weight"], tensors["weight_indices"], self.pattern)
        scale = tensors.get("weight_scale")
        return semi_structured.compress((dense if scale is None else dense * scale[:, None]).to(self.dtype))

    def _restored(self) -> tuple[Tensor, Tensor | None]:
        return semi_structured.restore(self.kernel_weight), None

    def forward(self, input: Tensor) -> Tensor:
        """``input`` is ``[..., in_features]``; returns ``[..., out_features]``."""
        return semi_structured.linear(input, self.kernel_weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KernelLinear:
        weight, self.kernel_weight = self.kernel_weight, None  # type: ignore[assignment]
        super()._apply(fn, recurse)
        self.kernel_weight = weight
        return self


class Int8Head(nn.Linear):
    """An output projection that multiplies in int8 and keeps its float weight, which embeddings share.

    It is an ``nn.Linear`` whose class is changed in place: ties, state dict and files are those of the float weight.
    Each forward computes with that weight as it is then, rounded to eight bits a row; see `rounded`.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Head:
        """Turns ``linear`` itself into an Int8Head.

        Raises:
            ValueError: The weight does not lie on the CPU, or the native library is not used.
        """
        rounded.rounded(linear.weight)
        linear.__class__ = cls
        assert isinstance(linear, cls)
        return linear

    def to_linear(self) -> nn.Linear:
        """Turns the layer itself back into an ``nn.Linear``."""
        if isinstance(self.weight, rounded.RoundedParameter):
            self.weight.to_parameter()
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def forward(self, input: Tensor) -> Tensor:
        """``input`` is ``[..., in_features]``; returns ``[..., out_features]``."""
        return rounded.linear(input, self.weight, self.bias)
