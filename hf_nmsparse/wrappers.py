"""What others put around a model or into it: torch.compile, data parallelism, averages of weights, PEFT's adapters."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

__all__ = ["has_adapters", "is_hooked", "is_of_peft", "stock_name", "unwrapped"]

_AROUND = (DistributedDataParallel, DataParallel, AveragedModel)

# The attributes in which torch.compile and torch's activation checkpointing keep the module that they wrap.
_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrapped(model: Any) -> Any:
    """The model itself, whatever torch has wrapped around it."""
    while True:
        if isinstance(model, _AROUND):
            model = model.module
        elif isinstance(model, nn.Module) and (inside := _inside(model)) is not None:
            model = inside
        else:
            return model


def _inside(model: nn.Module) -> nn.Module | None:
    """The module in one of these attributes of ``model`` itself, which may answer for those of what it wraps."""
    return next((child for name, child in model.named_children() if name in _INSIDE), None)


def stock_name(name: str) -> str:
    """The name that a module or a tensor has in the model itself, without what wrappers have added to it."""
    parts = [part for part in name.split(".") if part not in _INSIDE]
    return ".".join(parts[1:] if parts[:1] == ["module"] else parts)


def is_of_peft(module: nn.Module) -> bool:
    """Whether ``module`` is a class of PEFT's: a layer with adapters, or a model around others."""
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate moves the data of ``module``, or its inputs, where a model is spread over devices."""
    return hasattr(module, "_hf_hook")


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into the model, or the model into one of its own."""
    return any(is_of_peft(module) for module in model.modules())
