"""When masks and lambda change: pure functions of the step."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """The course of a sparse training. Times are fractions of all optimizer steps, but the interval.

    Attributes:
        ramp: lambda grows linearly from 0 over this part, counted from the end of the dense head (AST takes a
            quarter).
        interval: Masks are ranked anew every so many optimizer steps (2by4-pretrain takes 40).
        dense_head: This first part is dense in the forward, as in STEP. There is no decay in it.
        dense_tail: This last part is dense again, as in FST, and so is the model that comes out.
        fade: After the dense head, pruned weights fade out of the forward over this part: they are multiplied with a
            number that falls linearly from 1 to 0 (Kao et al. 2022).

    Raises:
        ValueError: A fraction lies outside of 0 to 1, they do not fit into one run, or the interval is below 1.
    """

    ramp: float = 0.0
    interval: int = 1
    dense_head: float = 0.0
    dense_tail: float = 0.0
    fade: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "interval":
                if value < 1 or value != int(value):
                    raise ValueError(f"schedule: interval counts steps from 1, got {value!r}")
            elif not 0 <= value <= 1:
                raise ValueError(f"schedule: {field.name} is a fraction of the run from 0 to 1, got {value!r}")
        for part in ("ramp", "fade"):
            total = self.dense_head + getattr(self, part) + self.dense_tail
            if total > 1:
                raise ValueError(
                    f"schedule: dense_head, {part} and dense_tail take {total:g} of the run together; shorten one"
                )
        if self.dense_head + self.dense_tail == 1:
            raise ValueError("schedule: dense_head and dense_tail leave nothing sparse; choose sparse_method 'dense'")

    @property
    def needs_length(self) -> bool:
        """Whether something depends on how many steps the run has."""
        return bool(self.ramp or self.dense_head or self.dense_tail or self.fade)

    def decay(self, decay: float, step: int, steps: int) -> float:
        """Lambda in optimizer step ``step`` of ``steps``, counted from 0; ``decay`` is its full value."""
        if self.pruned_scale(step, steps) == 1:
            return 0.0
        since_head = step - self.dense_head * steps
        return decay if since_head >= self.ramp * steps else decay * since_head / (self.ramp * steps)

    def pruned_scale(self, step: int, steps: int) -> float:
        """What the forward multiplies pruned weights with in step ``step`` of ``steps``: 0 is N:M, 1 is dense.

        ``step`` is ``steps`` after the last one: what holds for the trained model.
        """
        since_head = step - self.dense_head * steps
        if since_head < 0 or (self.dense_tail and step >= (1 - self.dense_tail) * steps):
            return 1.0
        return 0.0 if since_head >= self.fade * steps else 1 - since_head / (self.fade * steps)

    def renews_masks(self, step: int) -> bool:
        """Whether masks are ranked anew after step ``step``, counted from 0."""
        return (step + 1) % self.interval == 0
