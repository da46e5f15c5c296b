"""Batches by token budget: sentence pairs of like length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

__all__ = ["TokenBatchSampler"]


class TokenBatchSampler(Sampler[list[int]]):
    """Yields batches of pair indices whose padded source and target tokens together fit a budget.

    Pairs are sorted by length and cut into batches once, by ``seed``; every epoch shuffles the order of the batches.
    So an epoch always has the same number of steps, and which batches a step sees depends on seed and epoch alone:
    with P processes, step k of process p takes batch ``k * P + p`` of the same order that one process would see.

    Args:
        source_lengths: Tokens of each source sentence, special tokens counted.
        target_lengths: The same of each target sentence.
        tokens_per_batch: Budget of a batch: sentences x (longest source + longest target).
        seed: Seed of the sorting of equal lengths and of the shuffles.
        num_processes: Processes that share the batches. Where their number does not divide the batches, the first
            batches of the epoch serve again, so that all processes take the same number of steps.
        process_index: Which of them this is.

    Raises:
        ValueError: There are no pairs, the two lists differ in length, or a pair exceeds the budget by itself.
    """

    def __init__(
        self,
        source_lengths: Sequence[int] | np.ndarray,
        target_lengths: Sequence[int] | np.ndarray,
        tokens_per_batch: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        # 32 bits: of millions of pairs this is what the start of a training holds in memory.
        source, target = np.asarray(source_lengths, np.int32), np.asarray(target_lengths, np.int32)
        if len(source) != len(target):
            raise ValueError(f"batches: {len(source)} source and {len(target)} target lengths; pair them")
        if not len(source):
            raise ValueError("batches: no sentence pairs; check the corpus and its length filter")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"batches: process {process_index} of {num_processes}; count from 0")
        longest = int((source + target).argmax())
        if source[longest] + target[longest] > tokens_per_batch:
            raise ValueError(
                f"batches: pair {longest} alone has {source[longest] + target[longest]} tokens, over the budget of "
                f"{tokens_per_batch}; raise tokens_per_batch or truncate"
            )
        self.seed, self.num_processes, self.process_index = seed, num_processes, process_index
        self.epoch = 0
        shuffled = np.random.default_rng(seed).permutation(len(source)).astype(np.int32)
        order = shuffled[np.lexsort((source[shuffled], target[shuffled]))]
        self._batches = _fill(order, source[order], target[order], tokens_per_batch)
        padded = sum(len(batch) * int(source[batch].max() + target[batch].max()) for batch in self._batches)
        self.padding_waste = 1 - int(source.sum(dtype=np.int64) + target.sum(dtype=np.int64)) / padded

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._batches) // self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self._batches))
        for start in range(0, len(order), self.num_processes):
            index = (start + self.process_index) % len(order)
            yield self._batches[order[index]].tolist()


def _fill(order: np.ndarray, source: np.ndarray, target: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cuts ``order`` into consecutive batches, each as large as the budget allows."""
    batches, start, longest_source, longest_target = [], 0, 0, 0
    for index, (source_length, target_length) in enumerate(zip(_numbers(source), _numbers(target), strict=True)):
        longest_source = max(longest_source, source_length)
        longest_target = max(longest_target, target_length)
        if (index + 1 - start) * (longest_source + longest_target) > budget:
            batches.append(order[start:index])
            start, longest_source, longest_target = index, source_length, target_length
    batches.append(order[start:])
    return batches


def _numbers(lengths: np.ndarray, at_a_time: int = 65_536) -> Iterator[int]:
    """The elements as numbers of Python: single elements of an array take several times as long."""
    for start in range(0, len(lengths), at_a_time):
        yield from lengths[start : start + at_a_time].tolist()
