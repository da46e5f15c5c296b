"""Settings in YAML files, each value as it is written there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["read_settings"]


class _AsWritten(yaml.SafeLoader):
    """Leaves every value the text that it is, but for ``null``; whoever knows what is wanted converts it.

    YAML 1.1 has ``2:4`` for 124, ``1e-3`` for text and the language ``no`` for a falsehood.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 # by the first character, as the base class has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class; of two equal keys it would take the last without a word."""
        written = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in written:
            if written.count(key) > 1:
                raise ValueError(f"the key {key!r} is there {written.count(key)} times")
        return super().construct_mapping(node, deep)


def read_settings(file: Path) -> dict[str, Any]:
    """The keys and values of a file: texts, None, and lists and mappings of them.

    Raises:
        ValueError: It holds no keys and values, or is not to be read.
    """
    try:
        settings = yaml.load(file.read_text(encoding="utf-8-sig"), _AsWritten)  # which is a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    if settings is None:
        raise ValueError(f"{file} is empty")
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"{file} holds {type(settings).__name__}, not keys and values")
    return settings
