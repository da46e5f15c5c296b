"""Verbs on a model: sparsify, finalize, report."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import IO, Any

import torch
from torch import Tensor, nn

from hf_nmsparse.calibration import Calibration, prune_layers
from hf_nmsparse.config import DEFAULT_IGNORE, NMSparseConfig
from hf_nmsparse.layers import NMConv1d, NMConv2d, NMLayer, NMLinear, channel_dim, sparse_layers
from hf_nmsparse.masks import apply_mask, count_violations, magnitude_mask
from hf_nmsparse.packed_layers import KernelLinear, PackedLinear
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.permutation import permute_channels
from hf_nmsparse.sharding import is_sharded, local
from hf_nmsparse.srste import soft_scale
from hf_nmsparse.wrappers import is_of_peft, unwrapped

__all__ = ["LayerReport", "Report", "finalize", "report", "select_layers", "sparse_form", "sparsify"]

_NO_TARGET = "no target rule matches"

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

_PACKED = (KernelLinear, PackedLinear)

# Where PEFT keeps the model, or the layer, that it adapts; whatever else lies in its modules it trains itself.
_ADAPTED = ("base_model", "model", "base_layer")


def sparsify(
    model: nn.Module,
    config: NMSparseConfig,
    trained: bool = False,
    calibration: Calibration | None = None,
    permute: bool = False,
) -> dict[str, str]:
    """Turns the layers that ``config`` selects into N:M layers, in place.

    Adapters of PEFT stay dense, and the layers that they adapt become sparse. Weights stay dense masters; the forward
    uses their masked copy. Keys of the state dict, ties and optimizers built earlier stay as they are. A Hugging Face
    model remembers ``config`` in its own configuration, so that a checkpoint of the training loads as a sparse model
    again; that is a copy of what it was built with, which other models may share.

    Without ``calibration`` the masks are those of the magnitudes. With it the model is pruned at once by what the
    layers see of a text: pruned masters become zero, so that magnitudes rank the same masks. A training goes on from
    there: a pruned weight comes back where its gradient brings it above one that was kept.

    Args:
        model: Any module with ``nn.Linear`` layers, or what torch.compile or DDP made of it.
        config: Pattern and rules.
        trained: Whether the weights are masters of a training under ``config``. Otherwise a soft threshold scales
            them first, so that the thresholded weights come closest to the dense ones.
        calibration: The batch, and the method that prunes with it.
        permute: Whether input channels are put in an order first under which more magnitude is kept. The dense model
            stays what it was but for rounding; see `permutation` for which layers this can be done.

    Returns:
        The layers of the kinds that ``config`` takes which stay dense, by name, with the reason.

    Raises:
        ValueError: A rule matches no such layer, or no layer would become sparse, or the model is sparse already, or
            one of the two is something else, or the weights are ``trained`` and would be pruned or permuted; or what
            `permute_channels` and `prune_layers` refuse, the latter with layers pruned already.
    """
    model = _itself(model, "sparsify")
    if not isinstance(config, NMSparseConfig):
        raise ValueError(f"sparsify: takes a configuration such as NMSparseConfig('2:4'), got {config!r}")
    if sparse_layers(model):
        raise ValueError("sparsify: the model is sparse already; load the dense checkpoint to change pattern or rules")
    if trained and (permute or calibration is not None):
        raise ValueError("sparsify: trained masters know their masks; leave out calibration and permute")
    if not isinstance(calibration, Calibration | None):
        raise ValueError(f"sparsify: takes a Calibration, got {type(calibration).__name__}; see Calibration.of_pairs")
    if config.transposable and (permute or calibration is not None):
        raise ValueError(
            "sparsify: calibration and permute choose masks along rows alone; leave them out, or transposable"
        )
    chosen, dense = select_layers(model, config)
    if calibration is not None and (others := [name for name, layer in chosen.items() if not _is_linear(layer)]):
        raise ValueError(f"sparsify: calibration prunes nn.Linear alone; {others[0]} is none, leave it to ignore")
    if permute:
        permute_channels(model, chosen, config.pattern)
    if calibration is not None:
        prune_layers(model, chosen, config.pattern, calibration)
    for layer in chosen.values():
        form = sparse_form(layer)
        assert form is not None
        sparse = form.from_stock(layer, config.pattern, config.soft, config.transposable)
        if config.soft and not trained:
            with torch.no_grad():
                sparse.weight.mul_(soft_scale(sparse.rows(), sparse.current_mask(), config.pattern))
    for name, reason in dense.items():
        model.get_submodule(name).dense_reason = reason  # type: ignore[assignment]  # for report
    if hasattr(getattr(model, "config", None), "save_pretrained"):  # others keep a dict or a dataclass under this name
        _copy_config(model)
        hf_config: Any = model.config
        hf_config.quantization_config = {"quant_method": "nmsparse", "format": "dense", **config.to_dict()}
    return dense


def _copy_config(model: Any) -> None:
    """Gives the model a configuration of its own; parts that shared one, or a part of one, still do."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in copies and hasattr(value, "save_pretrained"):
                setattr(module, name, copies[id(value)])


