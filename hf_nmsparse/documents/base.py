"""What the readers of all formats share: their interface, and text files as they are."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hf_nmsparse.markup import Marked

__all__ = ["CHUNK", "DocumentError", "Options", "Reader", "Translate", "decoded", "lines_of", "read_text"]

CHUNK = 4096
"""Rows of a file that are read, translated and written together."""

Translate = Callable[[list[Marked]], list[Marked]]
"""Gives each text in another language, with every tag of it once and well nested."""

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")


class DocumentError(ValueError):
    """A file is not what its format says, or lacks what was asked for; one line, which does not name the file."""


@dataclass(frozen=True)
class Options:
    """What is asked of some formats alone.

    Attributes:
        column: Name of the column that is translated; None is the only one that holds text.
        to_column: Name of the new column for translations.
        overwrite: Whether messages that have a translation are translated again.
    """

    column: str | None = None
    to_column: str = "translation"
    overwrite: bool = False


Reader = Callable[[Path, IO[bytes], Translate, Options], None]
"""Reads a file and writes it, translated, to a stream; a damaged file is a `DocumentError`."""


def read_text(file: Path) -> tuple[bytes, str]:
    """A text file as its byte order mark, if there is one, and its text, whose line ends stay as they are."""
    data = file.read_bytes()
    mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    return mark, decoded(data.removeprefix(mark))


def decoded(data: bytes, line: int = 1) -> str:
    """Text of UTF-8.

    Args:
        data: The bytes.
        line: Number of the line that they begin with.

    Raises:
        DocumentError: They are something else.
    """
    if line == 1 and data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # begins as UTF-16 does
        raise DocumentError("is UTF-32; make it UTF-8, such as with iconv -f UTF-32 -t UTF-8")
    if line == 1 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DocumentError("is UTF-16; make it UTF-8, such as with iconv -f UTF-16 -t UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        number = line + data.count(b"\n", 0, error.start)
        raise DocumentError(f"line {number} is not UTF-8; make it UTF-8, such as with iconv") from None
    if "\0" in text:
        number = line + text.count("\n", 0, text.index("\0"))
        raise DocumentError(f"line {number} holds a NUL, which no text does; make it UTF-8")
    return text


def lines_of(text: str) -> list[str]:
    """The lines of a text, each with what ends it: a line feed, a carriage return or both."""
    return _LINE.findall(text)
