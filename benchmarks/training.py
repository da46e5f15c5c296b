"""What sparsity costs in training: a step of a dense model and of 2:4 SR-STE, interleaved in one process.

    python -m benchmarks.training --note "what else the machine was doing"

It takes about five minutes on two cores and writes benchmarks/results/training.json and a table beside it. A step is
forward, loss with label smoothing, backward, clipping and fused AdamW, as the recipe takes it, on 16 pairs of 32 tokens
for a model with the shape of Marian-base in fp32. Each candidate has a model of its own, of the same weights: dense,
dense once more, which shows how far two equal steps are apart, and 2:4 with SR-STE, with the native library and, as it
is where no compiler was found, without it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import MarianMTModel

from benchmarks import tables, timing
from hf_nmsparse import NMSparseConfig, SparseStep, sparsify
from hf_nmsparse.kernels import cuda, library, native
from hf_nmsparse.losses import token_loss

BATCH, LENGTH = 16, 32
DENSE = "dense"


def trainer(
    model: MarianMTModel,
    sparse: bool,
    batch: dict[str, Tensor],
    kernels: bool = True,
    autocast: torch.dtype | None = None,
) -> Callable[[], None]:
    """A training step, to be called again and again; without ``kernels`` as if none were installed."""
    if sparse:
        sparsify(model, NMSparseConfig("2:4"))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, fused=True
    )
    if sparse:
        SparseStep(model, optimizer, method="sr-ste")
    model.train()
    without = partial(mock.patch.multiple, unit_of(model), can_rank=lambda weight: False)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext if kernels else without

    def step() -> None:
        with context():
            with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
                loss = token_loss(model(**batch), batch["labels"], label_smoothing=0.1)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def unit_of(model: MarianMTModel) -> ModuleType:
    """Whose kernels rank this model's weights."""
    return cuda if model.device.type == "cuda" else native


def overhead(seconds: list[float], dense: list[float]) -> float:
    return statistics.median(seconds) / statistics.median(dense) - 1


def interval(seconds: list[float], dense: list[float]) -> tuple[float, float]:
    """95% interval of the overhead by paired bootstrap over the rounds."""

    def draw(draws: random.Random) -> float:
        drawn = draws.choices(range(len(dense)), k=len(dense))
        return overhead([seconds[i] for i in drawn], [dense[i] for i in drawn])

    return timing.bootstrap(draw)


def main() -> None:
    parser = timing.arguments(__doc__, rounds=21)
    parser.add_argument("--tiny", action="store_true", help="a very small model: tries the script")
    options = parser.parse_args()
    machine = timing.machine()  # before this run is its load
    if library.status().unit is None:
        raise SystemExit(f"training: {library.status().reason}")

    models = [timing.marian(options.tiny) for _ in range(4)]
    tokens = torch.randint(2, models[0].config.vocab_size - 1, (2, BATCH, LENGTH))
    batch = {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0]), "labels": tokens[1]}
    steps = {
        DENSE: trainer(models[0], False, batch),
        "dense, again": trainer(models[1], False, batch),
        "2:4 SR-STE": trainer(models[2], True, batch),
        "2:4 SR-STE, no native library": trainer(models[3], True, batch, kernels=False),
    }
    rows = []
    for threads in options.threads:
        with timing.torch_threads(threads):
            timing.in_turns(steps, 2)  # warms up
            seconds = timing.in_turns(steps, options.rounds)
        dense = seconds[DENSE]
        row = {
            name: {
                "median_ms": round(statistics.median(taken) * 1000, 2),
                "overhead": round(overhead(taken, dense), 4),
                "interval": interval(taken, dense),
            }
            for name, taken in seconds.items()
        }
        rows.append({"threads": threads, "steps": row})
        for name, step in row.items():
            change = f"{step['overhead']:+.1%} {step['interval']}"
            print(f"{threads} threads, {name}: {step['median_ms']} ms, {change}", flush=True)

    record = {
        "benchmark": "training step, medians of interleaved steps",
        **machine,
        "model": timing.describe(models[0]),
        "batch": BATCH,
        "length": LENGTH,
        "optimizer": "fused AdamW",
        "rounds": options.rounds,
        "seed": 0,
        "note": options.note,
    }
    output = options.output or timing.RESULTS / "training.json"
    timing.write(output, record, rows, tables.training_of(record | {"rows": rows}))
    print(output)


if __name__ == "__main__":
    main()
