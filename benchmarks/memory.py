"""How much memory a training step needs at its peak: dense, and with each method that keeps something of its own.

    python -m benchmarks.memory --note "what else the machine was doing"

Two figures for each candidate, for a model with the shape of Marian-base in fp32 under AdamW and three sizes of batch,
the last that of the WMT14 recipe. What the tensors hold is counted from torch's record of each allocation and is the
same every time. What a process holds in all is read from the system, a process each, in turns; what the allocator
leaves between the tensors makes equal trainings differ by a few percent there, so that medians are shown with their
spread. It takes about twenty minutes and writes benchmarks/results/memory.json and a table beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import tables, timing
from benchmarks.peak import peak_mib
from benchmarks.training import trainer
from hf_nmsparse.layers import NMLinear

CANDIDATES = ("dense", "dense, again", "2:4 SR-STE", "2:4 SR-STE, no native library")
BATCHES, LENGTH, STEPS = (16, 64, 98), 32, 3


def train(name: str, batch: int, tiny: bool) -> float:
    """Takes the steps; what the masks take, in MiB."""
    torch.set_num_threads(1)
    model, length = timing.marian(tiny), 4 if tiny else LENGTH
    tokens = torch.randint(2, model.config.vocab_size - 1, (2, batch, length))
    inputs = {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0]), "labels": tokens[1]}
    step = trainer(model, name.startswith("2:4"), inputs, kernels="no native" not in name)
    for _ in range(STEPS):
        step()
    layers = [layer for layer in model.modules() if isinstance(layer, NMLinear)]
    return sum(layer.mask.numel() for layer in layers if layer.mask is not None) / 2**20


def of_tensors(name: str, batch: int, tiny: bool) -> dict[str, float]:
    """The most that the tensors of the training held, and the masks among them, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        masks = train(name, batch, tiny)
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = max(accumulate(event.nbytes() for event in events))
    return {"tensors_mib": round(peak / 2**20, 2), "masks_mib": round(masks, 2)}


def of_process(name: str, batch: int, tiny: bool) -> float:
    """The most that this process has held, in MiB."""
    train(name, batch, tiny)
    return peak_mib()


MEASURES: dict[str, Callable[[str, int, bool], Any]] = {"tensors": of_tensors, "process": of_process}


def in_a_process(measure: str, name: str, batch: int, tiny: bool) -> Any:
    """What the measure gives in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", *["--tiny"] * tiny, "--one", measure, name, str(batch)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def rows_of(batch: int, tiny: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each candidate."""
    found: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for name in timing.turns(CANDIDATES, rounds):
        found[name].append(round(in_a_process("process", name, batch, tiny), 1))
    for name, peaks in found.items():
        process = {"process_mib": statistics.median(peaks), "range_mib": [min(peaks), max(peaks)]}
        yield {"what": name, "batch": batch, **in_a_process("tensors", name, batch, tiny), **process}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each candidate; medians are over these")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", default=timing.RESULTS / "memory.json", type=Path, help="a table goes beside")
    parser.add_argument("--tiny", action="store_true", help="a very small model: tries the script")
    parser.add_argument("--one", nargs=3, metavar=("MEASURE", "NAME", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure, name, batch = options.one
        print(json.dumps(MEASURES[measure](name, int(batch), options.tiny)))
        return
    machine, rows = timing.machine(), []
    for size in BATCHES:
        for row in rows_of(size, options.tiny, options.rounds):
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
    timing.write(options.output, record, rows, tables.memory_of(record | {"rows": rows}))
    print(options.output)


if __name__ == "__main__":
    main()
