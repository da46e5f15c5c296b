"""Token batches: the budget, the order, and the processes that share it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nmsparse.batching import TokenBatchSampler


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
