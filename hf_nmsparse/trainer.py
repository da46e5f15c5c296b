"""SparseTrainer and its arguments: Seq2SeqTrainer for N:M layers."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput, seed_worker
from transformers.utils.hub import PushInProgress, hf_api

from hf_nmsparse.averaging import checkpoints
from hf_nmsparse.batching import TokenBatchSampler, TokenBatchStream, pair_length
from hf_nmsparse.files import flush
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.loading import check_checkpoint, load_seq2seq
from hf_nmsparse.losses import distillation_loss, token_loss
from hf_nmsparse.optimizer import Flips, SparseStep, check_method, torch_optimizer
from hf_nmsparse.packing import VALUE_DTYPES
from hf_nmsparse.padding import ZeroPadding
from hf_nmsparse.quantizer import prepare_for_training
from hf_nmsparse.saving import retied, save_packed
from hf_nmsparse.schedule import Schedule
from hf_nmsparse.sparsity_record import one_of
from hf_nmsparse.srste import METHODS
from hf_nmsparse.wrappers import has_adapters, unwrapped

__all__ = ["Preempted", "SparseTrainer", "SparseTrainingArguments", "last_whole_checkpoint"]

DENSE = "dense"
SPARSE_STEP_NAME = "sparse_step.safetensors"

# What torch.save says where the disk does not take a file; it raises a RuntimeError as for anything else.
_TORCH_CANNOT_WRITE = ("inline_container", "PytorchStreamWriter", "iostream error")

# How torch begins where a process that reads for a DataLoader is gone, and what gloo puts into all it says.
_WORKER_GONE, _GLOO = "DataLoader worker (pid", "gloo/"

_SIGNAL_SECONDS = 1.0

# What lies in an output folder beside what a push of the packed model takes along: as Trainer leaves it out, and dense
# masters with what belongs to them.
_NO_PART_OF_A_PUSH = (
    "_*",
    f"{PREFIX_CHECKPOINT_DIR}-*",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "training_args.bin",
)


@dataclass
class SparseTrainingArguments(Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments and what a sparse run adds.

    Raises:
        ValueError: A value is out of range or does not fit the method.
    """

    sparse_method: str = field(
        default="sr-ste",
        metadata={"help": f"How masked weights are trained: {', '.join(METHODS)}, or {DENSE} for the baseline."},
    )
    sparse_decay: float | None = field(
        default=None,
        metadata={
            "help": "lambda of SR-STE, added once per optimizer step; the method's default if left out. That of sr-ste "
            "is 2e-4: of 6e-6, 6e-5, 2e-4 and 1.6e-3 it has the lowest validation loss on Multi30k."
        },
    )
    sparse_ramp: float = field(
        default=0.0,
        metadata={
            "help": "lambda grows from 0 over this fraction of the run. None by default: 0.25, which AST takes, "
            "brought no lower validation loss on Multi30k."
        },
    )
    sparse_interval: int = field(
        default=1,
        metadata={
            "help": "Masks are ranked anew every so many optimizer steps. Each by default: 40, which 2by4-pretrain "
            "takes, brought no lower validation loss and 0.7 BLEU less on Multi30k, and a ranking costs little."
        },
    )
    sparse_dense_head: float = field(default=0.0, metadata={"help": "This first fraction of the run is dense."})
    sparse_dense_tail: float = field(
        default=0.0, metadata={"help": "This last fraction of the run is dense, and so is the model that comes out."}
    )
    sparse_fade: float = field(
        default=0.0,
        metadata={"help": "Pruned weights fade out of the forward over this fraction; 'decaying-mask' takes 0.5."},
    )
    sparse_log_layers: bool = field(
        default=True,
        metadata={"help": "Log flips and magnitudes of each layer too; the console shows the totals only."},
    )
    sparse_log_groups: bool = field(
        default=False,
        metadata={"help": "Log the share of groups whose mask ever changed: one more pass over the masks each step."},
    )
    distill_from: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a dense model of the same vocabulary, the teacher; word level."},
    )
    distill_weight: float = field(
        default=0.5, metadata={"help": "Share of the teacher's distribution in the loss; the rest is the reference's."}
    )
    distill_temperature: float = field(
        default=1.0, metadata={"help": "Both distributions are softened by this before they are compared."}
    )
    sparse_values: str | None = field(
        default=None,
        metadata={"help": "Number type of the packed files that go to the Hub: fp32, fp16, bf16 or int8."},
    )
    sparse_standalone: bool = field(
        default=False,
        metadata={
            "help": "A push sends one file of Python more, with which transformers alone loads the packed model "
            "where the reader passes trust_remote_code=True."
        },
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Source and target tokens of a batch on one device, padding counted; replaces "
            "per_device_train_batch_size, and the rows of the dataset, which may be a list, a dataset of torch or a "
            "stream, need input_ids and labels."
        },
    )

    def __post_init__(self) -> None:
        deepspeed = self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")
        if deepspeed and self.sparse_method != DENSE:
            raise ValueError(
                f"deepspeed: its engine steps inside of backward, where the rule of {self.sparse_method!r} does not "
                "see the gradients; train under DDP or FSDP2"
            )
        super().__post_init__()
        if self.sparse_method == DENSE:
            if self.sparse_decay:
                raise ValueError(
                    f"sparse_decay: the dense method has no decay, got {self.sparse_decay!r}; leave it out"
                )
            self.sparse_decay = 0.0
            if self.sparse_schedule() != Schedule():
                raise ValueError(
                    "sparse_method: 'dense' has no schedule; leave sparse_ramp, sparse_interval, sparse_dense_head, "
                    "sparse_dense_tail and sparse_fade out"
                )
        else:
            self.sparse_decay, schedule = check_method(self.sparse_method, self.sparse_decay, self.sparse_schedule())
            self.sparse_fade = schedule.fade
        one_of("sparse_values", self.sparse_values, (None, *VALUE_DTYPES), "SparseTrainingArguments")
        if self.sparse_method == DENSE and (self.sparse_values is not None or self.sparse_standalone):
            raise ValueError(
                "sparse_method: 'dense' pushes a dense model; leave sparse_values and sparse_standalone out"
            )
        for name in ("push_to_hub", "load_best_model_at_end") if self.sparse_dense_tail else ():
            if getattr(self, name):
                raise ValueError(
                    f"{name}: sparse_dense_tail ends with a model that is dense, which "
                    f"{'cannot be packed' if name == 'push_to_hub' else 'is that of the last step'}; leave one of the "
                    "two out"
                )
        if not (isinstance(self.distill_weight, int | float) and 0 < self.distill_weight <= 1):
            raise ValueError(f"distill_weight: is above 0 and at most 1, got {self.distill_weight!r}")
        if not (isinstance(self.distill_temperature, int | float) and 0 < self.distill_temperature < float("inf")):
            raise ValueError(f"distill_temperature: needs a finite number above 0, got {self.distill_temperature!r}")
        if self.enable_jit_checkpoint:
            raise ValueError("enable_jit_checkpoint: SparseTrainer saves on SIGTERM by itself; leave it out")
        if self.tokens_per_batch is not None and not (
            isinstance(self.tokens_per_batch, int) and self.tokens_per_batch >= 1
        ):
            raise ValueError(
                f"tokens_per_batch: needs at least 1, a whole number of tokens, got {self.tokens_per_batch!r}"
            )

    def sparse_schedule(self) -> Schedule:
        """When masks and lambda change."""
        return Schedule(
            self.sparse_ramp,
            self.sparse_interval,
            self.sparse_dense_head,
            self.sparse_dense_tail,
            self.sparse_fade,
        )

    def sparse_options(self) -> dict[str, Any]:
        """What a run has beside method, pattern and decay: schedule and distillation where they are not the default."""
        names = ["sparse_ramp", "sparse_interval", "sparse_dense_head", "sparse_dense_tail", "sparse_fade"]
        if self.distill_from is not None:
            names += ["distill_from", "distill_weight", "distill_temperature"]
        stock = {entry.name: entry.default for entry in fields(self)}
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value != stock[name] or name.startswith("distill")}


