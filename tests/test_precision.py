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
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.masks import magnitude_mask
from hf_nmsparse.packed_files import check_folder
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


def test_fp16_overflows_skip_steps_and_nothing_else() -> None:
    """A loop with a loss scaler that begins far too high: accelerate has fp16 on accelerators alone."""

    def losses_of(dtype: torch.dtype) -> tuple[list[float], int]:
        model = marian(encoder_layers=1, decoder_layers=1)
        sparsify(model, NMSparseConfig("2:4"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = SparseStep(model, optimizer, "sr-ste")
        layers = [layer for layer in model.modules() if isinstance(layer, NMLinear)]
        half = dtype == torch.float16
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-8, enabled=half)
        batches = collator(model), token_pairs(32)
        losses, skipped = [], 0
        while step.step < STEPS:
            rows = [batches[1][8 * step.step + row] for row in range(8)]
            before, count = [layer.weight.detach().clone() for layer in layers], step.step
            with torch.autocast("cpu", dtype, enabled=half):
                loss = model(**batches[0](rows)).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step.step == count:
                skipped += 1
                assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
            else:
                losses.append(loss.item())
                assert not any(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
            for layer in layers:
                assert torch.equal(layer.current_mask(), magnitude_mask(layer.weight, layer.pattern))
        return losses, skipped

    (found, skipped), (expected, none) = losses_of(torch.float16), losses_of(torch.float32)
    assert (skipped > 0, none) == (True, 0)
    assert found == pytest.approx(expected, abs=0.003)  # fp16 keeps 11 bits: 2^-11 of a loss of 6


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
