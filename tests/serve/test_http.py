"""Headers and bodies that do not come."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from hf_nmsparse.serve import Limits, create_app, http, load_models
from tests.serve.conftest import running
from tests.serve.test_app import Slow

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /translate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
BODY = b'{"q": "sleep 0.6", "source": "en", "target": "de"}'


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    patch = pytest.MonkeyPatch()
    patch.setattr(http, "_HEADER_SECONDS", 0.3)
    app = create_app(load_models(["en:de=x"], threads=1, load=Slow), Limits(body_seconds=0.3))
    with running(app, http=http.Http) as port:
        yield port
    patch.undo()


def answers(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        while part := connection.recv(4096):
            found += part
    return found


@pytest.mark.parametrize("sent", [b"", b"GET /health", b"GET /health HTTP/1.1\r\nX: " + b"a" * 1_000])
def test_a_header_that_does_not_come(port: int, sent: bytes) -> None:
    began = time.perf_counter()
    assert answers(port, sent) == b""
    assert 0.2 < time.perf_counter() - began < 4


def test_a_later_header_that_does_not_come(port: int) -> None:
    began = time.perf_counter()
    found = answers(port, HEALTH, HEALTH, b"GET /hea", pause=0.1)
    assert found.count(b"200 OK") == 2
    assert time.perf_counter() - began < 4  # a connection that is kept and says nothing is kept for five seconds


@pytest.mark.parametrize("path", ["/", "/health", "/languages", "/frontend/settings", "/metrics"])
def test_the_head_alone(port: int, path: str) -> None:
    """As a load balancer may ask for it."""

    def head(method: str) -> tuple[list[str], bytes]:
        request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        first, body = answers(port, request.encode()).split(b"\r\n\r\n", 1)
        lines = first.decode().lower().split("\r\n")
        return [line for line in lines if not line.startswith(("date:", "content-length:"))], body

    (with_body, body), (alone, nothing) = head("GET"), head("HEAD")
    assert alone[0] == "http/1.1 200 ok"
    assert alone == with_body
    assert body
    assert not nothing


def test_a_header_in_pieces(port: int) -> None:
    assert (
        answers(port, b"GET /health HTTP/1.1\r\n", b"Host: x\r\nConnection: close\r\n\r\n", pause=0.1).count(b"200")
        == 1
    )


def test_a_header_that_is_too_long(port: int) -> None:
    with pytest.raises(ConnectionError):
        answers(port, b"GET /health HTTP/1.1\r\n", *[b"X: %s\r\n" % (b"a" * 4_000)] * 1_000)


def test_a_body_that_does_not_come(port: int) -> None:
    found = answers(port, POST % 100 + b'{"q":')
    assert found.startswith(b"HTTP/1.1 408 ")
    assert found.endswith(b'{"error":"the body did not come within 0.3 seconds; send it at once"}')


def test_who_waits_for_an_answer_is_not_hurried(port: int) -> None:
    sent = POST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") % len(BODY) + BODY
    assert answers(port, sent).endswith(b'{"translatedText":"SLEEP 0.6"}')
