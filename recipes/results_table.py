"""Makes the README's tables from the files in recipes/results and benchmarks/results.

python recipes/results_table.py            prints them
python recipes/results_table.py --write    puts them into README.md, each between its two markers
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hf_nmsparse.metrics import Evaluation

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
MASKS = Path(__file__).parents[1] / "benchmarks" / "results" / "masks.json"


def table() -> str:
    """One row for each evaluation, in the order of corpora and names, then the signatures they share."""
    rows = ["| run | pattern | method | BLEU | to dense (95%) | chrF | steps | minutes | bytes of the file |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    runs = {file.stem: Evaluation.read(file) for file in sorted(RESULTS.glob("*.json"))}
    for name, run in runs.items():
        against = run.against_dense
        compared = ""
        if against is not None:
            low, high = against["interval"]
            compared = f"{against['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
        method = run.method if run.decay is None else f"{run.method}, λ {run.decay:g}"
        size = run.dense_bytes if run.packed_bytes is None else run.packed_bytes
        rows.append(
            f"| {name} | {run.pattern or 'dense'} | {method} | {run.bleu:.1f} | {compared} | {run.chrf:.1f} | "
            f"{run.steps:,} | {(run.train_seconds or 0) / 60:.0f} | {size:,} |"
        )
    return "\n".join([*rows, "", *notes(list(runs.values()))])


def notes(runs: list[Evaluation]) -> list[str]:
    """What the rows have in common: data, model, signatures, versions."""
    lines = []
    for label, values in (
        ("Corpus", {f"{run.corpus}, {run.split}, {run.sentences:,} sentences" for run in runs}),
        ("Model", {run.model for run in runs}),
        ("BLEU", {f"`{run.signature}`" for run in runs}),
        ("chrF", {f"`{run.chrf_signature}`" for run in runs}),
        ("Seed, threads", {f"{run.seed}, {run.threads}" for run in runs}),
        ("Versions", {", ".join(f"{name} {number}" for name, number in run.versions.items()) for run in runs}),
    ):
        lines.append(f"- {label}: {'; '.join(sorted(values))}")
    return lines


def masks_table() -> str:
    """How long a mask takes, for the large weight of the benchmark."""
    record = json.loads(MASKS.read_text(encoding="utf-8"))
    rows = ["| mask of a 1024x4096 fp32 weight | threads | argsort ms | topk ms | ours ms | argsort / ours |"]
    rows.append("|---|---|---|---|---|---|")
    for row in record["rows"]:
        if row["shape"] == [1024, 4096]:
            argsort, topk, ours = (row["median_ms"][name] for name in ("argsort", "topk", "hf_nmsparse"))
            times = f"{argsort:.1f} | {topk:.1f} | {ours:.1f} | {argsort / ours:.1f}"
            rows.append(f"| {row['pattern']} | {row['threads']} | {times} |")
    where = f"{record['cpu']}, {record['cores']} cores, torch {record['torch']}"
    rows += ["", f"Medians of {record['rounds']} interleaved calls, {where}; {record['note']}."]
    return "\n".join(rows)


TABLES = {"results": table, "masks": masks_table}


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a table in the README."""
    return f"<!-- {name}: recipes/results_table.py -->", f"<!-- end of {name} -->"


def main() -> None:
    """Prints the tables or writes them into the README."""
    for name, make in TABLES.items():
        if sys.argv[1:] != ["--write"]:
            print(make(), end="\n\n")
            continue
        begin, end = markers(name)
        before, _, rest = README.read_text(encoding="utf-8").partition(begin)
        _, _, after = rest.partition(end)
        README.write_text(f"{before}{begin}\n{make()}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
