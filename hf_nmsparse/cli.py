"""The command ``nmsparse``: inspect, pack, export, translate, evaluate, shortlist, plot, doctor."""

from __future__ import annotations

import argparse
import codecs
import ctypes
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NoReturn

__all__ = ["main"]

# torch and transformers take seconds to import: each command imports what it needs.

# What a folder holds beside the model: the tokenizer, whose class names more, the settings of generation, the card.
_FILES_BESIDE = (
    "README.md",
    "generation_config.json",
    "chat_template*",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*",
    "merges.txt",
    "*.spm",
    "*.model",
    "shortlist.safetensors",
)

# So many lines of a file are sorted by length together; longer chunks save little and delay the output.
_CHUNK = 4096

_LONGEST_ERROR = 500


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        0; or 2 after a user's error, with one line on standard error; or 1 where the reader of the output went away.
    """
    _keep_standard_numbers()
    try:
        args = _parser().parse_args(argv)
        if sys.stdout is None and args.run is not _translate:
            raise ValueError("standard output is closed; open it or send it to /dev/null")
        args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 1
    except (ValueError, OSError) as error:
        _say(f"nmsparse: {_one_line(error)}", error=True)
        _drop_output()
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _keep_standard_numbers() -> None:
    """Where the caller has closed a standard stream no file takes its number, or what native code says ends in it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def _drop_output() -> None:
    """Drops what standard output does not take: Python tries once more when it ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception) -> str:
    """What an error says, up to a length that is still read."""
    text = " ".join(line.strip() for line in str(error).splitlines()).strip() or type(error).__name__
    return text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]} ..."


def _named(error: BaseException) -> str:
    """What an error says, after its kind."""
    return f"{type(error).__name__}: {str(error).strip()}".removesuffix(": ")


def _say(text: object, error: bool = False) -> None:
    """Prints text that may come from a file or an argument."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    print(_plain(str(text)), file=stream)


def _plain(text: str, breaks: str = "\n") -> str:
    """Text with nothing in it that steers a terminal, and no line breaks but those that are allowed."""
    shown = (char if char.isprintable() or char in breaks else char.encode("unicode_escape").decode() for char in text)
    return "".join(shown)


def _row(text: str) -> None:
    """Prints one line, whatever values it shows."""
    _say(_plain(text, breaks=""))


def _plain_record(record: logging.LogRecord) -> bool:
    """Makes what is logged plain: transformers names keys and settings of files."""
    record.msg, record.args = _plain(record.getMessage()), ()
    return True


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
    command.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="one translation a line, whole or not at all; - is standard output, written batch by batch",
    )
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

    command = commands.add_parser("shortlist", help="learn which target tokens go with a source token, for speed")
    command.add_argument("model", metavar="MODEL", help="folder of the model, where the shortlist goes")
    command.add_argument(
        "--corpus",
        required=True,
        nargs="+",
        metavar="FILE",
        help="pairs in one file (JSON lines, tsv, parquet), or source and target, one sentence a line",
    )
    command.add_argument("--source-lang", default="source", metavar="KEY", help="the source's name in a file of pairs")
    command.add_argument("--target-lang", default="target", metavar="KEY", help="the target's name in a file of pairs")
    command.add_argument(
        "--translate", action="store_true", help="the corpus is source text, which the model translates itself"
    )
    command.add_argument(
        "--per-token", type=_positive, default=100, metavar="N", help="most candidates a source token (default: 100)"
    )
    command.add_argument(
        "--always", type=_positive, default=1000, metavar="N", help="tokens that are always there (default: 1000)"
    )
    command.set_defaults(run=_shortlist)

    command = commands.add_parser("plot", help="draw flips, scores and layers of finished runs of the recipe")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with evaluation.json and curve.json")
    command.add_argument("--output", type=Path, default=Path("plots"), metavar="DIR", help="where the pictures go")
    command.add_argument("--format", choices=("png", "svg"), default="png", help="kind of the pictures")
    command.set_defaults(run=_plot)

    command = commands.add_parser("doctor", help="print which kernels this machine runs, and what translates a model")
    command.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="folder of a model")
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
        help="how a packed model computes (default: the fastest that keeps the file's precision), or a dense one where "
        "the engine runs it",
    )
    command.add_argument(
        "--head", choices=("dense", "int8"), help="how its output projection computes (default: as the layers do)"
    )
    command.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: all)")
    command.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")


