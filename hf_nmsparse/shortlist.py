"""Vocabulary shortlists: which target tokens go with a source token, learned from pairs of sentences.

The head of a translation model computes a number for each token of its vocabulary at each step, and a sentence needs a
few hundred of them. The engine computes those alone that go with one of the sentence's tokens, and those that are
always there (Jean et al., ACL 2015, section 3.3; Marian's ``--shortlist``). What goes with a token is learned by IBM
Model 1 (Brown et al., 1993). This needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hf_nmsparse.files import named_path, replaced

__all__ = ["FILE", "Shortlist", "coverage", "learn", "read", "save"]

FILE = "shortlist.safetensors"
"""In the folder of the model: ``offsets``, ``ids`` and ``always`` of `Shortlist`."""

_ROUNDS = 5  # of expectation and maximisation; more changes the lists by little
_TYPES = {"offsets": np.int64, "ids": np.int32, "always": np.int32}

Array = NDArray[Any]
Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Shortlist:
    """Candidates for each source token.

    Attributes:
        offsets: int64 ``[source vocabulary + 1]``, where the list of each source token begins in ``ids``.
        ids: int32, target tokens.
        always: int32, target tokens that are candidates of every sentence.
    """

    offsets: Array
    ids: Array
    always: Array

    def candidates(self, source: Sequence[int]) -> Array:
        """The target tokens that a sentence may be translated with, ascending."""
        lists = [self.ids[self.offsets[token] : self.offsets[token + 1]] for token in source]
        return np.unique(np.concatenate([self.always, *lists]))


def learn(
    pairs: Iterable[Pair],
    source_vocabulary: int,
    target_vocabulary: int,
    *,
    keep: Collection[int],
    per_token: int = 100,
    always: int = 1000,
    copies: bool = True,
) -> Shortlist:
    """Learns a shortlist. It takes some 16 bytes of memory for each two tokens of a pair that may go together.

    The most frequent target tokens are always there, so that they take no room in a list and no time: the lists are
    learned from the other tokens of the targets.

    Args:
        pairs: Token ids of a source and of its target, for each pair of sentences.
        source_vocabulary: How many tokens the encoder has.
        target_vocabulary: How many tokens the head has.
        keep: Target tokens that are always there, such as EOS.
        per_token: The longest list.
        always: How many tokens are always there, with ``keep``.
        copies: Whether a source token may be copied: both sides have one vocabulary.

    Raises:
        ValueError: There are no pairs, an id is none of a vocabulary, or a number makes no sense.
    """
    if per_token < 1 or always < 1:
        raise ValueError(f"shortlist: per_token and always need at least 1, got {per_token} and {always}")
    sources, targets = [], []
    for source, target in pairs:  # how often a sentence has a token says nothing of what it goes with
        sources.append(_ids(source, source_vocabulary, "source"))
        targets.append(_ids(target, target_vocabulary, "target"))
    if not sources:
        raise ValueError("shortlist: there are no pairs to learn from")
    kept = _always(targets, target_vocabulary, _ids(keep, target_vocabulary, "kept"), always)
    listed = np.ones(target_vocabulary, bool)
    listed[kept] = False
    rows, columns, score = _translations(sources, [row[listed[row]] for row in targets], target_vocabulary)
    if copies:
        same = np.flatnonzero(listed[: min(source_vocabulary, target_vocabulary)])
        others = rows != columns
        rows, columns = np.concatenate([rows[others], same]), np.concatenate([columns[others], same])
        score = np.concatenate([score[others], np.full(len(same), np.inf)])
    return Shortlist(*_best(rows, columns, score, source_vocabulary, per_token), kept)


def _ids(tokens: Collection[int], vocabulary: int, name: str) -> Array:
    row = np.unique(np.fromiter(tokens, np.int64, len(tokens)))
    if row.size and not 0 <= row[0] <= row[-1] < vocabulary:
        raise ValueError(
            f"shortlist: {name} tokens are below {vocabulary}, got {row[-1] if row[0] >= 0 else row[0]}; take the "
            "model's own tokenizer"
        )
    return row


def _always(targets: list[Array], vocabulary: int, keep: Array, count: int) -> Array:
    """The kept tokens and the most frequent ones."""
    frequency = np.bincount(np.concatenate(targets), minlength=vocabulary)
    frequency[keep] = np.iinfo(frequency.dtype).max
    often = np.argsort(-frequency, kind="stable")[: max(count, len(keep))]
    return np.sort(often[frequency[often] > 0]).astype(np.int32)


def _translations(sources: list[Array], targets: list[Array], vocabulary: int) -> tuple[Array, Array, Array]:
    """Model 1: source tokens, target tokens, and the probability of the one to stand for the other."""
    keys = np.concatenate(
        [(s[None, :] * vocabulary + t[:, None]).ravel() for s, t in zip(sources, targets, strict=True)]
    )
    # Which target token of which pair an entry belongs to: one of the source's tokens has made it.
    place = np.repeat(
        np.arange(sum(map(len, targets)), dtype=np.int64),
        np.repeat([len(row) for row in sources], [len(row) for row in targets]),
    )
    entries, entry = np.unique(keys, return_inverse=True)
    rows, columns = entries // vocabulary, entries % vocabulary
    probability: Array = np.ones(len(entries))
    for _ in range(_ROUNDS):
        weight = probability[entry]
        share = weight / np.bincount(place, weight)[place] if len(place) else weight
        count = np.bincount(entry, share, len(entries))
        probability = count / np.bincount(rows, count)[rows] if len(rows) else count
    return rows, columns, probability


def _best(rows: Array, columns: Array, score: Array, vocabulary: int, most: int) -> tuple[Array, Array]:
    """The best columns of each row: where each row begins, and the columns, ascending."""
    order = np.lexsort((columns, -score, rows))
    rows, columns = rows[order], columns[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    rows, columns = rows[rank < most], columns[rank < most]
    offsets = np.searchsorted(rows, np.arange(vocabulary + 1)).astype(np.int64)
    return offsets, columns[np.lexsort((columns, rows))].astype(np.int32)


def coverage(shortlist: Shortlist, pairs: Sequence[Pair]) -> tuple[float, float]:
    """How many candidates a sentence has on average, and the share of the targets' tokens that are among them."""
    kept, found, count = 0, 0, 0
    for source, target in pairs:
        candidates = shortlist.candidates(source)
        kept, found, count = kept + len(candidates), found + int(np.isin(target, candidates).sum()), count + len(target)
    return kept / len(pairs), found / max(count, 1)


