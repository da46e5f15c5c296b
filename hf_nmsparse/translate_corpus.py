"""Translates corpora of any size, on as many processes and machines as are started, and goes on after any stop.

    torchrun --nproc-per-node 8 -m hf_nmsparse.translate_corpus --model MODEL --output FOLDER FILE...

``accelerate launch -m`` does the same on GPUs. Processes share nothing but the output folder, and each has shards of
its own: there is nothing to wait for, and nothing that a process that dies takes with it. A shard is written beside and
moved; what was made with other settings or from other texts is refused. With ``--score-pairs`` the corpus has its
translations, and what is written is how likely the model holds them to be.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa

from hf_nmsparse.bulk import BulkTranslator, Candidate, Search, load_translator, score_each, translate_each
from hf_nmsparse.devices import device_of, on_cpu
from hf_nmsparse.files import check_writable, locked, named_path
from hf_nmsparse.glossary import Glossary
from hf_nmsparse.pairs import FORMATS, column_of, read_column, read_columns, write_rows
from hf_nmsparse.shards import Digest, Progress, Shards, name_of_model, sha256_of, share_of
from hf_nmsparse.terminal import one_line, say
from hf_nmsparse.translator import cpus

__all__ = ["main"]

_MANIFEST = "manifest.json"

# What the files depend on beside model and texts; a run goes on with the same.
_SETTINGS = (
    *("source_lang", "target_lang", "src_lang", "tgt_lang", "prefix", "beams", "max_length", "max_source_tokens"),
    *("n_best", "sample", "temperature", "top_k", "top_p", "seed", "tag", "score", "compute", "shard_size", "format"),
)


# What `--score-pairs` has no use for: it makes no translations.
_OF_TRANSLATIONS = ("beams", "max_length", "n_best", "sample", "tag", "score", "keep_placeholders", "glossary")

# What is said of a translation beside it, with the types of its columns.
_SCORES = {"score": pa.float64(), "total": pa.float64(), "tokens": pa.int64()}


class _Pair(NamedTuple):
    """A translation of a text, its tokens, and what is written of it beside it."""

    target: str
    tokens: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is, by what the launchers say of it.

    Attributes:
        process: Its number among all.
        processes: How many there are.
        local: Its number on this machine.
        beside: How many there are on this machine.
    """

    process: int
    processes: int
    local: int
    beside: int

    @classmethod
    def here(cls) -> Place:
        """As torch's elastic launcher, accelerate's, or Open MPI's has set it."""

        def number(mpi: str, name: str, default: int) -> int:
            return int(os.environ.get(name) or os.environ.get(f"OMPI_COMM_WORLD_{mpi}") or default)

        return cls(
            number("RANK", "RANK", 0),
            number("SIZE", "WORLD_SIZE", 1),
            number("LOCAL_RANK", "LOCAL_RANK", 0),
            number("LOCAL_SIZE", "LOCAL_WORLD_SIZE", 1),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        0; or 2 after a user's error, with one line on standard error; or 130 where it was interrupted.
    """
    try:
        _translate_corpus(_parser().parse_args(argv), Place.here())
    except (ValueError, OSError) as error:
        say(f"translate_corpus: {one_line(error)}", error=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _translate_corpus(args: argparse.Namespace, place: Place) -> None:
    _check(args)
    output = named_path(args.output, "--output")
    check_writable(output)
    glossary = Glossary.read(args.glossary) if args.glossary else None
    threads = args.threads or max(1, cpus() // place.beside)
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # tokenizers take all cores otherwise
    texts = _digest(_rows(args))
    if not texts.count:
        raise ValueError(f"{', '.join(args.inputs)}: no texts")
    settings = {
        "model": name_of_model(args.model),
        "texts": f"{texts.count:,} with digest {texts}",
        **{name: getattr(args, name) for name in _SETTINGS},
        # Files that were begun before there were these have none of them.
        "keep_placeholders": args.keep_placeholders or None,
        "score_pairs": args.score_pairs or None,
        "glossary": args.glossary and f"{Path(args.glossary).name} {sha256_of(Path(args.glossary))[:16]}",
    }
    names = f"train-{{number:05}}-of-{{all:05}}.{args.format}"
    shards = Shards(output, texts.count, args.shard_size, _MANIFEST, names)
    ended = shards.begin(settings)
    if ended:
        shards.sweep()
        if place.process == 0:
            shards.check_ended("shards", shards.files)
    else:
        mine = share_of(shards.all, place.process, place.processes) & set(shards.missing())
        if mine:
            _work(args, glossary, place, threads, shards, mine)
        left = len(shards.missing())
        ended = not left and _end(shards, settings)
        if left and place.process == 0:
            say(f"translate_corpus: done here; {left:,} of {len(shards.all):,} shards are left to other processes")
    if ended:
        say(f"translate_corpus: {output / _MANIFEST}: finished")


def _work(
    args: argparse.Namespace, glossary: Glossary | None, place: Place, threads: int, shards: Shards, mine: set[int]
) -> None:
    """Translates the shards of one process."""
    if on_cpu(args.device):
        device = "cpu"
    else:
        device = device_of(args.device)
        device = f"{device}:{place.local}" if device == "cuda" else device
    translator = load_translator(args.model, args.compute, threads, device)
    progress = Progress(shards) if place.process == 0 else None
    if progress is not None:
        what = "pairs" if args.score_pairs else "texts"
        say(f"translate_corpus: {shards.rows:,} {what} in {len(shards.all):,} shards; {translator.name}")
    with closing(_rows(args)) as texts:
        for shard in shards.all:
            rows = shards.rows_of(shard)
            if shard not in mine:
                next(islice(texts, len(rows), len(rows)), None)  # passes over them
                continue
            given = list(islice(texts, len(rows)))
            if len(given) < len(rows):
                raise ValueError(f"{', '.join(args.inputs)}: shorter than before; leave the files as they are")
            found = (_scored if args.score_pairs else _translated)(
                given, translator, _search(args, glossary, shard), args
            )
            shards.write(shard, partial(_write, given, found, rows, args))
            if progress is not None:
                say(f"translate_corpus: {progress.say()}")
                sys.stdout.flush()


def _translated(
    given: Sequence[tuple[str, ...]], translator: BulkTranslator, search: Search, args: argparse.Namespace
) -> list[list[_Pair] | str]:
    """The translations of each text, or why it has none."""
    texts = [text for (text,) in given]
    found = translate_each(texts, translator, search, args.max_source_tokens or float("inf"), args.prefix)
    tag = f"{args.tag} " if args.tag else ""

    def pair(one: Candidate) -> _Pair:
        return _Pair(tag + one.text, one.tokens, {} if one.score is None else {"score": round(one.score, 4)})

    return [each if isinstance(each, str) else list(map(pair, each)) for each in found]


def _scored(
    given: Sequence[tuple[str, ...]], translator: BulkTranslator, search: Search, args: argparse.Namespace
) -> list[list[_Pair] | str]:
    """The scores of each text's translation, or why it has none."""
    pairs = [(source, target) for source, target in given]
    scores = score_each(pairs, translator, search, args.max_source_tokens or float("inf"), args.prefix)
    found: list[list[_Pair] | str] = []
    for (_, target), one in zip(pairs, scores, strict=True):
        if isinstance(one, str):
            found.append(one)
            continue
        count = len(one.tokens)
        beside = {"score": round(one.total / count, 4), "total": round(one.total, 4), "tokens": count}
        found.append([_Pair(target, count, beside)])
    return found


def _search(args: argparse.Namespace, glossary: Glossary | None, shard: int) -> Search:
    """How the texts of a shard are translated: samples are others in each, and the same whoever draws them."""
    asked = {"num_beams": args.beams, "max_length": args.max_length}
    if args.sample:
        # All tokens are drawn from, unless the user says otherwise: generate's own default is 50.
        asked |= {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k or 0, "top_p": args.top_p}
        asked["num_beams"] = 1
    return Search(
        count=args.n_best,
        batch_size=args.batch_size,
        scores=args.score,
        seed=int.from_bytes(hashlib.sha256(f"{args.seed} {shard}".encode()).digest()[:8], "little"),
        keep_placeholders=args.keep_placeholders,
        glossary=glossary,
        languages={"src_lang": args.src_lang, "tgt_lang": args.tgt_lang},
        settings={name: value for name, value in asked.items() if value is not None},
    )


def _write(
    given: Sequence[tuple[str, ...]],
    found: Sequence[list[_Pair] | str],
    rows: range,
    args: argparse.Namespace,
    file: Path,
) -> dict[str, Any]:
    """Writes the file of a shard; what is to be known of it."""
    done = "scored" if args.score_pairs else "translated"
    counts: Counter[str] = Counter({done: 0, "pairs": 0})
    tokens = 0

    def pairs() -> Iterator[dict[str, Any]]:
        nonlocal tokens
        for line, (source, *_), each in zip(rows, given, found, strict=True):
            if isinstance(each, str):
                counts[each] += 1
                continue
            counts[done] += 1
            for one in each:
                counts["pairs"] += 1
                tokens += one.tokens
                both = {args.source_lang: source, args.target_lang: one.target}
                yield {"line": line, "translation": both, **one.scores}

    texts = pa.struct([(lang, pa.string()) for lang in (args.source_lang, args.target_lang)])
    scores = list(_SCORES.items())[: len(_SCORES) if args.score_pairs else int(args.score)]
    columns = [("line", pa.int64()), ("translation", texts), *scores]
    write_rows(file, pairs(), args.format, pa.schema(columns))
    return {"first": rows.start, "texts": str(_digest(given)), "rows": dict(counts), "tokens": tokens}


def _end(shards: Shards, settings: Mapping[str, Any]) -> bool:
    """Writes the manifest, once every file was found as it was written and every text is in one of them.

    Returns:
        Whether it was this process that has.
    """
    with locked(shards.output):
        if shards.is_ended():  # by another process that was as far
            return False
        known = list(shards.checked())
        rows: Counter[str] = Counter()
        for each in known:
            rows.update(each["rows"])
        done = sum(count for kind, count in rows.items() if kind != "pairs")
        if done != shards.rows:
            raise ValueError(f"{shards.output}: the shards have {done:,} texts, and {shards.rows:,} are due; delete it")
        shards.end(settings, rows, tokens=sum(each["tokens"] for each in known), shards=known)
        return True


def _rows(args: argparse.Namespace) -> Generator[tuple[str, ...], None, None]:
    """The texts of all inputs, each alone or with its translation, one after the other, as they come."""
    columns = (args.source_lang, args.target_lang) if args.score_pairs else (args.source_lang,)
    for name in args.inputs:
        if not Path(name).is_file():
            yield from _of_the_hub(name, columns, args)
        elif args.score_pairs:
            yield from read_columns(Path(name), columns)
        else:
            for text in read_column(Path(name), args.source_lang):
                yield (text,)


def _digest(rows: Iterable[tuple[str, ...]]) -> Digest:
    digest = Digest()
    for row in rows:
        digest.add(*row)
    return digest


def _of_the_hub(name: str, columns: Sequence[str], args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """The rows of a dataset, which lies on the disk and is read from there."""
    if name.count("/") != 1 or Path(name).exists():
        raise ValueError(f"no file {name}, and no 'user/name' on the Hub either")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name}: a dataset of the Hub needs datasets: pip install datasets") from error
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, args.config, split=args.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name}, split {args.split}: cannot be had from the Hub: {one_line(error)}") from error
    for number, row in enumerate(rows):
        where = f"{name}, split {args.split}, row {number}"
        yield tuple(column_of(row, column, where) for column in columns)


