"""SparseTrainerMixin over a Trainer of something other than translation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from hf_nmsparse import SparseTrainer, SparseTrainerMixin, SparseTrainingArguments
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.layers import NMConv2d, sparse_layers
from hf_nmsparse.sparse_model import finalize, sparsify
from tests.tiny import resnet

CONFIG = NMSparseConfig("2:4", convolutions=True)


class Weighted(Trainer):
    """A Trainer of somebody else's."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return (2 * loss[0], loss[1]) if isinstance(loss, tuple) else 2 * loss


class SparseWeighted(SparseTrainerMixin, Weighted):
    pass


def images(count: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    pixels = torch.randn(count, 1, 8, 8, generator=generator) + labels[:, None, None, None] / 3
    return [{"pixel_values": x, "labels": int(label)} for x, label in zip(pixels, labels, strict=True)]


def arguments(folder: Path, **settings: Any) -> SparseTrainingArguments:
    stock = {"per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 0.01, "logging_steps": 2}
    return SparseTrainingArguments(
        str(folder), **(stock | {"use_cpu": True, "disable_tqdm": True, "save_steps": 3, "seed": 1} | settings)
    )


def model() -> Any:
    torch.manual_seed(0)
    made = resnet()
    sparsify(made, CONFIG)
    return made


@pytest.mark.parametrize("kind", [SparseTrainerMixin, SparseWeighted])
def test_it_trains_logs_and_goes_on(kind: Any, tmp_path: Path) -> None:
    trainer = kind(model=model(), args=arguments(tmp_path / "whole"), train_dataset=images())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    name = next(iter(sparse_layers(trainer.model)))
    assert all({"sad", "flip_rate", f"flip_rate/{name}", f"kept/{name}"} <= entry.keys() for entry in logs)
    assert logs[0]["sad"] > 0
    stopped = kind(model=model(), args=arguments(tmp_path / "resumed"), train_dataset=images())
    stopped.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for one, other in zip(trainer.model.parameters(), stopped.model.parameters(), strict=True):
        assert torch.equal(one, other)
    masters = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(masters[key], tensor) for key, tensor in trainer.model.state_dict().items())
    finalize(trainer.model)


def test_the_other_trainer_keeps_its_say(tmp_path: Path) -> None:
    losses = []
    for kind in (SparseTrainerMixin, SparseWeighted):
        settings = {"learning_rate": 0.0, "max_steps": 2}
        trainer = kind(model=model(), args=arguments(tmp_path, **settings), train_dataset=images(16))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx([2 * loss for loss in losses[0]], rel=1e-3)


def test_a_dense_baseline_and_asp(tmp_path: Path) -> None:
    dense = resnet()
    SparseTrainerMixin(dense, arguments(tmp_path, sparse_method="dense", max_steps=1), train_dataset=images()).train()
    sparsify(dense, CONFIG)
    layer = next(layer for layer in dense.modules() if isinstance(layer, NMConv2d))
    before = layer.current_mask().clone()
    trainer = SparseTrainerMixin(dense, arguments(tmp_path, sparse_method="asp"), train_dataset=images())
    trainer.train()
    assert torch.equal(layer.current_mask(), before)
    assert (layer.weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("setting", [{"tokens_per_batch": 100}, {"distill_from": "teacher"}])
def test_what_is_of_translation_is_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(setting))}: is of translation, which SparseWeighted does not"):
        SparseWeighted(model=model(), args=arguments(tmp_path, **setting), train_dataset=images())
    assert SparseTrainer.translates


def test_errors_name_the_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^SparseWeighted: args must be SparseTrainingArguments, got NoneType"):
        SparseWeighted(model=model())
    with pytest.raises(ValueError, match=r"^SparseWeighted: sparse_method 'dense' cannot train a model with 6 N:M"):
        SparseWeighted(model=model(), args=arguments(tmp_path, sparse_method="dense"))


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


class Own(SparseTrainerMixin):
    """One with an optimizer of its own."""

    asks: bool

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = sgd(self.model)
        return super().create_optimizer(model) if self.asks else self.optimizer


class Replaced(SparseTrainerMixin):
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        super().create_optimizer(model)
        self.optimizer = sgd(self.model)
        return self.optimizer


def test_an_optimizer_without_the_rule_is_refused(tmp_path: Path) -> None:
    def trainer(kind: Any, **settings: Any) -> Any:
        return kind(model=model(), args=arguments(tmp_path, max_steps=1, **settings), train_dataset=images())

    for kind, asks in ((Own, False), (Replaced, True)):
        Own.asks = asks
        message = f"{kind.__name__}: sparse_method 'sr-ste' is not in the optimizer, a SGD; in a create_optimizer"
        with pytest.raises(ValueError, match=message):
            trainer(kind).train()
    Own.asks, sums = True, []
    for decay in (0.0, 0.5):
        trained = trainer(Own, sparse_decay=decay)
        trained.train()
        sums.append(sum(float(weight.detach().abs().sum()) for weight in trained.model.parameters()))
    assert sums[1] < sums[0]
