"""Freed memory that stays with the process, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a matter of glibc")

PROGRAM = """
import resource
import torch
from hf_nmsparse.allocator import keep_freed_memory

print(keep_freed_memory() if {keep} else None)
for _ in range(16):
    torch.ones(16 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    torch.ones(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(keep: bool, **variables: str) -> tuple[str, int]:
    """What the function returned, and the pages that the system had to give for sixteen blocks of 64 MiB."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | variables)
    answer, pages = done.stdout.split()
    return answer, int(pages)


def test_freed_memory_is_used_again() -> None:
    (_, given_back), (answer, kept) = run(False), run(True)
    assert answer == "True"
    assert given_back >= 16 * 32  # even in pages of 2 MiB
    assert kept < given_back / 4  # small objects between the blocks can make room for one more necessary


@pytest.mark.parametrize(
    "variable",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}],
    ids=lambda variable: next(iter(variable)),
)
def test_thresholds_of_the_environment_stay(variable: dict[str, str]) -> None:
    answer, pages = run(True, **variable)
    assert answer == "False"
    assert pages >= 16 * 32
