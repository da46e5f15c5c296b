"""Processes that tests start: children of one that has imported everything, so that none of them imports it anew."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
SECONDS = 300  # a hang fails the test instead of stopping the suite

Done = subprocess.CompletedProcess[str]


def in_a_fresh_one(
    *command: object, fails: bool = False, environment: Mapping[str, str] = os.environ, **options: Any
) -> str:
    """Runs Python with these arguments in a process that imports everything anew.

    Args:
        *command: What stands behind ``python``: ``"-c", code`` and arguments.
        fails: Whether it is to fail.
        environment: Its environment, which gets OMP_NUM_THREADS=1.
        **options: As ``subprocess.run`` takes them; ``cwd`` is this project's folder otherwise.

    Returns:
        What it printed, or its standard error where it is to fail.
    """
    settings: dict[str, Any] = {"cwd": ROOT, "text": True, "timeout": SECONDS} | options
    if not {"stdout", "stderr"} & set(options):
        settings["capture_output"] = True
    settings["env"] = {**environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], check=False, **settings)
    assert bool(done.returncode) == fails, (done.stderr or done.stdout)[-3000:]
    return str(done.stderr if fails and done.stderr is not None else done.stdout)


def in_a_child(function: Callable[..., Any], *arguments: Any, **environment: str) -> Done:
    """Calls a module's function in a process of its own: its exit status, and what it printed."""
    [done] = in_children(function, arguments, [environment])
    return done


def in_two(function: Callable[..., Any], *arguments: Any) -> list[Done]:
    """Calls a module's function in two processes at once, with the environment that torchrun gives its two."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return in_children(function, arguments, [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")])


def fork_server() -> Any:
    """The context of the process whose children the others are; the first that is asked for decides what it imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recipes.wmt_en_de", "tests.test_trainer", "benchmarks.methods"])
    forkserver.ensure_running()
    return context


def in_children(
    function: Callable[..., Any], arguments: Sequence[Any], environments: Sequence[Mapping[str, str]]
) -> list[Done]:
    context = fork_server()
    with TemporaryDirectory() as folder:
        started: list[tuple[BaseProcess, list[Path]]] = []
        for number, environment in enumerate(environments):
            files = [Path(folder) / f"{number}.{name}" for name in ("stdout", "stderr")]
            process = context.Process(target=_child, args=(function, arguments, dict(environment), files))
            process.start()
            started.append((process, files))
        found = []
        for process, files in started:
            process.join(SECONDS)
            process.kill()
            process.join()
            assert process.exitcode is not None
            texts = [file.read_text(encoding="utf-8") if file.exists() else "" for file in files]
            found.append(subprocess.CompletedProcess(function.__name__, process.exitcode, *texts))
        return found


def _child(
    function: Callable[..., Any], arguments: Sequence[Any], environment: dict[str, str], files: list[Path]
) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    torch.set_num_threads(1)
    function(*arguments)
