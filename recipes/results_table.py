"""Makes the README's table of results from the evaluation files in recipes/results.

python recipes/results_table.py            prints the table
python recipes/results_table.py --write    puts it into README.md, between its two markers
"""

from __future__ import annotations

import sys
from pathlib import Path

from hf_nmsparse.metrics import Evaluation

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results: recipes/results_table.py -->", "<!-- end of results -->"


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


def main() -> None:
    """Prints the table or writes it into the README."""
    if sys.argv[1:] != ["--write"]:
        print(table())
        return
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
