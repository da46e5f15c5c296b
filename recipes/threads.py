"""The CPU threads of a training that has the machine for itself."""

from __future__ import annotations

import os

import psutil
import torch


def take_all_cores() -> int | None:
    """Has torch use every core where accelerate's launcher chose one thread and the user chose nothing.

    The launcher starts a single process with ``OMP_NUM_THREADS=1`` unless the user gives a number. What the user gave
    stands in the launcher's own environment and command line, and goes before.

    Returns:
        How many threads torch has from now on, as have processes that are started from this one; None if they are left
        as they are.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if not launched or _chosen_by_user():
        return None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(usable, psutil.cpu_count(logical=False) or usable)  # as torch does where nothing is set
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads


def _chosen_by_user() -> bool:
    launcher = psutil.Process(os.getppid())
    try:
        environment, words = launcher.environ(), launcher.cmdline()
    except psutil.Error:  # nobody can say
        return True
    given = any(word.replace("-", "_").startswith("__num_cpu_threads_per_process") for word in words)
    return given or "OMP_NUM_THREADS" in environment or "MKL_NUM_THREADS" in environment
