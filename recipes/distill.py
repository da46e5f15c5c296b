"""Translates training sources with a teacher, for a student to learn from: sequence-level distillation.

    accelerate launch recipes/distill.py [recipes/distillations/FILE.yaml] [--key value ...]

Kim and Rush (EMNLP 2016) train the student on the teacher's best translations, or on that of its beams which is nearest
to the reference (``interpolation``). Keys are the fields of DistillArguments in distill_arguments.py; keys on the
command line win over those of the file. Sources come from a corpus, or from a text in one language. After a stop the
same command goes on with the shards that are missing; any number of processes may do so. The output folder has train.*
in the order of the sources and the corpus's other splits as they are, so that the recipe reads it as a corpus.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from sacrebleu.metrics import BLEU, CHRF

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, however the script is started
from hf_nmsparse.corpus import Rows, load_text
from hf_nmsparse.faults import who_is_gone
from hf_nmsparse.files import check_writable, replaced
from hf_nmsparse.pairs import is_text
from recipes.corpora import first_of, read_corpus
from recipes.distill_arguments import DistillArguments, parse
from recipes.mistakes import in_one_line
from recipes.shards import Shards, digest_of_texts, name_of_model
from recipes.teachers import Search, Teacher, load_teacher
from recipes.threads import take_all_cores

# Why a source has no translation in the output.
BLANK, TOO_LONG, NOTHING = "blank", "too long", "without a translation"

# What makes translations what they are; a run goes on with the same.
SETTINGS = (
    *("source_lang", "target_lang", "source_code", "target_code", "source_prefix", "max_length"),
    *("beams", "interpolation", "compute", "shard_size", "format"),
)

# A process that is done waits for the others, as long as their last shards take.
PATIENCE = timedelta(days=30)


def main() -> None:
    """The whole run, from sources to a corpus."""
    args = parse(sys.argv[1:])
    state = PartialState(cpu=args.use_cpu, timeout=PATIENCE)
    output = Path(args.output_dir)
    with state.main_process_first():
        check_writable(output)
        splits = read_splits(args)
    train = splits.pop("train")
    shards, finished = Shards(output, len(train), args.shard_size), output / f"train.{args.format}"
    settings = settings_of(args, train) if state.is_main_process else {}
    with state.main_process_first():
        if state.is_main_process:
            shards.begin(settings)
    if finished.is_file():
        if state.is_main_process:
            print(f"distill: {finished} is finished; delete {output} to translate anew")
        return

    # Each process takes shards of those that were missing when all of them began.
    missing = shards.missing()
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    if mine:
        teacher = load(args, state)
        if state.is_main_process:
            print(f"distill: {len(train):,} sources in {len(shards.all):,} shards; {teacher.name}", flush=True)
        say = progress(shards, missing) if state.is_main_process else None
        for shard in mine:
            rows = shards.rows_of(shard)
            shards.write(shard, translated(train[rows.start : rows.stop], teacher, args))
            if say is not None:
                print(f"distill: {say()}", flush=True)
    state.wait_for_everyone()
    if state.is_main_process:
        for split, pairs in splits.items():
            columns = zip(pairs["source"], pairs["target"], strict=True)
            write_pairs(output / f"{split}.{args.format}", columns, args)
        counts = merge(shards, finished, args)
        shards.end(settings, counts)
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if kind != "translated") or "none"
        print(f"{finished}: {counts['translated']:,} of {len(train):,} sources; left out: {left_out}")


def read_splits(args: DistillArguments) -> dict[str, Any]:
    """The rows to translate as the split ``train``, and the corpus's other splits."""
    if args.text is not None:
        splits: dict[str, Rows] = {"train": load_text(args.text)}
    else:
        assert args.corpus is not None
        splits = read_corpus(args.corpus, args.source_lang, args.target_lang, args.corpus_config)
        if "train" not in splits:
            raise ValueError(f"corpus {args.corpus}: no split 'train'; it has {', '.join(splits)}")
    if args.max_train_pairs is not None:
        splits["train"] = first_of(splits["train"], args.max_train_pairs)
    return splits


def settings_of(args: DistillArguments, train: Any) -> dict[str, Any]:
    """What the translations depend on, models and texts included."""
    columns = ["source", "target"] if args.interpolation is not None else ["source"]
    return {
        "teachers": [name_of_model(model) for model in args.teachers],
        "texts": f"{len(train):,} with digest {digest_of_texts(train[column] for column in columns)}",
        **{name: getattr(args, name) for name in SETTINGS},
    }


