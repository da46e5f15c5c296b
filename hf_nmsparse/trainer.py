"""SparseTrainer: Seq2SeqTrainer for N:M layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
)
from transformers.trainer_utils import EvalLoopOutput, seed_worker

from hf_nmsparse.batching import TokenBatchSampler, TokenBatchStream, is_stream, is_table, pair_lengths
from hf_nmsparse.generation import while_unchanged
from hf_nmsparse.loading import load_seq2seq
from hf_nmsparse.losses import Shifts, decoder_inputs, distillation_loss, token_loss
from hf_nmsparse.trainer_mixin import SparseTrainerMixin
from hf_nmsparse.training_arguments import SparseTrainingArguments

__all__ = ["SparseTrainer"]


class SparseTrainer(SparseTrainerMixin, Seq2SeqTrainer):
    """A Seq2SeqTrainer that trains the N:M layers of a model after `sparsify`.

    Beside what `SparseTrainerMixin` does, it batches by tokens if asked to, distils from a teacher if there is one, and
    normalises the loss of encoder-decoder models by the target tokens of the whole step: Marian, T5, BART, mBART and
    M2M100 take a plain mean and leave that to nobody, so that gradients would grow with accumulation steps and
    processes.

    Args:
        model: As `SparseTrainerMixin` takes it.
        args: The arguments.
        **kwargs: As `transformers.Seq2SeqTrainer` takes them. With a tokenizer as ``processing_class`` and no
            ``data_collator``, sentence pairs are padded by a ``DataCollatorForSeq2Seq``.

    Raises:
        ValueError: The method and the model do not fit each other, or the model is wrapped, which Trainer does itself.
    """

    translates = True

    def __init__(
        self, model: nn.Module | None = None, args: SparseTrainingArguments | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, args, **kwargs)
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
            self.data_collator = replace(self.data_collator, model=Shifts(self.data_collator.model))
        self.teacher = self._load_teacher() if self.args.distill_from is not None else None
        self._teacher_logits: Tensor | None = None
        self._taught = False

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
        self._taught = True
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

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's step; a subclass whose loss leaves the teacher out is refused before the weights are touched."""
        loss = super().training_step(*args, **kwargs)
        if self.teacher is not None and not self._taught:
            raise ValueError(
                f"distill_from: {type(self).__name__} computes a loss without the teacher's; in a compute_loss of your "
                "own begin with super().compute_loss, or leave distill_from out"
            )
        return loss

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

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's; where ``predict_with_generate`` translates, the native engine does it if it can."""
        with while_unchanged(self.model):
            return super().evaluation_loop(*args, **kwargs)
