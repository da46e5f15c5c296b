"""What a run logged, as small files: a curve of the whole model, and the course of each layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

__all__ = ["LAYER_MEASURES", "layer_rows", "read_curve", "read_layers", "write_curve", "write_layers"]

LAYER_MEASURES = ("sad", "flip_rate", "changed", "kept", "pruned")
"""What is logged of each layer, as ``measure/layer``:

- ``sad``: mask entries that a step changed, averaged over the steps since the last log;
- ``flip_rate``: the same as a fraction of the layer's weights;
- ``changed``: share of the groups whose mask ever changed, where ``sparse_log_groups`` is on;
- ``kept`` and ``pruned``: mean magnitude of the kept and of the pruned weights.
"""

_CURVE = ("step", "loss", "eval_loss", "learning_rate", "sad", "flip_rate", "train_seconds")

Log = Iterable[Mapping[str, Any]]
"""Trainer's ``state.log_history``."""


def write_curve(log: Log, file: Path) -> None:
    """Writes loss, SAD and flip rate of the whole model against steps, as JSON with one log a line."""
    rows = [{key: _short(entry[key]) for key in _CURVE if key in entry} for entry in log]
    lines = ",\n".join(json.dumps(row) for row in rows if "loss" in row or "eval_loss" in row)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_curve(file: Path) -> list[dict[str, Any]]:
    """The rows of `write_curve`.

    Raises:
        ValueError: The file is no such curve.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise ValueError(f"{file}: a curve is a list of objects with a step; the recipe writes one as curve.json")
    return rows


def layer_rows(log: Log) -> list[dict[str, Any]]:
    """A row for each log and layer: ``step``, ``layer`` and `LAYER_MEASURES`, None where one was not logged."""
    rows: list[dict[str, Any]] = []
    for entry in log:
        layers: dict[str, dict[str, Any]] = {}
        for key, value in entry.items():
            measure, found, layer = key.partition("/")
            if found and measure in LAYER_MEASURES:
                layers.setdefault(layer, dict.fromkeys(LAYER_MEASURES))[measure] = value
        rows += [{"step": entry["step"], "layer": layer, **measures} for layer, measures in layers.items()]
    return rows


def write_layers(log: Log, file: Path) -> None:
    """Writes `layer_rows` as Parquet; no file where no layer was logged."""
    rows = layer_rows(log)
    if rows:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def read_layers(file: Path) -> list[dict[str, Any]]:
    """The rows of `write_layers`.

    Raises:
        ValueError: The file is no such table.
    """
    import pyarrow  # here and above: curves are written on machines that have no pyarrow
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: cannot be read as Parquet: {error}") from error
    if not rows or not {"step", "layer", *LAYER_MEASURES} <= rows[0].keys():
        raise ValueError(f"{file}: a table of layers has step, layer and {', '.join(LAYER_MEASURES)}")
    for row in rows:
        numbers = {"step": row["step"], **{key: row[key] for key in LAYER_MEASURES if row[key] is not None}}
        wrong = [key for key, value in numbers.items() if not isinstance(value, int | float) or not isfinite(value)]
        if wrong or not isinstance(row["layer"], str):
            key = (wrong or ["layer"])[0]
            raise ValueError(f"{file}: {key} cannot be {row[key]!r}; the recipe writes the file")
    return rows


def _short(value: float) -> float:
    """Six significant digits: a curve is for plots and lies in git."""
    return value if isinstance(value, int) else float(f"{value:.6g}")
