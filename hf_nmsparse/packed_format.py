"""The packed format: its sizes, and the rules that the numbers of a layer keep. This needs no torch.

Version 1 holds the weights of linear layers, which are matrices. Version 2 is the same, and beside it convolutions and
transformers' ``Conv1D``: as the matrix ``[out, places of the kernel * in]``, with a record of the stock shape. A reader
of version 1 refuses it by its number.

`packing` makes these bytes and says what they mean; `packed_files` finds them in the files of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, prod
from types import MappingProxyType
from typing import Any

import numpy as np

from hf_nmsparse.pattern import NMPattern

__all__ = [
    "CLIPS",
    "CODES_IN_PERIOD",
    "FORMAT_VERSION",
    "INT8_LARGEST",
    "VALUE_TYPES",
    "WITH_CONVOLUTIONS",
    "PackedFormatError",
    "StoredTensor",
    "bytes_of",
    "check_int8",
    "check_weight",
    "code_bits",
    "is_finite",
    "matrix_shape",
    "packed_bytes",
    "packed_shapes",
    "read_period",
    "read_ranks",
    "shifted",
    "stock_shape",
]

FORMAT_VERSION, WITH_CONVOLUTIONS = 1, 2
"""The versions; the second is written only where a model has what the first cannot hold."""

VALUE_TYPES = MappingProxyType({"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "I8"})
"""The number types that values have in a file, as config.json and safetensors call them; int8 comes with scales."""

INT8_LARGEST = 127
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""Of a row's largest magnitude: rounding to int8 tries the scales that keep so much of it."""

CODES_IN_PERIOD = 8  # eight codes of k bits fill k bytes, whatever k is

# How the bytes of a number type are read: floating point as the bits that it is, for NumPy knows no bf16.
_BITS = {"F64": "<u8", "F32": "<u4", "F16": "<u2", "BF16": "<u2", "I8": "i1", "U8": "u1", "I64": "<i8"}
_EXPONENT = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}  # all ones: NaN or infinity
_PIECE = 1 << 16  # numbers that stay in a core's cache while they are looked at


class PackedFormatError(ValueError):
    """A packed checkpoint breaks a rule of its format; the message names file, key and rule."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors file holds it, unread until its numbers are asked for.

    Attributes:
        file: Name of the file.
        dtype: The number type, as safetensors spells it.
        shape: The shape.
        nbytes: Its bytes.
        buffer: What holds them.
        offset: Where they begin in ``buffer``.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    buffer: Any
    offset: int = 0

    def bits(self) -> np.ndarray[Any, Any]:
        """The numbers, without a copy: integers as they are, floating point as unsigned integers of the same bits."""
        return np.ndarray(self.shape, _BITS[self.dtype], self.buffer, self.offset)


def code_bits(pattern: NMPattern) -> int:
    """Bits of a group's code: 3 for 2:4, 7 for 4:8, at most 30."""
    return (comb(pattern.m, pattern.n) - 1).bit_length()


def packed_shapes(out_features: int, in_features: int, pattern: NMPattern) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the kept values and of the codes of a weight ``[out_features, in_features]``.

    Raises:
        ValueError: The row does not divide into groups.
    """
    groups = pattern.groups(in_features)
    return (out_features, groups * pattern.n), (out_features, -(-groups * code_bits(pattern) // 8))


def packed_bytes(out_features: int, in_features: int, pattern: NMPattern, values: str) -> int:
    """Bytes that a packed weight takes, values and codes but not the scales; ``values`` is a key of `VALUE_TYPES`.

    Raises:
        ValueError: The row does not divide into groups.
    """
    (rows, kept), (_, code_width) = packed_shapes(out_features, in_features, pattern)
    return rows * (kept * np.dtype(_BITS[VALUE_TYPES[values]]).itemsize + code_width)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The packed matrix ``(out, places * in)`` of a weight that is no linear layer's.

    Args:
        shape: The stock shape: ``(out, in, *kernel)`` of a convolution, ``(in, out)`` of transformers' ``Conv1D``.
    """
    if len(shape) == 2:
        return shape[1], shape[0]
    return shape[0], prod(shape[1:])


def stock_shape(record: StoredTensor, pattern: NMPattern, name: str = "layer") -> tuple[int, ...]:
    """The stock shape that a file holds of a layer, under ``name.weight_shape``.

    Raises:
        PackedFormatError: It is none, or its input channels do not divide into groups.
    """
    where = f"{record.file}: {name}.weight_shape"
    if record.dtype != "I64" or len(record.shape) != 1 or not 2 <= record.shape[0] <= 4:
        raise PackedFormatError(f"{where}: shapes are int64 [2] to [4], got {record.dtype} {list(record.shape)}")
    shape = tuple(map(int, record.bits()))
    if min(shape) < 1:
        raise PackedFormatError(f"{where}: a shape has positive numbers, got {list(shape)}")
    channels = shape[0] if len(shape) == 2 else shape[1]
    if channels % pattern.m:
        raise PackedFormatError(f"{where}: {channels} input channels of {list(shape)} make no groups of {pattern}")
    return shape


