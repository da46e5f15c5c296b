"""Sentence pairs in local files: two texts side by side, tab-separated, JSON or parquet; plain or compressed.

The files are read here and not by a loader that guesses: a text is what stands in the file, whatever else it looks like
(``007``, ``NA``, ``null``), and a path is a path, whatever characters it has. Only a line feed ends a line, with the
carriage return before it where there is one; a byte order mark before the first line is none of its text.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = [
    "FORMATS",
    "column_of",
    "find_files",
    "is_quoted",
    "is_text",
    "read_column",
    "read_columns",
    "read_lines",
    "read_pairs",
    "same_length",
    "write_rows",
]

FORMATS = ("jsonl.gz", "jsonl.zst", "jsonl", "parquet")
"""What `write_rows` writes, by the ends of names."""

_FORMATS = (".jsonl", ".json", ".parquet", ".tsv")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

# A field as the writers of CSV quote it, among them pandas' and Excel's.
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
# Fields of which the last is quoted and not at its end; and whole fields.
_BEGUN = re.compile(rf'(?:(?:{_QUOTED.pattern}|[^"\t]*)\t)*"(?:[^"]|"")*')
_WHOLE = re.compile(rf'(?:(?:{_QUOTED.pattern}|[^"\t]*)\t)*(?:{_QUOTED.pattern}|[^"\t]*)')

Row = tuple[str, Any]  # where it stands, and what does


def find_files(folder: Path, split: str, source_lang: str, target_lang: str) -> tuple[Path, ...]:
    """The files of a split: one with both languages, or one each; none if no name begins with the split's.

    Raises:
        ValueError: There are several to choose from, one language is missing, or the format is not known.
    """
    present = sorted(file.name for file in folder.iterdir() if file.name.startswith(f"{split}.") and file.is_file())

    def named(ending: str) -> list[str]:
        return [name for name in present if name in {f"{split}{ending}{packed}" for packed in ("", *_COMPRESSED)}]

    whole = [name for ending in _FORMATS for name in named(ending) if ending != ".parquet" or name.endswith(ending)]
    halves = [named(f".{lang}") for lang in (source_lang, target_lang)]
    if any(len(half) > 1 for half in halves) or len(whole) + any(halves) > 1:
        several = ", ".join(sorted({*whole, *chain(*halves)}))
        raise ValueError(f"corpus {folder}: {several} are all of split {split}; leave the files of one format there")
    if any(halves) and not all(halves):
        missing = target_lang if halves[0] else source_lang
        raise ValueError(f"corpus: {folder / f'{split}.{missing}'} is missing beside its other half")
    if present and not whole and not any(halves):
        known = ", ".join([*(ending[1:] for ending in _FORMATS), f"{source_lang}+{target_lang}"])
        raise ValueError(f"corpus {folder}: cannot read {', '.join(present)}; the formats are {known}")
    files = tuple(folder / name for name in (*whole, *chain(*halves)))
    for file in files:
        if not file.stat().st_size:
            raise ValueError(f"corpus: {file} is empty")
    return files


def read_pairs(files: tuple[Path, ...], source_lang: str, target_lang: str) -> Iterator[dict[str, str]]:
    """The pairs of a split, in order, as rows with ``source`` and ``target``.

    Args:
        files: As `find_files` gives them.
        source_lang: Key of the source sentence in a row.
        target_lang: The same for the target.

    Raises:
        ValueError: While they are read: a file cannot be, or a row lacks one of its texts.
    """
    empty = True
    for where, row in _rows(files, source_lang, target_lang):
        texts = row["translation"] if isinstance(row, dict) and "translation" in row else row
        if not isinstance(texts, dict):
            raise ValueError(f"corpus: {where}: holds {type(texts).__name__}, not one text a language")
        for lang in (source_lang, target_lang):
            if lang not in texts:
                raise ValueError(f"corpus: {where}: no language {lang!r}; it has {', '.join(map(str, texts))}")
            if not is_text(texts[lang]):
                raise ValueError(f"corpus: {where}: no {lang!r} text, got {texts[lang]!r}; drop the row")
        yield {"source": texts[source_lang], "target": texts[target_lang]}
        empty = False
    if empty:
        raise ValueError(f"corpus: {files[0]} has no rows")


def read_lines(file: Path) -> Iterator[dict[str, str]]:
    """The lines of a text, plain or compressed, in order, as rows with ``source``; blank ones are rows too.

    Raises:
        ValueError: While they are read: the file cannot be.
    """
    for line in _lines(file):
        yield {"source": line}


def read_column(file: Path, column: str) -> Iterator[str]:
    """The texts of one language in a file, in order: its lines, or what rows hold under the name of the language.

    A row that holds none there has a blank text.

    Args:
        file: Parquet, JSON lines or tab-separated by its name, and a text of one sentence a line otherwise; all but
            parquet plain or compressed.
        column: The name.

    Raises:
        ValueError: While they are read: the file cannot be, or it has no such column.
    """
    if not any(suffix in _FORMATS for suffix in file.suffixes):
        yield from _lines(file)
        return
    for (text,) in read_columns(file, (column,)):
        yield text


def read_columns(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """What the rows of a file hold under the names of one or two languages, as `read_column` reads it.

    Raises:
        ValueError: While they are read: the file cannot be, has no rows, or has no such columns.
    """
    if not any(suffix in _FORMATS for suffix in file.suffixes):
        known = ", ".join(one[1:] for one in _FORMATS)
        raise ValueError(f"corpus: {file} has one text a line; rows of {' and '.join(columns)} are in {known}")
    for where, row in _rows((file,), columns[0], columns[-1]):
        yield tuple(column_of(row, column, where) for column in columns)


def column_of(row: Any, column: str, where: str) -> str:
    """The text that a row holds in one language; blank where that is none or holds a NUL or half a character.

    Raises:
        ValueError: The row has no such language, or something there that is no text.
    """
    texts = row["translation"] if isinstance(row, dict) and "translation" in row else row
    if not isinstance(texts, dict):
        raise ValueError(f"corpus: {where}: holds {type(texts).__name__}, not one text a language")
    if column not in texts:
        raise ValueError(f"corpus: {where}: no language {column!r}; it has {', '.join(map(str, texts))}")
    text = texts[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"corpus: {where}: {column!r} holds {type(text).__name__}, not text")
    return str(text) if is_text(text) else ""


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]], form: str, schema: pa.Schema | None = None) -> None:
    """Writes rows as `read_pairs` and ``datasets`` read them; the same rows give the same bytes.

    Args:
        file: Where to.
        rows: They are written as they come.
        form: One of `FORMATS`.
        schema: What parquet has in its columns; JSON needs none.
    """
    if form == "parquet":
        rows = iter(rows)
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            while batch := list(islice(rows, 10_000)):
                writer.write_table(pa.Table.from_pylist(batch, schema))
        return
    with file.open("wb") as raw:
        packed: Any = raw
        if form.endswith(".gz"):
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
        elif form.endswith(".zst"):
            packed = pa.CompressedOutputStream(pa.PythonFile(raw, "w"), "zstd")
        with io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as stream:
            stream.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def same_length(files: tuple[Path, ...]) -> None:
    """Counts the lines of two texts, which takes far less time than reading their pairs.

    Raises:
        ValueError: They differ.
    """
    counts = []
    for file in files:
        with _opened(file) as stream:
            ends = b""
            count = 0
            while block := stream.read(1 << 20):
                if not count and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValueError(f"corpus: {file}, line 1 is not UTF-8; convert the file with iconv")
                count, ends = count + block.count(b"\n"), block[-1:]
            counts.append(count + (ends not in (b"", b"\n")))
    if len(set(counts)) > 1:
        raise ValueError(f"corpus: {files[0]} has {counts[0]} lines, {files[1]} has {counts[1]}; they are not aligned")


def is_text(value: Any) -> bool:
    """Whether it is a sentence: a string of more than spaces, of whole characters, and without a NUL."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can name half a character
        return False
    return True


