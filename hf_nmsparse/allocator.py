"""Memory that a training on CPUs frees and asks for again in every step."""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_freed_memory"]

_NUMBERS = {"TRIM_THRESHOLD": -1, "MMAP_THRESHOLD": -3}  # of malloc.h


def keep_freed_memory() -> bool:
    """Has glibc keep up to 2 GiB of what this process frees, as ``MALLOC_TRIM_THRESHOLD_`` and its like would.

    glibc gives blocks of more than 32 MiB, the logits of a batch among them, back to the system as soon as they are
    free, which clears them page by page when the next step asks for as much. To keep them makes steps of small models
    a good deal shorter and the peak of memory higher; `benchmarks/methods.py` has figures.

    Returns:
        Whether it does: not with another C library, and not where the environment sets thresholds of its own.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(f"MALLOC_{name}_" in os.environ or f"malloc.{name.lower()}=" in tunables for name in _NUMBERS):
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(number, 2**31 - 1) == 1 for number in _NUMBERS.values())