def load(args: DistillArguments, state: PartialState) -> Teacher:
    """The teacher, with the threads that a process may have."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if state.num_processes == 1 and state.device.type == "cpu":
        take_all_cores()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return load_teacher(args.teachers, args.compute, args.threads or max(1, cores // beside), state.device)


def translated(rows: dict[str, list[str]], teacher: Teacher, args: DistillArguments) -> Iterator[dict[str, str]]:
    """For each row its source and its translation, or why it is left out."""
    sources = rows["source"]
    why = {place: BLANK for place, source in enumerate(sources) if not is_text(source)}
    there = [place for place in range(len(sources)) if place not in why]
    texts = [args.source_prefix + sources[place] for place in there]
    tokens = teacher.tokenizer(texts, verbose=False)["input_ids"] if texts else []
    limit = min(args.max_length, teacher.longest)
    fitting = []
    for place, text, row in zip(there, texts, tokens, strict=True):
        if len(row) <= limit:
            fitting.append((place, text))
        else:
            why[place] = TOO_LONG
    count = args.beams if args.interpolation is not None else 1
    languages = {"src_lang": args.source_code, "tgt_lang": args.target_code}
    found = teacher.translate([text for _, text in fitting], Search(args.beams, count, args.batch_size, languages))
    chosen = {}
    nearest = nearest_by(args.interpolation)
    for (place, _), candidates in zip(fitting, found, strict=True):
        good = [text for text in candidates if is_text(text)]
        if good:
            chosen[place] = nearest(good, rows["target"][place]) if len(good) > 1 else good[0]
    for place, source in enumerate(sources):
        if place in chosen:
            yield {"source": source, "target": chosen[place]}
        else:
            yield {"left_out": why.get(place, NOTHING)}


def nearest_by(metric: str | None) -> Callable[[Sequence[str], str], str]:
    """Chooses of some translations the one with the best score of its sentence; of equal ones the first."""
    scorer = BLEU(effective_order=True) if metric == "bleu" else CHRF()

    def nearest(candidates: Sequence[str], reference: str) -> str:
        return max(candidates, key=lambda text: scorer.sentence_score(text, [reference]).score)

    return nearest


def progress(shards: Shards, missing: Sequence[int]) -> Callable[[], str]:
    """Tells how far all processes are, how fast they were since this call, and what that leaves."""
    begun = time.monotonic()

    def rows(of: Iterable[int]) -> int:
        return sum(len(shards.rows_of(shard)) for shard in of)

    def say() -> str:
        still = shards.missing()
        left, seconds = rows(still), time.monotonic() - begun
        speed = (rows(missing) - left) / seconds
        rest = timedelta(seconds=round(left / speed)) if speed else "unknown time"
        done = len(shards.all) - len(still)
        return f"{done:,} of {len(shards.all):,} shards, {speed:,.1f} sentences/s, {rest} left"

    return say


def merge(shards: Shards, file: Path, args: DistillArguments) -> Counter[str]:
    """Writes the translations of all shards into one file; how many there are, and of what is left out."""
    counts: Counter[str] = Counter(translated=0)

    def pairs() -> Iterator[tuple[str, str]]:
        for row in shards.read():
            counts[row.get("left_out", "translated")] += 1
            if "left_out" not in row:
                yield row["source"], row["target"]

    write_pairs(file, pairs(), args)
    return counts


def write_pairs(file: Path, pairs: Iterable[tuple[str, str]], args: DistillArguments) -> None:
    """Writes sentence pairs as `load_corpus` reads them; the same pairs give the same bytes.

    Raises:
        ValueError: There are none.
    """
    rows = ({"translation": {args.source_lang: source, args.target_lang: target}} for source, target in pairs)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{file}: all sources are left out; look at them, or raise max_length")
    rows = chain([first], rows)
    with replaced(file) as beside:
        if args.format == "parquet":
            texts = pa.struct([(lang, pa.string()) for lang in (args.source_lang, args.target_lang)])
            schema = pa.schema([("translation", texts)])
            with pq.ParquetWriter(beside, schema) as writer:
                while batch := list(islice(rows, 10_000)):
                    writer.write_table(pa.Table.from_pylist(batch, schema))
            return
        with beside.open("wb") as raw:
            packed: Any = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if args.format.endswith(".gz") else raw
            with io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as stream:
                stream.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def run() -> None:
    """Runs `main`; what a user can mend is one line, anything else a traceback."""
    with in_one_line("distill"):
        try:
            main()
            PartialState().destroy_process_group()  # gloo's threads, where they outlive Python, abort the process
        except (RuntimeError, OSError) as error:
            reason = who_is_gone(error)
            if reason is None:
                raise
            sys.exit(f"distill: {reason}; the shards that are finished stay, and the same command goes on")


if __name__ == "__main__":
    run()
