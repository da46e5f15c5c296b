"""The end of a training at SIGTERM, by which clusters announce that they take a machine back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback, TrainerState

__all__ = ["Preempted", "Preemption"]


class Preempted(SystemExit):
    """The training was ended by SIGTERM after it had saved; uncaught, it ends the process with status 143."""

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption(TrainerCallback):
    """Ends a training at SIGTERM: after the step that is being taken, with a checkpoint.

    Attributes:
        stopped: Whether it has.
    """

    EVERY = 10
    """Steps between two looks at the other processes, which need not have had the signal in the same step."""

    def __init__(self) -> None:
        self.asked = self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signal while it lasts; Python leaves that to the main thread."""
        self.asked = self.stopped = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Asks for the checkpoint and the end once SIGTERM has come, to whichever process."""
        asked = self.asked
        if args.world_size > 1:
            if state.global_step % self.EVERY:
                return
            votes = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(votes)
            asked = bool(votes)
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
