"""Pictures of the front: BLEU against bytes, and against tokens a second."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Point = Mapping[str, Any]

AXES = {
    "bytes": ("bytes", "bytes of the int8 file", False),
    "speed": ("tokens_per_second", "tokens a CPU second, engine, int8, beam 4, one thread", True),
}
"""Of each picture the figure on its x axis, what that is called, and whether more of it is better."""

MARKERS = ("o", "s", "^", "D", "v", "P")
_RADII = (9, 14, 20, 28, 38, 50, 64, 80, 100, 125, 150)  # of labels around their points, in points of the page
_CLEAR = 2.0  # pixels between a label and what is beside it


def front_of(points: Sequence[Point], key: str, more: bool) -> list[Point]:
    """The points that no other beats: none is at least as good in both ``key`` and BLEU and better in one."""

    def good(point: Point) -> tuple[float, float]:
        return (point[key] if more else -point[key]), point["bleu"]

    def beaten(point: Point) -> bool:
        x, y = good(point)
        return any(a >= x and b >= y and (a, b) != (x, y) for a, b in map(good, points))

    return sorted((point for point in points if not beaten(point)), key=lambda point: point[key])


def plot_front(points: Sequence[Point], output: Path) -> list[Path]:
    """Draws both pictures: dense and sparse models with their fronts, seeds as whiskers.

    Points of a front are named; of the others the table says which they are. Hollow ones had no teacher.

    Args:
        points: Rows of front.json.
        output: Folder of the pictures; it is made.

    Returns:
        The files written.
    """
    from matplotlib import pyplot

    output.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (key, words, more) in AXES.items():
        figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
        # Speeds compare on one machine alone.
        shown = [point for point in points if key != "tokens_per_second" or "machine" not in point]
        try:
            _draw(axes, shown, key, words, more)
            files.append(output / f"front_{name}.png")
            figure.savefig(files[-1], dpi=120)
        finally:
            pyplot.close(figure)
    return files


def _draw(axes: Axes, points: Sequence[Point], key: str, words: str, more: bool) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    named: list[tuple[Point, str]] = []
    lines = []
    kinds = list(dict.fromkeys(point["pattern"] or "dense" for point in points))
    for number, kind in enumerate(kinds):
        own = [point for point in points if (point["pattern"] or "dense") == kind]
        colour, marker = f"C{number}", MARKERS[number % len(MARKERS)]
        for point in own:
            x, y = point[key], point["bleu"]
            low, high = point["extremes"]["bleu"]
            axes.errorbar(x, y, yerr=[[y - low], [high - y]], color=colour, capsize=3, linewidth=1)
            face = colour if point["teacher"] else "white"
            axes.plot(x, y, marker=marker, markersize=7, linestyle="", color=colour, markerfacecolor=face)
        front = front_of(own, key, more)
        style = ("-", "--", ":")[number % 3]
        places = [(point[key], point["bleu"]) for point in front]
        axes.plot(*zip(*places, strict=True), color=colour, linestyle=style, marker=marker, markersize=0, zorder=1)
        axes.plot([], [], color=colour, linestyle=style, marker=marker, label=f"{kind}, with a teacher; the front")
        plain = {"linestyle": "", "markerfacecolor": "white"}
        axes.plot([], [], color=colour, marker=marker, **plain, label=f"{kind}, without")
        named += [(point, colour) for point in front]
        lines.append(places)
    axes.set(xscale="log", xlabel=words, ylabel="BLEU", xmargin=0.12, ymargin=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _ticks(axes)
    axes.grid(alpha=0.3)
    axes.figure.legend(fontsize="small", loc="outside upper center", ncols=len(kinds))
    _label(axes, points, named, lines, key)


def _ticks(axes: Axes) -> None:
    """Round numbers, at a few places of each power of ten, and evenly where the points lie within less than one."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 3, 5, 7)]
    if sum(low <= tick <= high for tick in ticks) < 4:
        ticks = MaxNLocator(6).tick_values(low, high).tolist()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.set_xlim(low, high)


def _label(
    axes: Axes,
    points: Sequence[Point],
    named: Sequence[tuple[Point, str]],
    lines: Sequence[Sequence[tuple[float, float]]],
    key: str,
) -> None:
    """Names points, each label at the nearest place where it covers nothing: no label, marker, whisker or line."""
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    figure.draw_without_rendering()  # what follows needs places in pixels
    pixels: Callable[[tuple[float, float]], Any] = axes.transData.transform
    markers: list[Bbox] = []  # with their whiskers
    for point in points:
        (x, low), (_, high) = (pixels((point[key], bleu)) for bleu in point["extremes"]["bleu"])
        markers.append(Bbox([[x - 6, low - 6], [x + 6, high + 6]]))
    taken = list(markers)
    for line in lines:
        for start, end in itertools.pairwise(map(pixels, line)):
            taken += [Bbox([at - 1, at + 1]) for at in _along(start, end)]
    inside, unit = axes.get_window_extent(), figure.dpi / 72
    names = [point["run"] for point, _ in named]
    placed: list[Bbox] = []
    for point, colour in named:
        text = point["run"] if names.count(point["run"]) == 1 else f"{point['study']}/{point['run']}"
        at = pixels((point[key], point["bleu"]))
        label = axes.annotate(
            text,
            (point[key], point["bleu"]),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize="small",
            color=colour,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": colour, "shrinkA": 0, "shrinkB": 4},
        )
        label.set_in_layout(False)
        width, height = label.get_window_extent().size
        tried: list[tuple[tuple[int, int, int], Any, Bbox, list[Any]]] = []
        for radius, turn in itertools.product(_RADII, range(16)):
            angle = math.pi * (1 / 2 + turn / 8)
            shift = (
                math.cos(angle) * (radius * unit + width / 2),
                math.sin(angle) * (radius * unit + height / 2),
            )
            centre = at + shift
            box = Bbox.from_bounds(centre[0] - width / 2, centre[1] - height / 2, width, height).padded(_CLEAR)
            if not all(inside.contains(*corner) for corner in box.corners()):
                continue
            leader = [place for place in _along(at, centre) if not box.contains(*place)]
            worst = sum(box.overlaps(other) or _crosses(leader, other) for other in placed)
            crossed = sum(_crosses(leader, marker) for marker in markers if not marker.contains(*at))
            covered = worst, sum(box.overlaps(other) for other in taken), crossed
            tried.append((covered, shift, box, leader))
            if not any(covered):
                break
        _, shift, box, leader = min(tried, key=lambda place: place[0])  # of equals the nearest
        label.set_position((shift[0] / unit, shift[1] / unit))
        placed.append(box)
        taken += [*(Bbox([place - 1, place + 1]) for place in leader)]


def _crosses(leader: Sequence[Any], box: Bbox) -> bool:
    return any(box.contains(*place) for place in leader)


def _along(start: Any, end: Any) -> list[Any]:
    """Places on a line, a few pixels apart."""
    steps = max(1, int(math.dist(start, end) / 6))
    return [start + (end - start) * step / steps for step in range(steps + 1)]
