"""Masks, decay and training steps on a GPU, with the compiled Triton kernels and without them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.kernels import cuda
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.masks import (
    apply_mask,
    count_flips,
    magnitude_mask,
    pack_bits,
    transposable_mask,
    unpack_bits,
    update_mask,
)
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.sparse_model import sparsify
from hf_nmsparse.srste import soft_threshold

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

TWO_OF_FOUR = NMPattern(2, 4)
PATTERNS = [NMPattern(n, m) for m in range(2, 9) for n in range(1, m)] + [NMPattern(1, 16), NMPattern(9, 32)]
NUMBERS = [torch.float32, torch.bfloat16, torch.float16]


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "can_rank", lambda weight: False)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rows", [1, 300])
def test_masks_are_those_of_the_cpu(pattern: NMPattern, dtype: torch.dtype, rows: int) -> None:
    weight = torch.randn(rows, pattern.m * 9)
    weight[::3] = torch.randint(-2, 3, weight[::3].shape) * -1.0  # ties, and zeros of either sign
    weight = weight.to(dtype)
    expected = magnitude_mask(weight.float(), pattern)
    assert torch.equal(magnitude_mask(weight.cuda(), pattern).cpu(), expected)
    mask = pack_bits(torch.rand(weight.shape) < 0.5)
    on_gpu = mask.cuda()
    assert float(update_mask(on_gpu, weight.cuda(), pattern)) == float(count_flips(mask, expected))
    assert torch.equal(on_gpu.cpu(), expected)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("shape", [(4, 4), (20, 68), (256, 1024)])
def test_transposable_masks_are_those_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape)
    weight[::3] = torch.randint(-2, 3, weight[::3].shape) * -1.0
    weight = weight.to(dtype)
    expected = transposable_mask(weight.double())
    assert torch.equal(transposable_mask(weight.cuda()).cpu(), expected)
    assert torch.equal(transposable_mask(weight.cuda().double()).cpu(), expected)  # which is plain torch
    mask = pack_bits(torch.rand(shape) < 0.5)
    on_gpu = mask.cuda()
    flips = update_mask(on_gpu, weight.cuda(), TWO_OF_FOUR, transposable=True)
    assert float(flips) == float(count_flips(mask, expected))
    assert torch.equal(on_gpu.cpu(), expected)


def test_more_weights_than_32_bits_count_bytes_of() -> None:
    """Places past 2^31 need 64 bits; the last row is looked at."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("it takes 16 GiB of free GPU memory")
    weight = torch.zeros((2**31 + 2**12) // 4096, 4096, device="cuda", dtype=torch.bfloat16)
    weight[-1, -1] = 1.0
    mask = magnitude_mask(weight, TWO_OF_FOUR)
    assert (int(mask[0]), int(mask[-1])) == (0b0011_0011, 0b1001_0011)


@pytest.mark.parametrize("given", NUMBERS)
@pytest.mark.parametrize("asked", [None, *NUMBERS])
def test_kept_weights_are_rounded_as_torch_rounds(given: torch.dtype, asked: torch.dtype | None) -> None:
    weight = torch.randn(33, 64, device="cuda").to(given)
    mask = magnitude_mask(weight, TWO_OF_FOUR)
    kept = unpack_bits(mask, weight.shape)
    expected = torch.where(kept, weight, torch.zeros_like(weight)).to(asked or given)
    assert torch.equal(apply_mask(weight, mask, asked), expected)
    assert not apply_mask(-weight.abs(), mask).signbit()[~kept].any()


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_soft_thresholds_are_those_of_the_cpu(pattern: NMPattern, dtype: torch.dtype) -> None:
    weight = torch.randn(33, pattern.m * 9).to(dtype)
    mask = magnitude_mask(weight.float(), pattern)
    expected = soft_threshold(weight.double(), mask, pattern).to(dtype)
    assert torch.equal(soft_threshold(weight.cuda(), mask.cuda(), pattern).cpu(), expected)


def test_a_nan_is_found() -> None:
    weight = torch.randn(64, 64, device="cuda")
    weight[5, 7] = math.nan
    with pytest.raises(ValueError, match=r"a weight of shape \[64, 64\] holds NaN"):
        magnitude_mask(weight, TWO_OF_FOUR)
    layer = NMLinear.from_stock(nn.Linear(8, 8, device="cuda"), TWO_OF_FOUR)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    step = SparseStep(layer, optimizer, "ste")
    layer.weight.grad = torch.full_like(layer.weight, math.nan)
    optimizer.step()
    with pytest.raises(ValueError, match="holds NaN, which has no rank; check the loss"):
        step.take_flips()


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).cuda()
    sparsify(model, NMSparseConfig("2:4", ignore=()))
    return model


def trained(
    steps: int,
    optimizer_of: Callable[[Any], torch.optim.Optimizer],
    autocast: torch.dtype | None = None,
    compiled: bool = False,
    method: str = "sr-ste",
) -> tuple[nn.Module, float]:
    """A small network after some steps, and the flips of all of them."""
    model = network()
    optimizer = optimizer_of(model.parameters())
    step = SparseStep(model, optimizer, method, decay=2e-2 if method == "sr-ste" else None)
    run = torch.compile(model) if compiled else model
    scaler = torch.amp.GradScaler("cuda", enabled=autocast == torch.float16)
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(steps):
        x = torch.randn(128, 64, device="cuda", generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cuda", autocast) if autocast else nullcontext():
            loss = (run(x).float() - x.roll(1, dims=1)).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return model, sum(flips.sad for flips in step.take_flips().values()) * steps


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


@pytest.mark.parametrize("method", ["ste", "sr-ste", "asp"])
def test_training_without_the_kernels_is_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, flips = trained(1, adamw, method=method)
    plain(monkeypatch)
    expected, same = trained(1, adamw, method=method)
    assert flips == same
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_masks_follow_the_fp32_master(autocast: torch.dtype | None, compiled: bool) -> None:
    model, flips = trained(20, adamw, autocast, compiled)
    assert flips > 0
    for layer in model.modules():
        if isinstance(layer, NMLinear):
            assert layer.weight.dtype == torch.float32
            assert torch.equal(layer.current_mask().cpu(), magnitude_mask(layer.weight.detach().cpu(), TWO_OF_FOUR))


def test_a_step_waits_for_nothing() -> None:
    """Ranking, decay and counting queue their kernels and go on: torch raises where something synchronises."""
    model = network()
    optimizer = adamw(model.parameters())
    step = SparseStep(model, optimizer, "sr-ste", decay=2e-4)
    x = torch.randn(128, 64, device="cuda")

    def once() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    once()  # compiles, and makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.take_flips()["0"].weights == 64 * 256


def test_a_skipped_step_leaves_weights_and_masks() -> None:
    model = network()
    optimizer = adamw(model.parameters())
    SparseStep(model, optimizer, "sr-ste", decay=2e-4)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.autocast("cuda", torch.float16):
        loss = model(torch.full((8, 64), 100.0, device="cuda")).float().square().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**30
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
