"""The number types of weights by their short names."""

from __future__ import annotations

from types import MappingProxyType

import torch

__all__ = ["VALUE_DTYPES"]

VALUE_DTYPES = MappingProxyType(
    {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
)
"""The number types that values have in a file, by the name that the file uses; int8 comes with a scale for each row."""
