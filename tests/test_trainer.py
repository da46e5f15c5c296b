"""SparseTrainer: the loss, the decay and the masks mean the same however a step is divided."""

from __future__ import annotations

import copy
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BatchEncoding,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianMTModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.losses import token_loss
from hf_nmsparse.masks import magnitude_mask
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.run_logs import layer_rows
from hf_nmsparse.saving import export_dense, save_packed
from hf_nmsparse.sparse_model import sparsify
from hf_nmsparse.srste import METHODS
from hf_nmsparse.trainer import (
    Preempted,
    SparseTrainer,
    SparseTrainingArguments,
    decoder_inputs,
    last_whole_checkpoint,
    pair_lengths,
)
from tests.tiny import bart, collator, hf, kept, marian, t5, token_pairs, tokenizer


def arguments(folder: Path, **settings: Any) -> SparseTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "sparse_decay": 0.1,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return SparseTrainingArguments(**{**defaults, **settings})


def train(
    folder: Path,
    resume: bool = False,
    model: Any = None,
    pairs: int = 32,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> SparseTrainer:
    args = arguments(folder, **settings)
    if model is None:
        model = marian()
        if args.sparse_method != "dense":
            sparsify(model, NMSparseConfig("2:4"))
    trainer = SparseTrainer(
        model=model, args=args, train_dataset=token_pairs(pairs), data_collator=collator(model), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def weights(trainer: SparseTrainer) -> dict[str, torch.Tensor]:
    assert trainer.model is not None
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def losses(trainer: SparseTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# The same eight pairs a step, cut differently, differ by the order of fp32 sums alone: a few times 1e-7 in weights of
# size 0.1 after four steps. A loss not normalised over the step would be off by the accumulation steps, here 4x.
SAME = 2e-6


@pytest.mark.parametrize("method", ["sr-ste", "sr-ste-decoupled", "ste", "dense"])
def test_accumulation_changes_nothing(tmp_path: Path, method: str) -> None:
    settings: dict[str, Any] = {"sparse_method": method, "sparse_decay": None}
    whole = train(tmp_path, per_device_train_batch_size=8, **settings)
    parts = train(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert largest_difference(weights(whole), weights(parts)) < SAME
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-5)


def test_the_whole_step_is_a_mean_over_its_target_tokens(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    batch = collator(model)([token_pairs(32)[index] for index in range(8)])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).logits
    per_token = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    expected = per_token.sum() / (batch["labels"] != -100).sum()
    assert losses(trainer) == pytest.approx([expected.item()], abs=1e-5)


def test_one_step_by_hand(tmp_path: Path) -> None:
    """W1 = W0 - lr * (clip(g) + decay * (1 - mask) * W0), with the clip not seeing the decay."""
    trainer = train(tmp_path, max_steps=1, max_grad_norm=0.1, sparse_decay=0.5)
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    batch = collator(model)([token_pairs(32)[index] for index in range(8)])
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 0.1
    after = weights(trainer)
    for name, module in model.named_modules():
        if isinstance(module, NMLinear):
            weight = module.weight.detach()
            pruned = ~kept(weight, module.pattern)
            assert module.weight.grad is not None
            expected = weight - 0.05 * (module.weight.grad + 0.5 * pruned * weight)
            # fp32 rounding of weights below 0.1
            assert float((after[f"{name}.weight"] - expected).abs().max()) < 1e-7


def test_decay_does_not_depend_on_clipping(tmp_path: Path) -> None:
    """What decay adds to the first step is the same under a tight clip and under none."""
    moved = []
    for clip in (0.01, 1e6):
        with_decay = weights(train(tmp_path, max_steps=1, max_grad_norm=clip, sparse_decay=1.0))
        without = weights(train(tmp_path, max_steps=1, max_grad_norm=clip, sparse_method="ste", sparse_decay=None))
        moved.append({name: with_decay[name] - without[name] for name in with_decay})
    assert largest_difference(*moved) < 1e-7
    assert max(float(change.abs().max()) for change in moved[0].values()) > 1e-4


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_masks_follow_the_weights(tmp_path: Path, optim: str) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for layer in model.modules():
                if isinstance(layer, NMLinear):
                    assert layer.mask is not None
                    seen.append(torch.equal(layer.mask, magnitude_mask(layer.weight, layer.pattern)))

    train(tmp_path, optim=optim, learning_rate=0.01, max_steps=6, callbacks=[Look()])
    assert len(seen) == 6 * 32
    assert all(seen)


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_flips_are_logged_in_total_and_by_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], disable_tqdm: bool
) -> None:
    settings: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 0.01, "logging_steps": 2}
    trainer = train(tmp_path, disable_tqdm=disable_tqdm, **settings)
    shown = capsys.readouterr()
    assert "'flip_rate'" in shown.out + shown.err
    assert "flip_rate/" not in shown.out + shown.err
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert trainer.model is not None
    total = sum(layer.weight.numel() for layer in trainer.model.modules() if isinstance(layer, NMLinear))
    for entry in logged:
        layers = {key: value for key, value in entry.items() if key.startswith("sad/")}
        assert len(layers) == 32
        assert entry["sad"] == pytest.approx(sum(layers.values()))
        assert 0 < entry["flip_rate"] < 1
        assert entry["flip_rate"] == pytest.approx(entry["sad"] / total)
        assert entry["train_seconds"] > 0


def test_flips_counted_over_two_steps_by_hand(tmp_path: Path) -> None:
    masks = []
    for steps in (0, 1, 2):
        model = marian()
        sparsify(model, NMSparseConfig("2:4"))
        if steps:
            train(tmp_path, model=model, optim="adamw_torch", learning_rate=0.01, max_steps=steps)
        layer = model.model.encoder.layers[0].fc1
        masks.append(kept(layer.weight, layer.pattern))
    flips = int((masks[0] != masks[1]).sum()) + int((masks[1] != masks[2]).sum())
    trainer = train(tmp_path, optim="adamw_torch", learning_rate=0.01, max_steps=2, logging_steps=2)
    assert trainer.state.log_history[0]["sad/model.encoder.layers.0.fc1"] == flips / 2


