"""What config.json says of a sparse model: its pattern, its format, and how it was made."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.packing import FORMAT_VERSION, VALUE_DTYPES, PackedFormatError
from hf_nmsparse.pattern import NMPattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["COMPUTES", "HEADS", "METHOD", "NMSparseQuantizationConfig", "one_of", "record_of"]

METHOD = "nmsparse"
COMPUTES = ("auto", "fp32", "bf16", "int8", "semi_structured", "dense", "reference")
HEADS = ("dense", "int8")

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
        one_of("compute", compute, COMPUTES)
        one_of("format", format, ("packed", "dense"))
        one_of("head", head, (None, *HEADS))
        one_of("values", values, (None, *VALUE_DTYPES))
        if embeddings not in (None, "int8") or (embeddings and values != "int8"):
            raise ValueError(
                "quantization_config: embeddings are int8 beside values of int8 only, got "
                f"{embeddings!r} beside {values!r}"
            )
        one_of("quant_method", quant_method, (METHOD,))
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


def one_of(key: str, value: Any, known: tuple[Any, ...], where: str = "quantization_config") -> None:
    """Refuses a value of ``key`` that is not among ``known``; ``where`` begins the message.

    Raises:
        ValueError: As said.
    """
    if value not in known:
        names = ", ".join(repr(name) for name in known if name is not None)
        raise ValueError(f"{where}: {key} is one of {names}, got {value!r}")


def _checked_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `NMSparseQuantizationConfig` that a record of config.json stands for."""
    one_of("format", record.get("format"), tuple(_RECORD_KEYS))
    needed, optional = _RECORD_KEYS[record["format"]]
    for key in record:
        if key not in needed + optional:
            known = ", ".join(needed + optional)
            raise ValueError(f"quantization_config: unknown key {key!r}; known keys are {known}")
    for key in needed:
        if record.get(key) is None:
            raise ValueError(f"quantization_config: {key} is missing")
    return {"ignore" if key == "ignored" else key: value for key, value in record.items()}


def record_of(model: PreTrainedModel) -> NMSparseQuantizationConfig:
    """What the configuration of ``model`` says of its sparsity; the defaults where the layers were made by hand."""
    record = getattr(model.config, "quantization_config", None)
    if isinstance(record, NMSparseQuantizationConfig):
        return record
    return NMSparseQuantizationConfig.from_dict(record) if record else NMSparseQuantizationConfig()


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """The loader, which takes part of transformers' models along and is imported with the first of them."""
    from hf_nmsparse.quantizer import NMSparseQuantizer

    return NMSparseQuantizer(*args, **kwargs)


AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _quantizer)  # type: ignore[arg-type]  # called as a class is


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
