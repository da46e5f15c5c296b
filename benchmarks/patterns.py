"""How long one linear layer takes by its pattern: dense, 2:4, 1:4 and 4:8, interleaved in one process.

    python -m benchmarks.patterns --note "what else the machine was doing"
    HF_NMSPARSE_UNIT=avx2 python -m benchmarks.patterns     # the other unit of an AVX-512 machine; torch keeps its own

A minute; it writes benchmarks/results/patterns_UNIT.json and a table of all rows beside it;
`recipes/results_table.py` puts some into benchmarks/README.md.

Each layer is multiplied with 1 to 256 rows, on one thread, in CPU time, with cold and hot weights as in
`benchmarks.kernels`. Every candidate has a weight of its own pattern, laid out as `KernelLinear` does it; "dense" are
the package's kernels without sparsity. A 1:4 weight is a 2:4 weight too, so that "2:4" is also what 1:4 would take on
the kernels of 2:4. ``x bf16`` marks bf16 inputs, all others are fp32.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import kernels, tables, timing
from benchmarks.kernels import Candidate
from hf_nmsparse.kernels import cpu, library, native
from hf_nmsparse.kernels.order import format_of
from hf_nmsparse.kernels.rounded import rounded
from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.number_types import VALUE_DTYPES
from hf_nmsparse.packed_layers import KernelLinear, PackedLinear
from hf_nmsparse.pattern import NMPattern

PATTERNS = (NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8))
SHAPES = ((512, 512), (512, 2048), (2048, 512), (1024, 4096), (512, 32000))
ROWS = (1, 4, 8, 16, 64, 256)


def candidates(in_features: int, out_features: int) -> dict[str, Candidate]:
    """The ways to multiply of each pattern, all checked against torch."""
    x, bias, dense = torch.randn(16, in_features), torch.randn(out_features), torch.randn(out_features, in_features)
    found: dict[str, Candidate] = {}

    def add(name: str, product: Callable[[Tensor, Tensor], Tensor], weight: Tensor, full: Tensor) -> None:
        dtype = torch.bfloat16 if name.endswith("x bf16") or name == "torch bf16" else torch.float32
        found[name] = Candidate(product, weight, weight.nbytes, weight.clone, dtype)
        kernels.check_one(name, found[name], x, F.linear(x, full, bias))

    def add_kernels(name: str, weight: Tensor, format: str, full: Tensor) -> None:
        add(name, lambda x, weight: cpu.linear(x, weight, bias, format, out_features), weight, full)
        if library.numbers_of(format) == "bf16":
            bias16 = bias.bfloat16()
            product = lambda x, weight: cpu.linear(x, weight, bias16, format, out_features)  # noqa: E731
            add(f"{name}, x bf16", product, weight, full)

    add("torch fp32", lambda x, weight: F.linear(x, weight, bias), dense, dense)
    add("torch bf16", lambda x, weight: F.linear(x, weight, bias.bfloat16()), dense.bfloat16(), dense)
    for numbers in ("int8", "bf16", "fp32"):
        form = f"dense_{numbers}"
        weight = (
            rounded(dense) if numbers == "int8" else native.repack(form, in_features, dense.to(VALUE_DTYPES[numbers]))
        )
        add_kernels(f"dense {numbers}", weight, form, dense)
        for pattern in PATTERNS:
            if format_of(pattern, in_features, numbers) is not None:
                linear = nn.Linear(in_features, out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(apply_mask(dense, magnitude_mask(dense, pattern)), requires_grad=False)
                layer = KernelLinear(PackedLinear.from_linear(linear, pattern), numbers)
                add_kernels(f"{pattern} {numbers}", layer.kernel_weight, layer.kernel_format, linear.weight)
    return found


def main() -> None:
    parser = kernels.arguments(__doc__, "the first two shapes, 1 and 16 rows", budget_ms=50)
    parser.set_defaults(threads=[1])
    options = parser.parse_args()
    if options.threads != [1]:
        raise SystemExit("patterns: the clock is CPU time, so it runs on one thread; leave out --threads")
    machine = timing.machine()  # before this run is its load
    cold = kernels.bytes_of_cold_weights("patterns", options.cache_mb)

    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), timing.torch_threads(1):
        for shape in SHAPES[:2] if options.quick else SHAPES:
            found = candidates(*shape)
            copies = {name: candidate.copies(cold) for name, candidate in found.items()}
            for place, count in itertools.product(("cold", "hot"), (1, 16) if options.quick else ROWS):
                weights = copies if place == "cold" else {name: copies[name][:1] for name in copies}
                x = torch.randn(count, shape[0])
                budget = options.budget_ms / 1000
                medians = kernels.measure(found, weights, x, options.rounds, budget, time.process_time)
                rows.append({"shape": shape, "rows": count, "place": place, "median_us": medians})
                kernels.show(f"{shape[0]}x{shape[1]} {count} rows, {place}", medians)

    record = {
        "benchmark": "one linear layer by its pattern, medians of interleaved turns",
        **machine,
        "cold_bytes": cold,
        "rounds": options.rounds,
        "seed": 0,
        "note": options.note,
    }
    output = options.output or timing.RESULTS / f"patterns_{record['unit']}.json"
    timing.write(output, record, rows, tables.patterns_of(record | {"rows": rows}))
    print(output)


if __name__ == "__main__":
    main()
