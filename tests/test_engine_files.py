"""From a folder to an engine: what it is given is what the model of torch that loads the same folder gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, MarianMTModel

from hf_nmsparse import NMSparseConfig, engine_files, finalize, generation, save_packed, sparsify
from hf_nmsparse.engine_spec import FAMILIES
from hf_nmsparse.kernels import engine
from tests import tiny
from tests.test_engine_spec import tiny_model

pytestmark = pytest.mark.skipif(engine.why_not() is not None, reason="there is no native engine")


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("family", "pattern"), [*((family, "2:4") for family in FAMILIES), *(("marian", n) for n in ("1:2", "1:4", "4:8"))]
)
def test_both_doors_give_the_engine_the_same_bits(
    family: str, pattern: str, values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Any, ...]] = []

    class Told(engine.Engine):
        def __init__(self, *arguments: Any) -> None:
            given.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(engine_files, "Engine", Told)
    monkeypatch.setattr(generation, "Engine", Told)
    model = tiny_model(family)
    sparsify(model, NMSparseConfig(pattern))
    finalize(model)
    save_packed(model, tmp_path, values=values)
    loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.dtype == (torch.bfloat16 if values == "bf16" else torch.float32)
    generation.engine_for(loaded.eval())
    engine_files.load_engine(tmp_path)
    (config, weights, tables), (other_config, other_weights, other_tables) = given
    assert bytes(config) == bytes(other_config)
    dense = sum(each.format.startswith("dense_") for each in weights)
    assert dense == (len(weights) if pattern == "4:8" and values != "int8" else 1)  # the head
    for one, other in zip(weights, other_weights, strict=True):
        place: Any = one.side, one.layer, one.slot, one.format
        assert place == (other.side, other.layer, other.slot, other.format)
        assert np.array_equal(one.data, other.data), place
        none = np.zeros(0, np.float32)
        assert np.array_equal(none if one.bias is None else one.bias, none if other.bias is None else other.bias), place
    for one, other in zip(tables, other_tables, strict=True):
        place = one.side, one.layer, one.slot
        assert place == (other.side, other.layer, other.slot)
        # torch and NumPy have sines of their own.
        largest = np.float32(len(one.data))  # of the angles, which are rounded to fp32
        near = np.spacing(largest) if one.slot == engine.TableSlot.POSITION and values != "bf16" else 0
        assert np.abs(in_fp32(one) - in_fp32(other)).max() <= near, place


def in_fp32(table: engine.Table) -> Any:
    if table.scale is not None:
        return table.data * table.scale[:, None]
    if table.data.dtype == np.uint16:
        return (table.data.astype(np.uint32) << 16).view(np.float32)
    return table.data


def test_what_is_too_wide_for_sums_of_int8(tmp_path: Path) -> None:
    """Its file computes in fp32 there, and int8 that is asked for is refused."""
    config = tiny.marian().config
    config.decoder_layers, config.encoder_ffn_dim = 1, (1 << 16) + 8
    model = MarianMTModel(config).eval()
    sparsify(model, NMSparseConfig("2:4", ["model.encoder.layers.0.fc2"]))
    save_packed(model, tmp_path, "int8")
    loaded = engine_files.load_engine(tmp_path)
    assert loaded.formats["fp32"] == 1
    assert set(loaded.formats) == {"fp32", "dense_fp32"}
    with pytest.raises(ValueError, match=r"repack: int8 takes up to 65536 inputs, got 65544; compute in fp32 or bf16"):
        engine_files.load_engine(tmp_path, "int8")
