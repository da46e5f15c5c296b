"""N:M sparse translation models for Hugging Face Transformers.

Importing this package registers two things with transformers: the loader, so that ``from_pretrained`` reads packed N:M
checkpoints, and the pipeline ``"nmt-translation"``.
"""

__version__ = "0.1.0"

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.packing import PackedFormatError
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.pipeline import NMTranslationPipeline
from hf_nmsparse.quantizer import prepare_for_training, set_compute
from hf_nmsparse.record import NMSparseQuantizationConfig
from hf_nmsparse.saving import export_dense, push_to_hub, save_packed
from hf_nmsparse.sparsify import finalize, report, sparsify
from hf_nmsparse.trainer import SparseTrainer, SparseTrainingArguments

__all__ = [
    "NMPattern",
    "NMSparseConfig",
    "NMSparseQuantizationConfig",
    "NMTranslationPipeline",
    "PackedFormatError",
    "SparseStep",
    "SparseTrainer",
    "SparseTrainingArguments",
    "export_dense",
    "finalize",
    "prepare_for_training",
    "push_to_hub",
    "report",
    "save_packed",
    "set_compute",
    "sparsify",
]
