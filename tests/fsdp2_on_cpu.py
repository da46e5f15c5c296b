"""Runs the recipe where accelerate takes CPU processes for GPUs: it shards with FSDP2 on accelerators alone."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState

from recipes.wmt_en_de import run

_stock = AcceleratorState.__init__


def _told(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    if not AcceleratorState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _stock(self, *args, **kwargs)


def take_for_gpus() -> None:
    """From now on, in this process."""
    AcceleratorState.__init__ = _told


if __name__ == "__main__":
    take_for_gpus()
    run()
