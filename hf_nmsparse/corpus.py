"""Parallel text, from the Hub or from local files."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, Features, IterableDataset, Value
from transformers.utils import logging

from hf_nmsparse.pairs import find_files, is_text, read_lines, read_pairs, same_length

__all__ = ["SPLITS", "Rows", "load_corpus", "load_text"]

logger = logging.get_logger(__name__)

Rows: TypeAlias = Dataset | IterableDataset

SPLITS = ("train", "validation", "test")

_FEATURES = Features({"source": Value("string"), "target": Value("string")})

# Counts the ways in which files and rows were read here: what an older one has cached is not taken for this one's.
_READER = 2


def load_corpus(
    corpus: str, source_lang: str, target_lang: str, config: str | None = None, streaming: bool = False
) -> dict[str, Rows]:
    """The splits of a parallel corpus, each with the columns ``source`` and ``target``: raw text.

    Args:
        corpus: One of

            - a local folder with files named after the splits: ``train.jsonl`` (or ``.json``, ``.parquet``, ``.tsv``
              with a header) whose rows are ``{"translation": {"en": ..., "de": ...}}`` or ``{"en": ..., "de": ...}``,
              other columns aside, or a pair of text files such as ``train.en`` and ``train.de``; all but parquet also
              compressed: ``.gz``, ``.bz2``, ``.xz`` or ``.zst``. Text is UTF-8;
            - a dataset of the Hub with rows of the same two shapes, such as ``"wmt/wmt14"``. Of its training split the
              rows that lack a side are left out, and their number is logged.
        source_lang: Key of the source sentence in a row, or suffix of its file.
        target_lang: The same for the target.
        config: Configuration of a Hub dataset, such as ``"de-en"``.
        streaming: Whether the training split is a stream: read as it comes, each time anew, and not kept on disk.

    Raises:
        ValueError: Files are missing, empty, of unequal length, or a row lacks one of its sides. Of a stream a row is
            looked at when it comes.
    """
    folder = Path(corpus)
    if folder.is_file():
        raise ValueError(f"corpus {corpus}: a file; name its folder, in which the files are train.*, validation.* ...")
    if not folder.is_dir():
        return _from_hub(corpus, source_lang, target_lang, config, streaming)
    found = {split: find_files(folder, split, source_lang, target_lang) for split in SPLITS}
    if not any(found.values()):
        raise ValueError(f"corpus {corpus}: no file named train.*, validation.* or test.* in that folder")
    return {
        split: _from_files(files, source_lang, target_lang, streaming and split == "train")
        for split, files in found.items()
        if files
    }


def load_text(file: str) -> Dataset:
    """The lines of a text in one language, as a column ``source``.

    Args:
        file: UTF-8, plain or as ``.gz``, ``.bz2``, ``.xz`` or ``.zst``.

    Raises:
        ValueError: It is missing, has no lines, or cannot be read.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"text: no file {file}")
    if not path.stat().st_size:
        raise ValueError(f"text: {file} is empty")
    made_by = {"generator": read_lines, "features": Features({"source": Value("string")}), "gen_kwargs": {"file": path}}
    return _kept(made_by, (path,))


def _from_files(files: tuple[Path, ...], source_lang: str, target_lang: str, streaming: bool) -> Rows:
    """The pairs of a split: mapped into memory from datasets' cache, where a second run finds them, or as a stream."""
    given = {"files": files, "source_lang": source_lang, "target_lang": target_lang}
    made_by = {"generator": read_pairs, "features": _FEATURES, "gen_kwargs": given}
    if streaming:
        if len(files) == 2:
            same_length(files)
        stream = IterableDataset.from_generator(**made_by)
        _first(stream)  # what is wrong with all of it shows here
        return stream
    return _kept(made_by, files, source_lang, target_lang)


