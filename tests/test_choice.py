"""Which kernels take a weight of a training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_nmsparse.kernels import cuda, native
from hf_nmsparse.kernels.choice import kernels_for


def test_all_weights_must_suit_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this table fp32 is for the native library, fp16 for a GPU, and bf16 for both."""

    def takes(*dtypes: torch.dtype) -> object:
        return lambda weight: weight.dtype in dtypes

    def of(dtype: torch.dtype) -> Tensor:
        return torch.zeros(4, dtype=dtype)

    monkeypatch.setattr(native, "can_rank", takes(torch.float32, torch.bfloat16))
    monkeypatch.setattr(cuda, "can_rank", takes(torch.float16, torch.bfloat16))
    assert kernels_for(of(torch.float32)) is native
    assert kernels_for(of(torch.float16)) is cuda
    assert kernels_for(of(torch.bfloat16)) is native
    assert kernels_for(of(torch.float16), of(torch.bfloat16)) is cuda
    assert kernels_for(of(torch.float32), of(torch.float16)) is None
    assert kernels_for(of(torch.float64)) is None
