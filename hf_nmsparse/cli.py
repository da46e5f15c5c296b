"""The command ``nmsparse``: inspect, prune, pack, export, translate, serve, evaluate, shortlist, report and others."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hf_nmsparse import commands
from hf_nmsparse.documents import FORMATS
from hf_nmsparse.files import naming
from hf_nmsparse.terminal import drop_output, keep_standard_numbers, one_line, say

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        0; or 2 after a user's error, with one line on standard error; or 1 where the reader of the output went away.
    """
    keep_standard_numbers()
    try:
        args = _parser().parse_args(argv)
        if sys.stdout is None and args.run is not commands.translate:
            raise ValueError("standard output is closed; open it or send it to /dev/null")
        with _ended_by_signals():
            args.run(args)
        if sys.stdout is not None:
            with naming("standard output"):
                sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        return 1
    except (ValueError, OSError) as error:
        say(f"nmsparse: {one_line(error)}", error=True)
        drop_output()
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ends a command at SIGTERM, or where its terminal closes, as Ctrl-C does: what it has half written goes."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in names):
            # nohup ignores SIGHUP, and a program that calls this may have handlers of its own.
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nmsparse", description="N:M sparse translation models: look at, convert, run and score them."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    command = subparsers.add_parser("inspect", help="check a packed model and print what is sparse in it")
    command.add_argument("path", metavar="PATH", help="folder of the model")
    command.add_argument("--layers", action="store_true", help="list every sparse layer")
    command.set_defaults(run=commands.inspect)

    command = subparsers.add_parser("prune", help="prune a dense model by a text, and write it as packed files")
    command.add_argument("source", metavar="MODEL", help="folder of the dense model, or its name on the Hub")
    command.add_argument("target", type=_path, metavar="DST", help="new folder")
    command.add_argument(
        "--calibration",
        nargs="+",
        metavar="FILE",
        help="source text, which the model translates itself, or source and target, one sentence a line",
    )
    command.add_argument("--pattern", default="2:4", help="N:M, N of M weights are kept (default: 2:4)")
    command.add_argument(
        "--method",
        choices=("sparsegpt", "wanda", "magnitude"),
        default="sparsegpt",
        help="how weights are chosen (default: sparsegpt, which corrects those that stay); magnitude reads no text",
    )
    command.add_argument(
        "--lines", type=_positive, default=256, metavar="N", help="use the first N sentences (default: 256)"
    )
    command.add_argument(
        "--permute", action="store_true", help="put inner channels in an order first under which more is kept"
    )
    command.add_argument("--src-lang", metavar="CODE", help="source language of a multilingual model, such as eng_Latn")
    command.add_argument("--tgt-lang", metavar="CODE", help="target language of a multilingual model")
    _add_packing_arguments(command)
    command.set_defaults(run=commands.prune)

    command = subparsers.add_parser("pack", help="write a trained model as packed files")
    command.add_argument("source", metavar="SRC", help="training checkpoint, packed model, or masked dense model")
    command.add_argument("target", type=_path, metavar="DST", help="new folder")
    command.add_argument("--pattern", help="N:M, for a dense model whose weights are masked but not marked as such")
    _add_packing_arguments(command)
    command.set_defaults(run=commands.pack)

    command = subparsers.add_parser(
        "export", help="write a sparse model as dense files that any tool reads, or for one"
    )
    command.add_argument(
        "source", metavar="SRC", help="packed model or training checkpoint; with --for a dense one too"
    )
    command.add_argument("target", type=_path, metavar="DST", help="new folder")
    command.add_argument(
        "--for",
        dest="tool",
        choices=("ctranslate2", "onnx"),
        help="write a Marian model in this tool's format, with the tokenizer beside it, once both translate alike",
    )
    command.add_argument(
        "--quantization", metavar="TYPE", help="number type, such as int8, by the tool's own name (default: fp32)"
    )
    command.add_argument(
        "--sentences", metavar="FILE", help="what both translate, one sentence a line (default: a few English ones)"
    )
    command.set_defaults(run=commands.export)

    command = subparsers.add_parser("convert", help="write a sparse-24-bitmask checkpoint as dense files")
    command.add_argument("source", metavar="SRC", help="its folder")
    command.add_argument("target", type=_path, metavar="DST", help="new folder")
    command.set_defaults(run=commands.convert)

    command = subparsers.add_parser("translate", help="translate text, one line out for each line in, or documents")
    _add_model_arguments(command)
    ways = command.add_mutually_exclusive_group()
    ways.add_argument(
        "--split",
        default=True,
        metavar="CODE",
        help="language by whose rules lines are cut into sentences, such as de, where the model does not say it",
    )
    ways.add_argument(
        "--no-split",
        dest="split",
        action="store_false",
        help="give each line to the model whole and keep what comes (default: sentence by sentence, one that comes out "
        "as a loop again without repeats, and one that has lost placeholders such as {name} and %%s again with them)",
    )
    command.add_argument(
        "--glossary",
        type=_path,
        metavar="FILE",
        help="terms that have one right translation, a line each: term, tab, translation, and further forms that are "
        "right too behind |",
    )
    command.add_argument(
        "--input",
        default="-",
        metavar="FILE",
        help="text, one paragraph or sentence a line, or a document by its suffix (see --format); - is standard input, "
        "of which lines are answered batch by batch",
    )
    command.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="one translation a line, or the document, whole or not at all; - is standard output, where lines are "
        "written batch by batch",
    )
    command.add_argument(
        "--format",
        choices=("txt", *FORMATS),
        help="what --input is (default: by its suffix, and lines of text where that is none of these)",
    )
    command.add_argument("--column", metavar="NAME", help="column to translate (default: the only one that holds text)")
    command.add_argument(
        "--to-column", default="translation", metavar="NAME", help="new column for translations (default: translation)"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="translate messages of a .po file that have a translation, too"
    )
    command.set_defaults(run=commands.translate)

    command = subparsers.add_parser("serve", help="translate over HTTP, for clients of LibreTranslate and others")
    command.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="folder of the model, or its name on the Hub; before it its languages, as in en:de=outputs/demo/packed, "
        "unless it is a multilingual one",
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    command.add_argument(
        "--port", type=_port, default=5000, metavar="N", help="port to listen on (default: 5000); 0 takes a free one"
    )
    command.add_argument(
        "--workers",
        type=_threads,
        default=1,
        metavar="N",
        help="processes, each with the models in its memory (default: 1); one that dies is replaced",
    )
    command.add_argument(
        "--threads", type=_threads, metavar="N", help="CPU threads of a process (default: all CPUs over the processes)"
    )
    command.add_argument(
        "--max-tokens",
        type=_positive,
        default=1024,
        metavar="N",
        help="tokens of requests that are translated together (default: 1024)",
    )
    command.add_argument(
        "--max-characters", type=_positive, default=10_000, metavar="N", help="of a request (default: 10000)"
    )
    command.add_argument(
        "--max-waiting", type=_positive, default=2_000, metavar="N", help="texts that wait for a model (default: 2000)"
    )
    command.add_argument(
        "--timeout", type=_positive, default=60, metavar="SECONDS", help="longest wait for an answer (default: 60)"
    )
    command.add_argument(
        "--compute",
        choices=("auto", "fp32", "bf16", "int8"),
        default="auto",
        help="how the models compute (default: the fastest that keeps the file's precision)",
    )
    command.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="lets in requests with one of these keys alone; NMSPARSE_API_KEY is one that no list of processes shows",
    )
    command.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="lets scripts of pages elsewhere ask, such as https://example.org; * is any",
    )
    command.set_defaults(run=commands.serve)

    command = subparsers.add_parser("evaluate", help="translate a test set and score it with sacreBLEU")
    _add_model_arguments(command)
    command.add_argument("--source", required=True, metavar="FILE", help="one sentence a line")
    command.add_argument("--reference", required=True, metavar="FILE", help="one raw reference a line")
    command.add_argument("--baseline", metavar="FILE", help="translations by the dense model, to compare with")
    command.add_argument("--tokenize", default="13a", help="sacreBLEU's tokenizer (default: 13a)")
    command.add_argument("--json", metavar="OUT", help="write the scores to this file too")
    command.add_argument("--output", metavar="HYP", help="write the translations to this file")
    command.set_defaults(run=commands.evaluate)

    command = subparsers.add_parser("shortlist", help="learn which target tokens go with a source token, for speed")
    command.add_argument("model", type=_name, metavar="MODEL", help="folder of the model, where the shortlist goes")
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
    command.set_defaults(run=commands.learn_shortlist)

    command = subparsers.add_parser("plot", help="draw flips, scores and layers of finished runs of the recipe")
    command.add_argument(
        "runs", nargs="+", type=_path, metavar="RUN", help="folder with evaluation.json and curve.json"
    )
    command.add_argument("--output", type=_path, default=Path("plots"), metavar="DIR", help="where the pictures go")
    command.add_argument("--format", choices=("png", "svg"), default="png", help="kind of the pictures")
    command.set_defaults(run=commands.plot)

    command = subparsers.add_parser("report", help="write one HTML page on finished runs of the recipe, side by side")
    command.add_argument(
        "runs", nargs="+", type=_path, metavar="RUN", help="output folder; the others are compared with the first"
    )
    command.add_argument("--output", default="report.html", metavar="FILE", help="the page (default: report.html)")
    command.add_argument(
        "--comet", type=_path, metavar="MODEL", help="score with this checkpoint of COMET too, one that you trust"
    )
    command.set_defaults(run=commands.report)

    command = subparsers.add_parser("doctor", help="print which kernels this machine runs, and what translates a model")
    command.add_argument("models", nargs="*", type=_path, metavar="MODEL", help="folder of a model")
    command.set_defaults(run=commands.doctor)
    return parser


def _add_packing_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--values", choices=("fp32", "fp16", "bf16", "int8"), help="number type of the weights")
    command.add_argument(
        "--embeddings",
        choices=("float", "int8"),
        help="number type of embeddings and output projection (with int8: int8)",
    )
    command.add_argument(
        "--standalone",
        action="store_true",
        help="add the code with which transformers alone reads it, given trust_remote_code=True",
    )


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


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a path, as . for the current folder")
    return text


def _path(text: str) -> Path:
    return Path(_name(text))


def _positive(text: str, most: int = 2**31 - 1) -> int:
    if not text.isdecimal() or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"needs a number of at least 1, got {text!r}")
    if len(text.lstrip("0")) > len(str(most)) or int(text) > most:
        raise argparse.ArgumentTypeError(f"needs a number of at most {most}, got {text[:20]}")
    return int(text)


def _threads(text: str) -> int:
    return _positive(text, 1024)


def _port(text: str) -> int:
    return 0 if text == "0" else _positive(text, 65535)
