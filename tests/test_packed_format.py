"""The rules of the packed format on the tensors of one layer, as a file or a state dict holds them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from hf_nmsparse.masks import apply_mask, count_violations, magnitude_mask
from hf_nmsparse.number_types import VALUE_DTYPES
from hf_nmsparse.packed_files import read_files
from hf_nmsparse.packed_format import VALUE_TYPES, PackedFormatError, code_bits, is_finite, packed_bytes
from hf_nmsparse.packing import pack, stored, unpack
from hf_nmsparse.pattern import NMPattern
from tests.packed_models import check_int8_tensors, check_tensors

TWO_OF_FOUR = NMPattern(2, 4)
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def test_every_number_type_has_its_two_names() -> None:
    assert VALUE_TYPES.keys() == VALUE_DTYPES.keys()
    for name, dtype in VALUE_DTYPES.items():
        assert stored(torch.ones(1, dtype=dtype), "").dtype == VALUE_TYPES[name]


@pytest.mark.parametrize(("spelled", "dtype"), [*FLOATS.items(), ("I8", torch.int8), ("U8", torch.uint8)])
def test_numbers_of_a_file_are_bits_of_its_tensors(spelled: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "whole": (torch.randn(3, 5) * 9).to(dtype),
        "empty": torch.ones(0, 4, dtype=dtype),
        "one": torch.tensor(7.0).to(dtype),
        "odd": torch.ones(3, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    # One byte more in front, and no number begins where its type would have it.
    shifted, begins = (tmp_path / "model.safetensors").read_bytes(), 8
    header = int.from_bytes(shifted[:begins], "little") + 1
    unaligned = tmp_path / "unaligned.safetensors"
    unaligned.write_bytes(header.to_bytes(8, "little") + shifted[8 : 7 + header] + b" " + shifted[7 + header :])
    for file in ("model.safetensors", "unaligned.safetensors"):
        found = read_files([str(tmp_path / file)])
        assert found.keys() == tensors.keys()
        assert {key: tensor.file for key, tensor in found.items()} == dict.fromkeys(tensors, file)
        for key in ("whole", "empty", "one"):
            assert found[key].dtype == spelled
            assert found[key].nbytes == tensors[key].nbytes
            assert found[key].bits().shape == tensors[key].shape
            assert found[key].bits().tobytes() == bytes(tensors[key].reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_finite_numbers_of_every_type(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    numbers = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, -info.tiny / 2, 1.0], dtype=dtype)
    assert is_finite(stored(numbers, ""))
    assert is_finite(stored(numbers[:0], ""))
    assert is_finite(stored(numbers[::2], ""))
    for place in (0, 65_535, 65_536, 99_999):  # where the check goes on to the next piece, too
        for bad in (math.nan, -math.nan, math.inf, -math.inf):
            many = numbers.repeat(20_000)[:100_000].clone()
            many[place] = bad
            assert not is_finite(stored(many, ""))
    assert not is_finite(stored(torch.tensor(math.inf, dtype=dtype), ""))
    assert is_finite(stored(torch.tensor([127, -1], dtype=torch.int8), ""))


def test_sizes() -> None:
    dense = 512 * 2048 * 2
    assert packed_bytes(512, 2048, TWO_OF_FOUR, "bf16") * 64 == dense * 35
    assert {str(p): code_bits(p) for p in map(NMPattern.parse, ["2:4", "4:8", "2:8", "1:4", "1:16", "16:32"])} == {
        "2:4": 3,
        "4:8": 7,
        "2:8": 5,
        "1:4": 2,
        "1:16": 4,
        "16:32": 30,
    }


def test_what_int8_values_and_scales_must_be() -> None:
    values, scale = torch.tensor([[1, -127], [0, 127]], dtype=torch.int8), torch.tensor([1.0, 2.0**-126])

    def problem(values: Tensor = values, scale: Tensor | None = scale) -> str:
        with pytest.raises(PackedFormatError) as caught:
            check_int8_tensors(values, scale, "fc1", "model.safetensors")
        return str(caught.value).removeprefix("model.safetensors: fc1.")

    check_int8_tensors(values, scale)
    check_int8_tensors(values[:0], scale[:0])
    for wrong in (torch.full((2, 2), -128, dtype=torch.int8), values.to(torch.uint8), values.float(), values[0]):
        assert problem(wrong) == "weight: int8 values are a matrix within -127 to 127"
    assert problem(scale=None) == "weight_scale: scales are missing beside int8 values"
    for other in (scale[:1], scale[:, None], scale.double(), scale.bfloat16(), scale.to(torch.int32)):
        assert problem(scale=other) == (
            f"weight_scale: scales are fp32 [2], got {list(other.shape)} {stored(other, '').dtype}"
        )  # one line a rule
    for bad in (0.0, -0.0, -1.0, float("nan"), float("inf"), 2.7e36):  # 127 times the last is infinite
        message = problem(scale=torch.tensor([1.0, bad]))
        assert message == "weight_scale: scales are positive, and 127 times one is finite"

    codes = torch.zeros(2, 1, dtype=torch.uint8)
    check_tensors(values, codes, TWO_OF_FOUR, "I8", (2, 4), scale=scale)
    with pytest.raises(PackedFormatError, match=r"^file: layer\.weight_scale: scales are missing beside int8 values"):
        check_tensors(values, codes, TWO_OF_FOUR, "I8", (2, 4))
    with pytest.raises(PackedFormatError, match="weight: int8 values are a matrix within -127 to 127"):
        check_tensors(values - 128, codes, TWO_OF_FOUR, "I8", (2, 4), scale=scale)
    with pytest.raises(PackedFormatError, match=r"weight_scale: only values of int8 have a scale, .* F32"):
        check_tensors(values.float(), codes, TWO_OF_FOUR, "F32", (2, 4), scale=scale)
    with pytest.raises(PackedFormatError, match=r"config\.json declares values of I8, got F32"):
        check_tensors(values.float(), codes, TWO_OF_FOUR, "I8", (2, 4), scale=scale)


def test_check_names_file_key_and_rule() -> None:
    values, codes = torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.uint8)

    def problem(
        values: Tensor = values,
        codes: Tensor = codes,
        dtype: str = "F32",
        shape: tuple[int, int] = (1, 8),
    ) -> str:
        with pytest.raises(PackedFormatError) as caught:
            check_tensors(values, codes, TWO_OF_FOUR, dtype, shape, "fc1", "model.safetensors")
        message = str(caught.value)
        assert "\n" not in message
        return message.removeprefix("model.safetensors: fc1.")

    check_tensors(values, codes, TWO_OF_FOUR, "F32", (1, 8))
    assert problem(dtype="BF16") == "weight: config.json declares values of BF16, got F32"
    assert problem(values.int(), dtype="torch.int32") == "weight: values are F32, F16, BF16, I8, got torch.int32"
    assert problem(codes=codes.to(torch.int64)) == "weight_indices: codes are uint8, got I64"
    assert problem(values=torch.ones(1, 3)) == "weight: values of 2:4 have rows of a multiple of 2, got [1, 3]"
    assert problem(values=torch.ones(4)) == "weight: values of 2:4 have rows of a multiple of 2, got [4]"
    assert problem(shape=(1, 12)) == "weight: the model's layer is [1, 12], got values of a layer [1, 8]"
    assert problem(codes=codes.repeat(1, 2)).startswith("weight_indices: shape must be [1, 1] beside these values")
    assert problem(codes=codes.repeat(2, 1)).startswith("weight_indices: shape must be [1, 1] beside these values")
    assert problem(codes=codes + (1 << 6)) == "weight_indices: padding bits at the end of a row must be 0"
    assert problem(codes=codes + (6 << 3)) == "weight_indices: codes of 2:4 are 0 to 5, got 6"
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert problem(values=values * bad) == "weight: values must be finite, got NaN or infinity"


@settings(max_examples=300)
@given(st.data())
def test_damaged_tensors_are_refused_or_load(data: st.DataObject) -> None:
    pattern = data.draw(
        st.sampled_from([NMPattern.parse(text) for text in ("2:4", "1:2", "4:8", "3:5", "9:25", "16:32")])
    )
    shape = (3, pattern.m * data.draw(st.integers(1, 9)))
    weight = torch.randn(shape)
    packed = pack(apply_mask(weight, magnitude_mask(weight, pattern)), pattern)
    values, codes = packed["weight"], packed["weight_indices"]
    damage = data.draw(st.sampled_from(["code bits", "code rows", "code columns", "value byte", "value columns"]))
    if damage == "code bits":
        for _ in range(data.draw(st.integers(1, 3))):
            codes.view(-1)[data.draw(st.integers(0, codes.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "code rows":
        codes = codes[: data.draw(st.integers(0, 2))]
    elif damage == "code columns":
        codes = codes[:, : data.draw(st.integers(0, codes.shape[1] - 1))]
    elif damage == "value byte":
        raw = values.view(torch.uint8)
        raw.view(-1)[data.draw(st.integers(0, raw.numel() - 1))] = data.draw(st.integers(0, 255))
    else:
        values = values[:, : data.draw(st.integers(0, values.shape[1] - 1))]
    try:
        check_tensors(values, codes, pattern, "F32", shape)
    except PackedFormatError:
        return
    assert damage in ("code bits", "value byte")  # another shape never passes
    dense = unpack(values, codes, pattern)
    assert dense.shape == shape
    assert dense.isfinite().all()
    assert count_violations(dense, pattern) == 0
