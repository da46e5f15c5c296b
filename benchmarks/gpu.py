"""What the package does on a GPU: masks, a training step and its memory, single packed layers, and whole models.

    python -m benchmarks.gpu --note "what else the machine was doing"

It takes about five minutes on one NVIDIA GPU and writes benchmarks/results/gpu.json and a table beside it. Everything
is interleaved in one process. A turn is many calls in a row with one wait at the end, as a model makes them, so that
what takes the CPU longer to launch than the GPU to compute shows as what it is. What this GPU or this build of torch
has not is named in the file, with the reason. ``--tiny`` tries the script, on a CPU too.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from benchmarks import tables, timing
from benchmarks.generate import by_transformers, without_echo
from benchmarks.masks import by_argsort, by_topk
from benchmarks.training import interval, overhead, trainer
from hf_nmsparse import NMSparseConfig, NMSparseQuantizationConfig, finalize, save_packed, sparsify
from hf_nmsparse.kernels import cuda, semi_structured
from hf_nmsparse.masks import apply_mask, magnitude_mask, update_mask
from hf_nmsparse.packed_layers import SemiStructuredLinear
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.srste import StepContext, add_to_gradient

TWO_OF_FOUR = NMPattern(2, 4)
SHAPES = ((512, 512), (512, 2048), (1024, 4096), (4096, 16384))
BATCH, LENGTH = 128, 32
COMPUTES = ("dense", "semi_structured", "auto")

Calls = Mapping[str, Callable[[], object]]
Row = dict[str, Any]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(calls: Calls, device: torch.device, rounds: int, times: int) -> dict[str, float]:
    """Median microseconds of a call, of turns of ``times`` calls and one wait."""

    def turn(call: Callable[[], object]) -> None:
        for _ in range(times):
            call()
        wait(device)

    turns = {name: partial(turn, call) for name, call in calls.items()}
    timing.in_turns(turns, 2)  # warms up
    seconds = timing.in_turns(turns, rounds)
    return {name: round(statistics.median(taken) / times * 1e6, 2) for name, taken in seconds.items()}


def without_kernels(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as it is where Triton is not installed."""

    def plain() -> None:
        with mock.patch.object(cuda, "can_rank", return_value=False):
            call()

    return plain


def masks(shape: tuple[int, int], device: torch.device, rounds: int, times: int) -> Iterator[Row]:
    """What a step does with one weight: its mask and flips, its decay, and the sparse weight in bf16."""
    weight = torch.randn(shape, device=device)
    gradient, context = torch.zeros_like(weight), StepContext(lr=1e-3, decay=2e-4)
    for text in ("2:4", "4:8", "1:16"):
        pattern = NMPattern.parse(text)
        mask = magnitude_mask(weight, pattern)
        rank = partial(update_mask, mask, weight, pattern)
        calls: Calls = {
            "argsort": partial(by_argsort, weight, pattern),
            "topk": partial(by_topk, weight, pattern),
            "torch": without_kernels(rank),
            "Triton": rank,
        }
        yield {"part": "mask and flips", "what": text, "shape": shape, "us": medians(calls, device, rounds, times)}
    mask = magnitude_mask(weight, TWO_OF_FOUR)
    decay = partial(add_to_gradient, weight, gradient, mask, context)
    apply = partial(apply_mask, weight, mask, torch.bfloat16)
    for part, call in (("decay", decay), ("sparse weight in bf16", apply)):
        times_of = medians({"torch": without_kernels(call), "Triton": call}, device, rounds, times)
        yield {"part": part, "what": "2:4", "shape": shape, "us": times_of}


def training_steps(tiny: bool, device: torch.device, rounds: int) -> Iterator[Row]:
    """A step under bf16 autocast, dense and sparse, and the most memory that each needs by itself."""
    candidates = {
        "dense": (False, True),
        "dense, again": (False, True),
        "2:4 SR-STE": (True, True),
        "2:4 SR-STE, no Triton": (True, False),
    }
    batch_size, length = (2, 4) if tiny else (BATCH, LENGTH)

    def step_of(sparse: bool, kernels: bool) -> Callable[[], None]:
        model = timing.marian(tiny).to(device)
        tokens = torch.randint(2, model.config.vocab_size - 1, (2, batch_size, length), device=device)
        batch = {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0]), "labels": tokens[1]}
        return trainer(model, sparse, batch, kernels, torch.bfloat16)

    peaks = {}
    for name, how in candidates.items():
        step = step_of(*how)
        step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step()
            peaks[name] = torch.cuda.max_memory_allocated(device) // 2**20
        del step
    steps = {name: step_of(*how) for name, how in candidates.items()}

    def turn(step: Callable[[], None]) -> None:
        step()
        wait(device)

    turns = {name: partial(turn, step) for name, step in steps.items()}
    timing.in_turns(turns, 3)  # warms up
    seconds = timing.in_turns(turns, rounds)
    for name, taken in seconds.items():
        yield {
            "part": "training step",
            "what": name,
            "ms": round(statistics.median(taken) * 1000, 3),
            "to_dense": round(overhead(taken, seconds["dense"]), 4),
            "interval": interval(taken, seconds["dense"]),
            "peak_mib": peaks.get(name),
        }


