"""The native library: products, masks and decay against plain torch, on every vector unit that the machine has."""

from __future__ import annotations

import os
import pickle
import platform
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hf_nmsparse.kernels import cpu, library, native, order
from hf_nmsparse.masks import apply_mask, count_flips, magnitude_mask, pack_bits, transposable_mask, unpack_bits
from hf_nmsparse.packed_layers import Int8Head, KernelLinear, PackedLinear
from hf_nmsparse.packing import pack, unpack
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.rounding import quantize_rows
from hf_nmsparse.srste import soft_threshold
from tests.processes import in_a_fresh_one

pytestmark = pytest.mark.skipif(library.status().library is None, reason=library.status().reason)

TWO_OF_FOUR = NMPattern(2, 4)
HELD = {
    "int8_8of16": NMPattern(8, 16),
    "int8_4of16": NMPattern(4, 16),
    "fp32_1of4": NMPattern(1, 4),
    "bf16_1of4": NMPattern(1, 4),
}
BOUNDS = {kind: {"fp32": 1e-6, "bf16": 3e-3, "int8": 2.5e-2}[library.numbers_of(kind)] for kind in native.FORMATS}
"""Distance to the product in fp64 with the weight before rounding, in norm, which a user may count on.

With int8 on the units whose activations have seven bits it is 1.7% in the mean: a step of 6.6 standard deviations / 127
in the activations and 6.6 / 255 in the weights, each over the root of 12.
"""


def sparse_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    return apply_mask(weight, magnitude_mask(weight, TWO_OF_FOUR))


def pruned(weight: Tensor, kind: str) -> Tensor:
    """``weight``, or what of its largest numbers a kind holds that keeps some of 16 or 4 columns."""
    if kind not in HELD:
        return weight
    columns = weight.shape[1]
    whole = torch.nn.functional.pad(weight, (0, -columns % 16))
    return apply_mask(whole, magnitude_mask(whole, HELD[kind]))[:, :columns].contiguous()


def packed_weight(weight: Tensor, kind: str) -> Tensor:
    """``weight``, in fp32, 2:4 or for other kinds any, `pruned`, in the order of the library."""
    weight = pruned(weight, kind)
    if not order.takes_codes(kind):
        if library.numbers_of(kind) == "int8":
            values, scale = quantize_rows(weight)
            return native.repack(kind, weight.shape[1], values, scale=scale)
        return native.repack(kind, weight.shape[1], weight.to(native._VALUES[kind]))
    both = pack(weight, TWO_OF_FOUR)
    if kind == "int8":
        values, scale = quantize_rows(both["weight"])
        return native.repack(kind, weight.shape[1], values, both["weight_indices"], scale)
    values = both["weight"].to({"fp32": torch.float32, "bf16": torch.bfloat16}[kind])
    return native.repack(kind, weight.shape[1], values, both["weight_indices"])


def dense_weight(packed: Tensor, kind: str, out_features: int, in_features: int) -> Tensor:
    """The weight that ``packed`` stands for, in fp64."""
    dense, scale = native.restore(packed, kind, out_features, in_features)
    return dense.double() if scale is None else dense.double() * scale.double()[:, None]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@contextmanager
def threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- each vector unit, in a process of its own ----

# Sizes fill whole blocks of rows and chunks of columns, and leave remainders of both; rows take every path.
SIZES = [(256, 512), (96, 2048), (333, 68), (130, 260)]
ROWS = (1, 2, 3, 5, 8, 16, 31, 65, 520)


def has_neon(unit: str) -> bool:
    """Whether an AArch64 machine has the unit; every one has NEON, and all of Apple's dot products."""
    if unit != "neon_dotprod":
        return unit == "neon"
    info = Path("/proc/cpuinfo")
    return sys.platform == "darwin" or (info.exists() and "asimddp" in info.read_text(encoding="utf-8"))


def lacks(unit: str) -> str | None:
    """Why this machine cannot run a unit, as torch sees it."""
    if unit == "scalar":
        return None
    machine = platform.machine().lower()
    if unit.startswith("neon") or machine in ("aarch64", "arm64"):
        return None if machine in ("aarch64", "arm64") and has_neon(unit) else f"it is {machine}"
    capability = torch.backends.cpu.get_cpu_capability()
    if unit == "avx2":
        return None if capability in ("AVX2", "AVX512") else f"torch finds {capability}"
    vnni, bf16 = torch.cpu._is_vnni_supported(), torch.cpu._is_avx512_bf16_supported()
    if capability == "AVX512" and vnni and (bf16 or unit == "avx512"):
        return None
    return f"torch finds {capability}, VNNI {vnni}, BF16 {bf16}"