def test_tensorboard_gets_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, report_to="tensorboard", max_steps=2)
    [folder] = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    assert {"train/sad", "train/flip_rate", "train/flip_rate/model.decoder.layers.1.fc2"} <= set(
        events.Tags()["scalars"]
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens_per_batch": 80},
        {"train_sampling_strategy": "random"},
        {"sparse_interval": 4, "sparse_ramp": 0.5, "sparse_dense_head": 0.3, "sparse_log_groups": True},
        {"sparse_method": "decaying-mask", "sparse_decay": None},
        {"sparse_method": "masked-decay"},
        {"sparse_method": "s-ste", "sparse_decay": None},
        {"sparse_method": "random", "sparse_decay": None},
        {"distill_from": "teacher"},
    ],
)
def test_resume_is_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    common = {
        "optim": "adamw_torch_fused",
        "learning_rate": 0.01,
        "max_steps": 12,  # more than an epoch
        "save_strategy": "steps",
        "save_steps": 5,
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": 3,
        **settings,
    }

    def model() -> Any:
        with_dropout = marian(dropout=0.1)
        sparsify(with_dropout, NMSparseConfig("2:4", soft=settings.get("sparse_method") == "s-ste"))
        return with_dropout

    if "distill_from" in settings:
        marian(seed=1).save_pretrained(tmp_path / "teacher")
        common["distill_from"] = str(tmp_path / "teacher")

    through = train(tmp_path / "through", model=model(), **common)
    first = train(tmp_path / "stopped", model=model(), **common)
    last = first.state.global_step
    for step in range(6, last + 1):  # what a kill after the checkpoint of step 5 leaves
        folder = tmp_path / "stopped" / f"checkpoint-{step}"
        if folder.is_dir():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    resumed = train(tmp_path / "stopped", resume=True, model=model(), **common)
    assert largest_difference(weights(through), weights(resumed)) == 0
    logs = [{k: v for k, v in e.items() if k != "train_seconds"} for e in through.state.log_history if "loss" in e]
    again = [{k: v for k, v in e.items() if k != "train_seconds"} for e in resumed.state.log_history if "loss" in e]
    assert logs == again
    seconds = [entry["train_seconds"] for entry in resumed.state.log_history if "loss" in entry]
    assert seconds == sorted(seconds)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    common: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 5}

    def model() -> Any:
        with_dropout = marian(dropout=0.1)
        sparsify(with_dropout, NMSparseConfig("2:4"))
        return with_dropout

    through = train(tmp_path / "through", model=model(), **common)
    handler = signal.getsignal(signal.SIGTERM)

    class Terminated(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:  # in the third step
                os.kill(os.getpid(), signal.SIGTERM)

    stopped = tmp_path / "stopped"
    with pytest.raises(Preempted, match=r"stopped by SIGTERM, saved at step 3; the same command goes on") as raised:
        train(stopped, model=model(), callbacks=[Terminated()], **common)
    assert raised.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert last_whole_checkpoint(stopped) == str(stopped / "checkpoint-3")
    resumed = train(stopped, resume=True, model=model(), **common)
    assert resumed.state.global_step == 6
    assert largest_difference(weights(through), weights(resumed)) == 0


def test_sigterm_in_the_last_step_ends_nothing(tmp_path: Path) -> None:
    class Terminated(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    assert train(tmp_path, max_steps=2, callbacks=[Terminated()]).state.global_step == 2


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(tmp_path: Path) -> None:
    class Spoiled(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                model.final_logits_bias.fill_(math.nan)

    last = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match=rf"training: the loss of step 4 is nan; the last checkpoint is {last}; lower"):
        train(tmp_path, callbacks=[Spoiled()], save_strategy="steps", save_steps=2)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are a matter of Unix")
@pytest.mark.parametrize("bytes_left", [1_000, 60_000, 300_000])
def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(tmp_path: Path, bytes_left: int) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))

    try:
        with pytest.raises(
            ValueError, match=r"checkpoint-4 could not be written: .*; the last checkpoint is .*-2; free"
        ):
            train(
                tmp_path,
                callbacks=[Full()],
                optim="adamw_torch_fused",
                save_strategy="steps",
                save_steps=2,
                max_steps=4,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()


def test_a_failure_after_the_writing_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**kwargs: Any) -> None:
        raise OSError("an old checkpoint is busy")

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", fail)
    with pytest.raises(OSError, match="an old checkpoint is busy"):
        train(tmp_path, save_strategy="steps", save_steps=2)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="deepspeed: its engine steps inside of backward, where the rule of 'sr-ste'"):
        arguments(tmp_path, deepspeed="zero2.json")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"the gradients; train under DDP or FSDP2$"):
        arguments(tmp_path)


def test_transformers_own_way_with_sigterm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="enable_jit_checkpoint: SparseTrainer saves on SIGTERM by itself; leave it"):
        arguments(tmp_path, enable_jit_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_values": "int4"}, "sparse_values is one of 'fp32', 'fp16', 'bf16', 'int8', got 'int4'"),
        ({"sparse_method": "dense", "sparse_values": "bf16"}, "leave sparse_values and sparse_standalone out"),
        ({"sparse_method": "dense", "sparse_standalone": True}, "leave sparse_values and sparse_standalone out"),
    ],
)
def test_what_a_push_could_not_send_is_refused_before_the_training(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    if settings.get("sparse_method") == "dense":
        settings = {"sparse_decay": None, **settings}
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="holds no whole checkpoint to resume from"):
        train(tmp_path, resume=True)
    common: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    through = train(tmp_path, **common)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = train(tmp_path, resume=True, **common)
    assert largest_difference(weights(through), weights(resumed)) == 0
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    common: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 6, "pairs": 80}
    finished = train(tmp_path, **common)
    again = train(tmp_path, resume=True, **common)
    assert largest_difference(weights(finished), weights(again)) == 0
    assert again.state.global_step == 6
    assert losses(again) == losses(finished)


def test_checkpoints_hold_the_dense_masters(tmp_path: Path) -> None:
    trainer = train(tmp_path, save_strategy="steps", save_steps=4)
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert saved.keys() <= marian().state_dict().keys()
    weight = saved["model.encoder.layers.0.fc1.weight"]
    assert torch.equal(weight, weights(trainer)["model.encoder.layers.0.fc1.weight"])
    assert int((weight == 0).sum()) == 0
    config = json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "nmsparse", "format": "dense", "pattern": "2:4"}


