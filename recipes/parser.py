"""Keys and values of one YAML file, and ``--key value`` pairs that win over it, as dataclasses."""

from __future__ import annotations

import json
from argparse import Action
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from hf_nmsparse.settings import read_settings


class Parser(HfArgumentParser):
    """Says in one line what is wrong, and takes the values of a file as it takes those of a command line.

    Args:
        program: Begins the message of an error.
        *kinds: The dataclasses whose fields are the keys.
    """

    def __init__(self, program: str, *kinds: Any) -> None:
        self.program = program
        self.types: dict[str, Any] = {key: hint for kind in kinds for key, hint in get_type_hints(kind).items()}
        self.keys: dict[str, Action] = {}
        super().__init__(kinds, allow_abbrev=False)

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        """Adds an argument, and keeps it by its key."""
        action = super().add_argument(*args, **kwargs)
        if action.dest in self.types:
            self.keys[action.dest] = action
        return action

    def error(self, message: str) -> NoReturn:
        """In place of a page of usage."""
        raise ValueError(f"{self.program}: {message}")

    def check_known(self, key: str, where: str) -> None:
        """Refuses what is no key, and names the one that was meant."""
        if key not in self.keys:
            near = get_close_matches(key, self.keys, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.program}: {where}: unknown key {key!r}{meant}")

    def arguments_of(self, file: Path) -> list[str]:
        """The settings of a file as a command line would have them; what none can have becomes the default."""
        arguments = []
        for key, value in read_settings(file).items():
            self.check_known(key, str(file))
            admitted = kinds(self.types[key])
            if isinstance(value, str):
                arguments.append(f"--{key}={value}")
            elif isinstance(value, dict) and dict in admitted:
                arguments.append(f"--{key}={json.dumps(value)}")
            elif type(value) in admitted and all(isinstance(item, str) for item in value or ()):
                self.set_defaults(**{key: value})
            else:
                raise ValueError(f"{self.program}: {file}: {key}: cannot be {json.dumps(value)}; see --help")
        return arguments

    def read(self, file: Path | None, argv: list[str]) -> tuple[list[Any], set[str]]:
        """The dataclasses, filled from a file and from a command line over it, and the keys that either gives."""
        arguments = [*(self.arguments_of(file) if file is not None else ()), *argv]
        try:
            *filled, unknown = self.parse_args_into_dataclasses(
                arguments, return_remaining_strings=True, look_for_args_file=False
            )
        except ValueError as error:
            raise ValueError(str(error).splitlines()[0]) from error
        for argument in unknown:
            self.check_known(key_of(argument), "command line")
        return filled, {key_of(argument) for argument in arguments if argument.startswith("--")}


def key_of(argument: str) -> str:
    """The key that an argument of a command line begins with."""
    return argument.lstrip("-").partition("=")[0].replace("-", "_")


def kinds(hint: Any) -> set[Any]:
    """The types that an annotation admits, without what they hold."""
    every = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {get_origin(kind) or kind for kind in every}
