"""Calibration: the text by which a dense model is pruned at once, and the pass over it that prunes layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hf_nmsparse.losses import decoder_inputs
from hf_nmsparse.one_shot import ONE_SHOT
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.positions import positions_of
from hf_nmsparse.sharding import is_sharded

__all__ = ["Calibration", "prune_layers"]

# The tensors of a batch that say which of its tokens are no padding.
_MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class Calibration:
    """The batch that goes through the model once, and the method that prunes by what it sees there.

    Args:
        inputs: What the model's ``forward`` takes, on the model's device. Where ``attention_mask`` and, of an
            encoder-decoder, ``decoder_attention_mask`` are among it, what they mask counts for nothing. Which of them
            belongs to the input of a layer is seen by its shape, so that the number of sentences and the padded lengths
            have to be different numbers; `of_pairs` sees to it.
        method: ``"sparsegpt"`` or ``"wanda"``.

    Raises:
        ValueError: The method is unknown, or two masks cannot be told apart.
    """

    inputs: Mapping[str, Any]
    method: str = "sparsegpt"

    def __post_init__(self) -> None:
        if self.method not in ONE_SHOT:
            raise ValueError(f"calibration: method is one of {', '.join(ONE_SHOT)}, got {self.method!r}")
        self.real_tokens()

    @classmethod
    def of_pairs(
        cls,
        model: Any,
        pairs: Iterable[Mapping[str, Sequence[int]]],
        count: int = 256,
        longest: int = 128,
        method: str = "sparsegpt",
    ) -> Calibration:
        """The first ``count`` pairs as a batch of an encoder-decoder model.

        Args:
            model: The model that is pruned: it makes the decoder's inputs of the labels.
            pairs: Rows with ``input_ids`` and ``labels``, lists of tokens.
            count: Pairs of the batch. SparseGPT wants more tokens than the widest layer has inputs: 256 pairs of 20
                tokens for 2,048.
            longest: Pairs with a side of more tokens are passed over, since all others would be padded to their length;
                so are those for which the model has no positions.
            method: As `Calibration` takes it.

        Raises:
            ValueError: No pair is short enough.
        """
        # Where two lengths are the same, a side is padded by a token or two beyond its longest sentence.
        positions = [positions_of(part) for part in (model.get_encoder(), model.get_decoder())]
        longest = min([longest, *(limit - 2 for limit in positions if limit is not None)])
        rows = (tuple(torch.as_tensor(list(pair[name])) for name in ("input_ids", "labels")) for pair in pairs)
        short = list(islice((row for row in rows if all(0 < len(side) <= longest for side in row)), count))
        if not short:
            raise ValueError(f"calibration: no pair of 1 to {longest} tokens a side; give other text")
        sources, targets = zip(*short, strict=True)
        taken = {len(short)}
        source, source_mask = _padded(sources, 0, taken)
        labels, target_mask = _padded(targets, -100, taken)
        inputs = {
            "input_ids": source,
            "attention_mask": source_mask,
            "decoder_input_ids": decoder_inputs(model, labels),
            "decoder_attention_mask": target_mask,
        }
        device = next(model.parameters()).device
        return cls({**{name: tensor.to(device) for name, tensor in inputs.items()}, "use_cache": False}, method)

    def real_tokens(self) -> dict[torch.Size, Tensor]:
        """For each shape that the tokens of a layer's input may have, which of them are no padding.

        They are ``[batch, length]`` or, as in FSMT, ``[length, batch]``.
        """
        found: dict[torch.Size, Tensor] = {}
        for mask in [self.inputs[name].bool() for name in _MASKS if name in self.inputs]:
            for one in (mask, mask.t()):
                if not torch.equal(found.setdefault(one.shape, one), one):
                    raise ValueError(
                        f"calibration: sentences and lengths have to be different numbers, got masks of "
                        f"{' and '.join(str(list(self.inputs[name].shape)) for name in _MASKS if name in self.inputs)}"
                        "; pad one of them by another token"
                    )
        return found


def _padded(rows: Sequence[Tensor], value: int, taken: set[int]) -> tuple[Tensor, Tensor]:
    """Rows and their mask, ``[batch, length]``, padded to the first length that is not ``taken``, which it is then."""
    length = max(map(len, rows))
    while length in taken:
        length += 1
    taken.add(length)
    padded = pad_sequence([*rows, rows[0].new_zeros(length)], batch_first=True, padding_value=value)[:-1]
    lengths = torch.tensor([len(row) for row in rows])
    return padded, (torch.arange(length) < lengths[:, None]).long()


class _AllPruned(Exception):  # noqa: N818  # no error
    """Ends the pass: what comes after the last layer, such as the output projection, is needed by none."""


@torch.no_grad()
def prune_layers(model: nn.Module, layers: Mapping[str, nn.Linear], pattern: NMPattern, given: Calibration) -> None:
    """Prunes linear layers in place, in the order in which one pass of the batch reaches them.

    A layer is pruned when its input arrives, which has come through the pruned layers before it, and computes with its
    pruned weight then. So one pass does for all layers; it holds what a pass in inference holds, and the Hessian of one
    layer beside it. A layer that is called several times is pruned by what the first call sees.

    Args:
        model: The model, which runs in evaluation mode meanwhile.
        layers: Its layers to prune, by name.
        pattern: The N:M pattern.
        given: The batch and the method.

    Raises:
        ValueError: A layer is never called, or its input is no finite input of the batch's tokens. Layers before it are
            pruned by then.
    """
    prune, real = ONE_SHOT[given.method], given.real_tokens()
    names = {layer: name for name, layer in layers.items()}
    for name, layer in layers.items():
        if is_sharded(layer.weight):
            raise ValueError(f"calibration: {name} is sharded; prune the model before it is")

    def before(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        name = names.pop(layer, None)  # type: ignore[call-overload]
        if name is None:
            return
        weight: Any = layer.weight
        inputs = _rows(args[0] if args else kwargs["input"], real, name)
        try:
            weight.copy_(prune(weight.float(), inputs.to(weight.device), pattern))
        except ValueError as error:
            raise ValueError(f"{error} ({name})") from error
        if not names:
            raise _AllPruned

    training = [module for module in model.modules() if module.training]
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers.values()]
    model.eval()
    try:
        model(**given.inputs)
    except _AllPruned:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    if names:
        raise ValueError(
            f"calibration: the batch never reaches {min(names.values())}; give more text, or let ignore keep it dense"
        )


def _rows(inputs: Tensor, real: Mapping[torch.Size, Tensor], name: str) -> Tensor:
    """The input of a layer without padding, ``[tokens, in_features]`` in fp32."""
    tokens = inputs.shape[:-1]
    if real and tokens not in real:
        shapes = ", ".join(str(list(shape)) for shape in real)
        raise ValueError(
            f"calibration: the tokens that reach {name} are {list(tokens)} and the masks of the batch {shapes}; give "
            "attention_mask and decoder_attention_mask, or let ignore keep the layer dense"
        )
    rows = inputs[real[tokens]] if real else inputs.flatten(0, -2)
    if not len(rows) or not rows.isfinite().all():
        what = "NaN or infinity" if len(rows) else "nothing but padding"
        raise ValueError(f"calibration: the input of {name} holds {what}; check the model and the text")
    return rows.float()