def check_unit(unit: str, folder: str) -> None:
    """What a fresh process does whose unit HF_NMSPARSE_UNIT names."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    status = library.status()
    assert (status.unit, status.reason) == (unit, "HF_NMSPARSE_UNIT asks for this unit")
    check_products()
    check_masks()
    check_transposable_masks()
    check_what_another_unit_left(Path(folder), unit)


def check_products() -> None:
    for out_features, in_features in SIZES:
        weight, bias = sparse_weight(out_features, in_features), torch.randn(out_features)
        for kind in native.FORMATS:
            full = weight if order.takes_codes(kind) else pruned(torch.randn(out_features, in_features), kind)
            packed, dense = packed_weight(full, kind), packed_weight(full, "dense_int8")
            for rows in ROWS:
                for dtype in (torch.float32,) if "fp32" in kind else (torch.float32, torch.bfloat16):
                    x = torch.randn(rows, in_features).to(dtype)
                    found = native.multiply(x, packed, bias, kind, out_features)
                    if dtype == torch.float32:  # an output does not depend on the rows beside it
                        assert torch.equal(found[-1], native.multiply(x[-1:], packed, bias, kind, out_features)[0])
                    if kind in ("int8_8of16", "int8_4of16"):  # sums of integers are exact, in whatever order
                        assert torch.equal(found, native.multiply(x, dense, bias, "dense_int8", out_features))
                    error = distance(found, x.double() @ full.double().T + bias)
                    assert error < BOUNDS[kind], (kind, dtype, out_features, in_features, rows, error)


def check_masks() -> None:
    for pattern in (
        TWO_OF_FOUR,
        NMPattern(1, 4),
        NMPattern(4, 8),
        NMPattern(1, 2),
        NMPattern(1, 16),
        NMPattern(3, 5),
        NMPattern(16, 32),
        NMPattern(31, 32),
    ):
        weight = torch.randn(37, 29 * pattern.m).round(decimals=1)  # with ties
        mask = pack_bits(torch.rand(weight.shape) < 0.5)
        before = mask.clone()
        flips = native.rank(weight, mask, pattern)
        assert torch.equal(mask, magnitude_mask(weight.double(), pattern))  # only fp32 takes the library
        assert flips == int(count_flips(mask, before))
        for scale in (0.0, 0.3):
            expected = apply_mask(weight.double(), mask, torch.float32, pruned_scale=scale)
            torch.testing.assert_close(native.masked(weight, mask, pruned_scale=scale), expected, rtol=2e-7, atol=0)
        soft = native.soft_threshold(weight, mask, pattern)
        assert torch.equal(soft, soft_threshold(weight.double(), mask, pattern).float())
        assert not soft.signbit()[~unpack_bits(mask, weight.shape)].any()
        gradient = torch.randn(weight.shape)
        expected = gradient.double() + apply_mask(weight.double(), ~mask) * 0.25
        native.decay_pruned(weight, mask, gradient, 0.25)
        torch.testing.assert_close(gradient.double(), expected, rtol=2e-7, atol=1e-8)


def check_transposable_masks() -> None:
    for shape in ((4, 4), (8, 60), (12, 64), (20, 68), (64, 1028)):
        weight = torch.randn(shape).round(decimals=1)  # with ties
        weight[:, ::3] = torch.tensor([1e30, -torch.inf, 1e-45, 3e38])[torch.randint(0, 4, weight[:, ::3].shape)]
        mask = pack_bits(torch.rand(shape) < 0.5)
        before = mask.clone()
        flips = native.rank_transposable(weight, mask)
        assert torch.equal(mask, transposable_mask(weight.double()))  # only fp32 takes the library
        assert flips == int(count_flips(mask, before))


def check_what_another_unit_left(folder: Path, unit: str) -> None:
    left = torch.load(folder / "left.pt")
    loaded = pickle.loads((folder / "layers.pickle").read_bytes())
    for name, layer in loaded.items():
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, left["state"][name][key])
        assert distance(layer(left["x"]), left["dense"].double()) < BOUNDS[name], name
    for name in (*loaded, "dense_int8"):  # the head is exported with its float weight
        exported = torch.export.load(folder / f"{name}.pt2").module()
        if name == "dense_int8" or unit in native._UNITS_OF[left["lanes"]]:
            assert distance(exported(left["x"]).detach(), left["dense"].double()) < BOUNDS[name], name
            continue
        message = rf"are no {name} weight of \[8, 16\] for the unit {unit}: they are for .*; export the model here"
        with pytest.raises(ValueError, match=message):
            exported(left["x"])
    (folder / f"{unit}.pickle").write_bytes(pickle.dumps(loaded))


@pytest.mark.parametrize("unit", library.UNITS)
def test_unit(unit: str, tmp_path: Path) -> None:
    if reason := lacks(unit):
        pytest.skip(f"this machine has not {unit}: {reason}")
    weight = sparse_weight(8, 16)
    linear = torch.nn.Linear(16, 8, bias=False)
    linear.weight = torch.nn.Parameter(weight)
    layers = {
        name: KernelLinear(PackedLinear.from_linear(linear, TWO_OF_FOUR), name) for name in ("fp32", "bf16", "int8")
    }
    x = torch.randn(40, 16)
    state = {name: layer.state_dict() for name, layer in layers.items()}
    head = torch.nn.Linear(16, 8, bias=False)
    head.weight = torch.nn.Parameter(weight)
    for name, layer in {**layers, "dense_int8": Int8Head.from_linear(head)}.items():
        torch.export.save(torch.export.export(layer, (x,)), tmp_path / f"{name}.pt2")
    lanes = native._HEADER.unpack(bytes(layers["fp32"].kernel_weight[:64].tolist()))[2]
    left = {"x": x, "dense": x @ weight.T, "state": state, "lanes": lanes}
    torch.save(left, tmp_path / "left.pt")
    (tmp_path / "layers.pickle").write_bytes(pickle.dumps(layers))
    process(f"from tests.test_native import check_unit; check_unit({unit!r}, {str(tmp_path)!r})", HF_NMSPARSE_UNIT=unit)
    back = pickle.loads((tmp_path / f"{unit}.pickle").read_bytes())
    for name, layer in layers.items():
        assert torch.equal(back[name].kernel_weight, layer.kernel_weight)


def process(code: str, fails: bool = False, **environment: str) -> str:
    """Runs code in a fresh process; what it printed, or its standard error where it is to fail."""
    strict = ("-W", "error::UserWarning", "-c", code)
    return in_a_fresh_one(*strict, fails=fails, environment=os.environ | environment)


def test_a_unit_that_is_none_is_refused() -> None:
    code = "from hf_nmsparse.kernels import library; library.status()"
    message = process(code, fails=True, HF_NMSPARSE_UNIT="avx3")
    known = "avx512_bf16, avx512, avx2, neon_dotprod, neon, scalar"
    assert f"HF_NMSPARSE_UNIT: 'avx3' is none of {known}, or this machine has it" in message


def test_without_the_library_everything_computes_dense(tmp_path: Path) -> None:
    code = r"""
