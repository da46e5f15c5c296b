"""HTML files."""

from __future__ import annotations

import codecs
import re
from functools import partial
from pathlib import Path
from typing import IO

from hf_nmsparse.documents.base import DocumentError, Options, Translate, decoded
from hf_nmsparse.documents.texts import translate_inner
from hf_nmsparse.html_text import translate_html

__all__ = ["translate_html_file"]

_ENCODING = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_HEAD = 1024  # bytes in which a browser looks for it


def translate_html_file(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    """Translates an HTML file, and writes it in the encoding that it names, or UTF-8."""
    data = source.read_bytes()
    mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    named = _ENCODING.search(data[:_HEAD])
    encoding = _encoding(named[1].decode()) if named and not mark else "utf-8"
    if encoding == "utf-8":
        text = decoded(data.removeprefix(mark))
    else:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            raise DocumentError(f"is not {encoding}, which it names: {error.reason} at byte {error.start}") from None
    [page] = translate_html([text], partial(translate_inner, translate=translate))
    # What the encoding lacks is a numeric reference, which is the same to a browser.
    target.write(mark + page.encode(encoding, "xmlcharrefreplace"))


def _encoding(name: str) -> str:
    try:
        found = codecs.lookup(name).name
        "".encode(found)
    except LookupError:  # unknown, or no encoding of text
        raise DocumentError(f"names an unknown encoding, {name}; make it UTF-8, such as with iconv") from None
    if found.startswith(("utf-16", "utf-32")):  # it could not be read as far as its name
        return "utf-8"
    # Browsers, too, take Latin-1 for the larger one.
    return {"iso8859-1": "cp1252", "ascii": "cp1252"}.get(found, found)
