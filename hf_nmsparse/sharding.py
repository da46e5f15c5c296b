"""Weights that FSDP2 has sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

__all__ = ["is_sharded", "local", "tied_together"]


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that lies on this process: all of it, unless FSDP2 has sharded it.

    FSDP2 shards weights by rows, so that no group of M crosses a boundary.
    """
    part: Any = tensor
    return part.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "to_local")


@contextmanager
def tied_together(model: Any) -> Iterator[None]:
    """Keeps accelerate from sharding the model's embedding and its head apart from the rest.

    The embeddings of encoder and decoder, tied to both, would be in another group, which torch refuses.
    """
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings
