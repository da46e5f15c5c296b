"""The routes of LibreTranslate, and what they refuse."""

from __future__ import annotations

import gzip
import json
from typing import Any
from urllib.parse import urlencode

import pytest
from starlette.testclient import TestClient

from hf_nmsparse import Translator
from hf_nmsparse.placeholders import keeps_placeholders
from tests.serve.conftest import KEY, LIMITS
from tests.test_translator import TEXTS

PAIR = {"source": "en", "target": "de"}


def expected(translator: Translator, texts: list[str], **settings: Any) -> list[str]:
    return [one.text for one in translator.translate(texts, **settings)]


def refused(response: Any, status: int) -> str:
    """The error, in LibreTranslate's shape."""
    assert response.status_code == status
    assert response.json().keys() == {"error"}
    message: str = response.json()["error"]
    assert "\n" not in message
    return message


def posted(client: TestClient, fields: Any) -> Any:
    """What is answered to JSON that is written as ASCII, in which halves of characters can be."""
    return client.post("/translate", content=json.dumps(fields), headers={"content-type": "application/json"})


@pytest.mark.parametrize("form", ["json", "urlencoded", "multipart", "query"])
def test_a_text_comes_in_any_form(client: TestClient, translator: Translator, form: str) -> None:
    fields, given = {"q": TEXTS[0], **PAIR}, dict[str, Any]()
    if form == "multipart":
        given["files"] = {name: (None, value) for name, value in fields.items()}
    else:
        name = {"json": "json", "urlencoded": "data", "query": "params"}[form]
        given[name] = fields
    response = client.post("/translate", **given)
    assert response.status_code == 200
    assert response.json() == {"translatedText": expected(translator, [TEXTS[0]])[0]}


def test_a_form_is_utf_8_with_escapes_and_without(client: TestClient, translator: Translator) -> None:
    text = "ein Café für Hunde"
    escaped = client.post("/translate", data={"q": text, **PAIR}).json()
    raw = client.post(  # as `curl -d` sends it
        "/translate",
        content=f"q={text}&{urlencode(PAIR)}".encode(),
        headers={"content-type": "application/x-www-form-urlencoded"},
    ).json()
    assert raw == escaped == {"translatedText": expected(translator, [text])[0]}
    assert "the query is no UTF-8" in refused(client.post("/translate?q=Caf%E9&source=en&target=de"), 400)


