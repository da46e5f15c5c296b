"""The server as a process: with clients of others, with clients that misbehave, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from libretranslatepy import LibreTranslateAPI

from hf_nmsparse import Translator
from hf_nmsparse.cli import main
from hf_nmsparse.paragraphs import Paragraphs
from tests.serve.test_libretranslate import PAIR
from tests.test_translator import TEXTS

MANY = 1_000


class Process:
    """`nmsparse serve` in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "hf_nmsparse", "serve", f"en:de={folder}", "--port", "0", *options]
        environment = os.environ | {"NMSPARSE_API_KEY": "secret"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        assert self.said.startswith("nmsparse: http://127.0.0.1:"), self.end()
        self.port = int(self.said.split()[1].rpartition(":")[2])

    def end(self, number: int = signal.SIGTERM) -> str:
        """Tells it to stop; what it has said on standard error."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        said: str = self.process.communicate(timeout=60)[1]
        return said

    def ask(self, path: str = "/translate", **fields: Any) -> tuple[int, Any]:
        """What is answered to one request on a connection of its own."""
        body = json.dumps({"q": "A man", **PAIR, "api_key": "secret", **fields})
        headers = {"Content-Type": "application/json", "Connection": "close"}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def counted(self, name: str) -> float:
        """What Prometheus would read."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET", "/metrics", headers={"Authorization": "Bearer secret"})
            lines = connection.getresponse().read().decode().splitlines()
        [found] = [float(line.split()[1]) for line in lines if line.startswith(f"{name} ")]
        return found

    def open(self, sent: bytes = b"") -> socket.socket:
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        opened.sendall(sent)
        return opened


Start = Callable[..., Process]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    started: list[Process] = []

    def process(*options: str) -> Process:
        started.append(Process(folder, *options))
        return started[-1]

    yield process
    for one in started:
        one.end()


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Process]:
    process = Process(folder, "--threads", "2", "--max-characters", "1000")
    yield process
    process.end()


def head(length: int) -> bytes:
    return (
        b"POST /translate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length
    )


def test_a_client_of_libretranslate(running: Process, translator: Translator) -> None:
    client = LibreTranslateAPI(f"http://127.0.0.1:{running.port}", api_key="secret")
    assert client.translate(TEXTS[0], "en", "de") == translator.translate([TEXTS[0]])[0].text
    assert [language["code"] for language in client.languages()] == ["en", "de"]
    with pytest.raises(urllib.error.HTTPError, match="501"):
        client.detect("Hello")
    stranger = LibreTranslateAPI(f"http://127.0.0.1:{running.port}/")
    with pytest.raises(urllib.error.HTTPError, match="403") as refused:
        stranger.translate("Hello", "en", "de")
    assert "an API key is needed" in json.loads(refused.value.read())["error"]


def test_torch_is_not_there(running: Process) -> None:
    maps = Path(f"/proc/{running.process.pid}/maps")
    if not maps.exists():
        pytest.skip("there is no /proc")
    assert "libtorch" not in maps.read_text()
    assert "libnmsparse" in maps.read_text()


def test_clients_that_misbehave(running: Process) -> None:
    """None of them keeps others from their answer."""
    header = b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000
    given = {
        b"": b"",  # says nothing
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03": b"400",  # TLS
        b"GET /health HTTP/1.1\r\nHost": b"",
        header: b"",
        head(40) + b'{"q": ': b"",
        head(10**9): b"413",
        b"POST /translate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"4000\r\n%s\r\n" % (b" " * 0x4000) * 9: b"413",
    }
    opened = {sent: running.open() for sent in given}
    for sent, connection in opened.items():
        with suppress(ConnectionError):  # it may be closed before all is sent
            connection.sendall(sent)
    assert running.ask()[0] == 200
    for sent, connection in opened.items():
        if given[sent]:
            assert given[sent] in connection.recv(100).split(b"\r\n")[0]
    with suppress(ConnectionError):
        assert opened[header].recv(100) == b""  # closed, for it is too long
    for connection in opened.values():
        connection.close()
    assert running.ask()[0] == 200


