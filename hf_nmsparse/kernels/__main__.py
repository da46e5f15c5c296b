"""Says whether the native library is used here, and why: ``python -m hf_nmsparse.kernels``.

It exits with 0 if the library is used and with 1 if not, so that a script can ask. It answers without importing torch.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hf_nmsparse.kernels import engine
from hf_nmsparse.kernels.library import Status, status


def main() -> int:
    """Prints what is used.

    Returns:
        The exit code.
    """
    try:
        used = status()
        without_engine = engine.why_not()
    except ValueError as error:  # HF_NMSPARSE_UNIT names a unit that is none here
        used, without_engine = Status(None, None, str(error)), "the native library is not used"
    torch = _torch_version()
    facts = {
        "native library": used.library or "not used",
        "reason": used.reason,
        "vector unit": used.unit or "none",
        "engine": without_engine or "translates; `nmsparse doctor MODEL` says whether it knows a model",
        "threads": _threads(used, torch),
        "torch": torch,
        "CPU": _cpu_name(),
    }
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    return 0 if used.library else 1


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "not installed"


def _threads(used: Status, torch: str) -> str:
    """On which threads products run; how many torch takes of those it may take is known in the process that asks it."""
    if used.library is None:
        return "none"
    if [int(part) for part in torch.split(".")[:2] if part.isdecimal()] < [2, 10]:
        return "1, as torch lends its threads from 2.10 on"
    asked = os.environ.get("OMP_NUM_THREADS")
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"torch's own, OMP_NUM_THREADS={asked}" if asked else f"torch's own, up to {here}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # Linux; elsewhere, and on many ARM machines, the platform's word must do
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


if __name__ == "__main__":
    sys.exit(main())
