"""Files that are there whole or not at all, whenever the writing process is killed and whoever else writes there."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":  # where folders cannot be locked
    import fcntl

__all__ = ["check_writable", "flush", "locked", "model_folder", "named_path", "naming", "replaced"]

_UNFINISHED = ".nmsparse-saving-"

# The weights of a model as transformers names them; other files of like names are the user's.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


# What writing alone fails with, and the system does not say where: a full disk, a quota, a file that grows too long.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def named_path(name: str | Path, what: str) -> Path:
    """The path that a name is of. An empty name, as of a variable of a shell that is not set, is refused.

    Args:
        name: The name. `Path` takes an empty one for the current folder.
        what: What it is given as, which begins the message of an error.

    Raises:
        ValueError: It is empty.
    """
    if not str(name):
        raise ValueError(f"{what} is empty; name a path, as . for the current folder")
    return Path(name)


@contextmanager
def naming(name: str | Path) -> Iterator[None]:
    """Says in the error of a full disk what could not be written, where it says nothing of it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            raise OSError(error.errno, f"{name} could not be written: {error.strerror}") from error
        raise


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A path to write to; what stands there at the end takes the place of ``path`` in one move.

    It may be a folder where ``path`` is not there yet. Folders above it are made as needed. Where the block fails,
    ``path`` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        beside = Path(folder) / path.name
        yield beside
        flush(beside)
        beside.replace(path)


@contextmanager
def model_folder(path: str | Path) -> Iterator[Path]:
    """A folder inside of ``path`` to save a model to; its files move to ``path`` once all of them are written.

    No reader takes a mixture of two models for one: ``config.json`` of the old model goes first, its weights go where
    the new ones do not replace them, and ``config.json`` of the new model comes last. Without it nothing loads the
    folder. Of several processes that save there at a time each moves its files alone, and the last one's model stays.
    Other files of ``path`` stay. Where the block fails before any file moves, so does the old model, and a folder that
    was not there before is not there then.
    """
    path = Path(path)
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):  # no other process takes the folder for left behind before it is locked
        beside = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=path))
        lock = _lock(beside)
    try:
        yield beside
        flush(beside)
        with locked(path):
            _move(beside, path)
            _sweep(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        _unlock(lock)
        if new:
            with suppress(OSError):  # it holds something now
                path.rmdir()


def _move(beside: Path, path: Path) -> None:
    """Moves a saved model to where it belongs."""
    written = sorted(beside.iterdir(), key=lambda file: file.name == "config.json")
    if not written:  # a process that leaves the writing to another
        return
    (path / "config.json").unlink(missing_ok=True)
    for old in path.iterdir():
        if _WEIGHTS.fullmatch(old.name) and not (beside / old.name).exists():
            old.unlink()
    for file in written:
        if file.name == "config.json":
            flush(path)
        file.replace(path / file.name)
    flush(path)


def _sweep(path: Path) -> None:
    """Removes what killed processes left in ``path``: unfinished folders that nobody holds."""
    for left in path.glob(f"{_UNFINISHED}*"):
        lock = _lock(left, wait=False)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            _unlock(lock)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds ``folder`` alone among the processes that ask for it; the lock ends with the process at the latest."""
    lock = _lock(folder)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(folder: Path, wait: bool = True) -> int | None:
    """Locks ``folder`` until `_unlock` gets the descriptor that is returned, or the process ends.

    None if it is held elsewhere and ``wait`` is false, if it is a link or gone, or where folders cannot be locked.
    """
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW if not wait else os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if sys.platform != "win32" and descriptor is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile has the descriptor open, too
        os.close(descriptor)


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
