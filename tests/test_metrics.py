from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from hf_nmsparse.metrics import SentenceStatistics, compare, compare_statistics, interval, score

REFERENCES = [
    "The cat sat on the mat today .",
    "A dog ran through the park this morning .",
    "Birds sing loudly in the early spring .",
    "Rain fell on the quiet town all night .",
]


def drop_words(rate: float, seed: int, copies: int = 1) -> list[str]:
    """The references without a fraction of their words."""
    rng = random.Random(seed)
    return [" ".join(w for w in text.split() if rng.random() > rate) for text in REFERENCES * copies]


def test_identical_texts_score_100() -> None:
    result = score(REFERENCES, REFERENCES)
    assert result.bleu == pytest.approx(100)
    assert result.chrf == pytest.approx(100)
    assert result.sentences == 4


def test_nothing_in_common_scores_0() -> None:
    assert score(["xyz qqq"], ["The cat sat"]).bleu == 0


def test_bleu_by_hand() -> None:
    # 5 tokens against 6: 4 of 5 unigrams, 2 of 4 bigrams, 1 of 3 trigrams match, no 4-gram of 2, which "exp" smooths to
    # 1/2 of one match; the brevity penalty is exp(1 - 6/5).
    expected = 100 * 2.718281828459045 ** (-1 / 5) * (4 / 5 * 2 / 4 * 1 / 3 * 1 / (2 * 2)) ** 0.25
    assert score(["a b c x e"], ["a b c d e f"]).bleu == pytest.approx(expected)


def test_signature_tells_how_it_was_scored() -> None:
    result = score(REFERENCES, REFERENCES)
    assert result.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert result.chrf_signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert result.signature in str(result)
    assert result.chrf_signature in str(result)


def test_agrees_with_the_sacrebleu_command(tmp_path: Path) -> None:
    hypotheses = drop_words(0.2, seed=1)
    (tmp_path / "ref").write_text("\n".join(REFERENCES) + "\n", encoding="utf-8")
    (tmp_path / "hyp").write_text("\n".join(hypotheses) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "hyp", "-m", "bleu", "chrf", "-w", "6", "--force"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    bleu, chrf = json.loads(done.stdout)
    result = score(hypotheses, REFERENCES)
    assert result.bleu == pytest.approx(bleu["score"], abs=1e-6)
    assert result.chrf == pytest.approx(chrf["score"], abs=1e-6)
    assert (result.signature, result.chrf_signature) == (bleu["signature"], chrf["signature"])


def test_several_references_may_differ_in_number() -> None:
    result = score(["a b c d", "e f g h"], [["x", "a b c d"], ["e f g h"]])
    assert result.bleu == pytest.approx(100)
    assert "nrefs:var" in result.signature


def test_a_tokenizer_for_chinese_shows_in_the_signature() -> None:
    assert "tok:zh" in score(["我爱你们"], ["我爱你们"], tokenize="zh").signature


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "there are no translations"),
        (["a"], [], "1 translations but 0 references; they must be aligned line by line"),
        (["a", "b"], ["a"], "2 translations but 1 references"),
        ("a", ["a"], "translations are a list of texts, got one text"),
        (["a"], "a", "references are a list of texts, got one text"),
        (["a", None], ["a", "b"], "sentence 1 of the translations is no text but NoneType"),
        ([b"a"], ["a"], "sentence 0 of the translations is no text but bytes"),
        (["a"], [3], "sentence 0 needs a text, or a list of texts, as reference, got 3"),
        (["a"], [[]], "as reference, got []"),
        (["a"], [["a", None]], "as reference, got ['a', None]"),
    ],
)
def test_bad_corpora(hypotheses: Any, references: Any, message: str) -> None:
    for scored in (score, lambda h, r: compare(h, h, r), lambda h, r: compare(h, h, r, samples=100)):
        with pytest.raises(ValueError, match=r"^score: ") as raised:
            scored(hypotheses, references)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_an_unknown_tokenizer_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="tokenize 'moses' is unknown; sacreBLEU knows none, zh, 13a"):
        score(["a"], ["a"], tokenize="moses")


