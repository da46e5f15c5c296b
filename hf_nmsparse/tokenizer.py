"""Text to tokens: a joint byte-level BPE tokenizer trained from the corpus, and the tokenised corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from datasets import IterableDataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_nmsparse.corpus import Rows

__all__ = ["tokenise", "train_tokenizer"]

logger = logging.get_logger(__name__)

_PAD, _EOS, _UNK = "<pad>", "</s>", "<unk>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int = 512, tags: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE that source and target share; no text is out of its vocabulary.

    Args:
        texts: Sentences of both languages.
        vocab_size: Entries of the vocabulary, the 256 bytes and three special tokens included.
        max_length: Longest sequence in tokens that the model takes.
        tags: Words that mark something, as ``>>fr<<`` a language, and are a token each: among the special ones, which
            are no part of a decoded text.

    Returns:
        A tokenizer that ends every sequence with ``</s>``. Its padding token is the last of the vocabulary, where
        Marian's models have it and the converters of CTranslate2 and others look for it.

    Raises:
        ValueError: The vocabulary cannot hold the bytes and the special tokens.
    """
    special = [_EOS, _UNK, *tags]
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(special) + 1
    if vocab_size < smallest:
        raise ValueError(f"vocab_size: needs at least {smallest} for the bytes and special tokens, got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([_PAD])
    bpe.post_processor = processors.TemplateProcessing(
        single=f"$A {_EOS}", pair=f"$A {_EOS} $B {_EOS}", special_tokens=[(_EOS, bpe.token_to_id(_EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNK,
        extra_special_tokens=list(tags),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def tokenise(
    pairs: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source_prefix: str = "",
    processes: int | None = None,
) -> Rows:
    """Turns the columns ``source`` and ``target`` into tokens, cached on disk beside the corpus; a stream as it comes.

    Args:
        pairs: Raw text as `load_corpus` gives it.
        tokenizer: For multilingual ones, with its source and target language set.
        max_length: Pairs with a side of more tokens are left out; how many is logged, of a stream only that.
        source_prefix: Put before every source text.
        processes: Processes that share the work; this one alone if None. Another number does not find the cache. A
            stream has no use for it.

    Returns:
        The columns ``input_ids``, ``labels``, ``source_length`` and ``target_length``.

    Raises:
        ValueError: No pair is short enough, or one of the processes was killed.
    """

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        sources = [source_prefix + text for text in batch["source"]] if source_prefix else batch["source"]
        encoded = tokenizer(sources, text_target=batch["target"], verbose=False, return_attention_mask=False)
        rows = [
            (source, target, len(source), len(target))
            for source, target in zip(encoded["input_ids"], encoded["labels"], strict=True)
            if len(source) <= max_length and len(target) <= max_length
        ]
        columns = list(zip(*rows, strict=True)) or [()] * 4
        return dict(zip(("input_ids", "labels", "source_length", "target_length"), map(list, columns), strict=True))

    if isinstance(pairs, IterableDataset):
        logger.warning(f"tokens: pairs of over {max_length} tokens are left out of the stream")
        return pairs.map(encode, batched=True, remove_columns=["source", "target"])
    vocabulary = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    )
    parts = (pairs._fingerprint, vocabulary, repr(tokenizer.init_kwargs), str(max_length), source_prefix)
    fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    try:
        tokens = pairs.map(
            encode, batched=True, remove_columns=pairs.column_names, new_fingerprint=fingerprint, num_proc=processes
        )
    except RuntimeError as error:
        if "subprocesses has abruptly died" not in str(error):
            raise
        raise ValueError(
            f"tokens: one of {processes} processes was killed at its work, often for want of memory; run again with "
            "fewer of them"
        ) from error
    if not len(tokens):
        raise ValueError(f"tokens: each of the {len(pairs)} pairs has more than {max_length} tokens; raise max_length")
    if len(tokens) < len(pairs):
        logger.warning(f"{len(pairs) - len(tokens):,} of {len(pairs):,} pairs have over {max_length} tokens: left out")
    return tokens
