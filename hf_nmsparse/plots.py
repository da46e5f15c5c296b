"""Pictures of runs: flips against steps, BLEU against sparsity and against lambda, and the course of each layer."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_nmsparse.diagnostics import read_curve, read_layers
from hf_nmsparse.metrics import Evaluation
from hf_nmsparse.pattern import NMPattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMATS", "LoggedRun", "plot_runs", "read_run"]

FORMATS = ("png", "svg")
_SEED = re.compile(r"-s[0-9]+$")  # how the name of a study's run ends


@dataclass(frozen=True)
class LoggedRun:
    """A run as its folder tells it.

    Attributes:
        name: Name of the folder.
        evaluation: The scores and what was run.
        curve: As `diagnostics.read_curve` gives it.
        layers: As `diagnostics.read_layers` gives it; empty where the run kept none.
    """

    name: str
    evaluation: Evaluation
    curve: list[dict[str, Any]]
    layers: list[dict[str, Any]]

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of a sparse layer that is pruned; 0 for a dense model."""
        return 0.0 if self.evaluation.pattern is None else 1 - NMPattern.parse(self.evaluation.pattern).density

    @property
    def settings(self) -> str:
        """What was trained, without the seed: runs that share it are repetitions."""
        run = self.evaluation
        words = [run.method] if run.method == "dense" else [str(run.pattern), run.method]
        words += [] if run.decay is None else [f"λ {run.decay:g}"]
        if run.targets is not None:
            words.append("+".join(run.targets))
        for key, value in run.options.items():
            if key.startswith("sparse_"):
                words.append(f"{key.removeprefix('sparse_').replace('_', ' ')} {value:g}")
        if "distill_from" in run.options:
            words.append(f"distilled {run.options['distill_weight']:g}")
            if run.options["distill_temperature"] != 1:
                words.append(f"T {run.options['distill_temperature']:g}")
        if run.base_model is not None:
            words.append(f"after {_SEED.sub('', run.base_model)}")
        return ", ".join(words)


def read_run(folder: Path) -> LoggedRun:
    """Reads ``evaluation.json``, ``curve.json`` and, if it is there, ``layers.parquet`` of a run.

    Raises:
        ValueError: The folder holds no finished run.
    """
    for file in ("evaluation.json", "curve.json"):
        if not (folder / file).is_file():
            raise ValueError(f"plot: {folder} holds no {file}; give folders of finished runs of the recipe")
    layers = folder / "layers.parquet"
    return LoggedRun(
        folder.name,
        Evaluation.read(folder / "evaluation.json"),
        read_curve(folder / "curve.json"),
        read_layers(layers) if layers.is_file() else [],
    )


