"""The command ``nmsparse``: inspect, pack, export, translate, evaluate, plot, doctor."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, Any, NoReturn

__all__ = ["main"]

# torch and transformers take seconds to import: each command imports what it needs.

# What a folder holds beside the model: the tokenizer of any kind, the settings of generation, the card.
_FILES_BESIDE = (
    "README.md",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*",
    "merges.txt",
    "*.spm",
    "*.model",
)

# So many lines of a file are sorted by length together; longer chunks save little and delay the output.
_CHUNK = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        0; or 2 after a user's error, with one line on standard error; or 1 where the reader of the output went away.
    """
    try:
        args = _parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        reason = str(error).strip() or type(error).__name__
        print(f"nmsparse: {reason.splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nmsparse", description="N:M sparse translation models: look at, convert, run and score them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("inspect", help="check a packed model and print what is sparse in it")
    command.add_argument("path", metavar="PATH", help="folder of the model")
    command.add_argument("--layers", action="store_true", help="list every sparse layer")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("pack", help="write a trained model as packed files")
    command.add_argument("source", metavar="SRC", help="training checkpoint, packed model, or masked dense model")
    command.add_argument("target", type=Path, metavar="DST", help="new folder")
    command.add_argument("--values", choices=("fp32", "fp16", "bf16", "int8"), help="number type of the weights")
    command.add_argument(
        "--embeddings",
        choices=("float", "int8"),
        help="number type of embeddings and output projection (with int8: int8)",
    )
    command.add_argument("--pattern", help="N:M, for a dense model whose weights are masked but not marked as such")
    command.add_argument(
        "--standalone",
        action="store_true",
        help="add the code with which transformers alone reads it, given trust_remote_code=True",
    )
    command.set_defaults(run=_pack)

    command = commands.add_parser("export", help="write a sparse model as dense files that any tool reads")
    command.add_argument("source", metavar="SRC", help="packed model or training checkpoint")
    command.add_argument("target", type=Path, metavar="DST", help="new folder")
    command.set_defaults(run=_export)

    command = commands.add_parser("convert", help="write a sparse-24-bitmask checkpoint as dense files")
    command.add_argument("source", metavar="SRC", help="its folder")
    command.add_argument("target", type=Path, metavar="DST", help="new folder")
    command.set_defaults(run=_convert)

    command = commands.add_parser("translate", help="translate text, one line out for each line in")
    _add_model_arguments(command)
    command.add_argument(
        "--input",
        default="-",
        metavar="FILE",
        help="one sentence a line; - is standard input, which is answered batch by batch",
    )
    command.add_argument("--output", default="-", metavar="FILE", help="one translation a line; - is standard output")
    command.set_defaults(run=_translate)

    command = commands.add_parser("evaluate", help="translate a test set and score it with sacreBLEU")
    _add_model_arguments(command)
    command.add_argument("--source", required=True, metavar="FILE", help="one sentence a line")
    command.add_argument("--reference", required=True, metavar="FILE", help="one raw reference a line")
    command.add_argument("--baseline", metavar="FILE", help="translations by the dense model, to compare with")
    command.add_argument("--tokenize", default="13a", help="sacreBLEU's tokenizer (default: 13a)")
    command.add_argument("--json", metavar="OUT", help="write the scores to this file too")
    command.add_argument("--output", metavar="HYP", help="write the translations to this file")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("plot", help="draw flips, scores and layers of finished runs of the recipe")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with evaluation.json and curve.json")
    command.add_argument("--output", type=Path, default=Path("plots"), metavar="DIR", help="where the pictures go")
    command.add_argument("--format", choices=("png", "svg"), default="png", help="kind of the pictures")
    command.set_defaults(run=_plot)

    command = commands.add_parser("doctor", help="print which kernels this machine runs, and why")
    command.set_defaults(run=_doctor)
    return parser


def _add_model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="PATH", help="folder of the model, or its name on the Hub")
    command.add_argument(
        "--batch-size", type=_positive, default=64, metavar="N", help="sentences at once (default: 64)"
    )
    command.add_argument("--beams", type=_positive, metavar="N", help="beam size (default: the model's)")
    command.add_argument(
        "--max-length", type=_positive, metavar="N", help="longest output in tokens (default: the model's)"
    )
    command.add_argument("--src-lang", metavar="CODE", help="source language of a multilingual model, such as eng_Latn")
    command.add_argument("--tgt-lang", metavar="CODE", help="target language of a multilingual model")
    command.add_argument(
        "--compute",
        choices=("auto", "fp32", "bf16", "int8", "dense", "reference"),
        help="how a packed model computes (default: the fastest that keeps the file's precision)",
    )
    command.add_argument(
        "--head", choices=("dense", "int8"), help="how its output projection computes (default: as the layers do)"
    )
    command.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: all)")
    command.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a number of at least 1, got {text!r}")
    return int(text)


