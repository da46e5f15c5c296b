"""Tokenizers without transformers: the ids and the texts of transformers' own classes, on plain and hard strings."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from transformers import AutoTokenizer, NllbTokenizer

from hf_nmsparse.text_tokenizer import load_tokenizer
from hf_nmsparse.texts import direction_of, encode, languages_of
from hf_nmsparse.tokenizer import train_tokenizer
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses:UserWarning")

hf: Any = transformers  # whose classes take files that their signatures do not name

WORDS = {
    "source": "The device is not connected . Select two sensors to monitor , and check its end ( again ) ! 0 1 23",
    "target": "Das Gerät ist nicht angeschlossen . Wählen Sie zwei Sensoren aus und prüfen Sie das Ende ( erneut ) !",
}
HARD = [
    "",
    " ",
    "  The  device ",
    "The device is not connected.",
    "</s>",
    "a</s>b <unk> c<pad>",
    "</s",
    "<</s>>",
    "<pad><pad>",
    ">>deu<< The device",
    ">>deu<<The device",
    ">>xyz<< The device",
    ">>deu",
    "<< >>deu<<",
    "The >>deu<< device",
    "</s>>>deu<< device",
    ">><<",
    "▁The▁device",
    "Ü ß ﬁ ﬃ ½ Ⅷ é é",
    "日本語 🙂 👨‍👩‍👧 \u200b\u00a0\u2028x\ufeff",
    "\ttab\r\nline\x00nul\x7f",
    "a" * 3000,
    "The device " * 400,
    "'' \"\" `` “ ” \u2018 \u2019 … \u2013 —",
    "\u0130\u0131\u017f\u1e9e",
    "אבג دهـ हिन्दी ไทย",
]


def hard(seed: int, count: int = 200) -> list[str]:
    """Pieces of all of these in any order."""
    chance = random.Random(seed)
    pieces = [*HARD[:21], *WORDS["source"].split(), *WORDS["target"].split(), " ", "  ", "\n", "<", ">", "/s>"]
    return ["".join(chance.choices(pieces, k=chance.randint(1, 8))) for _ in range(count)]


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as OPUS-MT has them: the vocabulary is another order than the models', and lacks some of their pieces."""
    folder = tmp_path_factory.mktemp("marian")
    pieces: list[str] = []
    for side, text in WORDS.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text, *text.split()] * 50),
            model_writer=model,
            vocab_size=70,
            hard_vocab_limit=False,
            minloglevel=2,
            normalization_rule_name="nmt_nfkc",
        )
        (folder / f"{side}.spm").write_bytes(model.getvalue())
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces += [processor.id_to_piece(index) for index in range(3, len(processor) - 3)]
    tokens = ["</s>", "<unk>", *sorted(set(pieces), reverse=True), ">>deu<<", ">>fra<<", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    return folder


def save(marian: Path, folder: Path) -> None:
    """OPUS-MT's tokenizer, as transformers writes it."""
    files = [str(marian / name) for name in ("source.spm", "target.spm", "vocab.json")]
    hf.MarianTokenizer(*files).save_pretrained(folder)


def same(folder: Path, kind: str, texts: list[str]) -> Any:
    """The tokenizer in a folder, which was asked to do all that transformers' does."""
    expected, found = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder, "marian")
    assert type(found).__name__ == kind
    assert type(found).__module__.startswith("hf_nmsparse")
    for name in ("model_max_length", "unk_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "truncation_side"):
        assert getattr(found, name) == getattr(expected, name), name
    for whole in (True, False):
        given: dict[str, Any] = {"add_special_tokens": whole, "verbose": False}
        assert found(texts, **given)["input_ids"] == expected(texts, **given)["input_ids"]
        assert found(text_target=texts, **given)["input_ids"] == expected(text_target=texts, **given)["input_ids"]
        assert found(texts[0], **given)["input_ids"] == expected(texts[0], **given)["input_ids"]
    chance, size = random.Random(0), len(expected)
    rows = [
        *found(texts)["input_ids"],
        *found(text_target=texts)["input_ids"],
        *([chance.randrange(size) for _ in range(chance.randint(0, 12))] for _ in range(300)),
    ]
    for row in rows:
        text = expected.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert found.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    for token in ("</s>", ">>deu<<", "▁", "nothing of the kind"):
        assert found.convert_tokens_to_ids(token) == expected.convert_tokens_to_ids(token)
    for limit in (2, 7, 10):
        assert encode(found, texts[:60], limit) == encode(expected, texts[:60], limit)
    assert languages_of(found) == languages_of(expected)
    return found


TEXTS = [*HARD, *hard(0)]


@pytest.mark.parametrize("written", ["as on the Hub", "by transformers", "without its class", "with old files"])
def test_opus_mt(marian: Path, written: str, tmp_path: Path) -> None:
    save(marian, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian"}))
    settings: dict[str, Any] = {"source_lang": "eng", "target_lang": "deu", "separate_vocabs": False}
    if written == "as on the Hub":
        settings |= {"tokenizer_class": "MarianTokenizer", "sp_model_kwargs": {}, "model_max_length": 512}
    if written != "by transformers":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if written == "with old files":
        special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    same(tmp_path, "_MarianTokenizer", TEXTS)


def test_the_recipe_s_tokenizers(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    train_tokenizer([*WORDS.values()] * 20, 400, max_length=32).save_pretrained(tmp_path / "trained")
    for name in ("tiny", "trained"):
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "marian"}))
        same(tmp_path / name, "_FastTokenizer", TEXTS)


def change(folder: Path, **settings: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"add_eos_token": True},
        {"split_special_tokens": True},
        {"extra_special_tokens": ["<new>"]},
        {"mask_token": "<mask>"},
        {"added_tokens_decoder": {"5": {"content": "<new>", "special": False}}},
    ],
    ids=str,
)
def test_what_transformers_would_add_it_adds(settings: dict[str, Any], tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    change(tmp_path, **settings)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian"}))
    assert type(load_tokenizer(tmp_path, "marian")).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    "settings", [{"separate_vocabs": True}, {"sp_model_kwargs": {"enable_sampling": True}}], ids=str
)
def test_opus_mt_of_other_kinds_is_transformers(marian: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    save(marian, tmp_path)
    (tmp_path / "target_vocab.json").write_bytes((tmp_path / "vocab.json").read_bytes())
    change(tmp_path, **settings)
    assert type(load_tokenizer(tmp_path, "marian")).__module__.startswith("transformers.")


def test_languages_of_a_multilingual_opus_mt(marian: Path, tmp_path: Path) -> None:
    save(marian, tmp_path)
    tokenizer = load_tokenizer(tmp_path, "marian")
    assert languages_of(tokenizer) == {"deu": ">>deu<<", "fra": ">>fra<<"}
    model: Any = type("Model", (), {"config": type("Config", (), {"model_type": "marian"})})
    assert direction_of(model, tokenizer, None, "fra").prompt == ">>fra<< "
    with pytest.raises(ValueError, match="tgt_lang 'xyz' is none of the 2 languages here"):
        direction_of(model, tokenizer, None, "xyz")


def test_other_classes_are_read_by_transformers(tmp_path: Path) -> None:
    NllbTokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
    assert type(load_tokenizer(tmp_path, "m2m_100")) is NllbTokenizer


@pytest.mark.parametrize("content", ["[1]", '{"tokenizer_class": "TokenizersBackend"}', "{"])
def test_a_damaged_tokenizer_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(ValueError, match="no tokenizer could be loaded: "):
        load_tokenizer(tmp_path, "marian")