def test_asp_keeps_its_masks(tmp_path: Path) -> None:
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    layer = model.model.decoder.layers[0].fc2
    mask = kept(layer.weight, layer.pattern)
    trainer = train(
        tmp_path, model=model, sparse_method="asp", sparse_decay=None, optim="adamw_torch", weight_decay=0.1
    )
    assert torch.equal(layer.weight != 0, mask)
    assert trainer.state.log_history[0]["sad"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_packs(tmp_path: Path, method: str) -> None:
    model = marian()
    sparsify(model, NMSparseConfig("2:4", soft=METHODS[method].soft))
    settings: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 0.01, "sparse_decay": None}
    trainer = train(tmp_path, model=model, sparse_method=method, max_steps=12, pairs=8, **settings)
    assert losses(trainer)[-1] < losses(trainer)[0]
    pairs = collator(model)(list(token_pairs(4)))
    with torch.no_grad():
        expected = model.eval()(**pairs).logits
        save_packed(model, tmp_path / "packed", values="fp32")
        loaded = MarianMTModel.from_pretrained(
            tmp_path / "packed", quantization_config=NMSparseQuantizationConfig("dense")
        )
        assert torch.equal(loaded(**pairs).logits, expected)
    assert trainer.sparse_step is not None
    assert trainer.sparse_step.step == trainer.sparse_step.steps == 12


def test_a_soft_checkpoint_is_soft_again(tmp_path: Path) -> None:
    model = marian()
    sparsify(model, NMSparseConfig("2:4", soft=True))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["soft"] is True
    loaded = MarianMTModel.from_pretrained(tmp_path)
    pairs = collator(model)(list(token_pairs(4)))
    with torch.no_grad():
        assert torch.equal(loaded(**pairs).logits, model.eval()(**pairs).logits)
    save_packed(loaded, tmp_path / "packed", values="fp32")
    packed = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert "soft" not in packed["quantization_config"]


def test_a_dense_tail_is_not_packed(tmp_path: Path) -> None:
    trainer = train(tmp_path, sparse_dense_tail=0.25)
    assert isinstance(trainer.model, MarianMTModel)
    with pytest.raises(ValueError, match="computes with its pruned weights times 1, so it is not 2:4 sparse"):
        save_packed(trainer.model, tmp_path / "packed")


def test_the_teacher_s_share_by_hand(tmp_path: Path) -> None:
    """One step's loss is 0.75 of the cross-entropy and 0.25 of the divergence, softened by 2, a token."""
    teacher = marian(seed=1, init_std=0.5)
    teacher.save_pretrained(tmp_path / "teacher")
    settings: dict[str, Any] = {
        "distill_from": str(tmp_path / "teacher"),
        "distill_weight": 0.25,
        "distill_temperature": 2.0,
    }
    trainer = train(tmp_path, max_steps=1, **settings)
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    batch = collator(model)([token_pairs(32)[index] for index in range(8)])
    with torch.no_grad():
        logits, taught = (each(**batch).logits.flatten(0, 1) for each in (model, teacher.eval()))
        real = batch["labels"].flatten() != -100
        reference = F.cross_entropy(logits, batch["labels"].flatten())
        student, target = (F.softmax(each[real] / 2, dim=-1) for each in (logits, taught))
        divergence = 4 * (target * (target.log() - student.log())).sum() / real.sum()
    assert losses(trainer) == pytest.approx([float(0.75 * reference + 0.25 * divergence)], abs=1e-5)
    # What is evaluated is the model, not how it was taught.
    score = trainer.evaluate(token_pairs(8))["eval_loss"]
    trainer.teacher = None
    assert trainer.evaluate(token_pairs(8))["eval_loss"] == score


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    marian(vocab_size=301).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has a vocabulary of 301, the model one of 300; they must share one"):
        train(tmp_path, distill_from=str(tmp_path))


@pytest.mark.parametrize("lost", ["model.decoder.layers.1.", "model.encoder.layers.0.fc1.bias"])
def test_what_a_checkpoint_or_a_teacher_lacks_is_refused(tmp_path: Path, lost: str) -> None:
    train(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    checkpoint = tmp_path / "checkpoint-1"
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(lost)}
    save_file(kept, checkpoint / "model.safetensors", {"format": "pt"})
    shutil.rmtree(tmp_path / "checkpoint-2")
    message = rf"{lost}\S* (and \d+ more tensors are|is) missing; save the whole model"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, resume=True, max_steps=2)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "taught", distill_from=str(checkpoint))


def test_layers_are_logged_whole(tmp_path: Path) -> None:
    trainer = train(tmp_path, sparse_log_groups=True, max_steps=2)
    rows = [row for row in layer_rows(trainer.state.log_history) if row["step"] == 2]
    assert len(rows) == 32
    assert all(row["kept"] > row["pruned"] > 0 and 0 <= row["changed"] <= 1 for row in rows)
    assert trainer.model is not None
    layer = trainer.model.get_submodule(rows[0]["layer"])
    assert isinstance(layer, NMLinear)
    mask = kept(layer.weight, layer.pattern)
    assert rows[0]["kept"] == pytest.approx(layer.weight[mask].abs().mean().item())
    assert rows[0]["pruned"] == pytest.approx(layer.weight[~mask].abs().mean().item())


