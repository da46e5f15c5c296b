"""Every rule of the packed format, checked on the files before a model is built of them. This needs no torch."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_nmsparse.packed_format import (
    VALUE_TYPES,
    PackedFormatError,
    StoredTensor,
    check_int8,
    check_weight,
    is_finite,
    matrix_shape,
    packed_shapes,
    stock_shape,
)
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.sparsity_record import METHOD, SparsityRecord

__all__ = [
    "CODES",
    "FLOATS",
    "READER",
    "SCALE",
    "SHAPE",
    "ModelLayer",
    "PackedSummary",
    "check_folder",
    "check_layer",
    "check_numbers",
    "check_places",
    "is_packed",
    "is_reader",
    "natural_order",
    "read_files",
    "read_folder",
    "read_object",
    "wrapper_of",
]

CODES = ".weight_indices"
SCALE = ".weight_scale"
SHAPE = ".weight_shape"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # as safetensors spells them
READER = "modeling_nmsparse"  # what `standalone.py` is called beside the weights


@dataclass(frozen=True)
class PackedSummary:
    """What `check_folder` found.

    Attributes:
        pattern: The N:M pattern of the sparse layers.
        values: Number type of the kept values: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"int8"``.
        embeddings: ``"int8"`` if token embeddings and output projection are int8 in the file, else None.
        layers: ``(out_features, in_features)`` of each sparse layer, by its name in the file; for each place of its
            kernel the inputs of a convolution are counted once.
        packed_bytes: Bytes of all tensors in the file.
        dense_bytes: Bytes of the same tensors with every sparse layer dense, at the same number types, scales included.
        targets: The rules that chose the sparse layers; None where every linear layer was taken.
        ignored: The rules that kept layers dense; None stands for output heads and routers.
        producer: The program that wrote the file, if it says so.
        format_version: Version of the packed format.
        standalone: Whether transformers loads the folder without this package, by the code in it.
    """

    pattern: NMPattern
    values: str
    embeddings: str | None
    layers: dict[str, tuple[int, int]]
    packed_bytes: int
    dense_bytes: int
    targets: tuple[str, ...] | None
    ignored: tuple[str, ...] | None
    producer: str | None
    format_version: int
    standalone: bool


def check_folder(path: str | Path) -> PackedSummary:
    """Checks every rule of the packed format on a folder, without building the model.

    Only the shapes of the model's own layers are left to `from_pretrained`, which knows them.

    Args:
        path: Folder of a packed checkpoint, in one file or in shards.

    Raises:
        ValueError: The folder holds no packed checkpoint.
        PackedFormatError: It holds one that breaks a rule.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"check_folder: {folder} holds no config.json, so no saved model")
    settings = read_object(folder / "config.json")
    record, auto_map = settings.get("quantization_config"), settings.get("auto_map")
    if not isinstance(record, dict) or record.get("quant_method") != METHOD or record.get("format") == "dense":
        raise ValueError(f"check_folder: {folder} holds no packed model; save_packed(model, path) writes one")
    config = SparsityRecord.read(record)
    standalone = isinstance(auto_map, dict) and any(map(is_reader, auto_map.values()))
    if standalone and not (folder / f"{READER}.py").is_file():
        raise PackedFormatError(f"config.json: auto_map names {READER}.py, which the folder has not; save it again")
    layers: dict[str, tuple[int, int]] = {}
    packed = dense = 0
    files = read_folder(folder)
    for prefix in sorted({key.rpartition(".")[0] for key in files if key.endswith((CODES, SCALE, SHAPE))}):
        check_layer(files, prefix, None, config)
    check_numbers(files)
    for key, tensor in files.items():
        prefix, _, leaf = key.rpartition(".")
        packed += tensor.nbytes
        if leaf == "weight" and prefix + CODES in files:
            rows, columns = tensor.shape[0], tensor.shape[1] // config.pattern.n * config.pattern.m
            layers[prefix] = rows, columns
            dense += rows * columns * tensor.bits().itemsize
        elif prefix + CODES not in files or leaf not in (CODES[1:], SHAPE[1:]):
            dense += tensor.nbytes
    if not layers:
        raise PackedFormatError(f"{folder.name}: no key ends in {CODES}, so no layer is packed")
    assert config.values is not None
    return PackedSummary(
        config.pattern,
        config.values,
        config.embeddings,
        {name: layers[name] for name in sorted(layers, key=natural_order)},
        packed,
        dense,
        config.targets,
        config.ignore,
        config.producer,
        config.format_version,
        standalone,
    )