def _positive(text: str, most: int = 2**31 - 1) -> int:
    if not text.isdecimal() or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"needs a number of at least 1, got {text!r}")
    if len(text.lstrip("0")) > len(str(most)) or int(text) > most:
        raise argparse.ArgumentTypeError(f"needs a number of at most {most}, got {text[:20]}")
    return int(text)


def _threads(text: str) -> int:
    return _positive(text, 1024)


def _inspect(args: argparse.Namespace) -> None:
    from hf_nmsparse.packed_files import check_folder
    from hf_nmsparse.packed_format import packed_bytes

    found = check_folder(args.path)
    pattern = found.pattern
    _row(f"pattern        {pattern}, {pattern.n} of every {pattern.m} weights are kept")
    _row(f"values         {found.values}{', embeddings and output projection too' if found.embeddings else ''}")
    _row(f"sparse layers  {len(found.layers)}, every one valid")
    _row(f"targets        {', '.join(found.targets) if found.targets is not None else 'every linear layer'}")
    _row(f"ignored        {', '.join(found.ignored) if found.ignored is not None else 'output heads and routers'}")
    _row(f"packed bytes   {found.packed_bytes:,}, {found.packed_bytes / found.dense_bytes:.1%} of dense")
    _row(f"dense bytes    {found.dense_bytes:,}")
    _row(f"written by     {found.producer or 'unknown'}, format version {found.format_version}")
    _row(f"standalone     {'yes, with trust_remote_code=True' if found.standalone else 'no, this package reads it'}")
    if args.layers:
        for name, (rows, columns) in found.layers.items():
            _row(f"{name}  {rows}x{columns}  {packed_bytes(rows, columns, pattern, found.values):,} bytes")


def _pack(args: argparse.Namespace) -> None:
    from hf_nmsparse.layers import sparse_layers
    from hf_nmsparse.saving import save_packed

    with _new_folder(args.target) as target:
        model, _ = _load(args.source, tokenizer=False)
        if sparse_layers(model):
            if args.pattern is not None:
                raise ValueError(f"{args.source} knows its own pattern; leave out --pattern")
        elif args.pattern is None:
            raise ValueError(f"{args.source} says nothing of sparsity; if its weights are masked, give --pattern 2:4")
        else:
            _mark_masked_layers(model, args.pattern)
        save_packed(model, target, values=args.values, embeddings=args.embeddings, standalone=args.standalone)
        _copy_files_beside(args.source, target)
    _inspect(argparse.Namespace(path=os.path.realpath(args.target), layers=False))


def _mark_masked_layers(model: Any, text: str) -> None:
    """Makes N:M layers of the linear layers whose weights keep to the pattern already."""
    from hf_nmsparse.config import NMSparseConfig
    from hf_nmsparse.masks import count_violations
    from hf_nmsparse.pattern import NMPattern
    from hf_nmsparse.sparse_model import select_layers, sparsify

    pattern = NMPattern.parse(text)
    chosen, _ = select_layers(model, NMSparseConfig(pattern))
    masked = [name for name, layer in chosen.items() if not count_violations(layer.weight, pattern)]
    if not masked:
        raise ValueError(f"no linear layer of the model is {pattern} sparse; train it before it is packed")
    for name in chosen:
        if name not in masked:
            _say(f"nmsparse: {name} is not {pattern} sparse and stays dense", error=True)
    sparsify(model, NMSparseConfig(pattern, masked if len(masked) < len(chosen) else None))


