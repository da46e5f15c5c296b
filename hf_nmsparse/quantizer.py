"""How `from_pretrained` makes models of packed files, and a loaded model trainable.

Importing this module registers the loader, after which ``AutoModelForSeq2SeqLM.from_pretrained`` and its like read
packed checkpoints and checkpoints of the training. It is the only module that knows transformers' quantizers.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from hf_nmsparse.checkpoint_fit import check_complete, check_number_types, model_layer, names_in_model
from hf_nmsparse.compute import computing_packed, kernel_layer, loaded_with, set_compute, set_head
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.generation import attach
from hf_nmsparse.kernels import cpu
from hf_nmsparse.layers import NMLayer, channel_dim, sparse_layers
from hf_nmsparse.packed_files import CODES, SCALE, check_layer, check_numbers, check_places, read_files
from hf_nmsparse.packed_format import PackedFormatError
from hf_nmsparse.packed_layers import KernelLinear, PackedLinear
from hf_nmsparse.packing import from_matrix, unpack
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.saving import drop_reader, holds_int8, packed_state_dict, values_name
from hf_nmsparse.sparse_model import select_layers, sparsify
from hf_nmsparse.sparsity_record import METHOD
from hf_nmsparse.wrappers import has_adapters, is_hooked, unwrapped

__all__ = ["NMSparseQuantizer", "prepare_for_training"]

logger = logging.get_logger(__name__)

# In place of what `registration` has put there for it.
AUTO_QUANTIZER_MAPPING.pop(METHOD, None)


class _Unpack(ConversionOps):
    """What the file holds of one weight to that weight, dense and in floating point."""

    def __init__(self, pattern: NMPattern, layer: nn.Module | None) -> None:
        self.pattern, self.layer = pattern, layer
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
        if "weight_shape" in by_key:  # which was found to be the layer's own
            layer: Any = self.layer
            weight = from_matrix(weight, layer.weight.shape, channel_dim(layer))
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
        self._files: dict[str, str] = {}  # for each key the name of its file
        self._holds_dense = quantization_config.format == "dense"

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Checks the files, then gives the layers that they hold packed the form that `compute` asks for."""
        config = self.quantization_config
        if not checkpoint_files:
            raise ValueError("from_pretrained: a sparse model is loaded from its files, not from a state_dict")
        check_places(checkpoint_files, model.config.name_or_path)
        renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
        layers: dict[str, str] = {}  # name in the file: name in the model
        files = read_files(checkpoint_files)
        self._files = {key: tensor.file for key, tensor in files.items()}
        if self._holds_dense:
            check_number_types(files, model, renamings)
            check_numbers(files)
            return
        for prefix, found in names_in_model(files, model, renamings).items():
            check_layer(files, prefix, None if found is None else model_layer(model.get_submodule(found)), config)
            if found is not None and prefix + CODES in files:
                layers[prefix] = found
            elif found is not None and prefix + SCALE in files:
                self._converters.append(_converter(prefix, renamings, config.pattern, ("weight", "weight_scale")))
        check_number_types(files, model, renamings)
        check_numbers(files)
        if not any(key.endswith((CODES, SCALE)) for key in files):
            # A model that was made of a packed one's configuration and is not sparse: it is loaded as what it is.
            self._holds_dense = True
            return
        if not layers:
            raise PackedFormatError(f"{Path(checkpoint_files[0]).name}: no key with {CODES} fits a layer of the model")
        modules = {name: model.get_submodule(name) for name in layers.values()}
        int8 = config.values == "int8"
        packed = computing_packed(modules, config.compute, config.pattern, kwargs.get("device_map"), int8)
        leaves = ("weight", "weight_indices", *(["weight_scale"] if int8 else []))
        for prefix, name in layers.items():
            layer = modules[name]
            if name in packed:
                assert isinstance(layer, nn.Linear)
                model.set_submodule(name, _empty_packed(layer, config.pattern, int8))
            else:
                layer.pattern = config.pattern  # type: ignore[assignment]
                others = () if isinstance(layer, nn.Linear) else ("weight_shape",)
                self._converters.append(_converter(prefix, renamings, config.pattern, leaves + others, layer))

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The number type of the model, which the kernels must know if they are to compute."""
        dtype = super().update_dtype(dtype)
        if not self._holds_dense and self.quantization_config.compute not in ("dense", "reference"):
            cpu.preferred_format(dtype)
        return dtype

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

    def update_weight_conversions(self, weight_conversions: Any, model: PreTrainedModel) -> Any:
        """All conversions of a loading that is about to begin; what the files lack is told of here."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        check_complete(self._files, model, conversions)
        return conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Leaves nothing behind that a later `save_pretrained` would trip over."""
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                drop_reader(module.config)
        if self._holds_dense:
            self.remove_quantization_config(model)
            if self.quantization_config.format == "dense":
                sparsify(model, self.quantization_config.sparse_config(), trained=True)
            else:
                logger.warning("config.json says packed, and the files hold a dense model: it is loaded as one")
            return model
        self._converters = []
        if self.quantization_config.compute != "reference":
            for name in sparse_layers(model):
                layer = model.get_submodule(name)
                # An offloaded layer gets its weight when it is used, as the file holds it.
                if isinstance(layer, PackedLinear) and not is_hooked(layer):
                    model.set_submodule(name, kernel_layer(layer, self.quantization_config.compute))
        set_head(model, self.quantization_config.head)
        # The model keeps the conversions of its loading, and would run them backwards over the packed tensors.
        used: list[Any] = model._weight_conversions  # type: ignore[assignment]
        model._weight_conversions = [  # type: ignore[assignment]
            entry
            for entry in used
            if not any(isinstance(operation, _Unpack) for operation in getattr(entry, "operations", ()))
        ]
        model.num_parameters = partial(_num_parameters, model)  # type: ignore[method-assign]
        attach(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `model.save_pretrained` writes: the model packed again, in its present number type."""
        record = model.config.quantization_config
        if holds_int8(model):
            record.values = "int8"
        else:
            record.values, record.embeddings = values_name(model.dtype), None
        return packed_state_dict(model, model.state_dict(), record), {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        set_compute(model, "dense", "dense")
        for name in sparse_layers(model):
            del model.get_submodule(name).pattern
        model.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Makes a model that `from_pretrained` took for quantized an ordinary one."""
        super().remove_quantization_config(model)
        for ours in ("num_parameters", "generate"):
            model.__dict__.pop(ours, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters over it, as PEFT adds them; to train the weights themselves see `prepare_for_training`."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The reference product looks at the codes, which breaks the graph."""
        return self.quantization_config.compute != "reference"


def prepare_for_training(model: PreTrainedModel) -> None:
    """Makes an ordinary trainable model with N:M layers of one that was loaded packed, in place.

    Pruned weights start at zero and get gradients like all others, also where they were frozen. Load with
    ``dtype=torch.float32`` for masters in fp32. A checkpoint of the training is loaded ready for it and stays as it is.

    Args:
        model: A model loaded from a packed checkpoint or from one of the training.

    Raises:
        ValueError: The model was loaded from neither, is spread over devices, or holds adapters.
    """
    model = unwrapped(model)
    if any(isinstance(module, NMLayer) for module in model.modules()):
        return
    config = loaded_with(model, "prepare_for_training").sparse_config()
    if has_adapters(model):
        raise ValueError(
            "prepare_for_training: the model holds PEFT adapters; merge them first: set_compute(model, 'dense'), then "
            "model = model.merge_and_unload()"
        )
    set_compute(model, "dense")
    names = list(sparse_layers(model))
    for name in names:
        layer: Any = model.get_submodule(name)
        del layer.pattern
        layer.weight.requires_grad_(True)
    try:
        same = select_layers(model, config)[0].keys() == set(names)
    except ValueError:  # the rules were written for a model with other prefixes
        same = False
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    sparsify(model, config if same else NMSparseConfig(config.pattern, names, (), convolutions=config.convolutions))


def _num_parameters(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """What ``model.num_parameters`` counts: of a packed weight every weight of the layer, as of its dense form."""
    count = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    for layer in () if only_trainable else model.modules():
        if isinstance(layer, KernelLinear):
            count += layer.out_features * layer.in_features
        elif isinstance(layer, PackedLinear):
            count += layer.out_features * layer.in_features - layer.weight.numel()
    return count


def _converter(
    prefix: str,
    renamings: list[WeightRenaming],
    pattern: NMPattern,
    leaves: tuple[str, ...],
    layer: nn.Module | None = None,
) -> WeightConverter:
    """Makes the dense weight of the layer that the file calls ``prefix``; it sees keys after the renamings."""
    renamed = [rename_source_key(f"{prefix}.{leaf}", renamings, [])[0] for leaf in leaves]
    return WeightConverter([f"^{re.escape(key)}$" for key in renamed], renamed[0], [_Unpack(pattern, layer)])


def _empty_packed(layer: nn.Linear, pattern: NMPattern, int8: bool) -> PackedLinear:
    """The packed layer that takes the place of ``layer`` before the weights are loaded."""
    return PackedLinear(
        layer.in_features, layer.out_features, pattern, layer.bias is not None, "meta", layer.weight.dtype, int8
    ).train(layer.training)