def sparse_form(layer: nn.Module) -> type[NMLayer] | None:
    """The class that a layer of this very class has in training; None if there is none."""
    if _is_conv1d(layer):
        from hf_nmsparse.conv1d import NMConv1D  # which needs transformers, and there it is

        return NMConv1D
    forms: dict[type, type[NMLayer]] = {form.stock: form for form in (NMLinear, NMConv1d, NMConv2d)}
    return forms.get(type(layer))


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``, a linear layer whose weight lies transposed."""
    return (type(layer).__module__, type(layer).__name__) == ("transformers.pytorch_utils", "Conv1D")


def _is_linear(layer: nn.Module) -> bool:
    """Whether it is an ``nn.Linear`` that has a weight to train."""
    return isinstance(layer, nn.Linear) and not isinstance(layer, KernelLinear)


def select_layers(model: nn.Module, config: NMSparseConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Sorts the layers of ``model`` into those that become sparse and those that stay dense, with the reason.

    Raises:
        ValueError: A rule matches no layer of the kinds that ``config`` takes, or every layer stays dense.
    """
    model = unwrapped(model)
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module) or (config.convolutions and (isinstance(module, _CONVOLUTIONS) or _is_conv1d(module)))
    }
    kinds = "linear layer or convolution" if config.convolutions else "linear layer"
    for field, rules in (("targets", config.targets), ("ignore", config.ignore)):
        for rule in rules or ():
            if not any(_matches(name, rule) for name in layers):
                example = f"; this model has, for example, {next(iter(layers))!r}" if layers else ""
                raise ValueError(f"sparsify: {field} rule {rule!r} matches no {kinds} of the model{example}")
    users = _weight_users(model)
    head = _output_head(model)
    chosen: dict[str, Any] = {}
    dense: dict[str, str] = {}
    for name, layer in layers.items():
        others = [user for user in users.get(id(layer.weight), ()) if user != name]
        reason: str | None = None
        if config.targets is not None and not any(_matches(name, rule) for rule in config.targets):
            reason = _NO_TARGET
        elif _is_adapter(model, name):
            reason = "a PEFT adapter"
        elif layer is head:
            reason = "the output head"
        elif (computed := _computed_tensor(layer)) is not None:
            reason = f"its {computed} is computed from other tensors, by a parametrization or by pruning"
        elif others:
            reason = f"tied to {others[0]}"
        elif (ignored := _first_match(name, DEFAULT_IGNORE if config.ignore is None else config.ignore)) is not None:
            reason = f"ignore rule {ignored!r}"
        elif sparse_form(layer) is None:
            reason = f"its class is {type(layer).__name__}, not {'nn.Linear' if _is_linear(layer) else 'nn.Conv2d'}"
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            reason = "nn.TransformerEncoderLayer reads its weight without calling it"
        elif not _is_plain(layer.weight):
            reason = f"its weight is a {type(layer.weight.data).__name__} of {layer.weight.dtype}, not of plain floats"
        elif getattr(layer, "groups", 1) != 1:
            reason = f"its channels are convolved in {layer.groups} groups of their own"
        elif (channels := layer.weight.shape[channel_dim(layer)]) % config.pattern.m:
            what = "in_features" if layer.weight.dim() == 2 else "in_channels"
            reason = f"{what} {channels} is not a multiple of {config.pattern.m}"
        elif config.transposable and layer.weight.shape[0] % config.pattern.m:
            reason = f"out_features {layer.weight.shape[0]} is not a multiple of {config.pattern.m}"
        if reason is None:
            chosen[name] = layer
        else:
            dense[name] = reason
    if not chosen:
        telling = [f"{name}: {reason}" for name, reason in dense.items() if reason != _NO_TARGET]
        reasons = "; ".join(telling[:3]) or f"it has no {'layer to take' if config.convolutions else 'nn.Linear'}"
        convolves = any(isinstance(module, _CONVOLUTIONS) or _is_conv1d(module) for module in model.modules())
        hint = (
            "; NMSparseConfig(convolutions=True) takes its convolutions"
            if convolves and not config.convolutions
            else ""
        )
        raise ValueError(f"sparsify: no layer of the model can be {config.pattern} sparse ({reasons}){hint}")
    return chosen, dense