def layers(shape: tuple[int, int], device: torch.device, rounds: int, times: int) -> Iterator[Row]:
    """A packed layer in bf16 on sparse tensor cores against the dense one, ``in x out``."""
    in_features, out_features = shape
    weight = torch.randn(out_features, in_features, device=device)
    weight = apply_mask(weight, magnitude_mask(weight, TWO_OF_FOUR), torch.bfloat16)
    compressed = semi_structured.compress(weight)
    chosen = semi_structured.is_faster(out_features, in_features, torch.bfloat16, device)
    for rows in semi_structured.ROWS:
        x = torch.randn(rows, in_features, device=device, dtype=torch.bfloat16)
        with torch.inference_mode():
            calls: Calls = {
                "dense": partial(F.linear, x, weight),
                "semi_structured": partial(semi_structured.linear, x, compressed, None),
            }
            found = medians(calls, device, rounds, times)
        yield {"part": "packed layer", "shape": shape, "rows": rows, "us": found, "auto": chosen}


def models(tiny: bool, device: torch.device, rounds: int, computes: tuple[str, ...]) -> Iterator[Row]:
    """Tokens a second of ``generate`` with a packed bf16 file, by what computes it."""
    source_length, length = (4, 3) if tiny else (24, 32)
    model = without_echo(timing.marian(tiny))
    sparsify(model, NMSparseConfig("2:4"))
    finalize(model)
    with TemporaryDirectory() as folder:
        save_packed(model, Path(folder) / "packed", values="bf16")
        loaded = {}
        for compute in computes:
            config = NMSparseQuantizationConfig(compute)
            loaded[compute] = transformers.AutoModelForSeq2SeqLM.from_pretrained(
                Path(folder) / "packed", quantization_config=config, device_map=str(device)
            )
    sparse = sum(isinstance(module, SemiStructuredLinear) for module in loaded["auto"].modules())
    for beams, batch in ((1, 1), (4, 1), (4, 16), (4, 128)):
        source: Tensor = torch.randint(2, model.config.vocab_size - 1, (batch, source_length), device=device)
        source[:, -1] = 0
        turns = {name: partial(by_transformers(twin, length), source, beams) for name, twin in loaded.items()}
        timing.in_turns(turns, 1)  # warms up
        seconds = timing.in_turns(turns, rounds)
        speeds = {name: round(batch * length / statistics.median(taken), 1) for name, taken in seconds.items()}
        row = {"part": "generate", "beams": beams, "batch": batch, "tokens_per_second": speeds}
        yield row | {"layers_on_sparse_cores_with_auto": sparse}


def gpu(device: torch.device) -> dict[str, Any]:
    """What a number depends on besides the code."""
    if device.type != "cuda":
        return {"gpu": None}
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": (driver.stdout.split() or [None])[0],
        "cuda": torch.version.cuda,
        "triton": triton,
        "cusparselt": torch.backends.cusparselt.version(),
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = timing.arguments(__doc__, rounds=21)
    parser.add_argument("--tiny", action="store_true", help="small shapes and a very small model: tries the script")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("gpu: there is no GPU here; --tiny tries the script on the CPU")
    machine = timing.machine()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    shapes, times = (((64, 64),), 2) if options.tiny else (SHAPES, 50)
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)

    why_not = semi_structured.why_not(TWO_OF_FOUR, 64, 64, torch.bfloat16, device)
    missing = {} if why_not is None else {"semi_structured": why_not}
    computes = tuple(compute for compute in COMPUTES if compute not in missing)
    rows: list[Row] = []

    def keep(found: Iterator[Row]) -> None:
        for row in found:
            rows.append(row)
            print(row, flush=True)

    for shape in shapes:
        keep(masks(shape, device, options.rounds, times))
    keep(training_steps(options.tiny, device, options.rounds))
    for shape in () if missing else shapes:
        keep(layers(shape, device, options.rounds, times))
    keep(models(options.tiny, device, max(options.rounds // 3, 1), computes))

    record = {
        "benchmark": "on a GPU, medians of interleaved turns",
        **machine,
        **gpu(device),
        "batch": BATCH,
        "length": LENGTH,
        "rounds": options.rounds,
        "calls": times,
        "seed": 0,
        "note": options.note,
        "missing": missing,
    }
    output = options.output or timing.RESULTS / "gpu.json"
    timing.write(output, record, rows, tables.gpu_of(record | {"rows": rows}))
    print(output)


if __name__ == "__main__":
    main()
