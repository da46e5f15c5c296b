"""The product with a packed weight in plain torch: slow, and right by construction."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hf_nmsparse.packing import unpack
from hf_nmsparse.pattern import NMPattern

__all__ = ["linear"]


def linear(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, pattern: NMPattern) -> Tensor:
    """``x @ W.T + bias`` for the weight W that ``values`` and ``codes`` stand for.

    Args:
        x: ``[..., in_features]`` in the dtype of ``values``.
        values: The kept values, ``[out_features, in_features / M * N]``.
        codes: The places of the kept values, uint8, as `packing.encode` writes them.
        bias: ``[out_features]`` or None.
        pattern: The pattern of the weight.

    Returns:
        ``[..., out_features]``.

    Raises:
        ValueError: Shapes or codes do not fit the pattern.
    """
    return F.linear(x, unpack(values, codes, pattern), bias)
