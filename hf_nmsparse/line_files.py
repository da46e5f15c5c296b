"""Files that a command reads and writes, mostly text of one sentence a line; ``-`` is standard input or output."""

from __future__ import annotations

import codecs
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from hf_nmsparse.files import naming, replaced

__all__ = ["check_input", "check_output", "is_one_file", "read_lines", "reading", "writing", "writing_whole"]

_LONGEST_LINE = 1 << 26  # bytes; /dev/zero has one that does not end


def check_input(name: str) -> None:
    """Refuses what cannot be read."""
    if name == "-":
        if sys.stdin is None:
            raise ValueError("standard input is closed; open it or name a file")
    elif Path(name).is_dir():
        raise ValueError(f"{name} is a folder; name a file")
    elif not Path(name).exists():
        raise ValueError(f"no file {name}")


def check_output(output: str | None, *inputs: str | None) -> None:
    """Refuses a file that cannot be written or is one of the inputs."""
    if output == "-" and sys.stdout is None:
        raise ValueError("standard output is closed; open it or give --output FILE")
    if output is None or output == "-":
        return
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} to write {path.name} into")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: permission denied")
    if path.is_file() and any(name is not None and os.path.samestat(path.stat(), _state(name)) for name in inputs):
        raise ValueError(f"{path} is an input; name another output")


def is_one_file(one: str, other: str) -> bool:
    """Whether two names are of one file, there or not yet."""
    if Path(one).is_file() and Path(other).is_file():
        return Path(one).samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _state(name: str) -> os.stat_result:
    return os.fstat(sys.stdin.fileno()) if name == "-" else Path(name).stat()


def read_lines(name: str) -> list[str]:
    """All lines of a file."""
    with reading(name) as lines:
        return list(lines)


@contextmanager
def reading(name: str) -> Iterator[Iterator[str]]:
    """The lines of a file, of a pipe or of standard input, without what ends them."""
    check_input(name)
    if name == "-":
        yield _decoded(sys.stdin.buffer, "standard input")
        return
    with Path(name).open("rb") as file:
        yield _decoded(file, name)


def _decoded(file: IO[bytes], name: str) -> Iterator[str]:
    """Text of UTF-8. Only a line feed ends a line, with or without a carriage return before it."""
    for number, line in enumerate(iter(partial(file.readline, _LONGEST_LINE + 1), b"")):
        if len(line) > _LONGEST_LINE:
            raise ValueError(f"{name} is no text of lines: line {number + 1} has more than {_LONGEST_LINE:,} bytes")
        if number == 0:
            if line.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # begins as UTF-16 does
                raise ValueError(f"{name} is UTF-32; make it UTF-8, such as with iconv -f UTF-32 -t UTF-8")
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{name} is UTF-16; make it UTF-8, such as with iconv -f UTF-16 -t UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line:
                return
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 after line {number}; make it UTF-8, such as with iconv") from error
        if "\0" in text:
            raise ValueError(f"{name} is no text: line {number + 1} holds a NUL; make it UTF-8")
        yield text[:-1].removesuffix("\r") if text.endswith("\n") else text


@contextmanager
def writing(name: str) -> Iterator[IO[str]]:
    """A stream into a file, which takes its name once it is whole, or into what is open under that name."""
    if name == "-":
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        with naming("standard output"):
            yield sys.stdout
            sys.stdout.flush()
        return
    path = Path(name)
    how: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "newline": "\n"}
    for number in (1, 2):
        if _is_open(path, number):  # by way of /dev/stdout or not, what else goes there stays
            with naming(name), os.fdopen(os.dup(number), **how) as file:
                yield file
            return
    if _is_written_beside(path):
        path = Path(os.path.realpath(name))
        with replaced(path) as beside:
            with beside.open(**how) as file:
                yield file
            if path.exists():
                shutil.copymode(path, beside)
        return
    with naming(name), path.open(**how) as file:
        yield file


@contextmanager
def writing_whole(name: str) -> Iterator[IO[bytes]]:
    """A stream of bytes that go to a file, or to what is open under that name, once all are there."""
    path = Path(name)
    if name != "-" and not any(_is_open(path, number) for number in (1, 2)) and _is_written_beside(path):
        with writing(name) as file:
            yield _bytes_of(file)
        return
    with tempfile.TemporaryFile() as kept:
        yield kept
        kept.seek(0)
        with writing(name) as file:
            shutil.copyfileobj(kept, _bytes_of(file))


def _bytes_of(file: IO[str]) -> IO[bytes]:
    stream: IO[bytes] = file.buffer  # type: ignore[attr-defined]  # all that `writing` gives have one
    return stream


def _is_open(path: Path, number: int) -> bool:
    """Whether it is the file that a standard stream goes to."""
    try:
        return os.path.samestat(path.stat(), os.fstat(number))
    except OSError:  # no such file
        return False


def _is_written_beside(path: Path) -> bool:
    """Whether another file can take the place of ``path`` at the end, which none can of a pipe or a device."""
    place, folder = os.path.realpath(path.parent), Path(os.path.realpath(path)).parent
    if place == "/dev" or place.startswith("/proc/") or not os.access(folder, os.W_OK):
        return False
    return path.is_file() or not path.exists()