def _check(args: argparse.Namespace) -> None:
    """Refuses what does not go together before anything is read."""
    for name in args.inputs:
        path = Path(name)
        if path.is_dir():
            raise ValueError(f"{name} is a folder; name the files in it")
        if not path.is_file() and name.count("/") != 1:
            raise ValueError(f"no file {name}, and no 'user/name' on the Hub either")
    if args.source_lang == args.target_lang:
        raise ValueError(f"--source-lang and --target-lang are both {args.source_lang!r}; rows need two names")
    for name in _OF_TRANSLATIONS:
        if args.score_pairs and getattr(args, name) != _parser().get_default(name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for translations to be made, and --score-pairs makes none; leave one out")
    if args.sample and args.beams not in (None, 1):
        raise ValueError(f"--sample draws tokens, and --beams {args.beams} searches; leave one of them out")
    if args.prefix and (args.keep_placeholders or args.glossary):
        option = "--glossary" if args.glossary else "--keep-placeholders"
        raise ValueError(f"{option} would read --prefix as text; leave one out, or use --src-lang and --tgt-lang")
    if not args.sample:
        for option in ("temperature", "top_k", "top_p"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option.replace('_', '-')} is for --sample; give that too, or leave it out")
        if args.n_best > (args.beams or 1):
            raise ValueError(f"--n-best {args.n_best} needs as many --beams, got {args.beams}; or give --sample")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m hf_nmsparse.translate_corpus",
        description="Translate a corpus into shards, on as many processes as torchrun or accelerate launch starts.",
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="text, .jsonl, .tsv (plain, .gz, .bz2, .xz, .zst), .parquet; or a "
        "dataset of the Hub")  # fmt: skip
    add("--model", required=True, metavar="PATH", help="folder of the model, or its name on the Hub")
    add("--output", required=True, metavar="FOLDER", help="where the shards go, one folder for all processes")
    add("--source-lang", default="en", metavar="KEY", help="the source's name in rows, read and written (default: en)")
    add("--target-lang", default="de", metavar="KEY", help="the translation's name in rows (default: de)")
    add("--config", metavar="NAME", help="configuration of a dataset of the Hub")
    add("--split", default="train", metavar="NAME", help="split of a dataset of the Hub (default: train)")
    add("--src-lang", metavar="CODE", help="source language of a multilingual model, such as eng_Latn")
    add("--tgt-lang", metavar="CODE", help="target language of a multilingual model")
    add("--prefix", default="", metavar="TEXT", help="put before every text for the model, as T5 wants it")
    add("--keep-placeholders", action="store_true", help="translate again what has lost placeholders such as {name} "
        "and %%s, with them")  # fmt: skip
    add("--glossary", metavar="FILE", help="terms and their translations, a tab between, one a line; on the engine")
    add("--beams", type=_positive, metavar="N", help="beam size (default: the model's)")
    add("--max-length", type=_positive, metavar="N", help="longest output in tokens (default: the model's)")
    add("--max-source-tokens", type=_positive, metavar="N", help="longer texts are left out (default: the model's)")
    add("--n-best", type=_positive, default=1, metavar="N", help="so many translations of each text (default: 1)")
    add("--sample", action="store_true", help="draw tokens instead of searching, as back-translation may want it")
    add("--temperature", type=float, metavar="X", help="of --sample (default: the model's)")
    add("--top-k", type=_positive, metavar="N", help="draw from the N likeliest tokens (default: from all)")
    add("--top-p", type=float, metavar="X", help="draw from the likeliest tokens of so much probability")
    add("--seed", type=int, default=0, metavar="N", help="of --sample (default: 0)")
    add("--tag", metavar="TAG", help="put before every translation, as <BT> marks back-translations")
    add("--score", action="store_true", help="add the mean log-probability of a translation's tokens, to filter by")
    add("--score-pairs", action="store_true", help="translate nothing: rows have their translations under the name of "
        "--target-lang, and get their log-probability, in all and by token, to filter by")  # fmt: skip
    add("--format", choices=FORMATS, default="jsonl.gz", help="of the shards (default: jsonl.gz)")
    add("--shard-size", type=_positive, default=20_000, metavar="N", help="texts of a shard, which is what a stop "
        "loses at most, and in which duplicates are translated once (default: 20000)")  # fmt: skip
    add("--batch-size", type=_positive, default=64, metavar="N", help="sentences at once (default: 64)")
    add("--compute", choices=("auto", "fp32", "bf16", "int8"), default="auto", help="what the engine computes in")
    add(
        "--threads", type=_positive, metavar="N", help="CPU threads of a process (default: the CPUs over the processes)"
    )
    add("--device", help="such as cpu or cuda (default: a GPU if there is one)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"needs a number of at least 1, got {text[:20]!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