def _export(args: argparse.Namespace) -> None:
    from hf_nmsparse.saving import export_dense

    with _new_folder(args.target) as target:
        model, _ = _load(args.source, tokenizer=False)
        export_dense(model, target)
        _copy_files_beside(args.source, target)
    _say(f"{args.target}: dense")


def _convert(args: argparse.Namespace) -> None:
    from hf_nmsparse.compressed_tensors import convert_bitmask

    with _new_folder(args.target) as target:
        count = convert_bitmask(args.source, target)
    _say(f"{args.target}: dense, {count} weights are 2:4 sparse")


def _translate(args: argparse.Namespace) -> None:
    with _reading(args.input) as source:
        _check_output(args.output, args.input)
        chunks = _translations(args, source, _CHUNK if Path(args.input).is_file() else args.batch_size)
        first = next(chunks, [])  # whatever fails fails before the output is touched
        with _writing(args.output) as target:
            for chunk in chain([first], chunks):
                target.writelines(f"{text}\n" for text in chunk)
                target.flush()


def _evaluate(args: argparse.Namespace) -> None:
    from hf_nmsparse.evaluation import versions
    from hf_nmsparse.metrics import compare, score

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
    for output, other in ((args.output, None), (args.json, args.output)):
        _check_output(output, args.source, args.reference, args.baseline)
        if output is not None and other is not None and _is_one_file(output, other):
            raise ValueError(f"{output} is given as --output and as --json; name two files")

    hypotheses = [text for chunk in _translations(args, iter(sources), _CHUNK) for text in chunk]
    if args.output is not None:
        with _writing(args.output) as file:
            file.writelines(f"{text}\n" for text in hypotheses)
    result = score(hypotheses, references, args.tokenize)
    _say(result)
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
        _say(comparison)
        record["against_baseline"] = {
            **asdict(comparison),
            "difference": comparison.difference,
            "verdict": comparison.verdict,
        }
    if args.json is not None:
        with _writing(args.json) as file:
            file.write(json.dumps(record, indent=2, sort_keys=True) + "\n")


def _shortlist(args: argparse.Namespace) -> None:
    from transformers import AutoConfig, GenerationConfig

    from hf_nmsparse.engine_spec import read
    from hf_nmsparse.shortlist import coverage, learn, save
    from hf_nmsparse.texts import languages_of

    if not Path(args.model).is_dir():
        raise ValueError(f"no folder {args.model}")
    config = AutoConfig.from_pretrained(args.model)
    spec = read(config.to_dict())
    tokenizer = _load_tokenizer(args.model)
    if languages_of(tokenizer):
        raise ValueError(f"{args.model} has several languages, and a shortlist is of one pair")
    has_settings = (Path(args.model) / "generation_config.json").is_file()
    settings: Any = GenerationConfig.from_pretrained(args.model) if has_settings else config
    forced = ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id")
    given = [getattr(settings, name, None) for name in forced]
    keep = {token for one in given if one is not None for token in (one if isinstance(one, list) else [one])}
    texts = list(_translated_pairs(args) if args.translate else _pairs(args))
    sources = tokenizer([source for source, _ in texts])["input_ids"]
    targets = tokenizer(text_target=[target for _, target in texts])["input_ids"]
    source_vocabulary, target_vocabulary = spec.config.encoder.vocabulary, spec.config.target_vocabulary
    shortlist = learn(
        zip(sources, targets, strict=True),
        source_vocabulary,
        target_vocabulary,
        keep=keep,
        per_token=args.per_token,
        always=args.always,
        copies=source_vocabulary == target_vocabulary and not getattr(tokenizer, "separate_vocabs", False),
    )
    kept, found = coverage(shortlist, list(zip(sources, targets, strict=True)))
    file = save(shortlist, args.model)
    _say(f"{file}: {kept:,.0f} of {target_vocabulary:,} tokens a sentence, with {found:.1%} of the targets' tokens")


