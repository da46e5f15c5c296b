"""From the files of a model to a native engine: checked, rounded where asked, and in the order of the kernels.

This needs neither torch nor transformers. Nothing of a file is trusted: each tensor is looked at before C++ sees it.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_nmsparse.engine_spec import Spec, TableSource, WeightSource, read
from hf_nmsparse.engine_weights import as_2_of_4, bf16_bits, dense_rows, from_bf16, quantize_rows
from hf_nmsparse.kernels.engine import Array, Engine, Packed, Table, WeightSlot
from hf_nmsparse.kernels.library import numbers_of
from hf_nmsparse.kernels.order import NUMBERS, format_of, packed_bytes, repack, takes_codes
from hf_nmsparse.packed_files import CODES, SCALE, ModelLayer, check_layer, check_numbers, read_folder, read_object
from hf_nmsparse.packed_format import PackedFormatError, StoredTensor
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.sparsity_record import SparsityRecord, one_of

__all__ = ["COMPUTES", "LoadedEngine", "load_engine", "read_record"]

COMPUTES = ("auto", "int8", "bf16", "fp32")

_TWO_OF_FOUR = NMPattern(2, 4)
_MOST_POSITIONS = 1 << 17
_LINE = 64  # bytes; weights begin on cache lines


@dataclass(frozen=True)
class LoadedEngine:
    """An engine and what its files say of it.

    Attributes:
        engine: It.
        spec: What it computes.
        config: The settings in config.json.
        formats: The formats of its products, a key of `library.FORMATS` each, and how many have it.
    """

    engine: Engine
    spec: Spec
    config: dict[str, Any]
    formats: Mapping[str, int]


def load_engine(folder: Path, compute: str = "auto", threads: int = 1, half_cache: bool = False) -> LoadedEngine:
    """The engine of the model in a folder: packed, or dense in safetensors files.

    Args:
        folder: The folder.
        compute: ``"auto"`` computes packed files in the numbers that they hold and dense ones in fp32; ``"int8"``,
            ``"bf16"`` and ``"fp32"`` say in what all products are computed.
        threads: How many threads prepare the weights.
        half_cache: Whether the decoder keeps keys and values in fp16.

    Raises:
        PackedFormatError: A file is damaged or breaks a rule of the format.
        ValueError: The folder holds no model that the engine runs.
    """
    one_of("compute", compute, COMPUTES, "translator")
    if not (folder / "config.json").is_file():
        raise ValueError(f"translator: {folder} holds no config.json, so no saved model")
    config = read_object(folder / "config.json")
    record, dtype = read_record(config), _dtype(config)
    if record is not None and record.format == "dense":
        raise ValueError(f"translator: {folder} is a training checkpoint; write it with nmsparse pack first")
    spec = read(config, bf16=compute == "auto" and record is not None and dtype == "bfloat16")
    spec.config.half_cache = half_cache
    for side in (spec.config.encoder, spec.config.decoder):
        if side.positions > _MOST_POSITIONS:
            raise ValueError(f"translator: at most {_MOST_POSITIONS:,} positions, config.json says {side.positions:,}")
    if spec.family.positions == "counted" and (spec.padding or 0) >= spec.config.encoder.vocabulary:
        raise ValueError(f"translator: pad_token_id is a token of the model, config.json says {spec.padding:,}")
    if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
        raise ValueError(
            f"translator: {folder} holds no safetensors files; load the model with transformers and save it again"
        )
    files = _Files(read_folder(folder), record)
    files.check(spec)
    products = [_Product(files, source, _format(files, spec, source, compute)) for source in spec.weights]
    used = [name for product in products for name in product.names] + [
        name for source in spec.tables for names in source.names for name in names
    ]
    _refuse_more_layers(files.tensors, used)
    with ThreadPoolExecutor(threads) as pool:
        packed = list(pool.map(lambda product, room: product.pack(room), products, _rooms(products)))
        tables = list(pool.map(partial(files.table, bf16=bool(spec.config.bf16_activations)), spec.tables))
    return LoadedEngine(Engine(spec.config, packed, tables), spec, config, Counter(each.format for each in products))


def read_record(config: Mapping[str, Any]) -> SparsityRecord | None:
    """What config.json says of sparse weights; None for a dense model.

    Raises:
        ValueError: It breaks a rule.
    """
    given = config.get("quantization_config")
    if not isinstance(given, Mapping) or given.get("quant_method") != "nmsparse":
        return None  # `read` refuses the methods of others
    return SparsityRecord.read(given)


def _dtype(config: Mapping[str, Any]) -> str | None:
    """The number type that a model of torch would compute in; None where the settings say none."""
    name = config.get("dtype") or config.get("torch_dtype")
    one_of("dtype", name, (None, "float32", "bfloat16", "float16", "float64", "auto"), "config.json")
    kind: str | None = name
    return kind


class _Files:
    """The tensors of a checkpoint, checked for what the model takes of them."""

    def __init__(self, tensors: dict[str, StoredTensor], record: SparsityRecord | None) -> None:
        self.tensors, self.record = tensors, record

    def check(self, spec: Spec) -> None:
        """Refuses what breaks the rules of the format, has another shape than the model's, or is missing."""
        for source in spec.weights:
            self._check_weight(source)
        for table in spec.tables:
            for names, shape in zip(table.names, table.shapes, strict=True):
                name = self.first(names, needed=table.made is None)
                if name is not None:
                    self._check_shape(name, shape)
        check_numbers(self.tensors)

    def _check_weight(self, source: WeightSource) -> None:
        name = self.module(source)
        shape = (source.out_features, source.in_features)
        record = self.record
        if name + CODES in self.tensors or name + SCALE in self.tensors:
            if record is None:
                raise PackedFormatError(f"config.json: nothing is said of {name}, which is packed; save it again")
            kind = "the head" if source.slot == WeightSlot.HEAD else "a linear layer"
            check_layer(self.tensors, name, ModelLayer(kind, shape, linear=True), record)
        else:
            self._check_shape(f"{name}.weight", shape)
        if source.bias is not None and (source.bias in self.tensors or not source.bias_may_lack):
            bias = self.tensors[self.first((source.bias,))]  # type: ignore[index]
            if [size for size in bias.shape if size != 1] != [size for size in shape[:1] if size != 1]:
                raise PackedFormatError(
                    f"{bias.file}: {source.bias}: the model's bias is {[shape[0]]}, got {list(bias.shape)}"
                )

    def _check_shape(self, name: str, shape: tuple[int | None, ...]) -> None:
        tensor = self.tensors[name]
        prefix = name.removesuffix(".weight")
        fits = len(shape) == len(tensor.shape) and all(
            size is None or size == got for size, got in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            due = [size if size is not None else "any" for size in shape]
            raise PackedFormatError(f"{tensor.file}: {name}: the model's is {due}, got {list(tensor.shape)}")
        if prefix != name and prefix + SCALE in self.tensors:
            if self.record is None:
                raise PackedFormatError(f"config.json: nothing is said of {prefix}, which is int8; save it again")
            whole = ModelLayer("an embedding", tensor.shape, linear=False)
            check_layer(self.tensors, prefix, whole, self.record)

    def first(self, names: Iterable[str], needed: bool = True) -> str | None:
        """The first of some names that the files have."""
        names = tuple(names)
        found = next((name for name in names if name in self.tensors), None)
        if found is None and needed:
            raise PackedFormatError(f"the files hold no {names[0]}, which the model needs; save the whole model again")
        return found

    def module(self, source: WeightSource) -> str:
        """The module whose weight is that of a product."""
        found = self.first([f"{name}.weight" for name in source.names])
        assert found is not None
        return found.removesuffix(".weight")

    def holds(self, name: str) -> str:
        """The numbers that products with this module's weight keep as they are: fp32, bf16 or int8."""
        return {"I8": "int8", "BF16": "bf16"}.get(self.tensors[f"{name}.weight"].dtype, "fp32")

    def packed(self, name: str) -> bool:
        """Whether the weight of a module is packed."""
        return name + CODES in self.tensors

    def fp32(self, name: str) -> Array:
        """A tensor in fp32."""
        tensor = self.tensors[name]
        numbers = _numbers(tensor)
        if tensor.dtype == "BF16":
            return from_bf16(numbers)
        if tensor.dtype == "I8":
            scale = self.scale(name.removesuffix(".weight"))
            assert scale is not None
            return numbers * scale[:, None]
        return numbers.astype(np.float32)

    def scale(self, name: str) -> Array | None:
        """The scales of a module's int8 weight."""
        scale = self.tensors.get(name + SCALE)
        return None if scale is None else _numbers(scale).astype(np.float32)

    def table(self, source: TableSource, bf16: bool) -> Table:
        """A table; embeddings stay in the numbers of the file, others become fp32, of a bf16 model rounded to bf16."""
        parts = [self.first(names, needed=source.made is None) for names in source.names]
        if source.build is None:
            [name] = parts
            assert name is not None
            tensor = self.tensors[name]
            if tensor.dtype == "F64":
                return Table(source.side, source.layer, source.slot, self.fp32(name))
            scale = self.scale(name.removesuffix(".weight")) if tensor.dtype == "I8" else None
            return Table(source.side, source.layer, source.slot, _numbers(tensor).copy(), scale)
        made = [self.fp32(name) if name is not None else source.made() for name in parts]  # type: ignore[misc]
        built = np.ascontiguousarray(source.build(*made), np.float32)
        if bf16:  # what no file holds is in the numbers of the model too
            built = from_bf16(bf16_bits(built))
        return Table(source.side, source.layer, source.slot, built)


def _numbers(tensor: StoredTensor) -> Array:
    """The numbers of a tensor where they lie; the bits of bf16."""
    bits = tensor.bits()
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}.get(tensor.dtype)
    return bits if kind is None else bits.view(kind)


