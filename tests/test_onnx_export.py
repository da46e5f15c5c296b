"""The ONNX files of a Marian model, in onnxruntime and where it is there in OpenVINO."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from hf_nmsparse import onnx_export
from hf_nmsparse.export_check import Expected, expected_of, same
from hf_nmsparse.onnx_export import ENCODER, FIRST, NEXT, export_onnx, greedy, sessions
from tests import tiny

NEEDED = ("onnx", "onnxruntime", "onnxscript")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")

SOURCES = [[*range(first, first + 2 + first % 5), 1] for first in range(4, 104, 9)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Expected, dict[str, int]]:
    """The folders "fp32" and "int8", what transformers translates, and how much of it each does."""
    folder, same_as = tmp_path_factory.mktemp("onnx"), {}
    model: Any = tiny.marian(init_std=0.5, encoder_layers=1, decoder_layers=1).eval()
    with torch.no_grad():
        model.model.shared.weight[0] = torch.randn(32)  # the start
    settings = GenerationConfig(max_length=20, num_beams=2, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    for name in ("fp32", "int8"):
        (folder / name).mkdir()
    model.generation_config = settings
    # Writing the graphs takes longest by far.
    same_as["fp32"] = export_onnx(model, folder / "fp32", SOURCES)
    assert model.generation_config is settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            onnx_export, "_write", lambda model, new: shutil.copytree(folder / "fp32", new, dirs_exist_ok=True)
        )
        same_as["int8"] = export_onnx(model, folder / "int8", SOURCES, "int8")
    return folder, expected_of(model, SOURCES, (1,)), same_as


def test_files_are_named_as_optimum_reads_them(exported: tuple[Path, Expected, dict[str, int]]) -> None:
    import onnxruntime

    folder = exported[0] / "fp32"
    assert {file.name for file in folder.iterdir()} == {
        *(f"{name}.onnx" for name in (ENCODER, FIRST, NEXT)),
        "config.json",
        "generation_config.json",
    }
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["num_beams"] == 2
    session = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in (ENCODER, FIRST, NEXT)}
    inputs = {name: [one.name for one in found.get_inputs()] for name, found in session.items()}
    outputs = {name: [one.name for one in found.get_outputs()] for name, found in session.items()}
    own, encoders = ([f"0.{side}.{kind}" for kind in ("key", "value")] for side in ("decoder", "encoder"))
    assert (inputs[ENCODER], outputs[ENCODER]) == (["input_ids", "attention_mask"], ["last_hidden_state"])
    assert inputs[FIRST] == ["encoder_attention_mask", "input_ids", "encoder_hidden_states"]
    assert outputs[FIRST] == ["logits", *(f"present.{name}" for name in (*own, *encoders))]
    past = [f"past_key_values.{name}" for name in (*own, *encoders)]
    assert inputs[NEXT] == ["encoder_attention_mask", "input_ids", *past]
    assert outputs[NEXT] == ["logits", *(f"present.{name}" for name in own)]
    assert [session[FIRST].get_inputs()[1].shape, session[NEXT].get_inputs()[1].shape] == [
        ["batch_size", "decoder_sequence_length"],
        ["batch_size", 1],
    ]


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_tokens_are_those_of_transformers(exported: tuple[Path, Expected, dict[str, int]], batch: int) -> None:
    folder, expected, same_as = exported
    assert greedy(sessions(folder / "fp32"), expected, batch) == expected.translations[1]
    assert same_as["fp32"] == len(SOURCES)
    assert len({*map(tuple, expected.translations[1])}) > 5


def test_several_tokens_at_once(exported: tuple[Path, Expected, dict[str, int]]) -> None:
    """The first file takes a translation that is begun already, as beams with a prefix do."""
    folder, expected, _ = exported
    runs = sessions(folder / "fp32")
    mask = torch.ones(1, len(SOURCES[0]), dtype=torch.long).numpy()
    states = runs[ENCODER]({"input_ids": torch.tensor([SOURCES[0]]).numpy(), "attention_mask": mask})
    begun = torch.tensor([[0, *expected.translations[1][0]]]).numpy()
    given = {"encoder_attention_mask": mask, "encoder_hidden_states": states["last_hidden_state"]}
    logits = runs[FIRST](given | {"input_ids": begun})["logits"]
    assert logits[0, :-1, 1:].argmax(-1).tolist() == [token - 1 for token in expected.translations[1][0]]


def test_int8_is_smaller_and_counted(exported: tuple[Path, Expected, dict[str, int]]) -> None:
    folder, expected, same_as = exported
    found = greedy(sessions(folder / "int8"), expected)
    assert same_as["int8"] == same(found, expected.translations[1])
    sizes = [sum(file.stat().st_size for file in (folder / name).glob("*.onnx")) for name in ("int8", "fp32")]
    assert sizes[0] < sizes[1]


def test_a_quantization_that_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^export: quantization is one of 'int8', got 'int4'"):
        export_onnx(tiny.marian(), tmp_path, SOURCES, "int4")


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_reads_them(exported: tuple[Path, Expected, dict[str, int]]) -> None:
    from benchmarks.exports import openvino_runs

    folder, expected, _ = exported
    assert greedy(openvino_runs(folder / "fp32", 1), expected) == expected.translations[1]
