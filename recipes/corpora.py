"""The corpora that the recipes read."""

from __future__ import annotations

from datasets import IterableDataset

from hf_nmsparse.corpus import Rows, load_corpus
from recipes.homeassistant import homeassistant_corpus


def read_corpus(
    corpus: str, source_lang: str, target_lang: str, config: str | None, streaming: bool = False
) -> dict[str, Rows]:
    """The splits of a corpus that `load_corpus` knows, or of the demo's."""
    if corpus != "homeassistant":
        return load_corpus(corpus, source_lang, target_lang, config, streaming)
    pairs = homeassistant_corpus(source_lang, target_lang)
    return {**pairs, "train": pairs["train"].to_iterable_dataset()} if streaming else {**pairs}


def first_of(rows: Rows, count: int) -> Rows:
    """The first so many pairs, or all if there are fewer."""
    return rows.take(count if isinstance(rows, IterableDataset) else min(count, len(rows)))