def is_reader(code: Any) -> bool:
    """Whether an entry of ``auto_map``, which may begin with the name of a repository, stands for the reader."""
    return str(code).rpartition("--")[2].startswith(f"{READER}.")


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PackedFormatError: It holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise PackedFormatError(f"{file.name}: the file is no JSON") from None
    if not isinstance(content, dict):
        raise PackedFormatError(f"{file.name}: the file is no JSON object")
    return content


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Sorts names as people do: layer 2 before layer 10."""
    parts = [(part.isdecimal(), part) for part in re.split(r"(\d+)", name)]
    return [(not number, len(part) if number else 0, part) for number, part in parts]


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by their keys, in one file or in the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():  # transformers prefers the one file, too
        files = read_files([_inside(folder, "model.safetensors")])
    else:
        content = read_object(index)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise PackedFormatError(f"{index.name}: weight_map is missing")
        files = read_files([_inside(folder, name) for name in sorted(set(map(str, weight_map.values())))])
        if not isinstance(content.get("metadata"), dict):  # transformers loads none without
            raise PackedFormatError(f"{index.name}: metadata is missing; save the model again")
        for key in sorted(weight_map.keys() | files.keys()):
            named, found = weight_map.get(key, "no file"), files[key].file if key in files else "no file"
            if named != found:
                raise PackedFormatError(f"{index.name}: {key} is in {found}, and the index says {named}")
    return files


def _inside(folder: Path, name: str) -> str:
    """The path of a file of ``folder`` itself."""
    if Path(name).name != name or not (folder / name).is_file():
        raise PackedFormatError(f"{name}: there is no such file in the folder")
    return str(folder / name)


def check_places(paths: list[str], source: str | None) -> None:
    """Refuses files that an index has named outside of the folder, or the copy of a repository, that they belong to.

    Args:
        paths: The files that are about to be read.
        source: What `from_pretrained` was given: a folder or the name of a repository.

    Raises:
        PackedFormatError: A file lies elsewhere.
    """
    for path in paths:
        below = os.path.relpath(path, source) if source and Path(source).is_dir() else path
        if ".." in Path(below).parts:
            raise PackedFormatError(f"model.safetensors.index.json: {path} is not in the folder of the model")


def read_files(paths: list[str]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by their keys; their numbers stay in the files until they are looked at."""
    files: dict[str, StoredTensor] = {}
    for path in paths:
        name = Path(path).name
        if not name.endswith(".safetensors"):
            raise PackedFormatError(f"{name}: a sparse checkpoint is a safetensors file")
        for key, tensor in _read_file(path, name).items():
            if key in files:
                raise PackedFormatError(f"{name}: {key}: the tensor is in {files[key].file}, too")
            files[key] = tensor
    wrapper = wrapper_of(files)
    if wrapper is not None:
        raise PackedFormatError(f"{name}: {wrapper}; save the model again")
    return files


def _read_file(path: str, name: str) -> dict[str, StoredTensor]:
    """The tensors of one file: eight bytes say how long its header is, which says where each tensor lies behind it."""
    try:
        with safe_open(path, framework="np"):  # which finds the header, and each tensor by it, whole
            pass
    except SafetensorError as error:
        raise PackedFormatError(f"{name}: the file is not a whole safetensors file ({error})") from None
    with Path(path).open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        key: StoredTensor(name, entry["dtype"], tuple(entry["shape"]), end - begin, data, start + begin)
        for key, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def wrapper_of(keys: Iterable[str]) -> str | None:
    """What wrapped a model whose state dict has ``keys``, in words; None if nothing did."""
    first = {key.partition(".")[0] for key in keys}
    wrappers = {"_orig_mod": "torch.compile's", "module": "DistributedDataParallel's"}
    if len(first) == 1 and (name := first.pop()) in wrappers:
        return f"the keys begin with '{name}.', {wrappers[name]} prefix, under which no model looks for them"
    return None


def check_numbers(files: Mapping[str, StoredTensor]) -> None:
    """Checks what stands beside the packed weights: weights and biases are in floating point, and all that is, finite.

    Raises:
        PackedFormatError: A tensor is not.
    """
    for key, tensor in files.items():
        if is_packed(key, files):
            continue
        where, found = f"{tensor.file}: {key}", tensor.dtype
        if found in FLOATS:
            if not is_finite(tensor):
                raise PackedFormatError(f"{where}: numbers must be finite, got NaN or infinity")
        elif key.endswith((".weight", ".bias")) or found.startswith(("F", "BF")):
            raise PackedFormatError(f"{where}: weights and biases are {', '.join(sorted(FLOATS))}, got {found}")


