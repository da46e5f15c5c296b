"""Reads what compressed-tensors wrote as ``sparse-24-bitmask``, which nothing else reads any more, into dense files.

For a 2:4 weight ``P.weight`` of R rows and C columns such a checkpoint holds ``P.compressed``, the kept values in the
order of the row, ``[R, C / 2]``; ``P.bitmask``, a bit for each weight, the first in the lowest, uint8
``[R, ceil(C / 8)]``; and ``P.shape``, R and C. compressed-tensors 0.15 deleted the format; transformers loads its files
without an error and with random weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_nmsparse.files import model_folder, named_path
from hf_nmsparse.masks import unpack_bits
from hf_nmsparse.packed_format import PackedFormatError

__all__ = ["convert_bitmask", "dense_from_bitmask"]

_FORMAT = "sparse-24-bitmask"
_INDEX = "model.safetensors.index.json"
_PARTS = (".compressed", ".bitmask", ".shape")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COUNTS = (torch.int64, torch.int32, torch.int16)


def convert_bitmask(source: str | Path, target: str | Path) -> int:
    """Writes a ``sparse-24-bitmask`` checkpoint as a stock dense one, zeros in their places.

    ``nmsparse pack --pattern 2:4`` packs the result where it is a translation model.

    Args:
        source: Its folder.
        target: The new folder, which gets tokenizer and all other files too.

    Returns:
        How many weights were sparse.

    Raises:
        PackedFormatError: The folder holds no such checkpoint, or one whose values are quantized as well, or a weight
            breaks the format.
    """
    source, target = Path(source), named_path(target, "convert_bitmask: target")
    config = _read(source / "config.json")
    where = source / "config.json"
    record = _object(config.pop("quantization_config", None) or config.pop("compression_config", None) or {}, where)
    found = _object(record.get("sparsity_config") or record, where).get("format")
    if found != _FORMAT:
        raise PackedFormatError(f"{where}: the format is {found!r}, not {_FORMAT!r}; load it as it is")
    if record.get("config_groups"):
        raise PackedFormatError(f"{where}: values are quantized too, which is not read; get a checkpoint without")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise PackedFormatError(f"{source}: no .safetensors file; the weights are missing")
    sparse, total, places = 0, 0, dict[str, str]()
    keys = {key: file for file in files for key in _keys(file)}
    packed = _packed(keys)
    with model_folder(target) as folder:
        for file in files:
            tensors = load_file(file)
            dense = {key: tensor for key, tensor in tensors.items() if not _is_part(key, packed)}
            for prefix in sorted(packed):
                if prefix + _PARTS[0] in tensors:
                    values, bitmask, shape = (
                        tensors[key] if key in tensors else _tensor(keys[key], key)
                        for key in (prefix + part for part in _PARTS)
                    )
                    dense[f"{prefix}.weight"] = dense_from_bitmask(values, bitmask, shape, f"{file.name}: {prefix}")
                    sparse += 1
            save_file(dense, folder / file.name, metadata={"format": "pt"})
            places |= dict.fromkeys(dense, file.name)
            total += sum(tensor.nbytes for tensor in dense.values())
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in ("config.json", _INDEX):
                shutil.copyfile(file, folder / file.name)
        if (source / _INDEX).is_file():
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sparse


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise PackedFormatError(f"{file}: {error}; it was not written to its end") from error


def _tensor(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


def _packed(keys: dict[str, Path]) -> set[str]:
    """The names of the sparse weights, each of which has all its parts; a model may have a ``shape`` of its own."""
    packed = {key.rpartition(".")[0] for key in keys if key.endswith(_PARTS[:2])}
    for prefix in sorted(packed):
        for part in _PARTS:
            if prefix + part not in keys:
                raise PackedFormatError(f"{prefix + part} is missing beside its other parts; get the files again")
        if f"{prefix}.weight" in keys:
            raise PackedFormatError(
                f"{keys[f'{prefix}.weight'].name}: {prefix}.weight is there beside its packed form; get the files again"
            )
    return packed


def _is_part(key: str, packed: set[str]) -> bool:
    return key.endswith(_PARTS) and key.rpartition(".")[0] in packed


def dense_from_bitmask(values: Tensor, bitmask: Tensor, shape: Tensor, name: str = "weight") -> Tensor:
    """The dense weight ``[R, C]``, +0.0 where nothing was kept.

    Args:
        values: ``[R, C / 2]``, or flat.
        bitmask: uint8 ``[R, ceil(C / 8)]``.
        shape: R and C.
        name: What errors call the weight.

    Raises:
        PackedFormatError: The parts do not fit each other, or a group of four does not keep two.
    """
    size = shape.flatten().tolist()
    if shape.dtype not in _COUNTS or len(size) != 2 or min(size) < 0 or size[1] % 4:
        raise PackedFormatError(f"{name}.shape: rows and columns in groups of four are needed, got {size}")
    rows, columns = size
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (rows, -(-columns // 8)):
        raise PackedFormatError(
            f"{name}.bitmask: uint8 {[rows, -(-columns // 8)]} is needed, got {bitmask.dtype} {list(bitmask.shape)}"
        )
    bits = unpack_bits(bitmask.flatten(), torch.Size((rows, 8 * bitmask.shape[1])))
    mask = bits[:, :columns]
    if (mask.reshape(-1, 4).sum(dim=1) != 2).any() or bits[:, columns:].any():
        raise PackedFormatError(f"{name}.bitmask: every group of four keeps two, and the padding is 0")
    if values.dtype not in _FLOATS or values.numel() * 2 != rows * columns:
        raise PackedFormatError(
            f"{name}.compressed: {rows * columns // 2} floating-point values are needed, got {values.dtype} "
            f"{list(values.shape)}"
        )
    return values.new_zeros((rows, columns)).masked_scatter(mask, values)


def _read(file: Path) -> dict[str, Any]:
    if file.exists() and not file.is_file():  # nobody may ever write to a pipe
        raise PackedFormatError(f"{file}: is no file")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PackedFormatError(f"{file}: cannot be read as JSON: {error}") from error
    return _object(record, file)


def _object(record: Any, file: Path) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise PackedFormatError(f"{file}: a configuration is one JSON object, got {type(record).__name__}")
    return record