def finalize(model: nn.Module) -> None:
    """Masks the weights of every N:M layer once more, in place, and verifies that each group keeps at most N.

    A stock layer that was unpacked from a packed model is masked by the magnitudes of its weight: what was merged into
    it, as PEFT merges adapters, has left the pattern.

    Raises:
        ValueError: The model has no layer that knows a pattern and holds its weight dense, or the forward of one is
            not N:M sparse, or its weight is computed from other tensors.
    """
    model = _itself(model, "finalize")
    found = {name: model.get_submodule(name) for name in sparse_layers(model)}
    layers: dict[str, Any] = {name: layer for name, layer in found.items() if not isinstance(layer, _PACKED)}
    if not layers:
        raise ValueError(
            "finalize: the model has no N:M layer in training; call sparsify(model, config) first, or load a packed "
            "model with compute='dense'"
        )
    for name, layer in layers.items():
        if _computed_tensor(layer) == "weight":
            raise ValueError(
                f"finalize: the weight of {name or 'the layer'} is computed from other tensors, so that masking it "
                "does not last; call torch.nn.utils.prune.remove(layer, 'weight') after pruning, or "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') after weight_norm and its like"
            )
    for name, layer in layers.items():
        pattern, rows = layer.pattern, layer.weight.movedim(channel_dim(layer), -1)
        if isinstance(layer, NMLayer):
            layer.finalize()
        else:
            _mask_in_place(local(rows), pattern)
        violations = count_violations(rows, pattern)
        if violations:
            raise ValueError(
                f"finalize: {name or 'the layer'} breaks {pattern} in {violations:,} groups with the mask that it "
                "holds; set the layer's mask to None, which ranks the weights anew"
            )


@torch.no_grad()
def _mask_in_place(weight: Tensor, pattern: NMPattern) -> None:
    weight.copy_(apply_mask(weight, magnitude_mask(weight, pattern)))


