"""Parquet: a translation is one more column; the others keep their types and what else the schema says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_nmsparse.documents.base import CHUNK, DocumentError, Options, Translate
from hf_nmsparse.documents.rows import text_column, translated_texts

__all__ = ["translate_parquet"]


def translate_parquet(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    """Translates a column of a parquet file into another, in constant memory."""
    with source.open("rb") as file:
        with _damage():
            reader = pq.ParquetFile(file)
            schema = reader.schema_arrow
            names, texts = schema.names, [field.name for field in schema if _holds_text(field.type)]
        column = text_column(names, texts, options)
        if column not in texts:
            raise DocumentError(f"column {column!r} holds {schema.field(column).type}, not text")
        wider = schema.append(pa.field(options.to_column, pa.large_string()))
        writer, first = None, 0
        for batch, values in _batches(reader, names.index(column)):
            nul = next((place for place, value in enumerate(values, first) if "\0" in (value or "")), None)
            if nul is not None:
                raise DocumentError(f"row {nul}: {column!r} holds a NUL; mend or drop the row")
            first += len(values)
            new = pa.array(translated_texts(values, translate), pa.large_string())
            if writer is None:
                writer = pq.ParquetWriter(target, wider, compression=_compression(reader))
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, new], schema=wider))
        (writer or pq.ParquetWriter(target, wider)).close()


def _batches(reader: Any, column: int) -> Iterator[tuple[Any, list[str | None]]]:
    """Some rows at a time, and what they have in a column."""
    batches = reader.iter_batches(CHUNK)
    while True:
        with _damage():
            batch = next(batches, None)
            values = [] if batch is None else batch.column(column).to_pylist()
        if batch is None:
            return
        yield batch, values


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        [reason, *_] = str(error).splitlines() or [type(error).__name__]
        raise DocumentError(f"is no parquet file, or a damaged one: {reason}") from None


def _holds_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _compression(reader: Any) -> str:
    """How the first column is compressed; pyarrow ends the process where damaged metadata name what it does not know.

    What has been read from it is not so damaged.
    """
    name = str(reader.metadata.row_group(0).column(0).compression).lower()
    return "none" if name == "uncompressed" else name
