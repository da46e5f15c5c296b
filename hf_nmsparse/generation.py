"""The door from ``model.generate`` to the native engine.

A loaded model's ``generate`` is the one here. transformers resolves what is asked for, as ever, and the engine answers
where it knows all of it; else transformers answers. `why_not` decides, and says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import log
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutput

from hf_nmsparse.engine_spec import Spec, TableSource, WeightSource, read
from hf_nmsparse.kernels import engine, native
from hf_nmsparse.kernels.engine import (
    MOST_BEAMS,
    MOST_ENDS,
    EarlyStopping,
    Engine,
    Packed,
    SearchConfig,
    Table,
    UnableError,
)
from hf_nmsparse.kernels.rounded import rounded
from hf_nmsparse.kernels.watched import state_of, watch
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.module_fit import misfit
from hf_nmsparse.packed_layers import Int8Head, KernelLinear, PackedLinear
from hf_nmsparse.wrappers import is_hooked

__all__ = ["attach", "engine_for", "generate", "while_unchanged", "why_not"]

_DENSE = {torch.float32: "dense_fp32", torch.bfloat16: "dense_bf16"}
_KNOWN_MODULES = ("transformers.models.", "transformers.activations", "torch.nn.modules.")
_PRODUCTS = (nn.Linear, NMLinear, PackedLinear, KernelLinear, Int8Head)

# Arguments of `generate` beside the settings; all others are for transformers.
_ARGUMENTS = {"inputs", "generation_config", "kwargs"}

# What transformers makes of the settings, in so far as the engine does the same.
_PROCESSORS = {
    transformers.RepetitionPenaltyLogitsProcessor,
    transformers.NoRepeatNGramLogitsProcessor,
    transformers.NoBadWordsLogitsProcessor,
    transformers.MinLengthLogitsProcessor,
    transformers.MinNewTokensLengthLogitsProcessor,
    transformers.ForcedBOSTokenLogitsProcessor,
    transformers.ForcedEOSTokenLogitsProcessor,
    transformers.SuppressTokensLogitsProcessor,
    transformers.SuppressTokensAtBeginLogitsProcessor,
}
_CRITERIA = {transformers.MaxLengthCriteria, transformers.EosTokenCriteria}

# Settings that the engine follows.
_FOLLOWED = {
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "early_stopping",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "num_return_sequences",
    "pad_token_id",
    "bad_words_ids",
    "repetition_penalty",
    "suppress_tokens",
}
# Settings without effect on greedy search and beams, or whose effect shows in processors, criteria and the mode.
_SEEN_ELSEWHERE = {
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bos_token_id",
    "diversity_penalty",
    "do_sample",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "max_time",
    "min_p",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "output_scores",
    "remove_invalid_values",
    "renormalize_logits",
    "sequence_bias",
    "stop_strings",
    "target_lookbehind",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
    "use_cache",
    "watermarking_config",
}


_EARLY_STOPPING = {False: EarlyStopping.IF_NO_BETTER, True: EarlyStopping.WHEN_FULL, "never": EarlyStopping.NEVER_EARLY}


@dataclass(frozen=True)
class _Request:
    """What transformers has made of the arguments, just before it would search.

    Attributes:
        inputs: Source ids, ``[sentences, length]``.
        prompts: Target ids to begin with, ``[sentences, length]``.
        mask: Which source ids count, ``[sentences, length]``; None: all.
        settings: All settings, with lengths as they result.
        processors: What would change scores.
        criteria: What would end the search.
        others: All other inputs of the model.
    """

    inputs: Tensor
    prompts: Tensor
    mask: Tensor | None
    settings: GenerationConfig
    processors: Sequence[Any]
    criteria: Sequence[Any]
    others: Mapping[str, Any]


@dataclass(frozen=True)
class _Kept:
    """An engine, and the model as it was then."""

    spec: Spec
    kinds: list[type]
    tensors: list[Tensor]
    states: list[tuple[int, int, int]]
    engine: Engine


_ENGINES: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
_UNCHANGED: WeakKeyDictionary[nn.Module, list[Engine]] = WeakKeyDictionary()  # none or one engine each


def attach(model: PreTrainedModel) -> None:
    """Gives ``model`` the `generate` of this module."""
    model.generate = partial(generate, model)  # type: ignore[assignment]


@contextmanager
def while_unchanged(model: Any) -> Iterator[None]:
    """Lets ``model.generate`` run on the engine within a block of code that does not change the model.

    That nothing changes is the caller's promise, as an evaluation between steps of a training can give it: the engine
    is made once for all calls, and for layers in training too, whose weights are copied. A model of another kind, or
    one that is wrapped, is left as it is.
    """
    if not isinstance(model, PreTrainedModel) or model in _UNCHANGED:
        yield
        return
    attached = "generate" in vars(model)
    if not attached:
        attach(model)
    _UNCHANGED[model] = []
    try:
        yield
    finally:
        del _UNCHANGED[model]
        if not attached:
            del model.generate


def generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """As ``type(model).generate``, with its arguments, results and errors; run by the engine where it can be."""
    stock = _stock(model)
    spec = _spec_or_reason(model)
    if isinstance(spec, Spec):
        request = _request_or_reason(model, spec, args, kwargs)
        if isinstance(request, _Request):
            try:
                return _translate(_engine(model, spec), spec, request)
            except UnableError:
                pass  # padding among the tokens, or too many of them: transformers knows what to do
    return stock(model, *args, **kwargs)


def why_not(model: PreTrainedModel, *args: Any, **kwargs: Any) -> str | None:
    """Why the engine does not run ``model.generate(*args, **kwargs)``; None where it does.

    Without arguments it is asked of the model alone.
    """
    spec = _spec_or_reason(model)
    if isinstance(spec, str) or not (args or kwargs):
        return spec if isinstance(spec, str) else None
    request = _request_or_reason(model, spec, args, kwargs)
    return request if isinstance(request, str) else None


def engine_for(model: PreTrainedModel) -> Engine:
    """The engine of ``model`` as it is now: the last one, or a new one if anything has changed since.

    Weights in the order of the kernels and fp32 embeddings are shared with the model, others are copied.

    Raises:
        ValueError: The engine does not run the model.
    """
    spec = _spec_or_reason(model)
    if isinstance(spec, str):
        raise ValueError(f"engine: {spec}")
    return _engine(model, spec)


def _engine(model: PreTrainedModel, spec: Spec) -> Engine:
    unchanged = _UNCHANGED.get(model)
    if unchanged is None:
        return _engine_now(model, spec)
    if not unchanged:
        unchanged.append(_engine_now(model, spec))
    return unchanged[0]


@torch.no_grad()
def _engine_now(model: PreTrainedModel, spec: Spec) -> Engine:
    kinds = [type(module) for module in model.modules()]
    tensors = list(chain(model.parameters(), model.buffers()))
    for tensor in tensors:
        watch(tensor)
    states = [state_of(tensor) for tensor in tensors]
    kept = _ENGINES.get(model)
    if kept is not None and (
        bytes(kept.spec.config) == bytes(spec.config)
        and kept.kinds == kinds
        and len(kept.tensors) == len(tensors)
        and all(one is other for one, other in zip(kept.tensors, tensors, strict=True))
        and kept.states == states
    ):
        return kept.engine
    named = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    made = Engine(
        spec.config,
        [_packed(model.get_submodule(source.names[0]), source, named) for source in spec.weights],
        [_table(source, named) for source in spec.tables],
    )
    if NMLinear not in kinds:  # their masks and masters change too often, and in too many ways, to keep it
        _ENGINES[model] = _Kept(spec, kinds, tensors, states, made)
    return made


def _stock(model: PreTrainedModel) -> Any:
    """The ``generate`` of transformers."""
    kind: Any = type(model)
    return kind.generate


def _packed(module: Any, source: WeightSource, named: Mapping[str, Tensor]) -> Packed:
    """The weight of a layer in the order of the kernels, and its bias in fp32."""
    if isinstance(module, KernelLinear):
        form, data = module.kernel_format, module.kernel_weight
    elif isinstance(module, Int8Head):
        form, data = "dense_int8", rounded(module.weight)
    else:
        weight = _dense(module).detach()
        form = _DENSE[weight.dtype]
        data = native.repack(form, module.in_features, weight.contiguous())
    bias = None if source.bias is None else named.get(source.bias)
    if bias is None and module.bias is not None:
        raise ValueError(f"engine: {source.names[0]} has a bias, which its family has not")
    return Packed(
        source.side,
        source.layer,
        source.slot,
        form,
        source.out_features,
        source.in_features,
        data.numpy(),
        None if bias is None else _fp32(bias.flatten()),
    )


def _dense(layer: Any) -> Tensor:
    """The weight that the layer computes with."""
    if isinstance(layer, PackedLinear):
        return layer.dense_weight()
    if not isinstance(layer, NMLinear) or layer.pruned_scale == 1:
        weight: Tensor = layer.weight
        return weight
    layer.check_sparse()
    return layer.masked(layer.weight, layer.current_mask())


def _table(source: TableSource, named: Mapping[str, Tensor]) -> Table:
    parts = [next(named[name] for name in names if name in named) for names in source.names]
    if source.build is not None:
        return Table(source.side, source.layer, source.slot, source.build(*map(_fp32, parts)))
    [embedding] = parts
    embedding = embedding.detach().contiguous()
    if embedding.dtype == torch.bfloat16:
        return Table(source.side, source.layer, source.slot, embedding.view(torch.int16).numpy().view(np.uint16))
    return Table(source.side, source.layer, source.slot, embedding.numpy())


def _fp32(tensor: Tensor) -> engine.Array:
    array: engine.Array = tensor.detach().float().contiguous().numpy()
    return array


def _spec_or_reason(model: PreTrainedModel) -> Spec | str:
    """What the engine has to know of the model, or why it does not run it."""
    reason = engine.why_not()
    if reason is not None:
        return reason
    try:
        spec = read(model.config.to_dict(), model.dtype == torch.bfloat16)
    except ValueError as error:
        return str(error).removeprefix("engine: ")
    kind = type(model)
    if kind.__name__ != spec.family.architecture or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__module__}.{kind.__name__} is not {spec.family.architecture} of transformers"
    if _stock(model) is not GenerationMixin.generate:
        return f"{kind.__name__} has a generate of its own"
    return _reason_of_modules(model, spec) or _reason_of_tensors(model) or _reason_of_the_moment() or spec


def _reason_of_modules(model: PreTrainedModel, spec: Spec) -> str | None:
    for name, module in model.named_modules():
        kind, where = type(module), name or "the model"
        if not kind.__module__.startswith(_KNOWN_MODULES) and kind not in _PRODUCTS:
            return f"{where} is a {kind.__module__}.{kind.__name__}"
        if module.training:
            return f"{where} is in training mode; call model.eval()"
        if is_hooked(module) or "forward" in vars(module) or any(_hooks(module)):
            return f"{where} has hooks or another forward"
    reason = misfit(model, _PRODUCTS)
    if reason is not None:
        return reason
    for source in spec.weights:
        layer: Any = model.get_submodule(source.names[0])
        if type(layer) not in _PRODUCTS:
            return f"{source.names[0]} is a {type(layer).__name__}"
        if (layer.out_features, layer.in_features) != (source.out_features, source.in_features):
            return (
                f"{source.names[0]} is {[layer.out_features, layer.in_features]}, and the configuration says "
                f"{[source.out_features, source.in_features]}"
            )
        if isinstance(layer, NMLinear) and layer.pruned_scale not in (0, 1):
            return f"{source.names[0]} computes with pruned weights times {layer.pruned_scale:g}"
        if isinstance(layer, KernelLinear | PackedLinear) and layer.dtype != model.dtype:
            return f"{source.names[0]} computes in {layer.dtype}, the model in {model.dtype}"
    return None


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Hooks around the forward of a module, but for those that transformers leaves there for later."""
    for hook in chain(module._forward_hooks.values(), module._forward_pre_hooks.values()):
        if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
            yield hook