def _format(files: _Files, spec: Spec, source: WeightSource, compute: str) -> str:
    """How a product is computed, a key of `library.FORMATS`."""
    name, record = files.module(source), files.record
    pattern = record.pattern if record is not None and files.packed(name) else None
    if compute != "auto":
        return _kernel(pattern, source, compute) or f"dense_{compute}"
    if record is None:
        return "dense_fp32"
    numbers = files.holds(name)
    if numbers == "int8" and _kernel(pattern, source, numbers) is None:
        # As for models of torch: nothing computes in int8 but layers with a kernel, and then the head.
        numbers = "bf16" if spec.config.bf16_activations else "fp32"
    if source.slot == WeightSlot.HEAD and any(
        numbers_of(_format(files, spec, other, compute)) == "int8" for other in spec.weights if other is not source
    ):
        numbers = "int8"
    return _kernel(pattern, source, numbers) or f"dense_{numbers}"


def _kernel(pattern: NMPattern | None, source: WeightSource, numbers: str) -> str | None:
    """The format of a sparse weight; None for a dense one, and where there is no kernel for the pattern."""
    return None if pattern is None else format_of(pattern, source.in_features, numbers)


class _Product:
    """A product's weight on its way from the files to the kernels."""

    def __init__(self, files: _Files, source: WeightSource, format: str) -> None:
        self._files, self._source, self.format = files, source, format
        self._module = files.module(source)

    @property
    def names(self) -> list[str]:
        """The names under which files may hold it."""
        biases = [] if self._source.bias is None else [self._source.bias]
        return [f"{name}.weight" for name in self._source.names] + biases

    @property
    def nbytes(self) -> int:
        """Bytes of it in the order of the kernels."""
        return packed_bytes(self.format, self._source.out_features, self._source.in_features)

    def pack(self, room: Array) -> Packed:
        """The weight, its bytes in ``room``."""
        source = self._source
        values, codes, scale = self._arrays()
        repack(self.format, source.in_features, values, codes, scale, room)
        bias = None
        if source.bias is not None and source.bias in self._files.tensors:
            bias = self._files.fp32(source.bias).reshape(-1)
        return Packed(
            source.side, source.layer, source.slot, self.format, source.out_features, source.in_features, room, bias
        )

    def _arrays(self) -> tuple[Array, Array | None, Array | None]:
        """Values, codes and scales in the numbers of the format."""
        name, numbers = self._module, numbers_of(self.format)
        scale = None
        if self._files.holds(name) == numbers:  # as they are
            values = _numbers(self._files.tensors[f"{name}.weight"])
            values = values.astype(np.float32) if numbers == "fp32" else values
            scale = self._files.scale(name)
        else:
            values = self._files.fp32(f"{name}.weight")
            if numbers == "int8":
                values, scale = quantize_rows(values)
            elif numbers == "bf16":
                values = bf16_bits(values)
        values = np.ascontiguousarray(values, NUMBERS[self.format])
        if not self._files.packed(name):
            return values, None, scale
        codes = self._files.tensors[name + CODES].bits()
        pattern = self._files.record.pattern  # type: ignore[union-attr]
        if takes_codes(self.format):
            if pattern == _TWO_OF_FOUR:
                return values, codes, scale
            return *as_2_of_4(dense_rows(values, codes, pattern)), scale
        return dense_rows(values, codes, pattern), None, scale


def _rooms(products: list[_Product]) -> list[Array]:
    """Memory for each, one behind the other in the order of use, on huge pages where the system has them."""
    starts = np.cumsum([0, *(-(-product.nbytes // _LINE) * _LINE for product in products)]).tolist()
    memory = mmap.mmap(-1, max(1, starts[-1]))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system that was built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    return [whole[start : start + product.nbytes] for start, product in zip(starts, products, strict=False)]


def _refuse_more_layers(files: Iterable[str], used: list[str]) -> None:
    """Refuses files that hold more layers than config.json says."""
    known, kinds = set(used), {_without_numbers(name) for name in used}
    for name in files:
        if name not in known and name.endswith((".weight", ".bias")) and _without_numbers(name) in kinds:
            raise ValueError(f"translator: the files hold {name}, and config.json has fewer layers; correct it")


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)
