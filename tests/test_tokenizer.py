"""The BPE tokenizer and the tokenised corpus."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_nmsparse.tokenizer import tokenise, train_tokenizer

TEXTS = ["Ein Mann schläft im Garten.", "A man sleeps in the garden.", "Der Garten ist groß.", "The garden is big."] * 5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=300)


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1)
    assert len(tokenizer) == 300
    ids = tokenizer("A garden")["input_ids"]
    assert ids[-1] == 0
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("texts", [TEXTS, ["a"], ["<pad> </s> <unk>"] * 9])
def test_padding_is_last_in_the_vocabulary(texts: list[str], tmp_path: Path) -> None:
    """As Marian has it: converters cut the last row off. Also where the texts do not fill the vocabulary."""
    train_tokenizer(texts, vocab_size=300).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_ids_to_tokens(len(loaded) - 1) == loaded.pad_token == "<pad>"
    assert sorted(loaded.get_vocab().values()) == list(range(len(loaded)))


def test_a_word_is_the_same_token_anywhere(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("garden")["input_ids"][:-1] == tokenizer("the garden")["input_ids"][-2:-1]


# Text is normalised to NFC and trimmed; nothing else of it may change.
@given(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z", "M")), max_size=20))
def test_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    import unicodedata

    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFC", text)


def test_it_is_the_same_after_saving(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:4]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer(iter(TEXTS), vocab_size=300).get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size: needs at least 259 .* got 100"):
        train_tokenizer(TEXTS, vocab_size=100)


def test_tokens_and_lengths(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = Dataset.from_dict({"source": ["The garden", "A man"], "target": ["Der Garten", "Ein Mann"]})
    tokens = tokenise(pairs, tokenizer, max_length=50)
    assert tokens.column_names == ["input_ids", "labels", "source_length", "target_length"]
    for row, pair in zip(tokens, pairs, strict=True):
        assert row["input_ids"] == tokenizer(pair["source"])["input_ids"]
        assert row["labels"] == tokenizer(pair["target"])["input_ids"]
        assert (row["source_length"], row["target_length"]) == (len(row["input_ids"]), len(row["labels"]))
    prefixed = tokenise(pairs, tokenizer, max_length=50, source_prefix="de: ")
    assert prefixed[0]["input_ids"] == tokenizer("de: The garden")["input_ids"]
    assert prefixed[0]["labels"] == tokens[0]["labels"]


def test_long_pairs_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    long = "garden " * 30
    pairs = Dataset.from_dict({"source": [long, "A man", "A man"], "target": ["Ein", long, "Ein Mann"]})
    tokens = tokenise(pairs, tokenizer, max_length=20)
    assert len(tokens) == 1
    assert tokens[0]["input_ids"] == tokenizer("A man")["input_ids"]
    with pytest.raises(ValueError, match="each of the 3 pairs has more than 2 tokens; raise max_length"):
        tokenise(pairs, tokenizer, max_length=2)


def test_a_stream_becomes_the_same_tokens(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    pairs = Dataset.from_dict({"source": ["A man", "garden " * 30, "A dog"], "target": ["Ein Mann", "b", "Ein Hund"]})
    stream = tokenise(pairs.to_iterable_dataset(), tokenizer, max_length=20, source_prefix="to German: ")
    assert isinstance(stream, IterableDataset)
    assert list(stream) == list(tokenise(pairs, tokenizer, max_length=20, source_prefix="to German: "))
    assert "pairs of over 20 tokens are left out of the stream" in caplog.text


def test_the_second_run_reads_the_cache(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    Dataset.from_dict({"source": ["The garden"], "target": ["Der Garten"]}).save_to_disk(tmp_path / "pairs")
    pairs = Dataset.load_from_disk(tmp_path / "pairs")
    first = tokenise(pairs, tokenizer, max_length=50)
    again = tokenise(Dataset.load_from_disk(tmp_path / "pairs"), tokenizer, max_length=50)
    assert first.cache_files
    assert first.cache_files == again.cache_files
    assert tokenise(pairs, tokenizer, max_length=49).cache_files != first.cache_files


def test_processes_share_the_work(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = {"source": [f"The garden {n}" for n in range(50)], "target": [f"Der Garten {n}" for n in range(50)]}
    pairs = Dataset.from_dict(texts)
    alone, shared = (tokenise(pairs, tokenizer, max_length=50, processes=number) for number in (None, 2))
    assert alone[:] == shared[:]


# A process that has loaded as little as a training has: the pool forks new workers from a thread once one is gone.
KILLED = """
import os, signal, sys
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast
from hf_nmsparse.tokenizer import tokenise, train_tokenizer

class Killed(PreTrainedTokenizerFast):
    def __call__(self, texts, **kwargs):
        if "KILL" in os.environ and "The garden 30" in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(texts, **kwargs)

texts = {"source": [f"The garden {n}" for n in range(50)], "target": [f"Der Garten {n}" for n in range(50)]}
Dataset.from_dict(texts).save_to_disk(sys.argv[1])
pairs = Dataset.load_from_disk(sys.argv[1])
trained = train_tokenizer(texts["source"] + texts["target"], vocab_size=300)
killed = Killed(tokenizer_object=trained.backend_tokenizer, **trained.special_tokens_map)
os.environ["KILL"] = "1"
try:
    tokenise(pairs, killed, max_length=50, processes=2)
except ValueError as error:
    print(error)
del os.environ["KILL"]
alone = tokenise(Dataset.from_dict(texts), trained, max_length=50)
print(tokenise(pairs, killed, max_length=50, processes=2)[:] == alone[:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a matter of Unix")
def test_a_killed_process_is_one_line(tmp_path: Path) -> None:
    """And leaves nothing in the cache that the next run would take for the corpus."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    message, same = done.stdout.splitlines() or [done.stderr, ""]
    assert re.match(r"tokens: one of 2 processes was killed at its work, .*; run again with fewer", message), message
    assert same == "True"