import sys, pytest, torch
from transformers import MarianMTModel
from hf_nmsparse import NMSparseQuantizationConfig, save_packed
from hf_nmsparse.kernels import library
from hf_nmsparse.layers import sparse_layers
from tests.packed_models import output, sparse
from tests.test_round_trip import load
model = sparse()
for values in ("fp32", "int8"):
    save_packed(model, sys.argv[1], values=values)
    loaded = load(sys.argv[1])
    assert {type(loaded.get_submodule(name)) for name in sparse_layers(loaded)} == {torch.nn.Linear}
    assert torch.equal(output(loaded), output(load(sys.argv[1], "dense")))
    assert values == "int8" or torch.equal(output(loaded), output(model))
    for choice in ({"compute": "fp32"}, {"compute": "int8"}, {"head": "int8"}):
        config = NMSparseQuantizationConfig(**choice)
        with pytest.raises(ValueError, match=r"is not used \(HF_NMSPARSE_NATIVE=0 turns it off\); choose"):
            MarianMTModel.from_pretrained(sys.argv[1], quantization_config=config)
assert library.status().chosen
"""
    # A warning would be an error: a user who turned the library off knows why dense layers compute.
    code = code.replace("sys.argv[1]", repr(str(tmp_path)))
    process(code, HF_NMSPARSE_NATIVE="0")


def test_a_library_that_is_missing_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cached in (library._load, native._library):
        cached.cache_clear()
    monkeypatch.setattr(library, "_NAME", "libnone.so")
    try:
        status = library.status()
        assert (status.library, status.unit, status.chosen) == (None, None, False)
        assert status.reason == "libnone.so is not installed: no C++ compiler was found at installation"
        assert not native.can_rank(torch.ones(4))
        with pytest.raises(ValueError, match=r"the native library is not used \(libnone\.so is not installed"):
            packed_weight(torch.eye(4), "fp32")
        (tmp_path / "libnone.so").write_bytes(b"no library")
        monkeypatch.setattr("hf_nmsparse.kernels.__path__", [str(tmp_path)])
        library._load.cache_clear()
        assert "libnone.so does not load: " in library.status().reason
    finally:
        library._load.cache_clear()


# ---- the product, by properties ----

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "turned over": lambda x: x.T.contiguous().T,
    "columns of a wider one": lambda x: torch.cat([x - 1, x, x + 1], dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "one row again and again": lambda x: x[:1].expand(x.shape[0], -1) if x.shape[0] else x,
    "three dimensions": lambda x: x.reshape(-1, 1, x.shape[1]).expand(-1, 3, -1),
    "three dimensions, the first two swapped": lambda x: x.repeat(2, 1).reshape(2, *x.shape).transpose(0, 1),
    "one dimension": lambda x: x[0] if x.shape[0] else x,
}
# Exponents of 2 of the rows, so far apart that no sum overflows in fp32; fp16 has room for less.
MAGNITUDES = {torch.float32: (-40, 0, 40), torch.bfloat16: (-40, 0, 40), torch.float16: (-6, 0, 3)}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def numbers(shape: tuple[int, int], pool: list[float], generator: torch.Generator) -> Tensor:
    """Normal numbers, and where the pool is not empty now and then one of it."""
    result = torch.randn(shape, generator=generator)
    if pool:
        picked = torch.tensor(pool)[torch.randint(len(pool), shape, generator=generator)]
        result = torch.where(torch.rand(shape, generator=generator) < 0.3, picked, result)
    return result


def largest_error(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """How far a sum of products in fp32 can be from the one in fp64, whatever its order.

    Each of the roundings of a sum of n products adds at most 2^-24 of the sum of magnitudes; the last term is for
    products below the smallest normal number, which units for bf16 take for zero. With int8 each x is off by half a
    step of its row's 127 to 255 levels, and rows too small for a scale in fp32 count as zero.
    """
    magnitudes = x.abs() @ weight.abs().T
    error = (x.shape[-1] + 4) * 2.0**-24 * magnitudes + x.shape[-1] * 2.0**-126
    if bias is not None:
        error = error + 2.0**-23 * (bias.abs() + magnitudes)
    if library.numbers_of(kind) == "int8":
        low, high = x.amin(dim=-1, keepdim=True).clamp(max=0), x.amax(dim=-1, keepdim=True).clamp(min=0)
        step = (high - low) / 127 + 1e-36
        error = error + 0.5001 * step * weight.abs().sum(dim=1)
        # The zero point's share of the sum is taken away again in fp32.
        error = error + 2.0**-22 * (high - low) * weight.abs().sum(dim=1)
    return error


@settings(max_examples=400)
@given(st.data())
def test_products_of_any_shape(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(native.FORMATS)))
    dtype = data.draw(st.sampled_from(list(MAGNITUDES)))
    rows, out_features = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 100))
    in_features = 4 * data.draw(st.integers(1, 75))
    if kind == "dense_int8" or kind in HELD:
        in_features -= data.draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    pool = data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-12, -7e-13, 300.0, -500.0]), max_size=5))
    weight = numbers((out_features, in_features), pool, generator)
    weight = weight * 2.0 ** data.draw(st.sampled_from((-20, 0, 20) if dtype != torch.float16 else (-3, 0)))
    if order.takes_codes(kind):
        weight = apply_mask(weight, magnitude_mask(weight, TWO_OF_FOUR))
    x = numbers((rows, in_features), pool, generator)
    exponents = torch.tensor(MAGNITUDES[dtype])[torch.randint(3, (rows, 1), generator=generator)]
    x = (x * 2.0**exponents).to(dtype)
    x = VIEWS[data.draw(st.sampled_from(list(VIEWS)))](x)
    bias = torch.randn(out_features, generator=generator).to(dtype) if data.draw(st.booleans()) else None

    packed = packed_weight(weight, kind)
    exact = dense_weight(packed, kind, out_features, in_features)
    before = x.clone()
    found = native.multiply(x, packed, bias, kind, out_features)
    assert found.shape == (*x.shape[:-1], out_features)
    assert found.dtype == dtype
    assert found.is_contiguous()
    wide, wide_bias = x.double(), None if bias is None else bias.double()
    expected = wide @ exact.T if wide_bias is None else wide @ exact.T + wide_bias
    error = largest_error(wide, exact, wide_bias, kind)
    error = error + ROUNDING[dtype] * (expected.abs() + error) + (2.0**-24 if dtype == torch.float16 else 0)
    largest = torch.finfo(dtype).max
    fits = expected.abs() + error < largest  # a product of fp16 may be infinite
    assert ((found.double() - expected).abs() <= error)[fits].all()
    assert not found.isnan().any()
    assert torch.equal(found, native.multiply(x, packed, bias, kind, out_features))
    assert torch.equal(x, before)


def test_a_product_by_hand() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, -2.0, 3.0, 0.0, 4.0, 0.0], [1.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0]])
    x, bias = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5, 6.0, -1.0, 7.0]), torch.tensor([10.0, 20.0])
    for kind in ("fp32", "bf16"):
        found = native.multiply(x, packed_weight(weight, kind), bias, kind, 2)
        assert found.tolist() == [10.0 + 5 * 2 - 2 * 4 + 3 * 0.5 - 4, 20.0 + 1 + 3 * 4]


@pytest.mark.parametrize("kind", native.FORMATS)
@pytest.mark.parametrize("rows", [1, 7, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # some units have kernels of their own for bf16
def test_a_row_that_is_not_finite_spoils_no_other(kind: str, rows: int, dtype: torch.dtype) -> None:
    packed, x = packed_weight(sparse_weight(40, 96), kind), torch.randn(rows, 96).to(dtype)
    kept = dense_weight(packed, kind, 40, 96) != 0
    clean = native.multiply(x, packed, None, kind, 40)
    for bad in (float("nan"), float("inf"), float("-inf")):
        for row, column in ((0, 0), (rows // 2, 50), (rows - 1, 95)):
            spoilt = x.clone()
            spoilt[row, column] = bad
            found = native.multiply(spoilt, packed, None, kind, 40)
            others = torch.arange(rows) != row
            assert torch.equal(found[others], clean[others])
            if "int8" in kind:
                assert found[row].isnan().all()
            else:
                assert not found[row, kept[:, column]].isfinite().any()


@pytest.mark.parametrize("kind", native.FORMATS)
def test_a_row_whose_range_is_beyond_fp32(kind: str) -> None:
    # The largest less the smallest is infinite, the product is not.
    weight = sparse_weight(24, 64) * 2.0**-10
    packed, x = packed_weight(weight, kind), torch.randn(5, 64)
    x[2, :2] = torch.tensor([3e38, -3e38])
    found = native.multiply(x, packed, None, kind, 24)
    exact = dense_weight(packed, kind, 24, 64)
    error = largest_error(x.double(), exact, None, kind)
    assert ((found.double() - x.double() @ exact.T).abs() <= error).all()


@pytest.mark.parametrize("kind", native.FORMATS)
def test_threads_change_no_bit(kind: str) -> None:
    weight = sparse_weight(700, 512)
    packed, bias = packed_weight(weight, kind), torch.randn(700)
    for rows in (1, 4, 17, 100, 520):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, 512).to(dtype)
            found = []
            for count in (1, 2, 3, 1):
                with threads(count):
                    found.append(native.multiply(x, packed, bias.to(dtype), kind, 700))
            assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("count", [1, 2])
def test_calls_from_several_threads_at_once(count: int) -> None:
    # Each thread of Python has scratch memory of its own, and all of them share torch's threads.
    jobs: list[tuple[Tensor, Tensor, None, str, int]] = []
    for number, kind in enumerate([*native.FORMATS] * 6):
        out_features, in_features, rows = 64 + 40 * number, 64 * (1 + number % 5), 1 + 13 * number
        packed = packed_weight(sparse_weight(out_features, in_features, seed=number), kind)
        x = torch.randn(rows, in_features).to((torch.float32, torch.bfloat16)[number % 2])
        jobs.append((x, packed, None, kind, out_features))
    alone = [native.multiply(*job) for job in jobs]
    with threads(count), ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = pool.map(lambda job: native.multiply(*job), jobs)
            assert all(torch.equal(found, expected) for found, expected in zip(together, alone, strict=True))


def in_a_child(check: Callable[[], None]) -> None:
    """Runs ``check`` in a fork of this process; whatever it does to itself there, a failure is one test's failure."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            check()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    end = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 0


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
fork_warns = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@forks
@fork_warns
def test_a_forked_child_computes() -> None:
    weight, x = sparse_weight(300, 256), torch.randn(40, 256)
    jobs = [(x, packed_weight(weight, kind), None, kind, 300) for kind in native.FORMATS]
    with threads(2):  # torch's threads exist before the fork, and do not in the child
        expected = [native.multiply(*job) for job in jobs]

        def check() -> None:
            assert all(torch.equal(native.multiply(*job), wanted) for job, wanted in zip(jobs, expected, strict=True))

        in_a_child(check)


