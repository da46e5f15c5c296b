"""Translates training sources with a teacher, for a student to learn from: sequence-level distillation.

    accelerate launch recipes/distill.py [recipes/distillations/FILE.yaml] [--key value ...]

Kim and Rush (EMNLP 2016) train the student on the teacher's best translations, or on that of its beams which is nearest
to the reference (``interpolation``). Keys are the fields of DistillArguments in distill_arguments.py; keys on the
command line win over those of the file. Sources come from a corpus, or from a text in one language. After a stop the
same command goes on with the shards that are missing; any number of processes may do so. The output folder has train.*
in the order of the sources and the corpus's other splits as they are, so that the recipe reads it as a corpus.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from accelerate import PartialState
from sacrebleu.metrics import BLEU, CHRF

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, however the script is started
from hf_nmsparse.bulk import BulkTranslator, Search, translate_each
from hf_nmsparse.corpus import Rows, load_text
from hf_nmsparse.faults import who_is_gone
from hf_nmsparse.files import check_writable, named_path, replaced
from hf_nmsparse.pairs import is_text, write_rows
from hf_nmsparse.shards import Digest, Progress, Shards, name_of_model, sha256_of
from recipes.corpora import first_of, read_corpus
from recipes.distill_arguments import DistillArguments, parse
from recipes.mistakes import in_one_line
from recipes.teachers import load_teacher
from recipes.threads import take_all_cores

Row: TypeAlias = dict[str, str]

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
    output = named_path(args.output_dir, "output_dir")
    with state.main_process_first():
        check_writable(output)
        splits = read_splits(args)
    train = splits.pop("train")
    shards = Shards(output, len(train), args.shard_size, "distill.json", "shards/{number:06}.jsonl")
    finished = output / f"train.{args.format}"
    files = [finished, *(output / f"{split}.{args.format}" for split in splits)]
    settings = settings_of(args, train) if state.is_main_process else {}
    with state.main_process_first():
        ended = shards.begin(settings) if state.is_main_process else shards.is_ended()
    if ended:
        if state.is_main_process:
            shards.sweep()
            shards.check_ended("files", files)
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
        progress = Progress(shards) if state.is_main_process else None
        for shard in mine:
            rows = shards.rows_of(shard)
            made, tokens = translated(train[rows.start : rows.stop], teacher, args)
            shards.write(shard, partial(write_shard, made, tokens))
            if progress is not None:
                print(f"distill: {progress.say()}", flush=True)
    state.wait_for_everyone()
    if state.is_main_process:
        for split, pairs in splits.items():
            columns = zip(pairs["source"], pairs["target"], strict=True)
            write_pairs(output / f"{split}.{args.format}", columns, args)
        counts = merge(shards, finished, args)
        shards.end(settings, counts, files=[{"file": file.name, "sha256": sha256_of(file)} for file in files])
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
    digest = Digest().add_all(train["source"])
    if args.interpolation is not None:
        digest.add_all(train["target"])
    return {
        "teachers": [name_of_model(model) for model in args.teachers],
        "texts": f"{len(train):,} with digest {digest}",
        **{name: getattr(args, name) for name in SETTINGS},
    }


def load(args: DistillArguments, state: PartialState) -> BulkTranslator:
    """The teacher, with the threads that a process may have."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if state.num_processes == 1 and state.device.type == "cpu":
        take_all_cores()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return load_teacher(args.teachers, args.compute, args.threads or max(1, cores // beside), state.device)


def translated(rows: dict[str, list[str]], teacher: BulkTranslator, args: DistillArguments) -> tuple[list[Row], int]:
    """For each row its source and its translation, or why it is left out; and the tokens of all translations."""
    search = Search(
        count=args.beams if args.interpolation is not None else 1,
        batch_size=args.batch_size,
        languages={"src_lang": args.source_code, "tgt_lang": args.target_code},
        settings={"num_beams": args.beams},
    )
    # What is no text has no translation either.
    sources = [source if is_text(source) else "" for source in rows["source"]]
    found = translate_each(sources, teacher, search, args.max_length, args.source_prefix)
    nearest = nearest_by(args.interpolation)
    made, tokens = list[Row](), 0
    for place, (source, candidates) in enumerate(zip(sources, found, strict=True)):
        if isinstance(candidates, str):
            made.append({"left_out": candidates})
            continue
        texts = [one.text for one in candidates]
        made.append({"source": source, "target": nearest(texts, rows["target"][place]) if len(texts) > 1 else texts[0]})
        tokens += sum(one.tokens for one in candidates)
    return made, tokens


def write_shard(made: list[Row], tokens: int, file: Path) -> dict[str, int]:
    """Writes the rows of a shard; what is to be known of it."""
    write_rows(file, made, "jsonl")
    return {"tokens": tokens}


def nearest_by(metric: str | None) -> Callable[[Sequence[str], str], str]:
    """Chooses of some translations the one with the best score of its sentence; of equal ones the first."""
    scorer = BLEU(effective_order=True) if metric == "bleu" else CHRF()

    def nearest(candidates: Sequence[str], reference: str) -> str:
        return max(candidates, key=lambda text: scorer.sentence_score(text, [reference]).score)

    return nearest


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
    texts = pa.struct([(lang, pa.string()) for lang in (args.source_lang, args.target_lang)])
    with replaced(file) as beside:
        write_rows(beside, chain([first], rows), args.format, pa.schema([("translation", texts)]))


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
