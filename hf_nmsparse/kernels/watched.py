"""Whether a tensor has changed since something was made of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

__all__ = ["WatchedParameter", "state_of", "watch"]


class WatchedParameter(nn.Parameter):
    """A parameter that counts what may have changed it: an ``nn.Parameter`` whose class is changed in place.

    torch counts what happens to a tensor in place, but not what happens through ``data``: whoever asks for that may
    write to it, so asking counts as a change. Nor does it count what fused optimizers do, so that each step of an
    optimizer counts as one. What nobody can count are later writes through memory that was handed out before: through
    ``data`` kept from an earlier call, NumPy or DLPack. Ask for ``data`` once more after these.
    """

    _changes = 0

    @property
    def data(self) -> Tensor:
        """As torch's."""
        self._changes += 1
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        self._changes += 1
        nn.Parameter.data.__set__(self, value)  # type: ignore[attr-defined]

    def __getstate__(self) -> None:
        """Nothing: other processes count for themselves."""

    @property
    def changes(self) -> int:
        """How many times it may have changed in ways that torch does not count."""
        return self._changes

    def may_change(self) -> None:
        """To be called around changes that torch does not count."""
        self._changes += 1

    def to_parameter(self) -> None:
        """Turns it back into an ``nn.Parameter``."""
        self.__dict__.clear()
        self.__class__ = nn.Parameter  # type: ignore[assignment]


def watch(tensor: Tensor) -> None:
    """Has changes of ``tensor`` counted from now on, if it is a plain parameter."""
    if type(tensor) is nn.Parameter and not tensor.is_inference():
        tensor.__class__ = WatchedParameter


def state_of(tensor: Tensor) -> tuple[int, int, int]:
    """What differs once ``tensor`` has changed; of a parameter, if it is watched.

    Raises:
        RuntimeError: It was made in inference mode, where nothing is counted.
    """
    changes = tensor.changes if isinstance(tensor, WatchedParameter) else 0
    return changes, tensor._version, tensor.data_ptr()


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Counts the step of an optimizer as a change of every parameter that it holds."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, WatchedParameter):
                parameter.may_change()


register_optimizer_step_post_hook(_count_step)
