"""Sparse models in and out of files: what `from_pretrained` calls, and the verbs that save and push.

Importing this module registers the loader, after which ``AutoModelForSeq2SeqLM.from_pretrained`` and its like read
packed checkpoints and checkpoints of the training. It is the only module that knows transformers' quantizers.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_nmsparse
from hf_nmsparse import standalone as reader
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.files import model_folder
from hf_nmsparse.kernels import cpu, native, semi_structured
from hf_nmsparse.layers import Int8Head, KernelLinear, NMLinear, PackedLinear, SemiStructuredLinear, sparse_layers
from hf_nmsparse.masks import magnitude_mask
from hf_nmsparse.packing import (
    FORMAT_VERSION,
    VALUE_DTYPES,
    PackedFormatError,
    check_packed,
    check_quantized,
    pack,
    packed_shapes,
    quantize_rows,
    unpack,
)
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.sparsify import select_layers, sparsify

__all__ = [
    "NMSparseQuantizationConfig",
    "NMSparseQuantizer",
    "PackedSummary",
    "check_folder",
    "export_dense",
    "prepare_for_training",
    "push_to_hub",
    "save_packed",
    "set_compute",
]

METHOD = "nmsparse"
COMPUTES = ("auto", "fp32", "bf16", "int8", "semi_structured", "dense", "reference")
HEADS = ("dense", "int8")
_CODES = ".weight_indices"
_SCALE = ".weight_scale"
_READER = "modeling_nmsparse"  # what `standalone.py` is called beside the weights
_READERS = {"AutoModel": reader.NMSparseModel, "AutoModelForSeq2SeqLM": reader.NMSparseModelForSeq2SeqLM}

# The keys of a record in config.json, by its format: those that must be there, and those that may.
_RECORD_KEYS = {
    "packed": (
        ("quant_method", "format", "format_version", "pattern", "values"),
        ("embeddings", "targets", "ignored", "producer"),
    ),
    "dense": (("quant_method", "format", "pattern"), ("targets", "ignore", "soft")),
}

# A second import of this file, as importlib.reload does it, replaces what the first one registered.
AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
AUTO_QUANTIZER_MAPPING.pop(METHOD, None)


@register_quantization_config(METHOD)
class NMSparseQuantizationConfig(QuantizationConfigMixin):
    """What config.json says of a sparse model, and how the model is to compute once it is loaded.

    Users give ``compute`` and ``head`` alone, ``NMSparseQuantizationConfig(compute="int8")``, as the
    ``quantization_config`` of ``from_pretrained``; everything else comes from the file.

    Args:
        compute: How sparse layers compute; a choice of the reader and not written. ``"fp32"``, ``"bf16"`` and
            ``"int8"`` run on the native CPU kernels with values of that type, and ``"int8"`` rounds activations as
            well. ``"semi_structured"`` runs on the sparse tensor cores of an NVIDIA GPU, in fp16 or bf16.
            ``"dense"`` unpacks each weight into a plain ``nn.Linear`` that carries its ``pattern``. ``"reference"``
            keeps it packed and unpacks it in every product. ``"auto"`` takes the fastest kernels that keep the file's
            precision, and ``"dense"`` where there are none: for patterns that are not part of 2:4, without the native
            library, on other devices. On one GPU it measures the shapes of the layers, and those that sparse tensor
            cores multiply faster for every number of rows compute there.
        head: How the output projection computes: ``"dense"``, or ``"int8"``, which keeps an int8 copy of its weight
            for the product. None takes ``"int8"`` where the sparse layers compute in int8. Not written either.
        pattern: The N:M pattern of the sparse layers.
        values: Number type of the file: ``"fp32"``, ``"fp16"`` or ``"bf16"`` for all its floating-point tensors, or
            ``"int8"`` for the sparse layers alone.
        embeddings: ``"int8"`` if token embeddings and output projection are int8 in the file; only with int8 values.
        targets: The rules that chose the sparse layers, as in `NMSparseConfig`.
        ignore: The rules that kept layers dense, as in `NMSparseConfig`; a packed file calls them ``ignored``.
        soft: As in `NMSparseConfig`, for a checkpoint of the training alone.
        format: ``"packed"``, or ``"dense"`` for a checkpoint of the training.
        format_version: Version of the packed format.
        producer: The program that wrote the file.
        quant_method: ``"nmsparse"``.
        **unknown: No other key is taken.

    Raises:
        ValueError: A key is unknown or a value out of range.
    """

    def __init__(
        self,
        compute: str = "auto",
        *,
        head: str | None = None,
        pattern: str | NMPattern = "2:4",
        values: str | None = None,
        embeddings: str | None = None,
        targets: Iterable[str] | None = None,
        ignore: Iterable[str] | None = None,
        soft: bool = False,
        format: str = "packed",
        format_version: int = FORMAT_VERSION,
        producer: str | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"quantization_config: unknown key {min(unknown)!r}; known keys are compute, head, pattern, values, "
                "embeddings, targets, ignore, soft, format, format_version, producer"
            )
        _one_of("compute", compute, COMPUTES)
        _one_of("format", format, ("packed", "dense"))
        _one_of("head", head, (None, *HEADS))
        _one_of("values", values, (None, *VALUE_DTYPES))
        if embeddings not in (None, "int8") or (embeddings and values != "int8"):
            raise ValueError(
                "quantization_config: embeddings are int8 beside values of int8 only, got "
                f"{embeddings!r} beside {values!r}"
            )
        _one_of("quant_method", quant_method, (METHOD,))
        if type(format_version) is not int or format_version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: format_version {format_version!r} is unknown, this package reads "
                f"{FORMAT_VERSION}; install a newer hf-nmsparse"
            )
        if producer is not None and not isinstance(producer, str):
            raise ValueError(f"quantization_config: producer is a text, got {producer!r}")
        sparse = NMSparseConfig(pattern, targets, ignore, soft)
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own methods are an enum
        self.compute, self.head, self.format, self.format_version = compute, head, format, format_version
        self.pattern, self.targets, self.ignore, self.soft = sparse.pattern, sparse.targets, sparse.ignore, sparse.soft
        self.values, self.embeddings, self.producer = values, embeddings, producer

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> NMSparseQuantizationConfig:
        """Reads the record of config.json.

        Raises:
            PackedFormatError: The record breaks a rule.
        """
        try:
            config = cls(**_checked_record(config_dict))
        except ValueError as error:
            raise PackedFormatError(f"config.json: {error}") from None
        return (config, kwargs) if return_unused_kwargs else config  # type: ignore[return-value]  # as the base class

    def to_dict(self) -> dict[str, Any]:
        """The record as config.json holds it; `compute` and `head` are not part of it."""
        record = {"quant_method": METHOD, "format": self.format, **self.sparse_config().to_dict()}
        if self.format == "packed":
            record["ignored"] = record.pop("ignore", None)
            record |= {"format_version": self.format_version, "values": self.values, "embeddings": self.embeddings}
            record["producer"] = self.producer
        return {key: value for key, value in record.items() if value is not None}

    def sparse_config(self) -> NMSparseConfig:
        """Pattern and rules alone."""
        return NMSparseConfig(self.pattern, self.targets, self.ignore, self.soft)


class _Unpack(ConversionOps):
    """What the file holds of one weight to that weight, dense and in floating point."""

    def __init__(self, pattern: NMPattern) -> None:
        self.pattern = pattern
        self.dtype: torch.dtype | None = None  # of the weight, where the file's values are int8

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """The weight by the name of its parameter."""
        by_key = {_leaf(source): input_dict[source][0] for source in source_patterns if source in input_dict}
        weight = by_key["weight"]
        if "weight_indices" in by_key:
            weight = unpack(weight, by_key["weight_indices"], self.pattern)
        if "weight_scale" in by_key:
            weight = (weight * by_key["weight_scale"][:, None]).to(self.dtype)
        return {kwargs["full_layer_name"]: [weight]}


def _leaf(pattern: str) -> str:
    """The last part of the key that a source pattern of `_converter` stands for."""
    return pattern.rpartition(".")[2].removesuffix("$")


@register_quantizer(METHOD)
class NMSparseQuantizer(HfQuantizer):
    """What `from_pretrained` and `save_pretrained` call for models with an nmsparse record in their configuration."""

    quantization_config: NMSparseQuantizationConfig

    def __init__(self, quantization_config: NMSparseQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "from_pretrained: quantization_config is for packed checkpoints and this one is dense; load it "
                "without, then call sparsify(model, config)"
            )
        self._converters: list[WeightConverter] = []

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Checks the files, then gives the layers that they hold packed the form that `compute` asks for."""
        config = self.quantization_config
        if config.format == "dense":
            return
        if not checkpoint_files:
            raise ValueError("from_pretrained: a packed model is loaded from its files, not from a state_dict")
        renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
        layers: dict[str, str] = {}  # name in the file: name in the model
        with ExitStack() as stack:
            files = _open_files(checkpoint_files, stack)
            for prefix, found in _names_in_model(files, model, renamings).items():
                _check_layer(files, prefix, None if found is None else model.get_submodule(found), config)
                if found is not None and prefix + _CODES in files:
                    layers[prefix] = found
                elif found is not None and prefix + _SCALE in files:
                    self._converters.append(_converter(prefix, renamings, config.pattern, ("weight", "weight_scale")))
            others = {key.rpartition(".")[0] for key in files if key.endswith((_CODES, _SCALE))}
            _check_number_types(files, model, renamings, others)
        if not layers:
            raise PackedFormatError(
                f"{Path(checkpoint_files[0]).name}: no key ends in {_CODES}, or none fits a layer of the model"
            )
        linears = {name: model.get_submodule(name) for name in layers.values()}
        packed = _computing_packed(linears, config.compute, config.pattern, kwargs.get("device_map"))
        int8 = config.values == "int8"
        leaves = ("weight", "weight_indices", *(["weight_scale"] if int8 else []))
        for prefix, name in layers.items():
            layer = linears[name]
            assert isinstance(layer, nn.Linear)
            if name in packed:
                model.set_submodule(name, _empty_packed(layer, config.pattern, int8))
            else:
                layer.pattern = config.pattern  # type: ignore[assignment]
                self._converters.append(_converter(prefix, renamings, config.pattern, leaves))

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The number type in which a tensor of the file is read; scales keep theirs until they are multiplied."""
        dtype = super().get_new_dtype(converter, param, dtype)
        if dtype is not None and self.quantization_config.values == "int8":
            for operation in getattr(converter, "operations", ()):
                if isinstance(operation, _Unpack):
                    operation.dtype = dtype
                    return torch.float32
        return dtype

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How the weights of the layers that compute dense are made from the file."""
        return self._converters

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Leaves nothing behind that a later `save_pretrained` would trip over."""
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                _drop_reader(module.config)
        if self.quantization_config.format == "dense":
            _detach(model)
            sparsify(model, self.quantization_config.sparse_config(), trained=True)
            return model
        self._converters = []
        if self.quantization_config.compute != "reference":
            for name in sparse_layers(model):
                layer = model.get_submodule(name)
                # An offloaded layer gets its weight when it is used, as the file holds it.
                if isinstance(layer, PackedLinear) and not hasattr(layer, "_hf_hook"):
                    model.set_submodule(name, _kernel_layer(layer, self.quantization_config.compute))
        _set_head(model, self.quantization_config)
        # The model keeps the conversions of its loading, and would run them backwards over the packed tensors.
        used: list[Any] = model._weight_conversions  # type: ignore[assignment]
        model._weight_conversions = [  # type: ignore[assignment]
            entry
            for entry in used
            if not any(isinstance(operation, _Unpack) for operation in getattr(entry, "operations", ()))
        ]
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `model.save_pretrained` writes: the model packed again, in its present number type."""
        record = model.config.quantization_config
        if _holds_int8(model):
            record.values = "int8"
        else:
            record.values, record.embeddings = _values_name(model.dtype), None
        return _packed_state_dict(model, model.state_dict(), record), {}

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A packed model is not trained as it is: see `prepare_for_training`."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The reference product looks at the codes, which breaks the graph."""
        return self.quantization_config.compute != "reference"


