"""Whatever a body holds, it is answered or refused in one line, and never an error of the server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["en", "de", "auto", "text", "html", "\ud800", "\x1b[31m", "a\0b", "A man\nsleeps"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    *("q", "text", "source", "target", "format", "alternatives", "api_key", "beams", "stream", "scores"),
    *("max_new_tokens", "length_penalty", "no_repeat_ngram_size"),
)
GOOD = {"q": "A man", "text": "A man", "source": "en", "target": "de"}
TYPES = st.sampled_from(
    ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def answered(client: TestClient, path: str, content: bytes, kind: str) -> None:
    response = client.post(path, content=content, headers={"content-type": kind} if kind else {})
    assert response.status_code < 500
    if response.status_code != 200:
        [message] = response.json().values()
        assert "\n" not in message.strip()


@pytest.mark.parametrize("path", ["/translate", "/v1/translate"])
@FEW
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5), st.booleans())
def test_fields(client: TestClient, path: str, fields: dict[str, Any], is_good: bool) -> None:
    given = {**GOOD, **fields} if is_good else fields
    if path == "/v1/translate":
        given.pop("q", None)
    answered(client, path, json.dumps(given).encode(), "application/json")


@pytest.mark.parametrize("path", ["/translate", "/v1/translate"])
@FEW
@given(st.binary(max_size=200), TYPES)
def test_bytes(client: TestClient, path: str, content: bytes, kind: str) -> None:
    answered(client, path, content, kind)
