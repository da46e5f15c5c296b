"""Local files of every format, as people's tools write them: the same pairs, or one line that says what is wrong."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nmsparse.corpus import load_corpus
from hf_nmsparse.pairs import find_files, read_pairs

Pairs = list[tuple[str, str]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


def tsv(pairs: Pairs, end: str = "\n", before: str = "", after: str = "") -> bytes:
    """Uncut fields, between others if asked for."""
    rows = [f"en{before}\tde{after}", *(f"{a}{before}\t{b}{after}" for a, b in pairs)]
    return end.join(rows).encode()


def quoted_tsv(pairs: Pairs) -> bytes:
    """As pandas and csv write it."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerows([("en", "de"), *pairs])
    return file.getvalue().encode()


def json_rows(pairs: Pairs, nested: bool) -> list[dict[str, Any]]:
    rows = [{"en": a, "de": b} for a, b in pairs]
    return [{"id": n, "translation": row} if nested else {"id": n, **row} for n, row in enumerate(rows)]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def json_lines(rows: list[dict[str, Any]], end: str = "\n", **how: Any) -> bytes:
    return end.join(json.dumps(row, **how) for row in rows).encode()


# The files of a split in each format, from pairs that it can hold.
FORMATS: dict[str, Callable[[Pairs], dict[str, bytes]]] = {
    "text": lambda pairs: {f"train.{lang}": "\n".join(side).encode() for lang, side in zip(("en", "de"), zip(*pairs))},  # noqa: B905
    "text, CRLF": lambda pairs: {
        f"train.{lang}": "".join(f"{text}\r\n" for text in side).encode()
        for lang, side in zip(("en", "de"), zip(*pairs))  # noqa: B905
    },
    "tsv": lambda pairs: {"train.tsv": tsv([*pairs, ('a "b', "c")])},
    "tsv, CRLF": lambda pairs: {"train.tsv": tsv([*pairs, ('a "b', "c")], end="\r\n")},
    "tsv, other columns": lambda pairs: {"train.tsv": tsv([*pairs, ('a "b', "c")], before="\tnote", after="\t7")},
    "tsv, separators at the end": lambda pairs: {"train.tsv": tsv([*pairs, ('a "b', "c")], after="\t")},
    "tsv, quoted": lambda pairs: {"train.tsv": quoted_tsv([*pairs, ('a "b', "c")])},
    "jsonl": lambda pairs: {"train.jsonl": json_lines(json_rows(pairs, nested=False))},
    "jsonl, nested, not escaped": lambda pairs: {
        "train.jsonl": json_lines(json_rows(pairs, nested=True), end="\r\n\r\n", ensure_ascii=False)
    },
    "json, one list": lambda pairs: {"train.json": json.dumps(json_rows(pairs, nested=True), indent=1).encode()},
    "parquet": lambda pairs: {"train.parquet": parquet(json_rows(pairs, nested=False))},
    "parquet, nested": lambda pairs: {"train.parquet": parquet(json_rows(pairs, nested=True))},
}


def expected(kind: str, pairs: Pairs) -> Pairs:
    return [*pairs, ('a "b', "c")] if kind.startswith("tsv") else pairs


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def read(folder: Path) -> Pairs:
    rows = read_pairs(find_files(folder, "train", "en", "de"), "en", "de")
    return [(row["source"], row["target"]) for row in rows]


# What other readers end lines at, take for quotes, for numbers, for nothing, or for separators.
NASTY = st.sampled_from(
    [
        *"\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\ufeff\xa0\"'\\,;|#{}[]",
        '""',
        '"""',
        "NA",
        "null",
        "true",
        "007",
        "1e5",
        " ",
    ]
)
TEXTS = (
    st.lists(NASTY | st.text(max_size=5), max_size=8)
    .map("".join)
    .map(lambda text: text.replace("\n", "").replace("\t", "").replace("\0", "").rstrip("\r").removeprefix("\ufeff"))
    .filter(lambda text: bool(text.strip()))
)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=40)
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_text_comes_back_as_it_was_written(kind: str, pairs: Pairs) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert read(written(Path(folder), FORMATS[kind](pairs))) == expected(kind, pairs)