class SparseTrainer(Seq2SeqTrainer):
    """A Seq2SeqTrainer that trains the N:M layers of a model after `sparsify`.

    It adds the method's rule to every optimizer step (`SparseStep`), logs SAD and flip rate, batches by tokens if
    asked to, and normalises the loss of encoder-decoder models by the target tokens of the whole step: Marian, T5,
    BART, mBART and M2M100 take a plain mean and leave that to nobody, so that gradients would grow with accumulation
    steps and processes. Checkpoints hold the dense masters under their stock names.

    Args:
        model: A model after `sparsify`, or with ``sparse_method="dense"`` a dense one, or one whose adapters of PEFT
            alone train. A model that was loaded packed is made ready to train.
        args: The arguments.
        **kwargs: As `transformers.Seq2SeqTrainer` takes them. With a tokenizer as ``processing_class`` and no
            ``data_collator``, sentence pairs are padded by a ``DataCollatorForSeq2Seq``.

    Raises:
        ValueError: The method and the model do not fit each other, or the model is wrapped, which Trainer does itself.
    """

    args: SparseTrainingArguments

    def __init__(
        self, model: nn.Module | None = None, args: SparseTrainingArguments | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(args, SparseTrainingArguments):
            raise ValueError(f"SparseTrainer: args must be SparseTrainingArguments, got {type(args).__name__}")
        if model is not None:
            _make_ready(model)
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns of it
        super().__init__(model=model, args=args, **kwargs)
        assert self.model is not None
        layers = [layer for layer in self.model.modules() if isinstance(layer, NMLinear)]
        sparse = sum(layer.weight.requires_grad for layer in layers)
        if args.sparse_method == DENSE and sparse:
            raise ValueError(f"SparseTrainer: sparse_method 'dense' cannot train a model with {sparse} N:M layers")
        if args.sparse_method != DENSE and not sparse and has_adapters(self.model):
            raise ValueError(
                f"SparseTrainer: sparse_method {args.sparse_method!r} trains N:M layers, and of this model adapters "
                "alone train; set sparse_method='dense'"
            )
        self.sparse_step: SparseStep | None = None
        self._padding: ZeroPadding | None = None  # of a dense training; SparseStep has its own
        self._stepped: torch.optim.Optimizer | None = None
        self._pushing = False
        self._began = time.perf_counter()
        self._seconds_before: float | None = None
        config = getattr(self.model, "config", None)
        tokenizer = self.processing_class
        if (
            kwargs.get("data_collator") is None
            and getattr(config, "is_encoder_decoder", False)
            and isinstance(tokenizer, PreTrainedTokenizerBase)
        ):
            self.data_collator = DataCollatorForSeq2Seq(tokenizer)  # Trainer's own choice does not pad labels
        # A mixture of experts adds its router losses inside the model, where a loss of ours would drop them.
        if (
            self.compute_loss_func is None
            and getattr(config, "is_encoder_decoder", False)
            and not getattr(config, "output_router_logits", False)
        ):
            self.compute_loss_func = self._token_loss
        if hasattr(getattr(self.data_collator, "model", None), "prepare_decoder_input_ids_from_labels") and isinstance(
            self.data_collator, DataCollatorForSeq2Seq
        ):
            self.data_collator = replace(self.data_collator, model=_Shifts(self.data_collator.model))
        self.teacher = self._load_teacher() if args.distill_from is not None else None
        self._teacher_logits: Tensor | None = None
        self.add_callback(_Start(self))
        self.preemption = Preemption()
        self.add_callback(self.preemption)
        for shown, totals in ((ProgressCallback, _TotalsProgress), (PrinterCallback, _TotalsPrinter)):
            if self.pop_callback(shown) is not None:
                self.add_callback(totals)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """The model of ``model_init``, ready to train as one that is given is made."""
        model: nn.Module = super().call_model_init(trial)
        _make_ready(model)
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Builds the optimizer as Trainer does and hooks the method's rule into its step."""
        optimizer = super().create_optimizer(model)
        stepped = torch_optimizer(optimizer)  # accelerate has wrapped it on a second call of train
        if stepped is self._stepped:
            return optimizer
        self._stepped = stepped
        for earlier in (self.sparse_step, self._padding):
            if earlier is not None:
                earlier.remove()
        trained = model or self.model
        assert trained is not None
        if self.args.sparse_method == DENSE:
            self._padding = ZeroPadding(trained, stepped)
        else:
            assert self.args.sparse_decay is not None
            self.sparse_step = SparseStep(
                trained,
                stepped,
                self.args.sparse_method,
                self.args.sparse_decay,
                self.args.sparse_schedule(),
                track_groups=self.args.sparse_log_groups,
            )
        return optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """Makes Trainer's accelerator; under FSDP2 the weights stay fp32 from shard to forward.

        accelerate would have them gathered in the 16-bit type of mixed precision, where a mask is not the master's. It
        is autocast that computes in that type.
        """
        super().create_accelerator_and_postprocess()
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 1:
            raise ValueError("fsdp: version 1 cuts weights through their groups; set fsdp_version: 2")
        if plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp: with cpu_ram_efficient_loading one process alone has weights, and accelerate shards no model "
                "with buffers; set fsdp_cpu_ram_efficient_loading: false"
            )
        if "FULL" not in str(plugin.state_dict_type):
            raise ValueError(
                "fsdp: a checkpoint in shards does not hold the dense masters under their stock names; set "
                "fsdp_state_dict_type: FULL_STATE_DICT"
            )
        plugin.mixed_precision_policy = None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Prepares as Trainer does; under FSDP2 embeddings that are tied to each other are sharded together."""
        with _tied_together(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _load_teacher(self) -> PreTrainedModel:
        assert self.args.distill_from is not None
        if self.compute_loss_func != self._token_loss:
            raise ValueError(
                "distill_from: distils encoder-decoder models whose loss is the trainer's own; leave it out for "
                f"{type(self.model).__name__}"
            )
        teacher = load_seq2seq(self.args.distill_from, dtype=torch.float32)
        models: tuple[Any, ...] = teacher, self.model
        sizes = [model.config.get_text_config(decoder=True).vocab_size for model in models]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"distill_from: {self.args.distill_from} has a vocabulary of {sizes[0]:,}, the model one of "
                f"{sizes[1]:,}; they must share one"
            )
        teacher.eval().requires_grad_(False)
        teacher.to(self.args.device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
        return teacher

    def _token_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """`token_loss`, and while a model with a teacher trains, the teacher's share of it."""
        loss = token_loss(outputs, labels, num_items_in_batch, self.args.label_smoothing_factor)
        if self._teacher_logits is None:
            return loss
        share = self.args.distill_weight
        taught = distillation_loss(
            outputs, self._teacher_logits, labels, num_items_in_batch, self.args.distill_temperature
        )
        return (1 - share) * loss + share * taught

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's loss; where it takes the labels away, the decoder's inputs are made from them first."""
        if self.compute_loss_func is not None and "labels" in inputs and "decoder_input_ids" not in inputs:
            inputs = {**inputs, "decoder_input_ids": decoder_inputs(self.model, inputs["labels"])}
        if self.teacher is not None and model.training:
            with torch.no_grad():
                seen = {key: value for key, value in inputs.items() if key != "labels"}
                self._teacher_logits = self.teacher(**seen)["logits"]
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._teacher_logits = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's loader, or one of batches by token budget."""
        if self.args.tokens_per_batch is None:
            return super().get_train_dataloader()
        if self.train_dataset is None:
            raise ValueError("SparseTrainer: training needs a train_dataset")
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        shares = self.args.tokens_per_batch, seed, self.args.world_size, self.args.process_index
        dataset: Any = self.train_dataset
        collate, batches = self.data_collator, dict[str, Any]()
        lengths = None if is_stream(dataset) else pair_lengths(dataset)
        if is_table(dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        if lengths is not None:
            sampler = TokenBatchSampler(*lengths, *shares)
            batches["batch_sampler"] = sampler
            if self.is_world_process_zero():
                print(
                    f"{len(sampler):,} batches an epoch for each of {self.args.world_size} processes, at most "
                    f"{self.args.tokens_per_batch:,} tokens a batch, {sampler.padding_waste:.1%} of them padding"
                )
        else:
            if self.args.dataloader_num_workers > 1:
                raise ValueError(
                    f"dataloader_num_workers: a stream with tokens_per_batch is read by one process, got "
                    f"{self.args.dataloader_num_workers}; set it to 0 or 1"
                )
            dataset = TokenBatchStream(dataset, *shares)
            batches["batch_size"] = None  # what the stream yields are batches
        loader = DataLoader(
            dataset,
            **batches,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=partial(
                seed_worker, num_workers=self.args.dataloader_num_workers, rank=self.args.process_index
            ),
        )
        # Sampler and stream know the processes: to accelerate, each loader stands alone.
        prepared: DataLoader[Any] = prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0)
        return prepared

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains as Trainer does; a run that has reached ``max_steps`` before is loaded and not trained on.

        Trainer would take one step more than ``max_steps`` after resuming in the middle of an epoch.

        SIGTERM, by which clusters announce that they take a machine back, ends the training after the step that is
        being taken, with a checkpoint.

        Raises:
            Preempted: That has happened.
            ValueError: The loss is not finite, a checkpoint could not be written, or another process is gone: one that
                trains too, or one that reads the data. The last checkpoint is as it was.
        """
        self._began, self._seconds_before = time.perf_counter(), None
        folder = resume_from_checkpoint
        if folder is True:
            folder = last_whole_checkpoint(self.args.output_dir)
            if folder is None:
                raise ValueError(f"SparseTrainer: {self.args.output_dir} holds no whole checkpoint to resume from")
            resume_from_checkpoint = folder
        if isinstance(folder, str) and (Path(folder) / TRAINER_STATE_NAME).is_file():
            before = TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME))
            if 0 < self.args.max_steps <= before.global_step:
                self._load_from_checkpoint(folder)
                self.state = before
                return TrainOutput(before.global_step, 0.0, {})
        with self.preemption.listening():
            try:
                result = super().train(resume_from_checkpoint, *args, **kwargs)
            except (RuntimeError, ConnectionResetError) as error:
                gone = _who_is_gone(_last_word(error))
                if gone is None:
                    raise
                raise ValueError(
                    f"training: after step {self.state.global_step} {gone}; {self._last_good()}; see what ended it, "
                    "often want of memory, and run again"
                ) from error
            finally:
                if self.sparse_step is not None:
                    self.sparse_step.release_masks()  # nobody renews them in a loop that trains the model on
        if self.preemption.stopped:
            raise Preempted(f"stopped by SIGTERM, saved at step {self.state.global_step}; the same command goes on")
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the weights as Trainer does, if the checkpoint has all of them."""
        if isinstance(self.model, PreTrainedModel) and not has_adapters(self.model):
            check_checkpoint(resume_from_checkpoint, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's step, which ends the run where the loss is not finite: no later step would mend the weights.

        Under fp16 the loss scaler skips such a step.
        """
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.scaler is None and not torch.isfinite(loss):
            raise ValueError(
                f"training: the loss of step {self.state.global_step + 1} is {float(loss)}; {self._last_good()}; lower "
                "learning_rate, or look for what is wrong with the data"
            )
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes Trainer's checkpoint and waits until it is on the disk."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                flush(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            other = isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_CANNOT_WRITE)
            if other or _is_whole(folder):  # a whole checkpoint stays: a push or the deletion of old ones has failed
                raise
            shutil.rmtree(folder, ignore_errors=True)  # it takes space and is of no use
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"checkpoint: {folder} could not be written: {reason}; {self._last_good()}; free space, then run again"
            ) from error

    def _load_best_model(self) -> None:
        """Loads the weights as Trainer does, and the masks that they were scored with."""
        super()._load_best_model()
        file = Path(self.state.best_model_checkpoint or "") / SPARSE_STEP_NAME
        if self.sparse_step is not None and file.is_file():
            self.sparse_step.load_masks(load_file(file))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer does; a model with pruned weights in its forward is not the best, whatever it scores."""
        layers = self.sparse_step.layers.values() if self.sparse_step is not None else ()
        if any(layer.pruned_scale for layer in layers):
            return False
        return super()._determine_best_metric(metrics, trial)

    def _last_good(self) -> str:
        folder = last_whole_checkpoint(self.args.output_dir)
        return "there is no checkpoint yet" if folder is None else f"the last checkpoint is {folder}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the dense masters as Trainer does; for a push, the packed model."""
        if not self._pushing:
            super().save_model(output_dir, _internal_call)
            return
        weights = self.gathered()
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            assert self.model is not None
            model: Any = unwrapped(self.model)
            values, standalone = self.args.sparse_values, self.args.sparse_standalone
            save_packed(model, folder, values=values, standalone=standalone, state_dict=weights)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)  # as Trainer saves it
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves as Trainer does; of tied weights that were gathered from shards one is written."""
        if state_dict is not None:
            assert self.model is not None
            state_dict = retied(self.model, state_dict)
        super()._save(output_dir, state_dict)

    def gathered(self) -> dict[str, Tensor] | None:
        """The dense masters, whole on the first process and on no other, where FSDP2 shards them; None elsewhere.

        All processes call it together.
        """
        return self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Pushes the packed model and what else lies in the output folder; a dense model goes as Trainer pushes it.

        The output folder keeps the dense masters that it may hold: what is pushed is put together elsewhere.

        Raises:
            ValueError: The model cannot be packed, as `save_packed` says.
        """
        if self.args.sparse_method == DENSE:
            return super().push_to_hub(*args, **kwargs)
        output_dir = str(self.args.output_dir)
        with ExitStack() as until_pushed:
            # Trainer names repository and card after the last part of the path.
            folder = until_pushed.enter_context(TemporaryDirectory()) / Path(Path(output_dir).absolute().name)
            if self.args.should_save and Path(output_dir).is_dir():
                shutil.copytree(output_dir, folder, ignore=shutil.ignore_patterns(*_NO_PART_OF_A_PUSH))
            self._pushing, self.args.output_dir = True, str(folder)
            try:
                pushed = super().push_to_hub(*args, **kwargs)
            finally:
                self._pushing, self.args.output_dir = False, output_dir
            if isinstance(pushed, Future):
                later = until_pushed.pop_all()
                pushed.add_done_callback(lambda _: later.close())
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes in the background while the training goes on: the packed model, and beside it the checkpoint as it is.

        Trainer would push the dense masters as the model. While pruned weights are in the forward there is none to
        pack: then a line says so, and the model follows with a later checkpoint.
        """
        if self.args.sparse_method == DENSE or self.args.hub_strategy == HubStrategy.END:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        before: PushInProgress | None = self.push_in_progress
        busy = [before is not None and not before.is_done() and not self.args.hub_always_push]
        if broadcast_object_list(busy)[0]:  # the first process knows
            return
        message = f"Training in progress, step {self.state.global_step}"
        jobs: Any = []
        try:
            jobs.append(self.push_to_hub(message, blocking=False))
        except ValueError as error:
            print(f"step {self.state.global_step}: the checkpoint is saved and the model is not pushed: {error}")
        if not self.is_world_process_zero():
            return
        if self.args.hub_strategy != HubStrategy.EVERY_SAVE:
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            upload = hf_api().upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=checkpoint_folder,
                path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                commit_message=f"{message}, checkpoint",
                token=self.args.hub_token,
                run_as_future=True,
                revision=self.args.hub_revision,
            )
            jobs.append(upload)
        self.push_in_progress = PushInProgress(jobs)  # type: ignore[assignment]  # Trainer declares it as None

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves what Trainer does; all processes have before the one that calls the checkpoint whole goes on."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves what Trainer does, and what `SparseStep` needs to go on."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.sparse_step is not None and self.args.should_save:
            save_file(self.sparse_step.state_dict(), Path(output_dir) / SPARSE_STEP_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads what Trainer does, and the state of `SparseStep`."""
        super()._load_optimizer_and_scheduler(checkpoint)
        file = Path(checkpoint or "") / SPARSE_STEP_NAME
        if self.sparse_step is not None and checkpoint is not None and file.is_file():
            self.sparse_step.load_state_dict(load_file(file))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes Trainer's card, unless the output folder has one with scores, which Trainer's would lose."""
        card = Path(str(self.args.output_dir)) / "README.md"
        if not (card.is_file() and ModelCard.load(card).data.eval_results):
            super().create_model_card(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as Trainer does, with the seconds trained, and SAD and flip rate since the last training log.

        The seconds go on from the log of the checkpoint where a run resumes.
        """
        of_training = "loss" in logs or "train_loss" in logs  # while it runs, and at its end
        if of_training:
            if self._seconds_before is None:
                logged = (entry.get("train_seconds", 0.0) for entry in self.state.log_history)
                self._seconds_before = max(logged, default=0.0)
            logs["train_seconds"] = self._seconds_before + time.perf_counter() - self._began
        if of_training and self.sparse_step is not None:
            flips = self.sparse_step.take_flips()
            if flips:
                total = Flips(sum(f.sad for f in flips.values()), sum(f.weights for f in flips.values()))
                logs["sad"], logs["flip_rate"] = total.sad, total.rate
                if self.args.sparse_log_layers:
                    logs.update({f"sad/{name}": layer.sad for name, layer in flips.items()})
                    logs.update({f"flip_rate/{name}": layer.rate for name, layer in flips.items()})
                    for name, state in self.sparse_step.layer_states().items():
                        logs.update({f"kept/{name}": state.kept, f"pruned/{name}": state.pruned})
                        if state.changed is not None:
                            logs[f"changed/{name}"] = state.changed
        super().log(logs, start_time)


