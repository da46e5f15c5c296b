"""What is kept of a run's logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from hf_nmsparse.run_logs import LAYER_MEASURES, layer_rows, read_curve, read_layers, write_curve, write_layers

LOG: list[dict[str, Any]] = [
    {
        "step": 10,
        "loss": 2.123456789,
        "sad": 8.0,
        "flip_rate": 0.25,
        "sad/model.fc1": 3.0,
        "flip_rate/model.fc1": 0.5,
        "kept/model.fc1": 0.1,
        "pruned/model.fc1": 0.01,
        "sad/fc2": 5.0,
        "epoch": 1.0,
    },
    {"step": 10, "eval_loss": 3.0, "eval_runtime": 1.0},
    {"step": 20, "train_runtime": 5.0, "train_seconds": 5.0},
]
EMPTY = {"changed": None, "flip_rate": None, "kept": None, "pruned": None}


def test_the_curve_is_that_of_the_whole_model(tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    write_curve(LOG, file)
    assert read_curve(file) == [
        {"step": 10, "loss": 2.12346, "sad": 8.0, "flip_rate": 0.25},
        {"step": 10, "eval_loss": 3.0},
    ]
    assert len(file.read_text().splitlines()) == 4


def test_a_row_for_each_layer_and_log(tmp_path: Path) -> None:
    first = {"sad": 3.0, "flip_rate": 0.5, "kept": 0.1, "pruned": 0.01, "changed": None}
    expected = [{"step": 10, "layer": "model.fc1", **first}, {"step": 10, "layer": "fc2", **EMPTY, "sad": 5.0}]
    assert layer_rows(LOG) == expected
    write_layers(LOG, tmp_path / "layers.parquet")
    assert read_layers(tmp_path / "layers.parquet") == expected


def test_a_dense_run_has_no_table_of_layers(tmp_path: Path) -> None:
    write_layers(LOG[1:], tmp_path / "layers.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"loss": 1.0}]'])
def test_what_is_no_curve_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "curve.json").write_text(content)
    with pytest.raises(ValueError, match=r"curve\.json: "):
        read_curve(tmp_path / "curve.json")


def test_what_is_no_table_of_layers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "layers.parquet").write_text("no table")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_layers(tmp_path / "layers.parquet")


@pytest.mark.parametrize(("key", "value"), [("layer", 1), ("step", "x"), ("sad", float("nan")), ("kept", "<b>")])
def test_layers_of_something_else_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    rows = [{"step": 1, "layer": "a", **dict.fromkeys(LAYER_MEASURES), key: value}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "layers.parquet")
    with pytest.raises(ValueError, match=f"layers.parquet: {key} cannot be "):
        read_layers(tmp_path / "layers.parquet")
