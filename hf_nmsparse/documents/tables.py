"""Tables of text (.tsv, .csv): a translation is one more field at the end of each row, and all else stays."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO

from hf_nmsparse.documents.base import DocumentError, Options, Translate, decoded
from hf_nmsparse.documents.rows import Row, text_column, translate_rows

__all__ = ["translate_csv", "translate_tsv"]

_Record = tuple[int, str, list[str]]
"""Number of its first line, what stands there, its fields."""


def translate_tsv(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    """Translates a column of a table with tabs into another, in constant memory.

    Most tools that write a header quote fields as CSV does, most that cut text with tabs know no quotes: the whole file
    says which one has written it. Without quotes a translation has a space where it had a tab or a line break.
    """
    from hf_nmsparse.pairs import is_quoted  # with pyarrow, which the other formats do without

    _translate(source, target, translate, options, "\t", is_quoted(source))


def translate_csv(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    """Translates a column of a table with commas, or with semicolons where its header has no comma."""
    with source.open("rb") as file:
        header = file.readline(1 << 20)
    _translate(source, target, translate, options, "," if b"," in header or b";" not in header else ";", True)


def _translate(
    source: Path, target: IO[bytes], translate: Translate, options: Options, delimiter: str, quoted: bool
) -> None:
    def write(raw: str, field: str) -> None:
        inner = raw.rstrip("\r\n")
        target.write(f"{inner}{delimiter}{_field(field, delimiter, quoted)}{raw[len(inner) :]}".encode())

    with source.open("rb") as file:
        records = _records(file, delimiter, quoted)
        header = next(records, None)
        if header is None:
            raise DocumentError("holds no rows")
        _, header_raw, columns = header
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise DocumentError(f"several columns are named {twice[0]!r}; give each its own name")
        results = translate_rows(_rows(columns, records), translate, options)
        first = list(islice(results, 1))  # what fails fails before anything is written
        if not first:
            text_column(columns, columns, options)
        write(header_raw, options.to_column)
        for row, text in chain(first, results):
            write(row.raw, text or "")


def _rows(columns: list[str], records: Iterable[_Record]) -> Iterator[Row]:
    for line, raw, fields in records:
        if len(fields) != len(columns):
            raise DocumentError(f"line {line} has {len(fields)} fields, and the header names {len(columns)}")
        yield Row(line, raw, dict(zip(columns, fields, strict=True)))


def _records(lines: IO[bytes], delimiter: str, quoted: bool) -> Iterator[_Record]:
    """The records, each with the empty lines behind it; one with quotes may have several lines."""
    taken: list[str] = []
    count = 0

    def texts() -> Iterator[str]:
        nonlocal count
        for count, line in enumerate(lines, 1):
            text = decoded(line, count)
            taken.append(text)
            yield text.removeprefix("\ufeff") if count == 1 else text

    split: Iterator[list[str]] = (
        csv.reader(texts(), delimiter=delimiter, strict=True)
        if quoted
        else (text.rstrip("\r\n").split(delimiter) if text.strip("\r\n") else [] for text in texts())
    )
    found: _Record | None = None
    try:
        for fields in split:
            raw, start = "".join(taken), count - len(taken) + 1
            taken.clear()
            if not fields:
                found = found and (found[0], found[1] + raw, found[2])
                continue
            if found is not None:
                yield found
            found = start, raw, fields
    except csv.Error as error:
        raise DocumentError(f"line {max(count, 1)} is not as CSV quotes fields: {error}") from None
    if found is not None:
        yield found


def _field(text: str, delimiter: str, quoted: bool) -> str:
    if not quoted:
        return re.sub(r"[\t\r\n]+", " ", text)
    if any(character in text for character in f'{delimiter}"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text
