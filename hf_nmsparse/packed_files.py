"""Every rule of the packed format, checked on the files before a model is built of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from hf_nmsparse.packing import VALUE_DTYPES, PackedFormatError, check_packed, check_quantized, packed_shapes
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.quantization_config import METHOD, NMSparseQuantizationConfig

__all__ = [
    "CODES",
    "READER",
    "SCALE",
    "PackedSummary",
    "check_complete",
    "check_folder",
    "check_layer",
    "check_number_types",
    "check_numbers",
    "check_places",
    "is_reader",
    "names_in_model",
    "open_files",
    "open_folder",
    "refuse_missing",
    "refuse_more_layers",
    "ties",
]

CODES = ".weight_indices"
SCALE = ".weight_scale"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # as safetensors spells them
READER = "modeling_nmsparse"  # what `standalone.py` is called beside the weights


@dataclass(frozen=True)
class PackedSummary:
    """What `check_folder` found.

    Attributes:
        pattern: The N:M pattern of the sparse layers.
        values: Number type of the kept values: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"int8"``.
        embeddings: ``"int8"`` if token embeddings and output projection are int8 in the file, else None.
        layers: ``(out_features, in_features)`` of each sparse layer, by its name in the file.
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
    settings = _read_object(folder / "config.json")
    record, auto_map = settings.get("quantization_config"), settings.get("auto_map")
    if not isinstance(record, dict) or record.get("quant_method") != METHOD or record.get("format") == "dense":
        raise ValueError(f"check_folder: {folder} holds no packed model; save_packed(model, path) writes one")
    config = NMSparseQuantizationConfig.from_dict(record)
    standalone = isinstance(auto_map, dict) and any(map(is_reader, auto_map.values()))
    if standalone and not (folder / f"{READER}.py").is_file():
        raise PackedFormatError(f"config.json: auto_map names {READER}.py, which the folder has not; save it again")
    layers: dict[str, tuple[int, int]] = {}
    packed = dense = 0
    with ExitStack() as stack:
        files = open_folder(folder, stack)
        ends = (CODES, SCALE)
        for prefix in sorted({key.rpartition(".")[0] for key in files if key.endswith(ends)}):
            check_layer(files, prefix, None, config)
        check_numbers(files)
        for key, (_, opened) in files.items():
            prefix, _, leaf = key.rpartition(".")
            tensor = opened.get_tensor(key)
            packed += tensor.nbytes
            if leaf == "weight" and prefix + CODES in files:
                rows, columns = tensor.shape[0], tensor.shape[1] // config.pattern.n * config.pattern.m
                layers[prefix] = rows, columns
                dense += rows * columns * tensor.itemsize
            elif not key.endswith(CODES):
                dense += tensor.nbytes
    if not layers:
        raise PackedFormatError(f"{folder.name}: no key ends in {CODES}, so no layer is packed")
    assert config.values is not None
    return PackedSummary(
        config.pattern,
        config.values,
        config.embeddings,
        {name: layers[name] for name in sorted(layers, key=dot_natural_key)},
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


def _read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise PackedFormatError(f"{file.name}: the file is no JSON") from None
    if not isinstance(content, dict):
        raise PackedFormatError(f"{file.name}: the file is no JSON object")
    return content


def open_folder(folder: Path, stack: ExitStack) -> dict[str, tuple[str, Any]]:
    """Opens the safetensors files of a checkpoint: one, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():  # transformers prefers the one file, too
        files = open_files([_inside(folder, "model.safetensors")], stack)
    else:
        content = _read_object(index)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise PackedFormatError(f"{index.name}: weight_map is missing")
        files = open_files([_inside(folder, name) for name in sorted(set(map(str, weight_map.values())))], stack)
        if not isinstance(content.get("metadata"), dict):  # transformers loads none without
            raise PackedFormatError(f"{index.name}: metadata is missing; save the model again")
        for key in sorted(weight_map.keys() | files.keys()):
            named, found = weight_map.get(key, "no file"), files[key][0] if key in files else "no file"
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


def open_files(paths: list[str], stack: ExitStack) -> dict[str, tuple[str, Any]]:
    """For each key of a checkpoint the name of its file and the open file."""
    files: dict[str, tuple[str, Any]] = {}
    for path in paths:
        name = Path(path).name
        if not name.endswith(".safetensors"):
            raise PackedFormatError(f"{name}: a sparse checkpoint is a safetensors file")
        try:
            opened = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise PackedFormatError(f"{name}: the file is not a whole safetensors file ({error})") from None
        for key in opened.keys():  # noqa: SIM118  # it is no mapping
            if key in files:
                raise PackedFormatError(f"{name}: {key}: the tensor is in {files[key][0]}, too")
            files[key] = name, opened
    wrapper = wrapper_of(files)
    if wrapper is not None:
        raise PackedFormatError(f"{name}: {wrapper}; save the model again")
    return files


def wrapper_of(keys: Iterable[str]) -> str | None:
    """What wrapped a model whose state dict has ``keys``, in words; None if nothing did."""
    first = {key.partition(".")[0] for key in keys}
    wrappers = {"_orig_mod": "torch.compile's", "module": "DistributedDataParallel's"}
    if len(first) == 1 and (name := first.pop()) in wrappers:
        return f"the keys begin with '{name}.', {wrappers[name]} prefix, under which no model looks for them"
    return None


def check_complete(
    files: Mapping[str, tuple[str, Any]], model: PreTrainedModel, conversions: Sequence[WeightTransform]
) -> None:
    """Checks that the files hold every tensor of the model but those that transformers makes itself.

    These are tied tensors of which another is there, and tables of positions. Whatever else is missing would be random.

    Args:
        files: The files, as `open_files` gives them.
        model: The model, in the form whose tensors the files hold.
        conversions: How transformers makes tensors of the model of those in the files.

    Raises:
        PackedFormatError: A tensor is missing, or there are layers that the model has not.
    """
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    found = {rename_source_key(key, renamings, converters, model.base_model_prefix, expected)[0] for key in files}
    tied = ties(model)
    found = {tied.get(key, key) for key in found}
    prefix, computed = f"{model.base_model_prefix}.", list(model._keys_to_ignore_on_load_missing or ())
    if any(key.startswith(prefix) for key in files):  # files of a model with a head have the bias of its logits
        computed = [pattern for pattern in computed if pattern != "final_logits_bias"]
    tables = {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "create_weight")}
    missing = {
        tied.get(key, key)
        for key in expected.keys() - tables
        if tied.get(key, key) not in found and not any(re.search(pattern, prefix + key) for pattern in computed)
    }
    where = min(file for file, _ in files.values())
    refuse_missing(missing, files, where, "save the whole model again")
    refuse_more_layers(files, model, where)


def refuse_more_layers(keys: Iterable[str], model: PreTrainedModel, where: str) -> None:
    """Refuses a checkpoint with more layers than config.json gives the model: they would be left out.

    Other tensors that the model does not know, as those of another task's head, are no fault.

    Args:
        keys: The names that the checkpoint has, or those of them that the model does not know.
        model: The model.
        where: Begins the message.

    Raises:
        PackedFormatError: There are such layers.
    """
    prefix = f"{model.base_model_prefix}."
    names = [key.removeprefix(prefix) for key in keys]
    for name, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList):
            stem = f"{name.removeprefix(prefix)}."
            found = [key.removeprefix(stem).partition(".")[0] for key in names if key.startswith(stem)]
            number = 1 + max((int(part) for part in found if part.isdecimal()), default=-1)
            if number > len(layers):
                raise PackedFormatError(
                    f"{where}: {name} has {number} layers here and {len(layers)} by config.json; correct config.json "
                    "or save the model again"
                )


def ties(model: nn.Module) -> dict[str, str]:
    """The name of each tensor that a model of transformers ties to another, and the other's."""
    return model.all_tied_weights_keys if isinstance(model, PreTrainedModel) else {}


def refuse_missing(missing: Collection[str], keys: Collection[str], where: str, remedy: str) -> None:
    """Refuses a checkpoint that lacks tensors of the model.

    Args:
        missing: Their names.
        keys: The names that the checkpoint has, or those of them that the model does not know.
        where: Begins the message.
        remedy: Ends it.

    Raises:
        PackedFormatError: There are such tensors.
    """
    if missing:
        first, number = min(missing, key=dot_natural_key), len(missing)
        tensors = f"{first} is missing" if number == 1 else f"{first} and {number - 1} more tensors are missing"
        reason = wrapper_of(keys)
        raise PackedFormatError(f"{where}: {tensors}{f': {reason}' if reason else ''}; {remedy}")


def names_in_model(
    files: Mapping[str, Any], model: PreTrainedModel, renamings: list[WeightRenaming]
) -> dict[str, str | None]:
    """For each module of a checkpoint that has a weight its name in ``model``; None where ``model`` has it not."""
    expected = model.state_dict()
    names: dict[str, str | None] = {}
    for prefix in dict.fromkeys(key.rpartition(".")[0] for key in files if key.endswith((".weight", CODES, SCALE))):
        key, _ = rename_source_key(f"{prefix}.weight", renamings, [], model.base_model_prefix, expected)
        names[prefix] = key.removesuffix(".weight") if key in expected else None
    return names


def check_number_types(
    files: Mapping[str, tuple[str, Any]], model: PreTrainedModel, renamings: list[WeightRenaming]
) -> None:
    """Checks that what the model has in floating point is so in the files, but for packed weights."""
    expected = model.state_dict()
    for key, (file, opened) in files.items():
        name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, expected)
        if name not in expected or is_packed(key, files):
            continue
        found = opened.get_slice(key).get_dtype()
        if expected[name].is_floating_point() != (found in FLOATS):
            raise PackedFormatError(f"{file}: {key}: the model has {expected[name].dtype} here, got {found}")


