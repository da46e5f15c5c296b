"""The real client against the stand-in for the Hub, each side in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from transformers import MarianMTModel

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.kernels import engine
from hf_nmsparse.saving import save_packed
from hf_nmsparse.sparse_model import finalize, sparsify
from hf_nmsparse.translator import Translator
from tests.hub import LocalHub, local_hub
from tests.processes import in_a_fresh_one
from tests.tiny import marian, tokenizer

CARD = """---
model-index:
- name: tiny
  results:
  - task: {type: translation}
    dataset: {name: none, type: none}
    metrics: [{type: bleu, value: 12.5}]
---

# tiny
"""


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with local_hub() as server:
        yield server


def process(hub: LocalHub, home: Path, code: str, *arguments: str, fails: bool = False) -> str:
    """Runs code in a fresh process; what it printed, or its standard error where it is to fail."""
    return in_a_fresh_one("-c", code, *arguments, fails=fails, environment=hub.environment(home))


def sparse_marian() -> MarianMTModel:
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    return model


PUSH_FOLDER = """
import sys
from hf_nmsparse import push_to_hub
push_to_hub(sys.argv[1], "user/tiny")
"""

PUSH_MODEL = """
from hf_nmsparse import NMSparseConfig, push_to_hub, sparsify
from tests.tiny import marian
model = marian()
sparsify(model, NMSparseConfig("2:4"))
push_to_hub(model, "user/tiny", values="bf16")
"""

PUSH_TRAINER = """
import sys
from pathlib import Path
from tests.test_trainer import train
from tests.tiny import tokenizer
settings = {"sparse_values": "bf16", "sparse_standalone": True}
trainer = train(Path(sys.argv[1]), hub_model_id="user/tiny", max_steps=1, **settings)
trainer.processing_class = tokenizer()
(Path(sys.argv[1]) / "README.md").write_text(sys.argv[2])
trainer.push_to_hub()
"""

# Three steps with a push after each, for each repository with its settings; at last what its user saves.
PUSH_WHILE_TRAINING = """
import json, sys
from pathlib import Path
from hf_nmsparse.layers import NMLinear
from tests.test_trainer import train
from transformers import MarianMTModel
common = dict(push_to_hub=True, hub_always_push=True, save_strategy="steps", save_steps=1, max_steps=3)
for repo, settings in json.loads(sys.argv[2]).items():
    folder = Path(sys.argv[1]) / repo
    trainer = train(folder, **{**common, "hub_model_id": f"user/{repo}", **settings})
    assert str(trainer.args.output_dir) == str(folder)
    for job in trainer.push_in_progress.jobs if trainer.push_in_progress else []:
        job.result()
    if repo == "saved":
        trainer.save_model()
        masters = MarianMTModel.from_pretrained(folder)
        assert sum(isinstance(layer, NMLinear) for layer in masters.modules()) == 32
        assert all((value == trainer.model.state_dict()[name]).all() for name, value in masters.state_dict().items())
"""


def is_packed(files: dict[str, bytes], folder: str = "") -> bool | None:
    """Whether what lies in a folder of a repository is a packed model; None where it holds no model."""
    if f"{folder}config.json" not in files:
        return None
    config = json.loads(files[f"{folder}config.json"])
    tensors = load(files[f"{folder}model.safetensors"])
    packed: bool = config["quantization_config"]["format"] == "packed"
    assert packed == any(name.endswith("weight_indices") for name in tensors)
    return packed


PULL = """
import sys, torch, hf_nmsparse
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model = AutoModelForSeq2SeqLM.from_pretrained("user/tiny").eval()
if sys.argv[1:]:
    ids = AutoTokenizer.from_pretrained("user/tiny")("A garden", return_tensors="pt")
    dense = hf_nmsparse.NMSparseQuantizationConfig(compute="dense")
    model = AutoModelForSeq2SeqLM.from_pretrained("user/tiny", quantization_config=dense).eval()
    logits = model(**ids, decoder_input_ids=torch.tensor([[0]])).logits.detach()
    expected = torch.load(sys.argv[1])
    assert torch.dist(logits, expected) < 1e-6 * expected.norm()  # another process may sum in another order
