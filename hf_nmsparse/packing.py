"""The bytes on disk, format version 1: kept values, and one code for the places of each group.

A group of M weights keeps N of them. Its code is the lexicographic rank of the kept positions among all
``binomial(M, N)`` sets, so that one rule serves every pattern; for 2:4 the codes are 0 = {0,1}, 1 = {0,2}, 2 = {0,3},
3 = {1,2}, 4 = {1,3}, 5 = {2,3}. Codes take ``ceil(log2(binomial(M, N)))`` bits, least significant bit first; a row
starts on a byte and the bits left over at its end are 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_nmsparse.masks import count_violations, magnitude_mask, unpack_bits
from hf_nmsparse.number_types import VALUE_DTYPES
from hf_nmsparse.packed_format import (
    CODES_IN_PERIOD,
    VALUE_TYPES,
    StoredTensor,
    bytes_of,
    code_bits,
    packed_shapes,
    read_period,
    shifted,
)
from hf_nmsparse.pattern import NMPattern

__all__ = ["decode", "encode", "from_matrix", "pack", "stored", "to_matrix", "unpack"]

_SPELLED = {torch.uint8: "U8", torch.int64: "I64", torch.float64: "F64"} | {
    VALUE_DTYPES[name]: VALUE_TYPES[name] for name in VALUE_TYPES
}

_LARGEST_TABLE = 1 << 16


def stored(tensor: Tensor, file: str) -> StoredTensor:
    """A tensor as ``file`` would hold it, for the rules of the format."""
    data = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()  # NumPy knows no bf16
    return StoredTensor(file, _SPELLED.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), data.nbytes, data)


def pack(weight: Tensor, pattern: NMPattern, name: str = "weight") -> dict[str, Tensor]:
    """The packed form of a weight that is N:M sparse already.

    Non-zero weights are always kept. A group with fewer than N of them fills its places with its -0.0, then with its
    +0.0, the lowest index first; ``unpack`` therefore returns ``weight`` bit for bit unless a group holds more than N
    weights that are not +0.0, in which case its last -0.0 come back as +0.0. A masked weight has none of these where
    the mask was applied by `apply_mask`.

    Args:
        weight: ``[out_features, in_features]`` in fp32, fp16, bf16 or int8.
        pattern: ``in_features`` must be a multiple of ``pattern.m``.
        name: What errors call the weight.

    Returns:
        ``weight``: the kept values ``[out_features, groups * N]``, in the dtype of the input; ``weight_indices``: the
        codes, uint8 ``[out_features, ceil(groups * bits / 8)]``.

    Raises:
        ValueError: A group has more than N non-zero weights, or the weight is no finite float matrix of whole groups.
    """
    if weight.dim() != 2 or weight.dtype not in VALUE_DTYPES.values():
        raise ValueError(
            f"pack: {name} must be a matrix in {_either(VALUE_DTYPES)}, got {list(weight.shape)} {weight.dtype}"
        )
    weight = weight.detach()
    shape, _ = packed_shapes(weight.shape[0], weight.shape[1], pattern)
    if not _finite(weight):
        raise ValueError(
            f"pack: {name} holds NaN or infinity in {weight.dtype}; check the training, or use wider values"
        )
    violations = count_violations(weight, pattern)
    if violations:
        raise ValueError(
            f"pack: {name} has {violations} groups with more than {pattern.n} non-zero weights, so it is not {pattern} "
            "sparse; apply the mask first"
        )
    claim = (weight != 0).to(torch.int8) * 2 + ((weight == 0) & torch.signbit(weight))
    kept = unpack_bits(magnitude_mask(claim.to(torch.float32), pattern), weight.shape)
    values = weight.masked_select(kept).reshape(shape)
    return {"weight": values, "weight_indices": encode(kept, pattern)}


def unpack(values: Tensor, codes: Tensor, pattern: NMPattern) -> Tensor:
    """The dense weight ``[out_features, in_features]``, +0.0 where nothing was kept.

    Gradients flow back to ``values``.

    Args:
        values: The kept values, ``[out_features, groups * N]``.
        codes: uint8 ``[out_features, ceil(groups * bits / 8)]``.
        pattern: The pattern that both were written with.

    Raises:
        ValueError: Shapes or codes do not fit the pattern.
    """
    if values.dim() != 2 or values.shape[1] % pattern.n:
        raise ValueError(
            f"unpack: values of {pattern} have a multiple of {pattern.n} columns, got {list(values.shape)}"
        )
    mask = decode(codes, pattern, values.shape[1] // pattern.n)
    if mask.shape[0] != values.shape[0]:
        raise ValueError(f"unpack: {values.shape[0]} rows of values and {mask.shape[0]} rows of codes")
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def to_matrix(weight: Tensor, channel_dim: int) -> Tensor:
    """The weight of a layer as the matrix that is packed: ``[out, in]``, or ``[out, places of the kernel * in]``.

    Args:
        weight: In its stock layout.
        channel_dim: The dimension of its input channels.
    """
    return weight.movedim(channel_dim, -1).flatten(1)


def from_matrix(matrix: Tensor, shape: torch.Size, channel_dim: int) -> Tensor:
    """The weight of the stock ``shape``; the inverse of `to_matrix`."""
    others = [size for dim, size in enumerate(shape) if dim != channel_dim]
    weight = matrix.reshape(*others, shape[channel_dim]).movedim(-1, channel_dim)
    return weight.clone(memory_format=torch.contiguous_format)  # strides of 1x1 kernels would else say channels last


def encode(mask: Tensor, pattern: NMPattern) -> Tensor:
    """The codes of a mask with exactly N kept in every group.

    Args:
        mask: Booleans ``[rows, groups * M]``.
        pattern: The pattern of ``mask``.

    Returns:
        uint8 ``[rows, ceil(groups * bits / 8)]``.

    Raises:
        ValueError: A group keeps more or fewer than N.
    """
    rows, groups, bits = mask.shape[0], pattern.groups(mask.shape[1]), code_bits(pattern)
    ranks = _rank(mask.reshape(-1, pattern.m), pattern).reshape(rows, groups)
    periods = -(-groups // CODES_IN_PERIOD)
    ranks = F.pad(ranks, (0, periods * CODES_IN_PERIOD - groups)).reshape(rows, periods, CODES_IN_PERIOD)
    packed = ranks.new_zeros((rows, periods, bits), dtype=torch.uint8)  # a period's bytes
    for code in range(CODES_IN_PERIOD):
        for byte in bytes_of(code, bits):
            packed[..., byte] |= (shifted(ranks[..., code], code * bits - 8 * byte) & 255).to(torch.uint8)
    return packed.reshape(rows, periods * bits)[:, : -(-groups * bits // 8)].contiguous()


def decode(codes: Tensor, pattern: NMPattern, groups: int) -> Tensor:
    """The mask that ``codes`` stand for; the inverse of `encode`.

    Args:
        codes: uint8 ``[rows, ceil(groups * bits / 8)]``.
        pattern: The pattern that the codes were written with.
        groups: Groups in a row.

    Returns:
        Booleans ``[rows, groups * M]`` with exactly N kept in every group.

    Raises:
        ValueError: The codes have another dtype or shape, or one is out of range.
    """
    width = -(-groups * code_bits(pattern) // 8)
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != width:
        raise ValueError(
            f"decode: {groups} groups of {pattern} need uint8 codes of {width} bytes a row, got "
            f"{list(codes.shape)} {codes.dtype}"
        )
    ranks = _read_ranks(codes, pattern)[:, :groups]
    count = comb(pattern.m, pattern.n)
    if (ranks >= count).any():
        raise ValueError(f"decode: code {int(ranks.max())} is out of range; {pattern} has the codes 0 to {count - 1}")
    if count <= _LARGEST_TABLE:
        kept = _table(pattern, ranks.device).index_select(0, ranks.reshape(-1))
    else:
        kept = _unrank(ranks.reshape(-1), pattern)
    return kept.reshape(codes.shape[0], groups * pattern.m)


def _read_ranks(codes: Tensor, pattern: NMPattern) -> Tensor:
    """The numbers in ``codes`` (uint8 ``[rows, bytes]``), ``[rows, whole periods]``, unchecked and with the padding."""
    rows, bits = codes.shape[0], code_bits(pattern)
    periods = -(-codes.shape[1] // bits)
    wide = codes.to(torch.int32 if bits <= 16 else torch.int64)  # holds a code and the byte it spills into
    wide = F.pad(wide, (0, periods * bits - codes.shape[1])).reshape(rows, periods, bits)
    ranks = wide.new_empty((rows, periods, CODES_IN_PERIOD))
    read_period(wide, ranks, bits)
    return ranks.reshape(rows, periods * CODES_IN_PERIOD)


def _rank(mask: Tensor, pattern: NMPattern) -> Tensor:
    """Lexicographic rank of each row's kept set; ``mask`` is ``[groups, M]``.

    ``binomial(M - 1 - p, N - i)`` sets agree on the first i positions and go on beyond p, so that their sum over the
    kept positions counts the sets that come later.
    """
    if (mask.sum(dim=1) != pattern.n).any():
        raise ValueError(f"encode: every group of {pattern} keeps exactly {pattern.n}")
    later = mask.new_zeros(mask.shape[0], dtype=torch.int64)
    missing = torch.full_like(later, pattern.n)
    for position in range(pattern.m):
        kept = mask[:, position]
        later += _later_sets(pattern, position, mask.device)[missing] * kept
        missing -= kept.to(torch.int64)
    return comb(pattern.m, pattern.n) - 1 - later


def _unrank(ranks: Tensor, pattern: NMPattern) -> Tensor:
    """The inverse of `_rank`: ``[groups]`` to ``[groups, M]``; ranks must be in range."""
    later = comb(pattern.m, pattern.n) - 1 - ranks.to(torch.int64)
    missing = torch.full_like(later, pattern.n)
    mask = ranks.new_empty((ranks.shape[0], pattern.m), dtype=torch.bool)
    for position in range(pattern.m):
        beyond = _later_sets(pattern, position, ranks.device)[missing]
        kept = (beyond <= later) & (missing > 0)
        mask[:, position] = kept
        later -= beyond * kept
        missing -= kept.to(torch.int64)
    return mask


@lru_cache(maxsize=256)
def _later_sets(pattern: NMPattern, position: int, device: torch.device) -> Tensor:
    """By the number of positions still missing, 0 to N: sets whose next position lies beyond ``position``."""
    rest = pattern.m - 1 - position
    return torch.tensor([comb(rest, missing) for missing in range(pattern.n + 1)], device=device)


@lru_cache(maxsize=64)
def _table(pattern: NMPattern, device: torch.device) -> Tensor:
    """The kept set of every code, booleans ``[binomial(M, N), M]``."""
    return _unrank(torch.arange(comb(pattern.m, pattern.n), device=device), pattern)


def _finite(weight: Tensor) -> bool:
    return bool(torch.isfinite(weight).all())


def _either(names: Mapping[str, torch.dtype]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
