"""Work in shards: each is a file that is there whole or not at all, beside a record of what all of them are made with.

Several processes and machines share the folder and need nothing else of each other. A shard is a range of rows of the
input. What is known of it (counts, a checksum) lies in a small file that is there before the shard is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from hf_nmsparse.files import replaced
from hf_nmsparse.packed_files import read_object
from hf_nmsparse.packed_format import PackedFormatError

__all__ = ["Digest", "Progress", "Shards", "name_of_model", "sha256_of", "share_of"]

# Weights, configurations and what tokenizers are read from, in a model's folder.
_OF_A_MODEL = (
    *("*.safetensors", "*config.json", "*tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("*vocab*", "merges.txt", "*.model", "*.spm"),
)


@dataclass(frozen=True)
class Shards:
    """The shards of an output folder.

    Attributes:
        output: The folder.
        rows: Rows of the input.
        size: Rows of a shard; the last one has what is left.
        record: Name of the file with what all shards are made with.
        names: Name of a shard's file in the folder, for `str.format` with its ``number`` and how many there are in
            ``all``.
    """

    output: Path
    rows: int
    size: int
    record: str
    names: str

    @property
    def all(self) -> range:
        """The numbers of the shards."""
        return range(-(-self.rows // self.size))

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.size, min(self.rows, (shard + 1) * self.size))

    def file_of(self, shard: int) -> Path:
        """The file of a shard."""
        return self.output / self.names.format(number=shard, all=len(self.all))

    @property
    def files(self) -> list[Path]:
        """The files of all shards."""
        return [self.file_of(shard) for shard in self.all]

    def missing(self) -> list[int]:
        """The shards that nobody has finished."""
        return [shard for shard in self.all if not self.file_of(shard).is_file()]

    def begin(self, settings: Mapping[str, Any]) -> bool:
        """Keeps the settings in the folder, or finds those that the shards there were made with.

        Returns:
            Whether the work was ended before.

        Raises:
            ValueError: They are others, or the record is damaged.
        """
        if (found := self._found()) is not None:
            begun = found.get("settings")
            begun = begun if isinstance(begun, dict) else {}
            for name in dict.fromkeys([*settings, *begun]):
                if settings.get(name) != begun.get(name):
                    raise ValueError(
                        f"{name}: the translations in {self.output} began with {begun.get(name)!r}, got "
                        f"{settings.get(name)!r}; give the same, or another output_dir"
                    )
            return self.is_ended()
        others = sorted(file.name for file in self.output.glob("train[.-]*"))
        if others:
            raise ValueError(f"output_dir: {self.output} holds {others[0]}, of something else; choose another")
        _write_object(self.output / self.record, {"settings": dict(settings)})
        return False

    def is_ended(self) -> bool:
        """Whether somebody has called `end`.

        Raises:
            ValueError: The record is damaged.
        """
        return "rows" in (self._found() or {})

    def end(self, settings: Mapping[str, Any], rows: Mapping[str, Any], **more: Any) -> None:
        """Adds to the record how many rows there are of each kind and whatever else is known.

        What was known of single shards goes, and so does what killed processes have left beside the files.

        Args:
            settings: Those that the work began with.
            rows: How many there are of each kind.
            more: What else the record holds, such as ``shards`` or ``files`` for `check_ended`.
        """
        _write_object(self.output / self.record, {"settings": dict(settings), "rows": dict(rows), **more})
        self.sweep()

    def check_ended(self, kind: str, files: Sequence[Path]) -> None:
        """Looks whether files of work that was ended are still as they were written.

        Args:
            kind: What the record calls them, ``shards`` or ``files``; it has a list with the ``file``, a name, and the
                ``sha256`` of each.
            files: All of them.

        Raises:
            ValueError: One is not, or the record does not say how they were.
        """
        known = (self._found() or {}).get(kind)
        known = [one for one in known if isinstance(one, dict)] if isinstance(known, list) else []
        names = [one.get("file") for one in known]
        count = sum(file.name in names for file in files)
        if count != len(files):
            record = self.output / self.record
            raise ValueError(f"{record}: names {count} of {len(files)} {kind}; begin again in another folder")
        for file in files:
            if not file.is_file() or sha256_of(file) != known[names.index(file.name)].get("sha256"):
                raise ValueError(f"{file}: is missing, or not as it was written; begin again in another folder")

    def sweep(self) -> None:
        """Removes what the work has left beside its files, once it was ended; the one that ends it may be killed."""
        left_behind = (*self.output.glob(".train-*"), *self.output.glob(f".{self.record}.*"))
        for left in (self.output / "shards", *left_behind):
            shutil.rmtree(left, ignore_errors=True)  # another process may be at it

    def write(self, shard: int, content: Callable[[Path], Mapping[str, Any]]) -> None:
        """Writes a shard.

        Args:
            shard: Its number.
            content: Writes the file that it is given, and returns what is to be known of it.
        """
        with replaced(self.file_of(shard)) as file:
            known = content(file)
            size, digest = file.stat().st_size, sha256_of(file)
            _write_object(self._known_file(shard), {**known, "bytes": size, "sha256": digest})

    def known(self, shard: int) -> dict[str, Any]:
        """What is known of a shard that is finished.

        Raises:
            ValueError: The file that says so is missing or damaged.
        """
        file = self._known_file(shard)
        try:
            return read_object(file)
        except (PackedFormatError, OSError) as error:
            raise ValueError(f"{file}: cannot be read: {error}; delete {self.file_of(shard)} and run again") from error

    def checked(self) -> Iterator[dict[str, Any]]:
        """What is known of each shard, in their order, once its file was found to be the one that was written.

        Raises:
            ValueError: It is not.
        """
        for shard in self.all:
            file, known = self.file_of(shard), self.known(shard)
            if sha256_of(file) != known.get("sha256"):
                raise ValueError(f"{file}: is not as it was written; delete it and run again")
            yield {"file": file.name, **known}

    def read(self) -> Iterator[dict[str, str]]:
        """The rows of all shards, which are JSON lines with one for each row, in the order of the input.

        Raises:
            ValueError: A shard is missing or damaged.
        """
        for shard in self.all:
            file = self.file_of(shard)
            try:
                rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
            except (OSError, ValueError) as error:
                raise ValueError(f"{file}: cannot be read: {error}; delete it and run again") from error
            if len(rows) != len(self.rows_of(shard)):
                raise ValueError(
                    f"{file}: has {len(rows)} rows, and {len(self.rows_of(shard))} are due; delete it and run again"
                )
            yield from rows

    def _found(self) -> dict[str, Any] | None:
        file = self.output / self.record
        if not file.is_file():
            return None
        try:
            return read_object(file)
        except PackedFormatError as error:
            raise ValueError(f"{error}; choose another output_dir, or delete {self.output}") from error

    def _known_file(self, shard: int) -> Path:
        return self.output / "shards" / f"{shard:06}.json"


class Progress:
    """How far all processes are, how fast they have been since this began, and what that leaves.

    Args:
        shards: Those that they work on. What is known of one has its ``tokens``.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards, self._begun = shards, time.monotonic()
        self._waiting = set(shards.missing())
        self._rows, self._tokens = 0, 0

    def say(self) -> str:
        """All of it in words."""
        shards = self._shards
        still = set(shards.missing())
        for shard in self._waiting - still:
            try:
                self._tokens += shards.known(shard)["tokens"]
            except ValueError:
                if shards.is_ended():  # by another process, a moment ago
                    return f"{len(shards.all):,} of {len(shards.all):,} shards"
                raise
            self._rows += len(shards.rows_of(shard))
        self._waiting = still
        left, seconds = sum(len(shards.rows_of(shard)) for shard in still), time.monotonic() - self._begun
        speed = self._rows / seconds
        rest = timedelta(seconds=round(left / speed)) if speed else "unknown time"
        done = len(shards.all) - len(still)
        speeds = f"{speed:,.1f} sentences/s, {self._tokens / seconds:,.0f} tokens/s"
        return f"{done:,} of {len(shards.all):,} shards, {speeds}, {rest} left"


