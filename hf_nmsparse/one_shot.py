"""One-shot pruning of a linear layer by what goes into it: Wanda and SparseGPT, for any N:M."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from hf_nmsparse.masks import apply_mask, magnitude_mask, unpack_bits
from hf_nmsparse.pattern import NMPattern

__all__ = ["ONE_SHOT", "sparsegpt", "wanda"]

_BLOCK = 128  # columns whose errors reach the rest of the row in one product


def wanda(weight: Tensor, inputs: Tensor, pattern: NMPattern) -> Tensor:
    """Keeps the N of every M weights whose ``|w| * ||x||`` is largest, as they are.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv 2306.11695.

    Args:
        weight: ``[out_features, in_features]``.
        inputs: ``[tokens, in_features]``; ``||x||`` is the Euclidean norm of a column.
        pattern: The N:M pattern.

    Returns:
        The weight with zeros where it is pruned; of equal scores the lower index stays.
    """
    return apply_mask(weight, magnitude_mask(weight * inputs.norm(dim=0), pattern))


def sparsegpt(weight: Tensor, inputs: Tensor, pattern: NMPattern, damping: float = 0.01) -> Tensor:
    """Prunes column by column, and moves the columns behind so that the outputs change least.

    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, arXiv
    2301.00774.

    With the Hessian ``H = X^T X`` of the squared error of the outputs, a group keeps the N weights whose removal costs
    most, ``w^2 / u^2``, where ``u`` is the diagonal of the upper Cholesky factor U of ``H^-1``; it is chosen when the
    first of its columns is reached, from weights that make up already for all columns before. Memory: three matrices of
    ``in_features^2`` in fp64, beside a copy of the weight.

    Args:
        weight: ``[out_features, in_features]``.
        inputs: ``[tokens, in_features]``.
        pattern: The N:M pattern.
        damping: So much of the mean of H's diagonal is added to it, which keeps it invertible where tokens are few.

    Returns:
        The pruned weight, its kept values changed. A column whose input is always zero is pruned first.

    Raises:
        ValueError: H is not positive definite with this damping.
    """
    work, width = weight.to(torch.float64, copy=True), pattern.groups(weight.shape[1]) * pattern.m
    factor = _inverse_factor(inputs, damping)
    block = max(1, _BLOCK // pattern.m) * pattern.m
    costs = torch.diagonal(factor).clone()
    costs[inputs.abs().amax(dim=0) == 0] = torch.inf  # no output needs them
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.empty_like(work[:, start:stop])
        for column in range(start, stop):
            if column % pattern.m == 0:
                group = slice(column, column + pattern.m)
                kept = magnitude_mask(work[:, group] / costs[group], pattern)
                keeps = unpack_bits(kept, work[:, group].shape)  # [out_features, M]
            pruned = work[:, column].masked_fill(keeps[:, column % pattern.m], 0.0)
            errors[:, column - start] = pruned / factor[column, column]
            # What is pruned becomes zero exactly, where a subtraction would leave a rounding error.
            work[:, column].masked_fill_(~keeps[:, column % pattern.m], 0.0)
            work[:, column + 1 : stop] -= torch.outer(errors[:, column - start], factor[column, column + 1 : stop])
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return work.to(weight.dtype)


def _inverse_factor(inputs: Tensor, damping: float) -> Tensor:
    """U of ``H^-1 = U^T U``, upper triangular, ``[in_features, in_features]`` in fp64."""
    hessian = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64, device=inputs.device)
    for rows in inputs.split(4096):  # the wide copy of all tokens would be larger than the Hessian
        rows = rows.double()
        hessian.addmm_(rows.t(), rows)
    diagonal = torch.diagonal(hessian)
    diagonal += damping * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise ValueError(
            f"sparsegpt: the Hessian of {len(inputs)} tokens is singular with a damping of {damping:g}; give more "
            "calibration text or more damping"
        )
    del hessian, diagonal
    inverse = torch.cholesky_inverse(lower)
    del lower
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


ONE_SHOT: Mapping[str, Callable[[Tensor, Tensor, NMPattern], Tensor]] = MappingProxyType(
    {"wanda": wanda, "sparsegpt": sparsegpt}
)
"""The methods by the name that `Calibration` takes: a weight, its inputs and a pattern make the pruned weight."""
