"""N:M patterns: keep N of every M neighbouring weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

__all__ = ["MAX_M", "TRANSPOSABLE", "TWO_ROWS", "NMPattern"]

MAX_M = 32
_TEXT = re.compile(r"([0-9]+):([0-9]+)")

_PAIRS = (0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100)
TWO_ROWS = tuple(above | below << 4 for above, below in product(_PAIRS, repeat=2))
"""What two rows of four weights may keep at 2:4, four bits a row: those that keep the lower indices come first."""

TRANSPOSABLE = tuple(
    block
    for block in (above | below << 8 for above, below in product(TWO_ROWS, repeat=2))
    if all((block & 0x1111 << column).bit_count() == 2 for column in range(4))
)
"""The 90 patterns of blocks of 4x4 that are 2:4 along rows and columns, four bits a row, in the same order."""


@dataclass(frozen=True)
class NMPattern:
    """Keeps the ``n`` largest magnitudes of every group of ``m`` consecutive weights.

    Groups lie along the input dimension of a linear layer and never cross a row. N counts the weights that are
    kept, as in Zhou et al. (ICLR 2021); some tools count the pruned ones.

    Args:
        n: Weights kept in a group, ``1 <= n < m``.
        m: Weights in a group, ``2 <= m <= 32``.

    Raises:
        ValueError: The two numbers are no N:M pattern.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int:
            raise ValueError(f"pattern: N and M are whole numbers, got {self.n!r} and {self.m!r}; write 2:4")
        if not 1 <= self.n < self.m <= MAX_M:
            raise ValueError(f"pattern: N:M needs 1 <= N < M <= {MAX_M}, got {self.n}:{self.m}; 2:4 keeps 2 of 4")

    @classmethod
    def parse(cls, text: str | NMPattern) -> NMPattern:
        """Reads ``"2:4"``; a pattern is returned as it is.

        Raises:
            ValueError: ``text`` is not of the form N:M, or its numbers are no pattern.
        """
        if isinstance(text, NMPattern):
            return text
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"pattern: expected N:M such as '2:4', got {text!r}; in YAML keep the quotes")
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """The fraction of weights that is kept."""
        return self.n / self.m

    @property
    def within_2_of_4(self) -> bool:
        """Whether such weights are 2:4 too where rows divide by four: no aligned group of four keeps more than two."""
        return self.most_kept_in(4) <= 2

    def most_kept_in(self, width: int) -> int:
        """The most weights that are kept in any run of ``width`` columns that begins at a multiple of it."""
        starts = range(0, math.lcm(self.m, width), width)
        return max(sum(self._kept_between(start, start + width)) for start in starts)

    def _kept_between(self, start: int, end: int) -> Iterator[int]:
        """The most that each group keeps of its columns from ``start`` to ``end``."""
        for group in range(start // self.m * self.m, end, self.m):
            yield min(self.n, min(group + self.m, end) - max(group, start))

    def groups(self, in_features: int) -> int:
        """Groups in a row of ``in_features`` weights.

        Raises:
            ValueError: The row does not divide into groups of M.
        """
        if in_features % self.m:
            raise ValueError(
                f"pattern {self}: in_features {in_features} is not a multiple of {self.m}; leave this layer dense"
            )
        return in_features // self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"
