"""The processes: one that serves, or several behind one socket, where one that dies is replaced."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass
from multiprocessing.synchronize import Semaphore
from typing import Any

from fastapi import FastAPI
from uvicorn import Config, Server

from hf_nmsparse.serve.app import create_app
from hf_nmsparse.serve.http import Http
from hf_nmsparse.serve.keys import Keys
from hf_nmsparse.serve.limits import Limits
from hf_nmsparse.serve.metrics import FOLDER, forget_dead_processes
from hf_nmsparse.serve.models import load_models
from hf_nmsparse.serve.processes import CANNOT_START, end_with_the_parent, keep
from hf_nmsparse.terminal import named, one_line, plain, say

__all__ = ["Served", "serve"]


@dataclass(frozen=True)
class Served:
    """What is served, and how.

    Attributes:
        models: Names of the models, as `load_models` takes them.
        threads: How many texts or batches each of them translates at once, in each process.
        max_tokens: Most tokens of a batch.
        compute: As `Translator` takes it.
        limits: Of a request.
        api_keys: The keys of who may translate.
        origins: Of pages elsewhere that may ask.
    """

    models: tuple[str, ...]
    threads: int
    max_tokens: int = 1024
    compute: str = "auto"
    limits: Limits = Limits()  # noqa: RUF009  # frozen
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Keys(self.api_keys)

    def app(self) -> FastAPI:
        """The application, with its models loaded.

        Raises:
            ValueError: As `load_models`.
        """
        models = load_models(self.models, self.threads, self.max_tokens, self.compute)
        return create_app(models, self.limits, self.api_keys, self.origins)


def serve(served: Served, host: str, port: int, workers: int = 1) -> None:
    """Serves until a signal says to stop, then finishes what was taken.

    Args:
        served: What.
        host: Name or address to listen on.
        port: Port to listen on; 0 takes a free one.
        workers: Processes, each with models of its own.

    Raises:
        OSError: The address is not to be had.
        ValueError: A model does not load.
    """
    _log_plainly()
    listening = _listen(host, port)
    with listening:
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        told = f"nmsparse: {address} translates {', '.join(served.models)}"
        if workers == 1:
            app = served.app()
            _tell(told)
            _run(app, served.limits, listening)
            return
        with tempfile.TemporaryDirectory(prefix="nmsparse-metrics-") as folder:
            os.environ[FOLDER] = folder
            try:
                ended_by = keep(
                    workers,
                    _serve_in_a_process,
                    served,
                    listening,
                    at_work=lambda: _tell(f"{told} in {workers} processes"),
                    # Where nobody listens clients are refused at once, while the processes finish what they took.
                    at_stop=listening.close,
                )
            finally:
                del os.environ[FOLDER]
        signal.raise_signal(ended_by)  # as uvicorn does of one process, so that both end with the same status


def _serve_in_a_process(at_work: Semaphore, served: Served, listening: socket.socket) -> None:
    _log_plainly()
    end_with_the_parent()
    forget_dead_processes()
    try:
        app = served.app()
    except (ValueError, OSError) as error:
        say(f"nmsparse: {one_line(error)}", error=True)
        sys.exit(CANNOT_START)
    at_work.release()
    _run(app, served.limits, listening)


def _run(app: FastAPI, limits: Limits, listening: socket.socket) -> None:
    config = Config(
        app,
        http=Http,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.seconds + limits.body_seconds) + 1,
    )
    Server(config).run([listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"serve: cannot listen on {host} port {port}: {error}; name others") from error
    listening.set_inheritable(True)
    return listening


def _tell(text: str) -> None:
    say(text)
    sys.stdout.flush()


class _Plain(logging.Formatter):
    """One line a record, and tracebacks whose last line is plain too: what a client sends may be in either."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"nmsparse: {plain(record.getMessage(), breaks='')}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    def formatException(self, ei: Any) -> str:  # noqa: N802
        _, error, frames = ei
        return f"{''.join(traceback.format_tb(frames))}{plain(named(error), breaks='')}" if error else ""


def _log_plainly() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    handler.setLevel(logging.WARNING)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