HARD: Pairs = [
    ("a\rb", "Zeile\u2028 zwei"),
    ("007", "1e5"),
    ("NA", "null"),
    ("true", "nan"),
    ('"Quoted."', "„Zitiert.“"),
    ("c\x85d\x0be\x0cf\x1cg", " mit Rand "),
    ("long " * 50_000, "lang"),
    ("1", "2"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        (kind, packed)
        for kind in FORMATS
        for packed in ("", *COMPRESSORS)
        if not (packed and kind.startswith("parquet"))  # which compresses itself
    ],
)
def test_every_format_is_read_alike(tmp_path: Path, kind: str, packed: str, streaming: bool) -> None:
    files = FORMATS[kind](HARD)
    if packed:
        files = {f"{name}{packed}": COMPRESSORS[packed](content) for name, content in files.items()}
    rows = load_corpus(str(written(tmp_path / "corpus", files)), "en", "de", streaming=streaming)["train"]
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    for _ in range(2):
        assert [(row["source"], row["target"]) for row in rows] == expected(kind, HARD)


def test_a_carriage_return_inside_a_line_ends_none(tmp_path: Path) -> None:
    """Universal newlines made three lines of two, and every later pair was off by one."""
    folder = written(tmp_path / "one", {"train.en": b"a\rb\nc\nd\n", "train.de": b"A\nC\nD\n"})
    assert read(folder) == [("a\rb", "A"), ("c", "C"), ("d", "D")]
    folder = written(tmp_path / "both", {"train.en": b"a\rb\nc\nd\n", "train.de": b"A\nC\rD\nE\n"})
    assert read(folder) == [("a\rb", "A"), ("c", "C\rD"), ("d", "E")]