def train_for_the_best(folder: Path, worse_after: int, **settings: Any) -> tuple[SparseTrainer, list[float]]:
    """Four steps with a checkpoint and an evaluation after each, and all evaluations."""
    model = marian(init_std=0.2)
    sparsify(model, NMSparseConfig("2:4"))
    common = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    pairs = token_pairs(8)
    trainer = SparseTrainer(
        model=model,
        args=arguments(folder, load_best_model_at_end=True, **common, **settings),
        train_dataset=pairs,
        eval_dataset=pairs,
        data_collator=collator(model),
    )

    class Worse(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > worse_after:
                with torch.no_grad():
                    model.model.shared.weight.mul_(4.0)

    trainer.add_callback(Worse())
    trainer.train()
    return trainer, [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_a_model_whose_weights_still_fade_is_not_the_best(tmp_path: Path) -> None:
    """It may score better than all that are sparse, and would be cut down to its mask after that."""
    fading: dict[str, Any] = {"sparse_method": "decaying-mask", "sparse_decay": None, "sparse_fade": 0.75}
    trainer, scores = train_for_the_best(tmp_path, 0, **fading)
    assert min(scores) < scores[2]
    assert trainer.state.best_global_step == 3
    assert trainer.state.best_metric == scores[2]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(scores[2])


def test_the_best_model_has_the_masks_that_it_was_scored_with(tmp_path: Path) -> None:
    """Masks of an interval are not those that the weights have by now."""
    settings: dict[str, Any] = {"sparse_interval": 4, "optim": "adamw_torch", "learning_rate": 0.03}
    trainer, scores = train_for_the_best(tmp_path, 3, **settings)
    assert trainer.state.best_global_step == 3
    assert trainer.evaluate()["eval_loss"] == scores[2]
    assert isinstance(trainer.model, MarianMTModel)
    layers = [layer for layer in trainer.model.modules() if isinstance(layer, NMLinear)]
    assert any(not torch.equal(layer.current_mask(), magnitude_mask(layer.weight, layer.pattern)) for layer in layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"push_to_hub": True},
            "^push_to_hub: sparse_dense_tail ends with a model that is dense, which cannot be packed",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "^load_best_model_at_end: sparse_dense_tail ends with a model that is dense, which is that of the last",
        ),
    ],
)
def test_a_dense_tail_and_what_needs_a_sparse_end_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, sparse_dense_tail=0.25, **settings)


def test_training_twice_adds_the_decay_once(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=1)
    first = trainer.sparse_step
    trainer.train()
    assert trainer.sparse_step is first
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    for _ in range(2):
        train(tmp_path, model=model, max_steps=1)
    assert trainer.model is not None
    assert largest_difference(weights(trainer), dict(model.state_dict())) == 0


@pytest.mark.parametrize("method", list(METHODS))
def test_masks_follow_the_weights_in_whatever_trains_on(tmp_path: Path, method: str) -> None:
    """A loop after the training, with an optimizer of its own, goes on as that of a model that is loaded."""
    model = marian()
    sparsify(model, NMSparseConfig("2:4", soft=METHODS[method].soft))
    train(tmp_path, model=model, max_steps=2, sparse_method=method, sparse_decay=None, optim="adamw_torch")
    fresh = marian(seed=1)
    sparsify(fresh, NMSparseConfig("2:4", soft=METHODS[method].soft), trained=True)
    fresh.load_state_dict(model.state_dict())
    batch = collator(model)(list(token_pairs(8)))
    found = []
    for each in (model, fresh):
        each.eval()
        before = each(**batch).logits
        layers = [layer for layer in each.modules() if isinstance(layer, NMLinear)]
        optimizer = torch.optim.SGD([layer.weight for layer in layers], lr=1.0)
        if not METHODS[method].fixed_mask:  # there the mask is the method
            each(**batch).loss.backward()
            optimizer.step()
        found.append((before, each(**batch).logits))
    assert all(torch.equal(ours, loaded) for ours, loaded in zip(*found, strict=True))


@pytest.mark.parametrize("interval", [1, 3])
def test_a_second_training_is_that_of_masks_that_were_kept(
    tmp_path: Path, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
        trainer = train(tmp_path, max_steps=4, sparse_interval=interval, optim="adamw_torch", learning_rate=0.01)
        first = list(trainer.state.log_history)
        trainer.train()
        logs = [*first, *trainer.state.log_history]
        shown = ("loss", "sad", "flip_rate")
        return weights(trainer), [{key: log[key] for key in shown if key in log} for log in logs]

    released = twice()
    monkeypatch.setattr(SparseStep, "release_masks", lambda step: None)
    kept_on = twice()
    assert largest_difference(released[0], kept_on[0]) == 0
    assert released[1] == kept_on[1]


PAD_LAST: dict[str, Any] = {"pad_token_id": 299, "eos_token_id": 1, "decoder_start_token_id": 299}


@pytest.mark.parametrize("method", ["dense", "sr-ste"])
def test_the_padding_row_of_a_marian_model_stays_zero(tmp_path: Path, method: str) -> None:
    """30 steps with weight decay, a tight clip and accumulation, against a loop that drops the row's gradient."""
    pad, decay, steps = 299, 0.1, 30
    model, by_hand = marian(**PAD_LAST), marian(**PAD_LAST)
    assert not model.model.shared.weight[pad].any()
    assert model.lm_head.weight is model.model.shared.weight
    if method != "dense":
        sparsify(model, NMSparseConfig("2:4"))
        sparsify(by_hand, NMSparseConfig("2:4"))
    settings: dict[str, Any] = {
        "sparse_method": method,
        "sparse_decay": None if method == "dense" else decay,
        "optim": "adamw_torch_fused",
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    trainer = train(tmp_path, model=model, max_steps=steps, pairs=8 * steps, **settings)

    decayed = trainer.get_decay_parameter_names(by_hand)
    named = dict(by_hand.named_parameters())
    groups = [
        {"params": [named[name] for name in named if name in decayed], "weight_decay": 0.1},
        {"params": [named[name] for name in named if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), fused=True)
    pairs, norms = token_pairs(8 * steps), []
    for step in range(steps):
        rows = [pairs[8 * step + row] for row in range(8)]
        tokens = sum(len(row["labels"]) for row in rows)
        for half in (rows[:4], rows[4:]):
            batch = collator(by_hand)(half)
            labels = batch.pop("labels")
            batch["decoder_input_ids"] = by_hand.prepare_decoder_input_ids_from_labels(labels)
            token_loss(by_hand(**batch), labels, tokens).backward()
        assert by_hand.model.shared.weight.grad is not None
        assert by_hand.model.shared.weight.grad[pad].any()
        by_hand.model.shared.weight.grad[pad] = 0
        norms.append(float(torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)))
        for layer in by_hand.modules():
            if isinstance(layer, NMLinear):
                assert layer.weight.grad is not None
                pruned = ~kept(layer.weight, layer.pattern)
                layer.weight.grad += decay * pruned * layer.weight.detach()
        optimizer.step()
        optimizer.zero_grad()
    assert [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(norms)
    assert not model.model.shared.weight[pad].any()
    # Sums of fp32 numbers, at most in another order.
    assert largest_difference(weights(trainer), dict(by_hand.state_dict())) < SAME


def test_a_padding_row_that_is_not_zero_trains_as_ever(tmp_path: Path) -> None:
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    with torch.no_grad():
        model.model.shared.weight[0] = 0.01
    train(tmp_path, model=model, max_steps=1)
    assert (model.model.shared.weight[0] != 0.01).all()


@pytest.mark.skipif(find_spec("ctranslate2") is None, reason="ctranslate2 is not installed")
def test_ctranslate2_translates_a_trained_model_as_it_does(tmp_path: Path) -> None:
    """Its decoder starts from zeros, where ours starts from the embedding of the padding."""
    from tests.test_ctranslate2 import NAMES, PAD, SCRIPT

    special = {"pad_token_id": PAD, "eos_token_id": 0, "decoder_start_token_id": PAD}
    model: Any = marian(init_std=0.4, vocab_size=PAD + 1, scale_embedding=True, **special)
    sparsify(model, NMSparseConfig("2:4"))
    train(tmp_path / "run", model=model, max_steps=60, learning_rate=3e-3, optim="adamw_torch", sparse_decay=None)
    model.generation_config = GenerationConfig(
        max_length=12, decoder_start_token_id=PAD, eos_token_id=0, pad_token_id=PAD, bad_words_ids=[[PAD]]
    )
    export_dense(model, tmp_path / "dense")
    vocabulary = {name: place for place, name in enumerate(NAMES)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    ).save_pretrained(tmp_path / "dense")
    sources = torch.cat([torch.randint(2, PAD, (50, 6)), torch.zeros(50, 1, dtype=torch.long)], dim=1)
    model.eval()
    translations = [
        [NAMES[token] for token in row if token not in (0, PAD)] for row in model.generate(input_ids=sources).tolist()
    ]
    words = [[[NAMES[token] for token in row] for row in sources.tolist()]] * 2
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), "11"],
        input=json.dumps(words),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])[0] == translations
    assert len({tuple(words) for words in translations}) > 10