def _kept(made_by: dict[str, Any], files: tuple[Path, ...], *langs: str) -> Dataset:
    """The rows of a generator that reads files, in datasets' cache."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = _fingerprint(str(_READER), repr(stats), *langs)
    try:
        return Dataset.from_generator(**made_by, fingerprint=name)
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from error
        cache = datasets.config.HF_DATASETS_CACHE
        raise ValueError(f"corpus: {files[0]} cannot be kept in the cache, {cache}: {cause}") from error


def _from_hub(corpus: str, source_lang: str, target_lang: str, config: str | None, streaming: bool) -> dict[str, Rows]:
    try:
        loaded = datasets.load_dataset(corpus, config, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            reason = f"no local folder, and none of the Hub's: {reason}"
        elif isinstance(error, OSError):
            reason = f"no local folder, and the Hub has not answered: {reason}"
        raise ValueError(f"corpus {corpus!r}: {reason}") from error
    splits = {split: loaded[split] for split in SPLITS if split in loaded}
    if not splits:
        raise ValueError(f"corpus {corpus!r}: no split train, validation or test; it has {', '.join(loaded)}")
    texts = {
        split: _two_columns(rows, f"corpus {corpus}, split {split}", source_lang, target_lang, split == "train")
        for split, rows in splits.items()
    }
    whole = {split: Dataset.from_list(list(rows)) for split, rows in texts.items() if streaming and split != "train"}
    return texts | whole


def _first(rows: Rows) -> dict[str, Any] | None:
    """The first row; None if there is none."""
    with closing(iter(rows)) as found:  # with it the file that a stream has opened
        return next(found, None)


def _two_columns(rows: Rows, where: str, source_lang: str, target_lang: str, lenient: bool) -> Rows:
    """The texts of a Hub dataset; rows that lack one are left out if ``lenient``, for nobody here can drop them."""
    first = _first(rows)
    if first is None:
        raise ValueError(f"{where}: it has no rows")
    nested = "translation" in first
    if nested and not isinstance(first["translation"], dict):
        raise ValueError(f"{where}: translation holds {type(first['translation']).__name__}, not one text a language")
    available, langs = first["translation"] if nested else first, (source_lang, target_lang)
    for lang in langs:
        if lang not in available:
            raise ValueError(f"{where}: no language {lang!r}; it has {', '.join(map(str, available))}")
        if not isinstance(available[lang], str | None):
            raise ValueError(f"{where}: {lang!r} holds {type(available[lang]).__name__}, not text")

    def split_columns(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[str]]:
        texts = {key: [(row or {}).get(key) for row in batch["translation"]] for key in langs} if nested else batch
        kept: dict[str, list[str]] = {"source": [], "target": []}
        for index, *pair in zip(indices, *(texts[lang] for lang in langs), strict=True):
            for lang, text in zip(langs, pair, strict=True):
                if not is_text(text) and not lenient:
                    raise ValueError(f"{where}: row {index} has no {lang!r} text, got {text!r}; drop the row")
            if all(map(is_text, pair)):
                for side, text in zip(kept.values(), pair, strict=True):
                    side.append(text)
        return kept

    # A stream is not cached and takes no name.
    name = {}
    if isinstance(rows, Dataset):
        name = {
            "new_fingerprint": _fingerprint(str(_READER), rows._fingerprint, source_lang, target_lang, str(lenient))
        }
    pairs = rows.map(
        split_columns, batched=True, with_indices=True, remove_columns=list(first), features=_FEATURES, **name
    )
    if isinstance(pairs, IterableDataset):
        if lenient:
            logger.warning(f"{where}: rows that lack a text are left out of the stream")
    elif not len(pairs):
        raise ValueError(f"{where}: each of the {len(rows):,} rows lacks a text")
    elif len(pairs) < len(rows):
        logger.warning(f"{where}: {len(rows) - len(pairs):,} of {len(rows):,} rows lack a text: left out")
    return pairs


def _fingerprint(*parts: str) -> str:
    """Names a cached result after what it is made from, so that a second run finds it."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