@forks
@fork_warns
@pytest.mark.parametrize("kind", native.FORMATS)
def test_the_default_type_of_torch_does_not_matter(kind: str) -> None:
    # Of a narrower type, the memory would be too short for the scales.
    packed = packed_weight(sparse_weight(40, 64), kind)
    expected = native.restore(packed, kind, 40, 64)

    def check() -> None:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            for found, wanted in zip(native.restore(packed, kind, 40, 64), expected, strict=True):
                if found is not None and wanted is not None:
                    assert found.dtype == wanted.dtype
                    assert torch.equal(found, wanted)

    in_a_child(check)


@forks
@fork_warns
@pytest.mark.parametrize("kind", native.FORMATS)
def test_the_default_device_of_torch_does_not_matter(kind: str) -> None:
    # On a device that has no memory, or other memory, the library would write where nothing is.
    weight, x = sparse_weight(40, 64), torch.randn(3, 64)
    packed = packed_weight(weight, kind)
    both, (values, scale) = pack(weight, TWO_OF_FOUR), quantize_rows(weight)

    def calls() -> list[Tensor]:
        return [
            native.multiply(x, packed, None, kind, 40),
            native.restore(packed, kind, 40, 64)[0],
            native.repack("fp32", 64, both["weight"], both["weight_indices"]),
            native.repack("dense_int8", 64, values, scale=scale),
            magnitude_mask(weight, TWO_OF_FOUR),
        ]

    expected = calls()

    def check() -> None:
        with torch.device("meta"):
            found = calls()
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(found, expected, strict=True))

    in_a_child(check)


