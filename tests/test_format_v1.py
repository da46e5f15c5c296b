"""The stored file of format version 1 loads for ever, to the very weights that it loaded to when it was written.

It is a Marian model of one layer on either side, 2:4, in bf16, and its ``out_proj`` layers are dense. A row of ``fc1``
has -0.0 at its first place, one other number in that group and none in the next. ``expected.safetensors`` holds the
dense weights of the sparse layers, and the logits of the model in fp32 for ``source`` and ``target``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from hf_nmsparse.layers import sparse_layers
from hf_nmsparse.packed_layers import PackedLinear
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.saving import save_packed

STORED = Path(__file__).parent / "format_v1"
FC1 = "model.encoder.layers.0.fc1"


@pytest.mark.parametrize("compute", ["dense", "reference"])
def test_weights_are_exact(compute: str) -> None:
    expected = {key: tensor for key, tensor in load_file(STORED / "expected.safetensors").items() if "weight" in key}
    model = AutoModelForSeq2SeqLM.from_pretrained(STORED, quantization_config=NMSparseQuantizationConfig(compute))
    assert {f"{name}.weight" for name in sparse_layers(model)} == expected.keys()
    for name in sparse_layers(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear if compute == "reference" else nn.Linear)
        weight = layer.dense_weight() if isinstance(layer, PackedLinear) else layer.weight
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.view(torch.int16), expected[f"{name}.weight"].view(torch.int16))  # -0.0 is not 0.0


def test_the_row_by_hand() -> None:
    tensors = load_file(STORED / "model.safetensors")
    assert tensors[f"{FC1}.weight"][0].tolist() == [0.0, 3.0, 0.0, 0.0]
    assert tensors[f"{FC1}.weight"][0].signbit().tolist() == [True, False, False, False]
    assert tensors[f"{FC1}.weight_indices"][0].tolist() == [2]  # {0, 3}, then {0, 1}


@pytest.mark.parametrize("compute", ["dense", "reference"])
def test_output(compute: str) -> None:
    expected = load_file(STORED / "expected.safetensors")
    model = AutoModelForSeq2SeqLM.from_pretrained(
        STORED, dtype=torch.float32, quantization_config=NMSparseQuantizationConfig(compute)
    )
    source = expected["source"]
    with torch.no_grad():
        found = model(
            input_ids=source, attention_mask=(source != 0).long(), decoder_input_ids=expected["target"]
        ).logits
    assert torch.equal(found.argmax(dim=-1), expected["logits"].argmax(dim=-1))
    torch.testing.assert_close(found, expected["logits"], rtol=0, atol=1e-4)


def test_the_writer_still_writes_it(tmp_path: Path) -> None:
    save_packed(AutoModelForSeq2SeqLM.from_pretrained(STORED), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (STORED / "model.safetensors").read_bytes()
    records = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (STORED, tmp_path)]
    assert records[0] == records[1]
