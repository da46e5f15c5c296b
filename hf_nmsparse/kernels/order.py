"""Weights from the order of the files to that of the library, as arrays of NumPy. This needs no torch."""

from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_nmsparse.kernels.library import FORMATS, library, numbers_of
from hf_nmsparse.pattern import NMPattern

__all__ = ["NUMBERS", "WIDEST_INT8", "format_of", "packed_bytes", "repack", "takes_codes"]

Array = NDArray[Any]

NUMBERS = MappingProxyType(
    {name: np.dtype({"fp32": np.float32, "bf16": np.uint16, "int8": np.int8}[numbers_of(name)]) for name in FORMATS}
)
"""The number type of a format's values; NumPy has no bf16, so its bits stand in uint16."""

# A pair of u8 x s8 products per column, summed in 32 bits, stays exact up to here.
WIDEST_INT8 = 1 << 16

_HELD = {"int8_4of16": (4, 16), "int8_8of16": (8, 16), "fp32_1of4": (1, 4), "bf16_1of4": (1, 4)}
"""How many values of how many neighbouring columns the sparse formats hold that are repacked from dense weights."""


@lru_cache(maxsize=256)
def format_of(pattern: NMPattern, in_features: int, numbers: str) -> str | None:
    """The format that holds such weights in the fewest bytes, a key of `library.FORMATS`; None if none does.

    Args:
        pattern: The pattern.
        in_features: Columns of the dense weight.
        numbers: ``"fp32"``, ``"bf16"`` or ``"int8"``.
    """
    if numbers == "int8" and in_features > WIDEST_INT8:
        return None
    # 2:4 comes first: it is as dense as 8 of 16, and has fewer bytes.
    densities = {numbers: 2 / 4} if pattern.within_2_of_4 and in_features % 4 == 0 else {}
    for name, (kept, run) in _HELD.items():
        if numbers_of(name) == numbers and pattern.most_kept_in(run) <= kept:
            densities[name] = kept / run
    return min(densities, key=lambda name: densities[name], default=None)


def takes_codes(format: str) -> bool:
    """Whether a format is of 2:4 weights, which are repacked from kept values and their codes, not from dense ones."""
    return not format.startswith("dense_") and format not in _HELD


@lru_cache(maxsize=4096)
def packed_bytes(format: str, out_features: int, in_features: int) -> int:
    """Bytes of a weight in the library's order."""
    return int(library().nms_packed_bytes(FORMATS[format], out_features, in_features))


def repack(
    format: str,
    in_features: int,
    values: Array,
    codes: Array | None = None,
    scale: Array | None = None,
    packed: Array | None = None,
) -> Array:
    """A weight from the order of the file to that of the library, in one pass.

    Args:
        format: A key of `library.FORMATS`.
        in_features: Columns of the dense weight.
        values: In the number type of the format: of formats that take codes ``[out_features, in_features / 2]``, the
            kept values of a 2:4 weight; of others ``[out_features, in_features]``, the dense weight.
        codes: The places of the values of a 2:4 weight, as `packing.encode` writes them; they must be in range.
        scale: fp32 ``[out_features]`` for int8 formats.
        packed: Takes the bytes, as many as `packed_bytes` says; new memory if None.

    Returns:
        uint8, flat, good for this process' vector unit only. It begins with a header that says so, and whoever reads
        it refuses what was made for another unit, format or shape.

    Raises:
        ValueError: An array does not fit the format.
    """
    rows, dense = values.shape[0], not takes_codes(format)
    if not dense and in_features % 4:
        raise ValueError(f"repack: 2:4 weights have a multiple of 4 columns, got {in_features}")
    if values.dtype != NUMBERS[format] or values.shape[1] != (in_features if dense else in_features // 2):
        raise ValueError(f"repack: values {list(values.shape)} {values.dtype} do not fit {format} of {in_features}")
    if format in _HELD:
        _check_runs(format, values)
    width = -(-in_features // 4 * 3 // 8)
    if not dense and (codes is None or codes.dtype != np.uint8 or codes.shape != (rows, width)):
        raise ValueError(f"repack: codes must be uint8 {[rows, width]}, got {None if codes is None else codes.shape}")
    scaled = NUMBERS[format] == np.int8
    if scaled and in_features > WIDEST_INT8:
        raise ValueError(f"repack: int8 takes up to {WIDEST_INT8} inputs, got {in_features}; compute in fp32 or bf16")
    if scaled and (scale is None or scale.dtype != np.float32 or scale.shape != (rows,)):
        raise ValueError(f"repack: {format} needs a scale, fp32 {[rows]}")
    size = packed_bytes(format, rows, in_features)
    if packed is None:
        packed = np.empty(size, np.uint8)
    if packed.dtype != np.uint8 or packed.shape != (size,) or not packed.flags.c_contiguous:
        raise ValueError(f"repack: {format} of {rows}x{in_features} takes {size} bytes, got {packed.shape}")
    kept = [None if array is None else np.ascontiguousarray(array) for array in (values, codes, scale)]
    addresses = [None if array is None else array.ctypes.data for array in kept]
    outcome = library().nms_repack(FORMATS[format], rows, in_features, *addresses, packed.ctypes.data)
    if outcome == -1:
        raise RuntimeError(f"kernels: the native library failed: {library().nms_failure().decode()}")
    return packed


def _check_runs(format: str, values: Array) -> None:
    """Refuses a weight of which a run of columns keeps more than the format holds; -0.0 is kept."""
    kept, run = _HELD[format]
    starts = range(0, values.shape[1], run)
    some = values.view(f"u{values.itemsize}") != 0
    most = int(np.add.reduceat(some, starts, axis=1, dtype=np.uint8).max(initial=0)) if len(starts) else 0
    if most > kept:
        raise ValueError(f"repack: {format} holds {kept} of {run} columns, got {most}; compute it dense")
