"""Sparse models into files and to the Hub: packed, or dense for tools that know no sparsity."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_nmsparse import standalone as reader
from hf_nmsparse.checkpoint_fit import refuse_missing, ties
from hf_nmsparse.files import model_folder, named_path
from hf_nmsparse.layers import NMLayer, channel_dim, sparse_layers
from hf_nmsparse.masks import count_violations
from hf_nmsparse.number_types import VALUE_DTYPES
from hf_nmsparse.packed_files import READER, SCALE, check_folder, is_reader
from hf_nmsparse.packed_format import check_weight
from hf_nmsparse.packed_layers import Int8Head, KernelLinear, PackedLinear
from hf_nmsparse.packing import pack, stored, to_matrix, unpack
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig, record_of
from hf_nmsparse.rounding import quantize_rows
from hf_nmsparse.sharding import is_sharded, local
from hf_nmsparse.sparsity_record import one_of
from hf_nmsparse.version import __version__
from hf_nmsparse.wrappers import has_adapters, stock_name, unwrapped

__all__ = [
    "drop_reader",
    "export_dense",
    "holds_int8",
    "packed_state_dict",
    "push_to_hub",
    "retied",
    "save_packed",
    "values_name",
]

_FIVE = "[0-9]" * 5  # digits in the name of a shard

_READERS = {
    "AutoModel": reader.NMSparseModel,
    "AutoModelForSeq2SeqLM": reader.NMSparseModelForSeq2SeqLM,
    "AutoModelForImageClassification": reader.NMSparseModelForImageClassification,
}


def save_packed(
    model: PreTrainedModel,
    path: str | Path,
    values: str | None = None,
    *,
    embeddings: str | None = None,
    standalone: bool = False,
    **kwargs: Any,
) -> None:
    """Writes ``model`` as a packed checkpoint, and leaves the model itself as it is.

    Layers in training are masked once more, in the number type of their master, and only then cast. The same model
    always gives the same bytes. A model that the directory holds is replaced whole, by `files.model_folder`.

    Args:
        model: A model after `sparsify`, or one loaded from a packed checkpoint; what torch has wrapped around it or its
            parts (torch.compile, DistributedDataParallel, AveragedModel) is looked through.
        path: The directory.
        values: ``"fp32"``, ``"fp16"`` or ``"bf16"``; None takes the model's. All floating-point tensors of the file
            are cast to it, embeddings and norms included, and config.json names it, so that the model loads in it.
            ``"int8"`` rounds the kept values, with a scale for each row, and leaves other tensors in the model's type.
        embeddings: ``"int8"`` rounds token embeddings and output projection too, ``"float"`` does not; None takes
            ``"int8"`` with int8 values, and what the model was loaded with where ``values`` is None too.
        standalone: Adds a file of Python, ``modeling_nmsparse.py``, with which transformers alone loads the model
            where the user passes ``trust_remote_code=True``; it computes dense there. A model that is loaded from such
            files does not remember them: give the argument again.
        **kwargs: As ``save_pretrained`` takes them. ``state_dict`` holds the dense masters under their stock names,
            for the case that the model's own are sharded.

    Raises:
        ValueError: The model has no sparse layer or holds adapters, parametrizations or torch's pruning, a weight
            breaks the pattern, a number is not finite or does not fit ``values``, weights are sharded or lie on disk,
            ``state_dict`` lacks some, or ``standalone`` is given for a class that none of its auto classes loads.
    """
    path = named_path(path, "save_packed: path")
    model = _itself(model, "save_packed")
    record = record_of(model)
    if values is None and holds_int8(model):
        values, embeddings = "int8", embeddings or record.embeddings or "float"
    values = values or values_name(model.dtype)
    one_of("values", values, tuple(VALUE_DTYPES), where="save_packed")
    one_of("embeddings", embeddings, (None, "float", *(["int8"] if values == "int8" else [])), where="save_packed")
    patterns = set(sparse_layers(model).values())
    if len(patterns) != 1:
        found = ", ".join(sorted(map(str, patterns))) or "none; call sparsify(model, config) first"
        raise ValueError(f"save_packed: a packed model has one pattern, this model has {found}")
    state_dict = _state_dict(model, kwargs, "save_packed")
    twin = _empty_twin(model, model.dtype if values == "int8" else VALUE_DTYPES[values])
    twin.config.quantization_config = NMSparseQuantizationConfig(
        pattern=patterns.pop(),
        values=values,
        embeddings="int8" if values == "int8" and embeddings != "float" else None,
        targets=record.targets,
        ignore=record.ignore,
        convolutions=any(not _is_linear(layer) for layer in _sparse_modules(model).values()),
        producer=record.producer or f"hf-nmsparse {__version__}",
    )
    if standalone:
        twin.config.auto_map = {**(getattr(twin.config, "auto_map", None) or {}), **_auto_map(twin)}
    tensors = packed_state_dict(model, state_dict, twin.config.quantization_config)
    _check_whole(twin, tensors, "save_packed")
    _write(twin, path, tensors, "save_packed", kwargs, standalone)


def export_dense(model: PreTrainedModel, path: str | Path, **kwargs: Any) -> None:
    """Writes ``model`` as a stock checkpoint that any tool loads: weights masked, zeros in their places.

    Args:
        model: As `save_packed` takes it.
        path: The directory.
        **kwargs: As `save_packed` takes them.

    Raises:
        ValueError: The model has no sparse layer or holds adapters, parametrizations or torch's pruning, a weight has
            left the pattern, a number is not finite, weights are sharded or lie on disk, ``state_dict`` lacks some, or
            CTranslate2 would give other translations without a word.
    """
    path = named_path(path, "export_dense: path")
    model = _itself(model, "export_dense")
    if not sparse_layers(model):
        raise ValueError("export_dense: the model has no sparse layer; model.save_pretrained(path) writes it as it is")
    state_dict = _state_dict(model, kwargs, "export_dense")
    twin = _empty_twin(model, None)
    if hasattr(twin.config, "quantization_config"):
        del twin.config.quantization_config
    tensors = _dense_tensors(model, state_dict)
    _check_whole(twin, tensors, "export_dense")
    for key, tensor in tensors.items():
        _finite(tensor, key)
    _check_pattern(model, tensors)
    _check_start(twin, tensors)
    _write(twin, path, tensors, "export_dense", kwargs)


def push_to_hub(
    model: PreTrainedModel | str | Path,
    repo_id: str,
    values: str | None = None,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload packed N:M sparse model",
    **kwargs: Any,
) -> str:
    """Pushes a packed model to the Hub; the repository is made where there is none.

    Other files of the repository, README.md among them, stay unless the folder brings its own; weights of an earlier
    push that the new one does not replace are deleted.

    Args:
        model: A model that `save_packed` takes, or the directory of a packed model, which goes up as it is: weights,
            tokenizer and card.
        repo_id: ``owner/name``.
        values: As in `save_packed`; the directory of a packed model has its own.
        private: Whether a new repository is private.
        token: The user's token; by default the one that is stored on this machine.
        revision: The branch to push to.
        create_pr: Open a pull request instead.
        commit_message: The message.
        **kwargs: As `save_packed` takes them.

    Returns:
        The address of the commit.

    Raises:
        ValueError: As `save_packed`, or the directory is none that `check_folder` passes.
    """
    if isinstance(model, nn.Module):
        with TemporaryDirectory() as folder:
            save_packed(model, folder, values, **kwargs)
            return push_to_hub(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
    if values is not None or kwargs:
        raise ValueError(
            f"push_to_hub: {model} is written already; give {', '.join(kwargs) or 'values'} to save_packed"
        )
    check_folder(model)
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = hub.upload_folder(
        repo_id=repo_id,
        folder_path=model,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        delete_patterns=["model.safetensors", f"model-{_FIVE}-of-{_FIVE}.safetensors", "model.safetensors.index.json"],
    )
    return str(commit.commit_url)


def _write(
    twin: PreTrainedModel,
    path: str | Path,
    tensors: dict[str, Tensor],
    where: str,
    kwargs: dict[str, Any],
    standalone: bool = False,
) -> None:
    """Saves ``tensors`` as the model ``twin``, with the reader beside it if asked for, whole or not at all."""
    if kwargs.get("push_to_hub"):
        raise ValueError(f"{where}: it writes files; push the folder with push_to_hub(path, repo_id) then")
    try:
        with model_folder(path) as folder:
            twin.save_pretrained(folder, state_dict=tensors, **kwargs)
            if standalone and (folder / "config.json").is_file():  # some processes leave the writing to another
                shutil.copyfile(reader.__file__, folder / f"{READER}.py")
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{where}: {path} could not be written: {reason}; free space or choose another") from error


def _itself(model: Any, where: str) -> PreTrainedModel:
    """The model that is to be saved, without what is wrapped around it."""
    model = unwrapped(model)
    if has_adapters(model):
        raise ValueError(
            f"{where}: the model holds PEFT adapters, which are no part of such files; save what "
            "model.merge_and_unload() returns, after finalize(model)"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{where}: writes models of transformers, got {type(model).__name__}")
    return model


def _built_names(model: PreTrainedModel) -> set[str]:
    """The tensors of a new model of this kind: wav2vec2's positions are a parametrized convolution from the start."""
    with torch.device("meta"):
        return set(type(model)(model.config).state_dict())


