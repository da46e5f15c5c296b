"""Parallel text: from the Hub, from local files, or from a package on PyPI that carries some."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, IterableDataset

__all__ = ["SPLITS", "Rows", "homeassistant_corpus", "load_corpus"]

Rows: TypeAlias = Dataset | IterableDataset

SPLITS = ("train", "validation", "test")

_FORMATS = {"jsonl": "json", "json": "json", "parquet": "parquet", "tsv": "csv"}

_WHEEL = "homeassistant-2026.11.0-py3-none-any.whl"
_WHEEL_SHA256 = "7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7"
_HELD_OUT = 500


def load_corpus(
    corpus: str, source_lang: str, target_lang: str, config: str | None = None, streaming: bool = False
) -> dict[str, Rows]:
    """The splits of a parallel corpus, each with the columns ``source`` and ``target``: raw text.

    Args:
        corpus: One of

            - a local folder with files named after the splits: ``train.jsonl`` (or ``.json``, ``.parquet``, ``.tsv``
              with a header, each but parquet also ``.gz``) whose rows are ``{"translation": {"en": ..., "de": ...}}``
              or ``{"en": ..., "de": ...}``, or a pair of text files such as ``train.en`` and ``train.de``;
            - ``"homeassistant"``: see `homeassistant_corpus`;
            - a dataset of the Hub with rows of the same two shapes, such as ``"wmt/wmt14"``.
        source_lang: Key of the source sentence in a row, or suffix of its file.
        target_lang: The same for the target.
        config: Configuration of a Hub dataset, such as ``"de-en"``.
        streaming: Whether the training split is a stream: read as it comes, each time anew, and not kept on disk.

    Raises:
        ValueError: Files are missing, empty, of unequal length, or a row lacks one of its sides. Of a stream a row is
            looked at when it comes.
    """
    if corpus == "homeassistant":
        pairs = homeassistant_corpus(source_lang, target_lang)
        return {**pairs, "train": pairs["train"].to_iterable_dataset()} if streaming else {**pairs}
    if Path(corpus).is_dir():
        splits = {
            split: _read_split(Path(corpus), split, source_lang, target_lang, streaming)
            for split in SPLITS
            if any(Path(corpus).glob(f"{split}.*"))
        }
        if not splits:
            raise ValueError(f"corpus {corpus}: no file named train.*, validation.* or test.* in that folder")
    else:
        try:
            loaded = datasets.load_dataset(corpus, config, streaming=streaming)
        except (FileNotFoundError, ConnectionError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"corpus {corpus!r}: no local folder, and the Hub has not answered: {reason}") from error
        splits = {split: loaded[split] for split in SPLITS if split in loaded}
        if not splits:
            raise ValueError(f"corpus {corpus!r}: no split train, validation or test; it has {', '.join(loaded)}")
    texts = {
        split: _two_columns(rows, f"corpus {corpus}, split {split}", source_lang, target_lang)
        for split, rows in splits.items()
    }
    whole = {split: Dataset.from_list(list(rows)) for split, rows in texts.items() if streaming and split != "train"}
    return texts | whole


def _read_split(folder: Path, split: str, source_lang: str, target_lang: str, streaming: bool) -> Rows:
    source_file, target_file = folder / f"{split}.{source_lang}", folder / f"{split}.{target_lang}"
    if source_file.is_file() or target_file.is_file():
        for file in (source_file, target_file):
            if not file.is_file():
                raise ValueError(f"corpus: {file} is missing beside its other half")
        source, target = _read("text", source_file, streaming), _read("text", target_file, streaming)
        lines = [
            _lines(file) if streaming else len(rows) for file, rows in ((source_file, source), (target_file, target))
        ]
        if lines[0] != lines[1]:
            raise ValueError(
                f"corpus: {source_file} has {lines[0]} lines, {target_file} has {lines[1]}; they are not aligned"
            )
        pair = [source.rename_column("text", source_lang), target.rename_column("text", target_lang)]
        return datasets.concatenate_datasets(pair, axis=1)
    for suffix, loader in _FORMATS.items():
        for file in (folder / f"{split}.{suffix}", folder / f"{split}.{suffix}.gz"):
            if file.is_file():
                return _read(loader, file, streaming)
    found = ", ".join(sorted(path.name for path in folder.glob(f"{split}.*")))
    known = ", ".join([*_FORMATS, source_lang + "+" + target_lang])
    raise ValueError(f"corpus {folder}: cannot read {found}; the formats are {known}")


def _lines(file: Path) -> int:
    """How many lines a text has: of a stream that takes far less time than its rows would."""
    with file.open(encoding="utf-8") as text:
        return sum(1 for _ in text)


def _read(loader: str, file: Path, streaming: bool) -> Rows:
    if not file.stat().st_size:
        raise ValueError(f"corpus: {file} is empty")
    options: dict[str, Any] = {}
    if loader == "csv":
        options = {"delimiter": "\t", "quoting": 3, "keep_default_na": False}
    if loader == "text":
        options = {"keep_linebreaks": False}
    try:
        rows = datasets.load_dataset(loader, data_files=str(file), split="train", streaming=streaming, **options)
        _first(rows)  # of a stream nothing has been read yet
        return rows
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"corpus: cannot read {file}: {str(cause).splitlines()[0]}") from error


def _first(rows: Rows) -> dict[str, Any] | None:
    """The first row; None if there is none."""
    with closing(iter(rows)) as found:  # with it the file that a stream has opened
        return next(found, None)


def _two_columns(rows: Rows, where: str, source_lang: str, target_lang: str) -> Rows:
    first = _first(rows)
    if first is None:
        raise ValueError(f"{where}: it has no rows")
    nested = "translation" in first
    if nested and not isinstance(first["translation"], dict):
        raise ValueError(f"{where}: translation holds {type(first['translation']).__name__}, not one text a language")
    available = list(first["translation"] if nested else first)
    for lang in (source_lang, target_lang):
        if lang not in available:
            raise ValueError(f"{where}: no language {lang!r}; it has {', '.join(map(str, available))}")

    def split_columns(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[str]]:
        if nested:
            sides = [[row[lang] for row in batch["translation"]] for lang in (source_lang, target_lang)]
        else:
            sides = [batch[source_lang], batch[target_lang]]
        for lang, side in zip((source_lang, target_lang), sides, strict=True):
            for index, text in zip(indices, side, strict=True):
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"{where}: row {index} has no {lang!r} text, got {text!r}; drop the row")
        return {"source": sides[0], "target": sides[1]}

    # A stream is not cached and takes no name.
    name = {"new_fingerprint": _fingerprint(rows, source_lang, target_lang)} if isinstance(rows, Dataset) else {}
    return rows.map(split_columns, batched=True, with_indices=True, remove_columns=list(first), **name)


def _fingerprint(rows: Dataset, *parts: str) -> str:
    """Names a cached result after what it is made from, so that a second run finds it."""
    return hashlib.sha256("\0".join((rows._fingerprint, *parts)).encode()).hexdigest()[:32]


def homeassistant_corpus(source_lang: str, target_lang: str, cache: Path | None = None) -> dict[str, Dataset]:
    """The interface texts of Home Assistant, which its package on PyPI carries in English, German and many others.

    It is real parallel text that a machine without the Hub can have: about 20,000 distinct pairs of four words or
    more, Apache-2.0. The wheel (68 MB) is fetched by pip once, checked against its hash and kept in the cache.

    Args:
        source_lang: Language of the source, such as ``"en"``.
        target_lang: Language of the target, such as ``"de"``.
        cache: Folder for the wheel; a folder in the cache of datasets if None.

    Raises:
        ValueError: The wheel cannot be had, is not the expected one, or lacks a language.
    """
    wheel = _fetch_wheel(cache or Path(datasets.config.HF_CACHE_HOME) / "nmsparse")
    pairs = sorted(set(_wheel_pairs(wheel, source_lang, target_lang)))
    if not pairs:
        raise ValueError(f"corpus homeassistant: no texts in both {source_lang!r} and {target_lang!r}")
    # A source text goes to one split whole, whatever its translations, so that nothing tested was trained on.
    ordered = sorted({source for source, _ in pairs}, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(ordered) <= 2 * _HELD_OUT:
        raise ValueError(f"corpus homeassistant: only {len(ordered)} texts in {source_lang!r} and {target_lang!r}")
    held_out = {"validation": set(ordered[:_HELD_OUT]), "test": set(ordered[_HELD_OUT : 2 * _HELD_OUT])}
    held_out["train"] = set(ordered[2 * _HELD_OUT :])
    return {
        split: Dataset.from_dict(
            {
                "source": [source for source, _ in pairs if source in held_out[split]],
                "target": [target for source, target in pairs if source in held_out[split]],
            }
        )
        for split in SPLITS
    }


def _fetch_wheel(cache: Path) -> Path:
    wheel = cache / _WHEEL
    if not wheel.is_file():
        version = _WHEEL.split("-")[1]
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
            done = subprocess.run(
                [*command, "--dest", folder, f"homeassistant=={version}"], capture_output=True, text=True, check=False
            )
            fetched = Path(folder) / _WHEEL
            if done.returncode or not fetched.is_file():
                reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                raise ValueError(f"corpus homeassistant: pip could not download homeassistant=={version}: {reason}")
            fetched.replace(wheel)
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _WHEEL_SHA256:
        raise ValueError(f"corpus homeassistant: {wheel} is not the expected file; delete it and run again")
    return wheel


def _wheel_pairs(wheel: Path, source_lang: str, target_lang: str) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in sorted(names):
            if not name.endswith(f"/translations/{source_lang}.json"):
                continue
            other = f"{name.rpartition('/')[0]}/{target_lang}.json"
            if other in names:
                source, target = (dict(_texts(json.loads(archive.read(file)))) for file in (name, other))
                for key in source.keys() & target.keys():
                    text, translation = source[key].strip(), target[key].strip()
                    if (
                        len(text.split()) >= 4
                        and translation
                        and text != translation
                        and "\n" not in text + translation
                    ):
                        yield text, translation


def _texts(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from _texts(child, (*path, key))
