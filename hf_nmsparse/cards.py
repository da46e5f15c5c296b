"""Model cards: every number comes from the record of an evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_nmsparse.evaluation import Evaluation
from hf_nmsparse.srste import METHODS

__all__ = ["method_in_words", "model_card", "write_card"]


def model_card(
    evaluation: Evaluation,
    repo_id: str,
    *,
    source_lang: str,
    target_lang: str,
    license: str,
    dataset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    example: str = "Two people are walking in the park.",
    multilingual: bool = False,
    standalone: bool = False,
) -> str:
    """Writes the model card of an evaluated run.

    Its metadata holds a ``model-index`` with BLEU and chrF. Rounding to two decimals is all that happens to numbers.

    Args:
        evaluation: The record of the very files that the card describes.
        repo_id: Where the model goes on the Hub, such as ``"user/model"``; its last part is the title.
        source_lang: Language code of the source, such as ``"en"`` or ``"eng_Latn"``.
        target_lang: The same of the target.
        license: The Hub's identifier of the model's license, such as ``"apache-2.0"``.
        dataset: The training data's name on the Hub, if it has one.
        settings: Further training settings to list, in this order.
        example: A sentence in the source language for the code on the card.
        multilingual: Whether the tokenizer takes language codes, as those of mBART and NLLB do; the code then names
            ``source_lang`` and ``target_lang``.
        standalone: Whether the files were saved with ``save_packed(standalone=True)``; the card then says how
            transformers alone loads them.

    Raises:
        ValueError: ``repo_id`` or ``dataset`` is no name that the Hub takes, or a language is no language code.
    """
    languages = [_language(code) for code in (source_lang, target_lang)]
    for what, name in (("repo_id", repo_id), ("dataset", dataset)):
        if name is not None and not _is_hub_name(name):
            raise ValueError(f"model card: {what} {name!r} is no name on the Hub; write 'user/name'")
    name = repo_id.rpartition("/")[2]
    sparsity = [] if evaluation.pattern is None else ["nmsparse", "sparse", evaluation.pattern]
    data = ModelCardData(
        model_name=name,
        language=list(dict.fromkeys(languages)),
        license=license,
        library_name="transformers",
        pipeline_tag="translation",
        base_model=evaluation.base_model if _is_hub_name(evaluation.base_model) else None,
        datasets=None if dataset is None else [dataset],
        metrics=["bleu", "chrf"],
        tags=["translation", *sparsity],
        eval_results=[
            _result(evaluation, dataset, "bleu", "BLEU", evaluation.bleu, evaluation.signature),
            _result(evaluation, dataset, "chrf", "chrF", evaluation.chrf, evaluation.chrf_signature),
        ],
    )
    card = ModelCard.from_template(
        data,
        template_str=_template(),
        name=name,
        repo_id=repo_id,
        run=evaluation,
        test=evaluation.against_dense,
        description=_description(evaluation, languages),
        pattern="dense" if evaluation.pattern is None else f"{evaluation.pattern}, {_in_words(evaluation.pattern)}",
        method=method_in_words(evaluation.method),
        weights=_weights(evaluation),
        source_lang=source_lang,
        target_lang=target_lang,
        settings=settings or {},
        example=json.dumps(example, ensure_ascii=False),
        multilingual=multilingual,
        standalone=standalone,
    )
    return str(card)


def method_in_words(method: str) -> str:
    """One line on how a model was trained; the name itself of a method that this version does not know."""
    if method == "dense":
        return "without sparsity, as the baseline of sparse models"
    return METHODS[method].description if method in METHODS else method


def write_card(folder: str | Path, evaluation: Evaluation, repo_id: str, **details: Any) -> Path:
    """Writes the card as ``README.md`` into the folder of a saved model, from where it goes to the Hub.

    Args:
        folder: An existing folder.
        evaluation: As in `model_card`.
        repo_id: As in `model_card`.
        **details: The other arguments of `model_card`.

    Returns:
        The file.

    Raises:
        ValueError: As in `model_card`, or there is no such folder.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"model card: {folder} is no folder; save the model first")
    path = Path(folder) / "README.md"
    path.write_text(model_card(evaluation, repo_id, **details), encoding="utf-8")
    return path


def _template() -> str:
    """The card's template, from the installed package or from a checkout beside it."""
    packaged = files("hf_nmsparse") / "card_template.md"
    checkout = Path(__file__).parent.parent / "model_cards" / "template.md"
    return (packaged if packaged.is_file() else checkout).read_text(encoding="utf-8")


def _result(
    evaluation: Evaluation, dataset: str | None, metric: str, name: str, value: float, signature: str
) -> EvalResult:
    return EvalResult(
        task_type="translation",
        task_name="Translation",
        dataset_type=dataset or evaluation.corpus,
        dataset_name=evaluation.corpus,
        dataset_split=evaluation.split,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 2),
        metric_args={"signature": signature},
    )


def _description(evaluation: Evaluation, languages: list[str]) -> str:
    kind = "A dense" if evaluation.pattern is None else f"A {evaluation.pattern} sparse"
    return f"{kind} model that translates from {languages[0]} to {languages[1]}."


def _in_words(pattern: str) -> str:
    n, m = pattern.split(":")
    return f"at most {n} of every {m} neighbouring weights of a sparse layer are not zero"


def _weights(evaluation: Evaluation) -> str:
    dense = f"{evaluation.dense_bytes:,} bytes"
    values = f" as {evaluation.values}" if evaluation.values else ""
    if evaluation.packed_bytes is None:
        return dense + values
    share = evaluation.packed_bytes / evaluation.dense_bytes
    return f"{evaluation.packed_bytes:,} bytes packed, {share:.1%} of the {dense} that they take dense{values}"


def _language(code: str) -> str:
    """The ISO 639 part of a language code, which is what the Hub takes: "eng" of "eng_Latn"."""
    language = re.split("[_-]", code)[0].lower()
    if not re.fullmatch("[a-z]{2,3}", language):
        raise ValueError(f"model card: {code!r} is no language code; write it such as 'en' or 'eng_Latn'")
    return language


def _is_hub_name(name: str | None) -> bool:
    """Whether ``name`` can be a repository on the Hub; a path cannot."""
    if name is None:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