def test_eval_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    model = marian()
    pairs = token_pairs(8)
    args = arguments(tmp_path, sparse_method="dense", sparse_decay=None, label_smoothing_factor=0.1)
    trainer = SparseTrainer(model=model, args=args, eval_dataset=pairs, data_collator=collator(model))
    batch = collator(model)([pairs[index] for index in range(8)])
    with torch.no_grad():
        outputs = model(**batch)
    expected = F.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_lengths_come_from_their_columns_or_the_tokens() -> None:
    rows = [{"input_ids": [5, 1], "labels": [6, 7, 1], "source_length": 2, "target_length": 3}] * 2
    with_lengths = Dataset.from_list(rows)
    tokens_alone = with_lengths.remove_columns(["source_length", "target_length"])
    for dataset in (with_lengths, with_lengths.select([1, 0]), tokens_alone, rows):
        assert [list(side) for side in pair_lengths(dataset)] == [[2, 2], [3, 3]]
    with pytest.raises(ValueError, match=r"needs the columns input_ids and labels, lists of tokens, got \['labels'\]"):
        pair_lengths(tokens_alone.remove_columns(["input_ids"]))


class Rows(torch.utils.data.Dataset[Any]):
    """A dataset of torch by number, which knows no end of an iteration."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number % len(self.rows)]


class Stream(torch.utils.data.IterableDataset[Any]):
    """A dataset of torch that is read through, and nevertheless may know its length."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


class Sized(Stream):
    def __len__(self) -> int:
        return len(self.rows)


def lazily(pairs: Dataset) -> Dataset:
    """As people tokenize while they train: the columns are others than those of the rows."""
    numbers = Dataset.from_dict({"number": list(range(len(pairs)))})
    return numbers.with_transform(lambda rows: pairs[rows["number"]])


DATASETS: dict[str, Any] = {
    "a list": list,
    "a tuple": lambda pairs: tuple(pairs),
    "torch by number": lambda pairs: Rows(list(pairs)),
    "torch through": lambda pairs: Stream(list(pairs)),
    "torch through with a length": lambda pairs: Sized(list(pairs)),
    "a subset": lambda pairs: torch.utils.data.Subset(Rows(list(pairs)), range(len(pairs))),
    "datasets": lambda pairs: pairs,
    "datasets as numpy": lambda pairs: pairs.with_format("numpy"),
    "datasets as tensors": lambda pairs: pairs.with_format("torch"),
    "datasets as a stream": lambda pairs: pairs.to_iterable_dataset(),
    "datasets by a transform": lazily,
    "batch encodings": lambda pairs: [BatchEncoding(pair) for pair in pairs],
}


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays")  # in transformers' collator
@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("kind", DATASETS)
def test_every_kind_of_dataset_trains_by_tokens(tmp_path: Path, kind: str, remove: bool) -> None:
    pairs = token_pairs(32)
    # Columns that no model takes: numbers, which a collator can pad, unless they are to be removed.
    extra = pairs.add_column("source_length", [len(row["input_ids"]) for row in pairs])
    extra = extra.add_column("text", ["words"] * 32) if remove else pairs
    if kind == "datasets by a transform":
        extra, remove = pairs, False  # Trainer would remove what the transform reads
    elif kind == "batch encodings":
        extra = pairs  # of which Trainer removes no columns
    found = two_steps_by_tokens(tmp_path, DATASETS[kind](extra), remove)
    streamed = kind in ("torch through", "torch through with a length", "datasets as a stream")
    assert largest_difference(found, of_stock_dataset(streamed)) == 0


def two_steps_by_tokens(folder: Path, dataset: Any, remove: bool) -> dict[str, torch.Tensor]:
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    args = arguments(folder, tokens_per_batch=100, remove_unused_columns=remove, max_steps=2)
    trainer = SparseTrainer(model=model, args=args, train_dataset=dataset, data_collator=collator(model))
    trainer.train()
    return weights(trainer)


@cache
def of_stock_dataset(streamed: bool) -> dict[str, torch.Tensor]:
    with TemporaryDirectory() as folder:
        pairs = token_pairs(32)
        return two_steps_by_tokens(Path(folder), pairs.to_iterable_dataset() if streamed else pairs, True)