def plot_runs(runs: Sequence[LoggedRun], output: Path, format: str = "png") -> list[Path]:
    """Draws every picture that the runs have the numbers for.

    - ``flips``: flip rate against steps, the mean over the seeds of each setting;
    - ``sparsity``: BLEU against the fraction pruned, where patterns differ;
    - ``decay``: BLEU against lambda, where it differs, of the seeds that each lambda and the dense model have;
    - ``layers-RUN``: flip rate of each layer against steps, for runs that have the course of their layers.

    Args:
        runs: What `read_run` gave.
        output: Folder of the pictures; it is made.
        format: ``"png"`` or ``"svg"``.

    Returns:
        The files written.

    Raises:
        ValueError: There is nothing to draw, the format is unknown, or matplotlib is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"plot: format is one of {', '.join(FORMATS)}, got {format!r}")
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("plot: needs matplotlib; pip install 'hf-nmsparse[plot]'") from error
    pictures: dict[str, Callable[[Axes], None]] = {}
    settings: dict[str, list[LoggedRun]] = {}
    for run in runs:
        settings.setdefault(run.settings, []).append(run)
    sparse = [run for run in runs if run.evaluation.pattern is not None]
    if any("flip_rate" in row for run in sparse for row in run.curve):
        pictures["flips"] = lambda axes: _flips(axes, settings)
    if len({run.evaluation.pattern for run in sparse}) > 1:
        pictures["sparsity"] = lambda axes: _sparsity(axes, runs)
    swept = [group for group in _swept(sparse) if len({run.evaluation.decay for run in group}) > 1]
    if swept:
        names = {run.name for run in runs}
        dense = [run for run in runs if run.evaluation.method == "dense" and run.evaluation.base_model not in names]
        *swept, dense = _of_shared_seeds([*swept, dense])
        pictures["decay"] = lambda axes: _decay(axes, swept, dense)
    for run in runs:
        if run.layers:
            pictures[f"layers-{run.name}"] = lambda axes, run=run: _layers(axes, run)  # type: ignore[misc]
    if not pictures:
        raise ValueError("plot: nothing to draw; give at least one sparse run")
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in pictures.items():
        layers = name.startswith("layers-")
        figure, axes = pyplot.subplots(figsize=(9, 8 if layers else 4.5), layout="constrained")
        draw(axes)
        if not layers:
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        file = output / f"{name}.{format}"
        # Without the date and with fixed ids the same runs give the same file.
        with pyplot.rc_context({"svg.hashsalt": name}):
            figure.savefig(file, dpi=120, metadata={"Date": None} if format == "svg" else None)
        pyplot.close(figure)
        files.append(file)
    return files


def _flips(axes: Axes, settings: dict[str, list[LoggedRun]]) -> None:
    for label, runs in settings.items():
        points: dict[int, list[float]] = {}
        for run in runs:
            for row in run.curve:
                if "flip_rate" in row:
                    points.setdefault(row["step"], []).append(row["flip_rate"])
        if any(rate > 0 for rates in points.values() for rate in rates):  # fixed masks have no place on a log scale
            steps = sorted(points)
            axes.plot(steps, [statistics.fmean(points[step]) for step in steps], label=_with_seeds(label, runs))
    axes.set(xlabel="optimizer step", ylabel="flip rate: fraction of the mask that a step changes", yscale="log")


def _sparsity(axes: Axes, runs: Sequence[LoggedRun]) -> None:
    lines: dict[str, dict[str, list[LoggedRun]]] = {}
    for run in runs:
        label = run.settings.removeprefix(f"{run.evaluation.pattern}, ")
        lines.setdefault(label, {}).setdefault(run.evaluation.pattern or "dense", []).append(run)
    for label, patterns in lines.items():
        # Patterns that prune as much, such as 2:4 and 4:8, have a point each.
        points = sorted(
            (group[0].sparsity, statistics.fmean(run.evaluation.bleu for run in group), pattern, group)
            for pattern, group in patterns.items()
        )
        [line] = axes.plot([point[0] for point in points], [point[1] for point in points], marker="o", label=label)
        for sparsity, mean, pattern, group in points:
            _repetitions(axes, sparsity, group, line.get_color())
            if pattern != "dense":
                axes.annotate(pattern, (sparsity, mean), textcoords="offset points", xytext=(5, 5), fontsize="small")
    axes.set(xlabel="fraction of the weights pruned", ylabel=f"BLEU on {runs[0].evaluation.split}")


def _decay(axes: Axes, swept: Iterable[list[LoggedRun]], dense: Sequence[LoggedRun]) -> None:
    for group in swept:
        places: dict[float, list[LoggedRun]] = {}
        for run in sorted(group, key=lambda run: run.evaluation.decay or 0.0):
            places.setdefault(run.evaluation.decay or 0.0, []).append(run)
        means = [statistics.fmean(run.evaluation.bleu for run in runs) for runs in places.values()]
        label = f"{group[0].evaluation.pattern} {group[0].evaluation.method}"
        [line] = axes.plot(list(places), means, marker="o", label=label)
        for place, runs in places.items():
            _repetitions(axes, place, runs, line.get_color())
    if dense:
        level = statistics.fmean(run.evaluation.bleu for run in dense)
        axes.axhline(level, linestyle="--", color="gray", label=_with_seeds("dense", dense))
    axes.set(xlabel="λ", ylabel="BLEU", xscale="log")


def _layers(axes: Axes, run: LoggedRun) -> None:
    layers = list(dict.fromkeys(row["layer"] for row in run.layers))
    steps = sorted({row["step"] for row in run.layers})
    rates = {(row["layer"], row["step"]): row["flip_rate"] for row in run.layers}
    grid = [[rates.get((layer, step)) or 0.0 for step in steps] for layer in layers]
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", extent=(steps[0], steps[-1], len(layers), 0))
    shown = [layer.removeprefix("model.") for layer in layers]
    axes.set_yticks([index + 0.5 for index in range(len(layers))], shown, fontsize=6)
    axes.set(xlabel="optimizer step", title=f"{run.name}: {run.settings}")
    axes.figure.colorbar(image, ax=axes, label="flip rate")


def _repetitions(axes: Axes, place: float, runs: Sequence[LoggedRun], color: Any) -> None:
    """The runs whose mean is drawn at ``place``, as points."""
    if len(runs) > 1:
        scores = [run.evaluation.bleu for run in runs]
        axes.plot([place] * len(runs), scores, linestyle="", marker=".", alpha=0.5, color=color)


def _swept(runs: Sequence[LoggedRun]) -> list[list[LoggedRun]]:
    """Runs that differ in lambda and seed alone."""
    groups: dict[tuple[Any, ...], list[LoggedRun]] = {}
    for run in runs:
        found = run.evaluation
        if found.decay is not None:
            key = found.pattern, found.method, tuple(found.targets or ()), str(sorted(found.options.items()))
            groups.setdefault(key, []).append(run)
    return list(groups.values())


def _of_shared_seeds(groups: list[list[LoggedRun]]) -> list[list[LoggedRun]]:
    """The runs of the seeds that every lambda of every group has: means over different seeds are no comparison."""
    seeds: dict[Any, set[Any]] = {}
    for index, group in enumerate(groups):
        for run in group:
            seeds.setdefault((index, run.evaluation.decay), set()).add(run.evaluation.seed)
    shared = set.intersection(*seeds.values()) or set.union(*seeds.values())
    return [[run for run in group if run.evaluation.seed in shared] for group in groups]


def _with_seeds(label: str, runs: Sequence[LoggedRun]) -> str:
    return label if len(runs) == 1 else f"{label} ({len(runs)} seeds)"
