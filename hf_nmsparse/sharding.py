"""Weights that FSDP2 has sharded over processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["is_sharded", "local"]


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that lies on this process: all of it, unless FSDP2 has sharded it.

    FSDP2 shards weights by rows, so that no group of M crosses a boundary.
    """
    part: Any = tensor
    return part.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "to_local")
