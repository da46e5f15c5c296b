"""What the C++ engine does, in torch and slowly: a model made of a specification and tensors, and transformers' search.

`ReferenceEngine` stands where `hf_nmsparse.kernels.engine.Engine` does, so that all around the engine is tried without
it, and the engine against this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_nmsparse.kernels import native
from hf_nmsparse.kernels.engine import (
    Activation,
    EarlyStopping,
    EngineConfig,
    Hypothesis,
    Packed,
    SearchConfig,
    Side,
    SideConfig,
    Table,
    TableSlot,
    UnableError,
    WeightSlot,
)

OFF = -math.inf


class ReferenceModel:
    """An encoder-decoder that knows its configuration and its tensors, and nothing of any family."""

    def __init__(
        self,
        config: EngineConfig,
        weights: dict[tuple[Side, int, WeightSlot], tuple[Tensor, Tensor | None]],
        tables: dict[tuple[Side, int, TableSlot], Tensor],
    ) -> None:
        self.config, self.weights, self.tables = config, weights, tables

    def product(self, x: Tensor, side: Side, layer: int, slot: WeightSlot) -> Tensor:
        return F.linear(x, *self.weights[side, layer, slot])

    def norm(self, x: Tensor, side: Side, layer: int, slot: TableSlot) -> Tensor:
        table = self.tables[side, layer, slot]
        if self.config.rms_norm:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_epsilon) * table[0]
        return F.layer_norm(x, x.shape[-1:], table[0], table[1], self.config.norm_epsilon)

    def attend(self, x: Tensor, memory: Tensor, side: Side, layer: int, cross: bool) -> Tensor:
        shape = self.shape(side)
        first = 4 if cross else 0

        def heads(of: Tensor, slot: int) -> Tensor:
            y = self.product(of, side, layer, WeightSlot(first + slot))
            return y.reshape(len(of), shape.heads, shape.head_dim).transpose(0, 1)

        scores = heads(x, 0) @ heads(memory, 1).transpose(1, 2) * shape.attention_scale
        if not cross:
            distance = torch.arange(len(memory))[None] - torch.arange(len(x))[:, None]
            if shape.relative_reach:
                reach = shape.relative_reach
                bias = self.tables[side, layer, TableSlot.RELATIVE_BIAS]
                assert bias.shape == (shape.heads, 2 * reach + 1)
                scores = scores + bias[:, distance.clamp(-reach, reach) + reach]
            if side == Side.DECODER:
                scores = scores.masked_fill(distance > 0, OFF)
        mixed = scores.softmax(-1) @ heads(memory, 2)
        return self.product(mixed.transpose(0, 1).reshape(len(x), -1), side, layer, WeightSlot(first + 3))

    def feed(self, x: Tensor, side: Side, layer: int) -> Tensor:
        activations: dict[int, Callable[[Tensor], Tensor]] = {
            Activation.RELU: F.relu,
            Activation.GELU: F.gelu,
            Activation.GELU_TANH: partial(F.gelu, approximate="tanh"),
            Activation.SILU: F.silu,
        }
        activation = activations[self.config.activation]
        inner = self.product(x, side, layer, WeightSlot.FEED_IN)
        if self.config.gated:
            inner = activation(self.product(x, side, layer, WeightSlot.FEED_GATE)) * inner
        else:
            inner = activation(inner)
        return self.product(inner, side, layer, WeightSlot.FEED_OUT)

    def shape(self, side: Side) -> SideConfig:
        shape: SideConfig = self.config.encoder if side == Side.ENCODER else self.config.decoder
        return shape

    def run(self, ids: Sequence[int], side: Side, memory: Tensor | None = None) -> Tensor:
        config, shape = self.config, self.shape(side)
        x = self.tables[side, -1, TableSlot.EMBEDDING][list(ids)] * shape.embedding_scale
        if shape.positions:
            assert len(self.tables[side, -1, TableSlot.POSITION]) == shape.positions
            x = x + self.tables[side, -1, TableSlot.POSITION][: len(ids)]
        if config.embedding_norm:
            x = self.norm(x, side, -1, TableSlot.EMBEDDING_NORM)
        for layer in range(shape.layers):
            blocks: list[tuple[TableSlot, Any]] = [
                (TableSlot.SELF_NORM, lambda y, layer=layer: self.attend(y, y, side, layer, False)),
                (TableSlot.CROSS_NORM, lambda y, layer=layer: self.attend(y, memory, side, layer, True)),  # type: ignore[arg-type]
                (TableSlot.FEED_NORM, lambda y, layer=layer: self.feed(y, side, layer)),
            ]
            for slot, block in blocks:
                if slot == TableSlot.CROSS_NORM and side == Side.ENCODER:
                    continue
                if config.norm_first:
                    x = x + block(self.norm(x, side, layer, slot))
                else:
                    x = self.norm(x + block(x), side, layer, slot)
        return self.norm(x, side, -1, TableSlot.FINAL_NORM) if config.final_norm else x

    def logits(self, memory: Tensor, target: Sequence[int]) -> Tensor:
        last = self.run(target, Side.DECODER, memory) * self.config.head_scale
        return self.product(last, Side.DECODER, -1, WeightSlot.HEAD)


class ReferenceEngine:
    """As `Engine`, in torch: each sentence by itself, and all of the target anew for each token."""

    made = 0

    def __init__(self, config: EngineConfig, weights: Iterable[Packed], tables: Iterable[Table]) -> None:
        type(self).made += 1
        self.model = ReferenceModel(
            config,
            {(weight.side, weight.layer, weight.slot): _product(weight) for weight in weights},
            {(table.side, table.layer, table.slot): torch.from_numpy(np.array(table.data)) for table in tables},
        )

    @torch.no_grad()
    def translate(
        self,
        sources: Sequence[Sequence[int]],
        search: SearchConfig,
        prompts: Sequence[Sequence[int]],
        eos: Sequence[int],
        banned: Sequence[Sequence[int]] = (),
        begin_banned: Sequence[int] = (),
    ) -> list[list[Hypothesis]]:
        results = []
        for source, prompt in zip(sources, prompts, strict=True):
            memory = self.model.run(source, Side.ENCODER)
            rules = partial(_process, search, len(prompt), list(eos), banned, list(begin_banned))
            step = partial(self.model.logits, memory)
            find = _greedy if search.beams == 1 else _beams
            found = find(step, rules, search, list(prompt), set(eos))
            results.append([Hypothesis(np.array(ids, np.int32), score, None) for ids, score in found])
        return results


def _product(weight: Packed) -> tuple[Tensor, Tensor | None]:
    data = torch.from_numpy(np.array(weight.data))
    shape = weight.out_features, weight.in_features
    if weight.format in ("dense_fp32", "dense_bf16"):
        number = torch.float32 if weight.format == "dense_fp32" else torch.bfloat16
        dense = data.view(number).reshape(shape)
    else:
        dense, scale = native.restore(data, weight.format, *shape)
        dense = dense if scale is None else dense * scale[:, None]
    return dense.float(), None if weight.bias is None else torch.from_numpy(np.array(weight.bias))


def _process(
    search: SearchConfig,
    prompt: int,
    eos: list[int],
    banned: Sequence[Sequence[int]],
    begin_banned: list[int],
    ids: list[int],
    scores: Tensor,
) -> Tensor:
    """transformers' processors, in its order."""
    scores, length, n = scores.clone(), len(ids), search.no_repeat_ngram
    if search.repetition_penalty != 1:
        seen = sorted(set(ids))
        values = scores[seen]
        scores[seen] = torch.where(values < 0, values * search.repetition_penalty, values / search.repetition_penalty)
    if n and length + 1 >= n:
        start = ids[length + 1 - n :] if n > 1 else []
        scores[[ids[at + n - 1] for at in range(length - n + 1) if ids[at : at + n - 1] == start]] = OFF
    for word in banned:
        if len(word) == 1 or (len(word) <= length and ids[length + 1 - len(word) :] == list(word[:-1])):
            scores[word[-1]] = OFF
    if length < search.min_length or length - prompt < search.min_new_tokens:
        scores[eos] = OFF
    for forced, at in ((search.forced_bos, 1), (search.forced_eos, search.max_length - 1)):
        if forced >= 0 and length == at:
            scores[:] = OFF
            scores[forced] = 0
    if length == prompt + (prompt == 1 and search.forced_bos >= 0):
        scores[begin_banned] = OFF
    return scores


