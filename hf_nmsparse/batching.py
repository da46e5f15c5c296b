"""Batches by token budget: sentence pairs of like length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Sampler, get_worker_info

__all__ = ["TokenBatchSampler", "TokenBatchStream", "is_stream", "is_table", "pair_length", "pair_lengths"]

Pair = Mapping[str, Any]


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
        self.seed, self.num_processes, self.process_index = seed, num_processes, process_index
        self.epoch = 0
        self._batches = _batches(source, target, tokens_per_batch, np.random.default_rng(seed))
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


class TokenBatchStream(IterableDataset[list[Pair]]):
    """Yields batches of pairs, cut by token budget, of a corpus that is read as it comes.

    A window of pairs is read, cut into batches as `TokenBatchSampler` cuts a corpus, and yielded in shuffled order;
    then the next. The corpus is read again and again, so that the batches never end, and another pass cuts and shuffles
    otherwise. They depend on pairs and seed alone: of P processes all read the whole corpus, and of the one order that
    one process would see, step k of process p takes batch ``k * P + p``. A loader reads it itself or in one worker.

    Args:
        pairs: Mappings with ``input_ids`` and ``labels``; what can be read more than once, such as a
            ``datasets.IterableDataset``, whose own shuffling is told the number of the pass.
        tokens_per_batch: As `TokenBatchSampler` takes it.
        seed: Seed of the shuffles.
        num_processes: Processes that share the batches.
        process_index: Which of them this is.
        window: Pairs in memory at a time.

    Raises:
        ValueError: While it is read: a pass has no pairs, a row is no pair, or a pair exceeds the budget by itself.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        tokens_per_batch: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        window: int = 20_000,
    ) -> None:
        self.pairs, self.tokens_per_batch, self.seed, self.window = pairs, tokens_per_batch, seed, window
        self.num_processes, self.process_index = num_processes, process_index

    def __iter__(self) -> Iterator[list[Pair]]:
        reader = get_worker_info()
        assert reader is None or reader.num_workers == 1  # a ``datasets.IterableDataset`` would share its files out
        return islice(self._endless(), self.process_index, None, self.num_processes)

    def _endless(self) -> Iterator[list[Pair]]:
        read = 0  # in the passes so far
        for epoch in range(2**62):
            if hasattr(self.pairs, "set_epoch"):
                self.pairs.set_epoch(epoch)
            random, pairs, before = np.random.default_rng((self.seed, epoch)), iter(self.pairs), read
            while window := list(islice(pairs, self.window)):
                lengths = np.array([pair_length(pair) for pair in window], np.int32)
                source, target = lengths.T
                batches = _batches(source, target, self.tokens_per_batch, random, read - before)
                for place in random.permutation(len(batches)):
                    yield [window[pair] for pair in batches[place]]
                read += len(window)
            if read == before:
                raise ValueError(
                    "batches: the stream has no sentence pairs; check the corpus and its length filter"
                    if not epoch
                    else "batches: the stream came to its end and cannot be read again; give one that can"
                )


def pair_length(pair: Pair) -> tuple[int, int]:
    """Source and target tokens of a pair.

    Raises:
        ValueError: It has no lists of tokens under ``input_ids`` and ``labels``.
    """
    try:
        return len(pair["input_ids"]), len(pair["labels"])
    except (KeyError, TypeError, IndexError):
        found = sorted(pair) if isinstance(pair, Mapping) else f"a row of {type(pair).__name__}"
        raise ValueError(
            f"tokens_per_batch: the dataset needs the columns input_ids and labels, lists of tokens, got {found}"
        ) from None


def _batches(
    source: np.ndarray, target: np.ndarray, budget: int, random: np.random.Generator, before: int = 0
) -> list[np.ndarray]:
    """The places of pairs in batches of like length, of which ``before`` others stand before these in their corpus."""
    longest = int((source + target).argmax())
    if source[longest] + target[longest] > budget:
        raise ValueError(
            f"batches: pair {before + longest} alone has {source[longest] + target[longest]} tokens, over the budget "
            f"of {budget}; raise tokens_per_batch or truncate"
        )
    shuffled = random.permutation(len(source)).astype(np.int32)
    order = shuffled[np.lexsort((source[shuffled], target[shuffled]))]
    return _fill(order, source[order], target[order], budget)


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


def is_stream(dataset: Any) -> bool:
    """Whether a dataset is read from its beginning to its end, and not by the number of a row."""
    by_number = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return isinstance(dataset, IterableDataset) or not by_number


def is_table(dataset: Any) -> bool:
    """Whether it is a ``datasets.Dataset``; that package need not be installed."""
    return hasattr(dataset, "select_columns") and hasattr(dataset, "__len__")


def pair_lengths(dataset: Any) -> tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]:
    """Tokens of the source and target sentences of a tokenised dataset, from its length columns if it has them.

    Args:
        dataset: A `datasets.Dataset`, a list of mappings, or what else has a length and gives rows by their number.

    Raises:
        ValueError: The rows have neither the length columns nor ``input_ids`` and ``labels``, or no numbers.
    """
    first = _row(dataset, 0) if len(dataset) else None
    known = isinstance(first, Mapping) and {"source_length", "target_length"} <= first.keys()
    if known and is_table(dataset):  # millions of numbers, which row by row would take minutes
        read = dataset.select_columns(["source_length", "target_length"]).with_format("numpy")[:]
        return read["source_length"], read["target_length"]
    rows = (_row(dataset, number) for number in range(len(dataset)))  # not all datasets of torch end an iteration
    pairs = [(int(row["source_length"]), int(row["target_length"])) if known else pair_length(row) for row in rows]
    return [source for source, _ in pairs], [target for _, target in pairs]


def _row(dataset: Any, number: int) -> Any:
    try:
        return dataset[number]
    except KeyError as error:
        raise ValueError(
            f"tokens_per_batch: rows are read by their number, from 0, and this {type(dataset).__name__} has no row "
            f"{number}; give a list of rows, or one split of a datasets.Dataset"
        ) from error
