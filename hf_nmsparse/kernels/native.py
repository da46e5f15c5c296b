"""The functions of the native library on CPU tensors, on torch's threads."""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_nmsparse.kernels.library import FORMATS, library, numbers_of, status
from hf_nmsparse.kernels.order import packed_bytes
from hf_nmsparse.kernels.order import repack as repack_arrays
from hf_nmsparse.number_types import VALUE_DTYPES
from hf_nmsparse.pattern import NMPattern

__all__ = [
    "FORMATS",
    "can_rank",
    "check_mask",
    "decay_pruned",
    "masked",
    "multiply",
    "nan_error",
    "packed_bytes",
    "rank",
    "rank_transposable",
    "repack",
    "restore",
    "soft_threshold",
]

_HEADER = struct.Struct("=4siiiqq32x")  # what a packed weight begins with: `Header` in csrc/common.h
_MAGIC, _ORDER = b"NMSW", 1
_UNITS_OF = {8: ("avx2", "neon", "neon_dotprod", "scalar"), 16: ("avx512", "avx512_bf16")}  # by their lanes

_NUMBERS = {torch.float32: 0, torch.bfloat16: 1}
_VALUES = {name: VALUE_DTYPES[numbers_of(name)] for name in FORMATS}


def _done(outcome: int) -> int:
    """The outcome of a call of the library, which is -1 where it failed."""
    if outcome == -1:
        raise RuntimeError(f"kernels: the native library failed: {library().nms_failure().decode()}")
    return outcome


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """The library, which has borrowed torch's threads."""
    loaded = library()
    loaded.nms_set_parallel_for(_torch_parallel_for())
    return loaded


def _torch_parallel_for() -> int | None:
    """Address of the function through which C code runs on torch's threads; torch has it from 2.10 on."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def repack(
    format: str, in_features: int, values: Tensor, codes: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """`order.repack` of tensors: a weight from the order of the file to that of the library.

    Raises:
        ValueError: A tensor does not fit the format, or lies on another device than the CPU.
    """
    if not all(tensor is None or tensor.is_cpu for tensor in (values, codes, scale)):
        raise ValueError("repack: values, codes and scale lie on the CPU; move them there")
    _library()  # on torch's threads
    packed = torch.empty(packed_bytes(format, len(values), in_features), dtype=torch.uint8, device="cpu")
    repack_arrays(format, in_features, _array(values), _array(codes), _array(scale), packed.numpy())
    return packed


def _array(tensor: Tensor | None) -> Any:
    """The memory of a tensor as an array; NumPy knows no bf16."""
    if tensor is None:
        return None
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def restore(packed: Tensor, format: str, out_features: int, in_features: int) -> tuple[Tensor, Tensor | None]:
    """The dense weight ``[out_features, in_features]`` in the number type of ``format``, and the scale of int8."""
    _check(packed, format, out_features, in_features)
    dense = torch.empty((out_features, in_features), dtype=_VALUES[format], device="cpu")
    scale = torch.empty(out_features, dtype=torch.float32, device="cpu") if numbers_of(format) == "int8" else None
    done = _library().nms_restore(
        FORMATS[format], out_features, in_features, packed.data_ptr(), dense.data_ptr(), _address(scale)
    )
    if not _done(done):
        raise _no_weight(packed, format, out_features, in_features)
    return dense, scale


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None, format: str, out_features: int) -> Tensor:
    """``x @ W.T + bias``.

    Args:
        x: ``[..., in_features]`` on the CPU, in fp32, bf16 or fp16, any strides.
        packed: The weight, from `repack`.
        bias: ``[out_features]`` or None.
        format: What ``packed`` was made for.
        out_features: Rows of the weight.

    Returns:
        ``[..., out_features]`` in the dtype of ``x``. A row of ``x`` that is not finite gives NaN with int8.

    Raises:
        ValueError: A tensor has another device or number type, or ``packed`` is no weight of this shape.
    """
    dtype, shape = x.dtype, x.shape
    number = _NUMBERS.get(dtype)
    if number is None:
        if dtype != torch.float16:
            raise ValueError(f"kernels: x is in fp32, bf16 or fp16, got {dtype}; cast it")
        bias = None if bias is None else bias.float()
        return multiply(x.float(), packed, bias, format, out_features).to(dtype)
    if not x.is_cpu:
        raise ValueError(f"kernels: x lies on {x.device} and these kernels run on CPUs; load with compute='dense'")
    in_features = shape[-1]
    _check(packed, format, out_features, in_features)
    if bias is not None:
        if bias.shape != (out_features,) or not bias.is_cpu:
            raise ValueError(
                f"kernels: bias is {[out_features]} on the CPU beside this weight, got {list(bias.shape)} on "
                f"{bias.device}"
            )
        if bias.dtype != dtype or bias.stride(0) != 1:
            bias = bias.to(dtype).contiguous()
    stride = in_features
    if not x.is_contiguous():
        x = x.reshape(-1, in_features)
        if x.stride(1) == 1:
            stride = x.stride(0)
        else:
            x = x.contiguous()
    y = torch.empty((*shape[:-1], out_features), dtype=dtype, device="cpu")
    done = _library().nms_multiply(
        FORMATS[format],
        y.numel() // out_features if out_features else 0,
        out_features,
        in_features,
        x.data_ptr(),
        stride,
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        number,
    )
    if not _done(done):
        raise _no_weight(packed, format, out_features, in_features)
    return y


def can_rank(weight: Tensor) -> bool:
    """Whether the library ranks and decays this weight: fp32 on the CPU, an ordinary tensor without gaps."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.is_cpu
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and not torch.compiler.is_compiling()
        and status().library is not None
    )


