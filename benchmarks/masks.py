"""How long the mask of a weight takes to find: argsort, topk and `magnitude_mask`, interleaved in one process.

    python -m benchmarks.masks --note "what else the machine was doing"

It prints a table of medians and writes them to benchmarks/results/masks.json. argsort is the approach of the released
SR-STE code, which scatters zeros to the M - N smallest magnitudes of each group. Of equal magnitudes neither argsort
nor topk promises which one goes; `magnitude_mask` does. Of transposable masks it takes the search in torch, that of the
library, and the library's mask along rows alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import timing
from hf_nmsparse.masks import magnitude_mask, pack_bits, transposable_mask
from hf_nmsparse.pattern import NMPattern

SHAPES = ((512, 512), (1024, 4096))
PATTERNS = ("2:4", "4:8", "1:16")
THREADS = (1, 2)
RESULTS = Path(__file__).parent / "results" / "masks.json"


def by_argsort(weight: Tensor, pattern: NMPattern) -> Tensor:
    magnitude = weight.abs().reshape(-1, pattern.m)
    pruned = torch.argsort(magnitude, dim=1)[:, : pattern.m - pattern.n]
    return torch.ones_like(magnitude).scatter_(1, pruned, 0.0).reshape(weight.shape)


def by_topk(weight: Tensor, pattern: NMPattern) -> Tensor:
    magnitude = weight.abs().reshape(-1, pattern.m)
    kept = magnitude.topk(pattern.n, dim=1, sorted=False).indices
    return torch.zeros_like(magnitude).scatter_(1, kept, 1.0).reshape(weight.shape)


METHODS: dict[str, Callable[[Tensor, NMPattern], Tensor]] = {
    "argsort": by_argsort,
    "topk": by_topk,
    "hf_nmsparse": magnitude_mask,
}


def medians(weight: Tensor, pattern: NMPattern, rounds: int) -> dict[str, float]:
    """Median milliseconds of each method; the methods take turns, so that a busy moment slows all of them."""
    expected = magnitude_mask(weight, pattern)
    for name, method in METHODS.items():  # warms up; random weights have no ties, so that all must agree
        mask = method(weight, pattern)
        assert torch.equal(mask if name == "hf_nmsparse" else pack_bits(mask.bool()), expected)
    return timed({name: partial(method, weight, pattern) for name, method in METHODS.items()}, rounds)


def transposable_medians(weight: Tensor, rounds: int) -> dict[str, float]:
    """Likewise of masks that are 2:4 along columns too, and of the one that is not."""
    double = weight.double()  # which the library does not take
    assert torch.equal(transposable_mask(weight), transposable_mask(double))
    calls: dict[str, Callable[[], Tensor]] = {
        "torch": partial(transposable_mask, double),
        "hf_nmsparse": partial(transposable_mask, weight),
        "along rows": partial(magnitude_mask, weight, NMPattern(2, 4)),
    }
    return timed(calls, rounds)


def timed(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    return {name: statistics.median(taken) * 1000 for name, taken in timing.in_turns(calls, rounds).items()}


def distinct(rows: int, columns: int) -> Tensor:
    """Weights of both signs whose magnitudes all differ."""
    count = rows * columns
    magnitude = (torch.randperm(count) + 1).float() / count
    return (magnitude * (torch.randint(0, 2, (count,)) * 2 - 1)).reshape(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="timed calls of each method in each row")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.manual_seed(0)
    rows = []
    print(f"{'shape':>10} {'pattern':>8} {'threads':>8} {'argsort ms':>11} {'topk ms':>9} {'ours ms':>9}", end="")
    print(f" {'argsort/ours':>13} {'topk/ours':>10}")
    for shape in SHAPES:
        weight = distinct(*shape)
        for text in PATTERNS:
            for threads in THREADS:
                torch.set_num_threads(threads)
                row = medians(weight, NMPattern.parse(text), options.rounds)
                ours = row["hf_nmsparse"]
                print(f"{shape[0]:>5}x{shape[1]:<4} {text:>8} {threads:>8} {row['argsort']:>11.3f}", end="")
                print(f" {row['topk']:>9.3f} {ours:>9.3f} {row['argsort'] / ours:>13.1f} {row['topk'] / ours:>10.1f}")
                milliseconds = {name: round(value, 4) for name, value in row.items()}
                rows.append({"shape": shape, "pattern": text, "threads": threads, "median_ms": milliseconds})
    transposable = []
    print(f"{'shape':>10} {'threads':>8} {'torch ms':>9} {'transposable ms':>16} {'along rows ms':>14}")
    for shape in SHAPES:
        weight = distinct(*shape)
        for threads in THREADS:
            torch.set_num_threads(threads)
            row = transposable_medians(weight, options.rounds)
            print(f"{shape[0]:>5}x{shape[1]:<4} {threads:>8} {row['torch']:>9.3f} {row['hf_nmsparse']:>16.3f}", end="")
            print(f" {row['along rows']:>14.3f}")
            milliseconds = {name: round(value, 4) for name, value in row.items()}
            transposable.append({"shape": shape, "threads": threads, "median_ms": milliseconds})

    record = {
        "benchmark": "masks, fp32 weights, medians of interleaved calls",
        "cpu": timing.cpu_model(),
        "cores": torch.multiprocessing.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "seed": 0,
        "note": options.note,
        "rows": rows,
        "transposable": transposable,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
