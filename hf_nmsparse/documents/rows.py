"""Rows with a column of text, from a file that may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from hf_nmsparse.documents.base import CHUNK, DocumentError, Options, Translate
from hf_nmsparse.documents.texts import plain, translate_inner

__all__ = ["Row", "text_column", "translate_rows", "translated_texts"]


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        line: Number of its first line.
        raw: What stands there.
        fields: Its columns, of which those that are to be translated hold a text or None.
    """

    line: int
    raw: str
    fields: Mapping[str, Any]


def text_column(columns: Sequence[str], texts: Sequence[str], options: Options) -> str:
    """The column that is to be translated.

    Args:
        columns: Names of all columns.
        texts: Those of the columns that hold text.
        options: What was asked for.

    Raises:
        DocumentError: There is no such column, several may be meant, or the new one is there already.
    """
    has = f"it has {', '.join(columns)}" if columns else "it has none"
    if options.to_column in columns:
        raise DocumentError(f"has a column {options.to_column!r} already; give another name with --to-column")
    if options.column is not None:
        if options.column not in columns:
            raise DocumentError(f"no column {options.column!r}; {has}")
        return options.column
    if len(texts) != 1:
        count = f"{len(texts)} columns hold text" if texts else "no column holds text"
        raise DocumentError(f"{count}; name one with --column: {has}")
    return texts[0]


def translate_rows(rows: Iterable[Row], translate: Translate, options: Options) -> Iterator[tuple[Row, str | None]]:
    """Each row with the translation of its text; None where it has none.

    Raises:
        DocumentError: As `text_column` raises it of the first rows, or a later one has other columns.
    """
    rows, column = iter(rows), None
    while chunk := list(islice(rows, CHUNK)):
        if column is None:
            first = chunk[0].fields
            texts = [name for name in first if any(_is_text(row.fields.get(name)) for row in chunk)]
            column = text_column(list(first), texts, options)
        yield from zip(chunk, translated_texts([_text(row, column, options) for row in chunk], translate), strict=True)


def _is_text(value: Any) -> bool:
    """Whether it is more than a number."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def _text(row: Row, column: str, options: Options) -> str | None:
    if options.to_column in row.fields:
        raise DocumentError(
            f"line {row.line} has a column {options.to_column!r} already; give another name with --to-column"
        )
    if column not in row.fields:
        raise DocumentError(f"line {row.line} has no column {column!r}; it has {', '.join(row.fields)}")
    text = row.fields[column]
    if text is not None and not isinstance(text, str):
        raise DocumentError(f"line {row.line}: {column!r} holds {type(text).__name__}, not text")
    try:
        (text or "").encode()
    except UnicodeEncodeError:  # JSON can name half a character
        raise DocumentError(f"line {row.line}: {column!r} holds half a character; mend or drop the row") from None
    if "\0" in (text or ""):  # and this one
        raise DocumentError(f"line {row.line}: {column!r} holds a NUL; mend or drop the row")
    return text


def translated_texts(texts: Sequence[str | None], translate: Translate) -> list[str | None]:
    """Translations of plain texts; None has none."""
    found = iter(translate_inner([(text,) for text in texts if text is not None], translate))
    return [None if text is None else plain(next(found)) for text in texts]
