from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_nmsparse.documents import DocumentError, Options
from hf_nmsparse.documents.base import CHUNK
from tests.documents.reading import loud, translated


def written(table: pa.Table, **settings: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **settings)
    return file.getvalue()


def test_columns() -> None:
    table = pa.table(
        {
            "text": pa.array(["one", None, "", "Ä"]),
            "n": pa.array([1, 2, 3, None], pa.int8()),
            "list": pa.array([["x"], [], None, ["y"]]),
        }
    ).replace_schema_metadata({"what": "that"})
    found = pq.ParquetFile(io.BytesIO(translated("parquet", written(table, compression="zstd"), loud)))
    assert found.metadata.row_group(0).column(0).compression == "ZSTD"
    read = found.read()
    assert read.drop_columns("translation").equals(table)
    assert read.schema.metadata[b"what"] == b"that"
    assert read["translation"].to_pylist() == ["ONE", None, "", "Ä"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_kinds_of_text(kind: Any) -> None:
    table = pa.table({"a": pa.array(["x", "y", "x"]).cast(kind), "b": ["u", "v", "w"]})
    read = pq.read_table(io.BytesIO(translated("parquet", written(table), loud, Options("a", "c"))))
    assert read["c"].to_pylist() == ["X", "Y", "X"]
    assert read["a"].type == kind


def test_many_rows() -> None:
    table = pa.table({"text": [f"row {number}" for number in range(CHUNK + 5)]})
    read = pq.read_table(io.BytesIO(translated("parquet", written(table, row_group_size=999), loud)))
    assert read["translation"].to_pylist() == [f"ROW {number}" for number in range(CHUNK + 5)]


def test_no_rows() -> None:
    table = pa.table({"text": pa.array([], pa.string())})
    read = pq.read_table(io.BytesIO(translated("parquet", written(table), loud)))
    assert (read.num_rows, read.column_names) == (0, ["text", "translation"])


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": ["x"], "b": ["y"]}, Options(), "2 columns hold text; name one with --column: it has a, b"),
        ({"a": [1]}, Options(), "no column holds text; name one with --column: it has a"),
        ({"a": [1], "b": ["x"]}, Options("a"), "column 'a' holds int64, not text"),
        ({"a": ["x"]}, Options("c"), "no column 'c'; it has a"),
        ({"a": ["x"]}, Options(to_column="a"), "has a column 'a' already; give another name with --to-column"),
    ],
)
def test_bad_columns(columns: dict[str, list[Any]], options: Options, message: str) -> None:
    with pytest.raises(DocumentError) as raised:
        translated("parquet", written(pa.table(columns)), loud, options)
    assert message in str(raised.value)


def test_a_nul() -> None:
    data = written(pa.table({"text": ["one"] * CHUNK + ["two", "Ä\0", None]}))
    with pytest.raises(DocumentError, match=rf"^row {CHUNK + 1}: 'text' holds a NUL; mend or drop the row$"):
        translated("parquet", data, loud)


def test_damaged() -> None:
    data = written(pa.table({"text": [f"row {number}" for number in range(100)]}), compression="zstd")
    for place in (0, len(data) // 2, len(data) - 5):
        with pytest.raises(DocumentError, match="is no parquet file, or a damaged one"):
            translated("parquet", data[:place], loud)
    broken = data[:20] + bytes(40) + data[60:]
    with pytest.raises(DocumentError, match="is no parquet file, or a damaged one"):
        translated("parquet", broken, loud)
