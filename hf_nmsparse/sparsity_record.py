"""What config.json says of a sparse model: its pattern, its format, and how it was made. This needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.packed_format import FORMAT_VERSION, VALUE_TYPES, WITH_CONVOLUTIONS, PackedFormatError
from hf_nmsparse.pattern import NMPattern

__all__ = ["COMPUTES", "HEADS", "METHOD", "SparsityRecord", "one_of"]

Record = TypeVar("Record", bound="SparsityRecord")

METHOD = "nmsparse"
COMPUTES = ("auto", "fp32", "bf16", "int8", "semi_structured", "dense", "reference")
HEADS = ("dense", "int8")

# The keys of a record in config.json, by its format: those that must be there, and those that may.
_RECORD_KEYS = {
    "packed": (
        ("quant_method", "format", "format_version", "pattern", "values"),
        ("embeddings", "targets", "ignored", "producer"),
    ),
    "dense": (("quant_method", "format", "pattern"), ("targets", "ignore", "soft", "convolutions", "transposable")),
}


class SparsityRecord:
    """The record, with the choices of the reader beside it; each argument is explained in `NMSparseQuantizationConfig`.

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
        convolutions: bool = False,
        transposable: bool = False,
        format: str = "packed",
        format_version: int | None = None,
        producer: str | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"quantization_config: unknown key {min(unknown)!r}; known keys are compute, head, pattern, values, "
                "embeddings, targets, ignore, soft, convolutions, transposable, format, format_version, producer"
            )
        one_of("compute", compute, COMPUTES)
        one_of("format", format, ("packed", "dense"))
        one_of("head", head, (None, *HEADS))
        one_of("values", values, (None, *VALUE_TYPES))
        if embeddings not in (None, "int8") or (embeddings and values != "int8"):
            raise ValueError(
                "quantization_config: embeddings are int8 beside values of int8 only, got "
                f"{embeddings!r} beside {values!r}"
            )
        one_of("quant_method", quant_method, (METHOD,))
        due = WITH_CONVOLUTIONS if convolutions else FORMAT_VERSION
        if format_version is None:
            format_version = due
        if type(format_version) is not int or format_version not in (FORMAT_VERSION, WITH_CONVOLUTIONS):
            raise ValueError(
                f"quantization_config: format_version {format_version!r} is unknown, this package reads "
                f"{FORMAT_VERSION} and {WITH_CONVOLUTIONS}; install a newer hf-nmsparse"
            )
        if format_version != due:
            raise ValueError(
                f"quantization_config: with convolutions {convolutions!r} format_version is {due}, got {format_version}"
            )
        if producer is not None and not isinstance(producer, str):
            raise ValueError(f"quantization_config: producer is a text, got {producer!r}")
        sparse = NMSparseConfig(pattern, targets, ignore, soft, convolutions, transposable)
        self.quant_method: Any = quant_method  # transformers' own methods are an enum
        self.compute, self.head, self.format, self.format_version = compute, head, format, format_version
        self.pattern, self.targets, self.ignore, self.soft = sparse.pattern, sparse.targets, sparse.ignore, sparse.soft
        self.convolutions, self.transposable = sparse.convolutions, sparse.transposable
        self.values, self.embeddings, self.producer = values, embeddings, producer

    @classmethod
    def read(cls: type[Record], record: Mapping[str, Any]) -> Record:
        """The record that config.json holds.

        Raises:
            PackedFormatError: The record breaks a rule.
        """
        try:
            return cls(**_checked_record(record))
        except ValueError as error:
            raise PackedFormatError(f"config.json: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The record as config.json holds it; `compute` and `head` are not part of it."""
        record = {"quant_method": METHOD, "format": self.format, **self.sparse_config().to_dict()}
        if self.format == "packed":
            record["ignored"] = record.pop("ignore", None)
            record.pop("convolutions", None)  # the version says it
            record |= {"format_version": self.format_version, "values": self.values, "embeddings": self.embeddings}
            record["producer"] = self.producer
        return {key: value for key, value in record.items() if value is not None}

    def sparse_config(self) -> NMSparseConfig:
        """Pattern and rules alone."""
        return NMSparseConfig(self.pattern, self.targets, self.ignore, self.soft, self.convolutions, self.transposable)


def one_of(key: str, value: Any, known: tuple[Any, ...], where: str = "quantization_config") -> None:
    """Refuses a value of ``key`` that is not among ``known``; ``where`` begins the message.

    Raises:
        ValueError: As said.
    """
    if value not in known:
        names = ", ".join(repr(name) for name in known if name is not None)
        raise ValueError(f"{where}: {key} is one of {names}, got {value!r}")


def _checked_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `SparsityRecord` that a record of config.json stands for."""
    one_of("format", record.get("format"), tuple(_RECORD_KEYS))
    needed, optional = _RECORD_KEYS[record["format"]]
    for key in record:
        if key not in needed + optional:
            known = ", ".join(needed + optional)
            raise ValueError(f"quantization_config: unknown key {key!r}; known keys are {known}")
    for key in needed:
        if record.get(key) is None:
            raise ValueError(f"quantization_config: {key} is missing")
    arguments = {"ignore" if key == "ignored" else key: value for key, value in record.items()}
    if record["format"] == "packed":
        arguments["convolutions"] = record["format_version"] == WITH_CONVOLUTIONS
    return arguments
