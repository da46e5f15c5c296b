"""Marian models of any order of the vocabulary run on CTranslate2 with the tokens of transformers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_nmsparse.ctranslate2_export import export_ctranslate2, vocabulary_of
from tests import tiny

pytestmark = pytest.mark.skipif(find_spec("ctranslate2") is None, reason="ctranslate2 is not installed")

SOURCES = [[*range(first, first + 5), 1] for first in range(4, 244, 20)]
FIRST = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
MIDDLE = {"pad_token_id": 150, "eos_token_id": 1, "decoder_start_token_id": 151}
LAST = {"pad_token_id": 299, "eos_token_id": 1, "decoder_start_token_id": 299}


class Names:
    """A tokenizer as the export sees it."""

    eos_token, unk_token = "t1", "t2"

    def __init__(self, texts: dict[int, Any] | None = None) -> None:
        self.texts = texts or {}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[Any]:
        return [self.texts.get(token, f"t{token}") for token in ids]


def model(special: dict[str, int], bias: bool = False) -> Any:
    """One whose decoder starts from an embedding that is not zero, as older models of the recipe do."""
    made: Any = tiny.marian(init_std=0.5, scale_embedding=True, **special)
    with torch.no_grad():
        made.model.shared.weight[special["decoder_start_token_id"]] = torch.randn(32)
        made.final_logits_bias += torch.randn(300) * bias
    return made.eval()


@pytest.mark.parametrize("bias", [False, True], ids=["", "with a bias"])
@pytest.mark.parametrize("special", [FIRST, MIDDLE, LAST], ids=["padding first", "in the middle", "last"])
def test_tokens_are_those_of_transformers(special: dict[str, int], bias: bool, tmp_path: Path) -> None:
    found = export_ctranslate2(model(special, bias), Names(), tmp_path / "new", SOURCES)
    assert found == {1: len(SOURCES), 4: len(SOURCES)}
    words = json.loads((tmp_path / "new" / "shared_vocabulary.json").read_text(encoding="utf-8"))
    assert words == [f"t{token}" for token in range(300) if token != special["pad_token_id"]]


def test_what_is_rounded_is_counted(tmp_path: Path) -> None:
    found = export_ctranslate2(model(FIRST), Names(), tmp_path / "new", SOURCES, "int8")
    assert all(0 <= count <= len(SOURCES) for count in found.values())
    sizes = {}
    for name, quantization in (("fp32", "float32"), ("fp16", "float16")):
        export_ctranslate2(model(FIRST), Names(), tmp_path / name, SOURCES, quantization)
        sizes[name] = (tmp_path / name / "model.bin").stat().st_size
    assert (tmp_path / "new" / "model.bin").stat().st_size < sizes["fp16"] < sizes["fp32"]


def test_a_start_that_is_lost_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has teeth: without the step that keeps the start, the tokens are others."""
    monkeypatch.setattr("hf_nmsparse.ctranslate2_export._start_from_zero", lambda model: None)
    with pytest.raises(
        ValueError, match=r"^export: CTranslate2 translates \d+ of 12 sentences greedily otherwise than"
    ):
        export_ctranslate2(model(FIRST), Names(), tmp_path / "new", SOURCES)


def test_what_ctranslate2_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^export: quantization is one of 'int8', .* got 'int3'"):
        export_ctranslate2(model(FIRST), Names(), tmp_path / "new", SOURCES, "int3")
    made = model(FIRST)
    made.config.activation_function = "tanh"
    with pytest.raises(ValueError, match=r"^export: CTranslate2 does not convert this model: 'tanh'"):
        export_ctranslate2(made, Names(), tmp_path / "new", SOURCES)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("texts", "message"), [({7: None}, "no token 7"), ({7: "t8"}, "one text for several tokens")])
def test_a_vocabulary_without_names(texts: dict[int, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"the model has 300 tokens and its tokenizer {message}"):
        vocabulary_of(tiny.marian(), Names(texts))
