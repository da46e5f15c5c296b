"""A translation model that needs no training: random, and sure of something."""

from __future__ import annotations

from pathlib import Path

import torch

from hf_nmsparse.tokenizer import train_tokenizer
from tests.recipe_runs import PAIRS
from tests.tiny import marian


def save_teacher(folder: Path, seed: int = 0) -> Path:
    """Saves one with a tokenizer of the pairs in `recipe_runs`, the same whatever the seed."""
    tokenizer = train_tokenizer([text for pair in PAIRS for text in pair], 300, max_length=40)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = marian(seed, vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.pad_token_id, **special)
    model.generation_config.update(bad_words_ids=[[tokenizer.pad_token_id]], max_length=12, num_beams=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
