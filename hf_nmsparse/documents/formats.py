"""The formats by their names and suffixes, and the way of a file through its reader."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from hf_nmsparse.documents.base import DocumentError, Options, Reader, Translate
from hf_nmsparse.documents.json_lines import translate_jsonl
from hf_nmsparse.documents.po import translate_po
from hf_nmsparse.documents.subtitles import translate_srt, translate_vtt
from hf_nmsparse.documents.tables import translate_csv, translate_tsv
from hf_nmsparse.files import naming

__all__ = ["FORMATS", "Format", "check_options", "format_of", "translate_document"]


@dataclass(frozen=True)
class Format:
    """A format of documents.

    Attributes:
        suffixes: How its files end.
        read: Reads and writes them.
        needs: Modules of the extra ``documents`` that this takes.
        options: The `Options` that it knows.
        begins: What its files begin with, where they are no text.
    """

    suffixes: tuple[str, ...]
    read: Reader
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    begins: bytes = b""

    def may_go_on(self, start: bytes, chunk: bytes) -> bool:
        """Whether a file that begins with ``start`` and goes on with ``chunk`` may be of this format."""
        return start.startswith(self.begins) if self.begins else b"\0" not in chunk


# What takes long to import, or may be missing, is imported by those who use it.


def _parquet(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    from hf_nmsparse.documents.parquet import translate_parquet

    translate_parquet(source, target, translate, options)


def _html(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    from hf_nmsparse.documents.html import translate_html_file

    translate_html_file(source, target, translate, options)


def _markdown(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    from hf_nmsparse.documents.markdown import translate_markdown

    translate_markdown(source, target, translate, options)


def _docx(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    from hf_nmsparse.documents.docx import translate_docx

    translate_docx(source, target, translate, options)


_COLUMNS = ("column", "to_column")
_KEPT = 1 << 20  # bytes of a pipe that are read at once

FORMATS = {
    "jsonl": Format((".jsonl",), translate_jsonl, options=_COLUMNS),
    "tsv": Format((".tsv",), translate_tsv, options=_COLUMNS),
    "csv": Format((".csv",), translate_csv, options=_COLUMNS),
    "parquet": Format((".parquet",), _parquet, options=_COLUMNS, begins=b"PAR1"),
    "srt": Format((".srt",), translate_srt),
    "vtt": Format((".vtt",), translate_vtt),
    "po": Format((".po",), translate_po, options=("overwrite",)),
    "html": Format((".html", ".htm"), _html),
    "md": Format((".md",), _markdown, needs=("markdown_it", "mdit_py_plugins")),
    "docx": Format((".docx",), _docx, needs=("lxml",), begins=b"PK"),
}


def format_of(name: str) -> str | None:
    """The format of a file by its suffix; None where that is none of these, and the file is lines of text."""
    suffix = Path(name).suffix.lower()
    return next((form for form, known in FORMATS.items() if suffix in known.suffixes), None)


def check_options(form: str, options: Options) -> None:
    """Refuses what is asked of a format that does not know it.

    Args:
        form: One of `FORMATS`, or another, which knows none.
        options: What is asked.

    Raises:
        ValueError: As said.
    """
    known = FORMATS[form].options if form in FORMATS else ()
    for name, value in vars(options).items():
        if name not in known and value != getattr(Options(), name):
            formats = ", ".join(other for other in FORMATS if name in FORMATS[other].options)
            raise ValueError(f"--{name.replace('_', '-')} is for {formats}, and not for {form}; leave it out")


def translate_document(
    source: str, target: IO[bytes], form: str, translate: Translate, options: Options | None = None
) -> None:
    """Translates a document.

    Args:
        source: Name of a file or a pipe; ``-`` is standard input.
        target: Where the translated document goes.
        form: One of `FORMATS`.
        translate: Gives texts in another language.
        options: What is asked of some formats alone.

    Raises:
        ValueError: The file is damaged or has not what was asked for, a library is missing, or ``translate`` says so.
    """
    options = options or Options()
    check_options(form, options)
    known = FORMATS[form]
    missing = [module for module in known.needs if find_spec(module) is None]
    if missing:
        raise ValueError(f"{form} needs {', '.join(missing)}: pip install 'hf-nmsparse[documents]'")
    name = "standard input" if source == "-" else source
    with _on_disk(source, known) as file:
        try:
            if not file.stat().st_size:
                raise DocumentError("is empty; there is nothing to translate")
            known.read(file, target, translate, options)
        except DocumentError as error:
            raise ValueError(f"{name}: {error}") from error
        except ValueError as error:
            if str(file) in str(error):  # as readers of pairs name a file, which may be the one that a pipe is kept in
                raise ValueError(str(error).replace(str(file), name)) from error
            raise


@contextmanager
def _on_disk(source: str, known: Format) -> Iterator[Path]:
    """A file, to be read in any order; what comes by a pipe is kept in one for so long."""
    if source != "-" and (Path(source).is_file() or not Path(source).exists()):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "input"
        with naming(kept), kept.open("wb") as file:
            if source == "-":
                _keep(sys.stdin.buffer, file, known)
            else:
                with Path(source).open("rb") as stream:
                    _keep(stream, file, known)
        yield kept


def _keep(stream: IO[bytes], file: IO[bytes], known: Format) -> None:
    """Writes a stream to a file, as far as it may be of a format: a device such as /dev/zero has no end.

    The format's reader says what is wrong.
    """
    start = b""
    while chunk := stream.read(_KEPT):
        file.write(chunk)
        start = start or chunk
        if not known.may_go_on(start, chunk):
            break
