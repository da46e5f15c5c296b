"""Small repositories of the shape that the recipes' originals have on the Hub, for its stand-in to serve."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece
import torch

from tests.tiny import hf

Pairs = list[tuple[str, str]]

CARD = """---
language:
- de
- en
task_categories:
- translation
dataset_info:
- config_name: de-en
  features:
  - name: translation
    dtype:
      translation:
        languages:
        - de
        - en
configs:
- config_name: de-en
  data_files:
  - split: train
    path: de-en/train-*
  - split: validation
    path: de-en/validation-*
  - split: test
    path: de-en/test-*
---

# Dataset Card for "wmt14"
"""


def wmt14(train: Pairs, validation: Pairs, test: Pairs) -> dict[str, bytes]:
    """The files of ``wmt/wmt14``: parquet, the training pairs in two parts."""
    half = len(train) // 2
    parts = {
        "train-00000-of-00002": train[:half],
        "train-00001-of-00002": train[half:],
        "validation-00000-of-00001": validation,
        "test-00000-of-00001": test,
    }
    files = {"README.md": CARD.encode()}
    for name, pairs in parts.items():
        table = pa.Table.from_pylist([{"translation": {"de": german, "en": english}} for english, german in pairs])
        file = io.BytesIO()
        pq.write_table(table, file)
        files[f"de-en/{name}.parquet"] = file.getvalue()
    return files


def opus_mt(pairs: Pairs) -> dict[str, bytes]:
    """The files of ``Helsinki-NLP/opus-mt-en-de``, one layer a side: weights in .bin, settings of generation twice."""
    source, target = (_sentencepiece(side) for side in zip(*pairs, strict=True))
    found = [
        piece
        for model in (source, target)
        for pieces in [sentencepiece.SentencePieceProcessor(model_proto=model)]
        for piece in map(pieces.id_to_piece, range(len(pieces)))
    ]
    names = [*dict.fromkeys(["</s>", "<unk>", *found]), "<pad>"]
    pad = len(names) - 1
    special = {"bos_token_id": 0, "decoder_start_token_id": pad, "eos_token_id": 0, "pad_token_id": pad}
    generation = {"bad_words_ids": [[pad]], "forced_eos_token_id": 0, "max_length": 512, **special}
    shape = {
        "activation_function": "swish",
        "d_model": 32,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 64,
        "decoder_layers": 1,
        "decoder_vocab_size": pad + 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "encoder_layers": 1,
        "max_position_embeddings": 512,
        "scale_embedding": True,
        "share_encoder_decoder_embeddings": True,
        "static_position_embeddings": True,
        "vocab_size": pad + 1,
    }
    torch.manual_seed(0)
    weights = io.BytesIO()
    torch.save(hf.MarianMTModel(hf.MarianConfig(**shape, **special)).state_dict(), weights)
    config = {
        "_name_or_path": "/tmp/Helsinki-NLP/opus-mt-en-de",
        "_num_labels": 3,
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "architectures": ["MarianMTModel"],
        "gradient_checkpointing": False,
        "model_type": "marian",
        "normalize_before": False,
        "normalize_embedding": False,
        "num_beams": 6,
        "transformers_version": "4.22.0.dev0",
        **shape,
        **generation,
    }
    settings = {**generation, "num_beams": 4, "renormalize_logits": True, "transformers_version": "4.32.0.dev0"}
    return {
        "README.md": b"---\nlicense: cc-by-4.0\n---\n",
        "config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps(settings).encode(),
        "pytorch_model.bin": weights.getvalue(),
        "source.spm": source,
        "target.spm": target,
        "tokenizer_config.json": json.dumps({"target_lang": "de", "source_lang": "en"}).encode(),
        "vocab.json": json.dumps({name: place for place, name in enumerate(names)}).encode(),
    }


def _sentencepiece(texts: tuple[str, ...]) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=0,
        unk_id=1,
        minloglevel=2,
    )
    return model.getvalue()
