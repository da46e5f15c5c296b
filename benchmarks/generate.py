"""How fast whole models translate: the native engine, transformers' own loop, and CTranslate2.

    python -m benchmarks.generate --note "what else the machine was doing"
    python -m benchmarks.generate --shape 6+2 --batches 1 16 --candidates "CTranslate2 int8" "dense int8" "2:4 int8"

It takes about twelve minutes on two cores and writes benchmarks/results/generate.json and a table beside it; a
``--shape`` other than Marian-base's 6+6 layers goes into a file with its name. The model has random weights, 2:4
sparse; it is saved packed in fp32, bf16 and int8, and dense, and each candidate loads the file that its users would.
Sentences of 24 random tokens become exactly 32 tokens, greedy and with four beams, 1, 4, 16 and 64 at a time, all
candidates interleaved. Ids go in and ids come out.

On one thread the seconds are those of the CPU, which a busy neighbour changes little; on two they are those of the
clock. CTranslate2 is measured where it is installed, ``pip install ctranslate2``, in a process of its own (two OpenMP
runtimes in one process slow torch's threads to half their speed), which takes the time itself. Everybody's tokens are
checked against those of transformers. The dense int8 candidate has the package's int8 kernels in the same engine and
no sparsity: what is between it and the 2:4 one is what sparsity brings. Transformers' loop takes long, so that it is
measured with 1 and 16 sentences only.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    MarianMTModel,
    PreTrainedModel,
)

from benchmarks import tables, timing
from hf_nmsparse import NMSparseConfig, export_dense, finalize, save_packed, sparsify
from hf_nmsparse.generation import engine_for
from hf_nmsparse.kernels.engine import SearchConfig
from hf_nmsparse.packed_layers import Int8Head

LOOP = ", transformers' loop"
REFERENCE = "dense fp32" + LOOP
"""Whose tokens all others' are compared with."""

ENGINE = {  # the engine's candidates, and the file that each loads
    "dense fp32": "dense fp32",
    "2:4 fp32": "2:4 fp32",
    "2:4 bf16": "2:4 bf16",
    "dense int8": "dense fp32",
    "2:4 int8": "2:4 int8",
}
LOOPS = {REFERENCE: "dense fp32", "torch int8" + LOOP: "dense fp32", "2:4 int8" + LOOP: "2:4 int8"}
THEIRS = {"CTranslate2 fp32": ("float32", None), "CTranslate2 int8": ("int8", "int8")}  # compute type, quantization
CANDIDATES = (*LOOPS, *THEIRS, *ENGINE)

LOOP_BATCHES = (1, 16)
TURN_SENTENCES = 4  # in a turn a single sentence is translated so many times, but in transformers' loop


class Turn(NamedTuple):
    """New tokens of each sentence, and the seconds that they took."""

    tokens: list[list[int]]
    cpu: float
    wall: float


Translate = Callable[[Tensor, int], Turn]
"""Of tokens ``[batch, source]`` and a number of beams."""


def timed(translate: Callable[[], list[list[int]]]) -> Turn:
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = translate()
    return Turn(tokens, time.process_time() - cpu, time.perf_counter() - wall)


def without_echo(model: MarianMTModel) -> MarianMTModel:
    """``model`` with other signs in its last norm: tied random embeddings would say one token over and over."""
    norm = model.model.decoder.layers[-1].final_layer_norm.weight
    assert isinstance(norm, Tensor)
    with torch.no_grad():
        norm.copy_(torch.randint(2, norm.shape) * 2 - 1)
    return model.eval()


def save(model: MarianMTModel, folder: Path) -> dict[str, Path]:
    """Writes all files of the model; returns the folder of each by its name."""
    sparsify(model, NMSparseConfig("2:4"))
    finalize(model)
    folders = {f"2:4 {values}": folder / values for values in ("fp32", "bf16", "int8")}
    for values in ("fp32", "bf16", "int8"):
        save_packed(model, folders[f"2:4 {values}"], values=values)
    folders["dense fp32"] = folder / "dense"
    export_dense(model, folders["dense fp32"])
    return folders


