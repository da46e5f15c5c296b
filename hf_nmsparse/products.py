"""The library that multiplies the matrices of a training on CPUs."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["multiply_with_onednn"]

_SCORES = 2**20
"""Tokens of a batch times the longest sentence. Where attention is no product in one piece it keeps a score of each
such pair, head and layer: some 5 MB for each head of each layer."""

_KERNELS = "64"
"""oneDNN compiles a product for each shape and would keep 1024 of them, though a step has some forty."""


def multiply_with_onednn(tokens: int, longest: int) -> bool:
    """Has torch multiply fp32 matrices with oneDNN on CPUs of AMD, where its MKL uses half of a vector unit.

    MKL takes AVX2 there whatever the CPU has, oneDNN takes AVX-512: steps of small models take two thirds of the time,
    and more memory: at its peak the demo has 2.6 GB instead of 1.1.
    torch says it with ``set_float32_matmul_precision("medium")``, which allows bf16 inside of a product; without the
    matrix units of Intel's CPUs oneDNN has no use for that, and a product is tried before it is believed. torch's fused
    attention, whose products are many and tiny, is left out, since oneDNN takes its time over each.

    Args:
        tokens: The most tokens of a batch.
        longest: The most tokens of a sentence.

    Returns:
        Whether it does: not on other CPUs, not without AVX-512, not where the user has chosen a precision, and not
        where attention would need much memory.
    """
    default = torch.get_float32_matmul_precision()
    if (
        default != "highest"
        or tokens * longest > _SCORES
        or not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available())
        or not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        or not _made_by_amd()
    ):
        return False
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS)  # read at the first product
    torch.set_float32_matmul_precision("medium")
    if not _products_are_fp32():
        torch.set_float32_matmul_precision(default)
        return False
    torch.backends.cuda.enable_flash_sdp(False)  # which holds for the CPU's too
    return True


def _made_by_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "AuthenticAMD" in info.read_text(encoding="utf-8")


def _products_are_fp32() -> bool:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    return float((left @ right - exact).norm() / exact.norm()) < 1e-6  # of bf16, 2e-3