def test_a_system_compared_with_itself() -> None:
    texts = drop_words(0.1, seed=0)
    result = compare(texts, texts, REFERENCES)
    assert (result.difference, result.interval, result.p) == (0, (0, 0), 1)
    assert result.verdict == "no difference shown"


def test_a_clear_difference_has_a_sign() -> None:
    good, bad = drop_words(0.05, seed=0, copies=20), drop_words(0.4, seed=1, copies=20)
    up, down = compare(good, bad, REFERENCES * 20, samples=200), compare(bad, good, REFERENCES * 20, samples=200)
    assert up.verdict == "better than the baseline"
    assert down.verdict == "worse than the baseline"
    assert up.p == down.p == pytest.approx(2 / 201)
    assert up.interval[0] > 0
    assert up.interval == (-down.interval[1], -down.interval[0])
    assert up.interval[0] < up.difference < up.interval[1]


def test_like_systems_show_no_difference() -> None:
    first, second = drop_words(0.2, seed=0, copies=20), drop_words(0.2, seed=1, copies=20)
    result = compare(first, second, REFERENCES * 20, samples=200)
    assert result.verdict == "no difference shown"
    assert result.interval[0] < 0 < result.interval[1]
    assert "no difference shown" in str(result)


def test_resamples_are_those_of_sacrebleu() -> None:
    # Against a baseline of BLEU 0, the differences are the system's own scores.
    texts, nothing = drop_words(0.2, seed=0, copies=5), ["xyz"] * 20
    result = compare(texts, nothing, REFERENCES * 5)
    theirs = BLEU(force=True).corpus_score(texts, [REFERENCES * 5], n_bootstrap=1000)
    low, high = result.interval
    assert result.bleu == theirs.score
    # They take the 26th smallest and largest score of 1000, and the interval here the 25th.
    assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.03)


def test_the_test_is_repeatable_and_the_seed_counts() -> None:
    first, second = drop_words(0.2, seed=0, copies=5), drop_words(0.2, seed=1, copies=5)
    one, again, other = (compare(first, second, REFERENCES * 5, samples=100, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one.interval != other.interval


def test_a_baseline_that_is_not_aligned() -> None:
    with pytest.raises(ValueError, match="1 baseline translations but 4 references"):
        compare(REFERENCES, ["a"], REFERENCES)


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="takes at least 100 samples, got 10"):
        compare(REFERENCES, REFERENCES, REFERENCES, samples=10)


def test_sentence_statistics_survive_their_file_and_give_bleu(tmp_path: Path) -> None:
    texts = [*drop_words(0.3, seed=1), "", "one two"]
    references = [*REFERENCES, "one", "one two"]
    written = SentenceStatistics.of(texts, references)
    written.write(tmp_path / "sentences.json")
    read = SentenceStatistics.read(tmp_path / "sentences.json")
    assert (read.counts.tolist(), read.signature) == (written.counts.tolist(), written.signature)
    assert read.bleu == pytest.approx(score(texts, references).bleu)
    # 4 matched and 4 possible n-grams, the two lengths: the last sentence is right, of two words
    assert read.counts[-1].tolist() == [2, 1, 0, 0, 2, 1, 0, 0, 2, 2]


@pytest.mark.parametrize("text", ["", "[]", '{"sentences": [[1, 2]]}', '{"signature": "a", "sentences": [[1, 2]]}'])
def test_what_holds_no_statistics_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sentences.json").write_text(text)
    with pytest.raises(ValueError, match=r"sentences\.json: holds no sentence statistics"):
        SentenceStatistics.read(tmp_path / "sentences.json")


def test_several_trainings_of_each_side() -> None:
    systems = [SentenceStatistics.of(drop_words(0.2, seed, 10), REFERENCES * 10) for seed in (1, 2, 3)]
    baselines = [SentenceStatistics.of(drop_words(0.2, seed, 10), REFERENCES * 10) for seed in (4, 5)]
    test = compare_statistics(systems, baselines)
    assert test.bleu == pytest.approx(sum(system.bleu for system in systems) / 3)
    assert test.bleu_baseline == pytest.approx(sum(baseline.bleu for baseline in baselines) / 2)
    assert test.interval[0] <= test.difference <= test.interval[1]
    clear = compare_statistics([SentenceStatistics.of(REFERENCES * 10, REFERENCES * 10)] * 2, baselines)
    assert clear.verdict == "better than the baseline"


def test_trainings_that_differ_widen_the_interval() -> None:
    """Both means are the same, but one side has one good and one bad training."""
    good, bad = (SentenceStatistics.of(drop_words(rate, 1, 25), REFERENCES * 25) for rate in (0.0, 0.6))
    middling = SentenceStatistics.of(drop_words(0.2, 1, 25), REFERENCES * 25)
    wide, narrow = compare_statistics([good, bad], [middling]), compare_statistics([middling, middling], [middling])
    assert list(narrow.interval) == [0, 0]
    assert wide.interval[0] < -5
    assert wide.interval[1] > 5


def test_statistics_of_other_sentences_are_not_compared() -> None:
    first = SentenceStatistics.of(["a b"], ["a b"])
    others = [
        SentenceStatistics.of(["a b"] * 2, ["a b"] * 2),
        SentenceStatistics.of(["a b"], ["a b c"]),
        SentenceStatistics.of(["a b"], ["a b"], "char"),
    ]
    for other in others:
        with pytest.raises(ValueError, match="compare: the translations are not of the same references"):
            compare_statistics([first], [other])
    with pytest.raises(ValueError, match="a side has no translations"):
        compare_statistics([], [first])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(alphabet="ab .", max_size=8), min_size=1, max_size=6))
