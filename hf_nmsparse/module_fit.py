"""Whether the modules of a model are those of its configuration, which is all that the engine reads of their numbers.

A configuration that is changed after loading leaves the modules as they are, and a list of layers, a scale or a number
of heads may be changed without a word to the configuration. transformers follows the modules.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["misfit"]

_Facts = dict[str, tuple[type, dict[str, Any]]]
_DUE: WeakKeyDictionary[nn.Module, tuple[dict[str, Any], _Facts]] = WeakKeyDictionary()

# Without effect on what a model in evaluation computes.
_FREE = frozenset(
    {"activation_dropout", "attention_dropout", "dropout", "gradient_checkpointing", "layerdrop", "p", "training"}
)


def misfit(model: PreTrainedModel, replaced: Collection[type]) -> str | None:
    """What of a model is not as a model that is made of its configuration; None where all is.

    Args:
        model: The model.
        replaced: Kinds of modules that may stand where a linear layer is due. What they compute is not looked at.
    """
    config = model.config.to_dict()
    known = _DUE.get(model)
    if known is None or known[0] != config:
        with torch.device("meta"):
            known = _DUE[model] = config, _facts(type(model)(copy.deepcopy(model.config)))
    due, found = known[1], _facts(model)
    for name in [*due, *(name for name in found if name not in due)]:
        if name not in found or name not in due:
            return f"the model has {'no' if name in due else 'a'} {name}, and the configuration says otherwise"
        (kind, values), (other, others) = due[name], found[name]
        if kind is nn.Linear and other in replaced:
            continue
        if kind is not other:
            return f"{name} is a {other.__name__}, and the configuration says {kind.__name__}"
        for key, value in values.items():
            if others.get(key) != value:
                return f"{name}.{key} is {others.get(key)!r}, and the configuration says {value!r}"
    return None


def _facts(model: nn.Module) -> _Facts:
    """Of each module below a model, its kind and the plain values that it computes with."""
    return {
        name: (
            type(module),
            {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, int | float | str) and key not in _FREE and not key.startswith("_")
            },
        )
        for name, module in model.named_modules(remove_duplicate=False)
        if name
    }
