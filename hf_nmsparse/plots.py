"""Pictures of runs: loss and flips against steps, BLEU against sparsity and lambda, and the course of each layer."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_nmsparse.evaluation import Evaluation
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.run_logs import read_curve, read_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Picture = Callable[[Axes], None]

__all__ = ["FORMATS", "LoggedRun", "has_matplotlib", "inline_plots", "plot_runs", "read_run", "read_runs"]

FORMATS = ("png", "svg")
_SEED = re.compile(r"-s[0-9]+$")  # how the name of a study's run ends
_OPTIONS = {"permute": "permuted", "transposable": "transposable"}  # what a run is said to be with an option
_INK = "#010203"  # stands in an inline plot for the colour of the text around it


@dataclass(frozen=True)
class LoggedRun:
    """A run as its folder tells it.

    Attributes:
        name: Name of the folder, with those above it where it shares its own with another run.
        evaluation: The scores and what was run.
        curve: As `run_logs.read_curve` gives it.
        layers: As `run_logs.read_layers` gives it; empty where the run kept none.
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
        words += [f"from {run.options['start']}"] if "start" in run.options else []
        words += [word for option, word in _OPTIONS.items() if option in run.options]
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
            raise ValueError(f"runs: {folder} holds no {file}; give folders of finished runs of the recipe")
    layers = folder / "layers.parquet"
    evaluation, curve = Evaluation.read(folder / "evaluation.json"), read_curve(folder / "curve.json")
    needed = ("distill_weight", "distill_temperature") if "distill_from" in evaluation.options else ()
    drawn = {key: value for key, value in evaluation.options.items() if key.startswith("sparse_")}
    _check_numbers(folder / "evaluation.json", {**drawn, **{key: evaluation.options.get(key) for key in needed}})
    plotted = ("step", "loss", "eval_loss", "flip_rate")
    for row in curve:
        _check_numbers(folder / "curve.json", {key: row[key] for key in plotted if key in row})
    return LoggedRun(
        _place(folder).name,
        evaluation,
        curve,
        read_layers(layers) if layers.is_file() else [],
    )


def _place(folder: Path) -> Path:
    """A path that ends in a name, which "." and ".." do not have; that of a link is its own."""
    return folder.absolute() if folder.name not in ("", "..") else folder.resolve()


