"""A training multiplies with oneDNN where that is faster, and only there, with the precision of fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hf_nmsparse import products
from hf_nmsparse.products import multiply_with_onednn


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plays a CPU of AMD, and puts back what is for the whole process."""
    monkeypatch.setattr(products, "_made_by_amd", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    precision, fused = torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_flash_sdp(fused)


def unchanged() -> bool:
    return torch.get_float32_matmul_precision() == "highest" and torch.backends.cuda.flash_sdp_enabled()


def test_the_other_library_multiplies_as_exactly() -> None:
    left, right = torch.randn(300, 200), torch.randn(200, 100)
    exact = left.double() @ right.double()
    if not multiply_with_onednn(4096, 100):
        pytest.skip("on this machine oneDNN rounds to bf16")
    assert torch.get_float32_matmul_precision() == "medium"
    assert not torch.backends.cuda.flash_sdp_enabled()
    assert float((left @ right - exact).norm() / exact.norm()) < 1e-6


def test_what_rounds_to_bf16_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Intel's matrix units would."""
    product = torch.Tensor.__matmul__

    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32:
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not multiply_with_onednn(4096, 100)
    assert unchanged()


@pytest.mark.parametrize(
    ("module", "name", "found"),
    [
        (products, "_made_by_amd", False),
        (torch.backends.cpu, "get_cpu_capability", "AVX2"),
        (torch.backends.mkl, "is_available", False),
        (torch.backends.mkldnn, "is_available", False),
    ],
)
def test_other_machines_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, found: object
) -> None:
    monkeypatch.setattr(module, name, lambda: found)
    assert not multiply_with_onednn(4096, 100)
    assert unchanged()


def test_a_chosen_precision_and_large_batches_stay_as_they_are() -> None:
    assert not multiply_with_onednn(2**14, 2**7)
    assert unchanged()
    torch.set_float32_matmul_precision("high")
    assert not multiply_with_onednn(4096, 100)
    assert torch.get_float32_matmul_precision() == "high"
