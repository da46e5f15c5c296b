"""The source languages of a many-to-one model: what marks each, and what of their pairs a training may see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from recipes.arguments import RecipeArguments

__all__ = ["Source", "sources_of", "tags_of", "without_known_targets"]


@dataclass(frozen=True)
class Source:
    """A source language.

    Attributes:
        lang: Key of its texts in a row of the corpus.
        code: The language as a multilingual tokenizer spells it, or None.
        prefix: Put before every text.
    """

    lang: str
    code: str | None
    prefix: str

    def set_on(self, tokenizer: Any) -> None:
        """Has the tokenizer mark sources with the code, where there is one and it marks them."""
        if self.code is not None and hasattr(tokenizer, "src_lang"):
            tokenizer.src_lang = self.code


def sources_of(recipe: RecipeArguments) -> list[Source]:
    """The source languages, that of `source_lang` first; the others have codes where it has one, else prefixes."""
    found = [Source(recipe.source_lang, recipe.source_code, recipe.source_prefix)]
    for entry in recipe.more_sources or ():
        lang, _, mark = entry.partition("=")
        found.append(Source(lang, mark, "") if recipe.source_code is not None else Source(lang, None, f"{mark} "))
    return found


def tags_of(recipe: RecipeArguments) -> list[str]:
    """What marks the source languages of a model from scratch, each a token of its tokenizer; none for a single one."""
    return [source.prefix.strip() for source in sources_of(recipe)] if recipe.more_sources else []


def without_known_targets(corpora: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The splits of each source language; training pairs go whose target any language holds out for a test.

    In text that is parallel in several languages a reference would else be learnt from another source.
    """
    held_out = {
        target
        for splits in corpora.values()
        for split, rows in splits.items()
        if split != "train"
        for target in rows["target"]
    }

    def unknown(train: Dataset) -> Dataset:
        return train.select([index for index, target in enumerate(train["target"]) if target not in held_out])

    return {lang: {**splits, "train": unknown(splits["train"])} for lang, splits in corpora.items()}
