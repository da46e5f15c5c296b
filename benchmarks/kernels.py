"""How long one linear layer takes: torch's own products and the package's kernels, interleaved in one process.

    python -m benchmarks.kernels --note "what else the machine was doing"
    HF_NMSPARSE_UNIT=avx2 python -m benchmarks.kernels      # the other unit of an AVX-512 machine; torch keeps its own

The full grid takes about seven minutes on two cores; ``--quick`` measures a few shapes. It writes
benchmarks/results/kernels_UNIT.json and a table of all rows beside it; `recipes/results_table.py` puts some into
benchmarks/README.md.

Each layer of the grid, from well-known translation models, is multiplied with 1 to 256 rows, on 1 and 2 threads, and
from two places: *cold* streams the weights from memory, each candidate going round copies of its own that exceed four
times the last cache, as a decoder with many layers does; *hot* has one copy. Every candidate multiplies the same 2:4
weight: torch in fp32, in bf16 (inputs too) and in dynamic int8 by its fastest engine; the package's int8 kernel without
sparsity, which is what a head uses and the control that tells how much of a gain the sparsity brings; and its 2:4
kernels. ``x bf16`` marks bf16 inputs, all others are fp32.

What is timed is the call that a layer makes, `hf_nmsparse.kernels.cpu.linear` or torch's operator in inference mode, so
that the time of Python and of torch's dispatcher is in it. The first shape, 64x64, is a control: there is next to
nothing to multiply, so that its times are those of the calls.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import tables, timing
from hf_nmsparse.kernels import cpu, library
from hf_nmsparse.kernels.rounded import rounded
from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.packed_layers import KernelLinear, PackedLinear
from hf_nmsparse.pattern import NMPattern

PATTERN = NMPattern(2, 4)
ROWS = (1, 4, 16, 64, 256)
BYTES_OF_CACHES = 4  # copies exceed the last cache by this factor


@dataclass(frozen=True)
class Layer:
    """A linear layer of the grid; a head that is no control stays dense, as heads do."""

    model: str
    in_features: int
    out_features: int
    bias: bool = True
    sparse: bool = True


LAYERS = (
    Layer("control", 64, 64),
    Layer("Marian-base", 512, 512),
    Layer("Marian-base", 512, 2048),
    Layer("Marian-base", 2048, 512),
    Layer("Marian-base, head", 512, 32000, bias=False),
    Layer("opus-mt, head", 512, 58101, bias=False, sparse=False),
    Layer("T5-base", 768, 768, bias=False),
    Layer("T5-base", 768, 3072, bias=False),
    Layer("T5-base", 3072, 768, bias=False),
    Layer("NLLB-600M", 1024, 1024),
    Layer("NLLB-600M", 1024, 4096),
    Layer("NLLB-600M", 4096, 1024),
)
QUICK = ((64, 64), (512, 512), (512, 2048))


@dataclass
class Candidate:
    """A way to multiply.

    Attributes:
        product: Of an input and a weight.
        weight: The weight as the product takes it.
        size: Its bytes.
        copy: Makes another weight like it.
        dtype: Of the input.
    """

    product: Callable[[Tensor, Any], Tensor]
    weight: Any
    size: int
    copy: Callable[[], Any]
    dtype: torch.dtype = torch.float32

    def copies(self, bytes: int) -> list[Any]:
        """The weight and as many copies as it takes to exceed so many bytes."""
        return [self.weight, *(self.copy() for _ in range(bytes // self.size))]


def candidates(layer: Layer) -> dict[str, Candidate]:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias).requires_grad_(False)
    weight = torch.randn_like(linear.weight)
    linear.weight.copy_(apply_mask(weight, magnitude_mask(weight, PATTERN)))
    bias = linear.bias if layer.bias else None
    bias16 = None if bias is None else bias.bfloat16()

    def of_tensor(product: Callable[[Tensor, Tensor], Tensor], weight: Tensor, dtype: torch.dtype) -> Candidate:
        return Candidate(product, weight, weight.nbytes, weight.clone, dtype)

    def of_torch(weight: Tensor, bias: Tensor | None) -> Candidate:
        return of_tensor(lambda x, weight: F.linear(x, weight, bias), weight, weight.dtype)

    def of_kernel(weight: Tensor, format: str, dtype: torch.dtype = torch.float32) -> Candidate:
        added = bias if dtype == torch.float32 else bias16
        return of_tensor(lambda x, weight: cpu.linear(x, weight, added, format, layer.out_features), weight, dtype)

    [int8] = timing.quantized(nn.Sequential(linear)).children()
    pack = partial(torch.ops.quantized.linear_prepack, int8.weight(), bias)
    found = {
        "torch fp32": of_torch(linear.weight, bias),
        "torch bf16": of_torch(linear.weight.bfloat16(), bias16),
        "torch int8": Candidate(
            lambda x, weight: torch.ops.quantized.linear_dynamic(x, weight, True), pack(), linear.weight.numel(), pack
        ),
    }
    if layer.sparse:
        packed = PackedLinear.from_linear(linear, PATTERN)
        for values in ("fp32", "bf16", "int8"):
            weight = KernelLinear(packed, values).kernel_weight
            found[f"2:4 {values}"] = of_kernel(weight, values)
            if values != "int8":
                found[f"2:4 {values}, x bf16"] = of_kernel(weight, values, torch.bfloat16)
    found["dense int8"] = of_kernel(rounded(linear.weight), "dense_int8")
    return found


def check(found: Mapping[str, Candidate], x: Tensor) -> None:
    """All candidates compute the same product, as far as eight bits allow."""
    fp32 = found["torch fp32"]
    expected = fp32.product(x, fp32.weight)
    for name, candidate in found.items():
        check_one(name, candidate, x, expected)


def check_one(name: str, candidate: Candidate, x: Tensor, expected: Tensor) -> None:
    """A candidate computes a product, as far as eight bits allow."""
    y = candidate.product(x.to(candidate.dtype), candidate.weight).float()
    error = float((y - expected).norm() / expected.norm())
    assert error < 0.05, (name, error)


def turn(product: Callable[[Tensor, Any], Tensor], x: Tensor, weights: Iterator[Any], count: int) -> None:
    for weight in itertools.islice(weights, count):
        product(x, weight)


def measure(
    found: Mapping[str, Candidate],
    weights: Mapping[str, list[Any]],
    x: Tensor,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median microseconds a call; a candidate's turns take ``seconds`` together, if its calls are not too long."""
    turns, counts = {}, {}
    for name, candidate in found.items():
        calls = partial(turn, candidate.product, x.to(candidate.dtype), itertools.cycle(weights[name]))
        calls(1)
        count, taken = 1, timed(calls, 1)
        while taken < 0.001:
            count *= 2
            taken = timed(calls, count)
        counts[name] = max(1, round(seconds / rounds / (taken / count)))
        turns[name] = partial(calls, counts[name])
    return {
        name: round(statistics.median(taken) / counts[name] * 1e6, 3)
        for name, taken in timing.in_turns(turns, rounds, clock).items()
    }


