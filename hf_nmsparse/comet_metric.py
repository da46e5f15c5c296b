"""COMET of translations, where the package unbabel-comet is installed and its model lies on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_nmsparse.run_report import Judge, Texts

__all__ = ["comet_judge"]


def comet_judge(model: Path) -> Judge:
    """A judge that scores translations with a COMET model, on the CPU.

    Args:
        model: Its checkpoint, such as ``model.ckpt``. COMET reads it with pickle, which may run code: take one that
            you trust.

    Raises:
        ValueError: There is no such file, the package is missing, or it cannot read the file.
    """
    if not model.is_file():
        raise ValueError(f"--comet: no file {model}; give the .ckpt of a COMET model that is on the disk")
    try:
        from comet import load_from_checkpoint
    except ImportError as error:
        raise ValueError("--comet: needs unbabel-comet; pip install unbabel-comet") from error
    try:
        comet = load_from_checkpoint(str(model))
    except Exception as error:  # what is raised for a damaged file is up to torch and Lightning
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"--comet: {model} cannot be loaded: {reason}") from error

    def judge(texts: Texts) -> float:
        rows = zip(texts.sources, texts.hypotheses, texts.references, strict=True)
        data = [{"src": source, "mt": hypothesis, "ref": reference} for source, hypothesis, reference in rows]
        return float(comet.predict(data, batch_size=16, gpus=0, progress_bar=False).system_score)

    return judge