@forks
@fork_warns
def test_tracers_see_a_product() -> None:
    # Where tensors have no memory, or calls are recorded, the short way past the dispatcher must not be taken.
    packed, x = packed_weight(sparse_weight(12, 16), "fp32"), torch.randn(3, 16)
    expected = native.multiply(x + 1, packed, None, "fp32", 12)

    @torch.no_grad()
    def check() -> None:
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: cpu.linear(x, packed, None, "fp32", 12), x, check_trace=False)
        assert torch.equal(traced(x + 1), expected)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = cpu.linear(torch.empty(3, 16), packed, None, "fp32", 12)
        assert isinstance(fake, FakeTensor)
        assert fake.shape == (3, 12)

    in_a_child(check)


class TestRefusals:
    """What is not as it must be is an error before a byte is read."""

    @pytest.fixture
    def packed(self) -> Tensor:
        return packed_weight(sparse_weight(8, 64), "fp32")

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.ones(2, 64, dtype=torch.float64), r"x is in fp32, bf16 or fp16, got torch\.float64; cast it"),
            (torch.ones(2, 64, dtype=torch.int64), r"x is in fp32, bf16 or fp16, got torch\.int64; cast it"),
            (torch.empty(2, 64, device="meta"), "x lies on meta and these kernels run on CPUs; load with"),
            (torch.ones(2, 20), "bytes on cpu are no fp32 weight of"),
            (torch.ones(64, 2), "bytes on cpu are no fp32 weight of"),
        ],
        ids=["float64", "int64", "meta", "width", "turned over"],
    )
    def test_inputs(self, packed: Tensor, x: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            native.multiply(x, packed, None, "fp32", 8)

    @pytest.mark.parametrize(
        "change",
        [
            lambda packed: packed[:-1],
            lambda packed: torch.cat([packed, packed]),
            lambda packed: packed.to("meta"),
            lambda packed: packed.to(torch.float16),  # nn.Module.type casts every tensor
            lambda packed: torch.cat([packed, packed])[::2],
        ],
        ids=["short", "long", "meta", "fp16", "strided"],
    )
    def test_weights(self, packed: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        with pytest.raises(ValueError, match="no fp32 weight of"):
            native.multiply(torch.ones(2, 64), change(packed), None, "fp32", 8)
        with pytest.raises(ValueError, match="no fp32 weight of"):
            native.restore(change(packed), "fp32", 8, 64)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("shape", [(7,), (9,), (1,), (8, 1), ()], ids=str)
    def test_biases(self, packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match="bias is"):
            native.multiply(torch.ones(2, 64, dtype=dtype), packed, torch.zeros(shape), "fp32", 8)
        with pytest.raises(ValueError, match="bias is"):
            native.multiply(torch.ones(2, 64, dtype=dtype), packed, torch.empty(8, device="meta"), "fp32", 8)

    def test_what_is_repacked(self) -> None:
        both = pack(sparse_weight(8, 16), TWO_OF_FOUR)
        values, codes = both["weight"], both["weight_indices"]
        for wrong in (values.double(), values[:, :6], values.bfloat16()):
            with pytest.raises(ValueError, match=r"repack: values .* do not fit fp32 of 16"):
                native.repack("fp32", 16, wrong, codes)
        for places in (None, codes[:, :1], codes[:7], codes.to(torch.int8)):
            with pytest.raises(ValueError, match=r"repack: codes must be uint8 \[8, 2\]"):
                native.repack("fp32", 16, values, places)
        for scale in (None, torch.ones(7), torch.ones(8, 1), torch.ones(8, dtype=torch.bfloat16)):
            with pytest.raises(ValueError, match=r"repack: int8 needs a scale, fp32 \[8\]"):
                native.repack("int8", 16, values.to(torch.int8), codes, scale)
        for lost in ((values.to("meta"), codes, None), (values, codes.to("meta"), None)):
            with pytest.raises(ValueError, match="repack: values, codes and scale lie on the CPU; move them there"):
                native.repack("fp32", 16, *lost)
        for kind, kept in (("int8_4of16", 4), ("int8_8of16", 8)):
            full = torch.tensor([[0] * 16 + [1] * (kept + 1), [0, 1] * kept + [0] * (17 - kept)], dtype=torch.int8)
            with pytest.raises(
                ValueError, match=f"{kind} holds {kept} of 16 columns, got {kept + 1}; compute it dense"
            ):
                native.repack(kind, 17 + kept, full, scale=torch.ones(2))
            native.repack(kind, 17 + kept, full[1:], scale=torch.ones(1))
        with pytest.raises(ValueError, match="repack: 2:4 weights have a multiple of 4 columns, got 18"):
            native.repack("fp32", 18, values, codes)


# ---- from file order to that of the library, and back ----


@settings(max_examples=150)
@given(st.data())
def test_restoring_is_exact(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(native.FORMATS)))
    rows, in_features = data.draw(st.integers(0, 40)), 4 * data.draw(st.integers(1, 50))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    pool = data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, 3e38, -1e-40, 2.0**-126]), min_size=1, max_size=5))
    weight = numbers((rows, in_features), pool, generator)
    if library.numbers_of(kind) == "int8" and not order.takes_codes(kind):
        values = torch.randint(-127, 128, (rows, in_features), generator=generator, dtype=torch.int8)
        values = pruned(values.float(), kind).to(torch.int8)
        scales = torch.rand(rows, generator=generator)
        repacked = native.repack(kind, in_features, values, scale=scales)
        back, back_scale = native.restore(repacked, kind, rows, in_features)
        assert torch.equal(back, values)
        assert back_scale is not None
        assert torch.equal(back_scale, scales)
        return
    dtype = native._VALUES[kind]
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.int8: torch.int8}[dtype]
    if not order.takes_codes(kind):
        values = pruned(weight, kind).to(dtype)
        back, _ = native.restore(native.repack(kind, in_features, values), kind, rows, in_features)
        assert torch.equal(back.view(bits), values.view(bits))
        return
    dense = apply_mask(weight, magnitude_mask(weight, TWO_OF_FOUR)).clamp(-100 if kind == "int8" else -1e38, 1e38)
    both = pack(dense.to(dtype), TWO_OF_FOUR)
    scale = torch.rand(rows, generator=generator) if kind == "int8" else None
    packed = native.repack(kind, in_features, both["weight"], both["weight_indices"], scale)
    assert packed.numel() == native.packed_bytes(kind, rows, in_features)
    back, back_scale = native.restore(packed, kind, rows, in_features)
    expected = unpack(both["weight"], both["weight_indices"], TWO_OF_FOUR)
    assert torch.equal(back.view(bits), expected.view(bits))  # -0.0 is not 0.0
    assert (back_scale is None) == (scale is None)
    assert scale is None or back_scale is None or torch.equal(back_scale, scale)


