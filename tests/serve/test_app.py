"""What becomes of errors and of clients that go away, and what is counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from hf_nmsparse.paragraphs import Paragraphs
from hf_nmsparse.serve import Limits, create_app, load_models
from hf_nmsparse.translations import Translation
from tests.serve.test_libretranslate import PAIR, refused


class Slow:
    """A translator that takes its time, or fails."""

    tokenizer = SimpleNamespace()

    def __init__(self, path: str, **_: Any) -> None:
        self.begun: list[str] = []
        self.closed = 0

    def paragraphs(self, texts: list[str], **_: Any) -> Paragraphs:
        return Paragraphs(texts, None, lambda sentences: list(map(len, sentences)))

    def translate(self, texts: list[str], **settings: Any) -> list[Translation]:
        if settings.get("src_lang"):
            raise ValueError("one pair")
        self.begun += texts
        for text in texts:
            if text.startswith("sleep"):
                time.sleep(float(text.split()[1]))
            if text == "fail":
                raise ValueError("engine: it cannot\n\x1b[31m")
            if text == "crash":
                raise RuntimeError("of the model\x1b[31m")
        return [Translation(text.upper(), ()) for text in texts]

    def stream(self, text: str, **_: Any) -> Iterator[str]:
        try:
            for piece in text.split():
                time.sleep(0.05)
                if piece == "fail":
                    raise ValueError("engine: it cannot")
                yield piece
        finally:
            self.closed += 1


def served(seconds: float = 20.0, **limits: Any) -> tuple[FastAPI, Slow]:
    models = load_models(["en:de=x"], threads=1, load=Slow)
    translator: Any = models._models[0].translator
    return create_app(models, Limits(seconds=seconds, **limits)), translator


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(served()[0], raise_server_exceptions=False) as client:
        yield client


def test_what_the_model_cannot_do(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "hf_nmsparse"):
        message = refused(client.post("/translate", json={"q": ["a", "fail"], **PAIR}), 500)
    assert message.startswith("engine: it cannot")
    assert r"\n\x1b[31m" in caplog.text
    assert "\x1b" not in caplog.text


def test_what_nobody_foresaw(client: TestClient) -> None:
    message = refused(client.post("/translate", json={"q": "crash", **PAIR}), 500)
    assert message == "something is wrong here, which the server's log names"
    assert 'nmsparse_requests_total{path="/translate",status="500"} 1.0' in client.get("/metrics").text
    assert client.post("/translate", json={"q": "a", **PAIR}).json() == {"translatedText": "A"}


def test_what_takes_too_long() -> None:
    app, translator = served(seconds=0.2)
    with TestClient(app) as client:
        began = time.perf_counter()
        response = client.post("/translate", json={"q": ["sleep 1", "after"], **PAIR})
        assert "no translation within 0.2 seconds" in refused(response, 503)
        assert response.headers["retry-after"] == "10"
        assert time.perf_counter() - began < 0.9
        response = client.post("/v1/translate", json={"text": "a " * 40, **PAIR, "stream": True})
        assert response.text.rpartition("event: ")[2].startswith('error\ndata: {"error": "no translation within')
    assert translator.closed == 1


def test_a_stream_that_fails(client: TestClient) -> None:
    response = client.post("/v1/translate", json={"text": "a fail b", **PAIR, "stream": True})
    assert response.text == (
        'event: message\ndata: {"text": "a"}\n\nevent: error\ndata: {"error": "engine: it cannot"}\n\n'
    )


async def send(app: FastAPI, path: str, body: bytes, gone: asyncio.Event) -> list[Any]:
    """What an application sends to a client that goes away when it is told to."""
    sent: list[Any] = []
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
    }
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "headers": [], "client": None}
    scope |= {"scheme": "http", "server": ("x", 1), "root_path": "", "state": {}}
    given = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        for message in given:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def collect(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, collect)
    return sent


def test_a_text_whose_client_went_away_is_not_translated() -> None:
    async def run() -> list[Any]:
        app, translator = served()
        async with app.router.lifespan_context(app):
            leaves, stays = asyncio.Event(), asyncio.Event()
            body = b'{"q": "%s", "source": "en", "target": "de"}'
            first = asyncio.create_task(send(app, "/translate", body % b"sleep 0.5", stays))
            await asyncio.sleep(0.1)
            second = asyncio.create_task(send(app, "/translate", body % b"gone", leaves))
            await asyncio.sleep(0.1)
            leaves.set()
            assert (await second)[0]["status"] == 499
            assert (await first)[0]["status"] == 200
        assert translator.begun == ["sleep 0.5"]
        return translator.begun

    asyncio.run(run())


def test_a_stream_whose_client_went_away_ends() -> None:
    async def run() -> None:
        app, translator = served()
        async with app.router.lifespan_context(app):
            leaves = asyncio.Event()
            body = b'{"text": "%s", "source": "en", "target": "de", "stream": true}' % (b"a " * 40)
            streamed = asyncio.create_task(send(app, "/v1/translate", body, leaves))
            await asyncio.sleep(0.2)
            leaves.set()
            assert 1 < len(await streamed) < 20
        assert translator.closed == 1

    asyncio.run(run())


def test_too_many_wait() -> None:
    async def run() -> None:
        app, _ = served(waiting=2)
        async with app.router.lifespan_context(app):
            stays, body = asyncio.Event(), b'{"q": "sleep 0.3", "source": "en", "target": "de"}'
            tasks = []
            for _ in range(5):
                tasks.append(asyncio.create_task(send(app, "/translate", body, stays)))
                await asyncio.sleep(0.02)
            statuses = [sent[0]["status"] for sent in await asyncio.gather(*tasks)]
        assert statuses == [200, 200, 200, 429, 429]

    asyncio.run(run())


def test_what_is_counted(client: TestClient) -> None:
    for text in ("ab", ["c", "d"]):
        client.post("/translate", json={"q": text, **PAIR})
    client.get("/none/%1b[31m")
    client.post("/translate", json={"q": "a", "source": "fr", "target": "de"})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    for line in (
        'nmsparse_requests_total{path="/translate",status="200"} 2.0',
        'nmsparse_requests_total{path="/translate",status="400"} 1.0',
        'nmsparse_requests_total{path="unknown",status="404"} 1.0',
        'nmsparse_request_seconds_count{path="/translate"} 3.0',
        "nmsparse_sentences_total 3.0",
        "nmsparse_source_tokens_total 4.0",
        "nmsparse_wait_seconds_count 3.0",
        "nmsparse_waiting_sentences 0.0",
    ):
        assert line in lines
    assert "31m" not in response.text


def test_limits_above_zero() -> None:
    with pytest.raises(ValueError, match="limits: texts needs to be above 0, got 0"):
        Limits(texts=0)


def test_pages_elsewhere_may_ask_where_they_are_named() -> None:
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for origins, allowed in (((), None), (("https://a.example",), "https://a.example"), (("https://b.example",), None)):
        app = create_app(load_models(["en:de=x"], threads=1, load=Slow), origins=origins)
        with TestClient(app) as client:
            assert client.options("/translate", headers=preflight).headers.get("access-control-allow-origin") == allowed
            response = client.post("/translate", json={"q": "a", **PAIR}, headers={"Origin": "https://a.example"})
            assert response.headers.get("access-control-allow-origin") == allowed
