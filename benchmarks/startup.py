"""How long a training on a large corpus takes to its first batch, and how much memory the corpus takes.

    python -m benchmarks.startup --corpus ../shared/data/wmt-news --pairs 4500000

The corpus is the folder's training text, repeated to as many pairs as WMT14 has, each repetition marked by its number,
so that all texts differ. A process of its own starts as the recipe does, text to tokens to batches, and takes a hundred
batches; then another does, which finds the tokens on the disk; a third reads the text as a stream. All of it with a
tenth of the pairs as well. Memory is what the process has for itself: pages of the corpus on the disk, which the system
drops when it needs the room, do not count. It takes about fifteen minutes and writes benchmarks/results/startup.json
and a table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import DataCollatorForSeq2Seq

from benchmarks import tables, timing
from benchmarks.methods import transformer
from hf_nmsparse import SparseTrainer, SparseTrainingArguments
from hf_nmsparse.corpus import load_corpus
from hf_nmsparse.tokenizer import tokenise, train_tokenizer

BATCHES = 100
SHUFFLED = 100_000  # pairs of a stream, as the recipe has it
STARTS = ("first", "cached", "stream")


class OwnMemory:
    """The most memory, in MiB, that this process had for itself while the context lasted, by looking often."""

    def __init__(self, every: float = 0.02) -> None:
        self.every, self.peak, self._over = every, 0, threading.Event()

    def now(self) -> int:
        """What it has; the peak learns of it."""
        status = Path("/proc/self/status").read_text(encoding="ascii")
        kib = next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:"))
        found = int(kib) // 1024
        self.peak = max(self.peak, found)
        return found

    def _watch(self) -> None:
        while not self._over.wait(self.every):
            self.now()

    def __enter__(self) -> OwnMemory:
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._watcher.join()


def write_corpus(folder: Path, pairs: int, output: Path) -> None:
    """The training text of ``folder``, repeated, as ``train.jsonl``."""
    rows: Dataset = load_corpus(str(folder), "en", "de")["train"]
    texts = list(zip(rows["source"], rows["target"], strict=True))
    output.mkdir()
    with (output / "train.jsonl").open("w", encoding="utf-8") as file:
        for index, (source, target) in enumerate(islice(cycle(texts), pairs)):
            number = index // len(texts)
            row = {"en": f"{number} {source}", "de": f"{number} {target}"}
            file.write(json.dumps({"translation": row}, ensure_ascii=False) + "\n")


def start(corpus: Path, processes: int | None, stream: bool = False) -> dict[str, Any]:
    """Starts as the recipe does; seconds to the end of each part, and the memory before, at the peak and after."""
    disable_progress_bars()
    with OwnMemory() as memory:
        before = memory.now()
        seconds = first_batches(corpus, processes, stream)
        after = memory.now()
    return {**seconds, "MiB before": before, "MiB at the peak": memory.peak, "MiB after": after}


def first_batches(corpus: Path, processes: int | None, stream: bool) -> dict[str, float]:
    """Takes the batches; seconds to the end of each part."""
    began, found = time.perf_counter(), dict[str, float]()

    def at(name: str) -> None:
        found[name] = round(time.perf_counter() - began, 2)

    pairs = load_corpus(str(corpus), "en", "de", streaming=stream)["train"]
    at("corpus")
    texts = (text for row in islice(pairs, 2_000) for text in row.values())
    tokenizer = train_tokenizer(texts, 6_000, 256)
    if stream:
        pairs = pairs.shuffle(seed=0, buffer_size=SHUFFLED)
    tokens = tokenise(pairs, tokenizer, 256, processes=processes)
    at("tokens")
    model = transformer(len(tokenizer), 32, 1)
    args = SparseTrainingArguments(
        output_dir=str(corpus / "out"),
        max_steps=BATCHES,
        sparse_method="dense",
        tokens_per_batch=4_096,
        report_to="none",
        use_cpu=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    batches = iter(
        SparseTrainer(model=model, args=args, train_dataset=tokens, data_collator=collator).get_train_dataloader()
    )
    next(batches)
    at("first batch")
    for _ in range(BATCHES - 1):
        next(batches)
    at(f"{BATCHES} batches")
    return found


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="a folder of parallel text")
    parser.add_argument("--pairs", type=int, default=4_500_000)
    parser.add_argument("--processes", type=int, help="processes that turn the texts into tokens")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, default=timing.RESULTS / "startup.json", help="a table goes beside it")
    parser.add_argument("--start", choices=STARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.corpus, options.processes, options.start == "stream")))
        return
    machine, rows = timing.machine(), []
    command = [sys.executable, "-m", "benchmarks.startup", "--corpus"]
    processes = [] if options.processes is None else ["--processes", str(options.processes)]
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{scratch}/cache", "TOKENIZERS_PARALLELISM": "false"}
        for pairs in (options.pairs // 10, options.pairs):
            folder = Path(scratch) / str(pairs)
            write_corpus(options.corpus, pairs, folder)
            for kind in STARTS:
                arguments = [str(folder), "--start", kind, *([] if kind == "stream" else processes)]
                done = subprocess.run(
                    [*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
                )
                rows.append({"pairs": pairs, "start": kind, **json.loads(done.stdout.splitlines()[-1])})
                print(rows[-1], flush=True)
    record = {
        "benchmark": "start of a training on a large corpus",
        **machine,
        "corpus": options.corpus.name,
        "processes": options.processes or 1,
        "batch": "4,096 source and target tokens",
        "note": options.note,
    }
    timing.write(options.output, record, rows, tables.startup_of(record | {"rows": rows}))
    print(options.output)


if __name__ == "__main__":
    main()
