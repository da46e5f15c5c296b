"""Checkpoint averaging: the mean of the last dense masters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from hf_nmsparse.checkpoints import checkpoints

__all__ = ["average_checkpoints", "last_checkpoints"]


def last_checkpoints(output_dir: str | Path, count: int) -> list[Path]:
    """The folders ``checkpoint-STEP`` with the ``count`` highest steps, oldest first.

    Raises:
        ValueError: There are fewer.
    """
    folders = checkpoints(output_dir)
    if len(folders) < count:
        raise ValueError(
            f"averaging: {output_dir} holds {len(folders)} checkpoints, {count} are wanted; raise save_total_limit"
        )
    return folders[-count:]


def average_checkpoints(folders: Sequence[str | Path]) -> dict[str, Tensor]:
    """The mean of the weights of several checkpoints, summed in fp64.

    Average the dense masters and mask the result: the masks of the checkpoints differ, and a mean of masked weights
    is not N:M.

    Args:
        folders: Checkpoint folders, each with its weights in ``model*.safetensors``.

    Returns:
        A state dict; tensors that are no floating-point numbers come from the last folder.

    Raises:
        ValueError: There is no folder, a folder has no weights, or their keys differ.
    """
    if not folders:
        raise ValueError("averaging: no checkpoints given")
    total: dict[str, Tensor] = {}
    for folder in folders:
        state = _load(Path(folder))
        if total and total.keys() != state.keys():
            odd = sorted(total.keys() ^ state.keys())[0]
            raise ValueError(f"averaging: {folder} and {folders[0]} do not hold the same tensors, for example {odd!r}")
        for key, value in state.items():
            total[key] = total[key] + value.double() if key in total and value.is_floating_point() else value
            if value.is_floating_point():
                total[key] = total[key].double()
    last = _load(Path(folders[-1]))
    return {
        key: (value / len(folders)).to(last[key].dtype) if last[key].is_floating_point() else last[key]
        for key, value in total.items()
    }


def _load(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))  # in one file or in shards
    if not files:
        raise ValueError(f"averaging: {folder} holds no model*.safetensors")
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_file(file))
    return state