@dataclass(frozen=True)
class LayerReport:
    """One line of `report`.

    Attributes:
        name: Dotted path of the layer.
        shape: That of the stock weight: ``(out_features, in_features)`` of a linear layer.
        pattern: None for a dense layer.
        kept: Fraction of the weights that the forward uses.
        violations: Groups whose stored weight has more than N non-zeros. Dense masters violate until `finalize`.
        note: Why a dense layer is dense.
    """

    name: str
    shape: tuple[int, ...]
    pattern: NMPattern | None
    kept: float
    violations: int
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What is sparse in a model; its text is the table that `report` prints."""

    layers: tuple[LayerReport, ...]

    @property
    def violations(self) -> int:
        """Groups with more than N non-zero weights, over all sparse layers."""
        return sum(layer.violations for layer in self.layers)

    @property
    def sparse(self) -> tuple[LayerReport, ...]:
        """The sparse layers."""
        return tuple(layer for layer in self.layers if layer.pattern is not None)

    def __str__(self) -> str:
        rows = [("layer", "shape", "pattern", "kept", "violations")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            if layer.pattern is None:
                rows.append((layer.name, shape, "dense", "100.0%", layer.note))
            else:
                rows.append((layer.name, shape, str(layer.pattern), f"{layer.kept:.1%}", str(layer.violations)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([*(row[c].ljust(widths[c]) for c in range(4)), row[4]]).rstrip() for row in rows]
        weights = sum(prod(layer.shape) for layer in self.sparse)
        kinds = "linear layers" if all(len(layer.shape) == 2 for layer in self.layers) else "layers"
        lines.append(
            f"{len(self.sparse)} sparse and {len(self.layers) - len(self.sparse)} dense {kinds}, "
            f"{weights:,} sparse weights, {self.violations:,} groups violate their pattern"
        )
        return "\n".join(lines)


def report(model: nn.Module, file: IO[str] | None = None) -> Report:
    """Prints a table of the layers: name, shape, pattern, fraction kept, violations of the stored weight.

    All linear layers are in it, and of others those that are sparse or that `sparsify` has left dense.

    Args:
        model: A sparse or dense model.
        file: Where to print; standard output if None.

    Returns:
        The same as an object.
    """
    rows = []
    model = _itself(model, "report")
    sparse = sparse_layers(model)
    for name, module in model.named_modules():
        pattern = sparse.get(name)
        if pattern is None and not isinstance(module, nn.Linear) and not hasattr(module, "dense_reason"):
            continue
        layer: Any = module
        if isinstance(layer, _PACKED):  # which cannot hold more than N
            shape, violations = (layer.out_features, layer.in_features), 0
        else:
            shape, violations = tuple(layer.weight.shape), 0
            if pattern is not None:
                violations = count_violations(layer.weight.movedim(channel_dim(layer), -1), pattern)
        kept = 1.0 if pattern is None else pattern.density
        note = getattr(layer, "dense_reason", "") if pattern is None else ""
        rows.append(LayerReport(name, shape, pattern, kept, violations, note))
    result = Report(tuple(rows))
    print(result, file=file or sys.stdout)
    return result


def _itself(model: Any, where: str) -> nn.Module:
    """The model without what is wrapped around it."""
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{where}: takes a model, got {type(model).__name__}; give a module of torch")
    return model


def _matches(name: str, rule: str) -> bool:
    """Whether ``rule`` matches the path ``name``, its end, or the same of a module above it."""
    parts = name.split(".")
    paths = (".".join(parts[:stop]) for stop in range(1, len(parts) + 1))
    return any(fnmatchcase(path, rule) or fnmatchcase(path, f"*.{rule}") for path in paths)


def _first_match(name: str, rules: Iterable[str]) -> str | None:
    return next((rule for rule in rules if _matches(name, rule)), None)


def _weight_users(model: nn.Module) -> dict[int, list[str]]:
    """For each parameter, by identity, the modules that hold it under different names."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    return users


def _output_head(model: nn.Module) -> nn.Module | None:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    return getattr(head, "base_layer", head)  # which PEFT may adapt


def _is_adapter(model: nn.Module, name: str) -> bool:
    """Whether the module ``name`` belongs to an adapter of PEFT and not to the model that is adapted."""
    parts = name.split(".")
    for stop in range(len(parts), -1, -1):
        if is_of_peft(model.get_submodule(".".join(parts[:stop]))):
            return stop == len(parts) or parts[stop] not in _ADAPTED
    return False


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary tensor of floats, or a shard of one, and not the tensor of a quantizer."""
    return weight.is_floating_point() and (type(weight.data) is Tensor or is_sharded(weight))


def _computed_tensor(layer: nn.Module) -> str | None:
    """Which of its tensors is computed and no parameter of its own, None if there is none."""
    own = dict(layer.named_parameters(recurse=False))
    return next((name for name in ("weight", "bias") if name not in own and getattr(layer, name) is not None), None)
