from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nmsparse.documents import DocumentError, Options
from tests.documents.reading import Known, loud, same, translated

CSV = """id,text,"n"
1,one,"2"

2,"two, ""three""
and four",
3,,x"""
LOUD_CSV = """id,text,"n",translation
1,one,"2",ONE

2,"two, ""three""
and four",,"TWO, ""THREE""
AND FOUR"
3,,x,"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n"])
def test_csv(end: str, mark: str, last: str) -> None:
    text, expected = ((mark + one + last).replace("\n", end) for one in (CSV, LOUD_CSV))
    assert translated("csv", text, loud, Options("text")).decode() == expected


def test_semicolons() -> None:
    out = translated("csv", 'id;text\n1;a, b\n2;"c;"\n', loud).decode()
    assert out == 'id;text;translation\n1;a, b;A, B\n2;"c;";"C;"\n'


def test_tabs_without_quotes() -> None:
    text = 'id\ttext\n1\t"Hello," he said.\n2\t5" wide\n'
    out = translated("tsv", text, loud).decode()
    assert out == 'id\ttext\ttranslation\n1\t"Hello," he said.\t"HELLO," HE SAID.\n2\t5" wide\t5" WIDE\n'
    out = translated("tsv", "text\nx\n", Known({"x": "a\tb\r\nc"})).decode()
    assert out == "text\ttranslation\nx\ta b c\n"


def test_tabs_with_quotes() -> None:
    text = 'id\ttext\n1\t"""Hello,"" he said."\n2\tx\n'
    out = translated("tsv", text, loud).decode()
    assert out == 'id\ttext\ttranslation\n1\t"""Hello,"" he said."\t"""HELLO,"" HE SAID."\n2\tx\tX\n'


def test_no_rows() -> None:
    assert translated("csv", "text", loud) == b"text,translation"
    assert translated("csv", "id,text\r\n", loud, Options("text")) == b"id,text,translation\r\n"


@pytest.mark.parametrize(
    ("form", "text", "options", "message"),
    [
        ("csv", "a,b\nx,y\n", Options(), "2 columns hold text; name one with --column: it has a, b"),
        ("csv", "a,b\n", Options(), "2 columns hold text; name one with --column: it has a, b"),
        ("csv", "a,b\n1,2\n", Options(), "no column holds text; name one with --column: it has a, b"),
        ("csv", "a,b\nx,1\n", Options("c"), "no column 'c'; it has a, b"),
        ("csv", "a,translation\nx,1\n", Options(), "has a column 'translation' already; give another name"),
        ("csv", "a,a\nx,1\n", Options(), "several columns are named 'a'; give each its own name"),
        ("csv", "a,b\nx,1\nx\n", Options(), "line 3 has 1 fields, and the header names 2"),
        ("csv", 'a,b\nx,1\n"x\n', Options(), "line 3 is not as CSV quotes fields: "),
        ("csv", 'a,b\n"x"y,1\n', Options(), "line 2 is not as CSV quotes fields: "),
        ("csv", "a\n" + "x" * 200_000, Options(), "line 2 is not as CSV quotes fields: "),
        ("tsv", "a\tb\nx\t1\t2\n", Options(), "line 2 has 3 fields, and the header names 2"),
        ("csv", "\n\n", Options(), "holds no rows"),
        ("csv", "a\nx\0", Options(), "line 2 holds a NUL"),
        ("csv", "a\nx\n".encode("utf-16"), Options(), "is UTF-16; make it UTF-8"),
        ("csv", b"a\n\xff\n", Options(), "line 2 is not UTF-8; make it UTF-8"),
    ],
)
def test_bad(form: str, text: str | bytes, options: Options, message: str) -> None:
    with pytest.raises(DocumentError) as raised:
        translated(form, text, loud, options)
    assert message in str(raised.value)


fields = st.text("aB1 ,;\t\"'\n\r\u2028é", max_size=6)


@given(st.lists(st.tuples(fields, fields)), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_any_csv(rows: list[tuple[str, str]], quoting: int) -> None:
    made = io.StringIO()
    writer = csv.writer(made, quoting=quoting)  # type: ignore[arg-type]  # csv.QUOTE_ALL is an int
    writer.writerows([("a", "b"), *rows])
    out = translated("csv", made.getvalue(), same, Options("b")).decode()
    read = list(csv.reader(io.StringIO(out, newline=""), strict=True))
    assert read == [["a", "b", "translation"], *([one, two, two] for one, two in rows)]
