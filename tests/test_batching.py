"""Token batches: the budget, the order, and the processes that share it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_nmsparse.batching import Pair, TokenBatchSampler, TokenBatchStream, pair_lengths
from tests.tiny import token_pairs


def batches_of(sampler: TokenBatchSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_pairs_of_like_length_share_a_batch() -> None:
    # Sorted by target, then source: pairs 1 and 3 (5 + 5), pair 0 (9 + 10), pair 2 (12 + 12).
    sampler = TokenBatchSampler([9, 5, 12, 5], [10, 5, 12, 5], tokens_per_batch=24)
    assert sorted(sorted(batch) for batch in sampler) == [[0], [1, 3], [2]]
    # 20 + 19 + 24 tokens and none of them padding.
    assert sampler.padding_waste == 0


def test_padding_is_counted() -> None:
    # One batch, padded to 4 + 6 for each of two pairs: 20, of which 3 + 5 + 4 + 6 = 18 are tokens.
    sampler = TokenBatchSampler([3, 4], [5, 6], tokens_per_batch=20)
    assert len(sampler) == 1
    assert sampler.padding_waste == pytest.approx(0.1)


lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=60)


@given(lengths, st.integers(60, 300), st.integers(0, 3), st.integers(0, 5))
def test_every_pair_once_within_the_budget(pairs: list[tuple[int, int]], budget: int, seed: int, epoch: int) -> None:
    source, target = np.array(pairs).T
    batches = batches_of(TokenBatchSampler(source, target, budget, seed), epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(pairs)))
    assert all(len(batch) * (source[batch].max() + target[batch].max()) <= budget for batch in batches)


@given(lengths, st.integers(60, 300), st.integers(1, 4))
def test_processes_take_the_one_order_in_turn(pairs: list[tuple[int, int]], budget: int, processes: int) -> None:
    source, target = np.array(pairs).T
    alone = batches_of(TokenBatchSampler(source, target, budget, seed=7), epoch=3)
    shares = [
        batches_of(TokenBatchSampler(source, target, budget, 7, processes, process), epoch=3)
        for process in range(processes)
    ]
    assert {len(share) for share in shares} == {-(-len(alone) // processes)}
    taken = [batch for step in zip(*shares, strict=True) for batch in step]
    assert taken[: len(alone)] == alone
    assert taken[len(alone) :] == [alone[index % len(alone)] for index in range(len(alone), len(taken))]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    source, target = np.random.default_rng(0).integers(1, 20, (2, 200))
    first = TokenBatchSampler(source, target, 100, seed=1)
    assert batches_of(first, 4) == batches_of(TokenBatchSampler(source, target, 100, seed=1), 4)
    assert batches_of(first, 4) != batches_of(first, 5)
    assert batches_of(first, 4) != batches_of(TokenBatchSampler(source, target, 100, seed=2), 4)
    assert sorted(map(tuple, batches_of(first, 4))) == sorted(map(tuple, batches_of(first, 5)))


@pytest.mark.parametrize(
    ("source", "target", "budget", "message"),
    [
        ([], [], 100, "no sentence pairs"),
        ([1, 2], [1], 100, "2 source and 1 target lengths"),
        ([10, 60], [10, 50], 100, "pair 1 alone has 110 tokens, over the budget of 100"),
    ],
)
def test_refusals(source: list[int], target: list[int], budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBatchSampler(source, target, budget)


def test_a_process_beyond_the_number_is_refused() -> None:
    with pytest.raises(ValueError, match="process 2 of 2"):
        TokenBatchSampler([1], [1], 10, num_processes=2, process_index=2)


def test_cutting_goes_through_long_corpora_in_parts() -> None:
    rng = np.random.default_rng(0)
    source, target = rng.integers(1, 9, (2, 70_000))
    batches = list(TokenBatchSampler(source, target, 64))
    assert sorted(index for batch in batches for index in batch) == list(range(70_000))
    assert all(len(batch) * (source[batch].max() + target[batch].max()) <= 64 for batch in batches)


def of_lengths(pairs: Iterable[tuple[int, int]]) -> list[Pair]:
    """Pairs of so many tokens, each the number of its pair."""
    return [{"input_ids": [n] * source, "labels": [n] * target} for n, (source, target) in enumerate(pairs)]


def numbers(batches: Iterable[list[Pair]]) -> Iterator[list[int]]:
    return ([pair["labels"][0] for pair in batch] for batch in batches)


def a_pass(stream: TokenBatchStream, pairs: int, of: int = 0) -> list[list[int]]:
    """The batches of one pass through so many pairs."""
    batches: list[list[int]] = []
    for batch in numbers(stream):
        seen = sum(map(len, batches))
        if seen == (of + 1) * pairs:
            return [b for b, end in zip(batches, np.cumsum([len(b) for b in batches]), strict=True) if end > of * pairs]
        batches.append(batch)
    raise AssertionError("a stream does not end")


def test_a_stream_batches_pairs_of_like_length_in_each_window() -> None:
    # Windows of pairs 0 to 3 (as in the first test) and 4 to 5, which do not meet 0 to 3 though they are as long.
    pairs = of_lengths([(9, 10), (5, 5), (12, 12), (5, 5), (5, 5), (5, 5)])
    batches = a_pass(TokenBatchStream(pairs, tokens_per_batch=24, window=4), len(pairs))
    assert sorted(sorted(batch) for batch in batches[:3]) == [[0], [1, 3], [2]]
    assert sorted(batches[3]) == [4, 5]


@given(lengths, st.integers(60, 300), st.integers(0, 3), st.integers(1, 80))
def test_a_stream_has_every_pair_once_a_pass_within_the_budget(
    pairs: list[tuple[int, int]], budget: int, seed: int, window: int
) -> None:
    stream = TokenBatchStream(of_lengths(pairs), budget, seed, window=window)
    source, target = np.array(pairs).T
    for of in range(2):
        batches = a_pass(stream, len(pairs), of)
        assert sorted(number for batch in batches for number in batch) == list(range(len(pairs)))
        assert all(len(batch) * (source[batch].max() + target[batch].max()) <= budget for batch in batches)
        ends = np.cumsum([len(batch) for batch in batches])
        assert set(range(window, len(pairs), window)) <= set(ends)  # no batch holds pairs of two windows


def test_the_passes_of_a_stream_differ_and_come_back() -> None:
    pairs = of_lengths(np.random.default_rng(0).integers(1, 20, (200, 2)).tolist())
    passes = [a_pass(TokenBatchStream(pairs, 100, seed), 200, of) for seed, of in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert passes[0] == passes[3]
    assert passes[0] != passes[1]
    assert passes[0] != passes[2]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_processes_take_the_one_order_of_a_stream_in_turn(processes: int, workers: int) -> None:
    pairs = of_lengths(np.random.default_rng(0).integers(1, 20, (150, 2)).tolist())
    alone = list(numbers(islice(iter(TokenBatchStream(pairs, 90, 7, window=40)), 60)))
    for process in range(processes):
        stream = TokenBatchStream(pairs, 90, 7, processes, process, window=40)
        loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch)
        found = numbers(islice(loader, 60 // processes))
        assert list(found) == alone[process::processes]


def test_a_stream_of_datasets_is_told_its_pass() -> None:
    pairs = (
        Dataset.from_list([dict(pair) for pair in of_lengths([(3, 3)] * 64)])
        .to_iterable_dataset()
        .shuffle(seed=5, buffer_size=64)
    )
    stream = TokenBatchStream(pairs, 6)  # one pair a batch, in windows that hold them all
    alone = [pair["labels"][0] for pair in pairs]
    pairs.set_epoch(1)
    assert [pair["labels"][0] for pair in pairs] != alone
    narrow = TokenBatchStream(pairs, 6, window=1)  # in the order in which they come
    assert [number for [number] in a_pass(narrow, 64)] == alone
    assert a_pass(stream, 64) != a_pass(stream, 64, of=1)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"labels": [1], "text": "a"}, r"\['labels', 'text'\]"),
        ({"input_ids": 7, "labels": [1]}, r"\['input_ids', 'labels'\]"),
        (("a", "b"), "a row of tuple"),
        ("text", "a row of str"),
        (7, "a row of int"),
    ],
)
def test_rows_that_are_no_pairs_are_told(row: Any, found: str) -> None:
    message = f"needs the columns input_ids and labels, lists of tokens, got {found}"
    with pytest.raises(ValueError, match=message):
        next(iter(TokenBatchStream([row], 10)))


def test_streams_that_are_refused() -> None:
    with pytest.raises(ValueError, match="batches: the stream has no sentence pairs; check the corpus"):
        next(iter(TokenBatchStream([], 10)))
    batches = numbers(TokenBatchStream(iter(of_lengths([(2, 2)])), 10))
    assert next(batches) == [0]
    with pytest.raises(ValueError, match="batches: the stream came to its end and cannot be read again"):
        next(batches)
    pairs = of_lengths([(2, 2), (3, 3), (9, 9)])
    with pytest.raises(ValueError, match="batches: pair 2 alone has 18 tokens, over the budget of 10; raise tokens"):
        list(islice(TokenBatchStream(pairs, 10, window=2), 3))


def test_lengths_come_from_their_columns_or_the_tokens() -> None:
    rows = [{"input_ids": [5, 1], "labels": [6, 7, 1], "source_length": 2, "target_length": 3}] * 2
    with_lengths = Dataset.from_list(rows)
    tokens_alone = with_lengths.remove_columns(["source_length", "target_length"])
    for dataset in (with_lengths, with_lengths.select([1, 0]), tokens_alone, rows):
        assert [list(side) for side in pair_lengths(dataset)] == [[2, 2], [3, 3]]
    with pytest.raises(ValueError, match=r"needs the columns input_ids and labels, lists of tokens, got \['labels'\]"):
        pair_lengths(tokens_alone.remove_columns(["input_ids"]))


@pytest.mark.parametrize("kind", ["columns", "frame", "series", "splits"])
def test_what_has_no_rows_by_number_is_one_line(kind: str) -> None:
    pairs = token_pairs(4)
    dataset: Any = {
        "columns": pairs.to_dict(),
        "frame": pairs.to_pandas(),
        "series": pairs.to_pandas().apply(dict, axis=1).set_axis([0, 2, 4, 6]),
        "splits": DatasetDict({"train": pairs}),
    }[kind]
    with pytest.raises(ValueError, match=r"^tokens_per_batch: rows are read by their number, from 0, and this "):
        pair_lengths(dataset)
