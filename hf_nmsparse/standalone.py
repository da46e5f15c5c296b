# SPDX-License-Identifier: Apache-2.0
"""Reads packed N:M sparse weights into a stock model, with torch, transformers and safetensors alone.

This is the file ``modeling_nmsparse.py`` that ``save_packed(model, path, standalone=True)`` of hf_nmsparse puts beside
the weights. ``auto_map`` in config.json names its classes, so that with ``trust_remote_code=True``
``AutoModelForSeq2SeqLM.from_pretrained`` and its like load the model where that package is not installed. What they
return is transformers' own class with every weight dense: it computes, trains and saves as any other. Where hf_nmsparse
is imported, it loads the model instead, and the weights stay packed.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from math import comb, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    GenerationConfig,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

__all__ = [
    "NMSparseModel",
    "NMSparseModelForImageClassification",
    "NMSparseModelForSeq2SeqLM",
    "PackedRecord",
    "dense_tensors",
    "dense_weight",
]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WHENCE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class NMSparseModel:
    """What ``AutoModel`` calls; it makes the stock model and is none itself."""

    models: Any = MODEL_MAPPING

    @classmethod
    def from_pretrained(cls, path: Any, *model_args: Any, config: Any, **kwargs: Any) -> Any:
        """Loads a packed checkpoint as the stock model of its configuration.

        Args:
            path: Folder, or name on the Hub.
            *model_args: As the stock class takes them.
            config: The configuration that the auto class read there.
            **kwargs: As the stock class takes them.

        Raises:
            ValueError: A file breaks a rule of the format, or an argument asks for other files.
        """
        stock = cls.models[type(config)]
        if sys.modules.get("hf_nmsparse") is not None:
            return stock.from_pretrained(path, *model_args, config=config, **kwargs)
        for name in ("state_dict", "variant"):
            if kwargs.get(name) is not None:
                raise ValueError(f"from_pretrained: packed weights are read from {SAFE_WEIGHTS_NAME}; leave out {name}")
        whence = {name: kwargs.pop(name) for name in _WHENCE if name in kwargs}
        record = PackedRecord.read(getattr(config, "quantization_config", None), str(path))
        tensors: dict[str, Tensor] = {}
        for file in _weight_files(path, whence):
            try:
                tensors |= load_file(file)
            except SafetensorError as error:
                raise ValueError(f"{file}: no whole safetensors file ({error}); get it again") from None
        dense, told = dense_tensors(tensors, record, str(path)), kwargs.pop("output_loading_info", False)
        model, info = stock.from_pretrained(
            None, *model_args, config=_stock(config), state_dict=dense, output_loading_info=True, **kwargs
        )
        _check_whole(model, info["missing_keys"], dense, str(path))
        model.name_or_path = model.config.name_or_path = str(path)
        if model.can_generate() and kwargs.get("generation_config") is None:
            with suppress(OSError):  # where there is none, the model has made one of its configuration
                model.generation_config = GenerationConfig.from_pretrained(path, **whence)
        return (model, info) if told else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A stock model with fresh weights, which ``from_config`` of the auto class asks for."""
        return cls.models[type(config)]._from_config(_stock(config), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Auto classes call it, so that a model saves its code; what is returned here is stock and saves none."""


class NMSparseModelForSeq2SeqLM(NMSparseModel):
    """What ``AutoModelForSeq2SeqLM`` calls."""

    models = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING


class NMSparseModelForImageClassification(NMSparseModel):
    """What ``AutoModelForImageClassification`` calls."""

    models = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


class PackedRecord(NamedTuple):
    """What config.json says of the packed weights: N kept of M, their number type, and whether embeddings have it.

    And whether there are packed weights beside those of linear layers, as version 2 of the format has them.
    """

    n: int
    m: int
    dtype: torch.dtype
    embeddings: bool
    convolutions: bool = False

    @classmethod
    def read(cls, record: Any, where: str) -> PackedRecord:
        """Reads ``quantization_config``.

        Raises:
            ValueError: It is of another format or version, or a value is out of range.
        """
        where = f"{where}: config.json: quantization_config"
        _require(isinstance(record, Mapping) and record.get("quant_method") == "nmsparse", where, "is not nmsparse's")
        _require(record.get("format") == "packed", where, f"format is packed, got {record.get('format')!r}")
        version = record.get("format_version")
        if type(version) is not int or version not in (1, 2):
            raise ValueError(
                f"{where}: format_version {version!r} is unknown, this file reads 1 and 2; install hf-nmsparse"
            )
        pattern = re.fullmatch("([0-9]{1,2}):([0-9]{1,2})", str(record.get("pattern")))
        n, m = (int(pattern[1]), int(pattern[2])) if pattern else (0, 0)
        _require(1 <= n < m <= 32, where, f"pattern is N:M with 1 <= N < M <= 32, got {record.get('pattern')!r}")
        values, embeddings = str(record.get("values")), record.get("embeddings")
        _require(values in _DTYPES, where, f"values are one of {', '.join(_DTYPES)}, got {values!r}")
        _require(
            embeddings is None or (embeddings == "int8" and values == "int8"),
            where,
            f"embeddings are int8 beside values of int8 only, got {embeddings!r}",
        )
        return cls(n, m, _DTYPES[values], embeddings == "int8", version == 2)


def dense_tensors(tensors: Mapping[str, Tensor], record: PackedRecord, where: str) -> dict[str, Tensor]:
    """The tensors of a packed file under their stock names, every weight dense; those that were int8 are fp32.

    Raises:
        ValueError: A tensor breaks a rule of the format.
    """
    dense: dict[str, Tensor] = {}
    _require(any(key.endswith(".weight_indices") for key in tensors), where, "no key ends in .weight_indices")
    for key, tensor in tensors.items():
        prefix, _, leaf = key.rpartition(".")
        place = f"{where}: {key}"
        if leaf in ("weight_indices", "weight_scale") or (leaf == "weight_shape" and record.convolutions):
            due = ("weight", "weight_indices") if leaf == "weight_shape" else ("weight",)
            _require(all(f"{prefix}.{part}" in tensors for part in due), place, "the weight is missing beside it")
            continue
        codes, scale = (tensors.get(f"{prefix}.{part}") for part in ("weight_indices", "weight_scale"))
        if leaf != "weight" or (codes is None and scale is None):
            plain = leaf not in ("weight", "bias") and not tensor.is_floating_point()
            _require(plain or tensor.dtype in _FLOATS, place, f"holds {tensor.dtype} without a scale")
            _require(plain or bool(torch.isfinite(tensor).all()), place, "holds NaN or infinity")
            dense[key] = tensor
            continue
        _require(codes is not None or record.embeddings, place, "has a scale that config.json does not declare")
        expected = torch.int8 if codes is None else record.dtype
        _require(tensor.dtype == expected and tensor.dim() == 2, place, f"is no matrix of {expected}")
        _require(bool(torch.isfinite(tensor).all()), place, "holds NaN or infinity")
        if codes is not None:
            tensor = dense_weight(tensor, codes, record.n, record.m, place)
        _require((scale is not None) == (expected == torch.int8), place, "int8 values, and only they, have a scale")
        if scale is not None:
            _require(tensor.numel() == 0 or int(tensor.min()) >= -127, place, "int8 values lie within -127 to 127")
            _require(
                scale.dtype == torch.float32
                and scale.shape == tensor.shape[:1]
                and bool(((scale > 0) & torch.isfinite(scale * 127)).all()),
                f"{where}: {prefix}.weight_scale",
                f"scales are fp32 {list(tensor.shape[:1])}, positive, and 127 times one is finite",
            )
            tensor = tensor.to(torch.float32) * scale[:, None]
        if record.convolutions and f"{prefix}.weight_shape" in tensors:
            tensor = _stock_layout(tensor, tensors[f"{prefix}.weight_shape"], record, f"{where}: {prefix}.weight_shape")
        dense[key] = tensor
    return dense


def _stock_layout(matrix: Tensor, record: Tensor, pattern: PackedRecord, where: str) -> Tensor:
    """A weight ``[out, places * in]`` in its stock shape: ``[out, in, *kernel]``, or ``[in, out]`` of a ``Conv1D``."""
    _require(record.dtype == torch.int64 and record.dim() == 1 and 2 <= len(record) <= 4, where, "is no shape")
    shape = [int(size) for size in record]
    channel_dim = 0 if len(shape) == 2 else 1
    rows = shape[1 - channel_dim]
    _require(
        min(shape) > 0 and shape[channel_dim] % pattern.m == 0 and [rows, prod(shape) // rows] == list(matrix.shape),
        where,
        f"{shape} does not fit a weight of {list(matrix.shape)}",
    )
    others = [size for dim, size in enumerate(shape) if dim != channel_dim]
    weight = matrix.reshape(*others, shape[channel_dim]).movedim(-1, channel_dim)
    return weight.clone(memory_format=torch.contiguous_format)  # strides of 1x1 kernels would else say channels last


def _check_whole(model: Any, missing: set[str], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses files that lack what transformers does not make itself, as it makes tables of positions."""
    prefix, made = f"{model.base_model_prefix}.", model._keys_to_ignore_on_load_missing or ()
    lost = {key for key in missing if not any(re.search(pattern, prefix + key) for pattern in made)}
    if any(key.startswith(prefix) for key in tensors):  # a base model has no bias of the logits: it is zero then
        lost |= {"final_logits_bias"} & model.state_dict().keys() - tensors.keys()
    _require(not lost, where, f"{min(lost, default='')} is missing, which the model has")


def dense_weight(values: Tensor, codes: Tensor, n: int, m: int, where: str = "weight") -> Tensor:
    """Unpacks one weight, +0.0 where nothing was kept.

    The code of a group is the rank of its kept positions among all choices of N from M in lexicographic order. Codes
    take as many bits as the largest needs, least significant bit first; a row starts on a byte and is padded with 0.

    Args:
        values: The kept values, ``[rows, groups * N]``.
        codes: uint8 ``[rows, ceil(groups * bits / 8)]``.
        n: Weights kept in a group.
        m: Weights in a group.
        where: What errors call the weight.

    Returns:
        ``[rows, groups * M]`` in the dtype of ``values``.

    Raises:
        ValueError: Shapes or dtype do not fit the pattern, a code is out of range, or padding is not 0.
    """
    rows, (groups, rest) = values.shape[0], divmod(values.shape[1], n)
    count = comb(m, n)
    bits = (count - 1).bit_length()
    expected = (rows, -(-groups * bits // 8))
    _require(rest == 0, where, f"rows of {n}:{m} hold a multiple of {n} values, got {values.shape[1]}")
    _require(
        codes.dtype == torch.uint8 and tuple(codes.shape) == expected,
        where,
        f"codes are uint8 {list(expected)}, got {codes.dtype} {list(codes.shape)}",
    )
    stream = (codes[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)  # [rows, bytes * 8]
    _require(not stream[:, groups * bits :].any(), where, "padding bits at the end of a row of codes are 0")
    stream = stream[:, : groups * bits].reshape(rows, groups, bits)
    ranks = torch.zeros((rows, groups), dtype=torch.int64)
    for bit in range(bits):
        ranks += stream[..., bit].to(torch.int64) << bit
    _require(bool((ranks < count).all()), where, f"codes of {n}:{m} are 0 to {count - 1}")
    kept = torch.empty((rows, groups, m), dtype=torch.bool)
    missing = torch.full_like(ranks, n)
    for position in range(m):
        # Of the sets that are left the first are those with this position: they choose the rest from behind it.
        having = torch.tensor([0, *(comb(m - 1 - position, others) for others in range(n))])[missing]
        kept[..., position] = ranks < having
        ranks -= having * ~kept[..., position]
        missing -= kept[..., position].to(torch.int64)
    return values.new_zeros((rows, groups * m)).masked_scatter_(kept.flatten(1), values)


def _weight_files(path: Any, whence: Mapping[str, Any]) -> list[Any]:
    """The safetensors files of a folder or a repository, fetched where need be: one, or those that the index names."""
    try:
        return [cached_file(path, SAFE_WEIGHTS_NAME, **whence)]
    except OSError as missing:
        try:
            index: Any = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **whence)
        except OSError:
            raise missing from None
    try:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{index}: no JSON with a weight_map; get it again") from None
    for name in names:
        _require(re.fullmatch(r"[\w.-]+\.safetensors", str(name)) is not None, str(index), f"{name!r} is no file name")
    return [cached_file(path, name, **whence) for name in names]


def _stock(config: Any) -> Any:
    """A copy of the configuration without word of packed weights or of this file."""
    config = copy.deepcopy(config)
    for name in ("auto_map", "quantization_config"):
        config.__dict__.pop(name, None)
    return config


def _require(holds: bool, where: str, rule: str) -> None:
    if not holds:
        raise ValueError(f"{where}: {rule}; the file is damaged or of another format, get it again")
