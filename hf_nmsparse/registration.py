"""What others have to know of this package: transformers its format and its pipeline, torch its operators.

They are told when they are imported, or their part that keeps such a list: that takes seconds that a process may never
need.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["register"]


def register() -> None:
    """Registers operators, loader and pipeline, now or as soon as torch and transformers are ready for them."""
    _after_import(
        {
            "torch": _register_operators,
            "transformers.quantizers.auto": _register_format,
            "transformers.pipelines": _register_pipeline,
        }
    )


def _register_operators() -> None:
    """Programs that torch.export saved name the operators; whoever loads one may use nothing else of this package.

    Where it is a module of ours that imports torch, as the first thing it does, it has the operators registered itself
    if it needs them: they need such modules whole, whose `__all__` comes after their imports.
    """
    ours = [module for name, module in sys.modules.items() if name.startswith("hf_nmsparse.")]
    if all(hasattr(module, "__all__") or hasattr(module, "__path__") for module in ours):
        import hf_nmsparse.kernels.rounded  # noqa: F401  # registers itself


def _register_format() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    import hf_nmsparse.quantization_config  # noqa: F401  # registers itself

    AUTO_QUANTIZER_MAPPING.setdefault("nmsparse", _quantizer)  # type: ignore[arg-type]  # called as a class is


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """The loader, which takes part of transformers' models along and is imported with the first of them."""
    from hf_nmsparse.quantizer import NMSparseQuantizer

    return NMSparseQuantizer(*args, **kwargs)


def _register_pipeline() -> None:
    import hf_nmsparse.pipeline  # noqa: F401  # registers itself


def _after_import(actions: Mapping[str, Callable[[], None]]) -> None:
    """Runs the action of each module once the module has been imported, in whatever way and by whomever."""
    waiting = dict(actions)
    for name in [name for name in waiting if name in sys.modules]:
        waiting.pop(name)()
    if waiting:
        # The first to be asked: a finder behind those of Python would not be asked at all.
        sys.meta_path.insert(0, _Watch(waiting))


class _Watch(MetaPathFinder):
    """Finds modules where they are, and has them run an action at the end of their import."""

    def __init__(self, actions: dict[str, Callable[[], None]]) -> None:
        self._actions = actions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        action = self._actions.pop(fullname, None)  # so that the next line does not come here again
        if action is None:
            return None
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, action)
        return spec


class _Then(Loader):
    """A module's own loader, and an action after it."""

    def __init__(self, loader: Any, action: Callable[[], None]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # as if nobody had watched
        self._loader.exec_module(module)
        self._action()
