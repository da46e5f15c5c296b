"""The checkpoints in the output folder of a run: which there are, and which were written to their end."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

__all__ = ["checkpoints", "is_complete", "last_complete_checkpoint"]


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders ``checkpoint-STEP`` in ``output_dir``, in the order of their steps."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[-1]))


def last_complete_checkpoint(output_dir: str | Path | None) -> str | None:
    """The folder ``checkpoint-STEP`` with the highest step that was written to its end, None if there is none.

    Trainer writes its state last, so that a folder whose state can be read is complete. What a kill leaves of another
    is passed over, and written again when the run comes to its step.
    """
    return next((str(folder) for folder in reversed(checkpoints(output_dir or ".")) if is_complete(folder)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether the folder was written to its end."""
    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):
        return False
    return True