def _pairs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The sentence pairs of ``--corpus``."""
    from hf_nmsparse.pairs import read_pairs

    files = tuple(map(Path, args.corpus))
    if len(files) > 2:
        raise ValueError(f"--corpus takes a file of pairs, or a source and its target, got {len(files)} files")
    for file in files:
        if not file.is_file():
            raise ValueError(f"no file {file}")
    for row in read_pairs(files, args.source_lang, args.target_lang):
        yield row["source"], row["target"]


def _translated_pairs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The lines of ``--corpus`` with the model's own translations."""
    from hf_nmsparse.pipeline import translate

    if len(args.corpus) != 1:
        raise ValueError(f"--translate takes one file of source text, got {len(args.corpus)}")
    lines = [line for line in _lines(args.corpus[0]) if line.strip()]
    model, tokenizer = _load(args.model)
    _mask_for_good(model)
    return zip(lines, translate(model, tokenizer, lines, 64), strict=True)


def _plot(args: argparse.Namespace) -> None:
    from hf_nmsparse.plots import plot_runs, read_runs

    for file in plot_runs(read_runs(args.runs), args.output, args.format):
        _say(file)


def _doctor(args: argparse.Namespace) -> None:
    from hf_nmsparse.engine_spec import read
    from hf_nmsparse.kernels import engine
    from hf_nmsparse.kernels.__main__ import main as doctor
    from hf_nmsparse.packed_files import read_object

    for model in args.models:
        if not (model / "config.json").is_file():
            raise ValueError(f"doctor: {model} holds no config.json; name the folder of a model")
    doctor()
    for model in args.models:
        config, reason = read_object(model / "config.json"), engine.why_not()
        try:
            read(config)
        except ValueError as error:
            reason = reason or str(error).removeprefix("engine: ")
        _row(f"{model}: " + (f"transformers translates: {reason}" if reason else "the engine translates"))


def _translations(args: argparse.Namespace, lines: Iterator[str], chunk: int) -> Iterator[list[str]]:
    """Loads the model, then translates lines as they are asked for, so many at a time; a translation is one line."""
    given = {"num_beams": args.beams, "max_length": args.max_length}
    settings = {key: value for key, value in given.items() if value is not None}
    translate = _on_engine(args, settings) or _on_torch(args, settings)

    def translated(sentences: list[str]) -> list[str]:
        return [" ".join(text.splitlines()) for text in translate(sentences)]

    return map(translated, iter(lambda: list(islice(lines, chunk)), []))


def _on_engine(args: argparse.Namespace, settings: dict[str, Any]) -> Callable[[list[str]], list[str]] | None:
    """Translates on the native engine; None for what that does not run, which transformers may know or refuse."""
    chosen = args.head is not None or args.compute in ("dense", "reference")
    if os.environ.get("HF_NMSPARSE_ENGINE") == "0" or chosen or not _on_cpu(args.device):
        return None
    from hf_nmsparse.translator import Translator

    try:
        translator = Translator(args.model, compute=args.compute or "auto", threads=args.threads)
        translator.check(**settings)
    except ValueError:
        return None

    def translate(sentences: list[str]) -> list[str]:
        languages = {"src_lang": args.src_lang, "tgt_lang": args.tgt_lang}
        found = translator.translate(sentences, batch_size=args.batch_size, **languages, **settings)
        return [translation.text for translation in found]

    return translate


def _on_cpu(device: str | None) -> bool:
    """Whether a CPU is to translate. Only where there may be a GPU is torch asked, which takes a second to import."""
    if device is not None:
        return device == "cpu"
    for name in ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libamdhip64.so"):
        with suppress(OSError):  # no such driver
            ctypes.CDLL(name)
            return _device(None) == "cpu"
    return True


