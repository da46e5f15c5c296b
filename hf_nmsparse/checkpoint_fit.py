"""Whether the files of a checkpoint fit a model: all of it is there, and nothing is of another kind."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from hf_nmsparse.packed_files import CODES, FLOATS, SCALE, ModelLayer, is_packed, natural_order, wrapper_of
from hf_nmsparse.packed_format import PackedFormatError, StoredTensor
from hf_nmsparse.sparse_model import sparse_form

__all__ = [
    "check_complete",
    "check_number_types",
    "model_layer",
    "names_in_model",
    "refuse_missing",
    "refuse_more_layers",
    "ties",
]


def check_complete(files: Mapping[str, str], model: PreTrainedModel, conversions: Sequence[WeightTransform]) -> None:
    """Checks that the files hold every tensor of the model but those that transformers makes itself.

    These are tied tensors of which another is there, and tables of positions. Whatever else is missing would be random.

    Args:
        files: For each key of the checkpoint the name of its file.
        model: The model, in the form whose tensors the files hold.
        conversions: How transformers makes tensors of the model of those in the files.

    Raises:
        PackedFormatError: A tensor is missing, or there are layers that the model has not.
    """
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    found = {rename_source_key(key, renamings, converters, model.base_model_prefix, expected)[0] for key in files}
    tied = ties(model)
    found = {tied.get(key, key) for key in found}
    prefix, computed = f"{model.base_model_prefix}.", list(model._keys_to_ignore_on_load_missing or ())
    if any(key.startswith(prefix) for key in files):  # files of a model with a head have the bias of its logits
        computed = [pattern for pattern in computed if pattern != "final_logits_bias"]
    tables = {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "create_weight")}
    missing = {
        tied.get(key, key)
        for key in expected.keys() - tables
        if tied.get(key, key) not in found and not any(re.search(pattern, prefix + key) for pattern in computed)
    }
    where = min(files.values())
    refuse_missing(missing, files, where, "save the whole model again")
    refuse_more_layers(files, model, where)


def refuse_more_layers(keys: Iterable[str], model: PreTrainedModel, where: str) -> None:
    """Refuses a checkpoint with more layers than config.json gives the model: they would be left out.

    Other tensors that the model does not know, as those of another task's head, are no fault.

    Args:
        keys: The names that the checkpoint has, or those of them that the model does not know.
        model: The model.
        where: Begins the message.

    Raises:
        PackedFormatError: There are such layers.
    """
    prefix = f"{model.base_model_prefix}."
    names = [key.removeprefix(prefix) for key in keys]
    for name, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList):
            stem = f"{name.removeprefix(prefix)}."
            found = [key.removeprefix(stem).partition(".")[0] for key in names if key.startswith(stem)]
            number = 1 + max((int(part) for part in found if part.isdecimal()), default=-1)
            if number > len(layers):
                raise PackedFormatError(
                    f"{where}: {name} has {number} layers here and {len(layers)} by config.json; correct config.json "
                    "or save the model again"
                )


def ties(model: nn.Module) -> dict[str, str]:
    """The name of each tensor that a model of transformers ties to another, and the other's."""
    return model.all_tied_weights_keys if isinstance(model, PreTrainedModel) else {}


def refuse_missing(missing: Collection[str], keys: Collection[str], where: str, remedy: str) -> None:
    """Refuses a checkpoint that lacks tensors of the model.

    Args:
        missing: Their names.
        keys: The names that the checkpoint has, or those of them that the model does not know.
        where: Begins the message.
        remedy: Ends it.

    Raises:
        PackedFormatError: There are such tensors.
    """
    if missing:
        first, number = min(missing, key=natural_order), len(missing)
        tensors = f"{first} is missing" if number == 1 else f"{first} and {number - 1} more tensors are missing"
        reason = wrapper_of(keys)
        raise PackedFormatError(f"{where}: {tensors}{f': {reason}' if reason else ''}; {remedy}")


def names_in_model(
    files: Collection[str], model: PreTrainedModel, renamings: list[WeightRenaming]
) -> dict[str, str | None]:
    """For each module of a checkpoint that has a weight its name in ``model``; None where ``model`` has it not."""
    expected = model.state_dict()
    names: dict[str, str | None] = {}
    for prefix in dict.fromkeys(key.rpartition(".")[0] for key in files if key.endswith((".weight", CODES, SCALE))):
        key, _ = rename_source_key(f"{prefix}.weight", renamings, [], model.base_model_prefix, expected)
        names[prefix] = key.removesuffix(".weight") if key in expected else None
    return names


def check_number_types(
    files: Mapping[str, StoredTensor], model: PreTrainedModel, renamings: list[WeightRenaming]
) -> None:
    """Checks that what the model has in floating point is so in the files, but for packed weights."""
    expected = model.state_dict()
    for key, found in files.items():
        name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, expected)
        if name not in expected or is_packed(key, files):
            continue
        if expected[name].is_floating_point() != (found.dtype in FLOATS):
            raise PackedFormatError(
                f"{found.file}: {key}: the model has {expected[name].dtype} here, got {found.dtype}"
            )


def model_layer(layer: nn.Module) -> ModelLayer:
    """What `check_layer` asks of a layer."""
    linear = type(layer) is nn.Linear
    convolution = not linear and sparse_form(layer) is not None
    weight: Any = layer.weight if convolution or isinstance(layer, nn.Embedding | nn.Linear) else None
    return ModelLayer(type(layer).__name__, None if weight is None else tuple(weight.shape), linear, convolution)
