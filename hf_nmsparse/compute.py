"""How a model that was loaded packed computes: which layers stay packed, on what kernels, and its head."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_nmsparse.kernels import cpu, library, semi_structured
from hf_nmsparse.kernels.order import format_of
from hf_nmsparse.layers import sparse_layers
from hf_nmsparse.masks import count_violations
from hf_nmsparse.packed_layers import Int8Head, KernelLinear, PackedLinear, SemiStructuredLinear
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.saving import holds_int8
from hf_nmsparse.sparsity_record import COMPUTES, HEADS, one_of
from hf_nmsparse.wrappers import is_hooked, is_of_peft, unwrapped

__all__ = ["computing_packed", "kernel_layer", "loaded_with", "set_compute", "set_head"]


def set_compute(model: PreTrainedModel, compute: str, head: str | None = None) -> None:
    """Switches a model that was loaded packed to another way to compute, in place.

    A weight that was rounded, to bf16 or int8, stays so: load the model again for the file's own. What is frozen stays
    so, too.

    Args:
        model: The model.
        compute: As in `NMSparseQuantizationConfig`.
        head: As in `NMSparseQuantizationConfig`.

    Raises:
        ValueError: ``compute`` or ``head`` is unknown or not possible here, the model was not loaded packed, it is
            spread over devices, or a weight has left the pattern. The model stays as it was then.
    """
    one_of("compute", compute, COMPUTES, where="set_compute")
    one_of("head", head, (None, *HEADS), where="set_compute")
    model = unwrapped(model)
    config = loaded_with(model, "set_compute")
    layers = {name: model.get_submodule(name) for name in sparse_layers(model)}
    for name, layer in layers.items():
        if is_hooked(layer):
            raise ValueError(f"set_compute: {name} is offloaded; load the model again with compute={compute!r}")
    stay_packed = computing_packed(layers, compute, config.pattern, model.device)
    replaced: dict[str, nn.Module] = {}  # all are made before the first takes its place: one may be impossible
    for name, layer in layers.items():
        if name not in stay_packed and not isinstance(layer, KernelLinear | PackedLinear):
            continue
        packed = _packed_layer(layer, config.pattern, name, _trains(model, name))
        if name not in stay_packed:
            dense = packed.to_linear()
            dense.weight.requires_grad_(_trains(model, name))
            replaced[name] = dense
        else:
            replaced[name] = packed if compute == "reference" else kernel_layer(packed, compute)
    if head is not None:
        set_head(model, head)
    for name, layer in replaced.items():
        model.set_submodule(name, layer)
    config.compute, config.head = compute, head
    set_head(model, head)


def computing_packed(
    layers: Mapping[str, nn.Module], compute: str, pattern: NMPattern, device_map: Any, int8: bool = False
) -> Collection[str]:
    """The names of the layers that compute packed; with ``"auto"`` those that are faster so where they will lie.

    Args:
        layers: Sparse layers, of any form and without data if need be; those that are not linear compute dense.
        compute: As `NMSparseQuantizationConfig` takes it.
        pattern: The pattern.
        device_map: As ``from_pretrained`` takes it.
        int8: Whether the layers will hold values of int8, whatever they hold now.
    """
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear | PackedLinear)}
    if compute != "auto":
        return () if compute == "dense" else layers.keys()
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map or "cpu"}
    if places & {"auto", "balanced", "balanced_low_0", "sequential"}:
        devices = {torch.device("meta" if torch.accelerator.is_available() else "cpu")}
    else:
        devices = {torch.device("meta" if place == "disk" else place) for place in places}
    if {device.type for device in devices} == {"cpu"}:
        return layers.keys() if _kernels_run(layers.values(), pattern, int8) else ()
    if len(devices) > 1:
        return ()
    [device] = devices
    return [name for name, layer in layers.items() if _faster_on_gpu(layer, pattern, device)]


def _kernels_run(layers: Collection[Any], pattern: NMPattern, int8: bool) -> bool:
    """Whether the native kernels compute all of some layers faster than dense ones do."""
    held = [(layer.in_features, "int8" if int8 else _numbers(layer)) for layer in layers]
    if not held or any(format_of(pattern, *each) is None for each in held):
        return False
    status = library.status()
    if status.library is None and not status.chosen:
        warnings.warn(f"hf_nmsparse: packed layers compute dense and slower, because {status.reason}", stacklevel=2)
    return status.unit not in (None, "scalar")


def _numbers(layer: Any) -> str:
    """The numbers in which the kernels keep the values of a layer as they are; "fp32" where none compute in its own."""
    if isinstance(layer, KernelLinear):
        return layer.format
    dtype = layer.weight.dtype
    return {torch.int8: "int8", torch.bfloat16: "bf16"}.get(dtype, "fp32")


def _faster_on_gpu(layer: Any, pattern: NMPattern, device: torch.device) -> bool:
    shape, dtype = (layer.out_features, layer.in_features), getattr(layer, "dtype", layer.weight.dtype)
    if semi_structured.why_not(pattern, *shape, dtype, device) is not None:
        return False
    return semi_structured.is_faster(*shape, dtype, device)


def kernel_layer(layer: PackedLinear, compute: str) -> KernelLinear:
    """The layer on the kernels that ``compute`` asks for, or on those of its device; it takes the weight over."""
    if compute == "semi_structured" or (compute == "auto" and layer.weight.device.type == "cuda"):
        return SemiStructuredLinear(layer)
    return KernelLinear(layer, cpu.preferred_format(layer.weight.dtype) if compute == "auto" else compute)


def _packed_layer(layer: nn.Module, pattern: NMPattern, name: str, trains: bool) -> PackedLinear:
    """``layer`` with its weight as the file holds it, to be trained or not."""
    if isinstance(layer, PackedLinear):
        return layer
    if isinstance(layer, KernelLinear):
        packed = layer.to_packed()
        packed.weight.requires_grad_(trains and packed.weight.is_floating_point())
        return packed
    assert isinstance(layer, nn.Linear)
    violations = count_violations(layer.weight, pattern)
    if violations:
        raise ValueError(
            f"set_compute: {name}.weight breaks {pattern} in {violations:,} groups; call finalize(model), which masks "
            "it once more"
        )
    return PackedLinear.from_linear(layer, pattern, f"{name}.weight")


def _trains(model: nn.Module, name: str) -> bool:
    """Whether the weight of a layer that has one, or would have one if it lay dense, is to be trained.

    A weight in the order of a kernel has no gradient and is frozen and released with what stands beside it: the bias,
    or else the nearest parameters above the layer that are the model's own.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, KernelLinear) and layer.weight.is_floating_point():  # type: ignore[operator]
        return layer.weight.requires_grad  # type: ignore[return-value]
    beside = [] if layer.bias is None else [layer.bias]
    while not beside and name:
        name = name.rpartition(".")[0]
        beside = list(_own_parameters(model.get_submodule(name)))
    return any(parameter.requires_grad for parameter in beside) or not beside


