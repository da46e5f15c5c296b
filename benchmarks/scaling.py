"""What a second CPU process brings: tokens a second of SR-STE under DDP on gloo, one thread each.

    python -m benchmarks.scaling --note "what else the machine was doing"

The model has the shape of recipes/configs/multi30k_tiny.yaml and random weights, on batches of 4,096 tokens a process.
Trainings of one and of two processes take turns. It takes about five minutes on two cores and writes
benchmarks/results/scaling.json and a table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, TrainerCallback
from transformers.utils import logging

from benchmarks import tables, timing
from benchmarks.methods import pairs, transformer
from hf_nmsparse import NMSparseConfig, SparseTrainer, SparseTrainingArguments, sparsify
from hf_nmsparse.tokenizer import train_tokenizer

WARM_UP, TOKENS, METHOD = 5, 4_096, "sr-ste"


class _Times(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def train(steps: int, tiny: bool, folder: str) -> None:
    """One process of a training; the first prints the median time of its steps."""
    logging.set_verbosity_error()
    vocabulary, d_model, layers, tokens = (300, 32, 1, 256) if tiny else (6_000, 128, 4, TOKENS)
    model, times = transformer(vocabulary, d_model, layers), _Times()
    sparsify(model, NMSparseConfig("2:4"))
    args = SparseTrainingArguments(
        output_dir=folder,
        max_steps=steps + WARM_UP,
        tokens_per_batch=tokens,
        label_smoothing_factor=0.1,
        sparse_method=METHOD,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    tokenizer = train_tokenizer(["a tokenizer that only pads"] * 2, 300, 64)
    trainer = SparseTrainer(
        model=model,
        args=args,
        train_dataset=pairs(tokens // 26 * 2 * (steps + WARM_UP + 1), vocabulary),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        callbacks=[times],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        taken = [
            after - before for before, after in zip(times.times[WARM_UP - 1 :], times.times[WARM_UP:], strict=False)
        ]
        print(json.dumps({"seconds": statistics.median(taken)}))


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each number of processes")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a training")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, default=timing.RESULTS / "scaling.json", help="a table goes beside it")
    parser.add_argument("--tiny", action="store_true", help="a very small model: tries the script")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of one process of a training
    options = parser.parse_args()
    if options.folder:
        train(options.steps, options.tiny, options.folder)
        # Gloo's threads abort now and then where Python's own end takes them down.
        sys.stdout.flush()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        os._exit(0)
    machine = timing.machine()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for processes, taken in seconds.items():
                command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
                command += ["--nproc_per_node", str(processes), "-m", "benchmarks.scaling", "--folder", folder]
                command += ["--steps", str(options.steps), *(["--tiny"] if options.tiny else [])]
                done = subprocess.run(
                    command,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    cwd=Path(__file__).parents[1],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                [line] = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
                taken.append(json.loads(line)["seconds"])
                print(processes, taken[-1], flush=True)
    rows = [
        {"processes": processes, "step_ms": round(statistics.median(taken) * 1000, 1)}
        for processes, taken in seconds.items()
    ]
    record = {
        "benchmark": "steps under DDP on gloo, medians over trainings of the medians over steps",
        **machine,
        "method": METHOD,
        "batch": f"{TOKENS:,} source and target tokens",
        "rounds": options.rounds,
        "steps": options.steps,
        "note": options.note,
    }
    timing.write(options.output, record, rows, tables.scaling_of(record | {"rows": rows}))
    print(options.output)


if __name__ == "__main__":
    main()
