"""Files that are there whole or not at all, whenever the writing process is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_writable", "flush", "model_folder", "replaced"]


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; what stands there at the end takes the place of ``path`` in one move.

    It may be a folder where ``path`` is not there yet. Where the block fails, ``path`` stays as it was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        flush(beside)
        beside.replace(path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        beside.unlink(missing_ok=True)


@contextmanager
def model_folder(path: str | Path) -> Iterator[Path]:
    """A folder inside of ``path`` to save a model to; its files move to ``path`` once all of them are written.

    No reader takes a mixture of two models for one: ``config.json`` of the old model goes first, its weights go where
    the new ones do not replace them, and ``config.json`` of the new model comes last. Without it nothing loads the
    folder. Other files of ``path`` stay. Where the block fails before any file moves, so does the old model.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".saving-", dir=path))
    try:
        yield beside
        flush(beside)
        written = sorted(beside.iterdir(), key=lambda file: file.name == "config.json")
        if not written:  # a process that leaves the writing to another
            return
        (path / "config.json").unlink(missing_ok=True)
        for old in path.glob("model*.safetensors*"):
            if not (beside / old.name).exists():
                old.unlink()
        for file in written:
            if file.name == "config.json":
                flush(path)
            file.replace(path / file.name)
        flush(path)
        for left in path.glob(".saving-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until a file, or a folder with the files in it, is on the disk."""
    if path.is_dir():
        for file in path.iterdir():
            if file.is_file():
                flush(file)
        if os.name == "nt":  # which opens no folders
            return
    number = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def check_writable(folder: str | Path) -> None:
    """Makes ``folder`` and tries to write into it, so that a run fails before its training and not after.

    Raises:
        ValueError: It cannot be made, or nothing can be written there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise ValueError(
            f"output_dir: nothing can be written to {folder}: {error.strerror}; choose another folder"
        ) from error
