"""Makes the tables of the README files from the files in recipes/results and benchmarks/results.

python recipes/results_table.py            prints them
python recipes/results_table.py --write    writes each into its README file (`home` says which), between its two
                                           markers, and draws the pictures of the studies and of the front
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, however the script is started
from benchmarks import tables
from hf_nmsparse.cards import method_in_words
from hf_nmsparse.evaluation import Evaluation
from hf_nmsparse.metrics import Comparison, SentenceStatistics, compare_statistics
from hf_nmsparse.plots import LoggedRun, plot_runs, read_run
from hf_nmsparse.srste import METHODS
from recipes import front, images
from recipes.front_plots import AXES, plot_front

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"


def methods_table() -> str:
    """The training methods, each with the line that stands on its models' cards."""
    rows = [f"| `{name}` | {method_in_words(name)} |" for name in ("dense", *METHODS)]
    return "\n".join(["| `sparse_method` | how masked weights are trained |", "|---|---|", *rows])


def table() -> str:
    """One row for each evaluation, in the order of corpora and names, then the signatures they share."""
    rows = ["| run | pattern | method | BLEU | to dense (95%) | chrF | steps | minutes | bytes of the file |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    runs = {file.parent.name: Evaluation.read(file) for file in sorted(RESULTS.glob("*/evaluation.json"))}
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


def studies() -> list[Path]:
    """The folders of the studies that have a finished run."""
    return sorted({file.parents[1] for file in RESULTS.glob("*/*/evaluation.json")})


def study_of(folder: Path) -> str:
    """A row for each setting of a study: means over the seeds, beside the dense runs of the same seeds.

    The dense runs come first and then what is best beside them. A run that starts from a model or learns from one is
    also set beside the dense run that does the same for as many steps.
    """
    runs = [read_run(file.parent) for file in sorted(folder.glob("*/evaluation.json"))]
    settings: dict[str, list[LoggedRun]] = {}
    for run in runs:
        settings.setdefault(run.name.rpartition("-s")[0], []).append(run)
    dense = {run.evaluation.seed: run for run in settings.get("dense", [])}
    alike = {training_of(run): run for run in runs if run.evaluation.method == "dense"}
    columns = ["run", "setting", "seeds", "BLEU", "to dense (95%)", "verdict", "to dense trained alike (95%)"]
    head = tables.table_head([*columns, "chrF", "validation loss", "flip rate", "step time"])
    rows: list[tuple[float, str]] = []
    for name, repetitions in settings.items():
        evaluations = [run.evaluation for run in repetitions]
        bleu = [run.bleu for run in evaluations]
        spread = f" ± {statistics.stdev(bleu):.2f}" if len(bleu) > 1 else ""
        baselines = [None if name == "dense" else dense.get(run.evaluation.seed) for run in repetitions]
        test = compare_runs(folder, repetitions, baselines)
        verdict = "" if test is None else f"{test.verdict}, p {test.p:.3f}".replace("the baseline", "dense")
        twins = [alike.get(training_of(run)) for run in repetitions]
        twins = [
            None if twin in (run, baseline) else twin
            for run, baseline, twin in zip(repetitions, baselines, twins, strict=True)
        ]
        compared = difference_of(compare_runs(folder, repetitions, twins))
        found = len(twins) - twins.count(None)
        compared += f", {found} of {len(twins)} seeds" if 0 < found < len(twins) else ""
        cells = [name, repetitions[0].settings, len(bleu), f"{statistics.fmean(bleu):.2f}{spread}", difference_of(test)]
        cells += [verdict, compared, f"{statistics.fmean(run.chrf for run in evaluations):.2f}"]
        cells += [mean([run.validation_loss for run in evaluations], ".3f")]
        cells += [mean([run.flip_rate for run in evaluations], ".2g"), step_time(evaluations[0])]
        place = -math.inf if name == "dense" else math.inf if test is None else -test.difference
        rows.append((place, tables.table_row(cells)))
    lines = [*head, *(row for _, row in sorted(rows)), "", *beside_ste(folder, settings)]
    return "\n".join([*lines, *notes([run.evaluation for run in runs])])


def beside_ste(folder: Path, settings: Mapping[str, list[LoggedRun]]) -> list[str]:
    """A line on what several seeds say of each setting beside STE, which no decay helps; none without such seeds."""
    ste = {run.evaluation.seed: run for run in settings.get("ste", [])}
    found = []
    for name, repetitions in settings.items():
        baselines = [None if name == "ste" else ste.get(run.evaluation.seed) for run in repetitions]
        if len(baselines) - baselines.count(None) > 1:
            test = compare_runs(folder, repetitions, baselines)
            found.append(f"{name} {difference_of(test)}")
    return [f"- To ste, over the seeds of both: {'; '.join(found)}"] if found else []


def training_of(run: LoggedRun) -> tuple[int, str, int, str | None, str | None]:
    """The seed of a run, its shape, its steps, the model that it starts from and the one that it learns from."""
    of = run.evaluation
    return of.seed, of.model, of.steps, of.base_model, of.options.get("distill_from")


def compare_runs(folder: Path, runs: list[LoggedRun], others: list[LoggedRun | None]) -> Comparison | None:
    """Compares the runs that have another beside them with these others; None where none has."""
    pairs = [(run, other) for run, other in zip(runs, others, strict=True) if other is not None]
    if not pairs:
        return None
    sides = zip(*pairs, strict=True)
    return compare_statistics(
        *([SentenceStatistics.read(folder / run.name / "sentences.json") for run in side] for side in sides)
    )


def difference_of(test: Comparison | None) -> str:
    """``+0.22 (-0.61 to +1.02)``."""
    return "" if test is None else f"{test.difference:+.2f} ({test.interval[0]:+.2f} to {test.interval[1]:+.2f})"


def mean(values: list[float | None], form: str) -> str:
    """The mean of the values that there are; empty without any."""
    known = [value for value in values if value is not None]
    return format(statistics.fmean(known), form) if known else ""


def step_time(run: Evaluation) -> str:
    """A step relative to a dense one, as benchmarks/methods.py measured it; empty if it did not.

    Runs of a study take turns on a machine that has other work too, so that their own times are not compared.
    """
    name = tables.training_name(run.method, run.pattern, run.targets, "distill_from" in run.options)
    found = tables.step_times().get(name)
    return "" if found is None else f"{found:.2f}"


def front_of_all() -> str:
    """The points of the front, and its pictures."""
    file = RESULTS / "front.json"
    if not file.is_file():
        return "It has not been measured yet."
    pictures = [f"![BLEU against {words}](results/plots/front_{name}.png)" for name, (_, words, _) in AXES.items()]
    return "\n\n".join([front.table_of(tables.read(file)), *pictures])


def notes(runs: list[Evaluation]) -> list[str]:
    """What the rows have in common: data, model, signatures, versions."""
    lines = []
    for label, values in (
        ("Corpus", {f"{run.corpus}, {run.split}, {run.sentences:,} sentences" for run in runs}),
        ("Model", {run.model for run in runs}),
        ("BLEU", {f"`{run.signature}`" for run in runs}),
        ("chrF", {f"`{run.chrf_signature}`" for run in runs}),
        ("Seeds", {f"{run.seed}" for run in runs}),
        ("Threads", {f"{run.threads}" for run in runs}),
        ("Versions", {", ".join(f"{name} {number}" for name, number in run.versions.items()) for run in runs}),
    ):
        lines.append(f"- {label}: {'; '.join(sorted(values))}")
    return lines


TABLES: dict[str, Callable[[], str]] = {
    "results": table,
    "sparse_method": methods_table,
    "front": front_of_all,
    "images": images.table,
    **tables.TABLES,
    **{f"study {folder.name}": partial(study_of, folder) for folder in studies()},
}


def home(name: str) -> Path:
    """The file that shows a table."""
    if name == "summary":
        return ROOT / "README.md"
    of_the_recipe = name.startswith("study ") or name in (
        *("results", "faults", "sparse_method", "front", "images", "large"),
    )
    return ROOT / ("recipes" if of_the_recipe else "benchmarks") / "README.md"


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a table in its file."""
    return f"<!-- {name}: recipes/results_table.py -->", f"<!-- end of {name} -->"


def main() -> None:
    """Prints the tables or writes them into the README files."""
    write = sys.argv[1:] == ["--write"]
    for name, make in TABLES.items():
        if not write:
            print(make(), end="\n\n")
            continue
        page, (begin, end) = home(name), markers(name)
        before, found, rest = page.read_text(encoding="utf-8").partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise SystemExit(f"results_table: {page.relative_to(ROOT)} needs the two lines {begin} and {end}")
        page.write_text(f"{before}{begin}\n{make()}\n{end}{after}", encoding="utf-8")
    if write:
        for folder in studies():
            plot_runs([read_run(file.parent) for file in sorted(folder.glob("*/evaluation.json"))], folder / "plots")
        if (RESULTS / "front.json").is_file():
            plot_front(tables.read(RESULTS / "front.json")["rows"], RESULTS / "plots")
        images.plot()


if __name__ == "__main__":
    main()