def by_transformers(model: PreTrainedModel, length: int) -> Callable[[Tensor, int], list[list[int]]]:
    """Of tokens ``[batch, source]`` and a number of beams the new tokens, in transformers' loop."""

    def translate(source: Tensor, beams: int) -> list[list[int]]:
        config = GenerationConfig(num_beams=beams, do_sample=False, min_new_tokens=length, max_new_tokens=length)
        loop: Any = type(model).generate  # the model's own may be the engine's
        tokens = loop(model, source, attention_mask=torch.ones_like(source), generation_config=config)
        assert isinstance(tokens, Tensor)
        new: list[list[int]] = tokens[:, 1:].tolist()
        return new

    return translate


def by_engine(model: PreTrainedModel, length: int) -> Callable[[Tensor, int], list[list[int]]]:
    """The same on the engine, on as many threads as torch has."""
    engine, start = engine_for(model), model.config.decoder_start_token_id

    def translate(source: Tensor, beams: int) -> list[list[int]]:
        search = SearchConfig(
            max_length=length + 1, min_new_tokens=length, beams=beams, threads=torch.get_num_threads()
        )
        rows = source.tolist()
        found = engine.translate(rows, search, [[start]] * len(rows), [model.config.eos_token_id])
        return [best.tokens[1:].tolist() for best, *_ in found]

    return translate


def load(folders: Mapping[str, Path], wanted: Iterable[str], length: int) -> dict[str, Translate]:
    """The candidates of this process."""
    made = {}
    for name in wanted:
        file = (LOOPS | ENGINE)[name]
        model = AutoModelForSeq2SeqLM.from_pretrained(folders[file])
        if name.startswith("torch int8"):
            model = timing.quantized(model)
        if name.startswith("dense int8"):
            model = with_dense_int8(model)
        made[name] = (by_transformers if name in LOOPS else by_engine)(model, length)

    def turn(translate: Callable[[Tensor, int], list[list[int]]]) -> Translate:
        return lambda source, beams: timed(lambda: translate(source, beams))

    return {name: turn(translate) for name, translate in made.items()}


