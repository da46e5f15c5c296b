"""The arguments of `recipes/distill.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hf_nmsparse.pairs import FORMATS
from recipes.parser import Parser

METRICS = ("chrf", "bleu")
COUNTS = ("max_train_pairs", "max_length", "beams", "threads", "batch_size", "shard_size")


@dataclass
class DistillArguments:
    """What is translated by whom."""

    output_dir: str = field(metadata={"help": "Folder for train.*, which corpus and more_train of the recipe read."})
    teachers: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders or Hub names of seq2seq models, dense or packed; several are averaged."},
    )
    corpus: str | None = field(
        default=None, metadata={"help": "As the recipe takes it; its training sources are translated."}
    )
    corpus_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset: de-en."})
    text: str | None = field(
        default=None, metadata={"help": "In place of corpus, a text of the source language, a sentence a line."}
    )
    source_lang: str = field(default="en", metadata={"help": "Key of the source text in a row."})
    target_lang: str = field(default="de", metadata={"help": "Key of the target text in a row."})
    max_train_pairs: int | None = field(default=None, metadata={"help": "Translate the first so many sources only."})
    max_length: int = field(default=256, metadata={"help": "Longest source in tokens; longer ones are left out."})
    source_code: str | None = field(default=None, metadata={"help": "Source language as mBART or NLLB spell it."})
    target_code: str | None = field(default=None, metadata={"help": "Target language likewise: deu_Latn."})
    source_prefix: str = field(default="", metadata={"help": "Put before every source text, as T5 wants it."})

    beams: int = field(default=4, metadata={"help": "Beam size."})
    interpolation: str | None = field(
        default=None,
        metadata={"help": "Of all beams takes the one nearest to the reference by chrf or bleu; the best if left out."},
    )
    compute: str = field(
        default="auto", metadata={"help": "What the native engine computes in: auto, fp32, bf16 or int8."}
    )
    threads: int | None = field(
        default=None, metadata={"help": "Threads of the engine; the machine's cores shared by its processes if None."}
    )
    batch_size: int = field(default=64, metadata={"help": "Sentences of a batch."})
    shard_size: int = field(default=4096, metadata={"help": "Sources of a shard, which is what a stop loses at most."})
    format: str = field(default="jsonl.gz", metadata={"help": "Of the files: jsonl.gz, jsonl.zst, jsonl or parquet."})
    use_cpu: bool = field(default=False, metadata={"help": "Translate on the CPU where there is a GPU."})

    def __post_init__(self) -> None:
        """Refuses what does not go together before anything is read."""
        if not self.teachers:
            raise ValueError("teachers: name one model or several")
        if (self.corpus is None) == (self.text is None):
            raise ValueError("corpus: give it, or text in its place, and not both")
        for name in COUNTS:
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name}: needs at least 1, got {count}")
        if self.format not in FORMATS:
            raise ValueError(f"format: is one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.interpolation is not None:
            if self.interpolation not in METRICS:
                raise ValueError(f"interpolation: is one of {', '.join(METRICS)}, got {self.interpolation!r}")
            if self.text is not None:
                raise ValueError("interpolation: needs references, which text has not; leave it out")
            if self.beams == 1:
                raise ValueError("interpolation: chooses among beams, and beams is 1; raise it")


def parse(argv: list[str]) -> DistillArguments:
    """One YAML file first, if any, then ``--key value`` pairs that win over it."""
    named = bool(argv) and not argv[0].startswith("-")
    file, argv = (Path(argv[0]), argv[1:]) if named else (None, argv)
    if file is not None and not file.is_file():
        raise ValueError(f"arguments: no such file {file}; see recipes/distillations")
    (arguments,), _ = Parser("arguments", DistillArguments).read(file, argv)
    filled: DistillArguments = arguments
    return filled