# ---- what a packed weight says of itself ----


def refused(packed: Tensor, kind: str, out_features: int, in_features: int, why: str = "") -> None:
    """Both functions that read a packed weight refuse it in the same line."""
    message = (
        rf"^kernels: \d+ bytes on cpu are no {kind} weight of \[{out_features}, {in_features}\] for the unit \w+: "
    )
    with pytest.raises(ValueError, match=message + f".*{why}.*$"):
        native.multiply(torch.ones(3, in_features), packed, None, kind, out_features)
    with pytest.raises(ValueError, match=message + f".*{why}.*$"):
        native.restore(packed, kind, out_features, in_features)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_weight_is_refused_in_one_line(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(native.FORMATS)))
    packed = packed_weight(sparse_weight(6, 28), kind)
    how = data.draw(st.sampled_from(["header", "shorter", "longer", "another", "noise"]))
    if how == "header":
        place, value = data.draw(st.integers(0, 63)), data.draw(st.integers(1, 255))
        packed[place] ^= value
    elif how == "shorter":
        packed = packed[: data.draw(st.integers(0, packed.numel() - 1))]
    elif how == "longer":
        packed = torch.cat([packed, packed[: data.draw(st.integers(1, 200))]])
    elif how == "another":
        other = data.draw(st.sampled_from([other for other in native.FORMATS if other != kind]))
        packed = packed_weight(sparse_weight(6, 28), other)
    else:
        packed = torch.randint(256, (data.draw(st.integers(0, 2 * packed.numel())),), dtype=torch.uint8)
    refused(packed, kind, 6, 28)


@pytest.mark.parametrize("kind", native.FORMATS)
def test_a_weight_of_another_shape_with_as_many_bytes_is_refused(kind: str) -> None:
    packed = packed_weight(sparse_weight(6, 28), kind)
    for shape in ((7, 28), (6, 32)):  # in the same blocks of rows and chunks of columns
        assert packed.numel() == native.packed_bytes(kind, *shape)
        refused(packed, kind, *shape, why=rf"they are {kind} of \[6, 28\]")