def _rows(files: tuple[Path, ...], source_lang: str, target_lang: str) -> Iterator[Row]:
    if len(files) == 2:
        return _side_by_side(files, (source_lang, target_lang))
    (file,) = files
    kind = next((suffix for suffix in reversed(file.suffixes) if suffix in _FORMATS), None)
    if kind is None:
        known = ", ".join(one[1:] for one in _FORMATS)
        raise ValueError(f"corpus: cannot read {file} as pairs; the formats are {known}, or two texts side by side")
    if kind == ".parquet":
        return _parquet(file, source_lang, target_lang)
    return _tsv(file) if kind == ".tsv" else _json(file)


def _side_by_side(files: tuple[Path, ...], langs: tuple[str, str]) -> Iterator[Row]:
    both = f"{files[0]} and {files[1].name}"
    for number, texts in enumerate(zip_longest(*map(_lines, files)), 1):
        if None in texts:
            same_length(files)
        yield f"{both}, line {number}", dict(zip(langs, texts, strict=True))


def _tsv(file: Path) -> Iterator[Row]:
    quoted = is_quoted(file)
    columns: list[str] = []
    for number, line in enumerate(_lines(file), 1):
        fields = line.split("\t")
        if quoted:
            fields = [field[1:-1].replace('""', '"') if field.startswith('"') else field for field in fields]
        where = f"{file}, line {number}"
        if not columns:
            columns = [field.strip() for field in fields]
            twice = {name for name in columns if name and columns.count(name) > 1}
            if twice:
                raise ValueError(f"corpus: {where}: several columns are named {min(twice)!r}")
        elif line:  # an empty line is no row
            while len(fields) > len(columns) and not fields[-1]:  # tabs at the end of a line
                fields.pop()
            if len(fields) != len(columns):
                raise ValueError(
                    f"corpus: {where}: {len(fields)} fields between tabs, and the first line names {len(columns)}"
                )
            yield where, dict(zip(columns, fields, strict=True))