def rank(weight: Tensor, mask: Tensor, pattern: NMPattern) -> int:
    """Writes the magnitude mask of ``weight`` over ``mask`` in one pass.

    Args:
        weight: ``[..., in_features]`` that `can_rank` takes; ``in_features`` is a multiple of ``pattern.m``.
        mask: Its bits of before, as `masks` lays them out.
        pattern: The pattern.

    Returns:
        How many bits of ``mask`` changed.

    Raises:
        ValueError: A weight is NaN; ``mask`` is undefined then.
    """
    check_mask(weight, mask)
    groups = weight.numel() // pattern.m
    return _flips(weight, _library().nms_rank(weight.data_ptr(), mask.data_ptr(), groups, pattern.n, pattern.m))


def rank_transposable(weight: Tensor, mask: Tensor) -> int:
    """Writes the mask of ``weight`` that is 2:4 along rows and columns over ``mask`` in one pass.

    Args:
        weight: ``[out_features, in_features]`` that `can_rank` takes, both multiples of 4.
        mask: As in `rank`.

    Returns:
        How many bits of ``mask`` changed.

    Raises:
        ValueError: A weight is NaN; ``mask`` is undefined then.
    """
    check_mask(weight, mask)
    return _flips(weight, _library().nms_rank_transposable(weight.data_ptr(), mask.data_ptr(), *weight.shape))


def _flips(weight: Tensor, outcome: int) -> int:
    """How many bits of a mask changed, from what ranking ``weight`` gave."""
    if _done(outcome) == -2:
        raise nan_error(weight)
    return outcome


def decay_pruned(weight: Tensor, mask: Tensor, gradient: Tensor, decay: float) -> None:
    """``gradient += decay * weight`` where ``mask`` prunes, in one pass.

    ``weight`` and ``gradient`` are fp32, contiguous and of one shape.
    """
    check_mask(weight, mask)
    assert gradient.is_contiguous()
    assert gradient.dtype == torch.float32
    assert gradient.shape == weight.shape
    _done(_library().nms_decay(weight.data_ptr(), mask.data_ptr(), gradient.data_ptr(), decay, weight.numel()))


_LENT = threading.local()