def test_what_the_line_says_of_a_weight() -> None:
    packed = packed_weight(sparse_weight(8, 16), "fp32")
    lanes = native._HEADER.unpack(bytes(packed[:64].tolist()))[2]

    def changed(magic: bytes = b"NMSW", order: int = 1, lanes: int = lanes) -> Tensor:
        head = native._HEADER.pack(magic, order, lanes, 0, 8, 16)
        return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), packed[64:]])

    assert torch.equal(native.restore(changed(), "fp32", 8, 16)[0], native.restore(packed, "fp32", 8, 16)[0])
    refused(changed(b"NMSX"), "fp32", 8, 16, "another version of hf_nmsparse, or are no weight; export the model again")
    refused(changed(order=2), "fp32", 8, 16, "another version of hf_nmsparse, or are no weight; export the model again")
    refused(packed[64:], "fp32", 8, 16, "another version of hf_nmsparse, or are no weight; export the model again")
    others = {8: "avx512, avx512_bf16", 16: "avx2, neon, neon_dotprod, scalar"}[lanes]
    refused(changed(lanes=24 - lanes), "fp32", 8, 16, f"they are for {others}; export the model here, or where it was")
    refused(changed(lanes=4), "fp32", 8, 16, "they are for units of 4 lanes")
    refused(packed[:-1], "fp32", 8, 16, "they are cut short")


# ---- the operator of torch ----


@pytest.mark.parametrize("kind", native.FORMATS)
def test_opcheck(kind: str) -> None:
    packed = packed_weight(sparse_weight(12, 16), kind)
    x, bias = torch.randn(2, 3, 16, requires_grad=True), torch.randn(12, requires_grad=True)
    torch.library.opcheck(torch.ops.nmsparse.linear.default, (x, packed, bias, kind, 12))
    torch.library.opcheck(torch.ops.nmsparse.linear.default, (x.detach()[0], packed, None, kind, 12))
    torch.library.opcheck(torch.ops.nmsparse.weight.default, (packed, kind, 12, 16))


def test_opcheck_of_the_rounded_product() -> None:
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 16), (12, 16), (12,)))
    torch.library.opcheck(torch.ops.nmsparse.rounded_linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.nmsparse.rounded_linear.default, (x.detach()[0], weight.detach(), None))


# The import of torch's own compiler warns.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_torch_compile_in_one_graph() -> None:
    torch.compiler.reset()
    linear = torch.nn.Linear(16, 12)
    linear.weight = torch.nn.Parameter(sparse_weight(12, 16))
    layer = KernelLinear(PackedLinear.from_linear(linear, TWO_OF_FOUR), "fp32")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 16, requires_grad=True)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
        [grad] = torch.autograd.grad(compiled(x).square().sum(), x)
        [expected] = torch.autograd.grad(layer(x).square().sum(), x)
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("kind", native.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_layer(kind: str, dtype: torch.dtype) -> None:
    packed = packed_weight(sparse_weight(12, 32), kind)
    dense = dense_weight(packed, kind, 12, 32).to(dtype)
    x, bias = torch.randn(2, 5, 32).to(dtype), torch.randn(12).to(dtype)
    upstream = torch.randn(2, 5, 12).to(dtype)
    found = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    cpu.linear(found[0], packed, found[1], kind, 12).backward(upstream)
    expected = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    torch.nn.functional.linear(expected[0], dense, expected[1]).backward(upstream)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == dtype
        # The same product, summed in another order.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    packed = packed_weight(sparse_weight(12, 16), "fp32")
    bias = torch.randn(12, requires_grad=True)
    out = cpu.linear(torch.randn(3, 16), packed, bias, "fp32", 12)
    out.sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((12,), 3.0))
    assert not cpu.linear(torch.randn(3, 16), packed, None, "fp32", 12).requires_grad
    with torch.inference_mode():
        assert not cpu.linear(torch.randn(3, 16), packed, bias, "fp32", 12).requires_grad


def test_which_patterns_the_kernels_compute() -> None:
    patterns = [NMPattern(n, m) for m in range(2, 33) for n in range(1, m)]
    for numbers in ("fp32", "bf16"):
        fitting = {str(pattern) for pattern in patterns if order.format_of(pattern, 4 * pattern.m, numbers)}
        assert fitting == {f"1:{m}" for m in range(2, 33)} | {f"2:{m}" for m in range(4, 33, 4)}
        fitting = {str(pattern) for pattern in patterns if order.format_of(pattern, 3 * pattern.m, numbers)}
        assert fitting == {f"{n}:{m}" for n in (1, 2) for m in range(4, 33, 4)}  # others have no whole groups of four
    for kind, pattern in {"fp32": TWO_OF_FOUR, "bf16": TWO_OF_FOUR, "int8": TWO_OF_FOUR, **HELD}.items():
        numbers = library.numbers_of(kind)
        assert order.format_of(pattern, 65536, numbers) == kind
        assert order.format_of(pattern, 2 * 65536, numbers) == (None if numbers == "int8" else kind)
    assert order.format_of(NMPattern(9, 16), 64, "int8") is None
    chosen = {kind: cpu.preferred_format(dtype) for kind, dtype in native._VALUES.items() if order.takes_codes(kind)}
    assert chosen == {"fp32": "fp32", "bf16": "bf16", "int8": "int8"}
    assert cpu.preferred_format(torch.float16) == "fp32"


# ---- masks and decay ----