@dataclass
class Digest:
    """Counts rows of texts one after the other, and tells them from others."""

    count: int = 0
    _hash: Any = field(default_factory=hashlib.sha256)

    def add(self, *row: str) -> None:
        """The texts of the next row."""
        for text in row:
            data = text.encode("utf-8", "surrogatepass")
            self._hash.update(len(data).to_bytes(8, "little") + data)
        self.count += 1

    def add_all(self, texts: Iterable[str]) -> Digest:
        """Rows of one text each; the same digest for short."""
        for text in texts:
            self.add(text)
        return self

    def __str__(self) -> str:
        return str(self._hash.hexdigest()[:16])


def share_of(shards: range, process: int, processes: int) -> set[int]:
    """The shards of one process: whoever starts when, each shard is one's alone."""
    return set(shards[process::processes])


def name_of_model(model: str) -> str:
    """A model as a record names it: a folder by its own name and by its weights, configuration and tokenizer."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _OF_A_MODEL for file in folder.glob(pattern)}):
        digest.update(file.name.encode())
        _update(digest, file)
    return f"{folder.resolve().name} {digest.hexdigest()[:16]}"


def sha256_of(file: Path) -> str:
    """The checksum of a file, as ``sha256sum`` prints it.

    Raises:
        ValueError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        _update(digest, file)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}; run again") from error
    return digest.hexdigest()


def _update(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)


def _write_object(file: Path, value: Mapping[str, Any]) -> None:
    with replaced(file) as beside:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