print(model.dtype, len(hf_nmsparse.layers.sparse_layers(model)))
"""


def test_a_packed_folder_goes_and_comes_back(hub: LocalHub, tmp_path: Path) -> None:
    model = sparse_marian()
    save_packed(model, tmp_path / "packed", max_shard_size="40KB", standalone=True)  # whose code nobody is asked to run
    tokenizer().save_pretrained(tmp_path / "packed")
    (tmp_path / "packed" / "README.md").write_text(CARD)
    process(hub, tmp_path / "pusher", PUSH_FOLDER, str(tmp_path / "packed"))
    assert hub.repos["user/tiny"] == {
        str(file.relative_to(tmp_path / "packed")): file.read_bytes()
        for file in (tmp_path / "packed").rglob("*")
        if file.is_file()
    }
    assert sum(name.endswith(".safetensors") for name in hub.repos["user/tiny"]) > 2
    finalize(model)
    with torch.no_grad():
        logits = model.eval()(
            **tokenizer()("A garden", return_tensors="pt"), decoder_input_ids=torch.tensor([[0]])
        ).logits
    torch.save(logits, tmp_path / "logits.pt")
    assert process(hub, tmp_path / "puller", PULL, str(tmp_path / "logits.pt")) == "torch.float32 32\n"


def test_a_model_is_packed_on_its_way(hub: LocalHub, tmp_path: Path) -> None:
    old = {"README.md": CARD.encode(), "model-00001-of-00001.safetensors": b"", "model.safetensors.index.json": b""}
    hub.repos["user/tiny"] = dict(old)
    process(hub, tmp_path / "pusher", PUSH_MODEL)
    found = hub.repos["user/tiny"]
    assert found.keys() == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert found["README.md"] == old["README.md"]
    assert process(hub, tmp_path / "puller", PULL) == "torch.bfloat16 32\n"


def test_the_trainer_pushes_packed_and_keeps_the_card(hub: LocalHub, tmp_path: Path) -> None:
    process(hub, tmp_path / "pusher", PUSH_TRAINER, str(tmp_path / "run"), CARD)
    assert hub.repos["user/tiny"]["README.md"].decode() == CARD
    assert "modeling_nmsparse.py" in hub.repos["user/tiny"]
    assert process(hub, tmp_path / "puller", PULL) == "torch.bfloat16 32\n"


def test_what_the_trainer_pushes_as_a_model_is_packed_by_every_strategy(hub: LocalHub, tmp_path: Path) -> None:
    strategies = ("end", "every_save", "checkpoint", "all_checkpoints")
    cases: dict[str, dict[str, Any]] = {strategy: {"hub_strategy": strategy} for strategy in strategies}
    cases["saved"] = {"hub_strategy": "end"}
    fading = {"sparse_method": "decaying-mask", "sparse_decay": None, "sparse_fade": 0.6}
    cases["fading"] = {"hub_strategy": "checkpoint", **fading}
    # Trainer would write over a file that it is still uploading.
    cases["dense"] = {"sparse_method": "dense", "sparse_decay": None, "hub_always_push": False}
    said = process(hub, tmp_path / "pusher", PUSH_WHILE_TRAINING, str(tmp_path), json.dumps(cases))

    checkpoints = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {f"checkpoint-{step}" for step in (1, 2, 3)}}
    for strategy in strategies:
        files = hub.repos[f"user/{strategy}"]
        expected = None if strategy == "end" else True
        assert {is_packed(commit) for commit in hub.history.get(f"user/{strategy}", [{}])} == {expected}
        assert {name.partition("/")[0] for name in files if "checkpoint" in name} == checkpoints.get(strategy, set())
        for folder in checkpoints.get(strategy, ()):
            assert is_packed(files, f"{folder}/") is False
            assert {f"{folder}/trainer_state.json", f"{folder}/optimizer.pt"} <= files.keys()
        if strategy != "end":
            assert {"README.md", "tokenizer.json", "generation_config.json"} <= files.keys()
        assert not (tmp_path / strategy / "config.json").exists()

    # What its user saves are the masters, and what is pushed of it is packed.
    assert is_packed(hub.repos["user/saved"]) is True
    assert (
        is_packed({file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir() if file.is_file()}) is False
    )

    # Before the pruned weights have faded there is no model; the checkpoint goes all the same.
    [line] = [line for line in said.splitlines() if "is not pushed" in line]
    assert line.startswith(
        "step 1: the checkpoint is saved and the model is not pushed: a layer of 32x32 computes with"
    )
    assert [is_packed(commit) for commit in hub.history["user/fading"]] == [None, True, True, True, True]
    assert is_packed(hub.repos["user/fading"], "last-checkpoint/") is False

    assert "quantization_config" not in json.loads(hub.repos["user/dense"]["config.json"])
    assert {"training_args.bin", "model.safetensors"} <= hub.repos["user/dense"].keys()


def test_a_repository_that_is_not_there(hub: LocalHub, tmp_path: Path) -> None:
    assert "user/tiny is not a local folder and is not a valid model identifier" in process(
        hub, tmp_path / "puller", PULL, fails=True
    )


TRANSLATE = """
import sys
from hf_nmsparse import Translator
translator = Translator("me/tiny", revision="main", token="hf_mine")
print(translator.translate(["Ein Mann"], max_length=9)[0].tokens, "torch" in sys.modules)
"""


@pytest.mark.skipif(engine.why_not() is not None, reason="there is no native engine")
def test_a_translator_takes_what_it_needs_from_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    save_packed(sparse_marian(), tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    hub.repos["me/tiny"] = {**files, "pytorch_model.bin": b"not asked for", "onnx/model.json": b"{}"}
    expected = Translator(tmp_path / "model").translate(["Ein Mann"], max_length=9)[0].tokens
    assert process(hub, tmp_path / "home", TRANSLATE) == f"{expected} False\n"
    fetched = {path.name for path in (tmp_path / "home").rglob("*")}
    assert {"model.safetensors", "tokenizer.json"} <= fetched
    assert not {"pytorch_model.bin", "onnx"} & fetched
    error = process(hub, tmp_path / "home", TRANSLATE.replace("me/tiny", "me/none"), fails=True)
    assert "ValueError: translator: me/none cannot be had from the Hub: " in error
