"""A joint byte-level BPE tokenizer for source and target, trained from the corpus."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["train_tokenizer"]

_PAD, _EOS, _UNK = "<pad>", "</s>", "<unk>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE that source and target share; no text is out of its vocabulary.

    Args:
        texts: Sentences of both languages.
        vocab_size: Entries of the vocabulary, the 256 bytes and three special tokens included.
        max_length: Longest sequence in tokens that the model takes.

    Returns:
        A tokenizer that ends every sequence with ``</s>`` and whose padding token has the index 0.

    Raises:
        ValueError: The vocabulary cannot hold the bytes and the special tokens.
    """
    special = [_PAD, _EOS, _UNK]
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(special)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size: needs at least {smallest} for the bytes and special tokens, got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"$A {_EOS}", pair=f"$A {_EOS} $B {_EOS}", special_tokens=[(_EOS, bpe.token_to_id(_EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNK,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