def check_numbers(files: Mapping[str, tuple[str, Any]]) -> None:
    """Checks what stands beside the packed weights: weights and biases are in floating point, and all that is, finite.

    Raises:
        PackedFormatError: A tensor is not.
    """
    for key, (file, opened) in files.items():
        if is_packed(key, files):
            continue
        found = opened.get_slice(key).get_dtype()
        if found in FLOATS:
            if not opened.get_tensor(key).isfinite().all():
                raise PackedFormatError(f"{file}: {key}: numbers must be finite, got NaN or infinity")
        elif key.endswith((".weight", ".bias")) or found.startswith(("F", "BF")):
            raise PackedFormatError(f"{file}: {key}: weights and biases are {', '.join(sorted(FLOATS))}, got {found}")


def is_packed(key: str, files: Collection[str]) -> bool:
    """Whether ``key`` is part of a packed weight or of one in int8: these have rules of their own."""
    prefix, _, leaf = key.rpartition(".")
    packed = prefix + CODES in files or prefix + SCALE in files
    return packed and leaf in ("weight", CODES[1:], SCALE[1:])


def check_layer(
    files: Mapping[str, tuple[str, Any]], prefix: str, layer: nn.Module | None, config: NMSparseQuantizationConfig
) -> None:
    """Checks what the files hold for one layer, which is None if the model has it not."""
    if prefix + CODES not in files:
        if prefix + SCALE in files:
            _check_embedding(files, prefix, layer, config)
        elif isinstance(layer, nn.Linear) and layer.in_features % config.pattern.m == 0:
            file, opened = files[f"{prefix}.weight"]
            values, _ = packed_shapes(layer.out_features, layer.in_features, config.pattern)
            if tuple(opened.get_slice(f"{prefix}.weight").get_shape()) == values:
                raise PackedFormatError(f"{file}: {prefix}{CODES}: codes are missing beside packed values")
        return
    codes_file, opened_codes = files[prefix + CODES]
    if f"{prefix}.weight" not in files:
        raise PackedFormatError(f"{codes_file}: {prefix}.weight: values are missing beside the codes")
    file, opened = files[f"{prefix}.weight"]
    if layer is not None and type(layer) is not nn.Linear:
        raise PackedFormatError(f"{file}: {prefix}.weight: the model's layer is {type(layer).__name__}, not nn.Linear")
    assert config.values is not None
    check_packed(
        opened.get_tensor(f"{prefix}.weight"),
        opened_codes.get_tensor(prefix + CODES),
        config.pattern,
        VALUE_DTYPES[config.values],
        None if layer is None else (layer.out_features, layer.in_features),
        prefix,
        file,
        files[prefix + SCALE][1].get_tensor(prefix + SCALE) if prefix + SCALE in files else None,
    )


def _check_embedding(
    files: Mapping[str, tuple[str, Any]], prefix: str, layer: nn.Module | None, config: NMSparseQuantizationConfig
) -> None:
    """Checks what the files hold of an embedding or a head in int8; ``layer`` is None if the model has it not."""
    file, opened = files[prefix + SCALE]
    if f"{prefix}.weight" not in files:
        raise PackedFormatError(f"{file}: {prefix}.weight: values are missing beside the scales")
    if config.embeddings != "int8":
        raise PackedFormatError(f"{file}: {prefix}{SCALE}: config.json does not declare embeddings of int8")
    values = files[f"{prefix}.weight"][1].get_tensor(f"{prefix}.weight")
    check_quantized(values, opened.get_tensor(prefix + SCALE), prefix, file)
    if layer is not None:
        expected = tuple(layer.weight.shape) if isinstance(layer, nn.Embedding | nn.Linear) else None
        if tuple(values.shape) != expected:
            raise PackedFormatError(
                f"{file}: {prefix}.weight: int8 values {list(values.shape)} fit no {type(layer).__name__} of {expected}"
            )
