"""The Triton kernels for masks and decay, in Triton's interpreter: against the plain torch code, and in training."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.kernels import cuda, native
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
from tests.tiny import kept

pytest.importorskip("triton", reason="Triton has no build for this system")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is a GPU, for which tests/gpu compiles these kernels", allow_module_level=True)

TWO_OF_FOUR = NMPattern(2, 4)
PATTERNS = [NMPattern(n, m) for m in range(2, 9) for n in range(1, m)] + [NMPattern(1, 16), NMPattern(9, 32)]
NUMBERS = [torch.float32, torch.bfloat16, torch.float16]


def with_ties(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Weights of both signs, a third of which share their magnitude with others or are a zero of either sign."""
    weight = torch.randn(rows, columns)
    weight[::3] = torch.randint(-2, 3, weight[::3].shape) * -1.0
    return weight.to(dtype)


@pytest.fixture
def on_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends what the package does with weights through the Triton kernels, as if they lay on a GPU."""
    monkeypatch.setattr(native, "can_rank", lambda weight: False)
    monkeypatch.setattr(cuda, "can_rank", lambda weight: weight.is_contiguous())


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_are_those_of_the_plain_code(pattern: NMPattern, dtype: torch.dtype) -> None:
    weight = with_ties(7, pattern.m * 3, dtype)
    mask = pack_bits(torch.rand(weight.shape) < 0.5)
    expected = magnitude_mask(weight.float(), pattern)
    flips = count_flips(mask, expected)
    assert float(cuda.rank(weight, mask, pattern)) == float(flips)
    assert torch.equal(mask, expected)
    assert float(cuda.rank(weight, mask, pattern)) == 0


def test_a_mask_by_hand() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, -0.0, 5.0, 0.0], [2.0, math.inf, -3.0, -math.inf]])
    mask = torch.zeros(2, dtype=torch.uint8)
    assert float(cuda.rank(weight, mask, TWO_OF_FOUR)) == 6
    assert mask.tolist() == [0b0101_0011, 0b1010]


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 600])
def test_every_number_of_groups(rows: int) -> None:
    """Blocks hold 256 groups of four."""
    weight = torch.randn(rows, 4)
    mask = torch.zeros(-(-rows // 2), dtype=torch.uint8)
    assert float(cuda.rank(weight, mask, TWO_OF_FOUR)) == 2 * rows
    assert torch.equal(mask, magnitude_mask(weight, TWO_OF_FOUR))
    keeps, gradient = kept(weight, TWO_OF_FOUR), torch.ones(rows, 4)
    cuda.decay_pruned(weight, mask, gradient, 0.5)
    assert torch.equal(gradient, torch.where(keeps, 1.0, 1 + 0.5 * weight))
    assert torch.equal(cuda.masked(weight, mask), torch.where(keeps, weight, 0.0))
    soft = soft_threshold(weight.double(), mask, TWO_OF_FOUR).float()
    assert torch.equal(cuda.soft_threshold(weight, mask, TWO_OF_FOUR), soft)
    assert torch.equal(cuda.masked(weight, mask, pruned_scale=0.25), torch.where(keeps, weight, weight * 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_soft_thresholds_are_those_of_the_plain_code(pattern: NMPattern, dtype: torch.dtype) -> None:
    """A bf16 result is left to the tests on a GPU: the interpreter rounds to it by cutting off."""
    weight = with_ties(7, pattern.m * 3, dtype)
    mask = magnitude_mask(weight.float(), pattern)
    soft = cuda.soft_threshold(weight, mask, pattern)
    assert soft.dtype == dtype
    assert torch.equal(soft, soft_threshold(weight.double(), mask, pattern).to(dtype))
    assert not soft.signbit()[~unpack_bits(mask, weight.shape)].any()


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("shape", [(4, 4), (8, 12), (12, 64), (20, 68), (36, 36)])
def test_transposable_masks_are_those_of_the_plain_code(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Blocks share bytes where a row begins in the middle of one; sums of far exponents are rounded by the rule."""
    weight = with_ties(*shape, torch.float32)
    weight[:, 1::3] = torch.tensor([1e30, -math.inf, 1e-45, -3e38])[torch.randint(0, 4, weight[:, 1::3].shape)]
    weight = weight.to(dtype)
    mask = pack_bits(torch.rand(shape) < 0.5)
    expected = transposable_mask(weight.double())
    flips = count_flips(mask, expected)
    assert float(cuda.rank_transposable(weight, mask)) == float(flips)
    assert torch.equal(mask, expected)
    assert float(cuda.rank_transposable(weight, mask)) == 0


@pytest.mark.usefixtures("on_gpu_kernels")
def test_a_transposable_mask_by_hand() -> None:
    half = torch.tensor([[9.0, -8, 1, 2], [-9, 8, 2, 1], [7, 6, -5, 4], [6, 7, 4, -5]])
    assert transposable_mask(half).tolist() == [0b0011_0011, 0b1100_1100]
    mask = torch.zeros(4, dtype=torch.uint8)
    assert float(update_mask(mask, torch.ones(8, 4), TWO_OF_FOUR, transposable=True)) == 16
    assert mask.tolist() == [0b0011_0011, 0b1100_1100] * 2
    assert float(cuda.rank_transposable(torch.zeros(0, 4), torch.zeros(0, dtype=torch.uint8))) == 0
    half[3, 3] = math.nan
    with pytest.raises(ValueError, match=r"a weight of shape \[4, 4\] holds NaN, which has no rank"):
        transposable_mask(half)
    changed = update_mask(mask, torch.cat([torch.ones(4, 4), half]), TWO_OF_FOUR, transposable=True)
    assert math.isnan(float(changed))