def save_packed(
    model: PreTrainedModel,
    path: str | Path,
    values: str | None = None,
    *,
    embeddings: str | None = None,
    standalone: bool = False,
    **kwargs: Any,
) -> None:
    """Writes ``model`` as a packed checkpoint, and leaves the model itself as it is.

    Layers in training are masked once more, in the number type of their master, and only then cast. The same model
    always gives the same bytes. A model that the directory holds is replaced whole, by `files.model_folder`.

    Args:
        model: A model after `sparsify`, or one loaded from a packed checkpoint.
        path: The directory.
        values: ``"fp32"``, ``"fp16"`` or ``"bf16"``; None takes the model's. All floating-point tensors of the file
            are cast to it, embeddings and norms included, and config.json names it, so that the model loads in it.
            ``"int8"`` rounds the kept values, with a scale for each row, and leaves other tensors in the model's type.
        embeddings: ``"int8"`` rounds token embeddings and output projection too, ``"float"`` does not; None takes
            ``"int8"`` with int8 values, and what the model was loaded with where ``values`` is None too.
        standalone: Adds a file of Python, ``modeling_nmsparse.py``, with which transformers alone loads the model
            where the user passes ``trust_remote_code=True``; it computes dense there. A model that is loaded from such
            files does not remember them: give the argument again.
        **kwargs: As ``save_pretrained`` takes them. ``state_dict`` holds the dense masters under their stock names,
            for the case that the model's own are sharded.

    Raises:
        ValueError: The model has no sparse layer, a weight breaks the pattern, a number does not fit ``values``,
            weights lie on disk, or ``standalone`` is given for a class that no auto class of translation loads.
    """
    record = _record(model)
    if values is None and _holds_int8(model):
        values, embeddings = "int8", embeddings or record.embeddings or "float"
    values = values or _values_name(model.dtype)
    _one_of("values", values, tuple(VALUE_DTYPES), where="save_packed")
    _one_of("embeddings", embeddings, (None, "float", *(["int8"] if values == "int8" else [])), where="save_packed")
    patterns = set(sparse_layers(model).values())
    if len(patterns) != 1:
        found = ", ".join(sorted(map(str, patterns))) or "none; call sparsify(model, config) first"
        raise ValueError(f"save_packed: a packed model has one pattern, this model has {found}")
    twin = _empty_twin(model, model.dtype if values == "int8" else VALUE_DTYPES[values])
    twin.config.quantization_config = NMSparseQuantizationConfig(
        pattern=patterns.pop(),
        values=values,
        embeddings="int8" if values == "int8" and embeddings != "float" else None,
        targets=record.targets,
        ignore=record.ignore,
        producer=record.producer or f"hf-nmsparse {hf_nmsparse.__version__}",
    )
    if standalone:
        twin.config.auto_map = {**(getattr(twin.config, "auto_map", None) or {}), **_auto_map(twin)}
    state_dict = kwargs.pop("state_dict", None) or model.state_dict()
    tensors = _packed_state_dict(model, state_dict, twin.config.quantization_config)
    _write(twin, path, tensors, "save_packed", kwargs, standalone)