def _greedy(
    step: Any, rules: Any, search: SearchConfig, ids: list[int], eos: set[int]
) -> list[tuple[list[int], float]]:
    total = 0.0
    while len(ids) < search.max_length:
        scores = rules(ids, step(ids)[-1])
        best = int(scores.argmax())
        total += float(scores.log_softmax(-1)[best])
        ids = [*ids, best]
        _check(search, best)
        if best in eos:
            break
    return [(ids, total)]


def _beams(
    step: Any, rules: Any, search: SearchConfig, prompt: list[int], eos: set[int]
) -> list[tuple[list[int], float]]:
    beams, width = search.beams, max(2, 1 + len(eos)) * search.beams
    running: list[tuple[list[int], float]] = [(prompt, 0.0), *(beams - 1) * [(prompt, -1e9)]]
    finished: list[tuple[list[int], float]] = []
    improvable = True
    for length in range(len(prompt), search.max_length):
        rows = [rules(ids, step(ids)[-1].log_softmax(-1)) + score for ids, score in running]
        scores, places = torch.cat(rows).topk(width)
        size = len(rows[0])
        candidates = [
            ([*running[place // size][0], place % size], score, place % size in eos or length + 1 == search.max_length)
            for score, place in zip(scores.tolist(), places.tolist(), strict=True)
        ]
        full = len(finished) == beams
        if improvable and not (full and search.early_stopping == EarlyStopping.WHEN_FULL):
            norm = (length + 1 - len(prompt)) ** search.length_penalty
            finished += [(ids, score / norm) for ids, score, ends in candidates[:beams] if ends]
            finished = sorted((entry for entry in finished if entry[1] > -1e9), key=lambda entry: -entry[1])[:beams]
        running = [(ids, score) for ids, score, ends in candidates if not ends][:beams]
        if not running:
            break
        for ids, score in running:
            _check(search, ids[-1] if score > -1e9 else -1)
        if len(finished) == beams:
            if search.early_stopping == EarlyStopping.WHEN_FULL:
                break
            longest = search.early_stopping == EarlyStopping.NEVER_EARLY and search.length_penalty > 0
            best = (search.max_length if longest else length + 1) - len(prompt)
            improvable = running[0][1] / best**search.length_penalty > finished[-1][1]
            if not improvable:
                break
    return finished[: search.returned]


def _check(search: SearchConfig, token: int) -> None:
    if token == search.unknown_token != -1:
        raise UnableError("engine: a translation took a token that has no position")
