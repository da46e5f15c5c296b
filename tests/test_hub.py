"""The real client against the stand-in for the Hub, each side in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import MarianMTModel

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.saving import save_packed
from hf_nmsparse.sparsify import finalize, sparsify
from tests.hub import LocalHub, local_hub
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
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=hub.environment(home),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert bool(done.returncode) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


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


def test_a_repository_that_is_not_there(hub: LocalHub, tmp_path: Path) -> None:
    assert "user/tiny is not a local folder and is not a valid model identifier" in process(
        hub, tmp_path / "puller", PULL, fails=True
    )