def export_dense(model: PreTrainedModel, path: str | Path, **kwargs: Any) -> None:
    """Writes ``model`` as a stock checkpoint that any tool loads: weights masked, zeros in their places.

    Args:
        model: A model after `sparsify`, or one loaded from a packed checkpoint.
        path: The directory.
        **kwargs: As ``save_pretrained`` takes them.

    Raises:
        ValueError: The model has no sparse layer, or weights lie on disk.
    """
    if not sparse_layers(model):
        raise ValueError("export_dense: the model has no sparse layer; model.save_pretrained(path) writes it as it is")
    twin = _empty_twin(model, None)
    if hasattr(twin.config, "quantization_config"):
        del twin.config.quantization_config
    tensors = dict(_dense_tensors(model, kwargs.pop("state_dict", None) or model.state_dict()))
    _write(twin, path, tensors, "export_dense", kwargs)


def push_to_hub(
    model: PreTrainedModel | str | Path,
    repo_id: str,
    values: str | None = None,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload packed N:M sparse model",
    **kwargs: Any,
) -> str:
    """Pushes a packed model to the Hub; the repository is made where there is none.

    Other files of the repository, README.md among them, stay unless the folder brings its own; weights of an earlier
    push that the new one does not replace are deleted.

    Args:
        model: A model that `save_packed` takes, or the directory of a packed model, which goes up as it is: weights,
            tokenizer and card.
        repo_id: ``owner/name``.
        values: As in `save_packed`; the directory of a packed model has its own.
        private: Whether a new repository is private.
        token: The user's token; by default the one that is stored on this machine.
        revision: The branch to push to.
        create_pr: Open a pull request instead.
        commit_message: The message.
        **kwargs: As `save_packed` takes them.

    Returns:
        The address of the commit.

    Raises:
        ValueError: As `save_packed`, or the directory is none that `check_folder` passes.
    """
    if isinstance(model, PreTrainedModel):
        with TemporaryDirectory() as folder:
            save_packed(model, folder, values, **kwargs)
            return push_to_hub(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
    if values is not None or kwargs:
        raise ValueError(
            f"push_to_hub: {model} is written already; give {', '.join(kwargs) or 'values'} to save_packed"
        )
    check_folder(model)
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = hub.upload_folder(
        repo_id=repo_id,
        folder_path=model,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        delete_patterns=["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"],
    )
    return str(commit.commit_url)


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
    standalone = isinstance(auto_map, dict) and any(map(_is_reader, auto_map.values()))
    if standalone and not (folder / f"{_READER}.py").is_file():
        raise PackedFormatError(f"config.json: auto_map names {_READER}.py, which the folder has not; save it again")
    layers: dict[str, tuple[int, int]] = {}
    packed = dense = 0
    with ExitStack() as stack:
        files = _open_files(_weight_files(folder), stack)
        ends = (_CODES, _SCALE)
        for prefix in sorted({key.rpartition(".")[0] for key in files if key.endswith(ends)}):
            _check_layer(files, prefix, None, config)
        for key, (_, opened) in files.items():
            prefix, _, leaf = key.rpartition(".")
            tensor = opened.get_tensor(key)
            packed += tensor.nbytes
            if leaf == "weight" and prefix + _CODES in files:
                rows, columns = tensor.shape[0], tensor.shape[1] // config.pattern.n * config.pattern.m
                layers[prefix] = rows, columns
                dense += rows * columns * tensor.itemsize
            elif not key.endswith(_CODES):
                dense += tensor.nbytes
    if not layers:
        raise PackedFormatError(f"{folder.name}: no key ends in {_CODES}, so no layer is packed")
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


def set_compute(model: PreTrainedModel, compute: str, head: str | None = None) -> None:
    """Switches a model that was loaded packed to another way to compute, in place.

    A weight that was rounded, to bf16 or int8, stays so: load the model again for the file's own.

    Args:
        model: The model.
        compute: As in `NMSparseQuantizationConfig`.
        head: As in `NMSparseQuantizationConfig`.

    Raises:
        ValueError: ``compute`` or ``head`` is unknown or not possible here, the model was not loaded packed, or it is
            spread over devices.
    """
    _one_of("compute", compute, COMPUTES, where="set_compute")
    _one_of("head", head, (None, *HEADS), where="set_compute")
    config = _attached(model, "set_compute").quantization_config
    layers = {name: model.get_submodule(name) for name in sparse_layers(model)}
    for name, layer in layers.items():
        if hasattr(layer, "_hf_hook"):
            raise ValueError(f"set_compute: {name} is offloaded; load the model again with compute={compute!r}")
    config.compute, config.head = compute, head
    stay_packed = _computing_packed(layers, compute, config.pattern, model.device)
    for name, layer in layers.items():
        if name not in stay_packed and isinstance(layer, nn.Linear):
            continue
        packed = _packed_layer(layer, config.pattern, name)
        if name not in stay_packed:
            model.set_submodule(name, packed.to_linear())
        else:
            model.set_submodule(name, packed if compute == "reference" else _kernel_layer(packed, compute))
    _set_head(model, config)


def prepare_for_training(model: PreTrainedModel) -> None:
    """Makes an ordinary trainable model with N:M layers of one that was loaded packed, in place.

    Pruned weights start at zero and get gradients like all others. Load with ``dtype=torch.float32`` for masters in
    fp32. A checkpoint of the training is loaded ready for it and stays as it is.

    Args:
        model: A model loaded from a packed checkpoint or from one of the training.

    Raises:
        ValueError: The model was loaded from neither, or it is spread over devices.
    """
    if any(isinstance(module, NMLinear) for module in model.modules()):
        return
    quantizer = _attached(model, "prepare_for_training")
    set_compute(model, "dense")
    names = list(sparse_layers(model))
    for name in names:
        del model.get_submodule(name).pattern
    config = quantizer.quantization_config.sparse_config()
    try:
        same = select_layers(model, config)[0].keys() == set(names)
    except ValueError:  # the rules were written for a model with other prefixes
        same = False
    _detach(model)
    sparsify(model, config if same else NMSparseConfig(config.pattern, names, ()))


def _merge_with_compute(merge: Any) -> Any:
    """Lets the user's choices through where transformers takes the file's record and warns that it drops the rest."""

    @wraps(merge)
    def merge_quantization_configs(record: Any, from_args: Any = None) -> Any:
        if isinstance(from_args, NMSparseQuantizationConfig):
            config = AutoQuantizationConfig.from_dict(record) if isinstance(record, dict) else copy.copy(record)
            if isinstance(config, NMSparseQuantizationConfig):
                config.compute, config.head = from_args.compute, from_args.head
                return merge(config, None)
        return merge(record, from_args)

    merge_quantization_configs.stock = merge  # type: ignore[attr-defined]
    return merge_quantization_configs


_merge = AutoHfQuantizer.merge_quantization_configs
AutoHfQuantizer.merge_quantization_configs = staticmethod(  # type: ignore[method-assign]
    _merge_with_compute(getattr(_merge, "stock", _merge))
)


def _one_of(key: str, value: Any, known: tuple[Any, ...], where: str = "quantization_config") -> None:
    if value not in known:
        names = ", ".join(repr(name) for name in known if name is not None)
        raise ValueError(f"{where}: {key} is one of {names}, got {value!r}")


def _checked_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `NMSparseQuantizationConfig` that a record of config.json stands for."""
    _one_of("format", record.get("format"), tuple(_RECORD_KEYS))
    needed, optional = _RECORD_KEYS[record["format"]]
    for key in record:
        if key not in needed + optional:
            known = ", ".join(needed + optional)
            raise ValueError(f"quantization_config: unknown key {key!r}; known keys are {known}")
    for key in needed:
        if record.get(key) is None:
            raise ValueError(f"quantization_config: {key} is missing")
    return {"ignore" if key == "ignored" else key: value for key, value in record.items()}


def _values_name(dtype: torch.dtype) -> str:
    for name, known in VALUE_DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"save_packed: a packed model has values in fp32, fp16, bf16, this model is in {dtype}")


def _computing_packed(
    layers: Mapping[str, nn.Module], compute: str, pattern: NMPattern, device_map: Any
) -> Collection[str]:
    """The names of the layers that compute packed; with ``"auto"`` those that are faster so where they will lie.

    Args:
        layers: Linear layers, of any form and without data if need be.
        compute: As `NMSparseQuantizationConfig` takes it.
        pattern: The pattern.
        device_map: As ``from_pretrained`` takes it.
    """
    if compute != "auto":
        return () if compute == "dense" else layers.keys()
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map or "cpu"}
    if places & {"auto", "balanced", "balanced_low_0", "sequential"}:
        devices = {torch.device("meta" if torch.accelerator.is_available() else "cpu")}
    else:
        devices = {torch.device("meta" if place == "disk" else place) for place in places}
    if {device.type for device in devices} == {"cpu"}:
        widest = max(layer.in_features for layer in layers.values())  # type: ignore[type-var]
        return layers.keys() if _kernels_run(pattern, widest) else ()  # type: ignore[arg-type]
    if len(devices) > 1:
        return ()
    [device] = devices
    return [name for name, layer in layers.items() if _faster_on_gpu(layer, pattern, device)]


def _kernels_run(pattern: NMPattern, in_features: int) -> bool:
    """Whether the native kernels compute layers of this pattern, up to this many inputs, faster than dense ones do."""
    if not cpu.fits(pattern, in_features):
        return False
    status = native.status()
    if status.library is None and not status.chosen:
        warnings.warn(f"hf_nmsparse: packed layers compute dense and slower, because {status.reason}", stacklevel=2)
    return status.unit not in (None, "scalar")


def _faster_on_gpu(layer: Any, pattern: NMPattern, device: torch.device) -> bool:
    shape, dtype = (layer.out_features, layer.in_features), getattr(layer, "dtype", layer.weight.dtype)
    if semi_structured.why_not(pattern, *shape, dtype, device) is not None:
        return False
    return semi_structured.is_faster(*shape, dtype, device)


def _kernel_layer(layer: PackedLinear, compute: str) -> KernelLinear:
    on_gpu = compute == "auto" and layer.weight.device.type == "cuda"
    if compute == "semi_structured" or on_gpu:
        return SemiStructuredLinear(layer)
    return KernelLinear(layer, cpu.preferred_format(layer.weight.dtype) if compute == "auto" else compute)


def _packed_layer(layer: nn.Module, pattern: NMPattern, name: str) -> PackedLinear:
    """``layer`` with its weight as the file holds it."""
    if isinstance(layer, PackedLinear):
        return layer
    if isinstance(layer, KernelLinear):
        return layer.to_packed()
    assert isinstance(layer, nn.Linear)
    return PackedLinear.from_linear(layer, pattern, f"{name}.weight")


def _set_head(model: PreTrainedModel, config: NMSparseQuantizationConfig) -> None:
    """Gives the output projection the form that ``config`` asks for."""
    head = model.get_output_embeddings()
    kind = config.head or ("int8" if _holds_int8(model, KernelLinear) else "dense")
    if kind == "dense":
        if isinstance(head, Int8Head):
            head.to_linear()
    elif type(head) is nn.Linear and not hasattr(head, "_hf_hook"):
        if config.head is not None or head.weight.device.type == "cpu":
            Int8Head.from_linear(head)
    elif config.head is not None and not isinstance(head, Int8Head):
        raise ValueError(f"head: 'int8' needs an output projection that is an nn.Linear, got {type(head).__name__}")


def _holds_int8(model: nn.Module, kinds: Any = (KernelLinear, PackedLinear)) -> bool:
    """Whether sparse layers of ``model`` hold values of int8."""
    return any(
        layer.format == "int8" if isinstance(layer, KernelLinear) else layer.weight_scale is not None
        for layer in model.modules()
        if isinstance(layer, kinds)
    )


def _attached(model: PreTrainedModel, where: str) -> NMSparseQuantizer:
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, NMSparseQuantizer):
        raise ValueError(f"{where}: the model was not loaded from a packed checkpoint")
    return quantizer


def _detach(model: PreTrainedModel) -> None:
    """Makes a model that `from_pretrained` took for quantized an ordinary one."""
    _attached(model, "detach").remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)


def _record(model: PreTrainedModel) -> NMSparseQuantizationConfig:
    """What the model's configuration says of its sparsity; the defaults where the layers were made by hand."""
    record = getattr(model.config, "quantization_config", None)
    if isinstance(record, NMSparseQuantizationConfig):
        return record
    return NMSparseQuantizationConfig.from_dict(record) if record else NMSparseQuantizationConfig()


def _read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise PackedFormatError(f"{file.name}: the file is no JSON") from None
    if not isinstance(content, dict):
        raise PackedFormatError(f"{file.name}: the file is no JSON object")
    return content


def _weight_files(folder: Path) -> list[str]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file() and not (folder / "model.safetensors").is_file():  # transformers prefers the one file, too
        weight_map = _read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise PackedFormatError(f"{index.name}: weight_map is missing")
        names = set(map(str, weight_map.values()))
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            raise PackedFormatError(f"{name}: there is no such file in the folder")
    return [str(folder / name) for name in sorted(names)]


def _open_files(paths: list[str], stack: ExitStack) -> dict[str, tuple[str, Any]]:
    """For each key of a checkpoint the name of its file and the open file."""
    files = {}
    for path in paths:
        name = Path(path).name
        if not name.endswith(".safetensors"):
            raise PackedFormatError(f"{name}: a packed checkpoint is a safetensors file")
        try:
            opened = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise PackedFormatError(f"{name}: the file is not a whole safetensors file ({error})") from None
        files.update(dict.fromkeys(opened.keys(), (name, opened)))
    return files


def _names_in_model(
    files: Mapping[str, Any], model: PreTrainedModel, renamings: list[WeightRenaming]
) -> dict[str, str | None]:
    """For each module of a checkpoint that has a weight its name in ``model``; None where ``model`` has it not."""
    expected = model.state_dict()
    names: dict[str, str | None] = {}
    for prefix in dict.fromkeys(key.rpartition(".")[0] for key in files if key.endswith((".weight", _CODES, _SCALE))):
        key, _ = rename_source_key(f"{prefix}.weight", renamings, [], model.base_model_prefix, expected)
        names[prefix] = key.removesuffix(".weight") if key in expected else None
    return names


def _check_number_types(
    files: Mapping[str, tuple[str, Any]], model: PreTrainedModel, renamings: list[WeightRenaming], packed: set[str]
) -> None:
    """Checks that what the model has in floating point is so in the files; ``packed`` modules have other rules."""
    expected = model.state_dict()
    for key, (file, opened) in files.items():
        name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, expected)
        if name not in expected or key.rpartition(".")[0] in packed:
            continue
        found = opened.get_slice(key).get_dtype()
        if expected[name].is_floating_point() != found.startswith(("F", "BF")):
            raise PackedFormatError(f"{file}: {key}: the model has {expected[name].dtype} here, got {found}")


