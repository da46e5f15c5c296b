from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nmsparse.documents import DocumentError, Options
from hf_nmsparse.documents.base import CHUNK
from tests.documents.reading import Asked, Known, loud, same, translated

ROWS = """{"id": 1, "text": "one", "x": null}

{"text":"\\u00e4 } two","id":2.0}\t
  {"text": null}
{"text": " "}"""
LOUD_ROWS = """{"id": 1, "text": "one", "x": null, "translation": "ONE"}

{"text":"\\u00e4 } two","id":2.0, "translation": "Ä } TWO"}\t
  {"text": null, "translation": null}
{"text": " ", "translation": " "}"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\n\n"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n"])
def test_rows(end: str, mark: str, last: str) -> None:
    text, expected = ((mark + one + last).replace("\n", end) for one in (ROWS, LOUD_ROWS))
    assert translated("jsonl", text, loud).decode() == expected


def test_columns() -> None:
    rows = '{"a": "one", "b": "two"}\n'
    out = translated("jsonl", rows, loud, Options("b", 'to "c"')).decode()
    assert out == '{"a": "one", "b": "two", "to \\"c\\"": "TWO"}\n'


def test_what_a_translation_holds() -> None:
    out = translated("jsonl", '{"a": "x"}\n', Known({"x": '"}\n\u2028'})).decode()
    assert json.loads(out) == {"a": "x", "translation": '"}'}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ('{"a": "x", "b": "y"}', Options(), "2 columns hold text; name one with --column: it has a, b"),
        ('{"a": 1}', Options(), "no column holds text; name one with --column: it has a"),
        ("{}", Options(), "no column holds text; name one with --column: it has none"),
        ('{"a": "x"}', Options("b"), "no column 'b'; it has a"),
        ('{"a": "x"}\n{"b": "x"}', Options(), "line 2 has no column 'a'; it has b"),
        ('{"a": "x"}\n\n{"a": 2}', Options(), "line 3: 'a' holds int, not text"),
        ('{"a": "\\ud800"}', Options(), "line 1: 'a' holds half a character; mend or drop the row"),
        ('{"a": "x"}\n{"a": "x\\u0000"}', Options(), "line 2: 'a' holds a NUL; mend or drop the row"),
        ('{"a": "x", "translation": 1}', Options(), "has a column 'translation' already; give another name"),
        ('{"a": "x"}\n{"a": "x", "t": 1}', Options(to_column="t"), "line 2 has a column 't' already"),
        ('{"a": "x"}\n{"a": "x"', Options(), "line 2 is no JSON: "),
        ("[" * 100_000, Options(), "line 1 is no JSON: "),
        ('["x"]', Options(), "line 1 holds list; each line is an object"),
        (" \n\n", Options(), "holds no rows"),
        ('{"a": "x"}\n\0', Options(), "line 2 holds a NUL"),
        ('{"a": "x"}'.encode("utf-16"), Options(), "is UTF-16; make it UTF-8"),
        (b'{"a": "x"}\n\xff', Options(), "line 2 is not UTF-8; make it UTF-8"),
    ],
)
def test_bad(rows: str | bytes, options: Options, message: str) -> None:
    with pytest.raises(DocumentError) as raised:
        translated("jsonl", rows, loud, options)
    assert message in str(raised.value)


def test_rows_are_read_as_they_are_written() -> None:
    counts: list[int] = []

    def counted(texts: list[Any]) -> list[Any]:
        counts.append(len(texts))
        return texts

    translated("jsonl", '{"a": "x"}\n' * (2 * CHUNK + 1), counted)
    assert counts == [CHUNK, CHUNK, 1]


values = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3) | st.just([{"a": "}"}])


@given(st.lists(st.dictionaries(st.text("bcd", max_size=2), values), min_size=1), st.booleans())
def test_any(rows: list[dict[str, Any]], ascii_alone: bool) -> None:
    rows = [{**row, "text": f"{number}. text"} for number, row in enumerate(rows)]
    text = "".join(f"{json.dumps(row, ensure_ascii=ascii_alone)}\n" for row in rows)
    out = translated("jsonl", text, same, Options("text")).decode()
    assert [json.loads(line) for line in out.split("\n")[:-1]] == [{**row, "translation": row["text"]} for row in rows]
    asked = Asked()
    translated("jsonl", text, asked, Options("text"))
    assert asked.texts == [(row["text"],) for row in rows]
