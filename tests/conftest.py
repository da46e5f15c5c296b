"""Every test runs offline, on one thread, from the same seed."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: it runs on the CPU then, in Python

torch.set_num_threads(1)
# The first example of a property may import or compile, and a busy machine is no failure.
settings.register_profile("hf_nmsparse", deadline=None, derandomize=True, database=None)
settings.load_profile("hf_nmsparse")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
