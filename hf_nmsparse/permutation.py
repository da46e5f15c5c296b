"""The order of input channels, chosen so that N:M groups keep more: exact where layers before can take it back.

Only what lies between two layers and is read by none else can be reordered: the inner channels of a feed-forward block,
whose first layer then gives its rows in the same order, and within a head what attention takes the mean of, between the
projection of values and that of outputs. Other layers read the residual stream. Its channels are added up over all
layers, so that one order would have to do for every layer that reads or writes it, the embeddings and the norms; there
is no choosing layer by layer. (Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021, is the idea.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.pattern import NMPattern

__all__ = ["best_order", "kept_magnitude", "permute_channels"]

# Which models have what this file knows, and by which names: layers that write the channels, the layer that reads them
# and, where channels stay in their head, the attribute with the number of heads.
_MODELS = {
    **dict.fromkeys(("bart", "fsmt", "m2m_100", "marian", "mbart", "pegasus"), "bart"),
    **dict.fromkeys(("mt5", "t5", "umt5"), "t5"),
}
_BETWEEN: Mapping[str, tuple[tuple[tuple[str, ...], str, str | None], ...]] = {
    "bart": ((("fc1",), "fc2", None), (("v_proj",), "out_proj", "num_heads")),
    "t5": ((("wi",), "wo", None), (("wi_0", "wi_1"), "wo", None), (("v",), "o", "n_heads")),
}

_ROUNDS = 20  # of swaps; what later ones gain is too little to wait for
_LEAST_GAIN = 1e-4  # of the kept magnitude, in a round


@torch.no_grad()
def permute_channels(model: nn.Module, layers: Mapping[str, nn.Linear], pattern: NMPattern) -> list[str]:
    """Reorders the input channels of layers in place, and the outputs of the layers before; the model stays the same.

    Its outputs change by rounding alone, since sums are taken in another order.

    Args:
        model: A dense model of a family that is known here.
        layers: Its layers that become sparse, by name; the others need no order.
        pattern: The N:M pattern.

    Returns:
        The names of the layers whose channels have been looked at.

    Raises:
        ValueError: The family is unknown.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _MODELS:
        raise ValueError(f"permute: knows the models {', '.join(sorted(_MODELS))}, got {kind!r}; leave it out")
    names = {layer: name for name, layer in layers.items()}
    done = []
    for writers, reader, heads in _neighbours(model, _BETWEEN[_MODELS[kind]]):
        part = reader.in_features // heads
        if reader not in names or part % pattern.m:  # a group would reach into the next head
            continue
        for first in range(0, reader.in_features, part):
            channels = slice(first, first + part)
            order = best_order(reader.weight[:, channels], pattern)
            reader.weight[:, channels] = reader.weight[:, channels][:, order]
            for writer in writers:
                for tensor in (writer.weight, *(() if writer.bias is None else (writer.bias,))):
                    tensor[channels] = tensor[channels][order]
        done.append(names[reader])
    return done


def _neighbours(model: nn.Module, table: Any) -> Iterator[tuple[list[nn.Linear], nn.Linear, int]]:
    """Layers with the layer that alone reads their outputs, and in how many parts the order stays."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for module in model.modules():
        for writers, reader, heads in table:
            found = [getattr(module, name, None) for name in (*writers, reader)]
            if not all(type(layer) is nn.Linear for layer in found):
                continue
            # A weight that other modules have too cannot be reordered for one of them.
            if all(uses.get(id(tensor)) == 1 for layer in found for tensor in layer.parameters()):  # type: ignore[union-attr]
                *before, after = found
                yield before, after, 1 if heads is None else getattr(module, heads)  # type: ignore[misc]


def kept_magnitude(weight: Tensor, pattern: NMPattern) -> float:
    """The sum of the magnitudes that the magnitude mask keeps."""
    return float(apply_mask(weight, magnitude_mask(weight, pattern)).abs().sum(dtype=torch.float64))


def best_order(weight: Tensor, pattern: NMPattern) -> Tensor:
    """An order of the columns under which the mask keeps more magnitude: swaps of two columns, the best ones first.

    A round looks at every swap between two groups and takes the best, then the best of groups that are untouched yet,
    and so on. It ends after 20 rounds, or where a round gains next to nothing. Columns are exchanged only where it
    gains, so that no order keeps less than the one that was there.

    Args:
        weight: ``[out_features, in_features]``.
        pattern: The N:M pattern.

    Returns:
        Indices ``[in_features]``: ``weight[:, order]`` is the better one.
    """
    size, m = weight.detach().abs().float(), pattern.m
    order = torch.arange(weight.shape[1], device=weight.device)
    groups = order // m
    for _ in range(_ROUNDS):
        gains = _gains(size, pattern)
        gains[groups[:, None] >= groups] = 0.0  # once for each pair, and none within a group
        best = gains.flatten().topk(min(gains.numel(), 16 * len(order)))
        touched: set[int] = set()  # groups
        swaps, gained = [], 0.0
        for gain, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            one, other = divmod(place, len(order))
            if gain <= 0:
                break
            if not touched & {one // m, other // m}:
                touched |= {one // m, other // m}
                swaps.append((one, other))
                gained += gain
        if not swaps or gained < _LEAST_GAIN * float(size.sum()):
            break
        ones, others = torch.tensor(swaps, device=weight.device).t()
        now = torch.arange(len(order), device=weight.device)
        now[ones], now[others] = others, ones
        order, size = order[now], size[:, now]
    return order


def _gains(size: Tensor, pattern: NMPattern) -> Tensor:
    """What the kept magnitude gains where columns i and j of different groups change places, ``[columns, columns]``.

    A group without column i keeps its N - 1 largest others whatever comes, and the larger of the next and what takes
    i's place.
    """
    rows, columns = size.shape
    grouped = size.reshape(rows, -1, pattern.m)  # [rows, groups, M]
    sure, next_one = torch.empty_like(grouped), torch.empty_like(grouped)
    for member in range(pattern.m):
        others = torch.cat([grouped[..., :member], grouped[..., member + 1 :]], dim=-1)
        largest = others.topk(pattern.n, dim=-1).values  # N < M
        sure[..., member] = largest[..., :-1].sum(dim=-1)
        next_one[..., member] = largest[..., -1]
    sure, next_one = sure.reshape(rows, columns), next_one.reshape(rows, columns)
    # [i, j]: what i's group keeps with column j in i's place
    with_other, larger = size.new_empty(columns, columns), torch.empty_like(next_one)
    for column in range(columns):
        torch.maximum(next_one, size[:, column, None], out=larger)
        with_other[:, column] = larger.sum(dim=0)
    with_other += sure.sum(dim=0)[:, None]
    now = torch.diagonal(with_other)
    return with_other + with_other.t() - now[:, None] - now
