"""FSDP2 on two processes: weights, flips and the packed file are those of one process."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import MarianMTModel

from hf_nmsparse import NMSparseConfig, SparseStep, SparseTrainer, finalize, save_packed, sparsify
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.losses import token_loss
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.schedule import Schedule
from hf_nmsparse.sharding import is_sharded, local
from tests.fsdp2_on_cpu import take_for_gpus
from tests.processes import in_two
from tests.test_trainer import arguments, losses
from tests.tiny import collator, marian, token_pairs

STEPS = 20


def train(rank: int | None, method: str, folder: Path) -> dict[str, Any]:
    """20 steps on two halves of each batch: of both, or with a rank, of its own under FSDP2."""
    model = marian()
    sparsify(model, NMSparseConfig("2:4", soft=method == "s-ste"))
    if rank is not None:
        for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
            fully_shard(layer)
        fully_shard(model)
    # The bias of a key has no gradient but rounding errors, which Adam would blow up without this epsilon.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-5, weight_decay=0.0)
    ramp = Schedule(ramp=0.5) if method == "sr-ste" else None
    step = SparseStep(model, optimizer, method, schedule=ramp, steps=STEPS)
    pairs, pad = token_pairs(STEPS * 8), collator(model)
    flips = []
    for index in range(STEPS):
        rows = [pairs[8 * index + row] for row in range(8)]
        for half in range(2) if rank is None else [rank]:
            batch = pad(rows[4 * half : 4 * half + 4])
            loss = token_loss(model(**batch), batch["labels"])
            (loss / 2 if rank is None else loss).backward()  # FSDP2 takes the mean over processes
        optimizer.step()
        optimizer.zero_grad()
        flips.append({name: count.sad for name, count in step.take_flips().items()})
    states = {name: [state.kept, state.pruned] for name, state in step.layer_states().items()}
    finalize(model)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not rank:
        save_packed(model, folder, values="fp32", state_dict=weights or dict(model.state_dict()))
    return {"weights": weights, "flips": flips, "states": states}


def trainer_of(folder: Path, resume: str | None = None, **settings: Any) -> SparseTrainer:
    """20 steps of SR-STE through Trainer, four pairs a batch, with a checkpoint at the end."""
    model = marian(dropout=0.1 if settings.pop("dropout", False) else 0.0)
    sparsify(model, NMSparseConfig("2:4"))
    common: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,  # as above
        "sparse_decay": 2e-4,
        "save_strategy": "steps",
        "save_steps": STEPS,
    }
    args = arguments(folder, **{**common, **settings})
    trainer = SparseTrainer(model=model, args=args, train_dataset=token_pairs(STEPS * 8), data_collator=collator(model))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def overflow_on_one_process(rank: int) -> None:
    """Where a loss scaler finds infinity in the rows of one process, all of them skip the step."""
    for fused in (False, True):
        layer = nn.Linear(8, 4)
        sparsify(layer, NMSparseConfig("2:4"))
        fully_shard(layer)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
        step = SparseStep(layer, optimizer, "sr-ste")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for infinite in (False, True, False):
            before, count = local(layer.weight).detach().clone(), step.step
            scaler.scale(layer(torch.ones(2, 8)).square().mean()).backward()
            assert layer.weight.grad is not None
            if infinite and rank == 1:
                local(layer.weight.grad)[0, 0] = math.inf
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(local(layer.weight), before) == infinite
            assert step.step == count + (not infinite)


def padding_on_the_last_process(rank: int) -> None:
    """The zero row of the padding, which one process alone holds, stays zero and counts in no norm."""
    embed, head = nn.Embedding(7, 8, padding_idx=6), nn.Linear(8, 7, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, nn.Linear(8, 8), head)
    sparsify(model, NMSparseConfig("2:4"))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    SparseStep(model, optimizer, "sr-ste")
    for _ in range(3):
        model(torch.arange(6)).logsumexp(dim=-1).sum().backward()
        gradient: Any = embed.weight.grad
        rows = gradient.full_tensor()
        assert rows[:6].any(dim=1).all()
        assert not rows[6].any()
        optimizer.step()
        optimizer.zero_grad()
    whole: Any = embed.weight
    assert not whole.full_tensor()[6].any()
    assert len(local(embed.weight)) == (4 if rank == 0 else 3)


def through_accelerate(rank: int, folder: Path) -> None:
    """What the test below looks at, and what can be looked at here."""
    overflow_on_one_process(rank)
    padding_on_the_last_process(rank)
    take_for_gpus()
    settings = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "MarianEncoderLayer,MarianDecoderLayer",
    }
    os.environ.update(settings)
    trainer = trainer_of(folder)
    model: Any = trainer.model
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 5  # four layers and the rest
    layers = [module for module in model.modules() if isinstance(module, NMLinear)]
    assert len(layers) == 32
    assert all(is_sharded(layer.weight) and layer.weight.dtype == torch.float32 for layer in layers)
    masters = trainer.gathered()
    assert masters is not None
    if rank == 0:
        torch.save({"masters": masters, "losses": losses(trainer)}, folder / "found.pt")
        save_packed(model, folder / "packed", values="fp32", state_dict=masters)
    else:
        assert masters == {}

    # A run that goes on from its middle, with dropout, ends with the same bits.
    ends = []
    for resume in (None, str(folder / "dropout" / "checkpoint-3")):
        trainer = trainer_of(folder / "dropout", resume, dropout=True, max_steps=6, save_steps=3)
        ends.append(trainer.gathered())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0] or ())  # type: ignore[index]

    # accelerate's default with bf16 is weights gathered in bf16, which NMLinear refuses.
    trainer_of(folder / "bf16", bf16=True, max_steps=2)
    for variable, value, message in (
        ("FSDP_VERSION", "1", "fsdp: version 1 cuts weights through their groups; set fsdp_version: 2"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "under their stock names; set fsdp_state_dict_type: FULL"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "with buffers; set fsdp_cpu_ram_efficient_loading: false"),
    ):
        os.environ[variable] = value
        with pytest.raises(ValueError, match=message):
            trainer_of(folder / "refused")
        os.environ[variable] = settings.get(variable, "false")
    with pytest.raises(ValueError, match="keep masks, which sharded weights do not; train under DDP"):
        trainer_of(folder / "refused", sparse_interval=2)


def of_two(method: str, folder: Path) -> None:
    """What each of two processes does."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    if method == "accelerate":
        through_accelerate(rank, folder)
    else:
        found = train(rank, method, folder / "packed")
        if rank == 0:
            torch.save(found.pop("weights"), folder / "weights.pt")
            (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()


def in_two_processes(method: str, folder: Path) -> None:
    for done in in_two(of_two, method, folder):
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(sys.platform == "win32", reason="FSDP2 runs on gloo under Unix")
def test_what_accelerate_shards_is_one_model(tmp_path: Path) -> None:
    in_two_processes("accelerate", tmp_path)
    one = trainer_of(tmp_path / "one", gradient_accumulation_steps=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert losses(one) == pytest.approx(found["losses"], abs=1e-5)
    model: Any = one.model
    expected = dict(model.state_dict())
    assert found["masters"].keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found["masters"][name], weight, rtol=0, atol=1e-6)
    saved = load_file(tmp_path / "checkpoint-20" / "model.safetensors")
    assert saved.keys() == load_file(tmp_path / "one" / "checkpoint-20" / "model.safetensors").keys()
    assert all(torch.equal(weight, found["masters"][name]) for name, weight in saved.items())
    assert len(check_folder(tmp_path / "packed").layers) == 32
    config = json.loads((tmp_path / "checkpoint-20" / "config.json").read_text())
    assert config["architectures"] == ["MarianMTModel"]


@pytest.mark.skipif(sys.platform == "win32", reason="FSDP2 runs on gloo under Unix")
@pytest.mark.parametrize("method", ["sr-ste", "masked-decay"])
def test_two_shards_are_one_model(method: str, tmp_path: Path) -> None:
    in_two_processes(method, tmp_path)
    expected = train(None, method, tmp_path / "one")
    found = json.loads((tmp_path / "found.json").read_text())
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
    assert found["flips"] == expected["flips"]
    assert sum(sum(counts.values()) for counts in expected["flips"]) > 100
    assert found["states"].keys() == expected["states"].keys()
    for name, state in expected["states"].items():
        assert found["states"][name] == pytest.approx(state, abs=1e-6)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("packed", "one")]
    assert sizes[0] == sizes[1]
    reloaded = MarianMTModel.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    again = MarianMTModel.from_pretrained(tmp_path / "one", dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7, 1]])
    logits = [model(input_ids=tokens, decoder_input_ids=tokens).logits for model in (reloaded, again)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded_layer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    layer = nn.Linear(8, 4)
    sparsify(layer, NMSparseConfig("2:4"))
    fully_shard(layer)
    return layer, torch.optim.SGD(layer.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("asp", {}), ("random", {}), ("sr-ste", {"schedule": Schedule(interval=2)}), ("ste", {"track_groups": True})],
)
def test_what_keeps_masks_is_refused(one_process: None, method: str, settings: dict[str, Any]) -> None:
    layer, optimizer = sharded_layer()
    with pytest.raises(ValueError, match="keep masks, which sharded weights do not; train under DDP"):
        SparseStep(layer, optimizer, method, **settings)


def test_weights_that_are_sharded_after_the_optimizer_was_made_are_noticed(one_process: None) -> None:
    """As accelerate does it."""
    layer = nn.Linear(8, 4)
    sparsify(layer, NMSparseConfig("2:4"))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    step, keeps = (SparseStep(layer, optimizer, "ste", schedule=Schedule(interval=number)) for number in (1, 2))
    fully_shard(layer)
    step.start(0, 10)
    assert layer.master_dtype == torch.float32
    with pytest.raises(ValueError, match=r"'ste', interval 2 and .* keep masks, which sharded weights do not"):
        keeps.start(0, 10)


def test_a_copy_in_sixteen_bits_is_not_ranked(one_process: None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    layer = nn.Linear(8, 4)
    sparsify(layer, NMSparseConfig("2:4"))
    fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    SparseStep(layer, torch.optim.SGD(layer.parameters(), lr=0.1), "sr-ste")
    with pytest.raises(ValueError, match=r"ranked on the master in torch.float32, got a copy in torch.bfloat16; give"):
        layer(torch.ones(8))
