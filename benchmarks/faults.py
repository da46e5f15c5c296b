"""Kills trainings at random moments and checks that each, started again, ends with the bytes of an undisturbed one.

    python -m benchmarks.faults

A training of a small model with dropout saves a checkpoint every second step, then packs the model. Each trial waits
for one of its moments (a step, a checkpoint being written, the packing), sleeps for a random part of its length, and
sends SIGKILL. What is left must be a whole packed model or none, and the same training, started again in the same
folder, must end with the same weights, bit for bit, and the same packed file. It takes a few minutes and writes
benchmarks/results/faults.json and a table beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TrainerCallback
from transformers.utils import logging

from benchmarks import tables, timing
from benchmarks.methods import pairs, transformer
from hf_nmsparse import NMSparseConfig, SparseTrainer, SparseTrainingArguments, save_packed, sparsify
from hf_nmsparse.checkpoints import last_complete_checkpoint
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.tokenizer import train_tokenizer

STEPS, VOCABULARY = 12, 300
MOMENTS = ("training", "checkpoint", "packing")

Tell = Callable[[str], None]


class _Steps(TrainerCallback):
    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.tell("training")


class _Told(SparseTrainer):
    tell: Tell

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.tell("checkpoint")
        super()._save_checkpoint(*args, **kwargs)


def train(folder: Path, data: Dataset, tokenizer: Any, tell: Tell) -> None:
    """The whole training, from its last checkpoint if there is one, and the packing; tells of each moment."""
    model = transformer(VOCABULARY, 32, 1)
    sparsify(model, NMSparseConfig("2:4"))
    args = SparseTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        label_smoothing_factor=0.1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        logging_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = _Told(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        callbacks=[_Steps(tell)],
    )
    trainer.tell = tell
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    tell("packing")
    save_packed(model, folder / "packed", values="bf16")
    tell("end")


def in_child(folder: Path, data: Dataset, tokenizer: Any) -> tuple[int, int]:
    """Starts `train` in a process of its own.

    Returns:
        Its number, and a pipe on which it tells of each moment, a line each.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    try:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        torch.manual_seed(0)
        train(folder, data, tokenizer, lambda moment: os.write(writer, f"{moment}\n".encode()) and None)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def moments(reader: int, until: tuple[str, int] | None = None) -> list[tuple[str, float]]:
    """Moments told so far and when, up to the given occurrence of one, or to the end of the process."""
    found: list[tuple[str, float]] = []
    with os.fdopen(os.dup(reader)) as lines:
        for line in lines:
            found.append((line.strip(), time.perf_counter()))
            if until is not None and [name for name, _ in found].count(until[0]) == until[1]:
                break
    return found


def run(folder: Path, data: Dataset, tokenizer: Any) -> list[tuple[str, float]]:
    """An undisturbed training; its moments.

    Raises:
        RuntimeError: It failed.
    """
    child, reader = in_child(folder, data, tokenizer)
    found = moments(reader)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"faults: the training in {folder} failed with status {status}")
    return found


def digest(folder: Path) -> dict[str, str]:
    """Hashes of what must be the same: the last dense masters and the packed model."""
    files = [folder / f"checkpoint-{STEPS}" / "model.safetensors", *sorted((folder / "packed").iterdir())]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def lengths(found: list[tuple[str, float]]) -> dict[str, float]:
    """How long each kind of moment lasted, at most."""
    longest: dict[str, float] = {}
    for (name, start), (_, end) in pairwise(found):
        longest[name] = max(longest.get(name, 0.0), end - start)
    return longest


def main() -> None:
    """Kills, and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, default=timing.RESULTS / "faults.json", help="a table goes beside it")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # a process with more could not fork
    machine, draws = timing.machine(), random.Random(0)
    data = pairs(64, VOCABULARY)
    tokenizer = train_tokenizer(["a tokenizer that only pads"] * 2, VOCABULARY, 64)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = run(Path(scratch) / "undisturbed", data, tokenizer)
        expected, longest = digest(Path(scratch) / "undisturbed"), lengths(whole)
        times = {moment: [name for name, _ in whole].count(moment) for moment in MOMENTS}
        for trial in range(options.kills):
            folder, moment = Path(scratch) / str(trial), MOMENTS[trial % len(MOMENTS)]
            occurrence, delay = draws.randint(1, times[moment]), draws.random() * longest[moment]
            child, reader = in_child(folder, data, tokenizer)
            moments(reader, (moment, occurrence))
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            packed = folder / "packed"
            if (packed / "config.json").exists():
                check_folder(packed)
            left = last_complete_checkpoint(folder)
            run(folder, data, tokenizer)
            row = {
                "moment": moment,
                "occurrence": occurrence,
                "delay_ms": round(delay * 1000, 1),
                "resumed_from": 0 if left is None else int(left.rpartition("-")[2]),
                "identical": digest(folder) == expected,
            }
            rows.append(row)
            print(row, flush=True)
    record = {"benchmark": "trainings killed at random moments", **machine, "seed": 0, "note": options.note}
    timing.write(options.output, record, rows, tables.faults_of(record | {"rows": rows}))
    print(options.output)
    if not all(row["identical"] for row in rows):
        sys.exit("faults: not every training ended as the undisturbed one")


if __name__ == "__main__":
    main()