def _on_torch(args: argparse.Namespace, settings: dict[str, Any]) -> Callable[[list[str]], list[str]]:
    """Translates with the model of transformers."""
    import torch

    from hf_nmsparse.compute import set_compute
    from hf_nmsparse.pipeline import translate

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = _device(args.device)
    model, tokenizer = _load(args.model)
    _mask_for_good(model)
    if args.compute is not None or args.head is not None:
        set_compute(model, args.compute or "auto", args.head)
    model.to(device)

    def translated(sentences: list[str]) -> list[str]:
        languages = {"src_lang": args.src_lang, "tgt_lang": args.tgt_lang}
        try:
            return translate(model, tokenizer, sentences, args.batch_size, **languages, **settings)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"--device {device}: {error}; give a smaller --batch-size") from error
        except (ValueError, OSError):
            raise
        except Exception as error:  # what is raised for settings that do not fit the model is up to each model
            raise ValueError(f"{args.model} cannot translate: {_named(error)}") from error

    return translated


def _device(name: str | None) -> str:
    """The device to compute on: the one that was named, if numbers can be had there."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that were devices once
            torch.zeros(1, device=name).item()
    except Exception as error:  # what is raised is up to each device: AssertionError, ModuleNotFoundError and others
        raise ValueError(f"--device {name}: {str(error).strip()}") from error
    return name


def _load(source: str, tokenizer: bool = True) -> tuple[Any, Any]:
    """The model in a folder or on the Hub, and its tokenizer.

    Nobody is asked whether to run code that comes with them: the terminal may be where the sentences come from.
    """
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from hf_nmsparse.loading import load_seq2seq
    from hf_nmsparse.packed_format import PackedFormatError

    disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_plain_record)
    if not Path(source).is_dir() and (Path(source).exists() or source.count("/") != 1):
        raise ValueError(f"no folder {source}, and no 'user/name' on the Hub either")
    try:
        model = load_seq2seq(source, trust_remote_code=False)
        if (Path(source) / "generation_config.json").exists():  # the model passes over a damaged one in silence
            GenerationConfig.from_pretrained(source)
    except (PackedFormatError, OSError):
        raise
    except Exception as error:  # what is raised for damaged files is up to each reader
        kind = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
        raise ValueError(f"{source} cannot be loaded: {kind}{str(error).strip()}") from error
    return model, _load_tokenizer(source) if tokenizer else None


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # up to each tokenizer: TypeError among others, and no Exception where Rust panics
        raise ValueError(f"{source}: no tokenizer could be loaded: {str(error).strip()}") from error


def _mask_for_good(model: Any) -> None:
    """Lets the layers of a training checkpoint run as plain linear layers, without a new mask in every forward."""
    from hf_nmsparse.layers import NMLinear

    for module in [module for module in model.modules() if isinstance(module, NMLinear)]:
        module.finalize()
        module.to_linear()


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder whose files move to ``path`` together, which was not there, or was empty.

    Where the block fails nothing of it stays, and what another process has put there does.
    """
    from safetensors import SafetensorError

    from hf_nmsparse.files import model_folder

    place = Path(os.path.realpath(path))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{path} is there already; give a new folder")
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    written = str(path)
    try:
        with model_folder(place) as beside:
            # A folder of its own, for who saves a model locks where it goes, and the one beside is locked.
            folder = Path(written := tempfile.mkdtemp(dir=beside))
            yield folder
            for file in folder.iterdir():
                file.replace(beside / file.name)
            folder.rmdir()
    except BaseException as error:
        for left in made:
            with suppress(OSError):  # another process has put something there
                left.rmdir()
        if isinstance(error, SafetensorError):  # of a full disk, where others raise OSError
            raise ValueError(f"{path} could not be written: {error}") from error
        if isinstance(error, ValueError) and written in str(error):
            raise ValueError(str(error).replace(written, str(path))) from error
        raise


