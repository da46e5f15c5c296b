"""CTranslate2 converts what export_dense writes, and translates as the packed model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, GenerationConfig, PreTrainedTokenizerFast

from hf_nmsparse import NMSparseConfig, SparseTrainer, export_dense, save_packed, sparsify
from hf_nmsparse.corpus import load_corpus
from hf_nmsparse.tokenizer import tokenise
from recipes.arguments import parse
from recipes.wmt_en_de import load_model, load_tokenizer, make_sparse
from tests.recipe_runs import tiny, write_corpus
from tests.tiny import marian

pytestmark = pytest.mark.skipif(find_spec("ctranslate2") is None, reason="ctranslate2 is not installed")

PAD = 299
NAMES = ["</s>", "<unk>", *(f"t{number}" for number in range(2, PAD)), "<pad>"]

# In a process of its own: torch's threads and CTranslate2's are not made for one.
SCRIPT = """
import json, sys, ctranslate2
from ctranslate2.converters import TransformersConverter
folder, length = sys.argv[1], int(sys.argv[2])
TransformersConverter(f"{folder}/dense").convert(f"{folder}/ct2")
translator = ctranslate2.Translator(f"{folder}/ct2", intra_threads=1)
sources, targets = json.load(sys.stdin)
found = translator.translate_batch(sources, beam_size=1, max_decoding_length=length)
scores = translator.score_batch(sources, targets) if targets else []
print(json.dumps([[result.hypotheses[0] for result in found], [score.log_probs for score in scores]]))
"""


def converted(folder: Path, sources: list[list[str]], targets: list[list[str]], length: int) -> list[Any]:
    """Greedy translations by what CTranslate2 makes of ``folder/dense``, in tokens, and the scores of the targets."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), str(length)],
        input=json.dumps([sources, targets]),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def sentences(count: int) -> torch.Tensor:
    """Six random words each, and the end."""
    return torch.cat([torch.randint(2, PAD, (count, 6)), torch.zeros(count, 1, dtype=torch.long)], dim=1)


def test_translations_are_those_of_the_packed_model(tmp_path: Path) -> None:
    # As in OPUS-MT's models, the padding comes last and the decoder starts from its embedding, which is zero.
    special = {"pad_token_id": PAD, "eos_token_id": 0, "decoder_start_token_id": PAD}
    model = marian(init_std=0.4, vocab_size=PAD + 1, scale_embedding=True, **special)
    sparsify(model, NMSparseConfig("2:4"))
    with torch.no_grad():
        model.model.shared.weight[PAD] = 0
    model.generation_config = GenerationConfig(
        max_length=12, decoder_start_token_id=PAD, eos_token_id=0, pad_token_id=PAD, bad_words_ids=[[PAD]]
    )
    save_packed(model, tmp_path / "packed")
    export_dense(model, tmp_path / "dense")
    vocabulary = {name: place for place, name in enumerate(NAMES)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    ).save_pretrained(tmp_path / "dense")

    sources, targets = sentences(8), sentences(8)
    packed = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        given = torch.cat([torch.full((8, 1), PAD), targets[:, :-1]], dim=1)
        logits = packed(input_ids=sources, decoder_input_ids=given).logits[..., :PAD]  # CTranslate2 drops the padding
        scores = logits.log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]
    translations = [
        [NAMES[token] for token in row if token not in (0, PAD)] for row in packed.generate(input_ids=sources).tolist()
    ]
    words = [[[NAMES[token] for token in row] for row in rows.tolist()] for rows in (sources, targets[:, :-1])]
    found, found_scores = converted(tmp_path, words[0], words[1], length=11)
    assert found == translations
    # Sums of 32 fp32 numbers in another order, through two layers a side.
    torch.testing.assert_close(torch.tensor(found_scores), scores, rtol=1e-4, atol=1e-4)
    assert scores.std() > 0.1


def test_a_model_that_the_recipe_has_trained(tmp_path: Path) -> None:
    """Its padding is last in the vocabulary and its decoder starts from a zero: 100 sentences are translated alike."""
    arguments = tiny(write_corpus(tmp_path / "corpus"), tmp_path / "run", max_steps=200, save_strategy="no")
    (tmp_path / "none.yaml").write_text("sparse_method: sr-ste")
    recipe, args = parse([str(tmp_path / "none.yaml"), *arguments, "--report_to", "none", "--disable_tqdm", "true"])
    pairs = load_corpus(recipe.corpus, "en", "de")["train"]
    tokenizer: Any = load_tokenizer(recipe, [pairs], tmp_path / "run")
    model: Any = load_model(recipe, tokenizer)
    make_sparse(model, recipe, args)
    SparseTrainer(
        model=model,
        args=args,
        train_dataset=tokenise(pairs, tokenizer, recipe.max_length),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    ).train()
    save_packed(model, tmp_path / "packed")
    export_dense(model, tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")

    packed, texts = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "packed"), pairs["source"][:100]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    rows = packed.generate(**given, num_beams=1, max_length=40).tolist()
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    translations = [tokenizer.convert_ids_to_tokens([token for token in row if token not in special]) for row in rows]
    sources = [tokenizer.convert_ids_to_tokens(row) for row in tokenizer(texts)["input_ids"]]
    found, _ = converted(tmp_path, sources, [], length=39)
    assert found == translations
    assert len({*map(tuple, translations)}) > 20
