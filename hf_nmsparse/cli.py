"""The command ``nmsparse``: inspect, pack, export, translate, evaluate."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, Any, NoReturn

__all__ = ["main"]

# torch and transformers take seconds to import: each command imports what it needs.

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*",
    "merges.txt",
    "*.spm",
    "*.model",
)


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

    command = commands.add_parser("inspect", help="check a saved model and print what is sparse in it")
    command.add_argument("path", type=Path, metavar="PATH", help="folder of the model")
    command.add_argument("--layers", action="store_true", help="list every sparse layer")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("pack", help="write a trained model as packed files")
    command.add_argument("source", metavar="SRC", help="checkpoint of a training, or a masked dense model")
    command.add_argument("target", type=Path, metavar="DST", help="new folder")
    command.add_argument("--values", choices=("fp32", "fp16", "bf16"), help="number type of the weights; as they are")
    command.add_argument("--pattern", help="N:M, for a dense model whose weights are masked but not marked as such")
    command.set_defaults(run=_pack)

    command = commands.add_parser("export", help="write a packed model as dense files that any tool reads")
    command.add_argument("source", metavar="SRC", help="packed model")
    command.add_argument("target", type=Path, metavar="DST", help="new folder")
    command.set_defaults(run=_export)

    command = commands.add_parser("translate", help="translate lines of text")
    _add_model_arguments(command)
    command.add_argument("--input", default="-", metavar="FILE", help="one sentence a line; - is standard input")
    command.add_argument("--output", default="-", metavar="FILE", help="one translation a line; - is standard output")
    command.set_defaults(run=_translate)

    command = commands.add_parser("evaluate", help="translate a test set and score it with sacreBLEU")
    _add_model_arguments(command)
    command.add_argument("--source", required=True, type=Path, metavar="FILE", help="one sentence a line")
    command.add_argument("--reference", required=True, type=Path, metavar="FILE", help="one raw reference a line")
    command.add_argument(
        "--baseline", type=Path, metavar="FILE", help="translations by the dense model, to compare with"
    )
    command.add_argument("--tokenize", default="13a", help="sacreBLEU's tokenizer (default: 13a)")
    command.add_argument("--json", type=Path, metavar="OUT", help="write the scores to this file too")
    command.set_defaults(run=_evaluate)
    return parser


def _add_model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="PATH", help="folder of the model, or its name on the Hub")
    command.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="sentences at once (default: 32)"
    )
    command.add_argument("--beams", type=_positive, metavar="N", help="beam size (default: the model's)")
    command.add_argument("--max-new-tokens", type=_positive, metavar="N", help="length limit (default: the model's)")
    command.add_argument("--src-lang", metavar="CODE", help="source language of a multilingual model, such as eng_Latn")
    command.add_argument("--tgt-lang", metavar="CODE", help="target language of a multilingual model")
    command.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: all)")
    command.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a number of at least 1, got {text!r}")
    return int(text)


def _inspect(args: argparse.Namespace) -> None:
    from hf_nmsparse.packing import VALUE_DTYPES, PackedFormatError, check_packed

    config = _sparsity(args.path)
    if config is None or config.format == "dense":
        kind = "dense" if config is None else f"dense masters of a training, pattern {config.pattern}"
        print(f"{args.path}: {kind}; nmsparse pack writes it packed")
        return
    pattern, dtype = config.pattern, VALUE_DTYPES[config.values]
    layers: list[str] = []
    stored = dense = 0
    with ExitStack() as stack:
        files = _open_weights(args.path, stack)
        for key, (file, tensors) in sorted(files.items()):
            name = key.removesuffix(".weight_indices")
            if f"{key}_indices" in files:
                continue
            size = full_size = tensors.get_tensor(key).nbytes
            if name != key:
                if f"{name}.weight" not in files:
                    raise PackedFormatError(f"{file}: {name}.weight: values are missing beside the codes")
                values = files[f"{name}.weight"][1].get_tensor(f"{name}.weight")
                check_packed(values, tensors.get_tensor(key), pattern, dtype, name=name, file=file)
                rows, columns = values.shape[0], values.shape[1] // pattern.n * pattern.m
                size, full_size = size + values.nbytes, rows * columns * values.itemsize
                layers.append(f"{name}  {rows}x{columns}  {size:,} bytes")
            stored, dense = stored + size, dense + full_size
    if not layers:
        raise PackedFormatError(f"{args.path}: config.json says packed, but no file holds a packed layer")
    print(f"pattern        {pattern}, {pattern.n} of every {pattern.m} weights are kept")
    print(f"values         {config.values}")
    print(f"sparse layers  {len(layers)}, every one valid")
    print(f"targets        {', '.join(config.targets) if config.targets else 'every linear layer'}")
    print(f"ignored        {', '.join(config.ignore) if config.ignore is not None else 'output heads and routers'}")
    print(f"packed bytes   {stored:,}, {stored / dense:.1%} of dense")
    print(f"dense bytes    {dense:,}")
    print(f"written by     {config.producer or 'unknown'}, format version {config.format_version}")
    for layer in layers if args.layers else ():
        print(layer)


def _pack(args: argparse.Namespace) -> None:
    from hf_nmsparse.layers import sparse_layers
    from hf_nmsparse.quantizer import save_packed

    _check_target(args.target)
    model, _ = _load(args.source, tokenizer=False)
    if sparse_layers(model):
        if args.pattern is not None:
            raise ValueError(f"{args.source} knows its own pattern; leave out --pattern")
    elif args.pattern is None:
        raise ValueError(f"{args.source} says nothing of sparsity; if its weights are masked, give --pattern 2:4")
    else:
        _mark_masked_layers(model, args.pattern)
    save_packed(model, args.target, values=args.values)
    _copy_tokenizer(args.source, args.target)
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
    from hf_nmsparse.quantizer import export_dense

    _check_target(args.target)
    model, _ = _load(args.source, tokenizer=False)
    export_dense(model, args.target)
    _copy_tokenizer(args.source, args.target)
    print(f"{args.target}: dense")


def _translate(args: argparse.Namespace) -> None:
    with _reading(args.input) as source:
        if args.input != "-" and Path(args.output).exists() and Path(args.output).samefile(args.input):
            raise ValueError(f"{args.output} is the input; name another output")
        # Longer chunks sort better by length; standard input is answered batch by batch.
        chunks = _translations(args, source, chunk=args.batch_size * (1 if args.input == "-" else 16))
        with _writing(args.output) as target:
            for chunk in chunks:
                target.writelines(f"{text}\n" for text in chunk)
                target.flush()


def _evaluate(args: argparse.Namespace) -> None:
    from hf_nmsparse.metrics import compare, score, versions

    sources, references = _lines(args.source), _lines(args.reference)
    baseline = None if args.baseline is None else _lines(args.baseline)
    for file, lines in ((args.reference, references), (args.baseline, baseline)):
        if lines is not None and len(lines) != len(sources):
            raise ValueError(
                f"{args.source} has {len(sources)} lines and {file} has {len(lines)}; they must be aligned"
            )
    if not sources:
        raise ValueError(f"{args.source} is empty")
    score(references, references, args.tokenize)  # complains before the translation rather than after it
    hypotheses = [text for chunk in _translations(args, iter(sources), chunk=len(sources)) for text in chunk]
    result = score(hypotheses, references, args.tokenize)
    print(result)
    record = {**asdict(result), "model": args.model, "against_baseline": None, "versions": versions()}
    if baseline is not None:
        comparison = compare(hypotheses, baseline, references, tokenize=args.tokenize)
        print(comparison)
        record["against_baseline"] = {
            **asdict(comparison),
            "difference": comparison.difference,
            "verdict": comparison.verdict,
        }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _translations(args: argparse.Namespace, lines: Iterator[str], chunk: int) -> Iterator[list[str]]:
    """Loads the model, then translates lines as they are asked for, so many at a time; a translation is one line."""
    import torch

    from hf_nmsparse.pipeline import translate

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, tokenizer = _load(args.model)
    _mask_for_good(model)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device}: {error}") from error
    generation = {"num_beams": args.beams, "max_new_tokens": args.max_new_tokens}
    given = {key: value for key, value in generation.items() if value is not None}

    def translated(sentences: list[str]) -> list[str]:
        languages = {"src_lang": args.src_lang, "tgt_lang": args.tgt_lang}
        texts = translate(model, tokenizer, sentences, args.batch_size, **languages, **given)
        return [" ".join(text.split()) for text in texts]

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
    return model, AutoTokenizer.from_pretrained(source) if tokenizer else None


def _mask_for_good(model: Any) -> None:
    """Lets the layers of a training checkpoint run as plain linear layers, without a new mask in every forward."""
    from hf_nmsparse.layers import NMLinear

    for module in [module for module in model.modules() if isinstance(module, NMLinear)]:
        module.finalize()
        module.to_linear()


def _sparsity(folder: Path) -> Any:
    """What config.json says on sparsity, checked; None for a dense model."""
    from hf_nmsparse.quantizer import NMSparseQuantizationConfig

    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it holds no model")
    record = _read_json(folder / "config.json").get("quantization_config")
    if record is None:
        return None
    if not isinstance(record, dict):
        raise ValueError(f"{folder / 'config.json'}: quantization_config is no JSON object")
    return NMSparseQuantizationConfig.from_dict(record)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object")
    return content


def _open_weights(folder: Path, stack: ExitStack) -> dict[str, tuple[str, Any]]:
    """For each key of a checkpoint the name of its file and the open file."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = {str(name) for name in _read_json(index).get("weight_map", {}).values()}
    files: dict[str, tuple[str, Any]] = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}")
        try:
            opened = stack.enter_context(safe_open(folder / name, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is not a whole safetensors file ({error})") from error
        files |= dict.fromkeys(opened.keys(), (name, opened))
    return files


def _check_target(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; give a new folder")


def _copy_tokenizer(source: str, target: Path) -> None:
    """Copies tokenizer files as they are; from the Hub they are loaded and saved."""
    if Path(source).is_dir():
        for pattern in _TOKENIZER_FILES:
            for file in Path(source).glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, target / file.name)
        return
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def _lines(file: Path) -> list[str]:
    with _reading(str(file)) as lines:
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
