"""What torch says when a training fails for a reason outside of it: a full disk, or a process that is gone."""

from __future__ import annotations

import time

import torch

__all__ = ["cannot_write", "last_word", "who_is_gone"]

# What torch.save says where the disk does not take a file; it raises a RuntimeError as for anything else.
_TORCH_CANNOT_WRITE = ("inline_container", "PytorchStreamWriter", "iostream error")

# How torch begins where a process that reads for a DataLoader is gone, and what gloo puts into all it says.
_WORKER_GONE, _GLOO = "DataLoader worker (pid", "gloo/"

_SIGNAL_SECONDS = 1.0


def cannot_write(error: Exception) -> bool:
    """Whether it says that the disk does not take a file."""
    return not isinstance(error, RuntimeError) or any(word in str(error) for word in _TORCH_CANNOT_WRITE)


def last_word(error: Exception) -> Exception:
    """What torch says of a process that has reset a pipe to this one: its signal comes a moment after."""
    if isinstance(error, ConnectionResetError):
        try:
            time.sleep(_SIGNAL_SECONDS)
        except RuntimeError as told:  # by torch's handler of the signal
            return told
    return error


def who_is_gone(error: Exception) -> str | None:
    """In words, where torch says that another process is gone; None where it says something else."""
    reason = str(error).partition("\n")[0].rstrip(". ")
    if reason.startswith(_WORKER_GONE):
        return f"a process that reads the data is gone ({reason})"
    if _GLOO in reason or isinstance(error, getattr(torch.distributed, "DistError", ())):
        return f"another training process does not answer ({reason.partition('. ')[0]})"  # gloo adds advice
    return None