def test_texts_come_in_a_list(client: TestClient, translator: Translator) -> None:
    response = client.post("/translate", json={"q": TEXTS, **PAIR, "format": "text", "api_key": ""})
    assert response.json() == {"translatedText": expected(translator, TEXTS)}
    assert client.post("/translate", json={"q": [], **PAIR}).json() == {"translatedText": []}
    response = client.post(
        "/translate",
        content=urlencode([*PAIR.items(), ("q", TEXTS[0]), ("q", TEXTS[1])]),
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    assert response.json() == {"translatedText": expected(translator, TEXTS[:2])}


def test_alternatives(client: TestClient, translator: Translator) -> None:
    best = translator.translate(TEXTS[:2], num_beams=4, num_return_sequences=4)
    answer = client.post("/translate", json={"q": TEXTS[:2], **PAIR, "alternatives": 3}).json()
    assert answer["translatedText"] == [one.text for one in best]
    for given, one in zip(answer["alternatives"], best, strict=True):
        assert given == [text for text in dict.fromkeys(other.text for other in one.alternatives) if text != one.text]
    form = client.post("/translate", data={"q": TEXTS[0], **PAIR, "alternatives": "3"}).json()
    assert form == {"translatedText": answer["translatedText"][0], "alternatives": answer["alternatives"][0]}


def test_a_paragraph_comes_sentence_by_sentence(client: TestClient, translator: Translator) -> None:
    one, two = expected(translator, ["A dog.", "a b"])
    answer = client.post("/translate", json={"q": ["A dog.  a b\n\nA dog.", "", " a b"], **PAIR}).json()
    assert answer == {"translatedText": [f"{one}  {two}\n\n{one}", "", f" {two}"]}
    long = "a b c d " * 20  # 80 words, where the model takes 64 tokens
    answer = client.post("/translate", json={"q": long, **PAIR}).json()
    assert answer == {"translatedText": translator.translate([long])[0].text}


def test_html(client: TestClient, translator: Translator) -> None:
    pages = ["<p>A <b>dog</b> runs. a b<p>c <code>d</code>", "", "a &amp; b", "<p></p>"]
    expected_pages = translator.translate_html(pages)
    assert expected_pages[0].count("<b>") == expected_pages[0].count("<code>d</code>") == 1
    asked = {**PAIR, "format": "html"}
    assert client.post("/translate", json={"q": pages, **asked}).json() == {"translatedText": expected_pages}
    assert client.post("/translate", data={"q": pages[0], **asked}).json() == {"translatedText": expected_pages[0]}


@pytest.mark.parametrize("path", ["/translate", "/v1/translate"])
def test_a_compressed_body(client: TestClient, path: str) -> None:
    fields = {"q" if path == "/translate" else "text": "A man", **PAIR}
    content, headers = json.dumps(fields).encode(), {"Content-Type": "application/json"}
    response = client.post(path, content=gzip.compress(content), headers={**headers, "Content-Encoding": "gzip"})
    told = refused(response, 415)
    assert told == "content-encoding: takes a body as it is, got 'gzip'; send it without compression"
    assert response.headers["accept-encoding"] == "identity"
    assert client.post(path, content=content, headers={**headers, "Content-Encoding": "Identity"}).status_code == 200


def test_placeholders_come_back(client: TestClient) -> None:
    answer = client.post("/translate", json={"q": "A {dog} runs. %s b", **PAIR}).json()
    assert keeps_placeholders("A {dog} runs. %s b", answer["translatedText"])


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"q": None}, 400, "q is a text or a list of texts, got none"),
        ({"q": 3}, 400, "q is a text or a list of texts, got int"),
        ({"q": ["a", 3]}, 400, "q is a text or a list of texts, got list"),
        ({"q": "\ud800"}, 400, "half a character"),
        ({"q": ["a", "b. c\0"]}, 400, "sentence 1 holds a NUL, which no text does; take it out"),
        ({"q": "<p>a\0</p>", "format": "html"}, 400, "sentence 0 holds a NUL"),
        ({"source": "auto"}, 400, "source auto: no language is detected here; name one of en"),
        ({"source": "fr"}, 400, "source 'fr' is not translated here; name one of en"),
        ({"target": "fr"}, 400, "en is not translated into 'fr' here; name one of de"),
        ({"target": "en"}, 400, "en is not translated into 'en' here; name one of de"),
        ({"target": ["de"]}, 400, "target is the code of a language"),
        ({"format": "xml"}, 400, "format is text or html, got 'xml'"),
        ({"format": "html", "alternatives": 1}, 400, "alternatives are of text without markup"),
        ({"format": "html", "q": ["a"] * 21}, 413, "a request takes 20 texts, got 21"),
        ({"alternatives": 8}, 400, "alternatives are 0 to 7, got '8'"),
        ({"alternatives": -1}, 400, "alternatives are 0 to 7"),
        ({"alternatives": True}, 400, "alternatives are 0 to 7"),
        ({"alternatives": "9" * 5000}, 400, "alternatives are 0 to 7"),
        ({"q": "a" * 401}, 413, "a request takes 400 characters, got 401"),
        ({"q": ["a"] * 21}, 413, "a request takes 20 texts, got 21"),
    ],
)
def test_what_is_refused(client: TestClient, fields: dict[str, Any], status: int, message: str) -> None:
    assert message in refused(posted(client, {"q": "a", **PAIR, **fields}), status)


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "no JSON"),
        (b"[" * 100_000, "application/json", 413, "a body takes"),
        (b"[" * 60_000, "application/json", 400, "no JSON"),
        (b"[1]", "application/json", 400, "a JSON object, got list"),
        (b'{"q": "\xff"}', "application/json", 400, "no JSON"),
        (b"q=a", "text/plain", 415, "content-type: takes application/json"),
        (b"--x\r\n", "multipart/form-data", 400, "no form"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", 400, "q is a text"),
        (b"&".join([b"a=1"] * 400), "application/x-www-form-urlencoded", 400, "no form"),
        (b"q=Caf%E9", "application/x-www-form-urlencoded", 400, "the body is no UTF-8"),
        (b"q=Caf\xe9", "application/x-www-form-urlencoded", 400, "the body is no UTF-8"),
        (b"", "", 400, "q is a text"),
    ],
)
def test_malformed_bodies(client: TestClient, body: bytes, kind: str, status: int, message: str) -> None:
    headers = {"content-type": kind} if kind else {}
    assert message in refused(client.post("/translate", content=body, headers=headers), status)


def test_a_body_that_is_too_long_is_not_read(client: TestClient) -> None:
    for length in (str(LIMITS.body_bytes + 1), "9" * 5000, "-1"):
        response = client.post("/translate", content=b"", headers={"content-length": length})
        assert "a body takes" in refused(response, 413)
    assert response.headers["connection"] == "close"


def test_what_is_known_of_the_server(client: TestClient) -> None:
    assert client.get("/languages").json() == [
        {"code": "en", "name": "English", "targets": ["de"]},
        {"code": "de", "name": "German", "targets": []},
    ]
    assert client.get("/health").json() == {"status": "ok"}
    settings = client.get("/frontend/settings").json()
    assert settings["charLimit"] == 400
    assert settings["keyRequired"] is False
    assert settings["language"] == {
        "source": {"code": "en", "name": "English"},
        "target": {"code": "de", "name": "German"},
    }
    assert "no language is detected here" in refused(client.post("/detect", data={"q": "a"}), 501)
    assert refused(client.get("/translate"), 405) == "Method Not Allowed"
    assert refused(client.post("/translate_file"), 404) == "Not Found"


def test_keys(locked: TestClient, client: TestClient) -> None:
    fields = {"q": "a", **PAIR}
    assert "an API key is needed" in refused(locked.post("/translate", json=fields), 403)
    for wrong in ("geheim", "", 3, ["other"], "\ud800"):
        assert "API key" in refused(posted(locked, {**fields, "api_key": wrong}), 403)
    assert locked.post("/translate", json={**fields, "api_key": KEY}).status_code == 200
    assert locked.post("/translate", data={**fields, "api_key": "other"}).status_code == 200
    bearer = {"Authorization": "bearer other"}
    assert locked.post("/translate", json=fields, headers=bearer).status_code == 200
    assert "unknown" in refused(locked.get("/metrics", headers={"Authorization": "Bearer no"}), 403)
    assert locked.get("/metrics", headers=bearer).status_code == 200
    assert "an API key is needed" in refused(locked.post("/v1/translate", json={"text": "a", **PAIR}), 403)
    for path in ("/", "/health", "/languages"):
        assert locked.get(path).status_code == 200
    assert locked.get("/frontend/settings").json()["keyRequired"] is True
