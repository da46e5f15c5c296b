"""Parquet: a translation is one more column; the others keep their types and what else the schema says."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_nmsparse.documents.base import CHUNK, DocumentError, Options, Translate
from hf_nmsparse.documents.rows import text_column, translated_texts

__all__ = ["translate_parquet"]


def translate_parquet(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    """Translates a column of a parquet file into another, in constant memory."""
    try:
        reader = pq.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        raise DocumentError(f"is no parquet file, or a damaged one: {_first_line(error)}") from None
    with reader:
        schema = reader.schema_arrow
        texts = [field.name for field in schema if _holds_text(field.type)]
        column = text_column(schema.names, texts, options)
        if column not in texts:
            raise DocumentError(f"column {column!r} holds {schema.field(column).type}, not text")
        wider = schema.append(pa.field(options.to_column, pa.large_string()))
        kind = _compression(reader)
        writer = None
        batches = reader.iter_batches(CHUNK)
        while (batch := _next(batches)) is not None:
            values = batch.column(schema.names.index(column)).to_pylist()
            new = pa.array(translated_texts(values, translate), pa.large_string())
            if writer is None:
                writer = pq.ParquetWriter(target, wider, compression=kind)
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, new], schema=wider))
        (writer or pq.ParquetWriter(target, wider, compression=kind)).close()


def _holds_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _compression(reader: Any) -> str:
    """How the first column is compressed."""
    metadata = reader.metadata
    if not metadata.num_row_groups or not metadata.num_columns:
        return "snappy"
    name = str(metadata.row_group(0).column(0).compression).lower()
    return "none" if name == "uncompressed" else name


def _next(batches: Any) -> Any:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise DocumentError(f"is a damaged parquet file: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
