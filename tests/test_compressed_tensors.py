"""The reader of sparse-24-bitmask checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MarianMTModel

from hf_nmsparse import NMSparseConfig, cli, finalize, sparsify
from hf_nmsparse.compressed_tensors import convert_bitmask, dense_from_bitmask
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.packed_format import PackedFormatError
from tests.tiny import marian

RECORD = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}


def test_a_weight_by_hand() -> None:
    # Bits from the lowest: 0b1010_0011 keeps columns 0, 1 and 5, 7; 0b0110 keeps 1 and 2 of a row of four.
    values = torch.tensor([[1.0, -2.0, 3.0, -0.0]], dtype=torch.bfloat16)
    dense = dense_from_bitmask(values, torch.tensor([[0b1010_0011]], dtype=torch.uint8), torch.tensor([1, 8]))
    assert dense.dtype == torch.bfloat16
    assert dense.tolist() == [[1, -2, 0, 0, 0, 3, 0, 0]]
    four = dense_from_bitmask(
        torch.tensor([5.0, 6.0]), torch.tensor([[0b0110]], dtype=torch.uint8), torch.tensor([1, 4])
    )
    assert four.tolist() == [[0, 5, 6, 0]]


@pytest.mark.parametrize(
    ("values", "bitmask", "shape", "message"),
    [
        ([1.0, 2.0], [[0b0111]], [1, 4], r"weight.bitmask: every group of four keeps two, and the padding is 0"),
        ([1.0, 2.0], [[0b10011]], [1, 4], r"weight.bitmask: every group of four keeps two, and the padding is 0"),
        ([1.0], [[0b0011]], [1, 4], r"weight.compressed: 2 floating-point values are needed, got torch.float32 \[1\]"),
        ([1.0, 2.0], [[3, 0]], [1, 4], r"weight.bitmask: uint8 \[1, 1\] is needed, got torch.uint8 \[1, 2\]"),
        ([1.0, 2.0], [[3]], [1, 6], r"weight.shape: rows and columns in groups of four are needed, got \[1, 6\]"),
        ([1.0, 2.0], [[3]], [4], r"weight.shape: rows and columns in groups of four are needed, got \[4\]"),
    ],
)
def test_what_breaks_the_format_is_refused(values: Any, bitmask: Any, shape: Any, message: str) -> None:
    with pytest.raises(PackedFormatError, match=message):
        dense_from_bitmask(torch.tensor(values), torch.tensor(bitmask, dtype=torch.uint8), torch.tensor(shape))


def bitmask_checkpoint(folder: Path) -> tuple[MarianMTModel, dict[str, Tensor]]:
    """Writes a Marian model as compressed-tensors did; returns it and the tensors of the file."""
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    finalize(model)
    layers = {name for name, layer in model.named_modules() if isinstance(layer, NMLinear)}
    for name in layers:
        layer: Any = model.get_submodule(name)
        layer.to_stock()
    del model.config.quantization_config
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in layers:
        weight = tensors.pop(f"{name}.weight")
        mask = weight != 0
        assert (mask.reshape(-1, 4).sum(dim=1) == 2).all()
        places = 2 ** torch.arange(8)
        tensors[f"{name}.compressed"] = weight[mask].reshape(weight.shape[0], -1)
        tensors[f"{name}.bitmask"] = (mask.reshape(weight.shape[0], -1, 8) * places).sum(dim=2).to(torch.uint8)
        tensors[f"{name}.shape"] = torch.tensor(weight.shape)
    write(folder, tensors, RECORD)
    return model, tensors


def write(folder: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": record}))


def test_a_checkpoint_becomes_dense_and_then_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    model, _ = bitmask_checkpoint(tmp_path / "old")
    (tmp_path / "old" / "notes.txt").write_text("kept")
    assert cli.main(["convert", str(tmp_path / "old"), str(tmp_path / "dense")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'dense'}: dense, 32 weights are 2:4 sparse\n"
    again = MarianMTModel.from_pretrained(tmp_path / "dense")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert (tmp_path / "dense" / "notes.txt").read_text() == "kept"
    assert cli.main(["pack", str(tmp_path / "dense"), str(tmp_path / "packed"), "--pattern", "2:4"]) == 0
    assert len(check_folder(tmp_path / "packed").layers) == 32


def test_shards_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    model, tensors = bitmask_checkpoint(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    half: list[dict[str, Tensor]] = [{}, {}]
    for key, tensor in tensors.items():
        half["decoder" in key][key] = tensor
    for name, part in zip(names, half, strict=True):
        save_file(part, tmp_path / "old" / name, metadata={"format": "pt"})
    (tmp_path / "old" / "model.safetensors.index.json").write_text("{}")
    assert convert_bitmask(tmp_path / "old", tmp_path / "dense") == 32
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    again = MarianMTModel.from_pretrained(tmp_path / "dense")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_parts_in_several_shards_and_a_shape_of_the_models_own(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    model, tensors = bitmask_checkpoint(tmp_path / "old")
    tensors["own.shape"] = torch.tensor([7])
    (tmp_path / "old" / "model.safetensors").unlink()
    for number, ending in enumerate((".bitmask", ".shape", "")):
        chosen = {key: tensors.pop(key) for key in list(tensors) if key.endswith(ending)}
        save_file(chosen, tmp_path / "old" / f"model-0000{number + 1}-of-00003.safetensors", metadata={"format": "pt"})
    (tmp_path / "old" / "model.safetensors.index.json").write_text("{}")
    assert convert_bitmask(tmp_path / "old", tmp_path / "dense") == 32
    files = [load_file(file) for file in sorted((tmp_path / "dense").glob("*.safetensors"))]
    found = {key: tensor for file in files for key, tensor in file.items()}
    assert found.pop("own.shape").tolist() == [7]
    for name, weight in found.items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("record", ["text", ["list"], {"sparsity_config": "text"}, {"sparsity_config": [1]}])
def test_a_record_of_another_type_is_refused(tmp_path: Path, record: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": record}))
    with pytest.raises(PackedFormatError, match=r"config.json: a configuration is one JSON object, got (str|list)"):
        convert_bitmask(tmp_path, tmp_path / "new")


def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(PackedFormatError, match=r"config.json: is no file"):
        convert_bitmask(tmp_path, tmp_path / "new")


def test_an_empty_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^convert_bitmask: target is empty; name a path"):
        convert_bitmask(tmp_path, "")


def test_numbers_that_no_such_checkpoint_has_are_refused() -> None:
    values, bitmask, shape = torch.tensor([1.0, 2.0]), torch.tensor([[3]], dtype=torch.uint8), torch.tensor([1, 4])
    with pytest.raises(PackedFormatError, match=r"compressed: 2 floating-point values are needed, got torch.fl"):
        dense_from_bitmask(values.to(torch.float8_e4m3fn), bitmask, shape)
    with pytest.raises(PackedFormatError, match=r"weight.shape: rows and columns in groups of four are needed"):
        dense_from_bitmask(values, bitmask, shape.float())


def test_a_weight_beside_its_packed_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    _, tensors = bitmask_checkpoint(tmp_path / "old")
    prefix = next(key for key in tensors if key.endswith(".bitmask")).removesuffix(".bitmask")
    write(tmp_path / "old", {**tensors, f"{prefix}.weight": torch.zeros(2)}, RECORD)
    with pytest.raises(PackedFormatError, match=rf"{prefix}.weight is there beside its packed form"):
        convert_bitmask(tmp_path / "old", tmp_path / "new")


def test_what_is_no_such_checkpoint_is_refused(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    with pytest.raises(PackedFormatError, match=r"config.json: cannot be read as JSON"):
        convert_bitmask(old, new)
    _, tensors = bitmask_checkpoint(old)
    write(old, tensors, {"quant_method": "compressed-tensors", "format": "dense"})
    with pytest.raises(PackedFormatError, match=r"the format is 'dense', not 'sparse-24-bitmask'"):
        convert_bitmask(old, new)
    write(old, tensors, {**RECORD, "config_groups": {"group_0": {}}})
    with pytest.raises(PackedFormatError, match=r"values are quantized too"):
        convert_bitmask(old, new)
    prefix = next(key for key in tensors if key.endswith(".bitmask")).removesuffix(".bitmask")
    write(old, {key: tensor for key, tensor in tensors.items() if key != f"{prefix}.shape"}, RECORD)
    with pytest.raises(PackedFormatError, match=rf"{prefix}.shape is missing beside its other parts"):
        convert_bitmask(old, new)
    write(old, tensors, RECORD)
    file = old / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(PackedFormatError, match="it was not written to its end"):
        convert_bitmask(old, new)
    file.unlink()
    with pytest.raises(PackedFormatError, match=r"no \.safetensors file"):
        convert_bitmask(old, new)
    assert not new.exists()