def test_the_interval_agrees_with_the_p_value(texts: list[str]) -> None:
    references = ["a b a b"] * len(texts)
    result = compare(texts, references, references, samples=1000)
    assert 0 < result.p <= 1
    assert (result.p < 0.05) == (not result.interval[0] <= 0 <= result.interval[1])


@pytest.fixture(autouse=True)
def _no_advice() -> Any:
    """sacreBLEU takes the spaces before full stops here for forgotten detokenisation."""
    logger = logging.getLogger("sacrebleu")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


class TestTokenizers:
    READY = ("none", "zh", "13a", "intl", "char")

    @pytest.mark.parametrize("tokenize", READY)
    def test_ready(self, tokenize: str) -> None:
        assert score(REFERENCES, REFERENCES, tokenize).bleu == pytest.approx(100)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("tokenize", sorted(set(BLEU.TOKENIZERS) - set(READY)))
    def test_what_is_missing_is_said(self, tokenize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*_: Any, **__: Any) -> None:
            raise URLError("no network")

        monkeypatch.setattr("urllib.request.urlopen", offline)
        monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
        for module in ("ja_mecab", "ko_mecab"):
            monkeypatch.setattr(f"sacrebleu.tokenizers.tokenizer_{module}.MeCab", None)
        with pytest.raises(
            ValueError, match=rf"^score: tokenize '{tokenize}' is not ready on this machine: \S"
        ) as raised:
            score(REFERENCES, REFERENCES, tokenize)
        assert str(raised.value).isprintable()

    def test_one_that_ends_the_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def end(*_: Any, **__: Any) -> None:
            raise SystemExit(1)  # as sacreBLEU does where a download fails

        monkeypatch.setattr("hf_nmsparse.metrics.BLEU.__init__", end)
        with pytest.raises(ValueError, match="tokenize '13a' is not ready on this machine: 1"):
            score(REFERENCES, REFERENCES)


def test_the_interval_of_a_score_is_that_of_its_resamples() -> None:
    statistics = SentenceStatistics.of(["Ein Mann im Haus", "Zwei"], ["Ein Mann im Haus", "Drei"])
    low, high = interval(statistics.bleu_of, 2)  # of both, of the bad one alone and of the good one alone
    assert [low, high] == pytest.approx([0, 100])
    assert low < statistics.bleu < high
    same = SentenceStatistics.of(["Ein Mann im Haus"] * 3, ["Ein Mann im Haus"] * 3)
    assert list(interval(same.bleu_of, 3)) == pytest.approx([100, 100])
