"""JSON lines: a translation is one more key at the end of each object, and all else stays byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hf_nmsparse.documents.base import DocumentError, Options, Translate, decoded
from hf_nmsparse.documents.rows import Row, translate_rows

__all__ = ["translate_jsonl"]

_BLANK = " \t\r\n"  # what JSON takes for white space


def translate_jsonl(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    """Translates a key of JSON lines into another, in constant memory; blank lines stay where they are."""
    with source.open("rb") as file:
        for row, text in translate_rows(_rows(file), translate, options):
            inner = row.raw.rstrip(_BLANK).removesuffix("}").rstrip(_BLANK)
            end = row.raw[len(inner) :]
            name, value = (json.dumps(part, ensure_ascii=False) for part in (options.to_column, text))
            target.write(f"{inner}, {name}: {value}{end}".encode())


def _rows(lines: IO[bytes]) -> Iterator[Row]:
    """The objects, each with the blank lines behind it, the first one with those before it, too."""
    number, raw, fields = 1, "", None
    for here, line in enumerate(lines, 1):
        text = decoded(line, here)
        if here == 1 and text.startswith("\ufeff"):
            raw, text = text[0], text[1:]
        if text.strip(_BLANK):
            if fields is not None:
                yield Row(number, raw, fields)
                raw = ""
            number, fields = here, _object(text, here)
        raw += text
    if fields is None:
        raise DocumentError("holds no rows")
    yield Row(number, raw, fields)


def _object(text: str, line: int) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"line {line} is no JSON: {error}; each line is an object") from None
    if not isinstance(found, dict):
        raise DocumentError(f"line {line} holds {type(found).__name__}; each line is an object")
    return found