def check_weight(
    values: StoredTensor,
    codes: StoredTensor,
    pattern: NMPattern,
    dtype: str,
    shape: tuple[int, ...] | None = None,
    name: str = "layer",
    scale: StoredTensor | None = None,
) -> None:
    """Checks what a file holds for one sparse layer, before anything is built from it.

    Args:
        values: What the file holds under ``name.weight``.
        codes: What the file holds under ``name.weight_indices``.
        pattern: The pattern that config.json declares.
        dtype: The number type that config.json declares, as safetensors spells it.
        shape: Rows and columns of the dense matrix, if the model's layer or a record tells them.
        name: Prefix of the keys.
        scale: What the file holds under ``name.weight_scale``; None if there is no such key.

    Raises:
        PackedFormatError: Dtype, shape, code range, padding bits, finite values or scales: the first rule that is
            broken.
    """

    def fail(key: str, rule: str) -> PackedFormatError:
        return PackedFormatError(f"{values.file}: {name}.{key}: {rule}")

    if values.dtype != dtype:
        raise fail("weight", f"config.json declares values of {dtype}, got {values.dtype}")
    if dtype not in VALUE_TYPES.values():
        raise fail("weight", f"values are {', '.join(VALUE_TYPES.values())}, got {dtype}")
    if codes.dtype != "U8":
        raise fail("weight_indices", f"codes are uint8, got {codes.dtype}")
    if len(values.shape) != 2 or values.shape[1] % pattern.n:
        raise fail("weight", f"values of {pattern} have rows of a multiple of {pattern.n}, got {list(values.shape)}")
    groups = values.shape[1] // pattern.n
    found = (values.shape[0], groups * pattern.m)
    if shape is not None and shape != found:
        raise fail("weight", f"the model's layer is {list(shape)}, got values of a layer {list(found)}")
    _, expected = packed_shapes(*found, pattern)
    if codes.shape != expected:
        raise fail("weight_indices", f"shape must be {list(expected)} beside these values, got {list(codes.shape)}")
    ranks = read_ranks(codes.bits(), pattern)
    if ranks[:, groups:].any():
        raise fail("weight_indices", "padding bits at the end of a row must be 0")
    count, largest = comb(pattern.m, pattern.n), int(ranks.max(initial=0))
    if largest >= count:
        raise fail("weight_indices", f"codes of {pattern} are 0 to {count - 1}, got {largest}")
    if not is_finite(values):
        raise fail("weight", "values must be finite, got NaN or infinity")
    if dtype == "I8":
        check_int8(values, scale, name)
    elif scale is not None:
        raise fail("weight_scale", f"only values of int8 have a scale, config.json declares {dtype}")


def check_int8(values: StoredTensor, scale: StoredTensor | None, name: str = "layer") -> None:
    """Checks the int8 values ``[rows, columns]`` of a layer and the scale of each row.

    Raises:
        PackedFormatError: Values are not int8 within -127 to 127, or a scale is missing, of another dtype or shape, not
            positive, or so large that a weight would be infinite.
    """
    where = f"{values.file}: {name}"
    if values.dtype != "I8" or len(values.shape) != 2 or int(values.bits().min(initial=0)) < -INT8_LARGEST:
        raise PackedFormatError(f"{where}.weight: int8 values are a matrix within -127 to 127")
    if scale is None:
        raise PackedFormatError(f"{where}.weight_scale: scales are missing beside int8 values")
    if scale.dtype != "F32" or scale.shape != values.shape[:1]:
        raise PackedFormatError(
            f"{where}.weight_scale: scales are fp32 {list(values.shape[:1])}, got {list(scale.shape)} {scale.dtype}"
        )
    numbers = scale.bits().view("<f4")
    with np.errstate(all="ignore"):  # of what is no number or too large
        sound = (numbers > 0) & np.isfinite(numbers * np.float32(INT8_LARGEST))
    if not sound.all():
        raise PackedFormatError(f"{where}.weight_scale: scales are positive, and 127 times one is finite")


def is_finite(tensor: StoredTensor) -> bool:
    """Whether there is no NaN and no infinity in it."""
    if tensor.dtype not in _EXPONENT:
        return True
    numbers = tensor.bits().reshape(-1)
    exponent = numbers.dtype.type(_EXPONENT[tensor.dtype])
    pieces = (numbers[start : start + _PIECE] for start in range(0, numbers.size, _PIECE))
    return not any((piece & exponent).max() == exponent for piece in pieces)


def bytes_of(code: int, bits: int) -> range:
    """The bytes of a period that hold bits of its code number ``code``."""
    return range(code * bits // 8, ((code + 1) * bits - 1) // 8 + 1)


def shifted(numbers: Any, left: int) -> Any:
    """Whole numbers, so many bits further to the left; to the right where that is negative."""
    return numbers << left if left >= 0 else numbers >> -left


def read_period(period: Any, ranks: Any, bits: int) -> None:
    """Reads the codes of whole periods, arrays of NumPy or tensors of torch alike.

    Args:
        period: Their bytes, ``[..., bits]``, in integers that hold a code and the byte it spills into.
        ranks: Takes the codes, ``[..., 8]``.
        bits: Bits of a code.
    """
    for code in range(CODES_IN_PERIOD):
        number = 0
        for byte in bytes_of(code, bits):
            number = number | shifted(period[..., byte], 8 * byte - code * bits)
        ranks[..., code] = number & ((1 << bits) - 1)


def read_ranks(codes: np.ndarray[Any, Any], pattern: NMPattern) -> np.ndarray[Any, Any]:
    """The numbers in ``codes`` (uint8 ``[rows, bytes]``), ``[rows, whole periods]``, unchecked and with the padding."""
    (rows, width), bits = codes.shape, code_bits(pattern)
    periods = -(-width // bits)
    wide = np.zeros((rows, periods * bits), np.int32 if bits <= 16 else np.int64)
    wide[:, :width] = codes
    ranks = np.empty((rows, periods, CODES_IN_PERIOD), wide.dtype)
    read_period(wide.reshape(rows, periods, bits), ranks, bits)
    return ranks.reshape(rows, periods * CODES_IN_PERIOD)
