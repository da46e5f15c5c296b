from __future__ import annotations

import copy
import io
import json
import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow
import pytest
import sentencepiece
import torch
import transformers
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_nmsparse.pipeline import TASK, translate
from hf_nmsparse.texts import direction_of, encode, languages_of, read_texts
from tests import tiny

hf: Any = transformers  # whose classes take keywords that their signatures do not name

WORDS = ["a", "man", "sleeps", "in", "the", "garden", "big", "house", "tree", "red"]
SENTENCES = ["a man sleeps", "the big house in the garden", "a red tree", "man"]
PIECES = [("▁", -3.0), *((f"▁{word}", -1.0) for word in WORDS), *((letter, -5.0) for letter in "abdeghimnoprstuz")]

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses:UserWarning")


class TestReadTexts:
    expected = ("b", "c", "a")

    @pytest.mark.parametrize(
        "texts",
        [
            pytest.param(["b", "c", "a"], id="list"),
            pytest.param(("b", "c", "a"), id="tuple"),
            pytest.param(pd.Series(["a", "b", "c"], index=[2, 0, 1]).sort_index(), id="a shuffled Series"),
            pytest.param(pd.Series({7: "b", 0: "c", 1: "a"}, dtype="string"), id="a Series of strings"),
            pytest.param(pd.Index(["b", "c", "a"]), id="Index"),
            pytest.param({"x": "b", "y": "c", "z": "a"}.values(), id="values"),
            pytest.param({"b": 1, "c": 2, "a": 3}.keys(), id="keys"),
            pytest.param(np.array(["b", "c", "a"]), id="array"),
            pytest.param(np.array(["b", "c", "a"], dtype=object), id="array of objects"),
            pytest.param(pyarrow.array(["b", "c", "a"]), id="arrow"),
            pytest.param(pyarrow.chunked_array([["b"], ["c", "a"]]), id="chunked arrow"),
            pytest.param(Dataset.from_dict({"text": ["b", "c", "a"]})["text"], id="column"),
        ],
    )
    def test_by_place(self, texts: Any) -> None:
        read = list(read_texts(texts, "f"))
        assert tuple(read) == self.expected
        assert {type(text) for text in read} == {str}

    def test_generators_and_other_iterators(self) -> None:
        assert tuple(read_texts((text for text in self.expected), "f")) == self.expected
        assert tuple(read_texts(map(str, self.expected), "f")) == self.expected

    def test_an_endless_one_is_read_as_it_is_asked_for(self) -> None:
        assert next(read_texts(iter(lambda: "a", "b"), "f")) == "a"

    @given(st.permutations(range(6)))
    def test_the_order_of_a_series_is_that_of_its_rows(self, order: list[int]) -> None:
        shuffled = pd.Series([f"text {row}" for row in range(6)]).iloc[order]
        assert list(read_texts(shuffled, "f")) == [f"text {row}" for row in order]

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            ("a man", "expected a list of texts, got one text; put it into a list"),
            (np.str_("a man"), "got one text"),
            (b"a man", "expected a list of texts, got bytes"),
            ({"en": "a man"}, "expected a list of texts, got dict"),
            ({"a man"}, "expected a list of texts, got set"),
            (3, "expected a list of texts, got int"),
            (None, "expected a list of texts, got NoneType"),
            (pd.DataFrame({"en": ["a"]}), "got 2 dimensions; give one column"),
            (np.array([["a"]]), "got 2 dimensions; give one column"),
            (np.array("a"), "got 0 dimensions; give one column"),
            (["a", None], "sentence 1 is no text but NoneType"),
            (pd.Series(["a", float("nan")], dtype=object), "sentence 1 is no text but float"),
            (pyarrow.array(["a", None]), "sentence 1 is no text but NoneType"),
            (["a", b"b"], "sentence 1 is no text but bytes"),
            ([["a"]], "sentence 0 is no text but list"),
            (["a", "b\ud800"], r"sentence 1 holds half a character, '\ud800'"),
            (["a", "b\0"], "sentence 1 holds a NUL, which no text does; take it out"),
        ],
    )
    def test_what_holds_no_texts(self, texts: Any, message: str) -> None:
        with pytest.raises(ValueError, match=r"^f: ") as raised:
            list(read_texts(texts, "f"))
        assert message in str(raised.value)
        assert str(raised.value).isprintable()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model, and vocabularies that use it."""
    folder = tmp_path_factory.mktemp("tokenizers")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 50),
        model_writer=model,
        vocab_size=38,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "sp.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(index) for index in range(3, len(processor))]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    (folder / "m2m.json").write_text(json.dumps({piece: i for i, piece in enumerate([*special, *pieces])}))
    marian = ["</s>", "<unk>", *pieces, ">>fra<<", ">>deu<<", "<pad>"]
    (folder / "marian.json").write_text(json.dumps({piece: i for i, piece in enumerate(marian)}))
    return folder


@dataclass(frozen=True)
class Family:
    """A way of naming languages, and what its documentation asks `generate` for.

    `tokenizer` makes it from the folder of files. `asks` gives what the documentation hands to ``generate``, from the
    tokenizer and the target. `otherwise` is what a checkpoint's settings may say instead, of another language.
    """

    tokenizer: Callable[[Path], Any]
    model: Callable[[Any], Any]
    source: str
    target: str
    asks: Callable[[Any, str], dict[str, Any]]
    otherwise: Callable[[Any], dict[str, Any]]
    written: Callable[[Any, str, str, str], str] = field(default=lambda tokenizer, text, source, target: text)


def unending(model: Any) -> Any:
    """A model that speaks to the limit, so that what it says differs."""
    model.generation_config.eos_token_id = None
    return model


def bart_like(name: str) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        torch.manual_seed(0)
        codes = tokenizer.convert_tokens_to_ids(list(languages_of(tokenizer).values()))
        settings = tiny.bart(max([len(tokenizer) - 1, *codes]) + 1, d_model=16, layers=1) | {
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "decoder_start_token_id": tokenizer.eos_token_id,
            "init_std": 0.5,
            "forced_eos_token_id": None,
            "scale_embedding": False,
            "tie_word_embeddings": False,
        }
        if name == "NllbMoe":
            settings |= {"num_experts": 2, "expert_capacity": 64, "router_jitter_noise": 0.0}
        model = getattr(hf, f"{name}MTModel" if name == "Marian" else f"{name}ForConditionalGeneration")
        return unending(model(getattr(hf, f"{name}Config")(**settings)).eval())

    return make


def t5(**settings: Any) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        torch.manual_seed(0)
        config = hf.T5Config(**tiny.t5(len(tokenizer), 16, 1), initializer_factor=20.0, **settings)
        return unending(hf.T5ForConditionalGeneration(config).eval())

    return make


def seamless(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = hf.SeamlessM4TConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        speech_encoder_layers=1,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    model = hf.SeamlessM4TForTextToText(config).eval()
    model.generation_config.text_decoder_lang_to_code_id = {
        code: tokenizer.convert_tokens_to_ids(f"__{code}__") for code in ("eng", "fra", "deu")
    }
    return unending(model)


def bpe(special: list[str]) -> dict[str, Any]:
    """A vocabulary of single letters: the four special tokens in the order of the family, then letters."""
    letters = [*special, "▁", *"abdeghimnoprstuz"]
    return {"vocab": {letter: index for index, letter in enumerate(letters)}, "merges": []}


def forced(tokenizer: Any, target: str) -> dict[str, Any]:
    return {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(target)}


def started(tokenizer: Any, target: str) -> dict[str, Any]:
    return {"decoder_start_token_id": tokenizer.lang_code_to_id[target], "forced_bos_token_id": None}


NLLB = {"extra_special_tokens": ["eng_Latn", "deu_Latn", "fra_Latn"]}
MBART = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *PIECES]
T5_TASKS = {
    f"translation_en_to_{code}": {"prefix": f"translate English to {language}: "}
    for code, language in (("de", "German"), ("fr", "French"))
} | {"summarization": {"prefix": "summarize: "}}


def unigram(folder: Path, **kwargs: Any) -> Any:
    return hf.T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *PIECES], extra_ids=0, **kwargs)


FAMILIES = {
    "nllb": Family(
        lambda folder: hf.NllbTokenizer(**bpe(["<s>", "<pad>", "</s>", "<unk>"]), **NLLB),
        bart_like("M2M100"),
        "deu_Latn",
        "fra_Latn",
        forced,
        lambda tokenizer: {"forced_bos_token_id": tokenizer.convert_tokens_to_ids("eng_Latn")},
    ),
    "nllb of old": Family(
        lambda folder: hf.NllbTokenizer(**bpe(["<s>", "<pad>", "</s>", "<unk>"]), **NLLB, legacy_behaviour=True),
        bart_like("M2M100"),
        "deu_Latn",
        "fra_Latn",
        forced,
        lambda tokenizer: {"forced_bos_token_id": tokenizer.convert_tokens_to_ids("eng_Latn")},
    ),
    "nllb-moe": Family(
        lambda folder: hf.NllbTokenizer(**bpe(["<s>", "<pad>", "</s>", "<unk>"]), **NLLB),
        bart_like("NllbMoe"),
        "deu_Latn",
        "fra_Latn",
        forced,
        lambda tokenizer: {"forced_bos_token_id": tokenizer.convert_tokens_to_ids("eng_Latn")},
    ),
    "m2m100": Family(
        lambda folder: hf.M2M100Tokenizer(str(folder / "m2m.json"), str(folder / "sp.model")),
        bart_like("M2M100"),
        "de",
        "fr",
        lambda tokenizer, target: {"forced_bos_token_id": tokenizer.get_lang_id(target)},
        lambda tokenizer: {"forced_bos_token_id": tokenizer.get_lang_id("ro")},
    ),
    "mbart": Family(
        lambda folder: hf.MBartTokenizer(vocab=MBART),
        bart_like("MBart"),
        "de_DE",
        "ro_RO",
        started,
        lambda tokenizer: {
            "decoder_start_token_id": tokenizer.convert_tokens_to_ids("fr_XX"),
            "forced_bos_token_id": tokenizer.convert_tokens_to_ids("fr_XX"),
        },
    ),
    "mbart-50": Family(
        lambda folder: hf.MBart50Tokenizer(vocab=[("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *PIECES]),
        bart_like("MBart"),
        "de_DE",
        "ro_RO",
        lambda tokenizer, target: forced(tokenizer, target) | {"decoder_start_token_id": tokenizer.eos_token_id},
        lambda tokenizer: {"decoder_start_token_id": tokenizer.convert_tokens_to_ids("fr_XX")},
    ),
    "plbart": Family(
        lambda folder: hf.PLBartTokenizer(str(folder / "sp.model"), language_codes="multi"),
        bart_like("PLBart"),
        "java",
        "__en_XX__",
        started,
        lambda tokenizer: {"decoder_start_token_id": tokenizer.convert_tokens_to_ids("__go__")},
    ),
    "seamless": Family(
        lambda folder: hf.SeamlessM4TTokenizer(
            **bpe(["<pad>", "<unk>", "<s>", "</s>"]), extra_special_tokens=["__eng__", "__fra__", "__deu__"]
        ),
        seamless,
        "deu",
        "fra",
        lambda tokenizer, target: {"tgt_lang": target},
        lambda tokenizer: {},
    ),
    "opus-mt": Family(
        lambda folder: hf.MarianTokenizer(
            str(folder / "sp.model"), str(folder / "sp.model"), str(folder / "marian.json")
        ),
        bart_like("Marian"),
        "",
        "fra",
        lambda tokenizer, target: {},
        lambda tokenizer: {},
        lambda tokenizer, text, source, target: f">>{target}<< {text}",
    ),
    "t5": Family(
        unigram,
        t5(task_specific_params=T5_TASKS),
        "en",
        "fr",
        lambda tokenizer, target: {},
        lambda tokenizer: {},
        lambda tokenizer, text, source, target: f"translate English to French: {text}",
    ),
    "madlad": Family(
        lambda folder: unigram(folder, extra_special_tokens=["<2fr>", "<2de>"]),
        t5(),
        "",
        "fr",
        lambda tokenizer, target: {},
        lambda tokenizer: {},
        lambda tokenizer, text, source, target: f"<2{target}> {text}",
    ),
}


def documented(family: Family, folder: Path, model: Any) -> list[list[int]]:
    """What a user writes who follows the documentation: a tokenizer of his own, told the source, and `generate`."""
    source, target = family.source, family.target
    tokenizer = family.tokenizer(folder)
    if hasattr(tokenizer, "set_src_lang_special_tokens"):
        tokenizer.src_lang = source
    tokens = []
    for sentence in SENTENCES:
        inputs = tokenizer(family.written(tokenizer, sentence, source, target), return_tensors="pt")
        asked = family.asks(tokenizer, target)
        output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, **asked)
        tokens.append(output[0].tolist())
    return tokens


def state(tokenizer: Any) -> dict[str, Any]:
    """What a call could leave changed in a tokenizer."""
    names = (
        "src_lang",
        "tgt_lang",
        "prefix_tokens",
        "suffix_tokens",
        "cur_lang_code",
        "cur_lang_id",
        "cur_lang_code_id",
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kept = {name: copy.deepcopy(getattr(tokenizer, name, None)) for name in names}
    return kept | {"backend": None if backend is None else backend.to_str()}


def languages(family: Family) -> dict[str, Any]:
    return {"src_lang": family.source or None, "tgt_lang": family.target}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


class TestLanguagesOfEveryFamily:
    @pytest.mark.parametrize("settings", ["its own", "of another language"])
    def test_as_its_documentation_asks_for(self, family: Family, folder: Path, settings: str) -> None:
        tokenizer = family.tokenizer(folder)
        model = family.model(tokenizer)
        expected = documented(family, folder, model)
        assert len(set(map(tuple, expected))) > 1
        if settings != "its own":
            model.generation_config.update(**family.otherwise(tokenizer))
        translator: Any = transformers.pipeline  # its overloads know the built-in tasks only
        translator = translator(TASK, model=model, tokenizer=tokenizer, device="cpu", batch_size=3)
        results = translator(SENTENCES, max_new_tokens=8, return_tensors=True, **languages(family))
        assert [result["translation_token_ids"].tolist() for result in results] == expected
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in expected]
        assert translate(model, tokenizer, SENTENCES, batch_size=3, max_new_tokens=8, **languages(family)) == texts

    def test_the_tokenizer_stays_as_it_is(self, family: Family, folder: Path) -> None:
        tokenizer = family.tokenizer(folder)
        model = family.model(tokenizer)
        tokenizer("a")  # a tokenizer that was just made may be in the mode of its target
        before = state(tokenizer)
        translate(model, tokenizer, SENTENCES, max_length=3, **languages(family))
        assert state(tokenizer) == before
        wrong_ones: list[dict[str, Any]] = [{"tgt_lang": "xx"}, {"tgt_lang": family.target, "src_lang": "xx"}]
        for wrong in wrong_ones:
            with pytest.raises(ValueError, match=r"^translate: .*xx"):
                translate(model, tokenizer, SENTENCES, **wrong)
        with pytest.raises(ValueError, match=r"^translate: max_length"):
            translate(model, tokenizer, SENTENCES, max_length=0, **languages(family))
        assert state(tokenizer) == before

    def test_what_is_too_long_keeps_its_language(self, family: Family, folder: Path) -> None:
        tokenizer = family.tokenizer(folder)
        model = family.model(tokenizer)
        direction = direction_of(model, tokenizer, family.source or None, family.target)
        text = direction.prompt + "a man " * 30
        whole, cut = (
            encode(tokenizer, [text], float("inf"), direction.frame)[0],
            encode(tokenizer, [text], 12, direction.frame)[0],
        )
        before, after = direction.frame or ([], [tokenizer.eos_token_id])
        assert len(whole) > len(cut) == 12
        assert cut == [*whole[: 12 - len(after)], *after]
        assert cut[: len(before)] == before


@pytest.mark.parametrize("name", ["nllb", "m2m100", "mbart", "mbart-50", "plbart", "seamless"])
def test_threads_share_a_tokenizer_and_not_their_languages(name: str, folder: Path) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer(folder)
    model = family.model(tokenizer)
    known = list(languages_of(tokenizer))[:3] if name != "m2m100" else ["de", "fr", "ro"]
    texts = ["a man sleeps in the garden"] * 40
    expected = {
        source: encode(tokenizer, texts[:1], 99, direction_of(model, tokenizer, source, family.target).frame)[0]
        for source in known
    }
    assert len({tuple(row) for row in expected.values()}) == len(known)
    wrong: list[Any] = []
    start = threading.Barrier(len(known) + 1)

    def work(source: str) -> None:
        start.wait()
        for _ in range(15):
            rows = encode(tokenizer, texts, 99, direction_of(model, tokenizer, source, family.target).frame)
            wrong.extend(row for row in rows if row != expected[source])

    def cut() -> None:
        start.wait()
        for _ in range(15):
            encode(tokenizer, texts, 5, direction_of(model, tokenizer, None, family.target).frame)

    logging.getLogger("hf_nmsparse").setLevel(logging.ERROR)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [*(threading.Thread(target=work, args=(source,)) for source in known), threading.Thread(target=cut)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        logging.getLogger("hf_nmsparse").setLevel(logging.NOTSET)
    assert wrong == []


def test_threads_translate_each_in_its_languages(folder: Path) -> None:
    family = FAMILIES["nllb"]
    tokenizer = family.tokenizer(folder)
    model = family.model(tokenizer)
    pairs = [("eng_Latn", "deu_Latn"), ("deu_Latn", "fra_Latn"), ("fra_Latn", "eng_Latn")]

    def work(pair: tuple[str, str]) -> list[str]:
        source, target = pair
        return translate(model, tokenizer, SENTENCES, 2, src_lang=source, tgt_lang=target, max_new_tokens=6)

    alone = [work(pair) for pair in pairs]
    assert len(set(map(tuple, alone))) == len(pairs)
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(work, pairs * 5)) == alone * 5


class TestLanguages:
    def test_a_code_or_its_token(self, folder: Path) -> None:
        tokenizer = FAMILIES["plbart"].tokenizer(folder)
        model = FAMILIES["plbart"].model(tokenizer)
        pairs = [direction_of(model, tokenizer, *pair) for pair in (("java", "go"), ("__java__", "__go__"))]
        assert pairs[0] == pairs[1]

    def test_a_language_that_was_added_to_mbart(self) -> None:
        tokenizer = hf.MBartTokenizer(vocab=MBART, additional_special_tokens=["eo_EO"])
        assert languages_of(tokenizer)["eo_EO"] == "eo_EO"
        assert "de_DE" in languages_of(tokenizer)

    def test_t5_names_its_pairs(self, folder: Path) -> None:
        tokenizer = unigram(folder)
        model = FAMILIES["t5"].model(tokenizer)
        assert direction_of(model, tokenizer, None, "de").prompt == "translate English to German: "
        assert direction_of(model, tokenizer, None, None).prompt == ""
        with pytest.raises(
            ValueError, match="src_lang 'fr' and tgt_lang 'de' name no single pair here; it has en to de"
        ):
            direction_of(model, tokenizer, "fr", "de")

    def test_opus_mt_reads_its_source_from_the_text(self, folder: Path) -> None:
        tokenizer = FAMILIES["opus-mt"].tokenizer(folder)
        with pytest.raises(ValueError, match="reads its source language from the text; leave out src_lang, got 'en'"):
            direction_of(FAMILIES["opus-mt"].model(tokenizer), tokenizer, "en", "fra")

    @pytest.mark.parametrize("name", ["nllb", "m2m100", "mbart", "mbart-50", "plbart", "seamless"])
    def test_a_target_is_needed(self, name: str, folder: Path) -> None:
        tokenizer = FAMILIES[name].tokenizer(folder)
        with pytest.raises(ValueError, match="translates into several languages; name one with tgt_lang"):
            translate(FAMILIES[name].model(tokenizer), tokenizer, ["a"])

    def test_a_keyword_of_another_language(self, folder: Path) -> None:
        tokenizer = FAMILIES["nllb"].tokenizer(folder)
        model = FAMILIES["nllb"].model(tokenizer)
        with pytest.raises(ValueError, match="forced_bos_token_id 5 is another language than tgt_lang's"):
            translate(model, tokenizer, ["a"], tgt_lang="fra_Latn", forced_bos_token_id=5)


class TestEncode:
    tokenizers: ClassVar[dict[str, Callable[[Path], Any]]] = {
        "byte-level": lambda folder: tiny.tokenizer(),
        "unigram": unigram,
        "bytes": lambda folder: hf.ByT5Tokenizer(),
        "wordpiece": lambda folder: hf.BertTokenizer(
            vocab={word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
        ),
        "marian": FAMILIES["opus-mt"].tokenizer,
    }

    @pytest.fixture(params=tokenizers)
    def tokenizer(self, request: pytest.FixtureRequest, folder: Path) -> Any:
        return self.tokenizers[request.param](folder)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_it_cuts_as_the_tokenizer_would(self, tokenizer: Any, side: str) -> None:
        tokenizer.truncation_side = side
        texts = ["a man", "a man sleeps in the garden " * 4, "a big house"]
        expected = [tokenizer(text, truncation=True, max_length=8)["input_ids"] for text in texts]
        assert encode(tokenizer, texts, 8) == expected
        assert len(expected[1]) == 8

    def test_a_tokenizer_that_was_told_to_cut(self, tokenizer: Any) -> None:
        text = "a man sleeps in the garden " * 4
        expected = tokenizer(text)["input_ids"]
        tokenizer([text], truncation=True, max_length=4, padding="max_length")
        assert encode(tokenizer, [text, "a"], float("inf"))[0] == expected

    def test_nothing(self) -> None:
        assert encode(None, [], 8) == []
