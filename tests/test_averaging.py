"""Checkpoint averaging on files written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_nmsparse.averaging import average_checkpoints, last_checkpoints


def checkpoint(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_mean_of_floats_and_the_last_of_others(tmp_path: Path) -> None:
    folders = [
        checkpoint(tmp_path / f"checkpoint-{step}", w=torch.tensor([1.0, 4.0]) * step, n=torch.tensor([step]))
        for step in (1, 2, 6)
    ]
    mean = average_checkpoints(folders)
    assert mean["w"].tolist() == [3.0, 12.0]
    assert mean["w"].dtype == torch.float32
    assert mean["n"].tolist() == [6]


def test_shards_of_a_checkpoint_are_one(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint-1", a=torch.ones(1))
    save_file({"b": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    assert sorted(average_checkpoints([folder])) == ["a", "b"]


def test_last_checkpoints_go_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in last_checkpoints(tmp_path, 2)] == ["checkpoint-10", "checkpoint-100"]


def test_refusals(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "checkpoint-1", a=torch.ones(1))
    other = checkpoint(tmp_path / "checkpoint-2", b=torch.ones(1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds 2 checkpoints, 3 are wanted; raise save_total_limit"):
        last_checkpoints(tmp_path, 3)
    with pytest.raises(ValueError, match="no checkpoints given"):
        average_checkpoints([])
    with pytest.raises(ValueError, match="do not hold the same tensors, for example 'a'"):
        average_checkpoints([one, other])
    with pytest.raises(ValueError, match="empty holds no"):
        average_checkpoints([tmp_path / "empty"])
