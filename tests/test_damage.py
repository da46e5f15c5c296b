"""One matrix: each kind of damage to a packed file, and each reader. What one refuses, all refuse.

A reader is a way from a file to a model: the checker of folders, transformers' loading (dense and packed), the
engine's door, and the standalone file. Each names the tensor in one line, and none builds a layer from a damaged file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from hf_nmsparse import quantizer
from hf_nmsparse.kernels import engine
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.packed_format import PackedFormatError
from hf_nmsparse.saving import save_packed
from hf_nmsparse.standalone import PackedRecord, dense_tensors
from hf_nmsparse.translator import Translator
from tests.loaded_models import FC1, load, training

Tensors = dict[str, Tensor]

FC2, SHARED = "model.encoder.layers.0.fc2", "model.shared"  # [32, 64] and [100, 32], beside FC1 of [64, 32]
VALUES, CODES, SCALE, BIAS = f"{FC1}.weight", f"{FC1}.weight_indices", f"{FC1}.weight_scale", f"{FC1}.bias"


def dense(folder: Path) -> None:
    load(folder, "dense")


def packed(folder: Path) -> None:
    load(folder, "reference")


def translator(folder: Path) -> None:
    if (why := engine.why_not()) is not None:
        pytest.skip(f"no native engine: {why}")
    Translator(folder, threads=1)


def standalone(folder: Path) -> None:
    record = PackedRecord.read(AutoConfig.from_pretrained(folder).quantization_config, "m")
    dense_tensors(load_file(folder / "model.safetensors"), record, "m")


# What needs the model's layers to be seen is seen by those that know them: not by the checker and not by the tensors
# of the standalone file, which transformers puts into the model and finds to be of another shape.
KNOW_THE_MODEL = (dense, packed, translator)
READERS = (*KNOW_THE_MODEL, check_folder, standalone)


def change(key: str, how: Callable[[Tensor], Tensor | None]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        found = how(tensors.pop(key).clone())
        if found is not None:
            tensors[key] = found.contiguous()

    return damage


def put(key: str, tensor: Tensor | None) -> Callable[[Tensors], None]:
    return change(key, lambda _: tensor)


def at(place: tuple[int, int], number: float) -> Callable[[Tensor], Tensor]:
    def changed(tensor: Tensor) -> Tensor:
        tensor[place] = number
        return tensor

    return changed


def of_another(source: str, target: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        for leaf in ("weight", "weight_indices"):
            tensors[f"{target}.{leaf}"] = tensors[f"{source}.{leaf}"].clone()

    return damage


# Name: what is done to the tensors, and what the package's readers say, behind the file's name.
FLOAT: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "code": (change(CODES, lambda codes: codes | 7), f"{CODES}: codes of 2:4 are 0 to 5, got 7"),
    "code columns": (change(CODES, lambda codes: codes[:, :2]), f"{CODES}: shape must be [64, 3] beside these values"),
    "code rows": (change(CODES, lambda codes: codes[:63]), f"{CODES}: shape must be [64, 3] beside these values"),
    "signed codes": (change(CODES, lambda codes: codes.to(torch.int8)), f"{CODES}: codes are uint8, got I8"),
    "NaN": (change(VALUES, at((1, 1), torch.nan)), f"{VALUES}: values must be finite, got NaN or infinity"),
    "infinity": (change(VALUES, at((1, 1), -torch.inf)), f"{VALUES}: values must be finite, got NaN or infinity"),
    "type": (change(VALUES, Tensor.bfloat16), f"{VALUES}: config.json declares values of F32, got BF16"),
    "odd row": (
        change(VALUES, lambda values: values[:, :15]),
        f"{VALUES}: values of 2:4 have rows of a multiple of 2, got [64, 15]",
    ),
    "vector": (put(VALUES, torch.ones(64)), f"{VALUES}: values of 2:4 have rows of a multiple of 2, got [64]"),
    "no values": (put(VALUES, None), f"{VALUES}: values are missing beside the codes"),
    "bias NaN": (put(BIAS, torch.full((64,), torch.nan)), f"{BIAS}: numbers must be finite, got NaN or infinity"),
    "bias of integers": (put(BIAS, torch.ones(64, dtype=torch.int64)), f"{BIAS}: "),
}
INT8: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "values of -128": (change(VALUES, at((1, 1), -128)), f"{VALUES}: "),
    "values in fp32": (put(VALUES, torch.ones(64, 16)), f"{VALUES}: config.json declares values of I8, got F32"),
    "int8 vector": (
        put(VALUES, torch.ones(64, dtype=torch.int8)),
        f"{VALUES}: values of 2:4 have rows of a multiple of 2, got [64]",
    ),
    "int8 no values": (put(VALUES, None), f"{VALUES}: values are missing beside the codes"),
    "no scale": (put(SCALE, None), f"{SCALE}: "),
    "short scale": (put(SCALE, torch.ones(63)), f"{SCALE}: "),
    "scale in fp16": (put(SCALE, torch.ones(64, dtype=torch.float16)), f"{SCALE}: "),
    "scale of 0": (put(SCALE, torch.zeros(64)), f"{SCALE}: "),
    "negative scale": (put(SCALE, -torch.ones(64)), f"{SCALE}: "),
    "scale NaN": (put(SCALE, torch.full((64,), torch.nan)), f"{SCALE}: "),
    "scale past fp32": (put(SCALE, torch.full((64,), 3e38)), f"{SCALE}: "),
    "embedding in fp32": (put(f"{SHARED}.weight", torch.ones(100, 32)), f"{SHARED}.weight: "),
    "no scale of the embedding": (put(f"{SHARED}.weight_scale", None), f"{SHARED}.weight: "),
    "bias in fp8": (put(BIAS, torch.ones(64).to(torch.float8_e5m2)), f"{BIAS}: "),
    "infinite logits": (
        put("final_logits_bias", torch.full((1, 100), -torch.inf)),
        "final_logits_bias: numbers must be finite, got NaN or infinity",
    ),
}
OF_THE_MODEL: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no codes": (put(CODES, None), f"{CODES}: codes are missing beside packed values"),
    "another layer": (of_another(FC2, FC1), f"{VALUES}: the model's layer is [64, 32], got values of a layer [32, 64]"),
    "embedding": (of_another(FC1, SHARED), f"{SHARED}.weight: the model's layer is Embedding, not nn.Linear"),
}
MATRIX = [
    pytest.param(values, *damage, reader, id=f"{name}-{reader.__name__}")
    for values, damages, readers in (
        ("fp32", FLOAT, READERS),
        ("int8", INT8, READERS),
        ("fp32", OF_THE_MODEL, KNOW_THE_MODEL),
    )
    for name, damage in damages.items()
    for reader in readers
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    for values in ("fp32", "int8"):
        save_packed(training(), root / values, values)
    return root


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_whole_files_are_read(whole: Path, values: str, reader: Callable[[Path], Any]) -> None:
    reader(whole / values)


@pytest.mark.parametrize(("values", "damage", "message", "reader"), MATRIX)
def test_a_damaged_file_is_refused(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: str,
    damage: Callable[[Tensors], None],
    message: str,
    reader: Callable[[Path], Any],
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a layer was built from a damaged file")

    monkeypatch.setattr(quantizer, "_empty_packed", never)
    monkeypatch.setattr(quantizer, "unpack", never)
    folder = shutil.copytree(whole / values, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        reader(folder)
    if reader in (translator, standalone):  # they tell the tensor with words of their own
        assert message.split(": ")[0].removesuffix("_indices").removesuffix("_scale") in str(caught.value)
    else:
        assert f"model.safetensors: {message}" in str(caught.value)
    assert reader is standalone or isinstance(caught.value, PackedFormatError)