def is_packed(key: str, files: Collection[str]) -> bool:
    """Whether ``key`` is part of a packed weight or of one in int8: these have rules of their own."""
    prefix, _, leaf = key.rpartition(".")
    packed = prefix + CODES in files or prefix + SCALE in files
    return packed and leaf in ("weight", CODES[1:], SCALE[1:], SHAPE[1:])


@dataclass(frozen=True)
class ModelLayer:
    """What a model has in the place of a layer of the files.

    Attributes:
        kind: The name of its class.
        shape: The shape of its weight, if it is a linear layer, a convolution or an embedding.
        linear: Whether it is an ``nn.Linear`` itself.
        convolution: Whether it is one of the others that can be packed, itself.
    """

    kind: str
    shape: tuple[int, ...] | None
    linear: bool
    convolution: bool = False

    @property
    def matrix(self) -> tuple[int, ...] | None:
        """The shape of its weight as the matrix that is packed; None if it can be none."""
        if self.shape is None or not (self.linear or self.convolution):
            return None
        return self.shape if self.linear else matrix_shape(self.shape)


def check_layer(
    files: Mapping[str, StoredTensor], prefix: str, layer: ModelLayer | None, config: SparsityRecord
) -> None:
    """Checks what the files hold for one layer, which is None if the model has it not or is not known."""
    values, codes, scale, record = (files.get(prefix + leaf) for leaf in (".weight", CODES, SCALE, SHAPE))
    matrix = None if layer is None else layer.matrix
    if codes is None:
        if record is not None and config.convolutions:
            raise PackedFormatError(f"{record.file}: {prefix}{CODES}: codes are missing beside the shape")
        if scale is not None:
            _check_embedding(values, scale, prefix, layer, config)
        elif values is not None and matrix is not None:
            rows, columns = matrix
            if columns % config.pattern.m == 0 and values.shape == packed_shapes(rows, columns, config.pattern)[0]:
                raise PackedFormatError(f"{values.file}: {prefix}{CODES}: codes are missing beside packed values")
        return
    if values is None:
        raise PackedFormatError(f"{codes.file}: {prefix}.weight: values are missing beside the codes")
    if layer is not None and matrix is None:
        raise PackedFormatError(f"{values.file}: {prefix}.weight: the model's layer is {layer.kind}, not nn.Linear")
    if record is not None or (layer is not None and layer.convolution):
        matrix = _recorded_matrix(record, f"{values.file}: {prefix}{SHAPE}", prefix, layer, config)
    assert config.values is not None
    check_weight(values, codes, config.pattern, VALUE_TYPES[config.values], matrix, prefix, scale)


def _recorded_matrix(
    record: StoredTensor | None, where: str, prefix: str, layer: ModelLayer | None, config: SparsityRecord
) -> tuple[int, int]:
    """The matrix of a layer whose stock shape is recorded, as that of a linear layer is not."""
    if record is None:
        raise PackedFormatError(f"{where}: the shape is missing beside the weight of a convolution")
    if not config.convolutions:
        raise PackedFormatError(f"{where}: config.json says version 1 of the format, which has no shapes")
    shape = stock_shape(record, config.pattern, prefix)
    if layer is not None and layer.shape != shape:
        raise PackedFormatError(
            f"{where}: the model's layer is {layer.kind} {list(layer.shape or ())}, got {list(shape)}"
        )
    if layer is not None and layer.linear:
        raise PackedFormatError(f"{where}: the model's layer is {layer.kind}, whose shape is not recorded")
    return matrix_shape(shape)


def _check_embedding(
    values: StoredTensor | None, scale: StoredTensor, prefix: str, layer: ModelLayer | None, config: SparsityRecord
) -> None:
    """Checks what the files hold of an embedding or a head in int8; ``layer`` is None if the model has it not."""
    if values is None:
        raise PackedFormatError(f"{scale.file}: {prefix}.weight: values are missing beside the scales")
    if config.embeddings != "int8":
        raise PackedFormatError(f"{scale.file}: {prefix}{SCALE}: config.json does not declare embeddings of int8")
    check_int8(values, scale, prefix)
    if layer is not None and values.shape != layer.shape:
        raise PackedFormatError(
            f"{values.file}: {prefix}.weight: int8 values {list(values.shape)} fit no {layer.kind} of {layer.shape}"
        )
