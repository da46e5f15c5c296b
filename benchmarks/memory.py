"""How much memory a training step needs at its peak: dense, and with each method that keeps something of its own.

    python -m benchmarks.memory --note "what else the machine was doing"

Each candidate takes a few steps in a process of its own, and the most memory that it held is read from the system, for
a model with the shape of Marian-base in fp32 under AdamW, at two sizes of batch. It takes about five minutes and writes
benchmarks/results/memory.json and a table beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.training import trainer
from hf_nmsparse.layers import NMLinear
from recipes import results_table

CANDIDATES = ("dense", "dense, again", "2:4 SR-STE", "2:4 SR-STE, no native library")
BATCHES, LENGTH, STEPS = (16, 64), 32, 3


def measure(name: str, batch: int, tiny: bool) -> dict[str, Any]:
    """Takes the steps; MiB before them, at the peak, and what the masks take of it."""
    torch.set_num_threads(1)
    model, length = timing.marian(tiny), 4 if tiny else LENGTH
    tokens = torch.randint(2, model.config.vocab_size - 1, (2, batch, length))
    inputs = {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0]), "labels": tokens[1]}
    step = trainer(model, name.startswith("2:4"), inputs, kernels="no native" not in name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(STEPS):
        step()
    layers = [layer for layer in model.modules() if isinstance(layer, NMLinear)]
    return {
        "what": name,
        "batch": batch,
        "before_mib": round(before / 1024, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "masks_mib": round(sum(layer.mask.numel() for layer in layers if layer.mask is not None) / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", default=timing.RESULTS / "memory.json", type=Path, help="a table goes beside")
    parser.add_argument("--tiny", action="store_true", help="a very small model: tries the script")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    tiny = ["--tiny"] if options.tiny else []
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.tiny)))
        return
    machine, rows = timing.machine(), []
    for batch in BATCHES:
        for name in CANDIDATES:
            command = [sys.executable, "-m", "benchmarks.memory", *tiny, "--one", name, str(batch)]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(process.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    record = {
        "benchmark": "peak memory of a training step",
        **machine,
        "model": timing.describe(timing.marian(options.tiny)),
        "length": LENGTH,
        "steps": STEPS,
        "optimizer": "fused AdamW",
        "seed": 0,
        "note": options.note,
    }
    timing.write(options.output, record, rows, results_table.memory_of(record | {"rows": rows}))
    print(options.output)


if __name__ == "__main__":
    main()
