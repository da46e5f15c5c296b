"""How fast whole models translate: `model.generate` with stock, packed and torch's int8 layers, and CTranslate2.

    python -m benchmarks.generate --note "what else the machine was doing"

It takes about eight minutes on two cores and writes benchmarks/results/generate.json and a table beside it. The model
has the shape of Marian-base and random weights, 2:4 sparse; it is saved packed in fp32, bf16 and int8, and dense, and
each candidate loads the file that its users would. Sentences of 24 random tokens become exactly 32 tokens, greedy and
with four beams, one and sixteen at a time, on 1 and 2 threads, all candidates interleaved in one process.

CTranslate2 is measured where it is installed, ``pip install ctranslate2``; its tokens are checked against those of
transformers, as are everybody's. It takes its turns in a process of its own: two OpenMP runtimes in one process slow
torch's threads to half their speed. The dense int8 candidate has the package's int8 kernels and no sparsity: what is
between it and the 2:4 one is what sparsity brings.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

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
from hf_nmsparse import (
    NMSparseConfig,
    NMSparseQuantizationConfig,
    export_dense,
    finalize,
    save_packed,
    sparsify,
)
from hf_nmsparse.packed_layers import Int8Head

BASELINE = "transformers fp32"

# What from_pretrained loads for each candidate of the package: a file, and what is asked of it. compute="int8" is not
# here, because it runs the kernels of the int8 file whatever the file.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "2:4 fp32": ("2:4 fp32", {}),
    "2:4 fp32, head int8": ("2:4 fp32", {"quantization_config": NMSparseQuantizationConfig(head="int8")}),
    "2:4 bf16": ("2:4 bf16", {}),
    "2:4 bf16, dtype fp32": ("2:4 bf16", {"dtype": torch.float32}),
    "2:4 fp32, compute bf16": ("2:4 fp32", {"quantization_config": NMSparseQuantizationConfig("bf16")}),
    "2:4 int8": ("2:4 int8", {}),
}
THEIRS = {"CTranslate2 fp32": ("float32", None), "CTranslate2 int8": ("int8", "int8")}  # compute type, quantization

Translate = Callable[[Tensor, int], list[list[int]]]
"""Of tokens ``[batch, source]`` and a number of beams, the new tokens of each sentence."""


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


def by_transformers(model: PreTrainedModel, length: int) -> Translate:
    def translate(source: Tensor, beams: int) -> list[list[int]]:
        config = GenerationConfig(num_beams=beams, do_sample=False, min_new_tokens=length, max_new_tokens=length)
        tokens = model.generate(source, attention_mask=torch.ones_like(source), generation_config=config)
        assert isinstance(tokens, Tensor)
        new: list[list[int]] = tokens[:, 1:].tolist()
        return new

    return translate


def load(folders: dict[str, Path]) -> dict[str, PreTrainedModel]:
    """The model of each candidate that transformers runs."""
    read = AutoModelForSeq2SeqLM.from_pretrained
    dense = read(folders["dense fp32"])
    models = {
        BASELINE: dense,
        "torch int8": timing.quantized(dense),
        "dense int8": with_dense_int8(read(folders["dense fp32"])),
    }
    return models | {name: read(folders[file], **asked) for name, (file, asked) in OURS.items()}


def with_dense_int8(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            Int8Head.from_linear(module)
    return model


def ctranslate2_files(folders: dict[str, Path], names: list[str]) -> None:
    """Converts the dense checkpoint; its tokenizer is a list of names, since tokens are all that is translated."""
    converters = importlib.import_module("ctranslate2.converters")
    tokenizer = SimpleNamespace(
        eos_token=names[0], unk_token=names[1], get_vocab=lambda: {name: place for place, name in enumerate(names)}
    )
    for candidate, (compute, quantization) in THEIRS.items():
        converter = converters.TransformersConverter(str(folders["dense fp32"]))
        converter.load_tokenizer = lambda *args, **kwargs: tokenizer
        folders[candidate] = folders["dense fp32"].parent / f"ctranslate2_{compute}"
        converter.convert(str(folders[candidate]), quantization=quantization)


def serve_ctranslate2(pipe: Connection, folder: str, compute: str, threads: int, length: int) -> None:
    """Translates what comes through the pipe, until None comes."""
    ctranslate2 = importlib.import_module("ctranslate2")
    translator = ctranslate2.Translator(folder, compute_type=compute, intra_threads=threads, inter_threads=1)
    while (asked := pipe.recv()) is not None:
        texts, beams = asked
        found = translator.translate_batch(
            texts, beam_size=beams, min_decoding_length=length, max_decoding_length=length
        )
        pipe.send([result.hypotheses[0] for result in found])


@contextmanager
def by_ctranslate2(folder: Path, compute: str, threads: int, names: list[str], length: int) -> Iterator[Translate]:
    """CTranslate2 in a child process."""
    places = {name: place for place, name in enumerate(names)}
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    child = context.Process(target=serve_ctranslate2, args=(other, str(folder), compute, threads, length))
    child.start()

    def translate(source: Tensor, beams: int) -> list[list[int]]:
        pipe.send(([[names[token] for token in sentence] for sentence in source.tolist()], beams))
        return [[places[token] for token in sentence] for sentence in pipe.recv()]

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
    parser = timing.arguments(__doc__, rounds=5)
    parser.add_argument("--tiny", action="store_true", help="a very small model and short sentences: tries the script")
    options = parser.parse_args()
    machine = timing.machine()  # before this run is its load
    source_length, length = (4, 3) if options.tiny else (24, 32)
    transformers.logging.disable_progress_bar()

    with TemporaryDirectory() as folder, timing.fastest_int8_engine() as engine:
        model = without_echo(timing.marian(options.tiny))
        vocabulary = model.config.vocab_size
        names = ["</s>", "<unk>", *(f"t{token}" for token in range(2, vocabulary - 1)), "<pad>"]
        missing = {}
        with timing.torch_threads(1):
            folders = save(model, Path(folder))
            candidates = {name: by_transformers(loaded, length) for name, loaded in load(folders).items()}
        files = {name: OURS[name][0] if name in OURS else "dense fp32" for name in candidates}
        try:
            ctranslate2 = importlib.import_module("ctranslate2")
            ctranslate2_files(folders, names)
            files |= {name: name for name in THEIRS}
        except ImportError as error:
            ctranslate2 = None
            missing = dict.fromkeys(THEIRS, str(error))

        rows, tokens = [], {}
        for threads, (beams, batch) in itertools.product(options.threads, itertools.product((1, 4), (1, 16))):
            with ExitStack() as children:
                for name, (compute, _) in THEIRS.items() if ctranslate2 is not None else ():
                    child = by_ctranslate2(folders[name], compute, threads, names, length)
                    candidates[name] = children.enter_context(child)
                generator = torch.Generator().manual_seed(0)
                source = torch.randint(2, vocabulary - 1, (batch, source_length), generator=generator)
                source[:, -1] = 0
                with timing.torch_threads(threads):
                    for name, translate in candidates.items():  # warms up
                        found = translate(source, beams)
                        assert [len(sentence) for sentence in found] == [length] * batch, name
                        if beams == 1:
                            tokens[name] = found
                    turns = {name: partial(translate, source, beams) for name, translate in candidates.items()}
                    seconds = timing.in_turns(turns, options.rounds)
                speeds = {name: round(batch * length / statistics.median(taken), 1) for name, taken in seconds.items()}
                rows.append({"beams": beams, "batch": batch, "threads": threads, "tokens_per_second": speeds})
                print(f"{tables.decoding(rows[-1])}, {threads} threads: tokens a second", end="")
                print(*(f" {name} {speed:.0f}" for name, speed in speeds.items()), sep=",", flush=True)

        record = {
            "benchmark": "generate, medians of interleaved turns",
            **machine,
            "transformers": transformers.__version__,
            "ctranslate2": f"CTranslate2 {ctranslate2.__version__}" if ctranslate2 is not None else None,
            "int8_engine": engine,
            "model": timing.describe(model),
            "source_tokens": source_length,
            "new_tokens": length,
            "rounds": options.rounds,
            "seed": 0,
            "note": options.note,
            "baseline": BASELINE,
            "candidates": files,
            "bytes": {name: size(folder) for name, folder in folders.items()},
            "same_tokens": {name: round(agreement(found, tokens[BASELINE]), 4) for name, found in tokens.items()},
            "missing": missing,
        }
    output = options.output or timing.RESULTS / "generate.json"
    timing.write(output, record, rows, tables.generate_of(record | {"rows": rows}))
    print(output)


if __name__ == "__main__":
    main()
