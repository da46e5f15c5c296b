"""Padding rows of embeddings: those that are zero stay zero while a model trains."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_nmsparse.sharding import is_sharded, local

__all__ = ["ZeroPadding", "padding_rows"]


class ZeroPadding:
    """Keeps the padding rows that are zero before a step at zero after it.

    Marian's decoder starts from the embedding of the padding, which is zero in its models, and CTranslate2 starts it
    from zeros. Where that embedding is the output projection too, the softmax gives its row a gradient. That gradient
    is set to zero as soon as it is there, so that clipping does not count it, and the row once more after the step,
    whatever the optimizer does. A row with a number other than zero trains as ever.

    Weights may be sharded by rows, frozen or replaced at any time: `attach` looks for them, as every step does.

    Args:
        model: Any model; `padding_rows` says which rows are meant.
        optimizer: The one that steps its embeddings.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._places = padding_rows(model)
        self._rows: dict[int, tuple[Tensor, slice, Any]] = {}  # weight, its rows on this process, hook, by identity
        self._zero: list[tuple[Tensor, Tensor]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self.attach()

    def attach(self) -> None:
        """Watches the gradients of what the embeddings hold as their weights now."""
        weights = {id(module.weight): (module.weight, row) for module, row in self._places}
        for key in [key for key in self._rows if key not in weights]:
            self._rows.pop(key)[2].remove()
        for key, (weight, row) in weights.items():
            if key not in self._rows and weight.requires_grad:
                rows = _local_rows(weight, row)
                hook = weight.register_post_accumulate_grad_hook(partial(_drop_gradient, rows=rows))
                self._rows[key] = weight, rows, hook

    def remove(self) -> None:
        """Takes all hooks off."""
        for hook in [*self._hooks, *(hook for _, _, hook in self._rows.values())]:
            hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.attach()
        self._zero = []
        for weight, rows, _ in self._rows.values():
            _drop_gradient(weight, rows)  # of a weight that has been watched only since its backward
            self._zero.append((weight, _is_zero(weight, rows)))

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for weight, zero in self._zero:
            local(weight)[self._rows[id(weight)][1]].masked_fill_(zero, 0.0)


def padding_rows(model: nn.Module) -> list[tuple[nn.Embedding, int]]:
    """The embeddings of ``model`` that have a row for padding, with its number.

    The number is the embedding's own ``padding_idx``; of the input embedding of a Hugging Face model also that of its
    configuration, since T5 and others give their embeddings none.
    """
    places: list[tuple[Any, Any]] = [
        (module, module.padding_idx) for module in model.modules() if isinstance(module, nn.Embedding)
    ]
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    if padding is not None and callable(getattr(model, "get_input_embeddings", None)):
        with suppress(NotImplementedError):  # some models of speech or images have none
            places.append((model.get_input_embeddings(), padding))  # type: ignore[operator]
    return [
        (module, row)
        for module, row in places
        if isinstance(module, nn.Embedding) and isinstance(row, int) and 0 <= row < module.num_embeddings
    ]


def _local_rows(weight: Tensor, row: int) -> slice:
    """Where ``row`` of ``weight`` lies in its part on this process: one row, or none."""
    if not is_sharded(weight):
        return slice(row, row + 1)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(weight, DTensor)
    numbers = torch.arange(len(weight), device=weight.device_mesh.device_type)
    part = distribute_tensor(numbers, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
    first = int(part[0]) if len(part) else len(weight)
    return slice(max(row - first, 0), max(row - first + 1, 0))


def _is_zero(weight: Tensor, rows: slice) -> Tensor:
    """Whether the rows hold nothing but zeros, as a 0-d tensor: on a GPU nothing waits for it."""
    return local(weight)[rows].any().logical_not()


@torch.no_grad()
def _drop_gradient(weight: Tensor, rows: slice) -> None:
    if weight.grad is not None and weight.grad.layout == torch.strided:  # a sparse gradient has no row for padding
        local(weight.grad)[rows].masked_fill_(_is_zero(weight, rows), 0.0)
