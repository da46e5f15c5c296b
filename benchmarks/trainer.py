"""What SparseTrainer adds to a training step, and what each method does: steps taken in turns in one process.

    python -m benchmarks.trainer --note "what else the machine was doing"

It takes about ten minutes and writes benchmarks/results/trainer.json and a table beside it. The model is the
Transformer-Tiny of recipes/configs/multi30k_tiny.yaml with random weights, the pairs are random tokens of lengths like
those of Multi30k, cut into batches as the recipe cuts them. The bare loop is what one would write by hand on the same
batches, collated before it starts: forward, loss with label smoothing, backward, clipping, fused AdamW, schedule of the
rate. It has the package's loss, once more the same, which shows how far two equal loops are apart, and torch's. Each
training runs in a thread of its own and takes a step when it is its turn, on one core: torch gives every Python thread
a pool of its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, MarianConfig, MarianMTModel, TrainerCallback, get_scheduler
from transformers.utils import logging

from benchmarks import timing
from benchmarks.training import interval, overhead
from hf_nmsparse import NMSparseConfig, SparseTrainer, SparseTrainingArguments, sparsify
from hf_nmsparse.losses import token_loss
from hf_nmsparse.srste import METHODS
from hf_nmsparse.tokenizer import train_tokenizer
from recipes import results_table

Loss = Callable[[Any, Tensor], Tensor]
Wait = Callable[[], None]
BARE, DENSE = "bare loop", "dense"
WARM_UP = 3

# The arguments of `trainer` in `candidates`: every method, then the other runs of recipes/studies.
RUNS: list[dict[str, Any]] = [
    *({"method": method} for method in (DENSE, *METHODS)),
    *({"method": "sr-ste", "pattern": pattern} for pattern in ("4:8", "1:4", "2:8", "1:16")),
    {"method": "sr-ste", "targets": ("fc1", "fc2")},
    *({"method": method, "distilled": True} for method in (DENSE, "sr-ste")),
]


class Training:
    """A training that takes one step a call.

    Args:
        train: Trains, and calls its argument after every step.
    """

    def __init__(self, train: Callable[[Wait], None]) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.failure: BaseException | None = None
        threading.Thread(target=self._run, args=(train,), daemon=True).start()

    def _run(self, train: Callable[[Wait], None]) -> None:
        self.go.acquire()
        torch.set_num_threads(1)  # of this thread
        try:
            train(self._wait)
            raise RuntimeError("the training ended before the benchmark")
        except BaseException as failure:
            self.failure = failure
        self.done.release()

    def _wait(self) -> None:
        self.done.release()
        self.go.acquire()

    def __call__(self) -> None:
        """Takes the next step."""
        self.go.release()
        self.done.acquire()
        if self.failure is not None:
            raise self.failure


class _Turns(TrainerCallback):
    def __init__(self, wait: Wait) -> None:
        self.wait = wait

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.wait()


def transformer(vocabulary: int, d_model: int, layers: int) -> MarianMTModel:
    """A model of the same weights in every call."""
    torch.manual_seed(0)
    sides = [("layers", layers), ("attention_heads", 4), ("ffn_dim", 2 * d_model)]
    settings: dict[str, Any] = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sides}
    settings |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    settings |= {"vocab_size": vocabulary, "d_model": d_model, "activation_function": "relu", "scale_embedding": True}
    return MarianMTModel(MarianConfig(**settings))


def pairs(count: int, vocabulary: int) -> Dataset:
    """Pairs of 7 to 25 random tokens, as many on either side."""
    generator = torch.Generator().manual_seed(0)

    def sentence(length: int) -> list[int]:
        return [*torch.randint(3, vocabulary, (length,), generator=generator).tolist(), 1]

    lengths = torch.randint(6, 25, (count,), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": sentence(length), "labels": sentence(length)} for length in lengths])


def our_loss(outputs: Any, labels: Tensor) -> Tensor:
    return token_loss(outputs, labels, label_smoothing=0.1)


def torchs_loss(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs["logits"].flatten(0, -2), labels.flatten(), label_smoothing=0.1)


def by_hand(model: MarianMTModel, batches: list[dict[str, Tensor]], loss_of: Loss, wait: Wait) -> None:
    """The bare loop."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, fused=True
    )
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=600, num_training_steps=10_000)
    model.train()
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        loss_of(model(**inputs), batch["labels"]).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        wait()


