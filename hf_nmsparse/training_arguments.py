"""SparseTrainingArguments: what a sparse run can be told, and what does not go together."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import Seq2SeqTrainingArguments

from hf_nmsparse.files import named_path
from hf_nmsparse.number_types import VALUE_DTYPES
from hf_nmsparse.optimizer import check_method
from hf_nmsparse.schedule import Schedule
from hf_nmsparse.sparsity_record import one_of
from hf_nmsparse.srste import METHODS

__all__ = ["DENSE", "SparseTrainingArguments"]

DENSE = "dense"


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
        named_path(str(self.output_dir), "output_dir")
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