@pytest.mark.parametrize("place", [0, 5, 4099])
def test_a_nan_is_told_and_stays_told(place: int) -> None:
    weight = torch.randn(1100, 4)
    weight.view(-1)[place] = math.nan
    count = cuda.rank(weight, torch.zeros(550, dtype=torch.uint8), TWO_OF_FOUR)
    assert math.isnan(float(count + 3))


def test_the_decay_leaves_kept_weights_alone() -> None:
    weight, mask = torch.tensor([[2.0, -4.0]]), torch.tensor([0b01], dtype=torch.uint8)
    gradient = torch.tensor([[math.inf, 1.0]])
    cuda.decay_pruned(weight, mask, gradient, 0.25)
    assert gradient.tolist() == [[math.inf, 0.0]]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_pruned_weights_are_positive_zeros(dtype: torch.dtype | None) -> None:
    """A bf16 result is left to the tests on a GPU: the interpreter rounds to it by cutting off."""
    weight = torch.tensor([[-1.0, 1 / 3, -math.inf, math.nan, -0.0]])
    found = cuda.masked(weight, torch.tensor([0b10010], dtype=torch.uint8), dtype)
    expected = torch.tensor([[0.0, 1 / 3, 0.0, 0.0, -0.0]]).to(dtype or torch.float32)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.usefixtures("on_gpu_kernels")
def test_the_verbs_on_masks_use_them() -> None:
    weight = torch.randn(6, 8)
    mask = magnitude_mask(weight, TWO_OF_FOUR)
    assert unpack_bits(mask, weight.shape).sum() == 24
    weight[0] = torch.tensor([9.0, 9, 9, 9, 9, 9, 9, 9])
    before = mask.clone()
    assert float(update_mask(mask, weight, TWO_OF_FOUR)) == float(count_flips(before, mask))
    assert mask[0] == 0b0011_0011
    keeps = unpack_bits(mask, weight.shape)
    assert torch.equal(apply_mask(weight, mask, torch.float16), torch.where(keeps, weight, 0.0).half())
    with pytest.raises(ValueError, match=r"a weight of shape \[1, 4\] holds NaN, which has no rank"):
        magnitude_mask(torch.tensor([[1.0, 2.0, math.nan, 4.0]]), TWO_OF_FOUR)


def trained(method: str) -> tuple[nn.Module, dict[str, float]]:
    """A small network after three steps, and the flips of its layers."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    sparsify(model, NMSparseConfig("2:4", ignore=(), soft=method == "s-ste"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    step = SparseStep(model, optimizer, method, decay=0.25 if method == "sr-ste" else None)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(16, 8)
        (model(x) - x).square().mean().backward()
        optimizer.step()
    return model, {name: flips.sad for name, flips in step.take_flips().items()}


@pytest.mark.parametrize("method", ["ste", "sr-ste", "s-ste"])
def test_training_is_that_of_the_plain_code(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as plain:
        plain.setattr(native, "can_rank", lambda weight: False)
        expected, flips = trained(method)
    assert sum(flips.values()) > 0
    monkeypatch.setattr(native, "can_rank", lambda weight: False)
    monkeypatch.setattr(cuda, "can_rank", lambda weight: weight.is_contiguous())
    found, same = trained(method)
    assert same == flips
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)  # one rounding more or less in each decay


@pytest.mark.usefixtures("on_gpu_kernels")
def test_a_weight_that_becomes_nan_is_found_when_the_flips_are_read() -> None:
    layer = NMLinear.from_stock(nn.Linear(4, 1, bias=False), TWO_OF_FOUR)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    step = SparseStep(layer, optimizer, "ste")
    layer.weight.grad = torch.tensor([[math.nan, 0.0, 0.0, 0.0]])
    optimizer.step()
    with pytest.raises(ValueError, match="the weight of  holds NaN, which has no rank; check the loss"):
        step.take_flips()


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_nmsparse.kernels import triton_kernels as kernels

SOURCES = [
    (kernels.rank, ["*fp32", "*u8", "*fp64", "i32"], {"n": 2, "m": 4, "block": 128}),
    (kernels.rank, ["*bf16", "*u8", "*fp64", "i32"], {"n": 3, "m": 5, "block": 128}),
    (kernels.decay_pruned, ["*fp32", "*u8", "*fp32", "fp32", "i32"], {"block": 1024}),
    (kernels.masked, ["*fp32", "*u8", "*bf16", "fp32", "i32"], {"block": 1024}),
    (kernels.soft_threshold, ["*fp32", "*u8", "*fp32", "i32"], {"m": 4, "block": 1024}),
    (kernels.best_patterns, ["*fp32", "*i32", "*i32", "*fp64", "i32", "i32"], {"tiles": 16}),
    (kernels.best_patterns, ["*bf16", "*i32", "*i32", "*fp64", "i32", "i32"], {"tiles": 16}),
    (kernels.renew, ["*i32", "*u8", "*fp64", "i32", "i32"], {"block": 128}),
]
for capability in (80, 90):
    for kernel, kinds, constants in SOURCES:
        signature = dict(zip(kernel.arg_names, kinds)) | dict.fromkeys(constants, "constexpr")
        compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
        print(kernel.__name__, capability, len(compiled.asm["cubin"]) > 0)
"""


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """The interpreter takes what the compiler does not; compiling needs no GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    process = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    names = ("rank", "rank", "decay_pruned", "masked", "soft_threshold", "best_patterns", "best_patterns", "renew")
    lines = [f"{name} {unit} True" for unit in (80, 90) for name in names]
    assert process.stdout.splitlines() == lines