def is_quoted(file: Path) -> bool:
    """Whether a writer of CSV has quoted the fields: all that have a quotation mark look so, and one nothing else.

    Most tools that write a header quote as CSV does, most that cut text with tabs know no quotes. A file of the latter
    ends this with its first quotation mark that stands inside of a text.

    Raises:
        ValueError: A writer of CSV has written a text of several lines.
    """
    found, columns, spanning = False, 0, 0
    record: list[str] = []  # the lines of one whose text has not ended
    for number, line in enumerate(_lines(file), 1):
        columns = columns or line.count("\t") + 1
        if record:
            record.append(line)
            text = "\n".join(record) if '"' in line else ""
            if not text or _BEGUN.fullmatch(text):
                continue
            if not _WHOLE.fullmatch(text) or _QUOTED.sub("", text).count("\t") + 1 != columns:
                return False
            # Sentences of which one begins with a quotation mark and a later one ends so have all fields in each line.
            found = found or any(part and part.count("\t") + 1 != columns for part in record)
            spanning, record = spanning or number + 1 - len(record), []
            continue
        for field in line.split("\t") if '"' in line else ():
            if '"' in field:
                if not _QUOTED.fullmatch(field):
                    if not _BEGUN.fullmatch(line):
                        return False
                    record = [line]
                    break
                found = found or number == 1 or '""' in field[1:-1] or "\r" in field
    if found and spanning and not record:
        raise ValueError(
            f"corpus: {file}, line {spanning}: a quoted text goes on in the next line; write texts without line "
            "breaks, or JSON lines"
        )
    return found and not record


def _json(file: Path) -> Iterator[Row]:
    """One row a line, or one list of rows, which is held in memory."""
    lines = enumerate(_lines(file), 1)
    for number, line in lines:
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            rest = "\n".join([line, *(following for _, following in lines)])
            yield from ((f"{file}, row {index}", row) for index, row in enumerate(_parsed(rest, str(file))))
        else:
            where = f"{file}, line {number}"
            yield where, _parsed(line, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"corpus: cannot read {where}: {_first_line(error)}") from error


def _parquet(file: Path, source_lang: str, target_lang: str) -> Iterator[Row]:
    with _opened(file) as stream, closing(pq.ParquetFile(stream)) as reader:
        names, index = reader.schema_arrow.names, 0
        wanted = ["translation"] if "translation" in names else list(dict.fromkeys((source_lang, target_lang)))
        for name in wanted:
            if names.count(name) > 1:
                raise ValueError(f"corpus: {file}: several columns are named {name!r}")
        for batch in reader.iter_batches(1_000, columns=wanted if set(wanted) <= set(names) else None):
            for row in batch.to_pylist():
                yield f"{file}, row {index}", row
                index += 1


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text, without what ends them."""
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"corpus: {file}, line {number} is not UTF-8; convert the file with iconv") from error
            if "\0" in text:  # UTF-16 without its mark, read as UTF-8
                raise ValueError(f"corpus: {file}, line {number} has a NUL character: no UTF-8 text; convert the file")
            yield text.rstrip("\r\n")


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed by its suffix; what goes wrong while they are read is one line."""
    try:
        with _stream(file) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"corpus: cannot read {file}: {_first_line(error)}") from error


def _stream(file: Path) -> Any:
    if file.suffix == ".gz":
        return gzip.open(file)
    if file.suffix == ".bz2":
        return io.BufferedReader(_Streams(file, bz2.BZ2Decompressor))
    if file.suffix == ".xz":
        return io.BufferedReader(_Streams(file, lzma.LZMADecompressor, padding=b"\0"))
    if file.suffix == ".zst":  # Python's own module is new in 3.14
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))
    return file.open("rb")


class _Streams(io.RawIOBase):
    """Compressed streams one after the other, where Python's own readers pass over all that is after a damaged one."""

    def __init__(self, file: Path, start: Callable[[], Any], padding: bytes = b"") -> None:
        super().__init__()
        self._file, self._start, self._padding = file.open("rb"), start, padding
        self._stream = start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._stream.eof:
                data = (self._stream.unused_data or self._file.read(1 << 16)).lstrip(self._padding)
                if not data and not (data := self._file.read(1 << 16).lstrip(self._padding)):
                    return 0
                self._stream = self._start()
            elif self._stream.needs_input and not (data := self._file.read(1 << 16)):
                raise EOFError("the file ends inside of a compressed stream")
            text = self._stream.decompress(data, len(buffer))
            if text:
                buffer[: len(text)] = text
                return len(text)

    def close(self) -> None:
        self._file.close()
        super().close()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
