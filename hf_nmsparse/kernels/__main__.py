"""Says whether the native library is used here, and why: ``python -m hf_nmsparse.kernels``.

It exits with 0 if the library is used and with 1 if not, so that a script can ask.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

from hf_nmsparse.kernels.native import Status, status


def main() -> int:
    """Prints what is used.

    Returns:
        The exit code.
    """
    try:
        used = status()
    except ValueError as error:  # HF_NMSPARSE_UNIT names a unit that is none here
        used = Status(None, None, False, str(error))
    facts = {
        "native library": used.library or "not used",
        "reason": used.reason,
        "vector unit": used.unit or "none",
        "threads": _threads(used),
        "torch": torch.__version__,
        "CPU": _cpu_name(),
    }
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    return 0 if used.library else 1


def _threads(used: Status) -> str:
    if used.library is None:
        return "none"
    return f"{torch.get_num_threads()}, torch's own" if used.threads else "1, as torch lends its threads from 2.10 on"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # Linux; elsewhere, and on many ARM machines, the platform's word must do
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


if __name__ == "__main__":
    sys.exit(main())