def _make_ready(model: nn.Module) -> None:
    """Turns the layers of a model that was loaded packed into those that train; below adapters they stay as they are.

    Raises:
        ValueError: The model is wrapped.
    """
    if unwrapped(model) is not model:
        raise ValueError(
            f"SparseTrainer: wraps the model itself, got a {type(model).__name__}; give the model that is inside, and "
            "torch_compile=True where it is to be compiled"
        )
    if (
        isinstance(model, PreTrainedModel)
        and getattr(model, "quantization_method", None) == "nmsparse"
        and not has_adapters(model)
    ):
        prepare_for_training(model)


def last_whole_checkpoint(output_dir: str | Path | None) -> str | None:
    """The folder ``checkpoint-STEP`` with the highest step that was written to its end, None if there is none.

    Trainer writes its state last, so that a folder whose state can be read is whole; what a kill leaves of another is
    passed over, and written again when the run comes to its step.
    """
    return next((str(folder) for folder in reversed(checkpoints(output_dir or ".")) if _is_whole(folder)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):
        return False
    return True


def _last_word(error: Exception) -> Exception:
    """What torch says of a process that has reset a pipe to this one: its signal comes a moment after."""
    if isinstance(error, ConnectionResetError):
        try:
            time.sleep(_SIGNAL_SECONDS)
        except RuntimeError as told:  # by torch's handler of the signal
            return told
    return error


def _who_is_gone(error: Exception) -> str | None:
    """In words, where torch says that another process is gone; None where it says something else."""
    reason = str(error).partition("\n")[0].rstrip(". ")
    if reason.startswith(_WORKER_GONE):
        return f"a process that reads the data is gone ({reason})"
    if _GLOO in reason or isinstance(error, getattr(torch.distributed, "DistError", ())):
        return f"another training process does not answer ({reason.partition('. ')[0]})"  # gloo adds advice
    return None


@contextmanager
def _tied_together(model: Any) -> Iterator[None]:
    """Keeps accelerate from sharding the model's embedding and its head apart from the rest.

    The embeddings of encoder and decoder, tied to both, would be in another group, which torch refuses.
    """
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """The labels shifted right, as the model itself does it where it can.

    M2M100 and NLLB have no method for it and follow BART's rule: the start token first, padding for -100.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        # A copy: FSMT writes padding over -100 in what it is given, and would count it as a target.
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels.clone())
        return shifted
    shifted = labels.roll(1, dims=-1)
    shifted[..., 0] = model.config.decoder_start_token_id
    return shifted.masked_fill(shifted == -100, model.config.pad_token_id)


@dataclass
class _Shifts:
    """Stands for a model in a collator, which asks it for `decoder_inputs` and nothing else."""

    model: Any

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return decoder_inputs(self.model, labels)


def is_stream(dataset: Any) -> bool:
    """Whether a dataset is read from its beginning to its end, and not by the number of a row."""
    by_number = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return isinstance(dataset, IterableDataset) or not by_number


def is_table(dataset: Any) -> bool:
    """Whether it is a ``datasets.Dataset``; that package need not be installed."""
    return hasattr(dataset, "select_columns") and hasattr(dataset, "__len__")


def pair_lengths(dataset: Any) -> tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]:
    """Tokens of the source and target sentences of a tokenised dataset, from its length columns if it has them.

    Args:
        dataset: A `datasets.Dataset`, a list of mappings, or what else has a length and gives rows by their number.

    Raises:
        ValueError: The rows have neither the length columns nor ``input_ids`` and ``labels``, or no numbers.
    """
    first = _row(dataset, 0) if len(dataset) else None
    known = isinstance(first, Mapping) and {"source_length", "target_length"} <= first.keys()
    if known and is_table(dataset):  # millions of numbers, which row by row would take minutes
        read = dataset.select_columns(["source_length", "target_length"]).with_format("numpy")[:]
        return read["source_length"], read["target_length"]
    rows = (_row(dataset, number) for number in range(len(dataset)))  # not all datasets of torch end an iteration
    pairs = [(int(row["source_length"]), int(row["target_length"])) if known else pair_length(row) for row in rows]
    return [source for source, _ in pairs], [target for _, target in pairs]


def _row(dataset: Any, number: int) -> Any:
    try:
        return dataset[number]
    except KeyError as error:
        raise ValueError(
            f"tokens_per_batch: rows are read by their number, from 0, and this {type(dataset).__name__} has no row "
            f"{number}; give a list of rows, or one split of a datasets.Dataset"
        ) from error


class Preempted(SystemExit):
    """The training was ended by SIGTERM after it had saved; uncaught, it ends the process with status 143."""

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption(TrainerCallback):
    """Ends a training at SIGTERM: after the step that is being taken, with a checkpoint.

    Attributes:
        stopped: Whether it has.
    """

    EVERY = 10
    """Steps between two looks at the other processes, which need not have had the signal in the same step."""

    def __init__(self) -> None:
        self.asked = self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signal while it lasts; Python leaves that to the main thread."""
        self.asked = self.stopped = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        asked = self.asked
        if args.world_size > 1:
            if state.global_step % self.EVERY:
                return
            votes = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(votes)
            asked = bool(votes)
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


class _Start(TrainerCallback):
    """Tells what hooks into the optimizer that the weights are in place, where the run is and how long it will be."""

    def __init__(self, trainer: SparseTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        sparse_step = self.trainer.sparse_step
        if sparse_step is not None:
            # A checkpoint's own count leaves out the steps that a loss scaler skipped.
            resumed = bool(state.global_step and sparse_step.step)
            sparse_step.start(sparse_step.step if resumed else state.global_step, state.max_steps)
        if self.trainer._padding is not None:
            self.trainer._padding.attach()


class _Totals(TrainerCallback):
    """Keeps what is logged of each layer from the console."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        totals = {key: value for key, value in (logs or {}).items() if "/" not in key}
        super().on_log(args, state, control, logs=totals, **kwargs)


class _TotalsProgress(_Totals, ProgressCallback):
    """Trainer's progress bar."""


class _TotalsPrinter(_Totals, PrinterCallback):
    """What Trainer prints where there is no progress bar."""
