"""Private names of other packages that this one relies on: each is listed, is there, and is still called.

An upgrade may rename such a name without a word. Where ours overrides it, nobody calls ours any more and nothing fails:
what breaks then stands beside each name, and a name that is not listed yet fails here until it is.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from datasets import Dataset
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from transformers import MarianMTModel, Pipeline
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps
from transformers.modeling_outputs import BaseModelOutput
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from hf_nmsparse import NMSparseConfig, finalize, save_packed, sparsify
from tests.tiny import marian

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "hf_nmsparse").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
OURS = ("hf_nmsparse", "recipes")


class Override(NamedTuple):
    """A method of another package's class that ours replaces, or an attribute that it reads there.

    Attributes:
        base: The class that defines it, as ``module:name``.
        name: The method.
        takes: Its parameters but ``self``, with ``...`` for more; None for a property or an attribute.
        caller: The module whose source calls it; None where users do.
        breaks: What is wrong where nobody calls ours.
    """

    base: str
    name: str
    takes: str | None
    caller: str | None
    breaks: str


_MODULE = "torch.nn.modules.module:Module"
_TRAINER = "transformers.trainer:Trainer"
_QUANTIZER = "transformers.quantizers.base:HfQuantizer"
_PIPELINE = "transformers.pipelines.base:Pipeline"
_METRIC = "evaluate.module:EvaluationModule"
_BASE, _LOADING, _MODEL = "quantizers.base", "core_model_loading", "modeling_utils"

_STATE = "state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs"
_LOOP = "dataloader description prediction_loss_only ignore_keys metric_key_prefix"
_CARD = "language license tags model_name finetuned_from tasks dataset_tags dataset dataset_args"


def _own(base: str, caller: str | None, *rows: tuple[str, str | None, str]) -> list[Override]:
    return [Override(base, name, takes, caller, breaks) for name, takes, breaks in rows]


OVERRIDES = [
    *_own(
        _MODULE,
        "torch.nn.modules.module",
        ("_apply", "fn recurse", "masks stay on the old device, scales of int8 are cast, `dtype` is the old one"),
        ("_load_from_state_dict", _STATE, "a mask outlives the weight it was ranked on, kernel layers load nothing"),
        ("_save_to_state_dict", "destination prefix keep_vars", "the state dict of a kernel layer has no weight"),
    ),
    *_own(
        _TRAINER,
        "transformers.trainer",
        ("_prepare_for_training", "max_steps train_dataloader resume_from_checkpoint", "FSDP2 refuses tied embeddings"),
        ("_load_from_checkpoint", "resume_from_checkpoint model", "a run resumes from half a checkpoint, half random"),
        ("_save_checkpoint", "model trial", "a checkpoint may not be on the disk, and a full disk leaves half of one"),
        ("_load_best_model", "", "the best weights go with the last masks"),
        ("_determine_best_metric", "metrics trial", "a model that is not N:M yet becomes the best one"),
        ("_save", "output_dir state_dict", "FSDP2 writes tied weights twice"),
        ("_push_from_checkpoint", "checkpoint_folder", "the dense masters are pushed as the model"),
        ("_save_rng_state", "output_dir", "a checkpoint counts as whole before each process has written its part"),
        ("_save_optimizer_and_scheduler", "output_dir", "masks and step of SparseStep are not saved"),
        ("_load_optimizer_and_scheduler", "checkpoint", "masks and step of SparseStep start afresh in a resumed run"),
        ("call_model_init", "trial", "a model of model_init that was loaded packed does not train"),
        ("create_accelerator_and_postprocess", "", "FSDP2 gathers weights in bf16, whose masks are not the master's"),
        ("create_model_card", _CARD, "a card with scores is written over"),
        ("create_optimizer", "model", "no rule of the method is ever applied: the training is a plain one"),
        ("compute_loss", "model inputs return_outputs num_items_in_batch", "no teacher, no decoder inputs"),
        ("get_train_dataloader", "", "tokens_per_batch is without effect"),
        ("evaluation_loop", _LOOP, "evaluations translate in transformers' loop"),
        ("log", "logs start_time", "logs lack flips, SAD and the seconds trained"),
        ("push_to_hub", "commit_message blocking token revision ...", "the dense masters are pushed as the model"),
        ("save_model", "output_dir _internal_call", "the dense masters are pushed as the model"),
        ("training_step", "model inputs num_items_in_batch", "a run whose loss is not finite goes on"),
    ),
    *_own(
        _TRAINER,
        None,
        ("train", "resume_from_checkpoint trial ignore_keys_for_eval", "SIGTERM ends a run without a checkpoint"),
    ),
    *_own(
        _QUANTIZER,
        f"transformers.{_BASE}",
        ("_process_model_before_weight_loading", "model kwargs", "packed files load into dense layers unchecked"),
        ("_process_model_after_weight_loading", "model kwargs", "no kernels, no int8 head, no masks of a training"),
        ("_dequantize", "model dtype", "model.dequantize() is refused"),
        ("get_weight_conversions", "", "layers that compute dense get their packed values as the weight"),
        ("remove_quantization_config", "model", "a dense model keeps calling itself quantized"),
    ),
    *_own(
        _QUANTIZER,
        f"transformers.{_LOADING}",
        ("get_new_dtype", "converter param dtype", "scales of int8 are rounded to the model's number type"),
    ),
    *_own(
        _QUANTIZER,
        "transformers.conversion_mapping",
        ("update_weight_conversions", "weight_conversions model", "a file that lacks tensors loads, these random"),
    ),
    *_own(
        _QUANTIZER,
        f"transformers.{_MODEL}",
        ("get_state_dict_and_metadata", "model", "save_pretrained writes what lies in memory, not the format"),
        ("is_serializable", "", "save_pretrained is refused"),
        ("update_dtype", "dtype", "a packed model asked for in float64 is a KeyError of the kernels"),
    ),
    *_own(_QUANTIZER, "transformers.trainer_utils", ("is_trainable", None, "Trainer refuses adapters over the model")),
    *_own(
        _QUANTIZER, "transformers.generation.utils", ("is_compileable", None, "generate compiles what breaks the graph")
    ),
    *_own(
        _PIPELINE,
        "transformers.pipelines.base",
        ("_sanitize_parameters", "pipeline_parameters", "arguments of translate are lost between call and batch"),
        ("_forward", "input_tensors forward_parameters", "the pipeline translates nothing"),
        ("_pipeline_calls_generate", None, "the pipeline loads no generation settings and no assistant"),
    ),
    *_own(_PIPELINE, "transformers.pipelines", ("_load_tokenizer", None, "the pipeline has no tokenizer")),
    *_own(
        _METRIC,
        "evaluate.module",
        ("_info", "", "TranslationScore has no features"),
        ("_compute", "predictions references kwargs", "TranslationScore computes nothing"),
    ),
]

# What Python itself, torch and transformers put into a class as it is made or used, and the texts in our code that look
# like names.
_PYTHONS = {
    *("_abc_impl", "_backward_cls"),
    *("_can_set_attn_implementation_cached_value", "_can_set_experts_implementation_cached_value"),
}
_NO_NAMES = {"_indices", "_scale", "_shape", "_to_", "_attention_heads", "_ffn_dim", "_layers"}

USED: dict[str, tuple[Callable[[Any], None], str]] = {}
"""A check of each name that is read or called, and what breaks without it."""


def counts_on(name: str, breaks: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Lists a name that is read or called."""

    def listed(check: Callable[[Any], None]) -> Callable[[Any], None]:
        USED[name] = check, breaks
        return check

    return listed


