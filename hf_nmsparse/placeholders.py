"""Parts of a text that are for a program, not for a reader: ``{name}``, ``%s``, ``<0/>``, addresses.

They are to come back as they are, each as often as it stands in the source.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

__all__ = [
    "ONE_PLACEHOLDER",
    "PLACEHOLDERS",
    "has_words",
    "is_unnamed",
    "keeps_placeholders",
    "placeholders",
    "replaced",
]

ONE_PLACEHOLDER = re.compile(
    r"""
    \$?\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}                          # {name}, ${name}, {{ name }}, ICU's plurals
    | %(?:\(\w+\)|\d+\$)?[-+\#0]*\d*(?:\.\d+)?(?:hh?|ll?|[Lqjzt])?[@sdiufFeEgGxXoc]\b | %@   # %s, %1$s, %(name)d, %.2f
    | </?[A-Za-z0-9][^<>\s]*(?:\s[^<>]*)?>                               # <0/>, <b>, </a>
    | &(?:\#\d+|\#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]*);                 # &nbsp;
    | (?:https?|ftp|file)://[^\s<>"'`{}|]*[^\s<>"'`{}|.,;:!?)\]*_]        # addresses, without what ends a sentence
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    """,
    re.VERBOSE,
)
"""A single one."""

PLACEHOLDERS = re.compile(f"(?:{ONE_PLACEHOLDER.pattern})+", re.VERBOSE)
"""One, or several without anything between, which stay together."""

# One of these is in each placeholder. Most texts have none, which shows a hundred times as fast as a search for the
# placeholders themselves does.
_SIGNS = re.compile("[{%<&@]|://")

_UNNAMED = re.compile(r"\{\}|%(?![(]|\d+\$).*", re.DOTALL)


def placeholders(text: str) -> list[str]:
    """Those of a text, in their order."""
    return PLACEHOLDERS.findall(text) if _SIGNS.search(text) else []


def replaced(text: str, by: Callable[[str], str]) -> str:
    """A text with something else in the place of each placeholder.

    Args:
        text: The text.
        by: Says what, of a placeholder.
    """
    return PLACEHOLDERS.sub(lambda match: by(match.group()), text) if _SIGNS.search(text) else text


def has_words(text: str) -> bool:
    """Whether a letter stands outside of its placeholders: without one there is nothing to translate."""
    return any(map(str.isalpha, replaced(text, lambda _: " ")))


def keeps_placeholders(source: str, target: str) -> bool:
    """Whether a translation has those of its source, each as often, and those without names in their order."""
    wanted = placeholders(source)
    if not wanted:
        return True
    found = placeholders(target)
    return Counter(wanted) == Counter(found) and _unnamed(wanted) == _unnamed(found)


def is_unnamed(placeholder: str) -> bool:
    """Whether it is filled by its place, as ``%s`` is."""
    return _UNNAMED.fullmatch(placeholder) is not None


def _unnamed(found: Sequence[str]) -> list[str]:
    return list(filter(is_unnamed, found))
