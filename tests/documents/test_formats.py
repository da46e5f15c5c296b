from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_nmsparse.documents import FORMATS, Options, check_options, format_of, translate_document
from hf_nmsparse.documents import formats as module
from hf_nmsparse.markup import Marked
from tests.documents.reading import loud


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.jsonl", "jsonl"),
        ("a.b.TSV", "tsv"),
        ("a.csv", "csv"),
        ("a.parquet", "parquet"),
        ("a.srt", "srt"),
        ("a.vtt", "vtt"),
        ("a.po", "po"),
        ("a.htm", "html"),
        ("a.html", "html"),
        ("a.md", "md"),
        ("a.docx", "docx"),
        ("a.txt", None),
        ("a.en", None),
        ("html", None),
        ("-", None),
    ],
)
def test_format_of(name: str, form: str | None) -> None:
    assert format_of(name) == form


def test_a_file_is_named_where_it_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: line 1 holds list; each line is an object$"):
        translate_document(str(tmp_path / "a.jsonl"), io.BytesIO(), "jsonl", loud)


@pytest.mark.parametrize("form", FORMATS)
def test_empty_files(form: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a: is empty; there is nothing to translate$"):
        translate_document(str(tmp_path / "a"), io.BytesIO(), form, loud)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    target = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"a": "x"}\n')))
    translate_document("-", target, "jsonl", loud, Options(to_column="b"))
    assert target.getvalue() == b'{"a": "x", "b": "X"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    with pytest.raises(ValueError, match=r"^standard input: is no Word document"):
        translate_document("-", target, "docx", loud)


@pytest.mark.parametrize("form", FORMATS)
def test_a_device_without_an_end(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []
    read = FORMATS[form].read

    def measured(source: Path, *given: Any) -> None:
        kept.append(source.read_bytes())
        read(source, *given)

    monkeypatch.setitem(FORMATS, form, replace(FORMATS[form], read=measured))
    with pytest.raises(ValueError, match=r"^(corpus: )?/dev/zero[:,] "):
        translate_document("/dev/zero", io.BytesIO(), form, loud)
    assert len(kept[0]) == 1 << 20


def test_a_long_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    target, lines = io.BytesIO(), b'{"a": "x"}\n' * 200_000
    assert len(lines) > 1 << 21
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    translate_document("-", target, "jsonl", loud, Options(to_column="b"))
    assert target.getvalue() == b'{"a": "x", "b": "X"}\n' * 200_000


def test_what_a_translation_says_is_said_as_it_is(tmp_path: Path) -> None:
    def fail(texts: list[Marked]) -> list[Marked]:
        raise ValueError("translate: no")

    (tmp_path / "a.md").write_text("a")
    with pytest.raises(ValueError, match=r"^translate: no$"):
        translate_document(str(tmp_path / "a.md"), io.BytesIO(), "md", fail)


@pytest.mark.parametrize(("form", "module_name"), [("md", "markdown_it"), ("md", "mdit_py_plugins"), ("docx", "lxml")])
def test_a_missing_library(form: str, module_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == module_name else SimpleNamespace())
    with pytest.raises(ValueError, match=rf"^{form} needs {module_name}: pip install 'hf-nmsparse\[documents\]'$"):
        translate_document("a", io.BytesIO(), form, loud)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("md", Options(column="a"), "--column is for jsonl, tsv, csv, parquet, and not for md; leave it out"),
        ("txt", Options(to_column="a"), "--to-column is for jsonl, tsv, csv, parquet, and not for txt; leave it out"),
        ("csv", Options(overwrite=True), "--overwrite is for po, and not for csv; leave it out"),
    ],
)
def test_options_of_other_formats(form: str, options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(form, options)
