"""N:M sparse translation models for Hugging Face Transformers.

After ``import hf_nmsparse`` transformers knows two things: the loader, so that ``from_pretrained`` reads packed N:M
checkpoints, and the pipeline ``"nmt-translation"``. Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_nmsparse import registration
from hf_nmsparse.version import __version__ as __version__

if TYPE_CHECKING:
    from hf_nmsparse.calibration import Calibration
    from hf_nmsparse.compute import set_compute
    from hf_nmsparse.config import NMSparseConfig
    from hf_nmsparse.optimizer import SparseStep
    from hf_nmsparse.packed_format import PackedFormatError
    from hf_nmsparse.pattern import NMPattern
    from hf_nmsparse.pipeline import NMTranslationPipeline
    from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
    from hf_nmsparse.quantizer import prepare_for_training
    from hf_nmsparse.saving import export_dense, push_to_hub, save_packed
    from hf_nmsparse.sparse_model import finalize, report, sparsify
    from hf_nmsparse.trainer import SparseTrainer
    from hf_nmsparse.trainer_mixin import SparseTrainerMixin
    from hf_nmsparse.training_arguments import SparseTrainingArguments
    from hf_nmsparse.translations import Translation
    from hf_nmsparse.translator import Translator

__all__ = [
    "Calibration",
    "NMPattern",
    "NMSparseConfig",
    "NMSparseQuantizationConfig",
    "NMTranslationPipeline",
    "PackedFormatError",
    "SparseStep",
    "SparseTrainer",
    "SparseTrainerMixin",
    "SparseTrainingArguments",
    "Translation",
    "Translator",
    "export_dense",
    "finalize",
    "prepare_for_training",
    "push_to_hub",
    "report",
    "save_packed",
    "set_compute",
    "sparsify",
]

_HOMES = {
    "Calibration": "calibration",
    "NMPattern": "pattern",
    "NMSparseConfig": "config",
    "NMSparseQuantizationConfig": "quantization_config",
    "NMTranslationPipeline": "pipeline",
    "PackedFormatError": "packed_format",
    "SparseStep": "optimizer",
    "SparseTrainer": "trainer",
    "SparseTrainerMixin": "trainer_mixin",
    "SparseTrainingArguments": "training_arguments",
    "Translation": "translations",
    "Translator": "translator",
    "export_dense": "saving",
    "finalize": "sparse_model",
    "prepare_for_training": "quantizer",
    "push_to_hub": "saving",
    "report": "sparse_model",
    "save_packed": "saving",
    "set_compute": "compute",
    "sparsify": "sparse_model",
}

registration.register()


def __getattr__(name: str) -> Any:
    """The public names, each imported from its module when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What completion shows: the public names too, whether they have been used or not."""
    return sorted({*globals(), *__all__})
