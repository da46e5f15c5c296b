"""The record of a sparse model as transformers knows it, and its registration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_nmsparse.sparsity_record import METHOD, SparsityRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NMSparseQuantizationConfig", "record_of"]

# A second import of this file, as importlib.reload does it, replaces what the first one registered.
AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)


@register_quantization_config(METHOD)
class NMSparseQuantizationConfig(SparsityRecord, QuantizationConfigMixin):
    """What config.json says of a sparse model, and how the model is to compute once it is loaded.

    Users give ``compute`` and ``head`` alone, ``NMSparseQuantizationConfig(compute="int8")``, as the
    ``quantization_config`` of ``from_pretrained``; everything else comes from the file.

    Args:
        compute: How sparse layers compute; a choice of the reader and not written. ``"fp32"``, ``"bf16"`` and
            ``"int8"`` run on the native CPU kernels with values of that type, and ``"int8"`` rounds activations as
            well. ``"semi_structured"`` runs on the sparse tensor cores of an NVIDIA GPU, in fp16 or bf16.
            ``"dense"`` unpacks each weight into a plain ``nn.Linear`` that carries its ``pattern``. ``"reference"``
            keeps it packed and unpacks it in every product. ``"auto"`` takes the fastest kernels that keep the file's
            precision, and ``"dense"`` where there are none: for patterns that are not part of 2:4 (with int8 values
            on CPUs: that keep more than 8 of 16 neighbouring columns), without the native library, on other devices.
            On one GPU it measures the shapes of the layers, and those that sparse tensor cores multiply faster for
            every number of rows compute there. Convolutions compute dense in any case.
        head: How the output projection computes: ``"dense"``, or ``"int8"``, which keeps an int8 copy of its weight
            for the product. None takes ``"int8"`` where the sparse layers compute in int8. Not written either.
        pattern: The N:M pattern of the sparse layers.
        values: Number type of the file: ``"fp32"``, ``"fp16"`` or ``"bf16"`` for all its floating-point tensors, or
            ``"int8"`` for the sparse layers alone.
        embeddings: ``"int8"`` if token embeddings and output projection are int8 in the file; only with int8 values.
        targets: The rules that chose the sparse layers, as in `NMSparseConfig`.
        ignore: The rules that kept layers dense, as in `NMSparseConfig`; a packed file calls them ``ignored``.
        soft: As in `NMSparseConfig`, for a checkpoint of the training alone.
        convolutions: As in `NMSparseConfig`; a packed file says it by its version.
        transposable: As in `NMSparseConfig`, for a checkpoint of the training alone.
        format: ``"packed"``, or ``"dense"`` for a checkpoint of the training.
        format_version: Version of the packed format; None takes 2 with ``convolutions`` and 1 without.
        producer: The program that wrote the file.
        quant_method: ``"nmsparse"``.
        **unknown: No other key is taken.

    Raises:
        ValueError: A key is unknown or a value out of range.
    """

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> NMSparseQuantizationConfig:
        """Reads the record of config.json.

        Raises:
            PackedFormatError: The record breaks a rule.
        """
        config = cls.read(config_dict)
        return (config, kwargs) if return_unused_kwargs else config  # type: ignore[return-value]  # as the base class


def record_of(model: PreTrainedModel) -> NMSparseQuantizationConfig:
    """What the configuration of ``model`` says of its sparsity; the defaults where the layers were made by hand."""
    record = getattr(model.config, "quantization_config", None)
    if isinstance(record, NMSparseQuantizationConfig):
        return record
    return NMSparseQuantizationConfig.from_dict(record) if record else NMSparseQuantizationConfig()


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
