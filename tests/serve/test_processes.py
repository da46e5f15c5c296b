from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import pytest

from hf_nmsparse.serve.processes import CANNOT_START, keep


def leave_a_mark(at_work: Semaphore, folder: Path, ends: int | None) -> None:
    """Says that it was here; ends by itself, or when it is told to."""
    (folder / str(os.getpid())).touch()
    at_work.release()
    if ends is not None:
        sys.exit(ends)
    while True:
        time.sleep(0.05)


def nothing() -> None:
    pass


def stop_after(folder: Path, marks: int) -> threading.Thread:
    def watch() -> None:
        while len(list(folder.iterdir())) < marks:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_they_go_on_until_they_are_told_to_stop(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    steps: list[str] = []

    def at_work() -> None:
        steps.append(f"{len(list(tmp_path.iterdir()))} at work")
        os.kill(os.getpid(), signal.SIGTERM)

    told = keep(2, leave_a_mark, tmp_path, None, at_work=at_work, at_stop=lambda: steps.append("stopping"))
    assert told == signal.SIGTERM
    assert steps == ["2 at work", "stopping"]
    assert signal.getsignal(signal.SIGTERM) is before
    for mark in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(mark.name), 0)


def test_one_that_ends_is_replaced_after_a_pause(tmp_path: Path) -> None:
    watching, began = stop_after(tmp_path, 2), time.monotonic()
    keep(1, leave_a_mark, tmp_path, 1, at_work=nothing, at_stop=nothing)
    watching.join()
    assert time.monotonic() - began > 1


def test_none_outlives_what_fails_here(tmp_path: Path) -> None:
    def at_work() -> None:
        raise BrokenPipeError  # as where nobody reads what is said

    with pytest.raises(BrokenPipeError):
        keep(2, leave_a_mark, tmp_path, None, at_work=at_work, at_stop=nothing)
    for mark in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(mark.name), 0)


def test_one_that_cannot_start_ends_them_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a process did not start"):
        keep(2, leave_a_mark, tmp_path, CANNOT_START, at_work=nothing, at_stop=nothing)
    assert len(list(tmp_path.iterdir())) <= 2