@pytest.mark.parametrize(
    "files",
    [
        {"train.en": b"\xef\xbb\xbfone\ntwo\n", "train.de": b"\xef\xbb\xbfeins\nzwei\n"},
        {"train.tsv": b"\xef\xbb\xbfen\tde\none\teins\ntwo\tzwei\n"},
        {"train.jsonl": b'\xef\xbb\xbf{"en": "one", "de": "eins"}\n{"en": "two", "de": "zwei"}\n'},
        {"train.json": b'\xef\xbb\xbf[{"en": "one", "de": "eins"}, {"en": "two", "de": "zwei"}]'},
    ],
    ids=lambda files: min(files),
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert read(written(tmp_path / "corpus", files)) == [("one", "eins"), ("two", "zwei")]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_of_other_writers(tmp_path: Path, kind: pa.DataType) -> None:
    """polars has large strings, pandas its categories."""
    (tmp_path / "corpus").mkdir()
    columns = {"en": ["a", "007"], "de": ["b", "NA"]}
    table = pa.table({lang: pa.array(texts).cast(kind) for lang, texts in columns.items()})
    pq.write_table(table, tmp_path / "corpus" / "train.parquet")
    assert read(tmp_path / "corpus") == [("a", "b"), ("007", "NA")]


def test_tabs_at_the_end_and_empty_lines_make_no_row(tmp_path: Path) -> None:
    """pandas took the first column of such a file for an index and shifted the others."""
    content = b"en\tde\none\teins\t\n\ntwo\tzwei\t\t\r\n\n"
    assert read(written(tmp_path / "corpus", {"train.tsv": content})) == [("one", "eins"), ("two", "zwei")]


def test_a_file_quoted_throughout(tmp_path: Path) -> None:
    content = b'"en"\t"de"\n"one"\t"He said ""eins"""\n'
    assert read(written(tmp_path / "corpus", {"train.tsv": content})) == [("one", 'He said "eins"')]


def test_quotation_marks_around_whole_sentences_stay(tmp_path: Path) -> None:
    """No writer of CSV quotes a sentence that has neither quotation mark nor separator."""
    content = b'en\tde\n"No."\t"Nein."\n'
    assert read(written(tmp_path / "corpus", {"train.tsv": content})) == [('"No."', '"Nein."')]


def damaged(data: bytes) -> bytes:
    """One byte in the middle is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def parquet_twice() -> bytes:
    """A table with two columns of one name."""
    file = io.BytesIO()
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["en", "en", "de"]), file)
    return file.getvalue()


@pytest.mark.parametrize("packed", COMPRESSORS)
def test_streams_one_after_the_other_are_one_file(tmp_path: Path, packed: str) -> None:
    compress, rows = COMPRESSORS[packed], [b'{"en": "%d", "de": "x"}\n' % number for number in range(9)]
    content = b"".join(map(compress, [*rows, b"".join(rows) * 9000]))
    if packed == ".xz":
        content += bytes(8)  # the padding of the format
    pairs = [(str(number), "x") for number in range(9)]
    assert read(written(tmp_path / "corpus", {f"train.jsonl{packed}": content})) == pairs + pairs * 9000


def test_sentences_cut_inside_of_quotations_are_as_they_are(tmp_path: Path) -> None:
    """One begins with a quotation mark, a later one ends with it, and no writer of CSV is at work."""
    content = 'en\tde\nHello.\t"Hallo.\nHow are you?\tWie geht es?"\n"No."\t"Nein."\n'
    assert read(written(tmp_path / "corpus", {"train.tsv": content.encode()})) == [
        ("Hello.", '"Hallo.'),
        ("How are you?", 'Wie geht es?"'),
        ('"No."', '"Nein."'),
    ]


UTF16_LINES = "Ċ\nĊ\n".encode("utf-16")  # with a byte of a line feed in each letter
UTF16 = "a\nb\n".encode("utf-16")
LATIN1 = "gut\nschön\n".encode("latin-1")
ROWS = b'{"en": "a", "de": "b"}\n'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.en": b"a\nb\n", "train.de": LATIN1}, "train.de, line 2 is not UTF-8; convert the file with iconv"),
        ({"train.en": UTF16, "train.de": UTF16}, "train.en, line 1 is not UTF-8"),
        ({"train.en": b"a\0\n\0", "train.de": b"a\0\n\0"}, "train.en, line 1 has a NUL character: no UTF-8 text"),
        ({"train.tsv": "en\tde\na\tb\n".encode("utf-16")}, "train.tsv, line 1 is not UTF-8"),
        ({"train.jsonl": '{"en": "ä", "de": "b"}'.encode("latin-1")}, "train.jsonl, line 1 is not UTF-8"),
        (
            {"train.tsv": b"en\tde\na\tb\nc\td\te\n"},
            "train.tsv, line 3: 3 fields between tabs, and the first line names 2",
        ),
        ({"train.tsv": b"en\tde\tnote\na\tb\n"}, "line 2: 2 fields between tabs, and the first line names 3"),
        ({"train.tsv": b"en\ten\tde\na\tb\tc\n"}, "line 1: several columns are named 'en'"),
        (
            {"train.tsv": b"A man sleeps.\tEin Mann.\nb\tc\n"},
            "line 2: no language 'en'; it has A man sleeps., Ein Mann.",
        ),
        ({"train.en": b"a\n\nc\n", "train.de": b"a\nb\nc\n"}, "train.en and train.de, line 2: no 'en' text, got ''"),
        (
            {"train.en": b"a\nb", "train.de": b"a\nb\n\n"},
            "train.en has 2 lines, .*train.de has 3; they are not aligned",
        ),
        ({"train.jsonl": ROWS + b'{"en": 7, "de": "b"}'}, "train.jsonl, line 2: no 'en' text, got 7; drop the row"),
        ({"train.jsonl": ROWS + b'{"en": "a"}'}, "line 2: no language 'de'; it has en"),
        ({"train.jsonl": ROWS + b'"a"'}, "line 2: holds str, not one text a language"),
        ({"train.jsonl": ROWS + b'{"en": "\\ud83d", "de": "b"}'}, "line 2: no 'en' text, got '\\\\ud83d'"),
        ({"train.jsonl": ROWS + b'{"en": "a\\u0000", "de": "b"}'}, "line 2: no 'en' text, got 'a\\\\x00'"),
        ({"train.jsonl": ROWS + b'{"en": "a", "de": ' + b"[" * 100_000}, "train.jsonl, line 2: .*recursion"),
        (
            {"train.json": b'[{"en": "a", "de": "b"}, {"en": "a", "de": null}]'},
            "train.json, row 1: no 'de' text, got None",
        ),
        ({"train.json": b'{\n "en": ["a"]\n}'}, "cannot read .*train.json, line 1: Expecting property name"),
        ({"train.parquet": parquet([{"en": 7, "de": "b"}])}, "train.parquet, row 0: no 'en' text, got 7"),
        ({"train.parquet": parquet([{"en": "a", "fr": "b"}])}, "row 0: no language 'de'; it has en, fr"),
        ({"train.parquet": b"PAR1, or not"}, "cannot read .*train.parquet: "),
        ({"train.jsonl.gz": ROWS}, "cannot read .*train.jsonl.gz: Not a gzipped file"),
        ({"train.jsonl.gz": gzip.compress(ROWS * 50)[:-9]}, "cannot read .*train.jsonl.gz: "),
        ({"train.jsonl.bz2": bz2.compress(ROWS * 50)[:-9]}, "cannot read .*train.jsonl.bz2: "),
        ({"train.jsonl.xz": lzma.compress(ROWS * 50)[:-9]}, "cannot read .*train.jsonl.xz: "),
        ({"train.jsonl.xz": ROWS}, "cannot read .*train.jsonl.xz: "),
        ({"train.jsonl.zst": zst(ROWS * 50)[:-9]}, "cannot read .*train.jsonl.zst: "),
        ({"train.jsonl.zst": ROWS}, "cannot read .*train.jsonl.zst: "),
        ({"train.jsonl.bz2": bz2.compress(ROWS) + b"garbage"}, "cannot read .*train.jsonl.bz2: "),
        ({"train.jsonl.bz2": bz2.compress(ROWS) + damaged(bz2.compress(ROWS))}, "cannot read .*train.jsonl.bz2: "),
        ({"train.jsonl.bz2": bz2.compress(ROWS) + bz2.compress(ROWS)[:-9]}, "cannot read .*train.jsonl.bz2: "),
        ({"train.jsonl.xz": lzma.compress(ROWS) + b"garbage"}, "cannot read .*train.jsonl.xz: "),
        ({"train.jsonl.xz": lzma.compress(ROWS) + damaged(lzma.compress(ROWS))}, "cannot read .*train.jsonl.xz: "),
        ({"train.jsonl.xz": lzma.compress(ROWS) + lzma.compress(ROWS)[:-9]}, "cannot read .*train.jsonl.xz: "),
        ({"train.jsonl.gz": gzip.compress(ROWS) + b"garbage"}, "cannot read .*train.jsonl.gz: "),
        ({"train.jsonl.zst": zst(ROWS) + b"garbage"}, "cannot read .*train.jsonl.zst: "),
        ({"train.en": UTF16_LINES, "train.de": UTF16}, "train.en, line 1 is not UTF-8"),
        ({"train.parquet": parquet_twice()}, "train.parquet: several columns are named 'en'"),
        (
            {"train.tsv": quoted_tsv([("a", "b\nc"), ("d", "e")])},
            "train.tsv, line 2: a quoted text goes on in the next",
        ),
        ({"train.tsv": quoted_tsv([("a", "b"), ("c\n\nd\ne", "f")])}, "train.tsv, line 3: a quoted text goes on in"),
        ({"train.tsv": quoted_tsv([("a", 'b "c"'), ("d", "e\nf\tg")])}, "train.tsv, line 3: a quoted text goes on in"),
        ({"train.jsonl.gz": gzip.compress(b"")}, "train.jsonl.gz has no rows"),
        (
            {"train.jsonl": ROWS, "train.tsv": b"en\tde\nc\td"},
            "train.jsonl, train.tsv are all of split train; leave the",
        ),
        ({"train.en": b"a", "train.de": b"b", "train.de.gz": b"c"}, "train.de, train.de.gz, train.en are all of split"),
        ({"train.en.gz": b"a"}, "train.de is missing beside its other half"),
        ({"train.csv": b"en,de\na,b"}, "cannot read train.csv; the formats are jsonl, json, parquet, tsv, en.de"),
    ],
    ids=lambda given: None if isinstance(given, str) else "+".join(given),
)
@pytest.mark.parametrize("streaming", [False, True])
def test_refusals(tmp_path: Path, files: dict[str, bytes], message: str, streaming: bool) -> None:
    folder = written(tmp_path / "corpus", files)
    with pytest.raises(ValueError, match=message) as refused:
        list(load_corpus(str(folder), "en", "de", streaming=streaming)["train"])
    assert "\n" not in str(refused.value)


# Each name beside the folder that a pattern or an address would have found in its place.
@pytest.mark.parametrize(
    ("name", "other"), [("run[1]", "run1"), ("v*", "v2"), ("a?", "ab"), ("a::b", "b"), ("[!x]", "y"), ("#%20{0}", "0")]
)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["text", "tsv", "jsonl", "parquet"])
def test_a_path_is_a_path(tmp_path: Path, name: str, other: str, kind: str, streaming: bool) -> None:
    written(tmp_path / other, FORMATS[kind]([("wrong", "falsch")]))
    folder = written(tmp_path / name, FORMATS[kind]([("right", "richtig")]))
    rows = load_corpus(str(folder), "en", "de", streaming=streaming)["train"]
    assert [(row["source"], row["target"]) for row in rows] == expected(kind, [("right", "richtig")])


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """And one that is as it was comes from the cache, under the name that its tokens are kept by."""
    folder = written(tmp_path / "corpus", {"train.en": b"a\n", "train.de": b"b\n"})
    first, again = (load_corpus(str(folder), "en", "de")["train"] for _ in range(2))
    assert first.cache_files == again.cache_files
    assert first._fingerprint == again._fingerprint
    written(folder, {"train.de": b"c\n"})
    changed = load_corpus(str(folder), "en", "de")["train"]
    assert changed[:] == {"source": ["a"], "target": ["c"]}
    assert changed._fingerprint != first._fingerprint
    assert load_corpus(str(folder), "de", "en")["train"][:] == {"source": ["c"], "target": ["a"]}
