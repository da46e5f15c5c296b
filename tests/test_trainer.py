"""SparseTrainer: the loss, the decay and the masks mean the same however a step is divided."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BatchEncoding,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    M2M100ForConditionalGeneration,
    MarianMTModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hf_nmsparse import generation
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.kernels import engine
from hf_nmsparse.kernels.engine import Engine
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.losses import decoder_inputs, token_loss
from hf_nmsparse.masks import magnitude_mask
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.run_logs import layer_rows
from hf_nmsparse.saving import export_dense, save_packed
from hf_nmsparse.sparse_model import sparsify
from hf_nmsparse.srste import METHODS
from hf_nmsparse.trainer import SparseTrainer
from hf_nmsparse.training_arguments import SparseTrainingArguments
from tests.processes import in_two
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


def test_a_loss_without_the_teacher_is_refused(tmp_path: Path) -> None:
    class Own(SparseTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(**inputs)["loss"]

    marian().save_pretrained(tmp_path / "teacher")
    model: Any = marian()
    sparsify(model, NMSparseConfig("2:4"))
    arguments = SparseTrainingArguments(
        str(tmp_path), distill_from=str(tmp_path / "teacher"), max_steps=1, use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": [5, 6, 1], "labels": [7, 8, 1]}] * 8
    trainer = Own(model, arguments, train_dataset=rows, data_collator=collator(model))
    with pytest.raises(ValueError, match=r"distill_from: Own computes a loss without the teacher's; in a compute_loss"):
        trainer.train()


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


@pytest.mark.skipif(engine.why_not() is not None, reason="the native library is not used")
def test_an_evaluation_translates_on_one_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = train(tmp_path, predict_with_generate=True, per_device_eval_batch_size=4, generation_max_length=9)
    made: list[Engine] = []

    def make(*parts: Any) -> Engine:
        made.append(Engine(*parts))
        return made[-1]

    monkeypatch.setattr(generation, "Engine", make)

    def predictions() -> Any:
        return trainer.predict(token_pairs(10)).predictions

    found = predictions()
    assert len(made) == 1
    assert "generate" not in vars(trainer.model)
    assert isinstance(trainer.model, nn.Module)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(-1)
    other = predictions()  # of another model, on another engine
    assert len(made) == 2
    monkeypatch.setenv("HF_NMSPARSE_ENGINE", "0")
    assert np.array_equal(other, predictions())
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(-1)
    assert np.array_equal(found, predictions())
    assert len(made) == 2


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


def train_each(cases: list[dict[str, Any]], folder: Path, result: Path) -> None:
    """What each of two processes does in the test below."""
    found = []
    for settings in cases:
        trainer = train(folder, **settings)
        found.append({"weights": weights(trainer), "losses": losses(trainer)})
    if trainer.is_world_process_zero():
        torch.save(found, result)


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
    of_two = [{"gradient_accumulation_steps": 2, **common, **settings} for settings in cases]
    for done in in_two(train_each, of_two, tmp_path / "two", tmp_path / "result.pt"):
        assert done.returncode == 0, done.stderr[-3000:]
    for settings, two in zip(cases, torch.load(tmp_path / "result.pt", weights_only=True), strict=True):
        one = train(tmp_path / "one", gradient_accumulation_steps=4, **common, **settings)
        assert not two["weights"]["model.shared.weight"][0].any()  # the padding
        assert losses(one) == pytest.approx(two["losses"], abs=1e-5)
        assert largest_difference(weights(one), two["weights"]) < 5 * SAME  # five times as many steps as above