def _reason_of_tensors(model: PreTrainedModel) -> str | None:
    if model.dtype not in _DENSE:
        return f"the model computes in {model.dtype}, and the engine in fp32 and bf16"
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not isinstance(tensor, nn.Parameter) and type(tensor) is not Tensor:
            return f"{name} is a {type(tensor).__name__}"
        if hasattr(tensor, "to_local") or not tensor.is_cpu:
            return f"{name} lies on {tensor.device}"
        if tensor.is_inference():
            return f"{name} was made in inference mode, where no changes are counted"
        if tensor.is_floating_point() and tensor.dtype != model.dtype and not name.endswith(".weight_scale"):
            return f"{name} is {tensor.dtype}, and the model {model.dtype}"
    return None


def _reason_of_the_moment() -> str | None:
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.nn.modules.module._has_any_global_hook():
        return "all modules of torch have hooks"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]  # as in kernels/cpu.py
        return "a graph is recorded"
    return None


def _request_or_reason(
    model: PreTrainedModel, spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> _Request | str:
    """What is asked for, or why the engine does not answer it.

    Raises:
        ValueError: As ``generate`` of transformers does for what it refuses.
    """
    stock = _stock(model)
    bound = inspect.signature(stock).bind(model, *args, **kwargs).arguments
    given = {name for name, value in bound.items() if value is not None} - _ARGUMENTS - {"self"}
    if bound.get("synced_gpus") is False:  # as Trainer says where no process waits for another
        given.remove("synced_gpus")
    options: dict[str, Any] = bound.get("kwargs", {})
    names = ("encoder_outputs", "inputs_embeds", "past_key_values", "tokenizer", "assistant_tokenizer")
    given |= {name for name in names if options.get(name) is not None}
    if given:
        return f"{', '.join(sorted(given))} is given"
    inputs = bound.get("inputs", options.get("input_ids"))
    if type(inputs) is not Tensor or inputs.dim() != 2 or inputs.numel() == 0 or inputs.is_floating_point():
        return "the inputs are no rows of token ids"
    if not inputs.is_cpu:
        return f"the inputs lie on {inputs.device}"
    # transformers runs no encoder where there are outputs of it, and hands all that it has prepared to this function.
    capture: Any = {
        "custom_generate": partial(_capture, inputs),
        "encoder_outputs": BaseModelOutput(last_hidden_state=torch.empty((*inputs.shape, 0))),
    }
    known = {name: bound[name] for name in ("inputs", "generation_config") if name in bound}
    request: _Request = stock(model, **known, **(options | capture))
    return _reason_of_settings(spec, request) or _reason_of_ids(spec, request) or request


def _capture(
    inputs: Tensor,
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> _Request:
    """Takes the place of transformers' search."""
    times = len(input_ids) // len(inputs)  # a row for each beam
    mask = model_kwargs.pop("attention_mask", None)
    # transformers drops labels, which Trainer hands over with everything else of a batch.
    ours = ("encoder_outputs", "past_key_values", "use_cache", "labels")
    others = {key: value for key, value in model_kwargs.items() if key not in ours and value is not None}
    return _Request(
        inputs,
        input_ids[::times],
        None if mask is None else mask[::times],
        generation_config,
        logits_processor,
        stopping_criteria,
        others,
    )


def _reason_of_settings(spec: Spec, request: _Request) -> str | None:
    settings, vocabulary = request.settings, spec.config.target_vocabulary
    mode = settings.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH):
        return f"the engine searches greedily or with beams, and the settings say {mode.value}"
    if settings.return_dict_in_generate:
        return "return_dict_in_generate asks for caches and scores of every step"
    for name, value in settings.to_dict().items():
        if name.startswith("_") or name in _FOLLOWED or name in _SEEN_ELSEWHERE or value is None or value is False:
            continue
        return f"the engine does not know {name}={value!r}"
    for processor in request.processors:
        if type(processor) not in _PROCESSORS:
            return f"the engine has no {type(processor).__name__}"
    for criterion in request.criteria:
        if type(criterion) not in _CRITERIA:
            return f"the engine has no {type(criterion).__name__}"
    if request.others:
        return f"{', '.join(sorted(request.others))} is given"
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(settings, name)
        if value is not None and (type(value) is not int or not 0 <= value < vocabulary):
            return f"{name}={value!r} is not one id of the vocabulary"
    ends = _ids(settings.eos_token_id)
    banned = [settings.suppress_tokens or (), settings.begin_suppress_tokens or (), *(settings.bad_words_ids or ())]
    if not all(type(token) is int and 0 <= token < vocabulary for token in chain(ends, *banned)):
        return f"eos_token_id, bad_words_ids or suppress_tokens are not ids of the vocabulary of {vocabulary:,}"
    if not 1 <= settings.num_beams <= vocabulary // max(2, 1 + len(ends)):
        return (
            f"a vocabulary of {vocabulary:,} is searched with fewer beams than {settings.num_beams}, and at least one"
        )
    if settings.num_beams > MOST_BEAMS or len(ends) > MOST_ENDS:
        return f"the engine takes {MOST_BEAMS} beams and {MOST_ENDS} tokens of eos_token_id at most"
    if settings.early_stopping not in _EARLY_STOPPING:
        return f"the engine does not know early_stopping={settings.early_stopping!r}"
    penalty, power = settings.repetition_penalty, settings.length_penalty
    if penalty is not None and not penalty <= float(np.finfo(np.float32).max):
        return f"repetition_penalty={penalty!r} is beyond fp32"
    # Scores are divided by the length to this power. 87 is the logarithm of what fp32 holds.
    if not isinstance(power, int | float) or not abs(power) * log(settings.max_length) <= 87:
        return f"length_penalty={power!r} is no power that fp32 holds"
    if isinstance(settings.max_length, float):
        return f"max_length={settings.max_length!r} is no whole number"
    positions = spec.config.decoder.positions
    if positions and settings.max_length - 1 > positions:
        return f"max_length={settings.max_length} goes beyond the model's {positions} positions"
    return None


def _reason_of_ids(spec: Spec, request: _Request) -> str | None:
    inputs, prompts, family = request.inputs, request.prompts, spec.family
    for ids, size in ((inputs, spec.config.encoder.vocabulary), (prompts, spec.config.target_vocabulary)):
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            return f"ids are not those of a vocabulary of {size:,}"
    if family.longest_prompt is not None and prompts.shape[1] > family.longest_prompt:
        return f"a prompt of {prompts.shape[1]} tokens is longer than the engine takes for this family"
    positions = spec.config.encoder.positions
    if positions and inputs.shape[1] > positions:
        return f"sentences of {inputs.shape[1]} tokens go beyond the model's {positions} positions"
    counted = family.positions == "counted"
    if counted and spec.padding in prompts:
        return "a prompt holds padding"
    if request.mask is None:
        return (
            "a sentence holds padding, and there is no attention_mask" if counted and spec.padding in inputs else None
        )
    mask = request.mask
    if type(mask) is not Tensor or mask.shape != inputs.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return "attention_mask is not one of 0 and 1 for each token"
    seen = mask == 1
    first, length = seen.int().argmax(dim=1), seen.sum(dim=1)
    places = torch.arange(inputs.shape[1])
    if int(length.min()) == 0 or not torch.equal(
        seen, (places >= first[:, None]) & (places < (first + length)[:, None])
    ):
        return "attention_mask leaves gaps in a sentence, or nothing of it"
    if counted and spec.padding is not None and not torch.equal(seen, inputs.ne(spec.padding)):
        return "attention_mask and padding differ"
    if family.positions in ("sinusoidal", "learned") and int(first.max()):
        return "sentences are padded on the left, which moves their positions"
    return None


def _ids(value: Any) -> list[int]:
    """The tokens of a setting that is one, several or none."""
    if isinstance(value, Tensor):
        value = value.tolist()
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _translate(runner: Engine, spec: Spec, request: _Request) -> Tensor:
    """What transformers would return."""
    settings, inputs, prompts = request.settings, request.inputs, request.prompts
    seen = torch.ones_like(inputs, dtype=torch.bool) if request.mask is None else request.mask == 1
    ends = _ids(settings.eos_token_id)
    search = SearchConfig(
        max_length=settings.max_length,
        threads=torch.get_num_threads(),
        beams=settings.num_beams,
        returned=settings.num_return_sequences,
        min_length=settings.min_length or 0,
        min_new_tokens=settings.min_new_tokens or 0,
        early_stopping=_EARLY_STOPPING[settings.early_stopping],
        no_repeat_ngram=settings.no_repeat_ngram_size or 0,
        forced_bos=-1 if settings.forced_bos_token_id is None else settings.forced_bos_token_id,
        forced_eos=-1 if settings.forced_eos_token_id is None else settings.forced_eos_token_id,
        length_penalty=settings.length_penalty,
        repetition_penalty=settings.repetition_penalty or 1.0,
        unknown_token=spec.padding if spec.family.positions == "counted" else -1,
    )
    found = runner.translate(
        [row[kept].tolist() for row, kept in zip(inputs, seen, strict=True)],
        search,
        prompts.tolist(),
        ends,
        # EOS alone is no bad word to transformers.
        [ids for ids in settings.bad_words_ids or () if ids not in [[end] for end in ends]]
        + [[token] for token in settings.suppress_tokens or ()],
        settings.begin_suppress_tokens or (),
    )
    rows: list[Tensor] = []
    for hypotheses, prompt in zip(found, prompts, strict=True):
        # Where fewer translations than wanted came to an end transformers returns the bare prompt.
        missing = (search.returned - len(hypotheses)) * [prompt]
        rows += [*(torch.from_numpy(hypothesis.tokens).long() for hypothesis in hypotheses), *missing]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_fill(settings, ends))


def _fill(settings: GenerationConfig, ends: Sequence[int]) -> int:
    """What stands behind the end of a translation that is shorter than others."""
    padding = settings.pad_token_id
    if settings.num_beams == 1:
        return padding if padding is not None else (*ends, 0)[0]
    return (padding or ends[0]) if ends else -1