def _check_layer(
    files: Mapping[str, tuple[str, Any]], prefix: str, layer: nn.Module | None, config: NMSparseQuantizationConfig
) -> None:
    """Checks what the files hold for one layer, which is None if the model has it not."""
    if prefix + _CODES not in files:
        if prefix + _SCALE in files:
            _check_embedding(files, prefix, layer, config)
        elif isinstance(layer, nn.Linear) and layer.in_features % config.pattern.m == 0:
            file, opened = files[f"{prefix}.weight"]
            values, _ = packed_shapes(layer.out_features, layer.in_features, config.pattern)
            if tuple(opened.get_slice(f"{prefix}.weight").get_shape()) == values:
                raise PackedFormatError(f"{file}: {prefix}{_CODES}: codes are missing beside packed values")
        return
    codes_file, opened_codes = files[prefix + _CODES]
    if f"{prefix}.weight" not in files:
        raise PackedFormatError(f"{codes_file}: {prefix}.weight: values are missing beside the codes")
    file, opened = files[f"{prefix}.weight"]
    if layer is not None and type(layer) is not nn.Linear:
        raise PackedFormatError(f"{file}: {prefix}.weight: the model's layer is {type(layer).__name__}, not nn.Linear")
    assert config.values is not None
    check_packed(
        opened.get_tensor(f"{prefix}.weight"),
        opened_codes.get_tensor(prefix + _CODES),
        config.pattern,
        VALUE_DTYPES[config.values],
        None if layer is None else (layer.out_features, layer.in_features),
        prefix,
        file,
        files[prefix + _SCALE][1].get_tensor(prefix + _SCALE) if prefix + _SCALE in files else None,
    )


