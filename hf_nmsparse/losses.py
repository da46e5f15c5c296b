"""What a translation model is trained on: the reference and its smoothed cross-entropy, and a teacher's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Shifts", "decoder_inputs", "distillation_loss", "smoothed_cross_entropy", "token_loss"]

NO_TARGET = -100
"""The label where there is no target, as transformers writes it."""

# Numbers of a block: on a CPU few enough for the caches of its cores between one pass and the next, and so many that to
# wake the threads of a pass costs little; on a GPU a block only bounds memory.
_CPU_BLOCK, _GPU_BLOCK = 2**19, 2**27


class _SmoothedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        real = labels != NO_TARGET
        targets = labels.masked_fill(~real, 0)[:, None]
        normalizers, means = [], []
        for block in logits.split(_rows(logits)):
            block = block.to(_wide(logits))
            normalizers.append(block.logsumexp(dim=1))
            if smoothing:  # 0 times the mean would be NaN where a word is ruled out by minus infinity
                means.append(block.mean(dim=1))
        normalizer = torch.cat(normalizers)
        chosen = logits.gather(1, targets)[:, 0].to(_wide(logits))
        losses = normalizer - (1 - smoothing) * chosen
        if smoothing:
            losses -= smoothing * torch.cat(means)
        ctx.save_for_backward(logits, targets, real, normalizer)
        ctx.smoothing = smoothing
        return losses.masked_fill(~real, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, real, normalizer = ctx.saved_tensors
        smoothing, vocabulary = ctx.smoothing, logits.shape[1]
        factor = (real * upstream)[:, None]
        gradient, rows = torch.empty_like(logits), _rows(logits)
        blocks = (tensor.split(rows) for tensor in (logits, gradient, targets, normalizer[:, None], factor))
        for given, taken, chosen, shift, scale in zip(*blocks, strict=True):
            same = taken.dtype == normalizer.dtype
            share = torch.sub(given, shift, out=taken) if same else given.to(normalizer.dtype) - shift
            share.exp_().sub_(smoothing / vocabulary)
            share.scatter_add_(1, chosen, share.new_full(chosen.shape, smoothing - 1))
            share.mul_(scale)
            if not same:
                taken.copy_(share)
        return gradient, None, None


class _Divergence(torch.autograd.Function):
    """The sum over rows of KL(teacher || student), without the gradient of the teacher."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, real: Tensor, temperature: float) -> Tensor:
        normalizers, losses = [], []
        for block in zip(*(logits.split(_rows(logits)) for logits in (student, teacher)), strict=True):
            own, taught = (logits.to(_wide(logits)) / temperature for logits in block)
            both = torch.stack([own.logsumexp(dim=1), taught.logsumexp(dim=1)])
            shares = (taught - both[1, :, None]).exp_()
            losses.append((shares * (taught - own)).sum(dim=1) + both[0] - both[1])
            normalizers.append(both)
        ctx.save_for_backward(student, teacher, real, *torch.cat(normalizers, dim=1))
        ctx.temperature = temperature
        return torch.cat(losses).masked_fill(~real, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, real, *normalizers = ctx.saved_tensors
        factor = (real * upstream / ctx.temperature)[:, None]
        gradient, rows = torch.empty_like(student), _rows(student)
        columns = [student, teacher, gradient, *(normalizer[:, None] for normalizer in normalizers), factor]
        for given, taught, taken, own, other, scale in zip(*(tensor.split(rows) for tensor in columns), strict=True):
            share = (given.to(own.dtype) / ctx.temperature).sub_(own).exp_()
            share -= (taught.to(own.dtype) / ctx.temperature).sub_(other).exp_()
            taken.copy_(share.mul_(scale))
        return gradient, None, None, None


def _wide(logits: Tensor) -> torch.dtype:
    """The number type to compute in."""
    return torch.promote_types(logits.dtype, torch.float32)


def _rows(logits: Tensor) -> int:
    """Rows of a block."""
    block = _CPU_BLOCK if logits.device.type == "cpu" else _GPU_BLOCK
    return max(1, block // logits.shape[1])


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """`torch.nn.functional.cross_entropy` with ``reduction="sum"`` and label smoothing, in fewer passes.

    It reads the logits once forward and once backward, block by block while they are in the cache, where torch makes
    four tensors of their size; 16-bit logits are widened a block at a time and never as a whole.

    Args:
        logits: ``[tokens, vocabulary]``.
        labels: ``[tokens]``, -100 where there is no target.
        smoothing: Weight of the uniform distribution over the vocabulary, 0 to 1.

    Returns:
        The sum over the targets, 0-d, fp32 or wider. It can be differentiated once.
    """
    loss: Tensor = _SmoothedCrossEntropy.apply(logits, labels, smoothing)
    return loss


def token_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy summed over the target tokens, divided by those of the whole optimizer step.

    Args:
        outputs: Model outputs with logits ``[batch, target, vocabulary]``.
        labels: ``[batch, target]``, -100 where there is no target.
        num_items_in_batch: Target tokens over all accumulation steps and processes; those of ``labels`` if None.
        label_smoothing: Weight of the uniform distribution over the vocabulary.
    """
    total = smoothed_cross_entropy(outputs["logits"].flatten(0, -2), labels.flatten(), label_smoothing)
    if num_items_in_batch is None:
        num_items_in_batch = labels.ne(NO_TARGET).sum()
    return total / num_items_in_batch


def distillation_loss(
    outputs: Any,
    teacher_logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Word-level distillation (Kim and Rush, EMNLP 2016): the divergence of the student from the teacher.

    The sum over target tokens of ``T^2 * KL(teacher || student)``, both softened by the temperature T (Hinton et al.
    2015), divided as `token_loss` is.

    Args:
        outputs: The student's, with logits ``[batch, target, vocabulary]``.
        teacher_logits: Of the same shape.
        labels: ``[batch, target]``, -100 where there is no target.
        num_items_in_batch: As in `token_loss`.
        temperature: T.
    """
    student, teacher = (logits.flatten(0, -2) for logits in (outputs["logits"], teacher_logits))
    real = labels.flatten() != NO_TARGET
    divergence: Tensor = _Divergence.apply(student, teacher, real, temperature)
    return divergence * temperature**2 / (real.sum() if num_items_in_batch is None else num_items_in_batch)


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """The labels shifted right, as the model itself does it where it can.

    M2M100 and NLLB have no method for it and follow BART's rule: the start token first, padding for -100.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        # A copy: FSMT writes padding over -100 in what it is given, and would count it as a target.
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels.clone())
        return shifted
    shifted = labels.roll(1, dims=-1)
    shifted[..., 0] = model.config.decoder_start_token_id
    return shifted.masked_fill(shifted == -100, model.config.pad_token_id)


@dataclass
class Shifts:
    """Stands for a model in a collator, which asks it for `decoder_inputs` and nothing else."""

    model: Any

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """As `decoder_inputs`."""
        return decoder_inputs(self.model, labels)
