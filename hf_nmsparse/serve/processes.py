"""Processes that do the same: one that dies is replaced, all of them are told to stop, and none outlives the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

__all__ = ["CANNOT_START", "end_with_the_parent", "keep"]

CANNOT_START = 3
"""What a process ends with where another in its place would fail as well."""

_LOOK_SECONDS = 0.2
_YOUNG_SECONDS = 5.0  # one that dies sooner is replaced after a pause, so that no machine is kept busy by it
_PAUSE_SECONDS = 1.0


def keep(
    count: int,
    target: Callable[..., None],
    *arguments: Any,
    at_work: Callable[[], None],
    at_stop: Callable[[], None],
) -> int:
    """Keeps so many processes going until a signal says to stop, and waits for their ends.

    Args:
        count: How many.
        target: What each does; SIGTERM is to end it. It is given a semaphore, which it releases once it is at work.
        *arguments: What each is given beside that.
        at_work: Called once so many are at work.
        at_stop: Called before they are told to stop.

    Returns:
        The signal.

    Raises:
        ValueError: One could not start.
    """
    context, stop = multiprocessing.get_context("spawn"), threading.Event()
    begun, idle = context.Semaphore(0), count
    signals: list[int] = []

    def begin() -> tuple[Any, float]:
        process = context.Process(target=target, args=(begun, *arguments))
        process.start()
        return process, time.monotonic()

    def told(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        stop.set()

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    failed = False
    running: list[tuple[Any, float]] = []
    try:
        running += (begin() for _ in range(count))
        while not stop.is_set():
            wait([process.sentinel for process, _ in running], _LOOK_SECONDS)
            while idle and begun.acquire(block=False):
                idle -= 1
                if not idle:
                    at_work()
            for place, (process, began) in enumerate(running):
                if process.is_alive() or stop.is_set():
                    continue
                if process.exitcode == CANNOT_START:
                    failed = True
                    stop.set()
                elif time.monotonic() - began > _YOUNG_SECONDS or not stop.wait(_PAUSE_SECONDS):
                    running[place] = begin()
    finally:
        at_stop()
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed:
        raise ValueError("serve: a process did not start; what it said is above")
    return signals[0]


def end_with_the_parent() -> None:
    """Lets this process stop, as if it was told to, where its parent is no more."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="nmsparse-parent", daemon=True).start()
