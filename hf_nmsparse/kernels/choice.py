"""Which kernels take a weight of a training: those of the native library, those of Triton, or none."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from hf_nmsparse.kernels import cuda, native

__all__ = ["kernels_for"]


def kernels_for(*weights: Tensor) -> ModuleType | None:
    """The module that ranks, masks, softens and decays tensors like these; `native` says what its functions do.

    Returns:
        `native` for fp32 on the CPU, `cuda` on GPUs, each where it is there; None where plain torch computes.
    """
    for kernels in (native, cuda):
        if all(map(kernels.can_rank, weights)):
            return kernels
    return None
