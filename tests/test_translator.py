"""`Translator`: the translations of transformers, from files alone, whatever the batch, the order and the threads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from html import escape
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_nmsparse import NMSparseConfig, Translator, finalize, save_packed, sparsify
from hf_nmsparse.alignment import token_shares
from hf_nmsparse.glossary import Glossary, missing
from hf_nmsparse.kernels import engine
from hf_nmsparse.loops import loops
from hf_nmsparse.markup import Tag
from hf_nmsparse.masking import Masked
from hf_nmsparse.paragraphs import Paragraphs
from hf_nmsparse.pipeline import translate
from hf_nmsparse.placeholders import keeps_placeholders
from hf_nmsparse.translations import Translation, of_paragraphs
from hf_nmsparse.translator import _Asked
from tests import tiny
from tests.test_engine_spec import CASES, sentence, tiny_model
from tests.test_texts import FAMILIES
from tests.test_texts import folder as tokenizer_files  # noqa: F401  # a fixture

pytestmark = pytest.mark.skipif(engine.why_not() is not None, reason="there is no native engine")

TEXTS = [
    "Ein Mann schläft im Garten.",
    "The garden is big.",
    "",
    "A man",
    "  Der Garten ist groß </s>, the man sleeps in the garden, and the garden is big.  ",
    "Ü €",
    "\t",
]
ROWS = [sentence(length, seed) for seed, length in enumerate((5, 17, 1, 30, 9, 2, 12))]


def saved(model: Any, folder: Path, pattern: str | None = None, **options: Any) -> Path:
    """A model on disk, packed if a pattern is given."""
    if pattern is None:
        model.save_pretrained(folder)
    else:
        sparsify(model, NMSparseConfig(pattern))
        finalize(model)
        save_packed(model, folder, **options)
    return folder


def random(model: Any) -> Any:
    """The model with larger weights, so that its translations differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with a tokenizer."""
    path = saved(random(tiny.marian()), tmp_path_factory.mktemp("model") / "packed", "2:4")
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def translator(folder: Path) -> Translator:
    return Translator(folder, threads=1)


def generated(model: Any, row: list[int], **settings: Any) -> list[list[int]]:
    """What transformers gives for one sentence, without its start token and what fills it up."""
    output = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **settings)
    return [tokens[1:] for tokens in output.tolist()]


def is_filled(tokens: tuple[int, ...], expected: list[int]) -> bool:
    return list(tokens) == expected[: len(tokens)] and len(set(expected[len(tokens) :])) <= 1


@pytest.mark.parametrize("case", CASES)
def test_dense_models_of_every_family(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    model = tiny_model(family, **settings)
    translator = Translator(saved(model, tmp_path), threads=1)
    for beams in (1, 4):
        given: dict[str, Any] = {"num_beams": beams, "max_length": 20, "num_return_sequences": beams}
        if translator._spec.family.positions == "counted":
            given["suppress_tokens"] = [translator._spec.padding]  # which would count for positions
        for row, found in zip(ROWS, translator.translate_ids(ROWS, **given), strict=True):
            both = (found, *found.alternatives)
            expected = generated(model, row, **given)
            assert [is_filled(one.tokens, tokens) for one, tokens in zip(both, expected, strict=True)] == beams * [True]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:4"])
@pytest.mark.parametrize("values", [None, "int8"])
def test_packed_files_compute_in_the_numbers_that_they_hold(pattern: str, values: str | None, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(saved(random(tiny.marian()), tmp_path, pattern, values=values))
    translator, model = Translator(tmp_path, threads=2), AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    forms = {"2:4": ("fp32", "int8"), "1:4": ("fp32_1of4", "int8_4of16"), "4:8": ("dense_fp32", "int8_8of16")}
    form = forms.get(pattern, ("dense_fp32", "dense_fp32"))[values == "int8"]
    head = "dense_int8" if "int8" in form else "dense_fp32"
    assert translator.formats == ({form: 33} if form == head else {form: 32, head: 1})
    for beams in (1, 4):
        settings: dict[str, Any] = {"num_beams": beams, "max_length": 30}
        expected = translate(model, AutoTokenizer.from_pretrained(tmp_path), TEXTS, 4, **settings)
        assert [one.text for one in translator.translate(TEXTS, **settings)] == expected


@pytest.mark.parametrize("compute", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("pattern", ["2:4", None])
def test_what_it_computes_in_can_be_chosen(compute: str, pattern: str | None, tmp_path: Path) -> None:
    translator = Translator(saved(random(tiny.marian()), tmp_path, pattern), compute=compute, threads=1)
    layers = compute if pattern else f"dense_{compute}"
    assert translator.formats[layers] >= 32
    assert translator.formats[f"dense_{compute}"] >= 1
    exact = Translator(tmp_path, threads=1)
    for one, other in zip(ROWS[:3], ROWS[3:6], strict=True):
        found, expected = (each._engine.score([one], [[0, *other]], 1)[0] for each in (translator, exact))
        assert np.abs(found - expected).max() < (1e-5 if compute == "fp32" else 0.5)


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    model = random(tiny.marian())
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one, other = (Translator(tmp_path / name, threads=1) for name in ("whole", "shards"))
    assert one.translate_ids(ROWS, max_length=20) == other.translate_ids(ROWS, max_length=20)


def test_tokens_are_counted_before_a_text_is_cut(translator: Translator) -> None:
    counts = translator.count_tokens([*TEXTS, "The garden " * 100])
    assert counts[:-1] == [len(one.source) for one in translator.translate(TEXTS)]
    assert counts[-1] > translator.longest_source
    assert counts[2] == counts[6] == 0
    with pytest.raises(ValueError, match="leave out src_lang"):
        translator.count_tokens(["A man"], src_lang="en")


def test_scores_are_the_log_probabilities_of_transformers(folder: Path, translator: Translator) -> None:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    targets = ["The garden", "Ein Mann schläft.", "A man sleeps in the garden", "Ü"]
    sources = ["Der Garten", "A man", "Ein Mann schläft im Garten", "ü"]
    found = translator.score(sources, targets)
    for source, target, one in zip(sources, targets, found, strict=True):
        labels = tokenizer(text_target=[target], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(**tokenizer([source], return_tensors="pt"), labels=labels).logits
        expected = logits.log_softmax(-1)[0].gather(1, labels[0][:, None])[:, 0]
        assert one.tokens == tuple(labels[0].tolist())
        assert one.token_scores == pytest.approx(expected.tolist(), abs=1e-4)
        assert one.total == pytest.approx(float(expected.sum()), abs=1e-3)


@pytest.mark.parametrize("family", ["nllb", "m2m100", "mbart", "mbart-50"])
def test_scores_are_of_the_language_that_the_call_or_the_model_names(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    case = FAMILIES[family]
    tokenizer = case.tokenizer(request.getfixturevalue("tokenizer_files"))
    model = case.model(tokenizer)
    tokenizer.save_pretrained(saved(model, tmp_path / "of the call"))
    settings = case.asks(tokenizer, case.target)
    named = Translator(tmp_path / "of the call").score(
        ["a man"], ["red tree"], src_lang=case.source, tgt_lang=case.target
    )
    first = [] if settings["forced_bos_token_id"] is None else [settings["forced_bos_token_id"]]
    text = tokenizer("red tree", add_special_tokens=False)["input_ids"]
    assert named[0].tokens == (*first, *text, tokenizer.eos_token_id)
    model.generation_config.update(**settings)
    tokenizer.save_pretrained(saved(model, tmp_path / "of the model"))
    assert Translator(tmp_path / "of the model").score(["a man"], ["red tree"], src_lang=case.source) == named


def test_scores_of_beams_are_those_of_transformers(folder: Path, translator: Translator) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    settings: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 3, "max_length": 20, "length_penalty": 0.6}
    found = translator.translate_ids(ROWS, return_scores=True, **settings)
    for row, one in zip(ROWS, found, strict=True):
        output = model.generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row)), output_scores=True,
            return_dict_in_generate=True, **settings
        )  # fmt: skip
        both = (one, *one.alternatives)
        assert [each.score for each in both] == pytest.approx(output.sequences_scores.tolist(), abs=1e-4)
        for each in both:
            assert each.token_scores is not None
            assert each.score == pytest.approx(sum(each.token_scores) / len(each.tokens) ** 0.6, abs=1e-4)
    assert translator.translate_ids(ROWS[:1], max_length=20)[0].score is None


@pytest.mark.parametrize("do_sample", [False, True])
def test_neither_batch_nor_order_nor_threads_change_a_translation(folder: Path, do_sample: bool) -> None:
    settings: dict[str, Any] = {"max_length": 30, "return_scores": True, "do_sample": do_sample, "seed": 7}
    settings |= {"num_return_sequences": 2} if do_sample else {"num_beams": 3}
    texts = [text for text in TEXTS * 4 if text.strip()]
    expected = Translator(folder, threads=1).translate(texts, batch_size=1, **settings)
    for threads, size, tokens in ((1, 7, 4096), (2, 64, 40), (4, 3, 100)):
        translator = Translator(folder, threads=threads)
        assert translator.translate(texts, batch_size=size, batch_tokens=tokens, **settings) == expected
        assert list(translator.translate_iterable(iter(texts), chunk_size=5, batch_size=2, **settings)) == expected
    if not do_sample:  # the seed of a sentence is that of its place
        assert translator.translate(texts[::-1], **settings) == expected[::-1]
    else:
        assert translator.translate(texts, **(settings | {"seed": 8})) != expected


def test_eight_threads_at_once_give_the_same(translator: Translator) -> None:
    def work(beams: int) -> list[Translation]:
        return translator.translate(TEXTS * 3, num_beams=beams, max_length=25, return_scores=True)

    expected = {beams: work(beams) for beams in (1, 2, 3, 4)}
    with ThreadPoolExecutor(8) as pool:
        for beams, found in zip([1, 2, 3, 4] * 4, pool.map(work, [1, 2, 3, 4] * 4), strict=True):
            assert found == expected[beams]


def test_caches_in_fp16_round_scores_and_no_more(folder: Path, translator: Translator) -> None:
    texts = [text for text in TEXTS if text.strip()]
    half = Translator(folder, threads=1, half_cache=True)
    rounded, exact = (
        np.concatenate([row.token_scores for row in one.score(texts, texts)]) for one in (half, translator)
    )
    assert not np.array_equal(rounded, exact)
    # Keys and values are off by 2**-12 of themselves at most, and log-probabilities here are below 16.
    assert np.abs(rounded - exact).max() < 16 * 2**-8


def test_prefixes_and_what_is_said_of_a_translation(translator: Translator) -> None:
    prefixes = [(5, 6), (), (7,)]
    found = translator.translate_ids(ROWS[:3], prefixes=prefixes, max_new_tokens=6, return_attention=True)
    for row, one in zip(ROWS, found, strict=False):
        assert one.text == ""
        assert one.source == tuple(row)
        assert 1 <= len(one.tokens) <= 6
        assert one.attention is not None
        assert one.attention.shape == (len(one.tokens), len(row))
        assert one.attention.sum(axis=1) == pytest.approx(1.0, abs=1e-4)
    alone = translator.translate_ids([ROWS[2]], prefixes=[(7,)], max_new_tokens=6)
    assert alone == [found[2]]
    assert translator.translate_ids([]) == []
    assert translator.translate([], num_beams=2) == []


def test_attention_is_that_of_transformers(folder: Path, translator: Translator) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager")
    [one] = translator.translate_ids(ROWS[:1], max_length=12, return_attention=True)
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(ROWS[:1]),
            decoder_input_ids=torch.tensor([[0, *one.tokens[:-1]]]),
            output_attentions=True,
        )
    expected = output.cross_attentions[-1][0].mean(0)
    assert one.attention is not None
    assert np.abs(one.attention - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("settings", [{"num_beams": 2, "return_scores": True}, {"do_sample": True}])
def test_paragraphs_are_translated_sentence_by_sentence(translator: Translator, settings: dict[str, Any]) -> None:
    texts = ["A dog. A cat runs.\n\n  a b", "", " A dog. ", "one"]
    sentences = ["A dog.", "A cat runs.", "a b", "A dog.", "one"]
    single = translator.translate(sentences, max_length=20, **settings)
    found = translator.translate(texts, split=True, max_length=20, **settings)
    assert translator.paragraphs(texts).sentences == sentences
    assert found[0].text == f"{single[0].text} {single[1].text}\n\n  {single[2].text}"
    assert found[0].sentences == tuple(single[:3])
    assert found[0].tokens == single[0].tokens + single[1].tokens + single[2].tokens
    if settings.get("return_scores"):
        assert found[0].score == sum(one.score or 0 for one in single[:3])
        assert found[0].token_scores == tuple(chain.from_iterable(one.token_scores or () for one in single[:3]))
    assert (found[1].text, found[1].tokens, found[1].sentences) == ("", (), ())
    assert found[2] == replace(single[3], text=f" {single[3].text} ")
    assert found[3] == single[4]
    assert list(translator.translate_iterable(texts, chunk_size=1, split=True, max_length=20, **settings)) == found


def test_a_sentence_alone_keeps_its_alternatives(translator: Translator) -> None:
    settings: dict[str, Any] = {"num_beams": 2, "num_return_sequences": 2, "max_length": 20}
    [found], [single] = (translator.translate([text], split=True, **settings) for text in (" A dog.", "A dog."))
    assert [one.text for one in found.alternatives] == [f" {one.text}" for one in single.alternatives] != []


def test_alternatives_of_a_text_are_made_of_those_of_its_sentences(translator: Translator) -> None:
    settings: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_length": 20, "return_scores": True}
    [found] = translator.translate(["A dog runs.  A man."], split=True, **settings)
    dog, man = translator.translate(["A dog runs.", "A man."], **settings)
    assert len(found.alternatives) == 2
    for one, first, second in zip(found.alternatives, dog.alternatives, man.alternatives, strict=True):
        assert one.text == f"{first.text}  {second.text}"
        assert one.tokens == (*first.tokens, *second.tokens)
        assert one.score == (first.score or 0) + (second.score or 0)
    assert found.sentences == (dog, man)


def test_a_sentence_with_fewer_alternatives_has_its_last_in_what_is_further_behind() -> None:
    def is_one(text: str, score: float, *others: Translation) -> Translation:
        return Translation(text, (1,), score, alternatives=others)

    found = [is_one("a", -1, is_one("b", -2)), is_one("x", -1, is_one("y", -2), is_one("z", -5)), is_one("q", -3)]
    [joined] = of_paragraphs(Paragraphs(["One dog. Two men. Three."], "en"), found)
    assert [joined.text, *(one.text for one in joined.alternatives)] == ["a x q", "b y q", "b z q"]
    assert [joined.score, *(one.score for one in joined.alternatives)] == [-5, -7, -10]


def test_what_is_too_long_is_cut_and_none_of_it_lost(translator: Translator) -> None:
    text = ", ".join(["a b c d e f g h"] * 20) + ". one"
    sentences = translator.paragraphs([text]).sentences
    assert "".join(sentences).replace(" ", "") == text.replace(" ", "")
    assert max(translator.count_tokens(sentences)) <= translator.longest_source < translator.count_tokens([text])[0]


def test_loops_are_broken(folder: Path, translator: Translator) -> None:
    settings: dict[str, Any] = {"max_length": 60}
    as_they_are = translator.translate(TEXTS, **settings)
    without = translator.translate(TEXTS, no_repeat_ngram_size=3, **settings)
    found = translator.translate(TEXTS, break_loops=True, **settings)
    expected = [
        replace(other, looped=True) if loops(one.tokens, one.source) else one
        for one, other in zip(as_they_are, without, strict=True)
    ]
    assert found == expected
    assert {one.looped for one in found} == {True, False}
    assert not any(
        one.looped for one in translator.translate(TEXTS, break_loops=True, no_repeat_ngram_size=2, **settings)
    )
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    paragraph = "\n".join(TEXTS)
    for size in (None, 2, 5):  # what forbids as much is not translated again, by either
        given: dict[str, Any] = {"break_loops": True, "split": True, "no_repeat_ngram_size": size, **settings}
        expected_texts = [one.text for one in translator.translate([paragraph], **given)]
        assert translate(model, tokenizer, [paragraph], **given) == expected_texts


PLACED = ["A {dog} runs.", "a b c", "%s of %d, http://a.example/b", "", "{dog}"]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 4, "num_return_sequences": 3}, {"do_sample": True, "seed": 3}])
def test_placeholders_come_back(translator: Translator, settings: dict[str, Any]) -> None:
    given: dict[str, Any] = {"max_length": 30, **settings}
    as_they_are = translator.translate(PLACED, **given)
    found = translator.translate(PLACED, keep_placeholders=True, **given)
    for source, one, other in zip(PLACED, found, as_they_are, strict=True):
        assert one.masked is not keeps_placeholders(source, other.text)
        assert one.attention is None
        if not one.masked:
            assert replace(one, alternatives=()) == replace(other, alternatives=())
        assert all(keeps_placeholders(source, each.text) for each in (one, *one.alternatives))
    assert [one.masked for one in found] == [True, False, True, False, True]
    if not settings:
        masked = translator.translate([Masked.of(PLACED[0]).text], **given)[0]
        assert found[0].tokens == masked.tokens
    looking = translator.translate(PLACED[:1], keep_placeholders=True, return_attention=True, **given)[0]
    assert looking.attention is not None
    assert looking.attention.shape == (len(looking.tokens), len(looking.source))


def test_placeholders_of_paragraphs_and_in_chunks(folder: Path, translator: Translator) -> None:
    text = "A {dog} runs.  a b\n\n%s sleeps."
    given: dict[str, Any] = {"split": True, "keep_placeholders": True, "max_length": 30}
    found = translator.translate([text], **given)[0]
    assert keeps_placeholders(text, found.text)
    assert [one.masked for one in found.sentences] == [True, False, True]
    assert list(translator.translate_iterable([text] * 3, chunk_size=2, **given)) == [found] * 3
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    # Without attention they stand elsewhere, and there are as many.
    (other,) = translate(model, tokenizer, [text], **given)
    assert keeps_placeholders(text, other)
    assert sorted(other.split()) == sorted(found.text.split())


def test_marks_come_back(translator: Translator) -> None:
    bold = Tag("<b>", "open"), Tag("</b>", "close")
    texts = [("A ", bold[0], "dog", bold[1], " runs. a b", Tag("<v>", "void")), ("a b c",), (), (bold[0], bold[1])]
    found = translator.translate_marked(texts, max_length=30)
    for text, one in zip(texts, found, strict=True):
        assert [part for part in one if isinstance(part, Tag)] == [part for part in text if isinstance(part, Tag)]
    plain = ["".join(part for part in text if isinstance(part, str)) for text in texts]
    expected = translator.translate(plain, split=True, break_loops=True, keep_placeholders=True, max_length=30)
    assert ["".join(part for part in one if isinstance(part, str)) for one in found] == [one.text for one in expected]


def test_html(translator: Translator) -> None:
    page = "<p class='x'>A <b>dog</b> runs. a b<p>use <code>a &lt; b</code> now<!-- c --><script>a b</script>"
    (found,) = translator.translate_html([page], max_length=30)
    tags = re.compile(r"<code>.*?</code>|<script>.*?</script>|<[^<>]*>")
    assert tags.findall(found) == tags.findall(page)
    assert translator.translate_html(iter(["a b", ""]), max_length=30) == [
        escape(translator.translate(["a b"], break_loops=True, max_length=30)[0].text, quote=False),
        "",
    ]
    with pytest.raises(ValueError, match=r"^translate: expected a list of texts, got one text"):
        translator.translate_html(page)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 4, "num_return_sequences": 2}])
def test_terms_of_a_glossary_come_out(translator: Translator, settings: dict[str, Any]) -> None:
    given: dict[str, Any] = {"max_length": 60, **settings}
    texts = ["A dog runs.", "a b c", "The man sleeps.", ""]
    glossary = Glossary({"dog": "man", "the man": "runs"})
    plain = translator.translate(texts, return_scores=True, **given)
    found = translator.translate(texts, return_scores=True, glossary=glossary, **given)
    lacking = [missing(glossary.terms(text), one.text) for text, one in zip(texts, found, strict=True)]
    assert lacking == [[], [], [], []]
    assert found[1] == plain[1]
    assert found[0] != plain[0]
    for text, one in zip(texts, found, strict=True):
        if one.tokens != plain[texts.index(text)].tokens:
            # What is told of it is told of all its tokens.
            (scored,) = translator._engine.score([one.source], [[translator._search(_Asked({})).start, *one.tokens]], 1)
            assert one.token_scores == tuple(scored[1:].tolist())
            assert one.alternatives == ()
    (looking,) = translator.translate(texts[:1], glossary=glossary, return_attention=True, **given)
    assert looking.attention is not None
    assert looking.attention.shape == (len(looking.tokens), len(looking.source))
    assert looking.attention.sum(1) == pytest.approx(1)
    both = {"split": True, "keep_placeholders": True, "glossary": glossary, **given}
    paragraph = translator.translate(["A dog runs.  {x} of the man"], **both)[0].text
    assert keeps_placeholders("{x}", paragraph)
    assert not missing(glossary.terms("A dog runs. The man"), paragraph)


def test_a_text_is_aligned_with_its_tokens_once_for_all_its_terms(
    translator: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned: list[str] = []

    def noted(text: str, *given: Any) -> Any:
        aligned.append(text)
        return token_shares(text, *given)

    monkeypatch.setattr("hf_nmsparse.translator.token_shares", noted)
    text = "A dog sees the man."
    translator.translate([text], glossary=Glossary({"dog": "Hund", "man": "Mann"}), max_length=60)
    assert aligned.count(text) == 1
    assert len(aligned) == 3  # with the translation before each term


def test_a_term_that_finds_no_room_is_left_out(translator: Translator) -> None:
    glossary = Glossary({"dog": "man runs the dog a b c"})
    assert len(translator.translate(["A dog runs."], glossary=glossary, max_length=6)[0].tokens) <= 5


@pytest.mark.parametrize("glossary", [{"dog": "man"}, "terms.tsv"])
def test_what_is_no_glossary_is_refused(translator: Translator, glossary: Any) -> None:
    with pytest.raises(ValueError, match=r"^translate: glossary is no Glossary but (dict|str); give Glossary\(terms\)"):
        translator.translate(["A dog runs."], glossary=glossary)
    with pytest.raises(ValueError, match=r"^translate: glossary is no Glossary"):
        translator.translate_html(["<p>A dog runs.</p>"], glossary=glossary)


@pytest.mark.parametrize("split", ["german", "", 5, "de!"])
def test_languages_that_are_none(folder: Path, translator: Translator, split: Any) -> None:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for translated in (translator.translate, partial(translate, model, tokenizer)):
        with pytest.raises(ValueError, match=f"^split: True, or the code of a language such as 'de', got {split!r}$"):
            translated(["a"], split=split)


def test_sentences_are_cut_by_the_rules_that_are_named(translator: Translator) -> None:
    text = "Am 3. Mai war es soweit."  # a day, not an end, in German
    assert translator.paragraphs([text], split="de").sentences == [text]
    assert len(translator.paragraphs([text]).sentences) == 2
    found = translator.translate([text], split="de", max_length=30)[0]
    assert found == translator.translate([text], max_length=30)[0]


def test_blank_texts_have_blank_translations(translator: Translator) -> None:
    found = translator.translate(TEXTS, max_length=10)
    assert [not one.text for one in found] == [not text.strip() for text in TEXTS]
    assert found[2] == Translation("", ())


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 4}, {"do_sample": True, "seed": 3}, {"no_repeat_ngram_size": 2}]
)
def test_a_stream_is_the_translation_in_pieces(translator: Translator, settings: dict[str, Any]) -> None:
    texts = [text for text in TEXTS if text.strip()]
    whole = [one.text for text in texts for one in translator.translate([text], max_length=24, **settings)]
    streams = [list(translator.stream(text, max_length=24, **settings)) for text in texts]
    assert ["".join(pieces) for pieces in streams] == whole
    assert all(map(all, streams))  # no piece is empty
    if settings.get("num_beams") is None:
        assert max(map(len, streams)) > 5


def test_a_stream_that_is_closed_leaves_the_translator_as_it_was(translator: Translator) -> None:
    expected = translator.translate(TEXTS, max_length=24)
    stream = translator.stream(TEXTS[1], max_length=60, min_length=50)
    assert next(stream)
    stream.close()
    assert translator.translate(TEXTS, max_length=24) == expected
    assert list(translator.stream("  ")) == []


def test_a_stream_says_whether_it_is_a_loop(translator: Translator) -> None:
    def looped(text: str) -> bool:
        def ended() -> Generator[str]:
            found.append((yield from translator.stream(text, max_length=60)))

        found: list[bool] = []
        list(ended())
        return found[0]

    expected = [one.looped for one in translator.translate(TEXTS, max_length=60, break_loops=True)]
    assert [looped(text) for text in TEXTS] == expected
    assert set(expected) == {True, False}


def test_a_process_ends_with_a_stream_that_nobody_has_closed(folder: Path) -> None:
    code = (
        f"from hf_nmsparse import Translator; t = Translator({str(folder)!r});"
        "stream = t.stream('Der Garten', max_length=60, min_length=50, num_beams=1); next(stream)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_process_that_translates_has_no_torch(folder: Path) -> None:
    code = (
        "import sys; from hf_nmsparse import Translator;"
        f"t = Translator({str(folder)!r}); t.translate(['Der Garten'], num_beams=2, max_length=9);"
        "t.score(['Der Garten'], ['The garden']);"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


ODD: list[Any] = [None, 0, -1, 1, 2, 7, 2**31, 2**63, 1e9, "x", [], {}, True, float("nan"), "2:4", [[1]], [-5], [10**9]]


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_translate_or_are_one_line(folder: Path, seed: int, tmp_path: Path) -> None:
    chance, weights = Random(seed), (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    names = ("config.json", "generation_config.json")
    contents: dict[str, dict[str, Any]] = {name: json.loads((folder / name).read_text()) for name in names}
    said: list[str] = []
    for _ in range(50):
        changed, data = {name: dict(content) for name, content in contents.items()}, bytearray(weights)
        if chance.random() < 0.5:
            content = changed[chance.choice(names)]
            key, value = chance.choice([*content, "num_beams", "pad_token_id", "eos_token_id"]), chance.choice(ODD)
            record = content.get(key)
            content[key] = {**record, chance.choice([*record]): value} if isinstance(record, dict) else value
        else:
            for _ in range(chance.choice([1, 3, 30])):
                data[chance.randrange(chance.choice([header, len(data)]))] = chance.randrange(256)
            del data[chance.choice([len(data), chance.randrange(len(data))]) :]
        for name, content in changed.items():
            (tmp_path / name).write_text(json.dumps(content))
        (tmp_path / "model.safetensors").write_bytes(data)
        try:
            Translator(tmp_path, threads=1).translate_ids(ROWS[:2], max_new_tokens=5, num_beams=chance.choice([1, 2]))
        except ValueError as error:
            said.append(str(error))
    assert said
    assert not any("\n" in line for line in said)


class TestWhatIsRefused:
    """Each is one line, and C++ has seen nothing of it."""

    @pytest.fixture
    def copy(self, tmp_path: Path) -> Path:
        random(tiny.marian()).save_pretrained(tmp_path)
        return tmp_path

    def refused(self, folder: Path, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
            Translator(folder, **options)
        assert message in str(error.value)

    def change(self, folder: Path, **settings: Any) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    def test_names_that_are_none(self) -> None:
        for model, kind in ((None, "NoneType"), (b"model", "bytes"), (3, "int")):
            self.refused(model, f"a model is a folder or a name on the Hub, got {kind}")  # type: ignore[arg-type]
        for name in ("x" * 5000, "nul\0"):
            self.refused(name, "no folder ")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"model_type": "nllb-moe"}, "model_type 'nllb-moe' is none of"),
            ({"d_model": 2**30}, "the model's is"),
            ({"encoder_layers": 2**31 - 1}, "encoder_layers is a whole number from 1 to"),
            ({"encoder_layers": 1}, "and config.json has fewer layers; correct it"),
            ({"encoder_layers": 3}, "which the model needs; save the whole model again"),
            ({"max_position_embeddings": 2**31 - 1}, "positions"),
            ({"vocab_size": 2**31 - 1}, "the model's is [2147483647, 32], got [300, 32]"),
            ({"vocab_size": 299}, "got [300, 32]"),
            ({"encoder_attention_heads": 5}, "d_model 32 does not divide into 5 heads"),
            ({"dtype": "nonsense"}, "config.json: dtype is one of"),
            ({"quantization_config": {"quant_method": "gptq"}}, "is not ours"),
            (
                {"quantization_config": {"quant_method": "nmsparse", "format": "dense", "pattern": "2:4"}},
                "nmsparse pack",
            ),
            ({"quantization_config": {"quant_method": "nmsparse"}}, "format is one of"),
        ],
    )
    def test_settings(self, copy: Path, settings: dict[str, Any], message: str) -> None:
        self.change(copy, **settings)
        self.refused(copy, message)

    def test_tensors(self, copy: Path) -> None:
        file = copy / "model.safetensors"
        whole = load_file(file)
        name = "model.decoder.layers.1.fc1.weight"
        for tensor, message in (
            (None, f"the files hold no {name}, which the model needs"),
            (whole[name].T.contiguous(), f"{name}: the model's is [64, 32], got [32, 64]"),
            (whole[name].flatten(), f"{name}: the model's is [64, 32], got [2048]"),
            (whole[name].int(), f"{name}: weights and biases are"),
            (whole[name].clone().fill_(float("nan")), f"{name}: numbers must be finite"),
        ):
            changed = {key: value for key, value in whole.items() if key != name}
            save_file(changed if tensor is None else changed | {name: tensor}, file, {"format": "pt"})
            self.refused(copy, message)
        bias = "model.decoder.layers.1.fc1.bias"
        save_file(whole | {bias: torch.zeros(63)}, file, {"format": "pt"})
        self.refused(copy, f"{bias}: the model's bias is [64], got [63]")

    def test_files(self, copy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        file = copy / "model.safetensors"
        content = file.read_bytes()
        for cut in (content[:-1], content[: len(content) // 2], content[:5], b""):
            file.write_bytes(cut)
            self.refused(copy, "not a whole safetensors file")
        file.unlink()
        self.refused(copy, "holds no safetensors files; load the model with transformers and save it again")
        (copy / "config.json").write_text("[1]")
        self.refused(copy, "config.json: the file is no JSON object")
        self.refused(tmp_path_factory.mktemp("empty"), "holds no config.json")
        self.refused(copy / "nowhere" / "at" / "all", "no folder")

    def test_arguments(self, folder: Path) -> None:
        self.refused(folder, "compute is one of 'auto', 'int8', 'bf16', 'fp32', got 'fast'", compute="fast")
        for threads in (0, 1025, 1.0, True):
            self.refused(folder, "threads are 1 to 1024", threads=threads)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"beams": 4}, "there is no setting 'beams'"),
            ({"num_beams": 0}, "num_beams needs at least 1, got 0"),
            ({"max_new_tokens": 64_000}, "beyond the 64 positions"),
            ({"batch_size": 0}, "batch_size needs at least 1"),
            ({"seed": 1.5}, "seed is a whole number"),
            ({"src_lang": "de"}, "this model has one pair of languages"),
        ],
    )
    def test_settings_of_a_call(self, translator: Translator, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=r"^translate: [^\n]+$") as error:
            translator.translate(["Der Garten"], **given)
        assert message in str(error.value)

    def test_ids(self, translator: Translator) -> None:
        cases: list[tuple[Any, str]] = [
            ([[5, 300]], "source tokens are below 300, got 300"),
            ([[-1]], "source tokens are below 300, got -1"),
            ([[]], "the source has 0 tokens"),
            ([[2**40]], "does not fit 32 bits"),
            ([[5.7]], "token ids are whole numbers in rows"),
            ([[5] * 65], "the source has 65 tokens, and the model takes 64"),
        ]
        for rows, message in cases:
            with pytest.raises(ValueError, match=r"^engine: [^\n]+$") as error:
                translator.translate_ids(rows, max_length=10)
            assert message in str(error.value)
        with pytest.raises(ValueError, match="2 sentences need as many prefixes, got 1"):
            translator.translate_ids([[5], [6]], prefixes=[[1]])
        others: list[tuple[Any, str]] = [
            ([5, 6], "rows: a list of ids is due at 0, got int"),
            ([[5], None], "rows: a list of ids is due at 1, got NoneType"),
            ([b"ab"], "rows: a list of ids is due at 0, got bytes"),
            ({"a": [5]}, "rows are lists of ids in a list, got dict"),
            (None, "rows are lists of ids in a list, got NoneType"),
        ]
        for rows, message in others:
            with pytest.raises(ValueError, match=f"^translate: {message}$"):
                translator.translate_ids(rows, max_length=10)
        with pytest.raises(ValueError, match=r"^translate: prefixes: a list of ids is due at 0, got NoneType$"):
            translator.translate_ids([[5]], prefixes=[None])  # type: ignore[list-item]

    def test_texts(self, translator: Translator) -> None:
        with pytest.raises(ValueError, match="stream: takes one text, got list; translate takes several"):
            translator.stream(["Der Garten"])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="stream: sentence 0 holds a NUL, which no text does; take it out"):
            translator.stream("Der\0 Garten")
        with pytest.raises(ValueError, match="stream: gives one translation; leave num_return_sequences out"):
            translator.stream("Der Garten", num_beams=2, num_return_sequences=2)
        with pytest.raises(ValueError, match="num_beams"):  # before anything is asked of it
            translator.stream("Der Garten", num_beams=0)
        with pytest.raises(ValueError, match="expected a list of texts, got one text"):
            translator.translate("Der Garten")
        with pytest.raises(ValueError, match="sentence 1 is no text but int"):
            translator.translate(["Der Garten", 5])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="score: 1 texts need as many translations, got 2"):
            translator.score(["a"], ["b", "c"])
        with pytest.raises(ValueError, match="score: pair 1 has a blank side; leave it out"):
            translator.score(["a", "b"], ["c", " "])