def test_rows_without_tokens_are_told(tmp_path: Path) -> None:
    for rows in ([("a", "b")], [{"translation": {"de": "a", "en": "b"}}], Rows(["text"]), Stream([3])):
        model = marian()
        sparsify(model, NMSparseConfig("2:4"))
        args = arguments(tmp_path, tokens_per_batch=100)
        trainer = SparseTrainer(model=model, args=args, train_dataset=rows, data_collator=collator(model))
        with pytest.raises(
            ValueError, match="the dataset needs the columns input_ids and labels, lists of tokens, got"
        ):
            trainer.train()
    trainer.train_dataset = []
    with pytest.raises(ValueError, match="batches: no sentence pairs"):
        trainer.train()


def test_a_tokenizer_alone_pads_both_sides(tmp_path: Path) -> None:
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    trainer = SparseTrainer(
        model=model, args=arguments(tmp_path), train_dataset=token_pairs(32), processing_class=tokenizer()
    )
    trainer.train()
    assert largest_difference(weights(trainer), weights(train(tmp_path))) == 0


@pytest.mark.parametrize("kind", ["columns", "frame", "series", "splits"])
def test_what_has_no_rows_by_number_is_one_line(kind: str) -> None:
    pairs = token_pairs(4)
    dataset: Any = {
        "columns": pairs.to_dict(),
        "frame": pairs.to_pandas(),
        "series": pairs.to_pandas().apply(dict, axis=1).set_axis([0, 2, 4, 6]),
        "splits": DatasetDict({"train": pairs}),
    }[kind]
    with pytest.raises(ValueError, match=r"^tokens_per_batch: rows are read by their number, from 0, and this "):
        pair_lengths(dataset)


def test_a_list_resumes_exactly(tmp_path: Path) -> None:
    def run(folder: Path, steps: int, resume: bool = False) -> SparseTrainer:
        model = marian(dropout=0.1)
        sparsify(model, NMSparseConfig("2:4"))
        settings = {"tokens_per_batch": 100, "save_strategy": "steps", "save_steps": 5, "max_steps": steps}
        rows: Any = list(token_pairs(32))
        trainer = SparseTrainer(
            model=model, args=arguments(folder, **settings), train_dataset=rows, data_collator=collator(model)
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    through = run(tmp_path / "through", 12)
    run(tmp_path / "stopped", 5)
    resumed = run(tmp_path / "stopped", 12, resume=True)
    assert largest_difference(weights(through), weights(resumed)) == 0


def test_a_stream_trains_by_sentences(tmp_path: Path) -> None:
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    pairs = token_pairs(32)
    twin = train(tmp_path / "map", model=copy.deepcopy(model))
    args = arguments(tmp_path / "stream")
    trainer = SparseTrainer(
        model=model, args=args, train_dataset=pairs.to_iterable_dataset(), data_collator=collator(model)
    )
    trainer.train()
    assert largest_difference(weights(twin), weights(trainer)) == 0


def test_a_stream_trains_by_tokens_and_resumes_in_its_second_pass(tmp_path: Path) -> None:
    pairs = token_pairs(32).map(lambda row: {"source_length": len(row["input_ids"])})  # a column that no model takes

    def run(name: str, max_steps: int, resume: bool = False, **settings: Any) -> SparseTrainer:
        model = marian(dropout=0.1)
        sparsify(model, NMSparseConfig("2:4"))
        batches = {"tokens_per_batch": 100, "save_strategy": "steps", "save_steps": 10, "max_steps": max_steps}
        trainer = SparseTrainer(
            model=model,
            args=arguments(tmp_path / name, **batches, **settings),
            train_dataset=pairs.to_iterable_dataset().shuffle(seed=3, buffer_size=32),
            data_collator=collator(model),
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    through = run("through", 16)
    batches = list(itertools.islice(through.get_train_dataloader(), 10))
    assert 32 < sum(len(batch["labels"]) for batch in batches) < 64  # step 10 is in the second pass
    assert "source_length" not in batches[0]
    run("resumed", 10)
    resumed = run("resumed", 16, resume=True)
    assert largest_difference(weights(through), weights(resumed)) == 0
    with pytest.raises(ValueError, match="dataloader_num_workers: a stream with tokens_per_batch is read by one proc"):
        run("readers", 16, dataloader_num_workers=2)


def test_decoder_inputs_are_the_models_own() -> None:
    settings: dict[str, Any] = {
        "vocab_size": 30,
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
    }
    labels = torch.tensor([[5, 6, 2], [7, 2, -100]])
    expected = torch.tensor([[2, 5, 6], [2, 7, 2]])
    m2m = M2M100ForConditionalGeneration(M2M100Config(**settings))
    assert not hasattr(m2m, "prepare_decoder_input_ids_from_labels")
    for model in (m2m, BartForConditionalGeneration(BartConfig(**settings))):
        assert torch.equal(decoder_inputs(model, labels), expected)
        model.eval()
        with torch.no_grad():
            by_model = model(input_ids=labels.clamp(min=1), labels=labels).logits
            by_us = model(input_ids=labels.clamp(min=1), decoder_input_ids=decoder_inputs(model, labels)).logits
        assert torch.equal(by_model, by_us)


FAMILIES: dict[str, Callable[[], Any]] = {
    "marian": marian,
    "m2m_100": lambda: M2M100ForConditionalGeneration(hf.M2M100Config(**bart(300, 32, 1))),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**bart(300, 32, 1))),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**bart(300, 32, 1))),
    "pegasus": lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**bart(300, 32, 1))),
    "blenderbot": lambda: hf.BlenderbotForConditionalGeneration(hf.BlenderbotConfig(**bart(300, 32, 1))),
    "fsmt": lambda: hf.FSMTForConditionalGeneration(
        hf.FSMTConfig(langs=["de", "en"], src_vocab_size=300, tgt_vocab_size=300, **bart(300, 32, 1))
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5(300, 32, 1))),
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**t5(300, 32, 1))),
}


