"""Pictures of a made-up front, and which of its points lie on it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from recipes.front_plots import AXES, front_of, plot_front


def point(run: str, size: int, bleu: float, pattern: str | None = None, spread: float = 0, **facts: Any) -> Any:
    place = {
        "bytes": size,
        "bleu": bleu,
        "extremes": {"bleu": [bleu - spread, bleu + spread]},
        "tokens_per_second": 1e9 / size,
    }
    return {"study": "s", "run": run, "pattern": pattern, "teacher": None} | place | facts


def test_the_front_is_what_no_other_beats() -> None:
    points = [
        point("large", 40, 30.0),
        point("small", 10, 20.0),
        point("as good and larger", 50, 30.0),
        point("larger and worse", 20, 19.0),
        point("as large and worse", 40, 29.0),
        point("twin of small", 10, 20.0),
    ]
    assert [one["run"] for one in front_of(points, "bytes", more=False)] == ["small", "twin of small", "large"]
    fast = front_of(points, "tokens_per_second", more=True)
    assert [one["run"] for one in fast] == ["large", "small", "twin of small"]


def test_labels_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both pictures, of points that lie closer than their names are long."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    text = pytest.importorskip("matplotlib.text")
    points = [
        point(f"d{64 + 32 * step}-{name}", (1 + step) * size, 30 + step + gain, pattern, spread=0.2 * step)
        for step in range(5)
        for name, size, gain, pattern in (("dense", 100, 0.5, None), ("sr-ste-distilled", 90, 0.3, "2:4"))
    ]
    points.append(point("d64-dense", 700, 36.0, study="other"))
    drawn: list[Any] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", drawn.append)
    files = plot_front(points, tmp_path / "plots")
    assert [file.name for file in files] == [f"front_{name}.png" for name in AXES]
    assert all(file.stat().st_size > 10_000 for file in files)
    for figure in drawn:
        figure.draw_without_rendering()  # places are those of the last drawing, which had another resolution
        [axes] = figure.axes
        labels = {label.get_text(): label for label in axes.texts}
        assert len(labels) == len(points)
        assert {"s/d64-dense", "other/d64-dense", "d96-sr-ste-distilled"} <= labels.keys()
        boxes = [text.Text.get_window_extent(label) for label in labels.values()]  # without what leads to the point
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        frame = axes.get_window_extent()
        assert all(frame.contains(box.x0, box.y0) for box in boxes)
        kinds = {line.get_marker() for line in axes.lines if line.get_label().startswith(("dense", "2:4"))}
        assert len(kinds) == 2
        close(figure)
