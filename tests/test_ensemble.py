"""Several models as one: the mean of their probabilities, step by step and in a search."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from hf_nmsparse.pipeline import NMTranslationPipeline, translate
from recipes.ensemble import Ensemble
from tests.tiny import bart, hf, marian, tokenizer

SOURCES = torch.tensor([[5, 6, 7, 8, 1], [9, 10, 1, 0, 0]])
MASK = (SOURCES != 0).long()


def members() -> list[Any]:
    """Of other widths and depths, one of them of another family."""
    special = {"eos_token_id": 1, "decoder_start_token_id": 0, "bos_token_id": None, "forced_eos_token_id": None}
    torch.manual_seed(2)
    other = hf.BartForConditionalGeneration(hf.BartConfig(**bart(300, d_model=24, layers=3) | special))
    models = [marian(0), marian(1, d_model=16, decoder_layers=1), other]
    for model in models:
        model.generation_config.update(**special, pad_token_id=0)
        with torch.no_grad():  # so that they are sure of something
            model.get_output_embeddings().weight.mul_(20)
    return [model.eval() for model in models]


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return members()


@torch.no_grad()
def mean(models: list[Any], target: torch.Tensor) -> torch.Tensor:
    """The mean of the probabilities, without a cache."""
    each = [model(input_ids=SOURCES, attention_mask=MASK, decoder_input_ids=target).logits for model in models]
    return torch.stack([logits.softmax(dim=-1) for logits in each]).mean(dim=0)


@torch.no_grad()
def test_its_logits_are_the_log_of_the_mean_probability(models: list[Any]) -> None:
    ensemble, target = Ensemble(models).eval(), torch.tensor([[0, 9, 4], [0, 8, 3]])
    states = ensemble.get_encoder()(input_ids=SOURCES, attention_mask=MASK)
    output = ensemble(decoder_input_ids=target, encoder_outputs=states, attention_mask=MASK)
    torch.testing.assert_close(output.logits.exp(), mean(models, target), atol=1e-6, rtol=1e-4)


def test_greedy_search_takes_the_most_probable_token_of_the_mean(models: list[Any]) -> None:
    """With caches, against the mean without one, token by token."""
    given: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 1, "bad_words_ids": [[0]]}
    found = Ensemble(models).eval().generate(input_ids=SOURCES, attention_mask=MASK, **given)
    target = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(8):
        shares = mean(models, target)[:, -1]
        shares[:, [0, 1]] = 0  # padding is a bad word, and the end comes after 8 tokens
        target = torch.cat([target, shares.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(found, target)


@pytest.mark.parametrize("beams", [1, 4])
def test_an_ensemble_of_one_model_twice_is_that_model(models: list[Any], beams: int) -> None:
    given: dict[str, Any] = {"max_new_tokens": 10, "num_beams": beams, "num_return_sequences": beams}
    given |= {"input_ids": SOURCES, "attention_mask": MASK}
    assert torch.equal(Ensemble([models[0], models[0]]).eval().generate(**given), models[0].generate(**given))


def test_beams_score_by_the_mean(models: list[Any]) -> None:
    """The scores that a search gives are those of its translations under the mean, so that caches follow beams."""
    given: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3, "length_penalty": 0.0}
    asked = {"return_dict_in_generate": True, "output_scores": True, "use_cache": True}
    found = Ensemble(models).eval().generate(input_ids=SOURCES, attention_mask=MASK, **given, **asked)
    shares = mean(models, found.sequences[:, :-1]).log()
    each = shares.gather(2, found.sequences[:, 1:, None])[..., 0]
    torch.testing.assert_close(each.sum(dim=1), found.sequences_scores, atol=1e-4, rtol=1e-4)


def test_it_translates_as_any_model(models: list[Any]) -> None:
    texts, ensemble = ["The garden is big.", " ", "A man sleeps."], Ensemble(models)
    alone = translate(ensemble, tokenizer(), texts, num_beams=2, max_new_tokens=5)
    assert alone[1] == ""
    words: Any = tokenizer()
    several = NMTranslationPipeline(model=ensemble, tokenizer=words)(
        texts[:1], num_beams=2, num_return_sequences=2, max_new_tokens=5
    )
    assert several[0][0]["translation_text"] == alone[0]


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (1, {}, "ensemble: needs two models or more, got 1"),
        (2, {"vocab_size": 301}, "ensemble: models have one vocabulary, got 300 and 301 tokens"),
        (2, {"decoder_start_token_id": 2}, "ensemble: decoder_start_token_id is one for all models, got 0 and 2"),
    ],
)
def test_what_cannot_be_averaged_is_refused(count: int, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Ensemble([marian(), marian(**changes)][:count])