def by_trainer(trainer: SparseTrainer, wait: Wait) -> None:
    """The recipe's training."""
    trainer.add_callback(_Turns(wait))
    trainer.train()


def candidates(tiny: bool, steps: int, folder: Path) -> tuple[dict[str, Training], dict[str, Any]]:
    """The trainings, each with a model of the same weights, and what a reader has to know of them."""
    vocabulary, d_model, layers, tokens = (300, 32, 1, 256) if tiny else (6_000, 128, 4, 4_096)
    shape = (vocabulary, d_model, layers)
    tokenizer = train_tokenizer(["a tokenizer that only pads"] * 2, 300, 64)
    data = pairs(tokens // 26 * (steps + 1), vocabulary)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "tokens_per_batch": tokens,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 600,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-9,
        "label_smoothing_factor": 0.1,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }

    def trainer(
        method: str, pattern: str = "2:4", targets: tuple[str, ...] | None = None, distilled: bool = False
    ) -> SparseTrainer:
        model = transformer(*shape)
        if method != DENSE:
            sparsify(model, NMSparseConfig(pattern, targets=targets, soft=METHODS[method].soft))
        teacher = str(folder / "teacher") if distilled else None
        args = SparseTrainingArguments(**settings, sparse_method=method, distill_from=teacher)
        collator = DataCollatorForSeq2Seq(tokenizer, model=model)
        return SparseTrainer(model=model, args=args, train_dataset=data, data_collator=collator)

    transformer(*shape).save_pretrained(folder / "teacher")
    batches = list(trainer(DENSE).get_train_dataloader())
    found = {
        name: Training(partial(by_hand, transformer(*shape), batches, loss))
        for name, loss in {BARE: our_loss, f"{BARE}, again": our_loss, f"{BARE}, torch's loss": torchs_loss}.items()
    }
    found |= {results_table.training_name(**run): Training(partial(by_trainer, trainer(**run))) for run in RUNS}
    about = {
        "model": f"Transformer of {layers}+{layers} layers, d {d_model}, vocabulary {vocabulary:,}, random weights",
        "batch": f"{tokens:,} source and target tokens",
    }
    return found, about


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="steps of each training; medians are over these")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, default=timing.RESULTS / "trainer.json", help="a table goes beside it")
    parser.add_argument("--tiny", action="store_true", help="a very small model: tries the script")
    options = parser.parse_args()
    machine = timing.machine()  # before this run is its load
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        found, about = candidates(options.tiny, options.rounds + WARM_UP, Path(folder))
        timing.in_turns(found, WARM_UP)
        seconds = timing.in_turns(found, options.rounds)
    rows = []
    for name, taken in seconds.items():
        row: dict[str, Any] = {"name": name, "median_ms": round(statistics.median(taken) * 1000, 2)}
        for key, base in (("to_bare", BARE), ("to_dense", DENSE)):
            row[key] = [round(overhead(taken, seconds[base]), 4), *interval(taken, seconds[base])]
        rows.append(row)
        print(row, flush=True)
    record = {
        "benchmark": "steps of whole trainings, medians of interleaved steps",
        **machine,
        **about,
        "threads": 1,
        "optimizer": "fused AdamW",
        "rounds": options.rounds,
        "seed": 0,
        "note": options.note,
    }
    timing.write(options.output, record, rows, results_table.trainer_of(record | {"rows": rows}))
    print(options.output)


if __name__ == "__main__":
    main()
