"""NMSparseConfig: what is made sparse, and in which pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from hf_nmsparse.pattern import NMPattern

__all__ = ["DEFAULT_IGNORE", "NMSparseConfig"]

DEFAULT_IGNORE: tuple[str, ...] = (
    "lm_head",
    "output_projection",
    "router",
    "classifier",
    "classification_head",
    "class_labels_classifier",
    "bbox_predictor",
    "score",
    "qa_outputs",
)
"""Output heads and mixture-of-experts routers: dense everywhere in the field. A rule here may match nothing."""


@dataclass(frozen=True)
class NMSparseConfig:
    """Which layers of a model become N:M sparse.

    A rule names layers by their dotted path in the model: either a shell pattern over the whole path
    (``"model.encoder.*"``) or the end of the path (``"fc1"``, ``"self_attn.q_proj"``); whatever lies below a module
    that matches is matched too.

    Args:
        pattern: ``"2:4"`` or an `NMPattern`.
        targets: Rules for the layers to make sparse; None takes every ``nn.Linear``, and with ``convolutions`` every
            convolution.
        ignore: Rules for layers that stay dense; None takes `DEFAULT_IGNORE`. The model's output head and tied
            weights stay dense in any case.
        soft: Whether kept weights move towards zero by the largest magnitude that is pruned in their group, which
            ``sparse_method="s-ste"`` trains. A packed file holds the result, and no word of it.
        convolutions: Whether ``nn.Conv1d``, ``nn.Conv2d`` and transformers' ``Conv1D`` are taken beside ``nn.Linear``,
            with groups along their input channels for each output channel and place of the kernel.
        transposable: Whether masks are 2:4 along the rows of a weight and along its columns, so that its transpose is
            2:4 too. A packed file holds the result, and no word of it.

    Raises:
        ValueError: The pattern is none, a rule list is empty or holds something other than names, ``soft``,
            ``convolutions`` or ``transposable`` is neither true nor false, or ``transposable`` comes with another
            pattern than 2:4, or with one of the other two.
    """

    pattern: NMPattern
    targets: tuple[str, ...] | None
    ignore: tuple[str, ...] | None
    soft: bool
    convolutions: bool
    transposable: bool

    def __init__(
        self,
        pattern: str | NMPattern = "2:4",
        targets: Iterable[str] | None = None,
        ignore: Iterable[str] | None = None,
        soft: bool = False,
        convolutions: bool = False,
        transposable: bool = False,
    ) -> None:
        object.__setattr__(self, "pattern", NMPattern.parse(pattern))
        object.__setattr__(self, "targets", _rules("targets", targets))
        object.__setattr__(self, "ignore", _rules("ignore", ignore))
        if self.targets == ():
            raise ValueError("config: targets is empty, so no layer would be sparse; leave it out to take every Linear")
        for name, switch in (("soft", soft), ("convolutions", convolutions), ("transposable", transposable)):
            if not isinstance(switch, bool):
                raise ValueError(f"config: {name} is true or false, got {switch!r}")
            object.__setattr__(self, name, switch)
        if transposable and (self.pattern != NMPattern(2, 4) or soft or convolutions):
            raise ValueError(
                f"config: transposable masks are 2:4 masks of linear layers without a soft threshold, got pattern "
                f"{self.pattern}, soft={soft} and convolutions={convolutions}; leave one of them out"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NMSparseConfig:
        """Reads the record that `to_dict` writes.

        Raises:
            ValueError: A key is unknown.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"config: unknown key {unknown[0]!r}; known keys are {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON and YAML hold it; fields left at their default are not written."""
        record: dict[str, Any] = {"pattern": str(self.pattern)}
        if self.targets is not None:
            record["targets"] = list(self.targets)
        if self.ignore is not None:
            record["ignore"] = list(self.ignore)
        return record | {name: True for name in ("soft", "convolutions", "transposable") if getattr(self, name)}


def _rules(field: str, rules: Iterable[str] | None) -> tuple[str, ...] | None:
    if rules is None:
        return None
    if isinstance(rules, Mapping) or not isinstance(rules, Iterable):
        raise ValueError(f"config: {field} is a list of layer names such as 'fc1', got {rules!r}")
    listed = (rules,) if isinstance(rules, str) else tuple(rules)
    for rule in listed:
        if not isinstance(rule, str) or not rule:
            raise ValueError(f"config: {field} holds layer names such as 'fc1', got {rule!r}")
    return listed
