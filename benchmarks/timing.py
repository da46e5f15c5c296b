"""What the benchmarks share: turns of the candidates, a model, a word on the machine, and the files of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MarianConfig, MarianMTModel

from hf_nmsparse.kernels import library

RESULTS = Path(__file__).parent / "results"


def arguments(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each candidate; medians are over these")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, help="the JSON file; a table goes beside it")
    return parser


def turns(candidates: Iterable[str], rounds: int) -> Iterator[str]:
    """Whose turn it is.

    A round gives every candidate one turn, in a new order, so that a busy moment and what a neighbour leaves behind in
    the caches fall on all of them alike.
    """
    names, order = list(candidates), random.Random(0)
    for _ in range(rounds):
        order.shuffle(names)
        yield from names


def in_turns(
    candidates: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each turn of each candidate by a clock, in the order of `turns`."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for name in turns(candidates, rounds):
        start = clock()
        candidates[name]()
        seconds[name].append(clock() - start)
    return seconds


def bootstrap(draw: Callable[[random.Random], float], samples: int = 1000) -> tuple[float, float]:
    """95% interval of a figure, of which ``draw`` gives a sample."""
    draws = random.Random(0)
    found = sorted(draw(draws) for _ in range(samples))
    return round(found[samples // 40], 4), round(found[-samples // 40 - 1], 4)


def marian(tiny: bool, layers: tuple[int, int] = (6, 6)) -> MarianMTModel:
    """A model with the width of Marian-base and random weights, or one that is good for trying a script only.

    ``layers`` are those of the encoder and of the decoder; a tiny model has one each.
    """
    torch.manual_seed(0)
    vocabulary, d_model = (200, 64) if tiny else (32_000, 512)
    settings: dict[str, Any] = {
        f"{side}_{name}": value
        for side, count in zip(("encoder", "decoder"), (1, 1) if tiny else layers, strict=True)
        for name, value in (("layers", count), ("attention_heads", d_model // 64), ("ffn_dim", 4 * d_model))
    }
    settings |= {"eos_token_id": 0, "pad_token_id": vocabulary - 1, "decoder_start_token_id": vocabulary - 1}
    settings |= {"bos_token_id": None, "forced_eos_token_id": None}
    return MarianMTModel(MarianConfig(vocab_size=vocabulary, d_model=d_model, scale_embedding=True, **settings))


def describe(model: MarianMTModel) -> str:
    config = model.config
    layers = f"{config.encoder_layers}+{config.decoder_layers} layers"
    return f"MarianMTModel, {layers}, d {config.d_model}, vocabulary {config.vocab_size:,}"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def caches() -> dict[str, int]:
    """Bytes of each data cache that the first core sees; empty where Linux does not say it."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return sizes


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def machine() -> dict[str, Any]:
    """What a number depends on besides the code: `unit` is the package's, `torch_unit` torch's, `load` the system's."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "caches": caches(),
        "unit": library.status().unit,
        "torch_unit": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def quantized(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose linear layers are torch's dynamic int8, for the engine that is set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all of it is deprecated
        copy: nn.Module = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    return copy


@contextmanager
def fastest_int8_engine() -> Iterator[str]:
    """Sets torch's fastest engine for dynamic int8, by products with 1, 4 and 16 rows on one thread, and names it."""
    before = torch.backends.quantized.engine
    inputs, turns = [torch.randn(rows, 512) for rows in (1, 4, 16)], {}
    with torch.inference_mode(), torch_threads(1):
        for engine in torch.backends.quantized.supported_engines:
            if engine in ("none", "qnnpack"):  # qnnpack is made for phones
                continue
            torch.backends.quantized.engine = engine
            layer = quantized(nn.Sequential(nn.Linear(512, 2048)))

            def turn(layer: nn.Module = layer) -> None:
                for x in inputs * 10:
                    layer(x)

            turn()
            turns[engine] = turn
        seconds = in_turns(turns, 15)
    engine = min(seconds, key=lambda name: sorted(seconds[name])[7])
    torch.backends.quantized.engine = engine
    try:
        yield engine
    finally:
        torch.backends.quantized.engine = before


def write(output: Path, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], table: str) -> None:
    """Writes ``record`` with its ``rows``, one a line, and the table beside it."""
    head = json.dumps(record, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    output.with_suffix(".md").write_text(f"{table}\n", encoding="utf-8")
