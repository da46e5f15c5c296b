"""ResumableTrainer: a Trainer that leaves a complete checkpoint whatever ends it, and goes on from there."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_nmsparse.checkpoints import is_complete, last_complete_checkpoint
from hf_nmsparse.faults import cannot_write, last_word, who_is_gone
from hf_nmsparse.files import flush
from hf_nmsparse.loading import check_checkpoint
from hf_nmsparse.preemption import Preempted, Preemption
from hf_nmsparse.wrappers import has_adapters

__all__ = ["ResumableTrainer"]


class ResumableTrainer(Trainer):
    """A Trainer whose runs end with a complete checkpoint, or one line that says which is the last.

    Attributes:
        preemption: Whether SIGTERM has asked for the end, and whether that has come.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._began = time.perf_counter()
        self._seconds_before: float | None = None
        self.preemption = Preemption()
        self.add_callback(self.preemption)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains as Trainer does; a run that has reached ``max_steps`` before is loaded and not trained on.

        Trainer would take one step more than ``max_steps`` after resuming in the middle of an epoch.

        SIGTERM, by which clusters announce that they take a machine back, ends the training after the step that is
        being taken, with a checkpoint.

        Raises:
            Preempted: That has happened.
            ValueError: The loss is not finite, a checkpoint could not be written, or another process is gone: one that
                trains too, or one that reads the data. The last checkpoint is as it was.
        """
        self._began, self._seconds_before = time.perf_counter(), None
        folder = resume_from_checkpoint
        if folder is True:
            folder = last_complete_checkpoint(self.args.output_dir)
            if folder is None:
                raise ValueError(f"SparseTrainer: {self.args.output_dir} holds no complete checkpoint to resume from")
            resume_from_checkpoint = folder
        if isinstance(folder, str) and (Path(folder) / TRAINER_STATE_NAME).is_file():
            before = TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME))
            if 0 < self.args.max_steps <= before.global_step:
                self._load_from_checkpoint(folder)
                self.state = before
                return TrainOutput(before.global_step, 0.0, {})
        with self.preemption.listening():
            try:
                result = super().train(resume_from_checkpoint, *args, **kwargs)
            except (RuntimeError, ConnectionResetError) as error:
                gone = who_is_gone(last_word(error))
                if gone is None:
                    raise
                raise ValueError(
                    f"training: after step {self.state.global_step} {gone}; {self._last_good()}; see what ended it, "
                    "often want of memory, and run again"
                ) from error
        if self.preemption.stopped:
            raise Preempted(f"stopped by SIGTERM, saved at step {self.state.global_step}; the same command goes on")
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the weights as Trainer does, if the checkpoint has all of them."""
        if isinstance(self.model, PreTrainedModel) and not has_adapters(self.model):
            check_checkpoint(resume_from_checkpoint, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's step, which ends the run where the loss is not finite: no later step would mend the weights.

        Under fp16 the loss scaler skips such a step.
        """
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.scaler is None and not torch.isfinite(loss):
            raise ValueError(
                f"training: the loss of step {self.state.global_step + 1} is {float(loss)}; {self._last_good()}; lower "
                "learning_rate, or look for what is wrong with the data"
            )
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes Trainer's checkpoint and waits until it is on the disk."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                flush(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            # A complete checkpoint stays: then a push, or the deletion of old ones, has failed.
            if not cannot_write(error) or is_complete(folder):
                raise
            shutil.rmtree(folder, ignore_errors=True)  # it takes space and is of no use
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"checkpoint: {folder} could not be written: {reason}; {self._last_good()}; free space, then run again"
            ) from error

    def _last_good(self) -> str:
        folder = last_complete_checkpoint(self.args.output_dir)
        return "there is no checkpoint yet" if folder is None else f"the last checkpoint is {folder}"

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves what Trainer does; all processes have before the one that completes the checkpoint goes on."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as Trainer does, with the seconds trained, which go on from the log of the checkpoint."""
        if is_of_training(logs):
            if self._seconds_before is None:
                logged = (entry.get("train_seconds", 0.0) for entry in self.state.log_history)
                self._seconds_before = max(logged, default=0.0)
            logs["train_seconds"] = self._seconds_before + time.perf_counter() - self._began
        super().log(logs, start_time)


def is_of_training(logs: dict[str, float]) -> bool:
    """Whether it is a log of the training itself, while it runs or at its end."""
    return "loss" in logs or "train_loss" in logs
