"""Work in shards: each is a file that is there whole or not at all, beside a record of what all of them are made with.

Several processes share the folder. A shard is a range of rows of the input, and its file has one JSON line for each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_nmsparse.files import replaced
from hf_nmsparse.packed_files import read_object
from hf_nmsparse.packed_format import PackedFormatError


@dataclass(frozen=True)
class Shards:
    """The shards of an output folder.

    Attributes:
        output: The folder, which has the record; the shards lie in a folder of their own in it.
        rows: Rows of the input.
        size: Rows of a shard; the last one has what is left.
    """

    output: Path
    rows: int
    size: int

    @property
    def record(self) -> Path:
        """The file with the settings of all shards."""
        return self.output / "distill.json"

    @property
    def all(self) -> range:
        """The numbers of the shards."""
        return range(-(-self.rows // self.size))

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.size, min(self.rows, (shard + 1) * self.size))

    def file_of(self, shard: int) -> Path:
        """The file of a shard."""
        return self.output / "shards" / f"{shard:06}.jsonl"

    def missing(self) -> list[int]:
        """The shards that nobody has finished."""
        return [shard for shard in self.all if not self.file_of(shard).is_file()]

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Keeps the settings in the folder, or finds those that the shards there were made with.

        Raises:
            ValueError: They are others, or the record is damaged.
        """
        if self.record.is_file():
            try:
                begun = read_object(self.record).get("settings")
            except PackedFormatError as error:
                raise ValueError(f"{error}; choose another output_dir, or delete {self.output}") from error
            begun = begun if isinstance(begun, dict) else {}
            for name in dict.fromkeys([*settings, *begun]):
                if settings.get(name) != begun.get(name):
                    raise ValueError(
                        f"{name}: the translations in {self.output} began with {begun.get(name)!r}, got "
                        f"{settings.get(name)!r}; give the same, or another output_dir"
                    )
            return
        found = sorted(file.name for file in self.output.glob("train.*"))
        if found:
            raise ValueError(f"output_dir: {self.output} holds {found[0]}, of something else; choose another")
        self._write_record({"settings": dict(settings)})

    def end(self, settings: Mapping[str, Any], counts: Mapping[str, int]) -> None:
        """Adds to the record how many rows there are of each kind, and removes the shards."""
        self._write_record({"settings": dict(settings), "rows": dict(counts)})
        shutil.rmtree(self.output / "shards")

    def write(self, shard: int, rows: Iterable[Mapping[str, str]]) -> None:
        """Writes a shard."""
        with replaced(self.file_of(shard)) as file:
            file.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")

    def read(self) -> Iterator[dict[str, str]]:
        """The rows of all shards, in the order of the input.

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

    def _write_record(self, record: dict[str, Any]) -> None:
        with replaced(self.record) as file:
            file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def digest_of_texts(columns: Iterable[Iterable[str]]) -> str:
    """Tells texts from others."""
    digest = hashlib.sha256()
    for column in columns:
        for text in column:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def name_of_model(model: str) -> str:
    """A model as a record names it: a folder by its own name and by what is in its weights and its configuration."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return f"{folder.resolve().name} {digest.hexdigest()[:16]}"