def _inspect(args: argparse.Namespace) -> None:
    from hf_nmsparse.checking import check_folder
    from hf_nmsparse.packing import VALUE_DTYPES, packed_bytes

    found = check_folder(args.path)
    pattern, dtype = found.pattern, VALUE_DTYPES[found.values]
    print(f"pattern        {pattern}, {pattern.n} of every {pattern.m} weights are kept")
    print(f"values         {found.values}{', embeddings and output projection too' if found.embeddings else ''}")
    print(f"sparse layers  {len(found.layers)}, every one valid")
    print(f"targets        {', '.join(found.targets) if found.targets is not None else 'every linear layer'}")
    print(f"ignored        {', '.join(found.ignored) if found.ignored is not None else 'output heads and routers'}")
    print(f"packed bytes   {found.packed_bytes:,}, {found.packed_bytes / found.dense_bytes:.1%} of dense")
    print(f"dense bytes    {found.dense_bytes:,}")
    print(f"written by     {found.producer or 'unknown'}, format version {found.format_version}")
    print(f"standalone     {'yes, with trust_remote_code=True' if found.standalone else 'no, this package reads it'}")
    if args.layers:
        for name, (rows, columns) in found.layers.items():
            print(f"{name}  {rows}x{columns}  {packed_bytes(rows, columns, pattern, dtype):,} bytes")


def _pack(args: argparse.Namespace) -> None:
    from hf_nmsparse.layers import sparse_layers
    from hf_nmsparse.saving import save_packed

    _check_target(args.target)
    model, _ = _load(args.source, tokenizer=False)
    if sparse_layers(model):
        if args.pattern is not None:
            raise ValueError(f"{args.source} knows its own pattern; leave out --pattern")
    elif args.pattern is None:
        raise ValueError(f"{args.source} says nothing of sparsity; if its weights are masked, give --pattern 2:4")
    else:
        _mark_masked_layers(model, args.pattern)
    save_packed(model, args.target, values=args.values, embeddings=args.embeddings, standalone=args.standalone)
    _copy_files_beside(args.source, args.target)
    _inspect(argparse.Namespace(path=args.target, layers=False))


def _mark_masked_layers(model: Any, text: str) -> None:
    """Makes N:M layers of the linear layers whose weights keep to the pattern already."""
    from hf_nmsparse.config import NMSparseConfig
    from hf_nmsparse.masks import count_violations
    from hf_nmsparse.pattern import NMPattern
    from hf_nmsparse.sparsify import select_layers, sparsify

    pattern = NMPattern.parse(text)
    chosen, _ = select_layers(model, NMSparseConfig(pattern))
    masked = [name for name, layer in chosen.items() if not count_violations(layer.weight, pattern)]
    if not masked:
        raise ValueError(f"no linear layer of the model is {pattern} sparse; train it before it is packed")
    for name in chosen:
        if name not in masked:
            print(f"nmsparse: {name} is not {pattern} sparse and stays dense", file=sys.stderr)
    sparsify(model, NMSparseConfig(pattern, masked if len(masked) < len(chosen) else None))


def _export(args: argparse.Namespace) -> None:
    from hf_nmsparse.saving import export_dense

    _check_target(args.target)
    model, _ = _load(args.source, tokenizer=False)
    export_dense(model, args.target)
    _copy_files_beside(args.source, args.target)
    print(f"{args.target}: dense")


def _convert(args: argparse.Namespace) -> None:
    from hf_nmsparse.bitmask import convert_bitmask

    _check_target(args.target)
    count = convert_bitmask(args.source, args.target)
    print(f"{args.target}: dense, {count} weights are 2:4 sparse")


def _translate(args: argparse.Namespace) -> None:
    with _reading(args.input) as source:
        _check_output(args.output, args.input)
        chunks = _translations(args, source, args.batch_size if args.input == "-" else _CHUNK)
        with _writing(args.output) as target:
            for chunk in chunks:
                target.writelines(f"{text}\n" for text in chunk)
                target.flush()


def _evaluate(args: argparse.Namespace) -> None:
    from hf_nmsparse.metrics import compare, score, versions

    # Whatever can be wrong is found before the translation rather than after it.
    sources, references = _lines(args.source), _lines(args.reference)
    baseline = None if args.baseline is None else _lines(args.baseline)
    for name, lines in ((args.reference, references), (args.baseline, baseline)):
        if lines is not None and len(lines) != len(sources):
            raise ValueError(
                f"{args.source} has {len(sources)} lines and {name} has {len(lines)}; they must be aligned"
            )
    if not sources:
        raise ValueError(f"{args.source} is empty")
    score(references, references, args.tokenize)
    for output in (args.output, args.json):
        _check_output(output, args.source, args.reference, args.baseline)

    hypotheses = [text for chunk in _translations(args, iter(sources), _CHUNK) for text in chunk]
    if args.output is not None:
        with _writing(args.output) as file:
            file.writelines(f"{text}\n" for text in hypotheses)
    result = score(hypotheses, references, args.tokenize)
    print(result)
    asked = (
        "model",
        "source",
        "reference",
        "baseline",
        "beams",
        "max_length",
        "compute",
        "head",
        "src_lang",
        "tgt_lang",
    )
    record = {
        **asdict(result),
        "against_baseline": None,
        "arguments": {key: getattr(args, key) for key in asked},
        "versions": versions(),
    }
    if baseline is not None:
        comparison = compare(hypotheses, baseline, references, tokenize=args.tokenize)
        print(comparison)
        record["against_baseline"] = {
            **asdict(comparison),
            "difference": comparison.difference,
            "verdict": comparison.verdict,
        }
    if args.json is not None:
        with _writing(args.json) as file:
            file.write(json.dumps(record, indent=2, sort_keys=True) + "\n")


