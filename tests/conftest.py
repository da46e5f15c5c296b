"""Every test runs offline, on one thread, from the same seed, with the signals of a terminal."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: it runs on the CPU then, in Python

torch.set_num_threads(1)
# A shell starts jobs in the background without SIGINT, nohup starts all without SIGHUP, and what is started here would
# inherit that: tests of signals need those of a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# The first example of a property may import or compile, and a busy machine is no failure.
settings.register_profile("hf_nmsparse", deadline=None, derandomize=True, database=None)
settings.load_profile("hf_nmsparse")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """What a test sets up for all logs ends with it, as does the standard error that it writes to."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:  # pytest has kinds of its own
            root.removeHandler(handler)
    root.setLevel(level)
