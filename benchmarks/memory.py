"""How much memory a training step needs at its peak: dense, and with each method that keeps something of its own.

    python -m benchmarks.memory --note "what else the machine was doing"

Each candidate takes a few steps in a process of its own, and the most memory that it held is read from the system, for
a model with the shape of Marian-base in fp32 under AdamW, at two sizes of batch. What the allocator leaves between its
blocks differs from process to process by a hundredth, so that each has several, in turns, and medians are compared. It
takes about ten minutes and writes benchmarks/results/memory.json and a table beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.training import trainer
from hf_nmsparse.layers import NMLinear
from recipes import results_table

CANDIDATES = ("dense", "dense, again", "2:4 SR-STE", "2:4 SR-STE, no native library")
BATCHES, LENGTH, STEPS = (16, 64), 32, 3


def measure(name: str, batch: int, tiny: bool) -> tuple[float, float]:
    """Takes the steps; the most memory of this process and what the masks take of it, in MiB."""
    torch.set_num_threads(1)
    model, length = timing.marian(tiny), 4 if tiny else LENGTH
    tokens = torch.randint(2, model.config.vocab_size - 1, (2, batch, length))
    inputs = {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0]), "labels": tokens[1]}
    step = trainer(model, name.startswith("2:4"), inputs, kernels="no native" not in name)
    for _ in range(STEPS):
        step()
    layers = [layer for layer in model.modules() if isinstance(layer, NMLinear)]
    masks = sum(layer.mask.numel() for layer in layers if layer.mask is not None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, masks / 2**20


def in_processes(batch: int, tiny: bool, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """What `measure` gives for each candidate, in a new order each round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CANDIDATES}
    names, order = list(CANDIDATES), random.Random(0)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            command = [sys.executable, "-m", "benchmarks.memory", *["--tiny"] * tiny, "--one", name, str(batch)]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(process.stdout.splitlines()[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each candidate; medians are over these")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", default=timing.RESULTS / "memory.json", type=Path, help="a table goes beside")
    parser.add_argument("--tiny", action="store_true", help="a very small model: tries the script")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.tiny)))
        return
    machine, rows = timing.machine(), []
    for batch in BATCHES:
        for name, measured in in_processes(batch, options.tiny, options.rounds).items():
            peaks, masks = [peak for peak, _ in measured], measured[0][1]
            row = {"what": name, "batch": batch, "peak_mib": round(statistics.median(peaks), 1)}
            row |= {"range_mib": [round(min(peaks), 1), round(max(peaks), 1)], "masks_mib": round(masks, 1)}
            rows.append(row)
            print(row, flush=True)
    record = {
        "benchmark": "peak memory of a training step",
        **machine,
        "model": timing.describe(timing.marian(options.tiny)),
        "length": LENGTH,
        "steps": STEPS,
        "rounds": options.rounds,
        "optimizer": "fused AdamW",
        "seed": 0,
        "note": options.note,
    }
    timing.write(options.output, record, rows, results_table.memory_of(record | {"rows": rows}))
    print(options.output)


if __name__ == "__main__":
    main()
