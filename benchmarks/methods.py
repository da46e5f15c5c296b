"""What SparseTrainer adds to a training step, and what each method does: steps of many trainings, taken in turns.

    python -m benchmarks.methods --note "what else the machine was doing"

It takes about twenty-five minutes and writes benchmarks/results/methods.json and a table beside it. The model is the
Transformer-Tiny of recipes/configs/multi30k_tiny.yaml with random weights, the pairs are random tokens of lengths like
those of Multi30k, cut into batches as the recipe cuts them. The bare loop is what one would write by hand on the same
batches, collated before it starts: forward, loss with label smoothing, backward, clipping, fused AdamW, schedule of the
rate. It has the package's loss, once more the same, which shows how far two equal loops are apart, and torch's. Each
training runs in a process of its own, as trainings do, and takes a step when it is its turn, on one core. The processes
keep the memory that they free, as the recipe's do, but for one that shows what this is worth. Equal processes differ by
a few percent for as long as they live, by where in memory they came to lie, so that all of them are started several
times.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, MarianConfig, MarianMTModel, TrainerCallback, get_scheduler
from transformers.utils import logging

from benchmarks import tables, timing
from hf_nmsparse import NMSparseConfig, SparseTrainer, SparseTrainingArguments, sparsify
from hf_nmsparse.allocator import keep_freed_memory
from hf_nmsparse.losses import token_loss
from hf_nmsparse.srste import METHODS
from hf_nmsparse.tokenizer import train_tokenizer

Loss = Callable[[Any, Tensor], Tensor]
Wait = Callable[[], None]
Seconds = dict[str, list[float]]
BARE, DENSE = "bare loop", "dense"
WARM_UP = 2

# What `Setting.trainer` takes: every method, then the other runs of recipes/studies.
RUNS: list[dict[str, Any]] = [
    *({"method": method} for method in (DENSE, *METHODS)),
    *({"method": "sr-ste", "pattern": pattern} for pattern in ("4:8", "1:4", "2:8", "1:16")),
    {"method": "sr-ste", "targets": ("fc1", "fc2")},
    *({"method": method, "distilled": True} for method in (DENSE, "sr-ste")),
]


class Training:
    """A training in a process of its own, which takes one step a call.

    Args:
        train: Trains, and calls its argument after every step; it travels to the process as a pickle.
    """

    def __init__(self, train: Callable[[Wait], None]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imports once for all of them
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(train, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self) -> None:
        """Takes the next step."""
        self._pipe.send(None)
        failure = self._pipe.recv()
        if failure is not None:
            raise RuntimeError(failure)

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _train(train: Callable[[Wait], None], pipe: Connection) -> None:
    def wait() -> None:
        pipe.send(None)
        pipe.recv()

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    pipe.recv()
    try:
        train(wait)
        failure = "the training ended before the benchmark"
    except Exception:
        failure = traceback.format_exc()
    pipe.send(failure)


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


class Setting(NamedTuple):
    """What the trainings have in common."""

    vocabulary: int
    d_model: int
    layers: int
    tokens: int
    steps: int
    folder: Path

    def model(self) -> MarianMTModel:
        """The same weights in every call."""
        return transformer(self.vocabulary, self.d_model, self.layers)

    def trainer(
        self, method: str, pattern: str = "2:4", targets: tuple[str, ...] | None = None, distilled: bool = False
    ) -> SparseTrainer:
        """The recipe's trainer, which has more steps before it than are taken."""
        args = SparseTrainingArguments(
            output_dir=str(self.folder),
            num_train_epochs=2,
            tokens_per_batch=self.tokens,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=600,
            adam_beta2=0.98,
            adam_epsilon=1e-9,
            label_smoothing_factor=0.1,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            sparse_method=method,
            distill_from=str(self.folder / "teacher") if distilled else None,
        )
        model = self.model()
        if method != DENSE:
            sparsify(model, NMSparseConfig(pattern, targets=targets, soft=METHODS[method].soft))
        tokenizer = train_tokenizer(["a tokenizer that only pads"] * 2, 300, 64)
        data = pairs(self.tokens // 26 * (self.steps + 1), self.vocabulary)
        collator = DataCollatorForSeq2Seq(tokenizer, model=model)
        return SparseTrainer(model=model, args=args, train_dataset=data, data_collator=collator)


def by_hand(setting: Setting, loss_of: Loss, wait: Wait) -> None:
    """The bare loop."""
    keep_freed_memory()
    batches, model = list(setting.trainer(DENSE).get_train_dataloader()), setting.model()
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


def by_trainer(setting: Setting, run: dict[str, Any], keep: bool, wait: Wait) -> None:
    """The recipe's training."""
    if keep:
        keep_freed_memory()
    trainer = setting.trainer(**run)
    trainer.add_callback(_Turns(wait))
    trainer.train()


def candidates(setting: Setting) -> dict[str, Training]:
    """The trainings, by the names that the table has for them."""
    losses = {BARE: our_loss, f"{BARE}, again": our_loss, f"{BARE}, torch's loss": torchs_loss}
    found: dict[str, Callable[[Wait], None]] = {name: partial(by_hand, setting, loss) for name, loss in losses.items()}
    found |= {tables.training_name(**run): partial(by_trainer, setting, run, True) for run in RUNS}
    found[f"{DENSE}, freed memory goes back"] = partial(by_trainer, setting, {"method": DENSE}, False)
    return {name: Training(train) for name, train in found.items()}


def steps(trainings: dict[str, Training], rounds: int) -> Seconds:
    """Seconds of steps that the trainings take in turns; their processes end with it."""
    try:
        timing.in_turns(trainings, WARM_UP)
        return timing.in_turns(trainings, rounds)
    finally:
        for training in trainings.values():
            training.stop()


def median(starts: list[Seconds], name: str) -> float:
    """The median step of a training, the mean over its processes."""
    return statistics.mean(statistics.median(seconds[name]) for seconds in starts)


def overhead(starts: list[Seconds], name: str, base: str) -> float:
    """How much longer a step takes than one of ``base``, as a fraction."""
    return median(starts, name) / median(starts, base) - 1


def interval(starts: list[Seconds], name: str, base: str) -> tuple[float, float]:
    """95% interval of the overhead by bootstrap, over the starts and over the rounds of each."""

    def draw(draws: random.Random) -> float:
        drawn = []
        for seconds in draws.choices(starts, k=len(starts)):
            rounds = draws.choices(range(len(seconds[base])), k=len(seconds[base]))
            drawn.append({key: [seconds[key][i] for i in rounds] for key in {name, base}})
        return overhead(drawn, name, base)

    return timing.bootstrap(draw)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=6, help="how often all processes are started")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each training and start")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, default=timing.RESULTS / "methods.json", help="a table goes beside it")
    parser.add_argument("--tiny", action="store_true", help="a very small model: tries the script")
    options = parser.parse_args()
    machine = timing.machine()  # before this run is its load
    vocabulary, d_model, layers, tokens = (300, 32, 1, 256) if options.tiny else (6_000, 128, 4, 4_096)
    starts: list[Seconds] = []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(vocabulary, d_model, layers, tokens, options.rounds + WARM_UP, Path(folder))
        setting.model().save_pretrained(setting.folder / "teacher")
        for _ in range(options.starts):
            starts.append(steps(candidates(setting), options.rounds))
    rows = []
    for name in starts[0]:
        row: dict[str, Any] = {"name": name, "median_ms": round(median(starts, name) * 1000, 2)}
        for key, base in (("to_bare", BARE), ("to_dense", DENSE)):
            row[key] = [round(overhead(starts, name, base), 4), *interval(starts, name, base)]
        rows.append(row)
        print(row, flush=True)
    record = {
        "benchmark": "steps of whole trainings, medians of interleaved steps",
        **machine,
        "model": f"Transformer of {layers}+{layers} layers, d {d_model}, vocabulary {vocabulary:,}, random weights",
        "batch": f"{tokens:,} source and target tokens",
        "threads": 1,
        "optimizer": "fused AdamW",
        "starts": options.starts,
        "rounds": options.rounds,
        "seed": 0,
        "note": options.note,
    }
    timing.write(options.output, record, rows, tables.methods_of(record | {"rows": rows}))
    print(options.output)


if __name__ == "__main__":
    main()