def _own_parameters(module: nn.Module) -> Iterator[Any]:
    """The parameters below ``module``, but for what PEFT has added and what it has wrapped."""
    if not is_of_peft(module):
        yield from module.parameters(recurse=False)
        for child in module.children():
            yield from _own_parameters(child)


def set_head(model: PreTrainedModel, form: str | None) -> None:
    """Gives the output projection the form that is asked for; None takes that of the layers."""
    head = _output_projection(model)
    kind = form or ("int8" if holds_int8(model, KernelLinear) else "dense")
    if kind == "dense":
        if isinstance(head, Int8Head):
            head.to_linear()
    elif type(head) is nn.Linear and not is_hooked(head):
        if form is not None or head.weight.device.type == "cpu":
            Int8Head.from_linear(head)
    elif form is not None and not isinstance(head, Int8Head):
        raise ValueError(f"head: 'int8' needs an output projection that is an nn.Linear, got {type(head).__name__}")


def _output_projection(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes the logits."""
    head: nn.Module | None = model.get_output_embeddings()
    if not isinstance(head, nn.Embedding):
        return head
    # FSMT names its embedding, which may have a weight of its own.
    linear = [each for each in model.modules() if type(each) in (nn.Linear, Int8Head)]
    fitting = [each for each in linear if each.weight.shape == head.weight.shape]
    return fitting[0] if len(fitting) == 1 else head


def loaded_with(model: PreTrainedModel, where: str) -> NMSparseQuantizationConfig:
    """The configuration that a model was loaded packed with; ``where`` begins the message.

    Raises:
        ValueError: The model was not loaded from a packed checkpoint.
    """
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if not isinstance(config, NMSparseQuantizationConfig):
        raise ValueError(f"{where}: the model was not loaded from a packed checkpoint")
    return config
