"""How many positions models of torch have: what `positions_of` says, tried by generating so far and further."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from hf_nmsparse.positions import positions_of
from tests import tiny

hf: Any = transformers  # whose classes take keywords that their signatures do not name


def encoder_decoder(kind: str) -> Any:
    torch.manual_seed(0)
    settings = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"intermediate_size": 16, "max_position_embeddings": 32, "pad_token_id": 1, "eos_token_id": 2}
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(
        getattr(hf, f"{kind}Config")(**settings),
        getattr(hf, f"{kind}Config")(**settings | {"max_position_embeddings": 24}),
    )
    config.decoder_start_token_id, config.pad_token_id = 0, 1
    model = hf.EncoderDecoderModel(config).eval()
    model.generation_config.update(decoder_start_token_id=0, pad_token_id=1, eos_token_id=None)
    return model


def stock(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    shape = tiny.bart(40, d_model=16, layers=1) | {"decoder_start_token_id": 1, "forced_eos_token_id": None} | settings
    model = getattr(hf, f"{name}MTModel" if name == "Marian" else f"{name}ForConditionalGeneration")
    built = model(getattr(hf, f"{name}Config")(**shape)).eval()
    built.generation_config.eos_token_id = None
    return built


def t5_like(name: str) -> Any:
    built = getattr(hf, f"{name}ForConditionalGeneration")(getattr(hf, f"{name}Config")(**tiny.t5(40, 16, 1))).eval()
    built.generation_config.eos_token_id = None
    return built


MODELS: dict[str, tuple[Callable[[], Any], int | None, int | None]] = {
    **{
        name: (lambda name=name: stock(name), 32, 32)  # type: ignore[misc]
        for name in ("Marian", "Bart", "MBart", "PLBart", "Pegasus", "Mvp", "Blenderbot", "BlenderbotSmall")
    },
    "BigBirdPegasus": (lambda: stock("BigBirdPegasus", attention_type="original_full"), 32, 32),
    "LED": (
        lambda: stock(
            "LED", max_encoder_position_embeddings=32, max_decoder_position_embeddings=24, attention_window=4
        ),
        32,
        24,
    ),
    "M2M100": (lambda: stock("M2M100"), None, None),
    "NllbMoe": (lambda: stock("NllbMoe", num_experts=2, expert_capacity=64, router_jitter_noise=0.0), None, None),
    "FSMT": (lambda: stock("FSMT", src_vocab_size=40, tgt_vocab_size=40, langs=["en", "de"]), None, None),
    **{name: (lambda name=name: t5_like(name), None, None) for name in ("T5", "MT5", "UMT5", "LongT5")},  # type: ignore[misc]
    "Bert to Bert": (lambda: encoder_decoder("Bert"), 32, 24),
    "Roberta to Roberta": (lambda: encoder_decoder("Roberta"), 30, 22),
}


@pytest.mark.parametrize("name", MODELS)
def test_positions_are_those_that_the_model_has(name: str) -> None:
    make, source, target = MODELS[name]
    model = make()
    assert positions_of(model.get_encoder()) == source
    assert positions_of(model.get_decoder()) == target
    most = (target or 40) + 1

    def generate(length: int, tokens: int) -> torch.Tensor:
        ids = torch.full((1, tokens), 5)
        output: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=length)
        return output

    assert generate(most, source or 40).shape[1] == most
    if target is not None:
        with pytest.raises((IndexError, RuntimeError)):
            generate(most + 1, 3)