def _state_dict(model: PreTrainedModel, kwargs: dict[str, Any], where: str) -> Mapping[str, Tensor]:
    """The tensors that are to be saved: those that the caller gives, or else the model's own."""
    tensors: Mapping[str, Tensor] = kwargs.pop("state_dict", None) or model.state_dict()
    built = _built_names(model) if any(".parametrizations." in f".{key}" for key in tensors) else set[str]()
    for key, tensor in tensors.items():
        name = stock_name(key)
        if is_sharded(tensor):
            raise ValueError(
                f"{where}: {name} is sharded over processes; gather all tensors and pass them: "
                "state_dict=accelerator.get_state_dict(model)"
            )
        if ".parametrizations." in f".{name}" and name not in built:
            raise ValueError(
                f"{where}: {name} is part of a parametrization, under which no model looks for its weight; call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if name.endswith("_orig") and f"{key.removesuffix('_orig')}_mask" in tensors:
            raise ValueError(
                f"{where}: {name} belongs to torch's pruning, under which no model looks for its weight; call "
                "torch.nn.utils.prune.remove first"
            )
    return tensors


def _check_whole(twin: PreTrainedModel, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses to write ``twin`` without some of its tensors, or with others."""
    tied = ties(twin)
    written = {tied.get(key, key) for key in tensors}
    known = twin.state_dict().keys()
    missing = {tied.get(key, key) for key in known - set(twin._keys_to_ignore_on_save or ())} - written
    refuse_missing(missing, tensors, f"{where}: state_dict", "give all tensors of the model")
    for key in tensors:
        if key.removesuffix("_indices").removesuffix("_scale").removesuffix("_shape") not in known:
            raise ValueError(f"{where}: state_dict: the model has no {key}; give the tensors of the model alone")


def _check_pattern(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Refuses dense weights that something has changed behind the mask, as a merge of adapters does."""
    for name, layer in _sparse_modules(model).items():
        key, pattern = f"{name}.weight", layer.pattern
        dim = 1 if _is_linear(layer) else channel_dim(layer)
        violations = count_violations(tensors[key].movedim(dim, -1), pattern)
        if violations:
            raise ValueError(
                f"export_dense: {key} breaks {pattern} in {violations:,} groups; call finalize(model), which masks it "
                "once more, and export then"
            )


def _check_start(twin: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Refuses a Marian model that CTranslate2 converts and runs from another start than the model's own.

    Its converter takes the last token for the padding, drops it, and starts the decoder from an embedding of zero.
    """
    config = twin.config
    last = config.vocab_size - 1 if config.model_type == "marian" else None
    if last is None or not last == config.pad_token_id == config.decoder_start_token_id:
        return
    embedding = twin.get_input_embeddings().weight
    key = next(key for key, tensor in twin.state_dict(keep_vars=True).items() if tensor is embedding)
    if tensors[key][last].any():
        raise ValueError(
            f"export_dense: row {last} of {key}, the padding, from which the decoder starts, is not zero, and "
            "CTranslate2 takes it for zero; train with SparseTrainer, which keeps it so, or set it to zero yourself"
        )


def _auto_map(model: PreTrainedModel) -> dict[str, str]:
    """What config.json says of the reader that goes with the weights, by the auto classes that it serves."""
    kind = type(model.config)
    served = {auto: read for auto, read in _READERS.items() if kind in read.models}
    if type(model) not in (read.models[kind] for read in served.values()):
        raise ValueError(
            f"save_packed: standalone is for what {', '.join(_READERS)} loads, and {type(model).__name__} is not "
            "among it; leave it out"
        )
    return {auto: f"{READER}.{read.__name__}" for auto, read in served.items()}


def drop_reader(config: Any) -> None:
    """Takes the reader out of a configuration that was read beside one: no later save would write the file again."""
    auto_map = getattr(config, "auto_map", None)
    if isinstance(auto_map, dict):
        config.auto_map = {auto: code for auto, code in auto_map.items() if not is_reader(code)}
        if not config.auto_map:
            del config.auto_map


def _empty_twin(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """A copy of ``model`` without data, in ``dtype``, that writes the state dict it is given and a changed config."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=cast, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    for layer in model.modules():
        if isinstance(layer, NMLayer) and layer.mask is not None:
            memo[id(layer.mask)] = None
        elif isinstance(layer, PackedLinear | KernelLinear):  # shards count parameters as those of the stock model
            memo[id(layer)] = nn.Linear(
                layer.in_features, layer.out_features, layer.bias is not None, "meta", dtype or layer.dtype
            )
        elif isinstance(layer, Int8Head):
            memo[id(layer)] = head = nn.Linear(layer.in_features, layer.out_features, False, "meta")
            head.weight = memo[id(layer.weight)]
            head.bias = None if layer.bias is None else memo[id(layer.bias)]
    if isinstance(model, FSDPModule):  # which refuses to be copied
        stock: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
        with torch.device("meta"):
            twin: PreTrainedModel = stock(copy.deepcopy(model.config)).to(dtype or model.dtype)
        twin.generation_config = copy.deepcopy(model.generation_config)
    else:
        twin = copy.deepcopy(model, memo)
        for name, module in list(twin.named_modules()):
            if unwrapped(module) is not module:
                twin.set_submodule(stock_name(name), unwrapped(module))
    for loaded in ("hf_quantizer", "hf_device_map", "num_parameters", "generate"):
        twin.__dict__.pop(loaded, None)
    drop_reader(twin.config)
    return twin


def retied(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state_dict`` with one tensor for those that the model ties: weights gathered from shards are copies."""
    tied = ties(model)
    return {key: state_dict.get(tied.get(key, key), tensor) for key, tensor in state_dict.items()}


def _stock_tensors(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state_dict`` under its stock names, with one tensor a sparse weight: layers that are packed have the rest."""
    layers, tensors = _sparse_modules(model), {}
    for key, tensor in retied(model, {stock_name(key): tensor for key, tensor in state_dict.items()}).items():
        prefix, _, leaf = key.rpartition(".")
        if tensor.is_meta:
            raise ValueError(f"save: {key} is offloaded; load the model without offloading to save it")
        if prefix not in layers or leaf in ("weight", "bias"):
            tensors[key] = tensor
    return tensors


def _sparse_modules(model: nn.Module) -> dict[str, Any]:
    """The sparse layers by their stock names."""
    return {stock_name(name): model.get_submodule(name) for name in sparse_layers(model)}


def _is_linear(layer: nn.Module) -> bool:
    """Whether a sparse layer takes the place of an ``nn.Linear``, in whatever form."""
    return isinstance(layer, nn.Linear | PackedLinear)


def _dense_tensors(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state_dict`` under its stock names, the weights of sparse layers dense and masked."""
    tensors = _stock_tensors(model, state_dict)
    for name, layer in _sparse_modules(model).items():
        key = f"{name}.weight"
        if key in tensors:  # what is missing is told of later
            tensors[key] = _dense_weight(layer, tensors[key], key)
    return tensors


def _dense_weight(layer: nn.Module, tensor: Tensor, key: str) -> Tensor:
    """The weight of a sparse layer, dense and masked; ``tensor`` is what the state dict has of it."""
    if isinstance(layer, PackedLinear | KernelLinear):
        return layer.dense_weight()
    if not isinstance(layer, NMLayer):
        return tensor
    layer.check_sparse()
    _finite(tensor, key)  # which has no rank
    mask = layer.mask
    # The mask is that of the layer's own weight, in whatever number type, and of no other.
    if mask is None or not torch.equal(tensor, local(layer.weight).detach().to(tensor)):
        mask = layer.mask_of(layer.in_rows(tensor))
    return layer.masked(tensor, mask.to(tensor.device))


def packed_state_dict(
    model: PreTrainedModel, state_dict: Mapping[str, Tensor], record: NMSparseQuantizationConfig
) -> dict[str, Tensor]:
    """The tensors of the packed file, in an order that does not depend on where the model came from."""
    assert record.values is not None
    int8 = record.values == "int8"
    dtype = model.dtype if int8 else VALUE_DTYPES[record.values]
    layers = _sparse_modules(model)
    cast: dict[tuple[Any, ...], Tensor] = {}  # tied tensors stay tied, so that one of them is written
    packed: dict[str, Tensor] = {}
    tensors = _stock_tensors(model, state_dict)
    rounded: set[str] = set()
    if record.embeddings == "int8":  # of tied tensors one is written, and only that one gets a scale
        places = {tensors[key].data_ptr() for key in _embedding_keys(model) & tensors.keys()}
        tensors = remove_tied_weights_from_state_dict(tensors, model)
        rounded = {key for key, tensor in tensors.items() if tensor.data_ptr() in places}
    for key, tensor in tensors.items():
        prefix, _, leaf = key.rpartition(".")
        if prefix in layers and leaf == "weight":
            parts = _packed_weight(layers[prefix], tensor, key, None if int8 else dtype)
            packed |= {f"{prefix}.{part}": part_tensor for part, part_tensor in parts.items()}
        elif key in rounded:
            packed[key], packed[prefix + SCALE] = quantize_rows(_finite(tensor, key))
        elif tensor.is_floating_point():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if place not in cast:
                cast[place] = _cast(tensor, dtype, key)
            packed[key] = cast[place]
        else:
            packed[key] = tensor
    return dict(sorted(packed.items(), key=lambda item: dot_natural_key(item[0])))


def _packed_weight(layer: Any, tensor: Tensor, key: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What the file holds of a sparse weight, by the last part of its keys; ``dtype`` is None for int8 values.

    What is packed stays packed: where no kept value is zero its codes are the only ones. Where one is, `pack` says
    which of the zeros are kept, so that the file does not depend on where the model came from.
    """
    pattern: NMPattern = layer.pattern
    if not isinstance(layer, PackedLinear | KernelLinear):
        dense = _cast(_dense_weight(layer, tensor, key), dtype or torch.float32, key)
        parts = pack(to_matrix(dense, channel_dim(layer)), pattern, key)
        parts = _rounded(parts, pattern, key) if dtype is None else parts
        return parts if _is_linear(layer) else parts | {"weight_shape": torch.tensor(dense.shape)}
    parts = layer.packed_tensors()
    values, codes, scale = parts["weight"], parts["weight_indices"], parts.get("weight_scale")
    _finite(values, key)
    held = {part: stored(tensor, "save_packed") for part, tensor in parts.items()}
    check_weight(
        held["weight"],
        held["weight_indices"],
        pattern,
        held["weight"].dtype,
        (layer.out_features, layer.in_features),
        key.removesuffix(".weight"),
        held.get("weight_scale"),
    )
    if scale is not None:
        if dtype is None:
            return parts
        values = (values * scale[:, None]).to(layer.dtype)
    kept = _cast(values, dtype or torch.float32, key)
    parts = {"weight": kept, "weight_indices": codes}
    if dtype is None:
        return _rounded(parts, pattern, key)
    return parts if kept.all() else pack(unpack(kept, codes, pattern), pattern, key)


def _rounded(parts: dict[str, Tensor], pattern: NMPattern, key: str) -> dict[str, Tensor]:
    """A packed weight with int8 values; the places of what rounds to zero are those that `pack` gives."""
    values, scale = quantize_rows(parts["weight"])
    return pack(unpack(values, parts["weight_indices"], pattern), pattern, key) | {"weight_scale": scale}


def _embedding_keys(model: PreTrainedModel) -> set[str]:
    """The keys of the weights of token embeddings and output projection."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    found = [part.get_output_embeddings() for part in parts]
    for part in parts:
        try:
            found.append(part.get_input_embeddings())
        except NotImplementedError:  # a part that takes no tokens
            continue
    modules = {id(module) for module in found if module is not None}
    names = {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in modules}
    return {f"{stock_name(name)}.weight" for name in names}


def _cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    cast = _finite(tensor, key).to(dtype)
    if cast.isinf().any():
        raise ValueError(f"save_packed: {key} has numbers too large for {dtype}; choose bf16 or fp32")
    return cast


def _finite(tensor: Tensor, key: str) -> Tensor:
    if not tensor.isfinite().all():
        raise ValueError(f"save: {key} holds NaN or infinity; take an earlier checkpoint")
    return tensor


def values_name(dtype: torch.dtype) -> str:
    """What the record calls values of this number type.

    Raises:
        ValueError: There is no such name.
    """
    for name, known in VALUE_DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"save_packed: a packed model has values in fp32, fp16, bf16, this model is in {dtype}")


def holds_int8(model: nn.Module, kinds: Any = (KernelLinear, PackedLinear)) -> bool:
    """Whether sparse layers of ``model`` hold values of int8."""
    return any(
        layer.format == "int8" if isinstance(layer, KernelLinear) else layer.weight_scale is not None
        for layer in model.modules()
        if isinstance(layer, kinds)
    )