def timed(calls: Callable[[int], None], count: int) -> float:
    start = time.perf_counter()
    calls(count)
    return time.perf_counter() - start


def chosen(medians: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """What ``compute="auto"`` takes for each precision of a model in memory, from what was measured.

    ``to_fastest`` is the time of the fastest of the package's modes that keep the precision over that of the chosen
    one, ``to_dense`` the speed-up over the layer that the model would have dense.
    """
    precisions = {
        "fp32": (torch.float32, "2:4 {}", ("fp32",), "torch fp32"),
        "bf16": (torch.bfloat16, "2:4 {}, x bf16", ("fp32", "bf16"), "torch bf16"),
        "int8": (torch.int8, "2:4 {}", ("fp32", "int8"), "torch fp32"),
    }
    found = {}
    for precision, (dtype, name, formats, dense) in precisions.items():
        taken = cpu.preferred_format(dtype)
        own = medians[name.format(taken)]
        fastest = min(medians[name.format(other)] for other in formats)
        to_fastest, to_dense = round(fastest / own, 3), round(medians[dense] / own, 3)
        found[precision] = {"format": taken, "to_fastest": to_fastest, "to_dense": to_dense}
    return found


def arguments(doc: str | None, quick: str, budget_ms: float) -> argparse.ArgumentParser:
    """Those of a benchmark of layers."""
    parser = timing.arguments(doc, rounds=9)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--budget-ms", type=float, default=budget_ms, help="time of a candidate in a row of the table")
    parser.add_argument("--cache-mb", type=float, help="size of the last cache, where the system does not say it")
    return parser


def bytes_of_cold_weights(program: str, cache_mb: float | None) -> int:
    """How many bytes cold weights go round.

    Raises:
        SystemExit: Nothing says how large the last cache is, or there are no kernels.
    """
    cache = max(timing.caches().values(), default=0) if cache_mb is None else int(cache_mb * 2**20)
    if cache == 0:
        raise SystemExit(f"{program}: the size of the last cache is unknown; give --cache-mb")
    if library.status().unit is None:
        raise SystemExit(f"{program}: {library.status().reason}")
    return BYTES_OF_CACHES * cache


def show(what: str, medians: Mapping[str, float]) -> None:
    print(f"{what}:", end="")
    print(*(f" {name} {medians[name]:.1f}" for name in medians), sep=",", end=" us\n", flush=True)


def main() -> None:
    options = arguments(__doc__, "three shapes, 1 and 16 rows", budget_ms=90).parse_args()
    machine = timing.machine()  # before this run is its load
    cold = bytes_of_cold_weights("kernels", options.cache_mb)

    torch.manual_seed(0)
    rows = []
    with torch.inference_mode(), timing.fastest_int8_engine() as engine:
        for layer in LAYERS:
            shape = (layer.in_features, layer.out_features)
            if options.quick and shape not in QUICK:
                continue
            found = candidates(layer)
            check(found, torch.randn(16, layer.in_features))
            exceeding = 0 if layer.model == "control" else cold
            copies = {name: candidate.copies(exceeding) for name, candidate in found.items()}
            places = ("cold", "hot") if exceeding else ("hot",)
            for place, count, threads in itertools.product(places, ROWS, options.threads):
                if options.quick and count not in (1, 16):
                    continue
                weights = copies if place == "cold" else {name: copies[name][:1] for name in copies}
                x = torch.randn(count, layer.in_features)
                with timing.torch_threads(threads):
                    medians = measure(found, weights, x, options.rounds, options.budget_ms / 1000)
                row = {"model": layer.model, "shape": shape, "rows": count, "threads": threads, "place": place}
                rows.append(row | {"median_us": medians} | ({"auto": chosen(medians)} if layer.sparse else {}))
                show(f"{shape[0]}x{shape[1]} {count} rows, {threads} threads, {place}", medians)

    record = {
        "benchmark": "one linear layer, weights 2:4 sparse, medians of interleaved turns",
        **machine,
        "int8_engine": engine,
        "cold_bytes": cold,
        "rounds": options.rounds,
        "seed": 0,
        "note": options.note,
    }
    output = options.output or timing.RESULTS / f"kernels_{record['unit']}.json"
    timing.write(output, record, rows, tables.kernels_of(record | {"rows": rows}))
    print(output)


if __name__ == "__main__":
    main()
