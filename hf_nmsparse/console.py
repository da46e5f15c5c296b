"""What a training shows on the console: the totals, and not what is logged of each layer."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

__all__ = ["show_totals"]


def show_totals(trainer: Trainer) -> None:
    """Has the console of ``trainer`` show totals alone."""
    for shown, totals in ((ProgressCallback, _TotalsProgress), (PrinterCallback, _TotalsPrinter)):
        if trainer.pop_callback(shown) is not None:
            trainer.add_callback(totals)


class _Totals(TrainerCallback):
    """Keeps what is logged of each layer from the console."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        totals = {key: value for key, value in (logs or {}).items() if "/" not in key}
        super().on_log(args, state, control, logs=totals, **kwargs)


class _TotalsProgress(_Totals, ProgressCallback):
    """Trainer's progress bar."""


class _TotalsPrinter(_Totals, PrinterCallback):
    """What Trainer prints where there is no progress bar."""