def _check_embedding(
    files: Mapping[str, tuple[str, Any]], prefix: str, layer: nn.Module | None, config: NMSparseQuantizationConfig
) -> None:
    """Checks what the files hold of an embedding or a head in int8; ``layer`` is None if the model has it not."""
    file, opened = files[prefix + _SCALE]
    if f"{prefix}.weight" not in files:
        raise PackedFormatError(f"{file}: {prefix}.weight: values are missing beside the scales")
    if config.embeddings != "int8":
        raise PackedFormatError(f"{file}: {prefix}{_SCALE}: config.json does not declare embeddings of int8")
    values = files[f"{prefix}.weight"][1].get_tensor(f"{prefix}.weight")
    check_quantized(values, opened.get_tensor(prefix + _SCALE), prefix, file)
    if layer is not None:
        expected = tuple(layer.weight.shape) if isinstance(layer, nn.Embedding | nn.Linear) else None
        if tuple(values.shape) != expected:
            raise PackedFormatError(
                f"{file}: {prefix}.weight: int8 values {list(values.shape)} fit no {type(layer).__name__} of {expected}"
            )


def _converter(
    prefix: str, renamings: list[WeightRenaming], pattern: NMPattern, leaves: tuple[str, ...]
) -> WeightConverter:
    """Makes the dense weight of the layer that the file calls ``prefix``; it sees keys after the renamings."""
    renamed = [rename_source_key(f"{prefix}.{leaf}", renamings, [])[0] for leaf in leaves]
    return WeightConverter([f"^{re.escape(key)}$" for key in renamed], renamed[0], [_Unpack(pattern)])


