"""Shortlists: what is learned, what a file may hold, and the engine's head with one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from hf_nmsparse import NMSparseConfig, Translator, finalize, generation, save_packed, sparsify
from hf_nmsparse.cli import main
from hf_nmsparse.generation import engine_for
from hf_nmsparse.kernels import engine, native
from hf_nmsparse.kernels.engine import Hypothesis, SearchConfig
from hf_nmsparse.packing import pack
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.rounding import quantize_rows
from hf_nmsparse.shortlist import FILE, Shortlist, coverage, learn, read, save
from tests import tiny

NEEDS_ENGINE = pytest.mark.skipif(engine.why_not() is not None, reason="the native library is not used")
EOS, START, SPECIAL = 2, 2, 3


def lists(shortlist: Shortlist) -> list[list[int]]:
    return [row.tolist() for row in np.split(shortlist.ids, shortlist.offsets[1:-1])]


class TestLearning:
    # 1 goes with 11 and 2 with 12; 10 is everywhere.
    PAIRS = ([1, 2, 1], [10, 11, 12]), ([1, 3], [10, 11, 10]), ([2], [12, 10])

    def test_what_goes_together(self) -> None:
        found = learn(self.PAIRS, 5, 14, keep=(), per_token=1, always=1, copies=False)
        assert found.always.tolist() == [10]
        assert lists(found) == [[], [11], [12], [11], []]
        assert [found.offsets.dtype, found.ids.dtype, found.always.dtype] == [np.int64, np.int32, np.int32]

    def test_probabilities_are_those_of_model_1(self) -> None:
        """One round by hand: in pair 1 each of 11 and 12 is shared by 1 and 2, in pair 2 11 is by 1 and 3."""
        from hf_nmsparse import shortlist

        rounds = shortlist._ROUNDS
        try:
            shortlist._ROUNDS = 1
            ids = [(np.unique(source), np.setdiff1d(target, [10])) for source, target in self.PAIRS]
            rows, columns, found = shortlist._translations([s for s, _ in ids], [t for _, t in ids], 14)
        finally:
            shortlist._ROUNDS = rounds
        expected = {(1, 11): 1 / 1.5, (1, 12): 0.5 / 1.5, (2, 11): 0.5 / 2, (2, 12): 1.5 / 2, (3, 11): 1.0}
        assert dict(zip(zip(rows.tolist(), columns.tolist(), strict=True), found, strict=True)) == pytest.approx(
            expected
        )

    def test_lists_are_no_longer_than_asked(self) -> None:
        found = learn(self.PAIRS, 5, 14, keep=(), per_token=2, always=1, copies=False)
        assert lists(found) == [[], [11, 12], [11, 12], [11], []]

    def test_a_token_may_be_copied(self) -> None:
        found = learn(self.PAIRS, 12, 14, keep=(), per_token=2, always=1, copies=True)
        assert lists(found) == [[0], [1, 11], [2, 12], [3, 11], *([i] for i in range(4, 10)), [], [11]]

    def test_kept_tokens_are_always_there(self) -> None:
        found = learn(self.PAIRS, 5, 14, keep=[7, 13], per_token=1, always=3)
        assert found.always.tolist() == [7, 10, 13]
        assert learn(self.PAIRS, 5, 14, keep=[7, 13], always=1).always.tolist() == [7, 13]

    def test_all_may_be_always_there(self) -> None:
        found = learn(self.PAIRS, 5, 14, keep=(), always=14)
        assert found.always.tolist() == [10, 11, 12]  # no token that the corpus lacks
        assert coverage(found, self.PAIRS)[1] == 1.0

    def test_coverage(self) -> None:
        found = learn(self.PAIRS, 5, 14, keep=(), per_token=1, always=1, copies=False)
        assert coverage(found, [([1], [10, 11, 12, 12]), ([2], [12, 12, 12, 12])]) == (2.0, 6 / 8)

    @pytest.mark.parametrize(
        ("pairs", "numbers", "message"),
        [
            ([], {}, "there are no pairs"),
            ([([5], [1])], {}, "source tokens are below 5, got 5"),
            ([([-1], [1])], {}, "source tokens are below 5, got -1"),
            ([([1], [14])], {}, "target tokens are below 14, got 14"),
            ([([1], [1])], {"keep": [20]}, "kept tokens are below 14, got 20"),
            ([([1], [1])], {"per_token": 0}, "need at least 1, got 0 and 1000"),
        ],
    )
    def test_what_makes_no_sense(self, pairs: Any, numbers: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=rf"^shortlist: [^\n]*{message}"):
            learn(pairs, 5, 14, **({"keep": ()} | numbers))

    def test_it_needs_no_torch(self) -> None:
        code = "import sys, hf_nmsparse.shortlist; assert not {'torch', 'transformers'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestFiles:
    GOOD: ClassVar[dict[str, Any]] = {
        "offsets": np.array([0, 2, 2], np.int64),
        "ids": np.array([4, 5], np.int32),
        "always": np.array([2], np.int32),
    }

    def test_round_trip(self, tmp_path: Path) -> None:
        assert read(tmp_path) is None
        save(Shortlist(**self.GOOD), tmp_path)
        found = read(tmp_path)
        assert found is not None
        for name, expected in self.GOOD.items():
            assert np.array_equal(getattr(found, name), expected)
        assert [file.name for file in tmp_path.iterdir()] == [FILE]
        with pytest.raises(ValueError, match=r"^shortlist: folder is empty; name a path"):
            save(Shortlist(**self.GOOD), "")
        assert found.candidates([0, 1]).tolist() == [2, 4, 5]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"offsets": np.array([1, 2, 2], np.int64)}, "offsets rise from 0 to 2"),
            ({"offsets": np.array([0, 2, 1, 2], np.int64)}, "offsets rise from 0 to 2"),
            ({"offsets": np.array([0, 2, 3], np.int64)}, "offsets rise from 0 to 2"),
            ({"offsets": np.array([], np.int64)}, "offsets rise from 0 to 2"),
            ({"offsets": np.array([0, 2], np.int32)}, "offsets is a row of int64"),
            ({"ids": np.array([[4, 5]], np.int32)}, "ids is a row of int32"),
            ({"ids": np.array([4, -5], np.int32)}, "tokens are 0 and above"),
            ({"always": np.array([], np.int32)}, "some are always there"),
            ({"more": np.array([], np.int32)}, "it holds offsets, ids, always"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        save_file(self.GOOD | changes, tmp_path / FILE)
        with pytest.raises(ValueError, match=rf"^shortlist: [^\n]*{message}[^\n]*; learn it again[^\n]*$"):
            read(tmp_path)

    def test_damaged_files(self, tmp_path: Path) -> None:
        whole = save(Shortlist(**self.GOOD), tmp_path).read_bytes()
        for damaged in (b"", whole[:20], whole[:-1], b"\xff" * 40):
            (tmp_path / FILE).write_bytes(damaged)
            with pytest.raises(ValueError, match=r"^shortlist: [^\n]*no whole safetensors file[^\n]*$"):
                read(tmp_path)


VOCABULARY = 100


def model(kind: str, folder: Path) -> Any:
    """A tiny Marian that computes, with its head, in fp32, in bf16 or in int8."""
    settings: dict[str, Any] = {"d_model": 64, "init_std": 0.4, "pad_token_id": VOCABULARY - 1, "eos_token_id": EOS}
    made = tiny.marian(vocab_size=VOCABULARY, **settings)
    with torch.no_grad():
        made.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    if kind == "bf16":
        made = made.bfloat16()
    if kind == "int8":
        sparsify(made, NMSparseConfig("2:4"))
        finalize(made)
        save_packed(made, folder, values="int8")
        made = AutoModelForSeq2SeqLM.from_pretrained(folder)
    return made.eval()


def with_sparse_head(weights: list[engine.Packed], weight: torch.Tensor, form: str) -> list[engine.Packed]:
    """The weights of an engine with a 2:4 head, in a format of the kernels."""
    pattern = NMPattern(2, 4)
    both = pack(weight.detach() * tiny.kept(weight.detach(), pattern), pattern)
    values, scale = both["weight"], None
    if form == "int8":
        values, scale = quantize_rows(values)
    if form == "bf16":
        values = values.bfloat16()
    data = native.repack(form, weight.shape[1], values, both["weight_indices"], scale).numpy()
    return [replace(one, format=form, data=data) if one.slot == engine.WeightSlot.HEAD else one for one in weights]


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8", "sparse fp32", "sparse bf16", "sparse int8"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> engine.Engine:
    """An engine; those with a sparse head, which no model has yet, are otherwise of fp32."""
    sparse, _, form = request.param.rpartition(" ")
    if not sparse:
        return engine_for(model(form, tmp_path_factory.mktemp("model")))
    dense = model("fp32", Path())

    def build(config: engine.EngineConfig, weights: list[engine.Packed], tables: list[engine.Table]) -> engine.Engine:
        return engine.Engine(config, with_sparse_head(weights, dense.lm_head.weight, form), tables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "Engine", build)
        return engine_for(dense)


SOURCES = [[5 + 7 * i % 80, *range(10 + i, 14 + 3 * i), EOS] for i in range(7)]


def use(runner: engine.Engine, rows: dict[int, list[int]], always: list[int]) -> Shortlist:
    listed = [rows.get(token, []) for token in range(VOCABULARY)]
    shortlist = Shortlist(
        np.cumsum([0, *map(len, listed)], dtype=np.int64),
        np.array([token for row in listed for token in row], np.int32),
        np.array(always, np.int32),
    )
    runner.use_shortlist(shortlist.offsets, shortlist.ids, shortlist.always)
    return shortlist


def some(runner: engine.Engine) -> Shortlist:
    rows = {token: [(token * 3 + i * 5) % VOCABULARY for i in range(6)] for token in range(VOCABULARY)}
    return use(runner, rows, [EOS, *range(80, 97)])


def run(runner: engine.Engine, sources: Any = SOURCES, prompt: Any = (START,), **settings: Any) -> list[Hypothesis]:
    search = SearchConfig(**({"max_length": 12, "threads": 1, "token_scores": 1, "shortlist": 1} | settings))
    found = runner.translate(sources, search, [list(prompt)] * len(sources), [EOS])
    return [hypothesis for row in found for hypothesis in row]


def same(one: list[Hypothesis], other: list[Hypothesis]) -> bool:
    """To the last bit."""
    pairs = list(zip(one, other, strict=True))
    return all(
        (a.tokens.tolist(), a.score, np.asarray(a.token_scores).tolist())
        == (b.tokens.tolist(), b.score, np.asarray(b.token_scores).tolist())
        for a, b in pairs
    )


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, no scores": {"token_scores": 0},
    "beam 4": {"beams": 4, "returned": 3},
    "all logits": {"beams": 3, "no_repeat_ngram": 2},
    "all logits, greedy": {"repetition_penalty": 1.3},
    "sampling": {"sample": 1, "returned": 2, "top_k": 9, "seed_low": 3},
}
SEARCH = pytest.mark.parametrize("search", SEARCHES.values(), ids=list(SEARCHES))


@NEEDS_ENGINE
class TestEngine:
    @SEARCH
    def test_one_that_holds_everything_changes_nothing(self, runner: engine.Engine, search: dict[str, Any]) -> None:
        expected = run(runner, shortlist=0, **search)
        use(runner, {}, list(range(VOCABULARY)))
        assert same(run(runner, **search), expected)
        # In another order the sums may round in another way.
        use(runner, {token: list(range(VOCABULARY)) for token in range(VOCABULARY)}, [EOS, *range(40, 90)])
        for one, other in zip(run(runner, **search), expected, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.score == pytest.approx(other.score, abs=1e-4)

    @SEARCH
    def test_only_candidates_are_chosen(self, runner: engine.Engine, search: dict[str, Any]) -> None:
        shortlist = some(runner)
        found = run(runner, **search)
        chosen: set[int] = set()
        for i, hypothesis in enumerate(found):
            source = SOURCES[i * len(SOURCES) // len(found)]
            assert set(hypothesis.tokens[1:].tolist()) <= set(shortlist.candidates(source).tolist())
            chosen |= set(hypothesis.tokens[1:].tolist())
        assert chosen - set(shortlist.always.tolist())

    def test_probabilities_are_of_the_candidates(self, runner: engine.Engine) -> None:
        """As those of all tokens, divided by what the candidates have of them."""
        shortlist = some(runner)
        source = SOURCES[3]
        [found] = run(runner, [source], max_length=2)
        candidates = shortlist.candidates(source).tolist()
        probabilities = [
            np.exp(runner.score([source], [[START, token]], threads=1)[0][1]) for token in range(VOCABULARY)
        ]
        share = np.array(probabilities)[candidates] / np.sum(np.array(probabilities)[candidates])
        assert found.tokens[1] == candidates[int(share.argmax())]
        assert np.exp(found.token_scores[1]) == pytest.approx(share.max(), rel=1e-3)  # type: ignore[index]

    @SEARCH
    def test_a_sentence_does_not_depend_on_its_batch_or_on_threads(
        self, runner: engine.Engine, search: dict[str, Any]
    ) -> None:
        some(runner)
        together = run(runner, **search)
        many = len(together) // len(SOURCES)
        assert same(run(runner, threads=3, batch_sentences=2, **search), together)
        if "sample" not in search:  # what is drawn depends on a sentence's place in the call
            alone = [hypothesis for source in SOURCES for hypothesis in run(runner, [source], **search)]
            assert len(alone) == many * len(SOURCES)
            assert same(alone, together)

    def test_forced_tokens_and_prompts_need_not_be_candidates(self, runner: engine.Engine) -> None:
        shortlist = some(runner)
        found = run(runner, forced_bos=1, forced_eos=3, beams=2, max_length=6)
        assert 1 not in shortlist.candidates(SOURCES[0])
        assert all(hypothesis.tokens[1] == 1 for hypothesis in found)
        assert all(hypothesis.tokens[-1] in (EOS, 3) for hypothesis in found)
        prompted = run(runner, prompt=(START, 1, 3), beams=2)
        assert all(hypothesis.tokens[:3].tolist() == [START, 1, 3] for hypothesis in prompted)

    def test_a_sentence_without_lists_has_what_is_always_there(self, runner: engine.Engine) -> None:
        use(runner, {}, [EOS, 50, 51, 52, 53, 54, 55, 56, 57, 58])
        for hypothesis in run(runner, beams=2):
            assert set(hypothesis.tokens[1:].tolist()) <= {EOS, *range(50, 59)}

    def test_scoring_is_of_all_tokens(self, runner: engine.Engine) -> None:
        targets = [[START, 4, 5, EOS]] * len(SOURCES)
        before = runner.score(SOURCES, targets, threads=1)
        some(runner)
        assert all(np.array_equal(a, b) for a, b in zip(before, runner.score(SOURCES, targets, threads=1), strict=True))

    def test_what_does_not_fit(self, runner: engine.Engine) -> None:
        offsets, ids = np.zeros(VOCABULARY + 1, np.int64), np.array([], np.int32)

        def fails(message: str, *arrays: Any) -> None:
            with pytest.raises(ValueError, match=rf"^engine: shortlist: [^\n]*{message}[^\n]*$"):
                runner.use_shortlist(*arrays)

        one = np.array([EOS], np.int32)
        fails("99 source tokens, and the model has 100", offsets[1:], ids, one)
        fails("below 100, got 100", offsets, ids, np.array([100], np.int32))
        fails("below 100, got -1", offsets, ids, np.array([-1], np.int32))
        fails("offsets rise from 0", offsets, np.array([4], np.int32), one)
        fails("offsets rise from 0", np.arange(VOCABULARY + 1)[::-1].copy(), ids, one)
        late = np.array([*offsets[1:], 1])
        fails("below 100, got 444", late, np.array([444], np.int32), one)
        fails("no token is always there", offsets, ids, ids)
        fails("offsets is a row of int64", offsets.astype(np.int32), ids, one)
        fails("offsets are one more", offsets[:0], ids, one)
        runner.use_shortlist(offsets, ids, np.array([5, 6, 7], np.int32))
        with pytest.raises(ValueError, match=r"^engine: shortlist: EOS, 2, is not always there[^\n]*$"):
            run(runner)
        runner.use_shortlist(offsets, ids, np.array([EOS, 6, 7], np.int32))
        with pytest.raises(ValueError, match=r"^engine: shortlist: 3 tokens are always there[^\n]*more than 8[^\n]*$"):
            run(runner, beams=4)


@NEEDS_ENGINE
def test_without_one_none_can_be_used() -> None:
    fresh = engine_for(tiny.marian(eos_token_id=EOS).eval())
    with pytest.raises(ValueError, match=r"^engine: search: there is no shortlist; learn one, or translate without$"):
        run(fresh)


@NEEDS_ENGINE
def test_a_translator_takes_the_one_in_the_folder(tmp_path: Path) -> None:
    tiny.marian(eos_token_id=EOS, init_std=0.5).save_pretrained(tmp_path)
    rows = [[5, 6, 7, EOS], [9, EOS]]

    def translate(**how: Any) -> list[set[int]]:
        found = Translator(tmp_path, threads=1, **how).translate_ids(rows, max_new_tokens=6)
        return [set(one.tokens) for one in found]

    before = translate()
    vocabulary = AutoConfig.from_pretrained(tmp_path).vocab_size
    candidates = np.array([token for token in range(4, vocabulary) if token not in before[0]], np.int32)[:3]
    offsets = np.zeros(vocabulary + 1, np.int64)
    save(Shortlist(offsets, np.zeros(0, np.int32), np.array([EOS, *candidates], np.int32)), tmp_path)
    assert all(tokens <= {EOS, *candidates.tolist()} for tokens in translate())
    assert translate(shortlist=False) == before


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        tiny.marian(init_std=0.5).save_pretrained(tmp_path / "model")
        tiny.tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_pairs(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "text.en").write_text("The garden is big.\nA man sleeps in the garden.\n")
        (tmp_path / "text.de").write_text("Der Garten ist groß.\nEin Mann schläft im Garten.\n")
        texts = [str(tmp_path / "text.en"), str(tmp_path / "text.de")]
        assert main(["shortlist", str(folder), "--corpus", *texts, "--always", "5"]) == 0
        assert f"{FILE}: " in capsys.readouterr().out
        found = read(folder)
        tokenizer = tiny.tokenizer()
        assert found is not None
        assert tokenizer.eos_token_id in found.always
        source, target = tokenizer("The garden is big.")["input_ids"], tokenizer("Der Garten ist groß.")["input_ids"]
        assert set(target) <= set(found.candidates(source).tolist())
        (tmp_path / "pairs.jsonl").write_text('{"en": "The garden is big.", "de": "Der Garten ist groß."}\n')
        names = ["--source-lang", "en", "--target-lang", "de"]
        assert main(["shortlist", str(folder), "--corpus", str(tmp_path / "pairs.jsonl"), *names]) == 0

    def test_its_own_translations(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("The garden is big.\n\nA man\n")
        assert main(["shortlist", str(folder), "--corpus", str(tmp_path / "text"), "--translate"]) == 0
        assert read(folder) is not None

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["nothing.jsonl"], "no file"),
            (["a", "a", "a"], "got 3 files"),
            (["a"], "as pairs; the formats are jsonl"),
            (["a", "a", "--translate"], "takes one file of source text, got 2"),
        ],
    )
    def test_errors(
        self, folder: Path, tmp_path: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a").write_text("a\n")
        names = [name if name.startswith("-") else str(tmp_path / name) for name in given]
        assert main(["shortlist", str(folder), "--corpus", *names]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (folder / FILE).exists()