def plain_mask(row: list[float], pattern: NMPattern) -> list[bool]:
    """The definition: of each group the N largest magnitudes, of equal ones the first."""
    mask = []
    for start in range(0, len(row), pattern.m):
        order = sorted(range(pattern.m), key=lambda i: (-abs(row[start + i]), i))
        mask += [place in order[: pattern.n] for place in range(pattern.m)]
    return mask


@settings(max_examples=300)
@given(st.data())
def test_masks_are_those_of_torch(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 32))
    pattern = NMPattern(data.draw(st.integers(1, m - 1)), m)
    rows, groups = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    inf = float("inf")
    pool = data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, inf, -inf, 1e-45, -1e-45, 3e38]), max_size=6))
    weight = numbers((rows, groups * m), pool, generator)
    mask = pack_bits(torch.rand(weight.shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 1.0])))
    before, kept = mask.clone(), weight.clone()
    assert native.can_rank(weight)
    flips = native.rank(weight, mask, pattern)
    assert torch.equal(mask, magnitude_mask(weight.double(), pattern))  # the library takes fp32 alone
    assert flips == int(count_flips(mask, before))
    assert torch.equal(weight, kept)
    if rows:
        assert unpack_bits(mask, weight.shape)[0].tolist() == plain_mask(weight[0].tolist(), pattern)
        bad = weight.clone()
        place = data.draw(st.integers(0, bad.numel() - 1))
        bad.view(-1)[place] = data.draw(st.sampled_from([float("nan"), -float("nan")]))
        with pytest.raises(ValueError, match=r"^mask: a weight of shape \[.*\] holds NaN, which has no rank"):
            native.rank(bad, mask, pattern)

    decay = data.draw(st.sampled_from([0.0, 2e-4, -0.5, 6.0]))
    finite = weight.nan_to_num(0.0, 1.0, -1.0).clamp(-1e30, 1e30)
    gradient = numbers((rows, groups * m), [0.0, -0.0, 1e-30], generator)
    found = gradient.clone()
    keeps = torch.rand(weight.shape, generator=generator) < 0.5
    native.decay_pruned(finite, pack_bits(keeps), found, decay)
    assert torch.equal(found[keeps], gradient[keeps])
    term = decay * finite.double()
    # Two roundings, of the product and of the sum, or one where they are one instruction.
    error = 2.0**-23 * (gradient.double().abs() + term.abs()) + 2.0**-149
    assert ((found.double() - (gradient.double() + term)).abs() <= error)[~keeps].all()


def test_masks_of_many_groups_on_many_threads() -> None:
    weight = torch.randn(600, 1024)
    for pattern in (TWO_OF_FOUR, NMPattern(4, 8), NMPattern(5, 32)):
        expected = magnitude_mask(weight.double(), pattern)
        for count in (1, 2, 3):
            mask = torch.zeros(weight.numel() // 8, dtype=torch.uint8)
            with threads(count):
                assert native.rank(weight, mask, pattern) == weight.numel() * pattern.n // pattern.m
                assert torch.equal(mask, expected)
                assert native.rank(weight, mask, pattern) == 0
    weight[-1, -1] = float("nan")
    with threads(2), pytest.raises(ValueError, match="holds NaN"):
        native.rank(weight, mask, TWO_OF_FOUR)


def test_transposable_masks_on_many_threads() -> None:
    weight = torch.randn(512, 1028)  # of which every other row begins in the middle of a byte
    expected = transposable_mask(weight.double())
    for count in (1, 2, 3):
        mask = torch.zeros(weight.numel() // 8, dtype=torch.uint8)
        with threads(count):
            assert native.rank_transposable(weight, mask) == weight.numel() // 2
            assert torch.equal(mask, expected)
            assert native.rank_transposable(weight, mask) == 0
    weight[-1, -1] = float("nan")
    with threads(2), pytest.raises(ValueError, match="holds NaN"):
        native.rank_transposable(weight, mask)
    for empty in (torch.zeros(0, 8), torch.zeros(8, 0)):
        assert native.rank_transposable(empty, torch.zeros(0, dtype=torch.uint8)) == 0


def test_which_weights_the_library_ranks() -> None:
    class Special(Tensor):
        pass

    weight = torch.randn(4, 8)
    assert native.can_rank(weight)
    assert native.can_rank(torch.nn.Parameter(weight))
    assert native.can_rank(weight.requires_grad_())
    for other in (
        weight.detach().T,
        weight.detach()[:, ::2],
        weight.double(),
        weight.bfloat16(),
        weight.to("meta"),
        weight.detach().as_subclass(Special),
    ):
        assert not native.can_rank(other)


def test_transient_weights_share_memory_within_a_thread_alone() -> None:
    large, small = torch.randn(8, 16), torch.randn(4, 8)

    def lent(weight: Tensor) -> Tensor:
        mask = magnitude_mask(weight, TWO_OF_FOUR)
        kept = native.masked(weight, mask, transient=True)
        assert torch.equal(kept, native.masked(weight, mask))
        soft = native.soft_threshold(weight, mask, TWO_OF_FOUR, transient=True)
        assert torch.equal(soft, native.soft_threshold(weight, mask, TWO_OF_FOUR))
        assert soft.data_ptr() == kept.data_ptr()
        return kept

    with torch.inference_mode():
        first = lent(large)
    assert not first.is_inference()
    assert lent(small).data_ptr() == first.data_ptr()
    assert lent(large).data_ptr() == first.data_ptr()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lent, small).result().data_ptr() != first.data_ptr()