def with_dense_int8(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            Int8Head.from_linear(module)
    return model


def ctranslate2_files(dense: Path, names: list[str], wanted: Iterable[str], end: int = 0) -> dict[str, Path]:
    """Converts the dense checkpoint; its tokenizer is a list of names, since tokens are all that is translated."""
    converters = importlib.import_module("ctranslate2.converters")
    tokenizer = SimpleNamespace(
        eos_token=names[end], unk_token=names[1], get_vocab=lambda: {name: place for place, name in enumerate(names)}
    )
    folders = {}
    for candidate in wanted:
        compute, quantization = THEIRS[candidate]
        converter = converters.TransformersConverter(str(dense))
        converter.load_tokenizer = lambda *args, **kwargs: tokenizer
        folders[candidate] = dense.parent / f"ctranslate2_{compute}"
        converter.convert(str(folders[candidate]), quantization=quantization)
    return folders


def serve_ctranslate2(pipe: Connection, folder: str, compute: str, threads: int, length: int) -> None:
    """Translates what comes through the pipe, until None comes."""
    ctranslate2 = importlib.import_module("ctranslate2")
    translator = ctranslate2.Translator(folder, compute_type=compute, intra_threads=threads, inter_threads=1)

    def translate(texts: list[list[str]], beams: int) -> Any:
        settings = {"beam_size": beams, "min_decoding_length": length, "max_decoding_length": length}
        found = translator.translate_batch(texts, **settings)
        return [result.hypotheses[0] for result in found]

    while (asked := pipe.recv()) is not None:
        pipe.send(timed(lambda asked=asked: translate(*asked)))  # type: ignore[misc]


@contextmanager
def by_ctranslate2(folder: Path, compute: str, threads: int, names: list[str], length: int) -> Iterator[Translate]:
    """CTranslate2 in a child process."""
    places = {name: place for place, name in enumerate(names)}
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    child = context.Process(target=serve_ctranslate2, args=(other, str(folder), compute, threads, length))
    child.start()

    def translate(source: Tensor, beams: int) -> Turn:
        pipe.send(([[names[token] for token in sentence] for sentence in source.tolist()], beams))
        turn: Turn = pipe.recv()
        return turn._replace(tokens=[[places[token] for token in sentence] for sentence in turn.tokens])  # type: ignore[index]

    try:
        yield translate
    finally:
        pipe.send(None)
        child.join()


def size(folder: Path) -> int:
    return sum(file.stat().st_size for pattern in ("*.safetensors", "model.bin") for file in folder.glob(pattern))


def agreement(found: list[list[int]], expected: list[list[int]]) -> float:
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return statistics.fmean(ours == theirs for ours, theirs in pairs)


def main() -> None:
    parser = timing.arguments(__doc__, rounds=3)
    parser.add_argument("--shape", default="6+6", choices=("6+6", "6+2", "12+1"), help="layers of encoder and decoder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES, metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="a very small model and short sentences: tries the script")
    options = parser.parse_args()
    machine = timing.machine()  # before this run is its load
    source_length, length = (4, 3) if options.tiny else (24, 32)
    encoder, decoder = map(int, options.shape.split("+"))
    transformers.logging.disable_progress_bar()
    missing: dict[str, str] = {}
    try:
        version = f"CTranslate2 {importlib.import_module('ctranslate2').__version__}"
    except ImportError as error:
        version, missing = None, {name: str(error) for name in options.candidates if name in THEIRS}
    wanted = [name for name in CANDIDATES if name in options.candidates and name not in missing]

    with TemporaryDirectory() as folder, timing.fastest_int8_engine() as int8_engine:
        model = without_echo(timing.marian(options.tiny, (encoder, decoder)))
        vocabulary = model.config.vocab_size
        names = ["</s>", "<unk>", *(f"t{token}" for token in range(2, vocabulary - 1)), "<pad>"]
        with timing.torch_threads(1):
            folders = save(model, Path(folder))
            own = load(folders, [name for name in wanted if name not in THEIRS], length)
            theirs = [name for name in wanted if name in THEIRS]
            if theirs:
                folders |= ctranslate2_files(folders["dense fp32"], names, theirs)
        files = {name: (LOOPS | ENGINE).get(name, name) for name in wanted}

        rows, tokens = [], {}
        for threads in options.threads:
            with ExitStack() as children, timing.torch_threads(threads):
                candidates = dict(own)
                for name in theirs:
                    child = by_ctranslate2(folders[name], THEIRS[name][0], threads, names, length)
                    candidates[name] = children.enter_context(child)
                for beams, batch in itertools.product((1, 4), options.batches):
                    generator = torch.Generator().manual_seed(0)
                    source = torch.randint(2, vocabulary - 1, (batch, source_length), generator=generator)
                    source[:, -1] = 0
                    present = [name for name in wanted if name not in LOOPS or batch in LOOP_BATCHES]
                    for name in present:  # warms up
                        found = candidates[name](source, beams).tokens
                        assert [len(sentence) for sentence in found] == [length] * batch, name
                        if beams == 1 and batch in LOOP_BATCHES:
                            tokens[name] = found
                    seconds: dict[str, list[float]] = {name: [] for name in present}
                    for name in timing.turns(present, options.rounds):
                        times = 1 if name in LOOPS else max(1, TURN_SENTENCES // batch)
                        turns = [candidates[name](source, beams) for _ in range(times)]
                        taken = [turn.cpu if threads == 1 else turn.wall for turn in turns]
                        seconds[name].append(statistics.fmean(taken))
                    speeds = {name: round(batch * length / statistics.median(seconds[name]), 1) for name in present}
                    setting = {"beams": beams, "batch": batch, "threads": threads}
                    rows.append(setting | {"tokens_per_second": speeds})
                    print(f"{tables.decoding(rows[-1])}, {threads} threads: tokens a second", end="")
                    print(*(f" {name} {speed:.0f}" for name, speed in speeds.items()), sep=",", flush=True)

        same = (
            {} if REFERENCE not in tokens else {n: round(agreement(t, tokens[REFERENCE]), 4) for n, t in tokens.items()}
        )
        record = {
            "benchmark": "generate, medians of interleaved turns",
            **machine,
            "transformers": transformers.__version__,
            "ctranslate2": version,
            "int8_engine": int8_engine,
            "model": timing.describe(model),
            "source_tokens": source_length,
            "new_tokens": length,
            "rounds": options.rounds,
            "seed": 0,
            "note": options.note,
            "baseline": next(name for name in ("CTranslate2 int8", "dense int8", *wanted) if name in wanted),
            "candidates": files,
            "bytes": {name: size(folders[name]) for name in dict.fromkeys(files.values())},
            "same_tokens": same,
            "missing": missing,
        }
    name = "generate.json" if options.shape == "6+6" else f"generate_{options.shape}.json"
    output = options.output or timing.RESULTS / name
    timing.write(output, record, rows, tables.generate_of(record | {"rows": rows}))
    print(output)


if __name__ == "__main__":
    main()
