"""NMPattern: what parses, what prints, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml

from hf_nmsparse.pattern import MAX_M, TRANSPOSABLE, TWO_ROWS, NMPattern

EVERY_PATTERN = [NMPattern(n, m) for m in range(2, MAX_M + 1) for n in range(1, m)]


def test_parse_reads_n_before_m() -> None:
    pattern = NMPattern.parse("1:4")
    assert (pattern.n, pattern.m) == (1, 4)
    assert pattern.density == 0.25


def test_every_pattern_prints_as_it_parses() -> None:
    assert len(EVERY_PATTERN) == 496  # pairs 1 <= n < m <= 32
    assert [NMPattern.parse(str(pattern)) for pattern in EVERY_PATTERN] == EVERY_PATTERN
    assert str(NMPattern(2, 4)) == "2:4"


def test_a_pattern_parses_to_itself() -> None:
    pattern = NMPattern(4, 8)
    assert NMPattern.parse(pattern) is pattern


def test_a_pattern_is_a_frozen_value() -> None:
    assert {NMPattern(2, 4): "found"}[NMPattern.parse("2:4")] == "found"
    assert NMPattern(2, 4) != NMPattern(4, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        NMPattern(2, 4).n = 3  # type: ignore[misc]


@pytest.mark.parametrize("text", ["2:2", "4:2", "0:4", "0:0", "2:64", "2:33", "1:1"])
def test_numbers_out_of_range_are_refused_with_the_rule_and_the_value(text: str) -> None:
    with pytest.raises(ValueError, match=rf"needs 1 <= N < M <= 32, got {text}"):
        NMPattern.parse(text)


@pytest.mark.parametrize(
    "text",
    ["2-4", "2:4:8", "2:", ":4", "2 : 4", " 2:4", "2:4\n", "-2:4", "2.0:4", "a:b", "²:4", "", 2.4, 124, None, (2, 4)],
)
def test_what_is_no_pattern_is_refused_with_the_value(text: Any) -> None:
    with pytest.raises(ValueError, match="expected N:M such as '2:4', got ") as error:
        NMPattern.parse(text)
    assert repr(text) in str(error.value)


def test_yaml_reads_a_bare_2_4_as_the_sexagesimal_124() -> None:
    value = yaml.safe_load("pattern: 2:4")["pattern"]
    assert value == 124
    with pytest.raises(ValueError, match="got 124; in YAML keep the quotes"):
        NMPattern.parse(value)
    assert NMPattern.parse(yaml.safe_load("pattern: '2:4'")["pattern"]) == NMPattern(2, 4)


@pytest.mark.parametrize(("n", "m"), [(2.0, 4), ("2", "4"), (True, 4), (2, None)])
def test_numbers_that_are_not_whole_are_refused(n: Any, m: Any) -> None:
    with pytest.raises(ValueError, match="N and M are whole numbers, got "):
        NMPattern(n, m)


@pytest.mark.parametrize(
    ("text", "most"),
    [("1:4", 4), ("2:4", 8), ("2:8", 4), ("4:8", 8), ("1:2", 8), ("1:16", 1), ("1:32", 1), ("9:32", 9), ("17:32", 16)],
)
def test_the_most_that_sixteen_columns_keep(text: str, most: int) -> None:
    assert NMPattern.parse(text).most_kept_in(16) == most


def test_the_most_that_sixteen_columns_keep_of_groups_that_cross_their_ends() -> None:
    assert NMPattern(2, 6).most_kept_in(16) == 8  # columns 16 to 32 have the ends of groups on both sides
    assert NMPattern(3, 5).most_kept_in(16) == 12  # columns 32 to 48: 3 of 32 to 35, three whole groups
    assert NMPattern(2, 3).most_kept_in(16) == 12  # columns 16 to 32: two of 16 to 18, 4 groups, two of 30 to 32


def test_groups_divide_the_row() -> None:
    assert NMPattern(2, 4).groups(12) == 3
    with pytest.raises(ValueError, match="pattern 2:4: in_features 10 is not a multiple of 4"):
        NMPattern(2, 4).groups(10)


def test_transposable_patterns_are_all_in_order() -> None:
    """Counted by another way: of all blocks of 4x4 those with two in each row and column, lower indices first."""

    def block_of(code: int) -> list[list[int]]:
        return [[code >> 4 * row + column & 1 for column in range(4)] for row in range(4)]

    blocks = map(block_of, range(2**16))
    wanted = [block for block in blocks if all(sum(line) == 2 for line in [*block, *zip(*block, strict=True)])]
    wanted.sort(reverse=True)
    assert [*map(block_of, TRANSPOSABLE)] == wanted
    assert (len(wanted), len(TWO_ROWS)) == (90, 36)
    assert TWO_ROWS[:3] == (0b0011_0011, 0b0101_0011, 0b1001_0011)