@pytest.mark.parametrize("collates", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_padding_counts_as_a_target(tmp_path: Path, family: str, collates: bool) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    sparsify(model, NMSparseConfig("2:4"))
    padded = DataCollatorForSeq2Seq(tokenizer(), model=model if collates else None)
    pairs = token_pairs(8)
    batch = DataCollatorForSeq2Seq(tokenizer())(list(pairs))
    labels = batch["labels"]
    assert labels.eq(-100).any()
    before = labels.clone()
    shifted = decoder_inputs(model, labels)
    assert torch.equal(labels, before)
    args = arguments(tmp_path, per_device_eval_batch_size=8)
    trainer = SparseTrainer(model=model, args=args, train_dataset=pairs, eval_dataset=pairs, data_collator=padded)
    model.eval()
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"], decoder_input_ids=shifted).logits
    by_hand = F.cross_entropy(logits.flatten(0, 1), before.flatten())  # -100 counts as no target
    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_hand.item(), rel=1e-5)
    with torch.no_grad():
        inputs = next(iter(trainer.get_train_dataloader()))
        assert float(trainer.compute_loss(model, inputs)) == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_method": "srste"}, "sparse_method: got 'srste'; the methods are ste, sr-ste"),
        ({"sparse_decay": -1.0}, "sparse_decay: needs a finite number >= 0, got -1.0"),
        ({"sparse_method": "ste", "sparse_decay": 0.1}, "'ste' has no decay"),
        ({"sparse_method": "dense", "sparse_decay": 0.1}, "the dense method has no decay"),
        ({"tokens_per_batch": 0}, "tokens_per_batch: needs at least 1, a whole number of tokens, got 0"),
        ({"tokens_per_batch": "a"}, "tokens_per_batch: needs at least 1, a whole number of tokens, got 'a'"),
        ({"tokens_per_batch": 10.5}, "tokens_per_batch: needs at least 1, a whole number of tokens, got 10.5"),
        ({"sparse_decay": "a"}, "sparse_decay: needs a finite number >= 0, got 'a'"),
        ({"distill_weight": "x"}, "distill_weight: is above 0 and at most 1, got 'x'"),
        ({"distill_temperature": "x"}, "distill_temperature: needs a finite number above 0, got 'x'"),
        ({"sparse_ramp": 2.0}, "schedule: ramp is a fraction of the run from 0 to 1, got 2.0"),
        ({"sparse_method": "asp", "sparse_decay": None, "sparse_interval": 2}, "'asp' has no schedule of masks"),
        ({"sparse_method": "dense", "sparse_decay": None, "sparse_fade": 0.1}, "'dense' has no schedule; leave"),
        ({"distill_weight": 0.0}, "distill_weight: is above 0 and at most 1, got 0.0"),
        ({"distill_temperature": -1.0}, "distill_temperature: needs a finite number above 0, got -1.0"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_model_and_method_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no N:M layer; call sparsify"):
        train(tmp_path, model=marian())
    sparse = marian()
    sparsify(sparse, NMSparseConfig("2:4"))
    with pytest.raises(ValueError, match=r"sparse_method 'dense' .* 32 N:M layers"):
        train(tmp_path, model=sparse, sparse_method="dense", sparse_decay=None)
    with pytest.raises(ValueError, match="args must be SparseTrainingArguments, got NoneType"):
        SparseTrainer(model=marian())


def test_a_wrapped_model_is_refused(tmp_path: Path) -> None:
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    for wrapped in (torch.compile(model, backend="eager"), torch.nn.DataParallel(model)):
        given: Any = wrapped
        with pytest.raises(ValueError, match=r"wraps the model itself, got a (OptimizedModule|DataParallel); give the"):
            SparseTrainer(model=given, args=arguments(tmp_path))


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_that_is_made_by_model_init_trains_as_one_that_is_given(tmp_path: Path, packed: bool) -> None:
    start = marian()
    sparsify(start, NMSparseConfig("2:4"))
    save_packed(start, tmp_path / "packed", values="fp32")

    def make() -> Any:
        if packed:
            return MarianMTModel.from_pretrained(tmp_path / "packed")
        return copy.deepcopy(start)

    given = train(tmp_path / "given", model=make())
    made = SparseTrainer(
        model_init=make,
        args=arguments(tmp_path / "made"),
        train_dataset=token_pairs(32),
        data_collator=collator(start),
    )
    for _ in range(2):  # each training begins with a model of its own
        made.train()
        assert largest_difference(weights(given), weights(made)) == 0
        assert made.sparse_step is not None
        assert made.sparse_step.step == 4


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_train_over_sparse_layers(tmp_path: Path) -> None:
    import peft

    base = marian()
    sparsify(base, NMSparseConfig("2:4"))
    before = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"]))
    with pytest.raises(ValueError, match=r"'sr-ste' trains N:M layers, and of this model adapters alone train; set"):
        train(tmp_path, model=model)
    settings: dict[str, Any] = {"sparse_method": "dense", "sparse_decay": None, "learning_rate": 0.5, "pairs": 8}
    trainer = train(tmp_path, model=model, max_steps=12, **settings)
    assert losses(trainer)[-1] < losses(trainer)[0]
    after = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): w for name, w in model.named_parameters()
    }
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(weight.any() for name, weight in after.items() if "lora_B" in name)


def test_defaults_of_the_methods(tmp_path: Path) -> None:
    decays = {
        method: arguments(tmp_path, sparse_method=method, sparse_decay=None).sparse_decay
        for method in ("sr-ste", "sr-ste-decoupled", "ste", "asp", "dense")
    }
    assert decays == {"sr-ste": 2e-4, "sr-ste-decoupled": 0.4, "ste": 0.0, "asp": 0.0, "dense": 0.0}


def test_options_are_what_differs(tmp_path: Path) -> None:
    assert arguments(tmp_path).sparse_options() == {}
    assert arguments(tmp_path, sparse_ramp=0.25, sparse_interval=40).sparse_options() == {
        "sparse_ramp": 0.25,
        "sparse_interval": 40,
    }
    assert arguments(tmp_path, sparse_method="decaying-mask", sparse_decay=None).sparse_options() == {
        "sparse_fade": 0.5
    }
    assert arguments(tmp_path, distill_from="a/b").sparse_options() == {
        "distill_from": "a/b",
        "distill_weight": 0.5,
        "distill_temperature": 1.0,
    }


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a matter of Unix")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # with threads, which Python 3.12 tells of
@pytest.mark.parametrize("settings", [{}, {"tokens_per_batch": 80}])
def test_a_killed_reader_of_the_data_is_one_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    class Killed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                [reader] = multiprocessing.active_children()
                assert reader.pid is not None
                os.kill(reader.pid, signal.SIGKILL)

    # Batches that were read ahead are still trained on, so that the end comes some steps later.
    common: dict[str, Any] = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2, "pairs": 400, **settings}
    last = rf"{tmp_path / 'stopped'}/checkpoint-[2468]"
    with pytest.raises(
        ValueError,
        match=rf"^training: after step \d a process that reads the data is gone \(DataLoader worker \(pid.*\); "
        rf"the last checkpoint is {last}; see what ended it, .*, and run again$",
    ):
        train(tmp_path / "stopped", callbacks=[Killed()], dataloader_num_workers=1, **common)
    resumed = train(tmp_path / "stopped", resume=True, dataloader_num_workers=1, **common)
    assert largest_difference(weights(train(tmp_path / "through", **common)), weights(resumed)) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals of timers are a matter of Unix")