def parameters(function: Any) -> list[str]:
    return [name for name in signature(function).parameters if name != "self"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny packed model, as `from_pretrained` loads it."""
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    finalize(model)
    folder = tmp_path_factory.mktemp("packed")
    save_packed(model, folder)
    return MarianMTModel.from_pretrained(folder)


@counts_on("_buffers", "a pickled kernel layer holds the order of this machine's vector unit")
def _(packed: Any) -> None:
    assert "running_mean" in vars(nn.BatchNorm1d(2))["_buffers"]


@counts_on("_conv_forward", "a convolution in training does not run, or pads in another way")
def _(packed: Any) -> None:
    layer: Any = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    x, weight = torch.randn(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    made = layer._conv_forward(x, weight, layer.bias)
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    assert torch.equal(made, nn.functional.conv2d(padded, weight, layer.bias))


@counts_on("_orig_mod", "models and files behind torch.compile are not recognised: wrong keys, dense layers")
def _(packed: Any) -> None:
    compiled: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    assert [name for name, _ in compiled.named_children()] == ["_orig_mod"]


@counts_on("_orig", "who saves a model under pruning is asked for tensors, and not to remove the pruning")
@counts_on("_mask", "the same")
def _(packed: Any) -> None:
    pruned = prune.identity(nn.Linear(2, 2), "weight")
    assert {"weight_orig", "weight_mask"} <= pruned.state_dict().keys()


@counts_on("_checkpoint_wrapped_module", "keys of layers under activation checkpointing are written as they are there")
def _(packed: Any) -> None:
    assert [name for name, _ in checkpoint_wrapper(nn.Linear(2, 2)).named_children()] == ["_checkpoint_wrapped_module"]


@counts_on("_hf_hook", "layers that are offloaded or lie on other devices are replaced, and lose their weight or place")
def _(packed: Any) -> None:
    layer = nn.Linear(2, 2)
    assert not hasattr(layer, "_hf_hook")
    assert isinstance(add_hook_to_module(layer, ModelHook())._hf_hook, ModelHook)


@counts_on("_version", "the int8 head computes with the weight before the last change in place")
def _(packed: Any) -> None:
    weight = torch.zeros(2)
    before = weight._version
    weight.add_(1)
    assert weight._version == before + 1


@counts_on("_forward_hooks", "the engine runs models whose layers somebody watches or changes")
@counts_on("_forward_pre_hooks", "the same")
def _(packed: Any) -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(print)
    layer.register_forward_pre_hook(print)
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1


@counts_on("_has_any_global_hook", "the engine runs where every module of torch is watched")
def _(packed: Any) -> None:
    assert not nn.modules.module._has_any_global_hook()
    with nn.modules.module.register_module_forward_hook(print):
        assert nn.modules.module._has_any_global_hook()


@counts_on("_fingerprint", "a second run finds tokens of other text in datasets' cache, or none of its own")
def _(packed: Any) -> None:
    one, other = (Dataset.from_dict({"text": [text]}) for text in "ab")
    assert isinstance(one._fingerprint, str)
    assert one._fingerprint != other._fingerprint


@counts_on("_keys_to_ignore_on_load_missing", "whole files are refused for want of tables that transformers makes")
def _(packed: Any) -> None:
    assert "model.encoder.embed_positions.weight" in MarianMTModel._keys_to_ignore_on_load_missing
    assert isinstance(packed._keys_to_ignore_on_load_missing, set)


@counts_on("_keys_to_ignore_on_save", "save_packed asks for tables that transformers never writes")
def _(packed: Any) -> None:
    assert "model.encoder.embed_positions.weight" in MarianMTModel._keys_to_ignore_on_save
    assert isinstance(packed._keys_to_ignore_on_save, set)


@counts_on("_is_quantized", "a model made dense keeps the mark by which transformers picks number types")
def _(packed: Any) -> None:
    assert packed.config._is_quantized is True


@counts_on("_weight_conversions", "save_pretrained runs the conversions of the loading backwards over packed weights")
def _(packed: Any) -> None:
    assert isinstance(packed._weight_conversions, list)
    source = inspect.getsource(import_module("transformers.core_model_loading").revert_weight_conversion)
    assert '"_weight_conversions"' in source


@counts_on("_registered_impl", "save_pretrained of the pipeline copies its code beside the model")
def _(packed: Any) -> None:
    class Other(Pipeline):
        pass

    registry = type(PIPELINE_REGISTRY)({}, {})
    registry.register_pipeline("other", Other, type="text")
    assert "other" in vars(Other)["_registered_impl"]


@counts_on("_prepare_generate_kwargs", "settings that the pipeline was built with are lost")
def _(packed: Any) -> None:
    assert parameters(Pipeline._prepare_generate_kwargs) == ["generate_kwargs", "overrides"]


@counts_on("_get_output_dir", "a checkpoint of a search for hyperparameters is flushed and mended in another folder")
def _(packed: Any) -> None:
    assert parameters(transformers.Trainer._get_output_dir) == ["trial"]


@counts_on("_remove_unused_columns", "batches by tokens hold columns that the model does not take")
def _(packed: Any) -> None:
    assert parameters(transformers.Trainer._remove_unused_columns) == ["dataset", "description"]


@counts_on("_get_collator_with_removed_columns", "batches by tokens hold columns that the model does not take")
def _(packed: Any) -> None:
    function = transformers.Trainer._get_collator_with_removed_columns
    assert parameters(function) == ["data_collator", "description"]


@counts_on("_internal_call", "each save of Trainer's own pushes to the Hub")
def _(packed: Any) -> None:
    assert signature(transformers.Trainer.save_model).parameters["_internal_call"].default is False
    assert "_internal_call=True" in source_of("transformers.trainer")


@counts_on("_from_config", "from_config of an auto class fails beside a reader")
def _(packed: Any) -> None:
    assert isinstance(MarianMTModel._from_config(packed.config), MarianMTModel)
    assert "._from_config(" in source_of("transformers.models.auto.auto_factory")


# What has no underscore and is no documented interface either.


@counts_on("all_tied_weights_keys", "files hold tied weights twice, and those that hold them once lack the other")
def _(packed: Any) -> None:
    assert packed.all_tied_weights_keys["lm_head.weight"] == "model.shared.weight"


@counts_on("merge_quantization_configs", "compute= and head= of from_pretrained are dropped with a warning")
def _(packed: Any) -> None:
    stock = getattr(AutoHfQuantizer.merge_quantization_configs, "stock", AutoHfQuantizer.merge_quantization_configs)
    assert parameters(stock) == ["quantization_config", "quantization_config_from_args"]
    assert "AutoHfQuantizer.merge_quantization_configs(" in source_of("transformers.quantizers.auto")


@counts_on("custom_generate", "generate never asks the engine, or the encoder runs for nothing")
def _(packed: Any) -> None:
    taken: dict[str, Any] = {}

    def capture(model: Any, input_ids: Any, generation_config: Any, **others: Any) -> str:
        taken.update(others, ids=input_ids, settings=generation_config)
        return "ours"

    nothing = BaseModelOutput(last_hidden_state=torch.empty(1, 2, 0))
    given = {"encoder_outputs": nothing, "custom_generate": capture, "num_beams": 3, "max_length": 9}
    assert type(packed).generate(packed, torch.tensor([[5, 1]]), **given) == "ours"
    assert {"logits_processor", "stopping_criteria", "encoder_outputs", "past_key_values"} <= taken.keys()
    assert taken["encoder_outputs"].last_hidden_state.shape == (3, 2, 0)
    assert (taken["ids"].shape, taken["settings"].max_length) == ((3, 1), 9)


@counts_on("output_capturing", "after one question for attentions a model never runs on the engine again")
def _(packed: Any) -> None:
    assert import_module("transformers.utils.output_capturing").install_output_capuring_hook.__module__


@counts_on("get_model_conversion_mapping", "names in files are not those in the model")
def _(packed: Any) -> None:
    assert parameters(get_model_conversion_mapping)[0] == "model"


@counts_on("rename_source_key", "names in files are not those in the model")
def _(packed: Any) -> None:
    function = import_module("transformers.core_model_loading").rename_source_key
    expected = ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]
    assert parameters(function)[:5] == expected


@counts_on("ConversionOps.convert", "weights of layers that compute dense are not unpacked")
def _(packed: Any) -> None:
    assert parameters(ConversionOps.convert) == ["input_dict", "source_patterns", "target_patterns", "kwargs"]
    given = inspect.getsource(import_module("transformers.core_model_loading").WeightConverter)
    assert re.search(r"full_layer_name=", given)


def source_of(module: str) -> str:
    return inspect.getsource(import_module(module))


def resolved(base: str) -> Any:
    module, _, name = base.partition(":")
    return getattr(import_module(module), name)


def is_private(name: str) -> bool:
    return re.fullmatch("_[A-Za-z0-9]\\w*", name) is not None


def private_names(source: str) -> set[str]:
    """The private names in a file that are not its own, which it binds itself and reaches from ``self`` or ``cls``."""
    nodes = list(ast.walk(ast.parse(source)))
    named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    bound = {node.name for node in nodes if isinstance(node, named)}
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    bound |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and is_of_self(node)}
    found = {node.attr for node in attributes if not (node.attr in bound and is_of_self(node))}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} - bound
        elif isinstance(node, ast.arg | ast.keyword):
            found.add(str(node.arg))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            found |= set(".".join([*names, getattr(node, "module", None) or ""]).split("."))
    return {name for name in found if is_private(name)} - _NO_NAMES


def is_of_self(node: ast.Attribute) -> bool:
    """Whether it is an attribute of ``self`` or ``cls``, or of their attributes: ``self._a``, ``self.trainer._a``."""
    value: ast.expr = node
    while isinstance(value, ast.Attribute):
        value = value.value
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def our_classes() -> list[type]:
    """All classes of the package and the recipes that have a base class of others."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    names = [name for name in names if not name.endswith(("__main__", "triton_kernels"))]
    modules = [import_module(name.removesuffix(".__init__")) for name in names]
    return [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__ and others(kind)
    ]


def others(kind: type) -> list[type]:
    """The base classes of other packages."""
    mine = (*OURS, *sys.stdlib_module_names)
    return [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in mine]


def defined(kind: type) -> set[str]:
    """The names that a class of ours defines, other than those that are put there."""
    return {name for name in vars(kind) if not name.startswith("__")} - _PYTHONS


def test_private_names_are_found() -> None:
    source = """
import a._one
from b._two import three
from c import _four
from d import e as _mine

def _own(x, _five=1):
    return x._six.y(_seven=x.z()._eight, own=getattr(x, "_nine"))

class A(B):
    def __init__(self):
        self._ours, self.a = 1, __name__
    def _method(self):
        return self._ours, self._ten, self.a._ours, super()._eleven(), self._method
    def other(self, a):
        a._twelve = a._method
"""
    words = "one two four five six seven eight nine ten eleven twelve method"
    assert private_names(source) == {f"_{word}" for word in words.split()}


def test_every_private_name_is_listed() -> None:
    known = {entry.name for entry in OVERRIDES} | USED.keys()
    for path in FILES:
        unknown = private_names(path.read_text(encoding="utf-8")) - known
        assert not unknown, f"{path.relative_to(ROOT)}: list {', '.join(sorted(unknown))} in {Path(__file__).name}"


def test_every_listed_name_is_used() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    unused = [name for name in USED if not re.search(rf"\b{name.rpartition('.')[2]}\b", sources)]
    assert not unused
    taken = {
        (base, name) for kind in our_classes() for base in others(kind) for name in defined(kind) & vars(base).keys()
    }
    assert not [entry.name for entry in OVERRIDES if (resolved(entry.base), entry.name) not in taken]


@pytest.mark.parametrize("name", USED)
def test_a_name_is_there(name: str, packed: Any) -> None:
    check, breaks = USED[name]
    try:
        check(packed)
    except Exception as error:
        raise AssertionError(f"{name} is not what it was: {breaks}") from error


@pytest.mark.parametrize("entry", OVERRIDES, ids=lambda entry: entry.name)
def test_what_we_override_is_there_and_called(entry: Override) -> None:
    told = f"{entry.base}.{entry.name} is not what it was: {entry.breaks}"
    base = resolved(entry.base)
    assert entry.name in vars(base), told
    method = vars(base)[entry.name]
    assert inspect.isfunction(method) == (entry.takes is not None), told
    if entry.takes is not None:
        takes, more = entry.takes.removesuffix("...").split(), entry.takes.endswith("...")
        assert parameters(method)[: len(takes) if more else None] == takes, told
    if entry.caller is not None:
        end = r"\b" if entry.takes is None else r"\("
        called = rf'(?<!super\(\))\.{entry.name}{end}|getattr\(\w+, "{entry.name}"\)'
        assert re.search(called, source_of(entry.caller)), f"nobody calls {entry.base}.{entry.name}: {entry.breaks}"


@pytest.mark.parametrize("kind", our_classes(), ids=lambda kind: kind.__qualname__)
def test_every_override_is_listed(kind: type) -> None:
    known = {(entry.base, entry.name) for entry in OVERRIDES}
    for base in others(kind):
        place = f"{base.__module__}:{base.__name__}"
        whole = base in (HfQuantizer, transformers.Trainer)  # of these, public hooks as well
        taken = {name for name in defined(kind) & vars(base).keys() if whole or is_private(name)}
        # A class between may define it too: Module's, as Linear inherits it.
        first = {name for name in taken if not any(name in vars(above) for above in base.__mro__[1:])}
        assert not first - {name for where, name in known if where == place}, f"{kind.__name__}: list it"


@pytest.mark.parametrize("kind", our_classes(), ids=lambda kind: kind.__qualname__)
def test_names_of_our_own_are_nobody_elses(kind: type) -> None:
    """An attribute of ours by the name of one of the base class's would change what that one does."""
    attributes = [node for node in ast.walk(ast.parse(inspect.getsource(kind))) if isinstance(node, ast.Attribute)]
    stored = {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and is_of_self(node)}
    own = {name for name in stored | defined(kind) if is_private(name)} - {entry.name for entry in OVERRIDES}
    for base in others(kind):
        with suppress(OSError, TypeError):  # of a class that is not written in Python
            source = inspect.getsource(base)
            assert not {name for name in own if re.search(rf"\b{name}\b", source)}, base
