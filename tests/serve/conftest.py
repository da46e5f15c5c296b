"""A packed model of random weights, and an application that serves it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from hf_nmsparse import Translator
from hf_nmsparse.kernels import engine
from hf_nmsparse.serve import Limits, create_app, load_models
from hf_nmsparse.translations import Translation
from tests import tiny
from tests.test_translator import random, saved

LIMITS = Limits(characters=400, texts=20, waiting=30, seconds=20, body_seconds=2)
KEY = "geheim-1/="


@contextmanager
def running(app: FastAPI, **config: Any) -> Iterator[int]:
    """The port of a server in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", **config))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if engine.why_not() is not None:
        pytest.skip("there is no native engine")
    path = saved(random(tiny.marian()), tmp_path_factory.mktemp("served") / "packed", "2:4")
    tiny.tokenizer().save_pretrained(path)
    return path


class AsServed(Translator):
    """What a server answers: sentence by sentence, no loops, and all placeholders."""

    def translate(self, texts: Iterable[str], **settings: Any) -> list[Translation]:
        return super().translate(texts, **{"split": True, "break_loops": True, "keep_placeholders": True, **settings})


@pytest.fixture(scope="session")
def translator(folder: Path) -> Translator:
    return AsServed(folder, threads=1)


@pytest.fixture(scope="session")
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(create_app(load_models([f"en:de={folder}"], threads=2), LIMITS)) as client:
        yield client


@pytest.fixture(scope="session")
def locked(folder: Path) -> Iterator[TestClient]:
    """A client of a server that asks for a key."""
    with TestClient(create_app(load_models([f"en:de={folder}"], threads=1), LIMITS, [KEY, "other"])) as client:
        yield client
