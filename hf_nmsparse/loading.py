"""Translation models from any checkpoint, with nothing of them left to chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

import hf_nmsparse.quantizer  # noqa: F401  # registers the packed format
from hf_nmsparse.checkpoint_fit import check_complete, refuse_missing, refuse_more_layers
from hf_nmsparse.packed_files import read_folder

__all__ = ["check_checkpoint", "load_seq2seq"]


def load_seq2seq(source: str, **kwargs: Any) -> PreTrainedModel:
    """Loads an encoder-decoder model as ``AutoModelForSeq2SeqLM.from_pretrained`` does, if the files hold all of it.

    transformers draws what a checkpoint lacks at random and logs it, which a script does not read.

    Args:
        source: A folder, or a name on the Hub.
        **kwargs: As ``from_pretrained`` takes them.

    Raises:
        ValueError: A tensor is missing that transformers does not make itself, as it does tied ones and positions; the
            files have more layers than config.json says; or a number of a dense model is not finite.
    """
    model, found = AutoModelForSeq2SeqLM.from_pretrained(source, output_loading_info=True, **kwargs)
    refuse_missing(found["missing_keys"], found["unexpected_keys"], str(source), "save the whole model again")
    refuse_more_layers(found["unexpected_keys"], model, str(source))
    if getattr(model, "hf_quantizer", None) is None:  # packed files were checked as they were read
        for name, tensor in model.state_dict().items():
            if not tensor.is_meta and tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{source}: {name} holds NaN or infinity; take an earlier checkpoint")
    loaded: PreTrainedModel = model
    return loaded


def check_checkpoint(folder: str | Path, model: PreTrainedModel) -> None:
    """Checks that a checkpoint of the training holds all of ``model``, which Trainer loads without asking for it.

    Raises:
        ValueError: It does not.
    """
    files = {key: tensor.file for key, tensor in read_folder(Path(folder)).items()}
    check_complete(files, model, get_model_conversion_mapping(model))