def test_many_connections(running: Process, translator: Translator) -> None:
    """A thousand are open at once, and each has its answer."""
    body = json.dumps({"q": TEXTS[0], **PAIR, "api_key": "secret"}).encode()
    opened = [running.open() for _ in range(MANY)]
    for connection in opened:
        connection.sendall(head(len(body)) + body)
    expected = translator.translate([TEXTS[0]])[0].text
    for connection in opened:
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert json.loads(response.read()) == {"translatedText": expected}
        connection.close()


def test_it_finishes_what_it_took(start: Start) -> None:
    process = start("--threads", "1")
    texts = [f"{TEXTS[0]} {number}" for number in range(100)]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(process.ask, q=texts, alternatives=7) for _ in range(4)]
        time.sleep(0.3)
        assert process.end() == ""
    assert [one.result()[0] for one in asked] == [200] * 4
    with pytest.raises(ConnectionError):
        process.open()


@pytest.mark.long  # as below, what rarely happens: seconds each, of processes that begin and end
def test_told_twice_it_ends_with_what_is_under_way(start: Start) -> None:
    """Though its threads have more to do, and nobody has closed what they work for."""
    process = start("--threads", "1", "--max-tokens", "50")
    texts = [f"{TEXTS[0]} {number}" for number in range(250)]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(process.ask, q=texts, alternatives=7) for _ in range(4)]
        while not process.counted("nmsparse_sentences_total"):
            time.sleep(0.01)
        process.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.end(signal.SIGINT)
    assert any(one.exception() for one in asked)


def processes_of(parent: int) -> list[int]:
    """Those of a parent that serve."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="there is no /proc")
def test_a_process_that_is_killed_is_replaced(start: Start) -> None:
    process = start("--workers", "2", "--threads", "1")
    assert process.ask()[0] == 200
    before = processes_of(process.process.pid)
    assert len(before) == 2
    over, statuses, asked = threading.Event(), list[int](), len(Paragraphs(TEXTS).sentences)

    def keep_asking() -> None:
        while not over.is_set():
            try:
                statuses.append(process.ask(q=TEXTS)[0])
            except (ConnectionError, http.client.HTTPException):  # of the one that was killed, and at once
                statuses.append(0)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking) for _ in range(4)]
        time.sleep(0.3)
        os.kill(before[0], signal.SIGKILL)
        while len(set(processes_of(process.process.pid)) - set(before)) < 1:
            time.sleep(0.05)
        over.set()
        for one in asking:
            one.result(60)
    assert set(statuses) <= {0, 200}
    assert statuses.count(0) <= 4
    assert process.counted("nmsparse_sentences_total") >= 1 + asked * statuses.count(200)  # by all, the killed one too
    assert process.end() == ""


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_status_says_by_which_signal_it_ended(start: Start, workers: str, number: int) -> None:
    process = start("--workers", workers, "--threads", "1")
    assert process.ask()[0] == 200
    assert process.end(number) == ""
    assert process.process.returncode == 128 + number


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="there is no /proc")
def test_no_process_outlives_its_parent(start: Start) -> None:
    process = start("--workers", "2", "--threads", "1")
    assert process.ask()[0] == 200
    children = processes_of(process.process.pid)
    assert "Traceback" not in process.end(signal.SIGKILL)
    until = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none"], "nmsparse: no folder none"),
        (["en:de=none", "--workers", "2"], "a process did not start"),
        (["x", "--port", "65536"], "needs a number of at most 65535"),
        (["x", "--host", "256.256.256.256"], "cannot listen on 256.256.256.256 port"),
        (["x", "--api-key", "ü"], "an API key is of ASCII"),
        (["x", "--max-tokens", "0"], "needs a number of at least 1"),
    ],
)
def test_what_does_not_start(options: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    given = [*options] if "--port" in options else [*options, "--port", "0"]
    assert main(["serve", *given]) == 2
    out, said = capfd.readouterr()
    assert out == ""  # which says what is served once it is
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_port_that_is_taken(running: Process, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "x", "--port", str(running.port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {running.port}" in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("hf_nmsparse.commands.find_spec", lambda name: None if name == "fastapi" else name)
    assert main(["serve", "x"]) == 2
    assert capsys.readouterr().err == "nmsparse: serve needs fastapi: pip install 'hf-nmsparse[serve]'\n"