def _check_numbers(file: Path, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{file}: {key}: a number is needed, got {value!r}; the recipe writes the file")


def read_runs(folders: Sequence[Path]) -> list[LoggedRun]:
    """Reads several runs, and names each by as many folders as tell it from the others.

    Raises:
        ValueError: As `read_run`, or a run is given twice.
    """
    runs = [read_run(folder) for folder in folders]
    places = [_place(folder).parts for folder in folders]
    for index, folder in enumerate(folders):
        if any(folder.samefile(other) for other in folders[:index]):
            raise ValueError(f"runs: {folder} is given twice; name each run once")
    names = [run.name for run in runs]
    for depth in range(2, max(map(len, places), default=0) + 1):
        shared = {name for name in names if names.count(name) > 1}
        names = [
            "-".join(place[-depth:]) if name in shared else name for name, place in zip(names, places, strict=True)
        ]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def plot_runs(runs: Sequence[LoggedRun], output: Path, format: str = "png") -> list[Path]:
    """Draws every picture that the runs have the numbers for.

    - ``flips``: flip rate against steps, the mean over the seeds of each setting;
    - ``sparsity``: BLEU against the fraction pruned, of settings that were trained with several patterns;
    - ``decay``: BLEU against lambda, of settings that were trained with several;
    - ``layers-RUN``: flip rate of each layer against steps, for runs that have the course of their layers.

    Scores are compared over the seeds that each point and the dense model have.

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
    if not has_matplotlib():
        raise ValueError("plot: needs matplotlib; pip install 'hf-nmsparse[plot]'")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"plot: several runs are named {name!r}; read them with read_runs")
    pictures = _of_settings(runs)
    for run in runs:
        if run.layers:
            pictures[f"layers-{run.name}"] = partial(_layers, run=run)
    if not pictures:
        raise ValueError("plot: nothing to draw; give at least one sparse run")
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for name, picture in pictures.items():
        file = output / f"{name}.{format}"
        with _drawn(name, picture) as figure:
            figure.savefig(file, dpi=120, metadata={"Date": None} if format == "svg" else None)
        files.append(file)
    return files


def has_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    return find_spec("matplotlib") is not None


def inline_plots(runs: Sequence[LoggedRun]) -> dict[str, str]:
    """The pictures that compare runs as elements of a page, by name: loss, and what `plot_runs` draws of settings.

    Lines and letters have the colour of the text around them, and no identifier of one picture is one of another.

    Args:
        runs: What `read_runs` gave.
    """
    from matplotlib import pyplot

    colours: dict[Any, str] = {"text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK}
    colours |= {"xtick.color": _INK, "ytick.color": _INK}
    pictures: dict[str, Picture] = {"loss": partial(_loss, settings=_by(_settings, runs)), **_of_settings(runs)}
    found = {}
    for name, picture in pictures.items():
        with pyplot.rc_context(colours), _drawn(name, picture) as figure, BytesIO() as file:
            for legend in figure.legends:
                legend.get_frame().set_alpha(0)
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
            text = file.getvalue().decode()
        text = re.sub("<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
        found[name] = re.sub(r'( id="|"#|url\(#)', rf"\g<1>{name}-", text.replace(_INK, "currentColor"))
    return found


@contextmanager
def _drawn(name: str, picture: Picture) -> Iterator[Figure]:
    """The figure of a picture; without a date and with fixed ids the same runs give the same file."""
    from cycler import cycler  # matplotlib's own
    from matplotlib import pyplot

    layers = name.startswith("layers-")
    with pyplot.rc_context({"svg.hashsalt": name}):
        figure, axes = pyplot.subplots(figsize=(9, 8 if layers else 4.5), layout="constrained")
        # Each colour serves again with another line before curves look alike.
        axes.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * pyplot.rcParams["axes.prop_cycle"])
        picture(axes)
        if not layers:
            axes.grid(alpha=0.3)
            figure.legend(fontsize="small", loc="outside right upper")
        try:
            yield figure
        finally:
            pyplot.close(figure)


def _of_settings(runs: Sequence[LoggedRun]) -> dict[str, Picture]:
    """The pictures that compare settings, those that there are numbers for."""
    pictures: dict[str, Picture] = {}
    sparse = [run for run in runs if run.evaluation.pattern is not None]
    if any("flip_rate" in row for run in sparse for row in run.curve):
        pictures["flips"] = partial(_flips, settings=_by(_settings, runs))
    dense = _baseline(runs)
    for name, of, draw_scores in (("sparsity", _pattern, _sparsity), ("decay", _lambda, _decay)):
        *groups, level = _of_shared_seeds([*_differing(sparse, of), dense], of)
        if groups:
            pictures[name] = partial(draw_scores, groups=groups, dense=level)
    return pictures


def _loss(axes: Axes, settings: dict[str, list[LoggedRun]]) -> None:
    """Loss of the training as it was logged, and on the validation split with points, in one colour a setting."""
    for number, (label, runs) in enumerate(settings.items()):
        for key, style, words in (
            ("loss", {"linewidth": 1, "alpha": 0.5}, "training"),
            ("eval_loss", {"marker": "o", "markersize": 4}, "validation"),
        ):
            steps, means = _course(runs, key)
            if steps:
                label_of = f"{_plain(_with_seeds(label, runs))}: {words}"
                axes.plot(steps, means, color=f"C{number % 10}", linestyle="-", label=label_of, **style)
    axes.set(xlabel="optimizer step", ylabel="loss")


def _course(runs: Iterable[LoggedRun], key: str) -> tuple[list[float], list[float]]:
    """The steps at which something was logged, and its mean over the runs."""
    points: dict[float, list[float]] = {}
    for run in runs:
        for row in run.curve:
            if key in row:
                points.setdefault(row["step"], []).append(row[key])
    steps = sorted(points)
    return steps, [statistics.fmean(points[step]) for step in steps]


def _flips(axes: Axes, settings: dict[str, list[LoggedRun]]) -> None:
    curves: list[tuple[list[float], list[float], str]] = []
    for label, runs in settings.items():
        steps, rates = _course(runs, "flip_rate")
        if any(rates):  # fixed masks have no place on a log scale
            curves.append((rates, steps, _with_seeds(label, runs)))
    for rates, steps, label in sorted(curves, key=lambda curve: -curve[0][-1]):  # the legend is read as the curves end
        axes.plot(steps, rates, label=_plain(label))
    axes.set(xlabel="optimizer step", ylabel="flip rate: fraction of the mask that a step changes", yscale="log")


def _sparsity(axes: Axes, groups: Iterable[list[LoggedRun]], dense: Sequence[LoggedRun]) -> None:
    for group in groups:
        # Patterns that prune as much, such as 2:4 and 4:8, have a point each; the line goes through their middle.
        points = {
            (runs[0].sparsity, statistics.fmean(run.evaluation.bleu for run in runs)): (pattern, runs)
            for pattern, runs in _by(_pattern, group).items()
        }
        places = sorted({sparsity for sparsity, _ in points})
        means = [statistics.fmean(bleu for sparsity, bleu in points if sparsity == place) for place in places]
        [line] = axes.plot(
            places, means, label=_plain(group[0].settings.removeprefix(f"{group[0].evaluation.pattern}, "))
        )
        for place, (pattern, runs) in points.items():
            axes.plot(*place, marker="o", color=line.get_color())
            best = place == max(other for other in points if other[0] == place[0])
            # On either side, so that two labels do not meet.
            beside, side = ((6, 5), "left") if best else ((-6, -12), "right")
            axes.annotate(str(pattern), place, textcoords="offset points", xytext=beside, ha=side, fontsize="small")
            _repetitions(axes, place[0], runs, line.get_color())
    _level(axes, dense)
    axes.set(xlabel="fraction of the weights pruned", ylabel="BLEU", xmargin=0.1)


def _decay(axes: Axes, groups: Iterable[list[LoggedRun]], dense: Sequence[LoggedRun]) -> None:
    for group in groups:
        places = dict(sorted(_by(_lambda, group).items()))
        means = [statistics.fmean(run.evaluation.bleu for run in runs) for runs in places.values()]
        label = f"{group[0].evaluation.pattern} {group[0].evaluation.method}"
        [line] = axes.plot(list(places), means, marker="o", label=_plain(label))
        for place, runs in places.items():
            _repetitions(axes, place, runs, line.get_color())
    _level(axes, dense)
    axes.set(xlabel="λ", ylabel="BLEU", xscale="log")


def _layers(axes: Axes, run: LoggedRun) -> None:
    layers = list(dict.fromkeys(row["layer"] for row in run.layers))
    steps = sorted({row["step"] for row in run.layers})
    rates = {(row["layer"], row["step"]): row["flip_rate"] for row in run.layers}
    grid = [[rates.get((layer, step)) or 0.0 for step in steps] for layer in layers]
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", extent=(steps[0], steps[-1], len(layers), 0))
    shown = [_plain(layer.removeprefix("model.")) for layer in layers]
    axes.set_yticks([index + 0.5 for index in range(len(layers))], shown, fontsize=6)
    axes.set(xlabel="optimizer step", title=_plain(f"{run.name}: {run.settings}"))
    axes.figure.colorbar(image, ax=axes, label="flip rate")


def _repetitions(axes: Axes, place: float, runs: Sequence[LoggedRun], color: Any) -> None:
    """The runs whose mean is drawn at ``place``, as points."""
    if len(runs) > 1:
        scores = [run.evaluation.bleu for run in runs]
        axes.plot([place] * len(runs), scores, linestyle="", marker=".", alpha=0.5, color=color)


def _baseline(runs: Sequence[LoggedRun]) -> list[LoggedRun]:
    """The dense runs without a teacher that do not go on from another of the runs."""
    names = {run.name for run in runs}
    dense = [run for run in runs if run.evaluation.method == "dense" and run.evaluation.base_model not in names]
    return [run for run in dense if "distill_from" not in run.evaluation.options]


def _level(axes: Axes, dense: Sequence[LoggedRun]) -> None:
    """What the dense model scores, as a line across."""
    if dense:
        level = statistics.fmean(run.evaluation.bleu for run in dense)
        axes.axhline(level, linestyle="--", color="gray", label=_with_seeds("dense", dense))


def _settings(run: LoggedRun) -> str:
    return run.settings


def _pattern(run: LoggedRun) -> str | None:
    return run.evaluation.pattern


def _lambda(run: LoggedRun) -> float | None:
    return run.evaluation.decay


def _by(of: Callable[[LoggedRun], Any], runs: Iterable[LoggedRun]) -> dict[Any, list[LoggedRun]]:
    """The runs by what ``of`` says of them."""
    found: dict[Any, list[LoggedRun]] = {}
    for run in runs:
        found.setdefault(of(run), []).append(run)
    return found


def _differing(runs: Sequence[LoggedRun], of: Callable[[LoggedRun], Any]) -> list[list[LoggedRun]]:
    """Groups of runs that differ in ``of`` and seed alone."""

    def everything_else(run: LoggedRun) -> tuple[Any, ...]:
        others = [None if other is of else other(run) for other in (_pattern, _lambda)]
        found = run.evaluation
        return *others, found.method, found.base_model, tuple(found.targets or ()), str(sorted(found.options.items()))

    return [group for group in _by(everything_else, runs).values() if len(_by(of, group)) > 1]


def _of_shared_seeds(groups: list[list[LoggedRun]], of: Callable[[LoggedRun], Any]) -> list[list[LoggedRun]]:
    """The runs of the seeds that every point of every group has: means over different seeds are no comparison."""
    seeds = [{run.evaluation.seed for run in runs} for group in groups for runs in _by(of, group).values()]
    shared = set.intersection(*seeds) if seeds else set()
    return [[run for run in group if not shared or run.evaluation.seed in shared] for group in groups]


def _plain(text: str) -> str:
    """Text that matplotlib does not take for TeX, and in which every character can be drawn or is named."""
    shown = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return "".join(shown).replace("$", r"\$")


def _with_seeds(label: str, runs: Sequence[LoggedRun]) -> str:
    return label if len(runs) == 1 else f"{label} ({len(runs)} seeds)"
