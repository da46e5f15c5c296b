"""Documents as the tests read and write them."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable
from pathlib import Path

from hf_nmsparse.documents import FORMATS, Options, Translate
from hf_nmsparse.markup import Marked


def translated(form: str, data: bytes | str, translate: Translate, options: Options | None = None) -> bytes:
    """A document after a translation."""
    target = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "document"
        source.write_bytes(data.encode() if isinstance(data, str) else data)
        FORMATS[form].read(source, target, translate, options or Options())
    return target.getvalue()


def same(texts: list[Marked]) -> list[Marked]:
    """A translation into the same language."""
    return texts


def loud(texts: list[Marked]) -> list[Marked]:
    """A translation whose text is as long as the original, and that no text of small letters is."""
    return [tuple(part.upper() if isinstance(part, str) else part for part in text) for text in texts]


def swapped(texts: Iterable[Marked]) -> list[Marked]:
    """One that is another for every text."""
    return [tuple(part.swapcase() if isinstance(part, str) else part for part in text) for text in texts]


class Asked:
    """A translation that keeps what it was asked for."""

    def __init__(self) -> None:
        self.texts: list[Marked] = []

    def __call__(self, texts: list[Marked]) -> list[Marked]:
        self.texts += texts
        return loud(texts)


class Known:
    """A translation that knows some texts of one language, and no tags."""

    def __init__(self, texts: dict[str, str]) -> None:
        self._texts = texts

    def __call__(self, texts: list[Marked]) -> list[Marked]:
        return [(self._texts["".join(map(str, text))],) for text in texts]
