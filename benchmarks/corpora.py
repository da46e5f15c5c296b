"""What a second process brings to a corpus: lines a second of `hf_nmsparse.translate_corpus`, one thread each.

    python -m benchmarks.corpora outputs/multi30k_2of4/packed corpus.txt --note "what else the machine was doing"

One process and two share out the same lines; beside them stand two that know nothing of each other, each with every
other shard of the lines, which is the most that two cores of this machine give. All seconds are those of whole
commands, start included. Every run's manifest is checked: no line may be lost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM

from benchmarks import tables, timing

ONE, TWO, APART = "one process", "two processes", "two that share nothing"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("text", type=Path, help="file of source sentences, one a line")
    parser.add_argument("--lines", type=int, default=80_000, help="the first so many that are not blank")
    parser.add_argument("--shard-size", type=int, default=5_000)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; medians are over these")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, default=timing.RESULTS / "corpora.json", help="a table goes beside it")
    options = parser.parse_args()
    machine = timing.machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with options.text.open(encoding="utf-8") as file:
            lines = list(islice((line for line in file if line.strip()), options.lines))
        shards = [lines[start : start + options.shard_size] for start in range(0, len(lines), options.shard_size)]
        texts = {"all": shards, "even": shards[::2], "odd": shards[1::2]}
        for name, parts in texts.items():
            (folder / f"{name}.txt").write_text("".join(line for part in parts for line in part), encoding="utf-8")
        settings = ["--beams", str(options.beams), "--threads", "1", "--shard-size", str(options.shard_size)]

        def run(names: Sequence[str], launcher: Sequence[str] = ()) -> None:
            """Translates texts, each by a command of its own, all at once."""
            with tempfile.TemporaryDirectory(dir=folder) as output:
                commands = []
                for name in names:
                    files = ["--output", f"{output}/{name}", str(folder / f"{name}.txt")]
                    module = ["-m", "hf_nmsparse.translate_corpus", "--model", str(options.model)]
                    commands.append(subprocess.Popen([sys.executable, *launcher, *module, *settings, *files]))
                codes = [command.wait() for command in commands]
                if any(codes):
                    raise RuntimeError(f"translate_corpus failed on {', '.join(names)}; what it says stands above")
                manifests = (json.loads(Path(output, name, "manifest.json").read_bytes()) for name in names)
                found = sum(manifest["rows"]["translated"] for manifest in manifests)
                if found != len(lines):
                    raise RuntimeError(f"{', '.join(names)}: {found} of {len(lines)} lines were translated")

        candidates: dict[str, Callable[[], None]] = {
            ONE: lambda: run(["all"]),
            TWO: lambda: run(["all"], TORCHRUN),
            APART: lambda: run(["even", "odd"]),
        }
        seconds = timing.in_turns(candidates, options.rounds)
    rows = [
        {"what": name, "seconds": round(statistics.median(taken), 2), "all_seconds": [round(one, 2) for one in taken]}
        for name, taken in seconds.items()
    ]
    record = {
        "benchmark": "a corpus by one process and by two",
        **machine,
        "model": timing.describe(AutoModelForSeq2SeqLM.from_pretrained(options.model)),
        "lines": len(lines),
        "shard_size": options.shard_size,
        "beams": options.beams,
        "rounds": options.rounds,
        "note": options.note,
    }
    timing.write(options.output, record, rows, tables.corpora_of(record | {"rows": rows}))
    print(options.output)


if __name__ == "__main__":
    main()
