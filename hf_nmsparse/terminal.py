"""What a command prints: one line for an error, and nothing that steers a terminal."""

from __future__ import annotations

import logging
import os
import sys

from hf_nmsparse.files import naming

__all__ = ["drop_output", "keep_standard_numbers", "make_record_plain", "named", "one_line", "plain", "row", "say"]

_LONGEST_ERROR = 500


def keep_standard_numbers() -> None:
    """Where the caller has closed a standard stream no file takes its number, or what native code says ends in it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def drop_output() -> None:
    """Drops what standard output does not take: Python tries once more when it ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: Exception) -> str:
    """What an error says, up to a length that is still read."""
    text = " ".join(line.strip() for line in str(error).splitlines()).strip() or type(error).__name__
    return text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]} ..."


def named(error: BaseException) -> str:
    """What an error says, after its kind."""
    return f"{type(error).__name__}: {str(error).strip()}".removesuffix(": ")


def say(text: object, error: bool = False) -> None:
    """Prints text that may come from a file or an argument."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    with naming("standard error" if error else "standard output"):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # which writes what waits
        print(plain(str(text)), file=stream)


def plain(text: str, breaks: str = "\n") -> str:
    """Text with nothing in it that steers a terminal, and no line breaks but those that are allowed."""
    shown = (char if char.isprintable() or char in breaks else char.encode("unicode_escape").decode() for char in text)
    return "".join(shown)


def row(text: str) -> None:
    """Prints one line, whatever values it shows."""
    say(plain(text, breaks=""))


def make_record_plain(record: logging.LogRecord) -> bool:
    """Makes what is logged plain: transformers names keys and settings of files."""
    record.msg, record.args = plain(record.getMessage()), ()
    return True