def _plot(args: argparse.Namespace) -> None:
    from hf_nmsparse.plots import plot_runs, read_run

    for file in plot_runs([read_run(folder) for folder in args.runs], args.output, args.format):
        print(file)


def _doctor(args: argparse.Namespace) -> None:
    from hf_nmsparse.kernels.__main__ import main as doctor

    doctor()


def _translations(args: argparse.Namespace, lines: Iterator[str], chunk: int) -> Iterator[list[str]]:
    """Loads the model, then translates lines as they are asked for, so many at a time; a translation is one line."""
    import torch

    from hf_nmsparse.pipeline import translate
    from hf_nmsparse.quantizer import set_compute

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, tokenizer = _load(args.model)
    _mask_for_good(model)
    if args.compute is not None or args.head is not None:
        set_compute(model, args.compute or "auto", args.head)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device)
    except (AssertionError, RuntimeError) as error:  # a build without CUDA asserts
        raise ValueError(f"--device {device}: {error}") from error
    generation = {"num_beams": args.beams, "max_length": args.max_length}
    given = {key: value for key, value in generation.items() if value is not None}

    def translated(sentences: list[str]) -> list[str]:
        languages = {"src_lang": args.src_lang, "tgt_lang": args.tgt_lang}
        texts = translate(model, tokenizer, sentences, args.batch_size, **languages, **given)
        return [" ".join(text.splitlines()) for text in texts]

    return map(translated, iter(lambda: list(islice(lines, chunk)), []))


def _load(source: str, tokenizer: bool = True) -> tuple[Any, Any]:
    """The model in a folder or on the Hub, and its tokenizer."""
    from safetensors import SafetensorError
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    import hf_nmsparse.quantizer  # noqa: F401  # registers the packed format

    logging.disable_progress_bar()
    if not Path(source).exists() and source.count("/") != 1:
        raise ValueError(f"no folder {source}, and no 'user/name' on the Hub either")
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(source)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{source}: the weights do not fit config.json: {str(error).strip()}") from error
    if not tokenizer:
        return model, None
    try:
        return model, AutoTokenizer.from_pretrained(source)
    except Exception as error:  # what is raised for missing files is up to each tokenizer, TypeError among others
        raise ValueError(f"{source}: no tokenizer could be loaded: {str(error).strip()}") from error


def _mask_for_good(model: Any) -> None:
    """Lets the layers of a training checkpoint run as plain linear layers, without a new mask in every forward."""
    from hf_nmsparse.layers import NMLinear

    for module in [module for module in model.modules() if isinstance(module, NMLinear)]:
        module.finalize()
        module.to_linear()


def _check_target(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; give a new folder")


def _check_output(output: str | None, *inputs: str | None) -> None:
    """Refuses a file that cannot be written or is one of the inputs."""
    if output is None or output == "-":
        return
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} to write {path.name} into")
    if path.exists() and any(name not in (None, "-") and path.samefile(name) for name in inputs):
        raise ValueError(f"{path} is an input; name another output")


def _copy_files_beside(source: str, target: Path) -> None:
    """Copies tokenizer, generation settings and card as they are; of a Hub model the tokenizer is loaded and saved."""
    if Path(source).is_dir():
        for pattern in _FILES_BESIDE:
            for file in Path(source).glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, target / file.name)
        return
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def _lines(name: str) -> list[str]:
    with _reading(name) as lines:
        return list(lines)


@contextmanager
def _reading(name: str) -> Iterator[Iterator[str]]:
    """The lines of a file or of standard input, without what ends them. Only a line feed ends a line."""
    if name == "-":
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", newline="\n")
        yield _decoded(sys.stdin, "standard input")
        return
    if not Path(name).is_file():
        raise ValueError(f"no file {name}")
    with Path(name).open(encoding="utf-8", newline="\n") as file:
        yield _decoded(file, name)


def _decoded(lines: IO[str], name: str) -> Iterator[str]:
    number = 0
    try:
        for line in lines:
            number += 1
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 after line {number}") from error


@contextmanager
def _writing(name: str) -> Iterator[IO[str]]:
    if name == "-":
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        yield sys.stdout
        return
    with Path(name).open("w", encoding="utf-8", newline="\n") as file:
        yield file