def _check_output(output: str | None, *inputs: str | None) -> None:
    """Refuses a file that cannot be written or is one of the inputs."""
    if output == "-" and sys.stdout is None:
        raise ValueError("standard output is closed; open it or give --output FILE")
    if output is None or output == "-":
        return
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} to write {path.name} into")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: permission denied")
    if path.is_file() and any(name is not None and os.path.samestat(path.stat(), _state(name)) for name in inputs):
        raise ValueError(f"{path} is an input; name another output")


def _is_one_file(one: str, other: str) -> bool:
    """Whether two names are of one file, there or not yet."""
    if Path(one).is_file() and Path(other).is_file():
        return Path(one).samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _state(name: str) -> os.stat_result:
    return os.fstat(sys.stdin.fileno()) if name == "-" else Path(name).stat()


def _copy_files_beside(source: str, target: Path) -> None:
    """Copies tokenizer, generation settings and card as they are; of a Hub model the tokenizer is loaded and saved."""
    if not Path(source).is_dir():
        _load_tokenizer(source).save_pretrained(target)
        return
    for pattern in (*_FILES_BESIDE, *_tokenizer_files(source)):
        for file in Path(source).glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _tokenizer_files(folder: str) -> set[str]:
    """What the class of the tokenizer in a folder calls its files; nothing where there is none that loads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it would be used with
            return set(_load_tokenizer(folder).vocab_files_names.values())
    except ValueError as error:
        if (Path(folder) / "tokenizer_config.json").exists():
            _say(f"nmsparse: {_one_line(error)}; its files of unusual names stay behind", error=True)
        return set()


def _lines(name: str) -> list[str]:
    with _reading(name) as lines:
        return list(lines)


@contextmanager
def _reading(name: str) -> Iterator[Iterator[str]]:
    """The lines of a file, of a pipe or of standard input, without what ends them."""
    if name == "-":
        if sys.stdin is None:
            raise ValueError("standard input is closed; open it or name a file")
        yield _decoded(sys.stdin.buffer, "standard input")
        return
    if Path(name).is_dir():
        raise ValueError(f"{name} is a folder; name a file")
    if not Path(name).exists():
        raise ValueError(f"no file {name}")
    with Path(name).open("rb") as file:
        yield _decoded(file, name)


def _decoded(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Text of UTF-8. Only a line feed ends a line, with or without a carriage return before it."""
    for number, line in enumerate(lines):
        if number == 0:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{name} is UTF-16; make it UTF-8, such as with iconv -f UTF-16 -t UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line:
                return
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 after line {number}") from error
        if "\0" in text:
            raise ValueError(f"{name} is no text: line {number + 1} holds a NUL; make it UTF-8")
        yield text[:-1].removesuffix("\r") if text.endswith("\n") else text


@contextmanager
def _writing(name: str) -> Iterator[IO[str]]:
    if name == "-":
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        yield sys.stdout
        return
    path = Path(name)
    how: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "newline": "\n"}
    for number in (1, 2):
        if _is_open(path, number):  # by way of /dev/stdout or not, what else goes there stays
            with os.fdopen(os.dup(number), **how) as file:
                yield file
            return
    if _is_written_beside(path):
        from hf_nmsparse.files import replaced

        path = Path(os.path.realpath(name))
        with replaced(path) as beside:
            with beside.open(**how) as file:
                yield file
            if path.exists():
                shutil.copymode(path, beside)
        return
    with path.open(**how) as file:
        yield file


def _is_open(path: Path, number: int) -> bool:
    """Whether it is the file that a standard stream goes to."""
    try:
        return os.path.samestat(path.stat(), os.fstat(number))
    except OSError:  # no such file
        return False


def _is_written_beside(path: Path) -> bool:
    """Whether another file can take the place of ``path`` at the end, which none can of a pipe or a device."""
    place, folder = os.path.realpath(path.parent), Path(os.path.realpath(path)).parent
    if place == "/dev" or place.startswith("/proc/") or not os.access(folder, os.W_OK):
        return False
    return path.is_file() or not path.exists()