def _empty_packed(layer: nn.Linear, pattern: NMPattern, int8: bool) -> PackedLinear:
    """The packed layer that takes the place of ``layer`` before the weights are loaded."""
    return PackedLinear(
        layer.in_features, layer.out_features, pattern, layer.bias is not None, "meta", layer.weight.dtype, int8
    ).train(layer.training)


def _write(
    twin: PreTrainedModel,
    path: str | Path,
    tensors: dict[str, Tensor],
    where: str,
    kwargs: dict[str, Any],
    standalone: bool = False,
) -> None:
    """Saves ``tensors`` as the model ``twin``, with the reader beside it if asked for, whole or not at all."""
    if kwargs.get("push_to_hub"):
        raise ValueError(f"{where}: it writes files; push the folder with push_to_hub(path, repo_id) then")
    with model_folder(path) as folder:
        twin.save_pretrained(folder, state_dict=tensors, **kwargs)
        if standalone and (folder / "config.json").is_file():  # some processes leave the writing to another
            shutil.copyfile(reader.__file__, folder / f"{_READER}.py")


def _auto_map(model: PreTrainedModel) -> dict[str, str]:
    """What config.json says of the reader that goes with the weights, by the auto classes that it serves."""
    kind = type(model.config)
    served = {auto: read for auto, read in _READERS.items() if kind in read.models}
    if type(model) not in (read.models[kind] for read in served.values()):
        raise ValueError(
            f"save_packed: standalone is for what {' or '.join(_READERS)} loads, and {type(model).__name__} is not "
            "among it; leave it out"
        )
    return {auto: f"{_READER}.{read.__name__}" for auto, read in served.items()}


