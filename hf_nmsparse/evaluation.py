"""Evaluation: the record of an evaluated run, from which every number on a card or in a table comes."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import torch

from hf_nmsparse.files import named_path, replaced
from hf_nmsparse.kernels import library
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.version import __version__

if TYPE_CHECKING:
    from hf_nmsparse.metrics import Comparison, Score

__all__ = ["Evaluation", "evaluation_record", "versions"]


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the vector unit of the kernels; "none" for what is not installed."""
    packages = ("torch", "transformers", "accelerate", "datasets", "sacrebleu")
    return {
        "python": platform.python_version(),
        "hf_nmsparse": __version__,
        **{package: _version(package) for package in packages},
        "kernels": library.status().unit or "none",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@dataclass(frozen=True)
class Evaluation:
    """The record of one evaluated run; as JSON it is the source of every number on a model card.

    Attributes:
        corpus: The corpus, as `load_corpus` takes it.
        split: The part of the corpus that is scored.
        model: A few words on the model, such as "Transformer base, 6+6 layers".
        method: How it was trained: a name in `METHODS`, or "dense".
        seed: Seed of the training.
        steps: Optimizer steps of the training.
        bleu: As in `Score`; so are the next four.
        chrf: chrF2.
        signature: Signature of BLEU.
        chrf_signature: Signature of chrF.
        sentences: Sentences scored.
        dense_bytes: Size of the weights in a dense file of the same number type.
        packed_bytes: Size of the weights in the packed file; None for a dense model.
        pattern: N:M; None for a dense model.
        targets: The rules that chose the sparse layers; None where every linear layer was taken.
        decay: lambda of SR-STE; None where the method has none.
        options: What the run has beside: its start, schedule and distillation, by the names of the recipe's arguments.
        values: Number type in the file: fp32, fp16, bf16 or int8.
        base_model: The model it was trained from; None for training from scratch.
        train_seconds: Wall time of the training.
        flip_rate: Fraction of mask entries that a step changed at the end of the training.
        validation_loss: Loss on the validation split at the end of the training, before checkpoints are averaged.
        against_dense: ``bleu_dense``, ``difference``, ``interval``, ``p``, ``verdict``, ``samples`` and ``seed`` of
            `compare`; None where nothing was compared.
        threads: CPU threads of torch.
        versions: See `versions`.
    """

    corpus: str
    split: str
    model: str
    method: str
    seed: int
    steps: int
    bleu: float
    chrf: float
    signature: str
    chrf_signature: str
    sentences: int
    dense_bytes: int
    packed_bytes: int | None = None
    pattern: str | None = None
    targets: list[str] | None = None
    decay: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    values: str | None = None
    base_model: str | None = None
    train_seconds: float | None = None
    flip_rate: float | None = None
    validation_loss: float | None = None
    against_dense: dict[str, Any] | None = None
    threads: int = field(default_factory=torch.get_num_threads)
    versions: dict[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        if self.pattern is not None:
            NMPattern.parse(self.pattern)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], where: str = "evaluation") -> Evaluation:
        """Reads the record that `to_dict` writes.

        Args:
            record: The record, with every key.
            where: How errors name it.

        Raises:
            ValueError: A key is unknown or missing, or a value is of the wrong type.
        """
        known = {entry.name for entry in fields(cls)}
        for problem, keys in (("unknown", set(record) - known), ("missing", known - set(record))):
            if keys:
                raise ValueError(f"{where}: key {min(keys)!r} is {problem}; write the file with Evaluation.write")
        try:
            return cls(**record)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return asdict(self)

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """Reads a file that `write` wrote.

        Raises:
            ValueError: It is no such file; the message names it.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}: an evaluation is one JSON object, got {type(record).__name__}")
        return cls.from_dict(record, str(path))

    def write(self, path: str | Path) -> None:
        """Writes the record as JSON with sorted keys, one a line; folders are made as needed."""
        with replaced(named_path(path, "evaluation: path")) as file:
            file.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def evaluation_record(result: Score, against_dense: Comparison | None = None, **run: Any) -> Evaluation:
    """The record of a run from its scores and the facts about it.

    Args:
        result: The scores of the files that are published.
        against_dense: The comparison with the dense model.
        **run: The other fields of `Evaluation`; those with a default may be left out.

    Raises:
        ValueError: A field is unknown or missing, or the comparison scored something else.
    """
    known = {entry.name: entry for entry in fields(Evaluation) if entry.name not in {*asdict(result), "against_dense"}}
    required = {name for name, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING}
    for problem, keys in (("unknown", set(run) - set(known)), ("missing", required - set(run))):
        if keys:
            raise ValueError(f"evaluation_record: {min(keys)!r} is {problem}; the fields are {', '.join(known)}")
    test = None
    if against_dense is not None:
        if (against_dense.bleu, against_dense.sentences) != (result.bleu, result.sentences):
            raise ValueError(
                f"evaluation_record: the comparison is of BLEU {against_dense.bleu:.2f} on {against_dense.sentences} "
                f"sentences, the score of {result.bleu:.2f} on {result.sentences}; compare the same translations"
            )
        test = {
            "bleu_dense": against_dense.bleu_baseline,
            "difference": against_dense.difference,
            "interval": list(against_dense.interval),
            "p": against_dense.p,
            "verdict": against_dense.verdict,
            "samples": against_dense.samples,
            "seed": against_dense.seed,
        }
    return Evaluation(**asdict(result), against_dense=test, **run)


def _check_type(name: str, value: Any, hint: Any) -> None:
    allowed = tuple(get_origin(option) or option for option in get_args(hint) if NoneType in get_args(hint))
    allowed = allowed or (get_origin(hint) or hint,)
    if float in allowed:
        allowed += (int,)
    if (
        not isinstance(value, allowed)
        or isinstance(value, bool)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        expected = " or ".join("null" if option is NoneType else option.__name__ for option in allowed)
        raise ValueError(f"{name} is {expected}, got {value!r}")
