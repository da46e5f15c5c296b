"""The texts that a run of the recipe keeps in its output folder, one a line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["hypotheses_file", "one_line", "read_lines", "reference_file", "source_file", "splits_of", "write_lines"]

_TRANSLATED = ".hypotheses.txt"


def source_file(output: Path, split: str) -> Path:
    """Where a run keeps the source texts of a split."""
    return output / f"{split}.source.txt"


def reference_file(output: Path, split: str) -> Path:
    """Where it keeps their references."""
    return output / f"{split}.reference.txt"


def hypotheses_file(output: Path, split: str) -> Path:
    """Where it keeps its translations of them."""
    return output / f"{split}{_TRANSLATED}"


def splits_of(output: Path) -> list[str]:
    """The splits that a run keeps translations of."""
    return sorted(file.name.removesuffix(_TRANSLATED) for file in output.glob(f"?*{_TRANSLATED}"))


def one_line(text: str) -> str:
    """A text with single spaces and nothing that ends a line."""
    return " ".join(text.split())


def write_lines(file: Path, lines: Iterable[str]) -> None:
    """Writes a text file, a line each."""
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, without what ends them.

    Raises:
        ValueError: It is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8, at byte {error.start}; the recipe writes it anew") from error