def _drop_reader(config: Any) -> None:
    """Takes the reader out of a configuration that was read beside one: no later save would write the file again."""
    auto_map = getattr(config, "auto_map", None)
    if isinstance(auto_map, dict):
        config.auto_map = {auto: code for auto, code in auto_map.items() if not _is_reader(code)}
        if not config.auto_map:
            del config.auto_map


def _is_reader(code: Any) -> bool:
    """Whether an entry of ``auto_map``, which may begin with the name of a repository, stands for the reader."""
    return str(code).rpartition("--")[2].startswith(f"{_READER}.")


def _empty_twin(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """A copy of ``model`` without data, in ``dtype``, that writes the state dict it is given and a changed config."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=cast, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    for layer in model.modules():
        if isinstance(layer, NMLinear) and layer.mask is not None:
            memo[id(layer.mask)] = None
        elif isinstance(layer, PackedLinear | KernelLinear):  # shards count parameters as those of the stock model
            memo[id(layer)] = nn.Linear(
                layer.in_features, layer.out_features, layer.bias is not None, "meta", dtype or layer.dtype
            )
        elif isinstance(layer, Int8Head):
            memo[id(layer)] = head = nn.Linear(layer.in_features, layer.out_features, False, "meta")
            head.weight = memo[id(layer.weight)]
            head.bias = None if layer.bias is None else memo[id(layer.bias)]
    if isinstance(model, FSDPModule):  # which refuses to be copied
        stock: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
        with torch.device("meta"):
            twin: PreTrainedModel = stock(copy.deepcopy(model.config)).to(dtype or model.dtype)
        twin.generation_config = copy.deepcopy(model.generation_config)
    else:
        twin = copy.deepcopy(model, memo)
    for loaded in ("hf_quantizer", "hf_device_map"):
        twin.__dict__.pop(loaded, None)
    _drop_reader(twin.config)
    return twin


def _dense_tensors(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """``state_dict`` under its stock names, the weights of sparse layers dense and masked."""
    layers = {name: model.get_submodule(name) for name in sparse_layers(model)}
    # What is tied in the model need not be so in weights that were gathered from shards.
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    state_dict = {key: state_dict.get(tied.get(key, key), tensor) for key, tensor in state_dict.items()}
    for key, tensor in state_dict.items():
        prefix, _, leaf = key.rpartition(".")
        layer = layers.get(prefix)
        if tensor.is_meta:
            raise ValueError(f"save: {key} is offloaded; load the model without offloading to save it")
        if layer is None or leaf == "bias":
            yield key, tensor
        elif leaf == "weight":
            if isinstance(layer, PackedLinear | KernelLinear):
                tensor = layer.dense_weight()
            elif isinstance(layer, NMLinear):
                layer.check_sparse()
                current = layer.mask
                if current is None or current.shape != tensor.shape:  # a shard's mask does not fit gathered weights
                    current = magnitude_mask(tensor, layer.pattern)
                tensor = layer.masked(tensor, current.to(tensor.device))
            yield key, tensor


def _packed_state_dict(
    model: PreTrainedModel, state_dict: Mapping[str, Tensor], record: NMSparseQuantizationConfig
) -> dict[str, Tensor]:
    """The tensors of the packed file, in an order that does not depend on where the model came from."""
    assert record.values is not None
    int8 = record.values == "int8"
    dtype = model.dtype if int8 else VALUE_DTYPES[record.values]
    patterns = sparse_layers(model)
    cast: dict[tuple[Any, ...], Tensor] = {}  # tied tensors stay tied, so that one of them is written
    packed: dict[str, Tensor] = {}
    tensors = dict(_dense_tensors(model, state_dict))
    rounded: set[str] = set()
    if record.embeddings == "int8":  # of tied tensors one is written, and only that one gets a scale
        places = {tensors[key].data_ptr() for key in _embedding_keys(model) & tensors.keys()}
        tensors = remove_tied_weights_from_state_dict(tensors, model)
        rounded = {key for key, tensor in tensors.items() if tensor.data_ptr() in places}
    for key, tensor in tensors.items():
        prefix, _, leaf = key.rpartition(".")
        if prefix in patterns and leaf == "weight":
            layer = model.get_submodule(prefix)
            if int8 and isinstance(layer, PackedLinear | KernelLinear) and _holds_int8(layer):
                both = layer.packed_tensors()
            elif int8:
                both = _pack_int8(_cast(tensor, torch.float32, key), patterns[prefix], key)
            else:
                both = pack(_cast(tensor, dtype, key), patterns[prefix], key)
            packed |= {f"{prefix}.{part}": part_tensor for part, part_tensor in both.items()}
        elif key in rounded:
            packed[key], packed[prefix + _SCALE] = quantize_rows(tensor)
        elif tensor.is_floating_point():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if place not in cast:
                cast[place] = _cast(tensor, dtype, key)
            packed[key] = cast[place]
        else:
            packed[key] = tensor
    return dict(sorted(packed.items(), key=lambda item: dot_natural_key(item[0])))


def _pack_int8(weight: Tensor, pattern: NMPattern, key: str) -> dict[str, Tensor]:
    """The packed form of ``weight`` with int8 values; the places of what rounds to zero are those that `pack` gives."""
    both = pack(weight, pattern, key)
    values, scale = quantize_rows(both["weight"])
    return pack(unpack(values, both["weight_indices"], pattern), pattern, key) | {"weight_scale": scale}


def _embedding_keys(model: PreTrainedModel) -> set[str]:
    """The keys of the weights of token embeddings and output projection."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    found = [part.get_output_embeddings() for part in parts]
    for part in parts:
        try:
            found.append(part.get_input_embeddings())
        except NotImplementedError:  # a part that takes no tokens
            continue
    modules = {id(module) for module in found if module is not None}
    names = {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in modules}
    return {f"{name}.weight" for name in names}


def _cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    cast = tensor.to(dtype)
    if cast.isinf().any() and not tensor.isinf().any():
        raise ValueError(f"save_packed: {key} has numbers too large for {dtype}; choose bf16 or fp32")
    return cast
