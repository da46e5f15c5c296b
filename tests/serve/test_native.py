"""The package's own route: scores, alternatives, pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from hf_nmsparse import Translation, Translator
from hf_nmsparse.placeholders import keeps_placeholders, placeholders
from tests.serve.test_libretranslate import PAIR, refused
from tests.test_translator import TEXTS


def asked(client: TestClient, text: Any, **fields: Any) -> Any:
    return client.post("/v1/translate", json={"text": text, **PAIR, **fields})


def is_one(given: dict[str, Any], translation: Translation) -> bool:
    """Whether an answer says of a translation what there is to say."""
    scores = translation.token_scores
    expected = {"text": translation.text, "score": translation.score, "token_scores": scores and list(scores)}
    alternatives = given.get("alternatives", [])
    return {name: given.get(name) for name in expected} == expected and all(
        map(is_one, alternatives, translation.alternatives)
    )


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, {}),
        ({"beams": 3}, {"num_beams": 3}),
        ({"beams": 2, "alternatives": 1, "scores": True}, {"num_beams": 2, "num_return_sequences": 2}),
        ({"alternatives": 2}, {"num_beams": 4, "num_return_sequences": 3}),
        ({"max_new_tokens": 3, "scores": True}, {"max_new_tokens": 3}),
        (
            {"beams": 2, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
            {"num_beams": 2, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
        ),
    ],
)
def test_translations(
    client: TestClient, translator: Translator, fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    best = translator.translate(TEXTS, return_scores="scores" in fields, **settings)
    answer = asked(client, TEXTS, **fields).json()
    assert answer["seconds"] > 0
    assert len(answer["translations"]) == len(TEXTS)
    assert all(map(is_one, answer["translations"], best))
    [one] = asked(client, TEXTS[0], **fields).json()["translations"]
    assert one == answer["translations"][0]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"text": 3}, 400, "text.str: Input should be a valid string"),
        ({"beams": 0}, 400, "beams: Input should be greater than or equal to 1"),
        ({"beams": "2"}, 400, "beams: Input should be a valid integer"),
        ({"beams": 9}, 400, "beams are at most 8"),
        ({"alternatives": 8}, 400, "beams are at most 8"),
        ({"beams": 2, "alternatives": 2}, 400, "3 translations need as many beams, got 2"),
        ({"max_new_tokens": 10_000}, 400, "max_new_tokens 10000 is beyond the 64 positions of the decoder"),
        ({"length_penalty": 1e9}, 400, "length_penalty is a number from"),
        ({"eval": "1"}, 400, "eval: Extra inputs are not permitted"),
        ({"target": "fr"}, 400, "not translated into 'fr'"),
        ({"stream": True, "scores": True}, 400, "stream: one text comes piece by piece"),
        ({"stream": True, "text": ["a"]}, 400, "stream: one text comes piece by piece"),
        ({"stream": True, "text": "a\0"}, 400, "sentence 0 holds a NUL"),
        ({"stream": True, "text": "a" * 401}, 413, "a request takes 400 characters"),
    ],
)
def test_what_is_refused(client: TestClient, fields: dict[str, Any], status: int, message: str) -> None:
    response = client.post("/v1/translate", json={"text": "a", **PAIR, **fields})
    assert message in refused(response, status)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"text": "\\ud800"}', b'{"length_penalty": NaN}', b"[" * 60_000])
def test_malformed_bodies(client: TestClient, body: bytes) -> None:
    refused(client.post("/v1/translate", content=body), 400)


def events(content: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events, of a name and data in one line each."""
    found = []
    for event in content.split("\n\n")[:-1]:
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.mark.parametrize("fields", [{}, {"beams": 3}])
def test_streams(client: TestClient, translator: Translator, fields: dict[str, Any]) -> None:
    for text in TEXTS:
        response = asked(client, text, stream=True, **fields)
        assert response.headers["content-type"].startswith("text/event-stream")
        *pieces, (last, data) = events(response.text)
        assert last == "done"
        assert data["seconds"] > 0
        assert data.keys() <= {"seconds", "text"}
        assert {name for name, _ in pieces} <= {"message"}
        kept = bool(placeholders(text))  # what holds none comes as it is made
        [expected] = translator.translate(
            [text], num_beams=fields.get("beams", 1), break_loops=kept, keep_placeholders=kept
        )
        assert "".join(piece["text"] for _, piece in pieces) == expected.text


LOOPS = "A man sleeps. The device is not connected."


def test_a_stream_that_loops_ends_with_the_whole(client: TestClient, translator: Translator) -> None:
    [whole] = translator.translate([LOOPS])
    assert whole.looped
    *pieces, (_, last) = events(asked(client, LOOPS, stream=True).text)
    assert last["text"] == whole.text == asked(client, LOOPS).json()["translations"][0]["text"]
    assert last["text"] != "".join(piece["text"] for _, piece in pieces)
    *_, (_, last) = events(asked(client, LOOPS, stream=True, no_repeat_ngram_size=2).text)
    assert last.keys() == {"seconds"}


def test_a_stream_keeps_placeholders(client: TestClient, translator: Translator) -> None:
    text = "Could not connect to {host}, see https://example.org/help."
    *pieces, _ = events(asked(client, text, stream=True).text)
    whole = "".join(piece["text"] for _, piece in pieces)
    assert keeps_placeholders(text, whole)
    assert whole == asked(client, text).json()["translations"][0]["text"]


def test_its_interface_is_described(client: TestClient) -> None:
    described = client.get("/openapi.json").json()["paths"]["/v1/translate"]["post"]
    body = described["requestBody"]["content"]["application/json"]["schema"]
    assert {"text", "source", "target", "beams", "stream"} <= body["properties"].keys()
    assert client.get("/docs").status_code == 404  # which would take its scripts from elsewhere