def masked(
    weight: Tensor,
    mask: Tensor,
    dtype: torch.dtype | None = None,
    pruned_scale: float = 0.0,
    transient: bool = False,
) -> Tensor:
    """``weight`` where ``mask`` keeps it, ``pruned_scale`` times it elsewhere, or +0.0 where that is 0.

    Args:
        weight: What `can_rank` takes.
        mask: Its mask.
        dtype: Number type of the result; None is the weight's.
        pruned_scale: As said.
        transient: Whether the caller is done with the result before this thread asks for the next one. It lies in
            memory that is used again then: fresh memory for each product would leave gaps between what stays.
    """
    check_mask(weight, mask)
    kept = _room(weight, transient)
    _done(_library().nms_apply(weight.data_ptr(), mask.data_ptr(), kept.data_ptr(), pruned_scale, weight.numel()))
    return kept if dtype in (None, kept.dtype) else kept.to(dtype)


def soft_threshold(weight: Tensor, mask: Tensor, pattern: NMPattern, transient: bool = False) -> Tensor:
    """What ``mask`` keeps of ``weight``, nearer to zero by the largest magnitude that it prunes in the group.

    Args:
        weight: ``[..., in_features]`` that `can_rank` takes; ``in_features`` is a multiple of ``pattern.m``.
        mask: Its mask.
        pattern: The pattern.
        transient: As in `masked`.
    """
    check_mask(weight, mask)
    soft, groups = _room(weight, transient), weight.numel() // pattern.m
    _done(_library().nms_soften(weight.data_ptr(), mask.data_ptr(), soft.data_ptr(), groups, pattern.m))
    return soft


def _room(weight: Tensor, transient: bool) -> Tensor:
    """Memory for what a kernel makes of ``weight``."""
    if not transient:
        return torch.empty_like(weight)
    lent: Tensor | None = getattr(_LENT, "memory", None)
    if lent is None or lent.numel() < weight.numel():
        with torch.inference_mode(False):  # or training could not use what an evaluation made
            lent = _LENT.memory = torch.empty(weight.numel(), dtype=torch.float32, device="cpu")
    return lent.as_strided(weight.shape, weight.stride())


def check_mask(weight: Tensor, mask: Tensor) -> None:
    """What every kernel on masks counts on: a bit for each weight, without gaps."""
    assert mask.dtype == torch.uint8
    assert mask.is_contiguous()
    assert mask.shape == (-(-weight.numel() // 8),)


def nan_error(weight: Tensor) -> ValueError:
    """The error that a weight with a NaN among its numbers is, whatever ranks it."""
    return ValueError(f"mask: a weight of shape {list(weight.shape)} holds NaN, which has no rank; check the loss")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(packed: Tensor, format: str, out_features: int, in_features: int) -> None:
    fits = packed.is_cpu and packed.dtype == torch.uint8 and packed.is_contiguous()
    if not fits or packed.numel() != packed_bytes(format, out_features, in_features):
        raise _no_weight(packed, format, out_features, in_features)


def _no_weight(packed: Tensor, format: str, out_features: int, in_features: int) -> ValueError:
    """The error that ``packed`` is where a weight of this process' unit is asked for."""
    unit = status().unit
    return ValueError(
        f"kernels: {packed.numel()} bytes on {packed.device} are no {format} weight of {[out_features, in_features]} "
        f"for the unit {unit}: {_what_is_wrong(packed, format, out_features, in_features, unit)}"
    )


def _what_is_wrong(packed: Tensor, format: str, out_features: int, in_features: int, unit: str | None) -> str:
    if not packed.is_cpu or packed.dtype != torch.uint8 or not packed.is_contiguous():
        return "they must be uint8 on the CPU, without gaps"
    head = bytes(packed.flatten()[: _HEADER.size].tolist()).ljust(_HEADER.size, b"\0")
    magic, order, lanes, kind, rows, columns = _HEADER.unpack(head)
    if (magic, order) != (_MAGIC, _ORDER):
        return "they were made by another version of hf_nmsparse, or are no weight; export the model again"
    if unit not in _UNITS_OF.get(lanes, ()):
        made_for = ", ".join(_UNITS_OF.get(lanes, (f"units of {lanes} lanes",)))
        return f"they are for {made_for}; export the model here, or where it was with HF_NMSPARSE_UNIT={unit}"
    if (kind, rows, columns) != (FORMATS[format], out_features, in_features):
        known = dict(enumerate(FORMATS)).get(kind, f"format {kind}")
        return f"they are {known} of {[rows, columns]}"
    return "they are cut short, or go on behind the weight"
