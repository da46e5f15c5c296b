"""Number types, checkpointing, compilation and optimizers: whatever a run combines, masks are the fp32 master's."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import TrainerCallback

from hf_nmsparse import NMSparseConfig, SparseStep, SparseTrainer, save_packed, sparsify
from hf_nmsparse.checking import check_folder
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.masks import magnitude_mask
from tests.test_trainer import arguments
from tests.tiny import collator, marian, token_pairs

STEPS = 4

COMBINATIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "checkpointing, reentrant": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16, checkpointing": {"bf16": True, "activation_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "bf16, compiled": {"bf16": True, "torch_compile": True, "torch_compile_backend": "aot_eager"},
    "fused AdamW": {"optim": "adamw_torch_fused"},
    "bf16, fused AdamW, accumulation": {
        "bf16": True,
        "optim": "adamw_torch_fused",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    "Adafactor": {"optim": "adafactor"},
    "8-bit AdamW": {"optim": "adamw_bnb_8bit"},
}


class _Masks(TrainerCallback):
    """Checks every layer after every step."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, NMLinear)]
        assert len(layers) == 16
        for layer in layers:
            assert layer.weight.dtype == torch.float32
            assert layer.mask is not None
            assert torch.equal(layer.mask, magnitude_mask(layer.weight, layer.pattern))
        self.steps += 1


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def run(folder: Path, **settings: Any) -> tuple[SparseTrainer, list[float]]:
    """A short training, and its losses."""
    model, masks = marian(encoder_layers=1, decoder_layers=1), _Masks()
    sparsify(model, NMSparseConfig("2:4"))
    args = arguments(folder, **{"optim": "adamw_torch", "learning_rate": 1e-3, "sparse_decay": 2e-4, **settings})
    trainer = SparseTrainer(
        model=model, args=args, train_dataset=token_pairs(32), data_collator=collator(model), callbacks=[masks]
    )
    trainer.train()
    assert masks.steps == STEPS
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# torch's own tracer instantiates an autograd.Function and then warns of it.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_combination_trains_and_packs(name: str, tmp_path: Path) -> None:
    settings = COMBINATIONS[name]
    if "bnb" in settings.get("optim", "") and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    trainer, losses = run(tmp_path / "run", **settings)
    _, expected = run(tmp_path / "fp32", optim=settings.get("optim", "adamw_torch"))
    # bf16 keeps 8 bits of a number: 2^-8 of a loss of 6 is 0.02.
    assert losses == pytest.approx(expected, abs=0.02 if settings.get("bf16") else 1e-5)
    model: Any = trainer.model
    save_packed(model, tmp_path / "packed", values="bf16")
    assert len(check_folder(tmp_path / "packed").layers) == 16


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("method", "graphs"), [("sr-ste", 2), ("decaying-mask", 4)])
def test_steps_share_their_graphs(method: str, graphs: int) -> None:
    """The first forward ranks, the others take the mask that is kept; a fade adds graphs for its beginning and end."""
    counter = CompileCounterWithBackend("aot_eager")
    layer = torch.nn.Linear(16, 8)
    sparsify(layer, NMSparseConfig("2:4"))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    pairs = []
    for module, call in ((layer, compiled), (twin, twin)):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        SparseStep(module, optimizer, method, steps=10)
        pairs.append((optimizer, call))
    for _ in range(8):
        for optimizer, call in pairs:
            optimizer.zero_grad()
            call(torch.ones(3, 16)).square().sum().backward()
            optimizer.step()
    assert torch.equal(layer.weight, twin.weight)
    assert counter.frame_count <= graphs