def test_a_reader_may_reset_its_pipe_before_torch_hears_of_its_end(tmp_path: Path) -> None:
    class Reset(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionResetError(104, "Connection reset by peer")

    def handler(*args: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(ConnectionResetError):  # of something else
            train(tmp_path / "else", callbacks=[Reset()])

        class ResetAndSignal(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                raise ConnectionResetError(104, "Connection reset by peer")

        with pytest.raises(ValueError, match=r"a process that reads the data is gone \(DataLoader worker \(pid 7\) is"):
            train(tmp_path / "reader", callbacks=[ResetAndSignal()])
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            torch.distributed.DistBackendError("NCCL error in: watchdog, remote process gone\nLast error: ..."),
            ValueError,
            r"^training: after step 1 another training process does not answer \(NCCL error in: watchdog, remote "
            r"process gone\); there is no checkpoint yet; see what ended it",
        ),
        (RuntimeError("not enough memory"), RuntimeError, "^not enough memory$"),
    ],
)
def test_an_error_between_processes_is_told_from_others(
    tmp_path: Path, error: RuntimeError, kind: type[Exception], message: str
) -> None:
    class Raised(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise error

    with pytest.raises(kind, match=message):
        train(tmp_path, callbacks=[Raised()])


TWO_PROCESSES = """
import json, sys, torch
from tests.test_trainer import losses, train, weights
from pathlib import Path
found = []
for settings in json.loads(sys.argv[1]):
    trainer = train(Path(sys.argv[2]), **settings)
    found.append({"weights": weights(trainer), "losses": losses(trainer)})
if trainer.is_world_process_zero():
    torch.save(found, sys.argv[3])
"""


def launch_two(folder: Path, script: str, *arguments_of_script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in two processes through accelerate."""
    file = folder / "script.py"
    file.write_text(script)
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    # Looked at this rarely, a process whose peer is gone ends by itself and is not ended by the launcher.
    launch += ["--monitor_interval", "2"]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, str(file), *arguments_of_script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,  # a hang of gloo at its end fails the test instead of stopping the suite
    )


def test_two_processes_are_one(tmp_path: Path) -> None:
    """2 processes x accumulation 2 over the same batches as 1 process x accumulation 4, for 20 steps."""
    marian(seed=1, init_std=0.5).save_pretrained(tmp_path / "teacher")
    common: dict[str, Any] = {"max_steps": 20, "pairs": 96}
    cases: list[dict[str, Any]] = [
        {"per_device_train_batch_size": 2},
        {"tokens_per_batch": 60},
        {"per_device_train_batch_size": 2, "distill_from": str(tmp_path / "teacher")},
    ]
    # A mean over the tokens of each process would be another one: the halves of a step differ in their tokens.
    tokens = [sum(len(row["labels"]) for row in token_pairs(96).select(range(pair, pair + 2))) for pair in (0, 2)]
    assert tokens[0] != tokens[1]
    of_two = json.dumps([{"gradient_accumulation_steps": 2, **common, **settings} for settings in cases])
    done = launch_two(tmp_path, TWO_PROCESSES, of_two, str(tmp_path / "two"), str(tmp_path / "result.pt"))
    assert done.returncode == 0, done.stderr[-3000:]
    for settings, two in zip(cases, torch.load(tmp_path / "result.pt", weights_only=True), strict=True):
        one = train(tmp_path / "one", gradient_accumulation_steps=4, **common, **settings)
        assert not two["weights"]["model.shared.weight"][0].any()  # the padding
        assert losses(one) == pytest.approx(two["losses"], abs=1e-5)
        assert largest_difference(weights(one), two["weights"]) < 5 * SAME  # five times as many steps as above


ONE_OF_TWO_KILLED = """
import os, signal, sys
from pathlib import Path
from hf_nmsparse import NMSparseConfig, sparsify
from hf_nmsparse.trainer import SparseTrainer, last_whole_checkpoint
from tests.test_trainer import TrainerCallback, largest_difference, train, weights
from tests.tiny import marian

moment, folder = sys.argv[1], Path(sys.argv[2])
save = SparseTrainer._save_optimizer_and_scheduler

def kill(now, args):
    if now == moment and args.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)

class Killed(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6:
            kill("in a step", args)

def killed_save(self, output_dir):
    save(self, output_dir)
    if self.state.global_step == 8:
        kill("in a checkpoint", self.args)  # before this process has written its share

SparseTrainer._save_optimizer_and_scheduler = killed_save

def run(folder):
    model = marian(dropout=0.1)  # drawn apart by the two processes
    sparsify(model, NMSparseConfig("2:4"))
    settings = dict(max_steps=10, save_strategy="steps", save_steps=4, per_device_train_batch_size=4, pairs=96)
    resume = last_whole_checkpoint(folder) is not None
    return weights(train(folder, resume, model, callbacks=[Killed()], **settings))

found = run(folder)
assert largest_difference(run(folder.with_name("undisturbed")), found) == 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a matter of Unix")
def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Two kills one after the other, the second while a checkpoint has one process's share alone."""
    folder = tmp_path / "run"
    for moment, after in (("in a step", 6), ("in a checkpoint", 8)):
        # Its limit of five minutes is what tells this from the thirty that gloo waits for a process that hangs.
        done = launch_two(tmp_path, ONE_OF_TWO_KILLED, moment, str(folder))
        assert done.returncode != 0
        line = f"training: after step {after} another training process does not answer (["
        assert line in done.stderr, done.stderr[-3000:]
        assert f"; the last checkpoint is {folder / 'checkpoint-4'}; see what ended it" in done.stderr
        assert last_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    done = launch_two(tmp_path, ONE_OF_TWO_KILLED, "never", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
