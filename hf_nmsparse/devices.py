"""Whether a CPU or another device is to compute, asked without torch where that can be."""

from __future__ import annotations

import ctypes
import sys
import warnings
from contextlib import suppress

__all__ = ["device_of", "on_cpu"]


def on_cpu(device: str | None) -> bool:
    """Whether a CPU is to translate. Only where there may be a GPU is torch asked, which takes a second to import."""
    if device is not None:
        return device == "cpu"
    for name in ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libamdhip64.so"):
        with suppress(OSError):  # no such driver
            ctypes.CDLL(name)
            return device_of(None) == "cpu"
    return True


def device_of(name: str | None) -> str:
    """The device to compute on: the one that was named, if numbers can be had there."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that were devices once
            torch.zeros(1, device=name).item()
    except Exception as error:  # what is raised is up to each device: AssertionError, ModuleNotFoundError and others
        raise ValueError(f"--device {name}: {str(error).strip()}") from error
    return name
