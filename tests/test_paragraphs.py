"""Texts cut into sentences and put together again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nmsparse.paragraphs import Paragraphs, language_code

NEWS = Path(__file__).parents[2] / "shared/data/wmt-news/validation.jsonl.gz"
TEXTS = st.text(st.sampled_from("aB .!?,;:\n\r\t\"')(0一。、\u2028\u00a0\u2003\u3000é"), max_size=60) | st.text(
    max_size=40
)


@pytest.mark.parametrize(
    ("language", "text", "sentences"),
    [
        ("en", "Hello. How are you?", ["Hello.", "How are you?"]),
        ("en", "Dr. Smith came at 5 p.m. He left.", ["Dr. Smith came at 5 p.m.", "He left."]),
        (
            "de",
            "Am 3. Oktober kam z. B. Herr Dr. Müller. Er ging.",
            ["Am 3. Oktober kam z. B. Herr Dr. Müller.", "Er ging."],
        ),
        ("deu_Latn", "Am 3. Oktober kam er. Er ging.", ["Am 3. Oktober kam er.", "Er ging."]),
        ("en", '"Is it?" she asked. Yes.', ['"Is it?" she asked.', "Yes."]),
        ("en", "a title\n- one. Two\r\n\r\n  - three", ["a title", "- one.", "Two", "- three"]),
        ("zh", "一。二。", ["一。", "二。"]),
        ("en", "one sentence", ["one sentence"]),
        ("en", "", []),
        ("en", " \n\t ", []),
    ],
)
def test_sentences(language: str, text: str, sentences: list[str]) -> None:
    paragraphs = Paragraphs([text], language)
    assert paragraphs.sentences == sentences
    assert paragraphs.joined(sentences) == [text]


@given(st.lists(TEXTS, max_size=4), st.sampled_from(["en", "de", "zh", "ar", "xx", None]), st.integers(1, 12))
def test_what_is_not_translated_stays(texts: list[str], language: str | None, longest: int) -> None:
    for count in (None, lambda given: list(map(len, given))):
        paragraphs = Paragraphs(texts, language, count, longest)
        assert all(sentence == sentence.strip() != "" for sentence in paragraphs.sentences)
        assert paragraphs.joined(paragraphs.sentences) == texts
        assert paragraphs.lengths == ([] if count is None else list(map(len, paragraphs.sentences)))
        assert count is None or all(len(sentence) <= longest for sentence in paragraphs.sentences)


@pytest.mark.parametrize("language", ["en", "de", "fr"])
@pytest.mark.parametrize("space", ["\u00a0", "\u2003", "\u3000"])
def test_spaces_of_several_bytes(language: str, space: str) -> None:
    """sentencex panics where one stands before an initial."""
    paragraphs = Paragraphs([f"A{space}.B. He. {space}B{space}."], language)
    assert paragraphs.joined(paragraphs.sentences) == [f"A{space}.B. He. {space}B{space}."]


def test_white_space_and_lines_stay() -> None:
    paragraphs = Paragraphs(["  One.  Two.\n\n\tThree. ", "", "Four."], "en")
    assert paragraphs.joined(["1", "2", "3", "4"]) == ["  1  2\n\n\t3 ", "", "4"]
    assert paragraphs.gathered([1, 2, 3, 4]) == [[1, 2, 3], [], [4]]
    with pytest.raises(ValueError, match=r"^paragraphs: 4 sentences, got 1 translations$"):
        paragraphs.joined(["1"])


def test_a_space_stands_between_sentences_of_a_script_that_has_it() -> None:
    paragraphs = Paragraphs(["一。二。"], "zh")
    assert paragraphs.joined(["One.", "Two."]) == ["One. Two."]
    assert paragraphs.joined(["あ。", "い。"]) == ["あ。い。"]
    assert paragraphs.joined(["", "Two."]) == ["Two."]


def test_a_long_sentence_is_cut_where_a_clause_ends() -> None:
    def cut(text: str, longest: int) -> list[str]:
        return Paragraphs([text], "en", lambda given: list(map(len, given)), longest).sentences

    assert cut("He came, saw; and he won, at last", 20) == ["He came, saw;", "and he won, at last"]
    assert cut("He came and saw, and he won", 20) == ["He came and saw,", "and he won"]
    assert cut("He came and saw and won it", 20) == ["He came and", "saw and won it"]
    assert cut("abcdefgh", 4) == ["abcd", "efgh"]
    assert cut("ab", 0) == ["a", "b"]  # what does not fit at all ends too


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("de", "de"),
        ("de_DE", "de"),
        ("deu_Latn", "de"),
        ("__de__", "de"),
        ("zh-Hans", "zh"),
        ("xyz_Latn", "en"),
        (None, "en"),
    ],
)
def test_language_code(language: str | None, code: str) -> None:
    assert language_code(language) == code


@pytest.mark.skipif(not NEWS.exists(), reason="the news of shared/data is not here")
@pytest.mark.parametrize("language", ["en", "de"])
def test_news(language: str) -> None:
    """Most ends between five lines of news are found, and most of what is found is one: 95% and 98% in English."""
    with gzip.open(NEWS, "rt", encoding="utf-8") as file:
        lines = [json.loads(line)["translation"][language].strip() for line in file]
    found = kept = ends = 0
    for start in range(0, len(lines), 5):
        document = lines[start : start + 5]
        text = " ".join(document)
        paragraphs, place, cuts = Paragraphs([text], language), 0, set()
        for sentence in paragraphs.sentences[:-1]:
            place = text.index(sentence, place) + len(sentence)
            cuts.add(place)
        true = {len(" ".join(document[:count])) for count in range(1, 5)}
        found, kept, ends = found + len(cuts), kept + len(cuts & true), ends + len(true)
    assert kept / ends > 0.92
    assert kept / found > 0.95


def test_no_sentence_ends_in_a_placeholder() -> None:
    text = "Of {n, plural, one {# item. It} other {# items. They}} at http://a.example/?b. Then {it. Is} so. {a} is. b"
    assert Paragraphs([text]).sentences == [
        "Of {n, plural, one {# item. It} other {# items. They}} at http://a.example/?b.",
        "Then {it. Is} so.",
        "{a} is.",
        "b",
    ]
