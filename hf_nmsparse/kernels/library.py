"""The native library: finding it, loading it, and which vector unit it runs on. This needs no torch.

It is a C library without Python or torch inside, so that one build serves every Python and every torch. Where it is
missing everything still works in plain torch, more slowly. Two environment variables steer it:
``HF_NMSPARSE_NATIVE=0`` leaves it out, ``HF_NMSPARSE_UNIT=avx2`` (or another of `UNITS`) names the vector unit.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import hf_nmsparse.kernels

__all__ = ["FORMATS", "UNITS", "Status", "library", "numbers_of", "status"]

FORMATS = {
    "fp32": 0,
    "bf16": 1,
    "int8": 2,
    "dense_int8": 3,
    "dense_fp32": 4,
    "dense_bf16": 5,
    "int8_8of16": 6,
    "int8_4of16": 7,
    "fp32_1of4": 8,
    "bf16_1of4": 9,
}
"""How a packed weight lies in memory. The first three are of 2:4 weights, by the names of the modes of computing; then
come those of dense weights, and those of weights that keep at most so many of each 16 or 4 neighbouring columns."""

UNITS = ("avx512_bf16", "avx512", "avx2", "neon_dotprod", "neon", "scalar")

_ABI = 9
_NAME = {"darwin": "libnmsparse.dylib", "win32": "nmsparse.dll"}.get(sys.platform, "libnmsparse.so")
_SIGNATURES = {
    "nms_abi": ("i", ""),
    "nms_set_parallel_for": (None, "p"),
    "nms_unit": ("s", ""),
    "nms_select_unit": ("i", "s"),
    "nms_packed_bytes": ("l", "ill"),
    "nms_failure": ("s", ""),
    "nms_repack": ("i", "illpppp"),
    "nms_restore": ("i", "illppp"),
    "nms_multiply": ("i", "illlplpppi"),
    "nms_rank": ("l", "pplii"),
    "nms_rank_transposable": ("l", "ppll"),
    "nms_decay": ("i", "pppfl"),
    "nms_apply": ("i", "pppfl"),
    "nms_soften": ("i", "pppli"),
    "nms_engine_new": ("i", "pppl"),
    "nms_engine_free": (None, "p"),
    "nms_engine_weight": ("i", "piiiillplppl"),
    "nms_engine_table": ("i", "piiiillpppl"),
    "nms_engine_ready": ("i", "ppl"),
    "nms_engine_shortlist": ("i", "pplplplpl"),
    "nms_engine_translate": ("i", "pplpppppiplpippppppppl"),
    "nms_engine_score": ("i", "pilpppppppl"),
}
_TYPES = {
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "p": ctypes.c_void_p,
    "s": ctypes.c_char_p,
    "f": ctypes.c_float,
    None: None,
}


def numbers_of(format: str) -> str:
    """The numbers in which a format holds its values: fp32, bf16 or int8."""
    return format.removeprefix("dense_").partition("_")[0]


@dataclass(frozen=True)
class Status:
    """What is used, and why.

    Attributes:
        library: The library's file; None if it is not used.
        unit: The vector unit, one of `UNITS`; None without the library.
        reason: Why the library is not used, or a word on how it is.
        chosen: Whether the user turned the library off.
    """

    library: Path | None
    unit: str | None
    reason: str
    chosen: bool = False


def library() -> ctypes.CDLL:
    """The loaded library, its functions with their types.

    Its products run on one thread until `nms_set_parallel_for` is given the address of a function that spreads a loop
    over threads.

    Raises:
        ValueError: The library is not used, or ``HF_NMSPARSE_UNIT`` is wrong.
    """
    loaded, why = _load()
    if loaded is None:
        raise ValueError(f"kernels: the native library is not used ({why.reason}); choose compute='dense'")
    return loaded


def status() -> Status:
    """Whether the library is used, and why.

    Raises:
        ValueError: ``HF_NMSPARSE_UNIT`` names a unit that is none, or that the machine lacks.
    """
    return _load()[1]


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, Status]:
    if os.environ.get("HF_NMSPARSE_NATIVE") == "0":
        return None, Status(None, None, "HF_NMSPARSE_NATIVE=0 turns it off", chosen=True)
    path = next((file for folder in hf_nmsparse.kernels.__path__ if (file := Path(folder) / _NAME).is_file()), None)
    if path is None:
        return None, Status(None, None, f"{_NAME} is not installed: no C++ compiler was found at installation")
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = _TYPES[result], [_TYPES[kind] for kind in arguments]
    except (OSError, AttributeError) as error:
        return None, Status(None, None, f"{path} does not load: {error}")
    if loaded.nms_abi() != _ABI:
        return None, Status(None, None, f"{path} is of another version; install the package again")
    wanted = os.environ.get("HF_NMSPARSE_UNIT")
    if wanted is not None and not loaded.nms_select_unit(wanted.encode()):
        known = ", ".join(UNITS)
        raise ValueError(f"HF_NMSPARSE_UNIT: {wanted!r} is none of {known}, or this machine has it not; unset it")
    unit = loaded.nms_unit().decode()
    reason = "the fastest unit of this machine" if wanted is None else "HF_NMSPARSE_UNIT asks for this unit"
    if unit == "scalar" and wanted is None:
        reason = "this machine has neither AVX2 nor NEON, so dense layers are faster"
    return loaded, Status(path, unit, reason)
