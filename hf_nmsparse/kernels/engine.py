"""The native engine: whole translations of token ids in C++, from the encoder to the search. This needs no torch.

The structures, numbers and slots are those of csrc/engine/api.h.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from operator import index
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_nmsparse.kernels import library

__all__ = [
    "MOST_BEAMS",
    "MOST_ENDS",
    "NUMBERS",
    "Activation",
    "EarlyStopping",
    "Engine",
    "EngineConfig",
    "Hypothesis",
    "Packed",
    "SearchConfig",
    "Side",
    "SideConfig",
    "Table",
    "TableSlot",
    "UnableError",
    "WeightSlot",
    "why_not",
]

Array = NDArray[Any]

NUMBERS = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.int8): 2, np.dtype(np.float16): 3}
"""Number types of tables; numpy has no bf16, so its bits stand in uint16."""

MOST_BEAMS, MOST_ENDS = 255, 64
"""Beams of a sentence and ids that end a translation, as csrc/engine/search.cpp takes them."""

NO_LAYER = -1
_UNABLE = 2  # `unable` of csrc/engine/error.h
_ROOM = 512  # bytes of a message
_LOOK = 0.1  # seconds after which a signal is seen that came just before a wait began, which it does not end then
_FEW = 4  # sentences that end soon by themselves; a thread more takes a third of a millisecond
_WATCHER = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.POINTER(ctypes.c_int32), ctypes.c_int64)


class Side(IntEnum):
    """Which stack of layers."""

    ENCODER = 0
    DECODER = 1


class Activation(IntEnum):
    """Of the feed-forward block."""

    RELU = 0
    GELU = 1
    GELU_TANH = 2
    SILU = 3


class WeightSlot(IntEnum):
    """Products of a layer, and the head, which is of no layer."""

    SELF_Q = 0
    SELF_K = 1
    SELF_V = 2
    SELF_OUT = 3
    CROSS_Q = 4
    CROSS_K = 5
    CROSS_V = 6
    CROSS_OUT = 7
    FEED_IN = 8
    FEED_GATE = 9
    FEED_OUT = 10
    HEAD = 11


class TableSlot(IntEnum):
    """What is looked up or added; the last four are of no layer."""

    SELF_NORM = 0
    CROSS_NORM = 1
    FEED_NORM = 2
    RELATIVE_BIAS = 3
    EMBEDDING = 4
    POSITION = 5
    EMBEDDING_NORM = 6
    FINAL_NORM = 7


class EarlyStopping(IntEnum):
    """When the beams of a sentence stop: False, True and "never" of transformers."""

    IF_NO_BETTER = 0
    WHEN_FULL = 1
    NEVER_EARLY = 2


class _Structure(ctypes.Structure):
    """One whose constructor knows its fields: that of ctypes makes attributes of all other names."""

    def __init__(self, **fields: Any) -> None:
        unknown = fields.keys() - {field[0] for field in self._fields_}
        if unknown:
            raise ValueError(f"engine: {type(self).__name__} has no {', '.join(sorted(unknown))}")
        for name, value in fields.items():
            # ctypes drops the upper bits without a word.
            if isinstance(value, int) and not -(2**31) <= value < 2**31:
                raise ValueError(f"engine: {type(self).__name__}.{name} does not fit 32 bits, got {value}")
        super().__init__(**fields)


class SideConfig(_Structure):
    """The shape of the encoder or the decoder."""

    _fields_ = (
        ("layers", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("feed_forward", ctypes.c_int32),
        ("vocabulary", ctypes.c_int32),
        ("positions", ctypes.c_int32),
        ("relative_reach", ctypes.c_int32),
        ("embedding_scale", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
    )


class EngineConfig(_Structure):
    """What a model computes."""

    _fields_ = (
        ("size", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("rms_norm", ctypes.c_int32),
        ("norm_first", ctypes.c_int32),
        ("embedding_norm", ctypes.c_int32),
        ("final_norm", ctypes.c_int32),
        ("bf16_activations", ctypes.c_int32),
        ("half_cache", ctypes.c_int32),
        ("target_vocabulary", ctypes.c_int32),
        ("norm_epsilon", ctypes.c_float),
        ("head_scale", ctypes.c_float),
        ("encoder", SideConfig),
        ("decoder", SideConfig),
    )

    def __init__(self, **fields: Any) -> None:
        super().__init__(size=ctypes.sizeof(type(self)), **fields)


class SearchConfig(_Structure):
    """How translations are searched for. What is not given is off; lengths and threads must be given."""

    _fields_ = (
        ("size", ctypes.c_int32),
        ("beams", ctypes.c_int32),
        ("returned", ctypes.c_int32),
        ("max_length", ctypes.c_int32),
        ("min_length", ctypes.c_int32),
        ("min_new_tokens", ctypes.c_int32),
        ("early_stopping", ctypes.c_int32),
        ("no_repeat_ngram", ctypes.c_int32),
        ("forced_bos", ctypes.c_int32),
        ("forced_eos", ctypes.c_int32),
        ("sample", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("batch_sentences", ctypes.c_int32),
        ("batch_tokens", ctypes.c_int32),
        ("token_scores", ctypes.c_int32),
        ("attention", ctypes.c_int32),
        ("shortlist", ctypes.c_int32),
        ("unknown_token", ctypes.c_int32),
        ("seed_low", ctypes.c_int32),
        ("seed_high", ctypes.c_int32),
        ("length_penalty", ctypes.c_float),
        ("repetition_penalty", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
    )

    def __init__(self, *, max_length: int, threads: int, **fields: Any) -> None:
        off: dict[str, Any] = {
            "beams": 1,
            "returned": 1,
            "forced_bos": -1,
            "forced_eos": -1,
            "unknown_token": -1,
            "batch_sentences": 64,
            "batch_tokens": 4096,
            "length_penalty": 1.0,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_p": 1.0,
        }
        known = {"max_length": max_length, "threads": threads}
        super().__init__(size=ctypes.sizeof(type(self)), **(off | known | fields))


@dataclass(frozen=True)
class Packed:
    """The weight of a product, ``[out_features, in_features]``.

    Attributes:
        side: Where it belongs; the decoder for the head.
        layer: Its layer, `NO_LAYER` for the head.
        slot: Which product.
        format: A key of `library.FORMATS`.
        out_features: Rows.
        in_features: Columns.
        data: uint8, the bytes that the library's ``nms_repack`` has made; borrowed.
        bias: fp32 ``[out_features]`` or None; borrowed.
    """

    side: Side
    layer: int
    slot: WeightSlot
    format: str
    out_features: int
    in_features: int
    data: Array
    bias: Array | None


@dataclass(frozen=True)
class Table:
    """An embedding, or a smaller table.

    Attributes:
        side: Where it belongs.
        layer: Its layer, `NO_LAYER` for what no layer has.
        slot: Which table.
        data: ``[rows, columns]`` in a type of `NUMBERS`; borrowed.
        scale: fp32 ``[rows]`` for int8, else None; borrowed.
    """

    side: Side
    layer: int
    slot: TableSlot
    data: Array
    scale: Array | None = None


@dataclass(frozen=True)
class Hypothesis:
    """One translation.

    Attributes:
        tokens: Its ids, int32, with the prompt and EOS.
        score: What beams are ranked by.
        token_scores: fp32, the log-probability of each token, 0 for those of the prompt; None unless asked for.
        attention: fp32 ``[tokens, source]``, how much each generated token looked at each of the source's in the last
            layer, the mean of its heads, 0 for the prompt; None unless asked for.
    """

    tokens: Array
    score: float
    token_scores: Array | None
    attention: Array | None = None


class UnableError(ValueError):
    """What is asked is right, and the engine cannot do it, so that nothing is translated.

    A hypothesis took the token that `SearchConfig.unknown_token` names, or outgrew the model's positions.
    """


def why_not() -> str | None:
    """Why there is no engine in this process, or None where there is one."""
    if os.environ.get("HF_NMSPARSE_ENGINE") == "0":
        return "HF_NMSPARSE_ENGINE=0 turns it off"
    status = library.status()
    return None if status.library is not None else f"the native library is not used: {status.reason}"


def _call(name: str, *arguments: Any) -> None:
    """Calls a function that returns a code and writes a message."""
    reason = why_not()
    if reason is not None:
        raise ValueError(f"engine: {reason}; translate with transformers")
    message = ctypes.create_string_buffer(_ROOM)
    code = getattr(library.library(), name)(*arguments, message, _ROOM)
    if code:
        kind = UnableError if code == _UNABLE else ValueError
        raise kind(f"engine: {message.value.decode(errors='replace')}")


def _call_for_long(name: str, sentences: int, held: Any, *arguments: Any) -> None:
    """Calls a function that looks for a sign to stop, and gives it where a signal's handler raises, as on Ctrl-C.

    Python runs handlers in its main thread, and there between its own steps alone: that thread waits beside the call.

    Args:
        name: The function.
        sentences: How many it works on.
        held: What lives as long as the call, even if signals come so fast that the main thread leaves before its end.
        *arguments: Those of the function before the sign.
    """
    if sentences <= _FEW or threading.current_thread() is not threading.main_thread():
        _call(name, *arguments, None)
        return
    stop, begin, ended = ctypes.c_int32(0), SimpleQueue[bool](), threading.Lock()
    outcome: list[BaseException | None] = []

    def work(kept: Any) -> None:
        if not begin.get():
            return
        try:
            _call(name, *arguments, ctypes.byref(stop))
            outcome.append(None)
        except BaseException as error:  # raised where it was called
            outcome.append(error)
        ended.release()

    ended.acquire()
    try:
        threading.Thread(target=work, args=(held,), name="nmsparse-call", daemon=True).start()
    except BaseException as error:
        begin.put(False)  # a signal may have come when the thread was there already
        if not isinstance(error, RuntimeError):
            raise
        _call(name, *arguments, None)  # the system gives no more threads
        return
    signal: BaseException | None = None
    while not outcome:
        try:
            begin.put(True)
            ended.acquire(timeout=_LOOK)
        except BaseException as error:  # and then until the step is over
            signal, stop.value = error, 1
    raised = signal if signal is not None else outcome[0]
    if raised is not None:
        raise raised


class Engine:
    """A model that translates, in C++. Several threads may use one at once.

    Args:
        config: What it computes.
        weights: All weights of its products.
        tables: All tables.

    Raises:
        ValueError: There is no engine in the library, something does not fit or is missing.
    """

    def __init__(self, config: EngineConfig, weights: Iterable[Packed], tables: Iterable[Table]) -> None:
        self._borrowed: list[Array] = []  # what C++ reads lives as long as the engine
        handle = ctypes.c_void_p()
        _call("nms_engine_new", ctypes.byref(config), ctypes.byref(handle))
        self._handle = handle
        # Not at the end of the process, where a daemon thread may still translate.
        weakref.finalize(self, library.library().nms_engine_free, handle).atexit = False
        for weight in weights:
            self._set_weight(weight)
        for table in tables:
            self._set_table(table)
        _call("nms_engine_ready", handle)

    def _set_weight(self, weight: Packed) -> None:
        bias = None if weight.bias is None else self._borrow(weight.bias, np.float32, weight.out_features)
        data = self._borrow(weight.data, np.uint8, weight.data.size)
        _call(
            "nms_engine_weight",
            self._handle,
            weight.side,
            weight.layer,
            weight.slot,
            library.FORMATS[weight.format],
            weight.out_features,
            weight.in_features,
            data,
            weight.data.size,
            bias,
        )

    def _set_table(self, table: Table) -> None:
        number = NUMBERS.get(table.data.dtype)
        if number is None or table.data.ndim != 2:
            raise ValueError(
                f"engine: a table has two dimensions of fp32, bf16, int8 or fp16, got {table.data.shape} of "
                f"{table.data.dtype} for {table.slot.name}"
            )
        if (table.scale is not None) != (table.data.dtype == np.int8):
            raise ValueError(f"engine: tables of int8, and no others, have a scale a row, got {table.slot.name}")
        rows, columns = table.data.shape
        scale = None if table.scale is None else self._borrow(table.scale, np.float32, rows)
        data = self._borrow(table.data, table.data.dtype, table.data.size)
        _call("nms_engine_table", self._handle, table.side, table.layer, table.slot, number, rows, columns, data, scale)

    def _borrow(self, array: Array, dtype: Any, size: int) -> int:
        """Keeps ``array`` alive and returns where it lies."""
        if array.dtype != dtype or array.size != size or not array.flags.c_contiguous:
            raise ValueError(
                f"engine: {size} numbers of {np.dtype(dtype)} without gaps are due, got {array.size} of {array.dtype}"
            )
        self._borrowed.append(array)
        return array.ctypes.data

    def use_shortlist(self, offsets: Array, ids: Array, always: Array) -> None:
        """Gives searches with ``shortlist=1`` the candidates that they choose among.

        Those of a sentence are the target tokens of its source tokens, and those that are always there. Searches under
        way keep what they began with.

        Args:
            offsets: int64 ``[source vocabulary + 1]``, where the list of each source token begins in ``ids``.
            ids: int32, target tokens.
            always: int32, target tokens; EOS must be there, and more than a search has candidates.

        Raises:
            ValueError: A shape, a number type or an id does not fit the model.
        """
        given = {"offsets": (offsets, np.int64), "ids": (ids, np.int32), "always": (always, np.int32)}
        for name, (array, dtype) in given.items():
            if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
                raise ValueError(f"engine: shortlist: {name} is a row of {np.dtype(dtype)}, got {array.dtype}")
        if not offsets.size:
            raise ValueError("engine: shortlist: offsets are one more than there are source tokens, got none")
        _call(
            "nms_engine_shortlist",
            self._handle,
            *(offsets.ctypes.data, offsets.size - 1),
            *(ids.ctypes.data, ids.size, always.ctypes.data, always.size),
        )

    def translate(
        self,
        sources: Sequence[Sequence[int]],
        search: SearchConfig,
        prompts: Sequence[Sequence[int]],
        eos: Sequence[int],
        banned: Sequence[Sequence[int]] = (),
        begin_banned: Sequence[int] = (),
        watch: Callable[[int, list[int]], None] | None = None,
    ) -> list[list[Hypothesis]]:
        """Translates sentences.

        Args:
            sources: The ids of each, without padding.
            search: How.
            prompts: What each translation begins with: its start token, and more if wanted.
            eos: The ids that end a translation.
            banned: Lists of ids that must not be generated, one after the other where a list has several.
            begin_banned: Ids that the first generated token is not one of.
            watch: Called after each step with the place of a sentence and the ids that its translation is sure to begin
                with, the prompt's first. What it raises ends the translation and is raised here. With several threads
                each calls it.

        Returns:
            For each sentence up to ``search.returned`` translations, the best first.

        Raises:
            UnableError: A hypothesis took ``search.unknown_token``, or outgrew the model's positions.
            ValueError: An id, a length or a setting is not possible.
        """
        count = len(sources)
        if len(prompts) != count:
            raise ValueError(f"engine: {count} sentences need as many prompts, got {len(prompts)}")
        slots, width = count * max(search.returned, 0), max(search.max_length, 0)  # C++ refuses the ones below
        bans = _flat([len(ids), *ids] for ids in banned)
        ends, begins = _flat([eos]), _flat([begin_banned])
        try:
            tokens = np.empty((slots, width), np.int32)
            lengths, scores = np.zeros(slots, np.int32), np.zeros(slots, np.float32)
            token_scores = np.zeros(tokens.shape, np.float32) if search.token_scores else None
        except (MemoryError, ValueError):  # numpy's for what no address can reach
            raise ValueError(f"engine: there is no memory for {slots} translations of {width} tokens") from None
        inputs = [_lengths(sources), _flat(sources), _lengths(prompts), _flat(prompts)]
        longest = int(inputs[0].max(initial=0))
        attention = np.zeros((*tokens.shape, longest), np.float32) if search.attention else None
        raised: list[BaseException] = []

        def watched(sentence: int, settled: Any, length: int) -> int:
            try:
                watch(sentence, settled[:length])  # type: ignore[misc]
            except BaseException as error:  # nothing passes through C++ but a number
                raised.append(error)
                return 0
            return 1

        watcher = None if watch is None else _WATCHER(watched)
        held = self, inputs, ends, bans, begins, tokens, lengths, scores, token_scores, attention
        arguments = (
            self._handle,
            ctypes.byref(search),
            count,
            *(array.ctypes.data for array in inputs),
            *(ends.ctypes.data, ends.size, bans.ctypes.data, bans.size, begins.ctypes.data, begins.size),
            *(tokens.ctypes.data, lengths.ctypes.data, scores.ctypes.data),
            None if token_scores is None else token_scores.ctypes.data,
            None if attention is None else attention.ctypes.data,
            watcher,
        )
        try:
            _call_for_long("nms_engine_translate", count, held, *arguments)
        except ValueError:
            if raised:
                raise raised[0] from None
            raise
        return [
            [
                Hypothesis(
                    tokens[slot, : lengths[slot]],
                    float(scores[slot]),
                    None if token_scores is None else token_scores[slot, : lengths[slot]],
                    None if attention is None else attention[slot, : lengths[slot], : len(sources[index])],
                )
                for slot in range(first, first + search.returned)
                if lengths[slot]
            ]
            for index, first in enumerate(range(0, slots, search.returned))
        ]

    def score(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], threads: int) -> list[Array]:
        """The log-probability of each token of given translations.

        Args:
            sources: The ids of each sentence, without padding.
            targets: The ids of each translation; they begin with the start token.
            threads: How many to use.

        Returns:
            fp32 of the length of each target: of each token after those before it, 0 for the first.

        Raises:
            ValueError: An id or a length is not possible.
        """
        if len(sources) != len(targets):
            raise ValueError(f"engine: {len(sources)} sentences need as many translations, got {len(targets)}")
        inputs = [_lengths(sources), _flat(sources), _lengths(targets), _flat(targets)]
        scores = np.zeros(inputs[3].size, np.float32)
        _call_for_long(
            "nms_engine_score",
            len(sources),
            (self, inputs, scores),
            self._handle,
            threads,
            len(sources),
            *(array.ctypes.data for array in inputs),
            scores.ctypes.data,
        )
        return np.split(scores, np.cumsum(inputs[2])[:-1]) if len(targets) else []


def _flat(rows: Iterable[Sequence[int]]) -> Array:
    try:
        return np.fromiter(map(index, chain.from_iterable(rows)), np.int32)
    except OverflowError:
        raise ValueError("engine: a token id does not fit 32 bits; check the tokenizer") from None
    except TypeError as error:
        raise ValueError(f"engine: token ids are whole numbers in rows: {error}") from None


def _lengths(rows: Sequence[Sequence[int]]) -> Array:
    try:
        return np.fromiter(map(len, rows), np.int32)
    except TypeError as error:
        raise ValueError(f"engine: token ids are whole numbers in rows: {error}") from None