def save(shortlist: Shortlist, folder: str | Path) -> Path:
    """Writes ``shortlist`` into the folder of its model, whole or not at all."""
    path = named_path(folder, "shortlist: folder") / FILE
    tensors = {name: np.ascontiguousarray(getattr(shortlist, name), dtype) for name, dtype in _TYPES.items()}
    with replaced(path) as beside:
        save_file(tensors, beside)
    return path


def read(folder: str | Path) -> Shortlist | None:
    """The shortlist in the folder of a model; None where there is none.

    Whether it is of that model `Engine.use_shortlist` checks, which knows the vocabularies.

    Raises:
        ValueError: The file is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, f"it is no whole safetensors file ({str(error).splitlines()[0]})") from None
    if tensors.keys() != _TYPES.keys():
        raise _damaged(path, f"it holds {', '.join(_TYPES)}, got {', '.join(sorted(tensors)) or 'nothing'}")
    for name, dtype in _TYPES.items():
        if tensors[name].dtype != dtype or tensors[name].ndim != 1:
            raise _damaged(
                path, f"{name} is a row of {np.dtype(dtype)}, got {tensors[name].shape} of {tensors[name].dtype}"
            )
    offsets, ids, always = (tensors[name] for name in _TYPES)
    if not offsets.size or offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
        raise _damaged(path, f"offsets rise from 0 to {len(ids)}, the number of ids")
    if not always.size or min(always.min(), ids.min(initial=0)) < 0:
        raise _damaged(path, "tokens are 0 and above, and some are always there")
    return Shortlist(offsets, ids, always)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"shortlist: {path}: {why}; learn it again with nmsparse shortlist")
