"""The arguments of the recipe: one YAML file, keys on the command line over it, and what does not go together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_nmsparse import SparseTrainingArguments
from hf_nmsparse.one_shot import ONE_SHOT
from hf_nmsparse.packing import VALUE_DTYPES
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.run_files import hypotheses_file
from hf_nmsparse.srste import METHODS
from recipes.parser import Parser

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = CONFIGS / "wmt14_transformer_base_2of4.yaml"

STARTS = ("magnitude", *ONE_SHOT)

# Of the recipe's arguments, what is counted.
COUNTS = (
    "max_train_pairs",
    "token_processes",
    "calibration_pairs",
    "tokens_per_step",
    "max_length",
    "d_model",
    "layers",
    "encoder_layers",
    "decoder_layers",
    "heads",
    "ffn",
    "average",
    "beams",
    "eval_batch",
)


@dataclass
class RecipeArguments:
    """What is trained on what; how it is trained is in SparseTrainingArguments."""

    corpus: str = field(
        metadata={
            "help": "Hub dataset, local folder or 'homeassistant'; see hf_nmsparse.corpus and recipes.homeassistant."
        }
    )
    corpus_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset: de-en."})
    more_train: list[str] | None = field(
        default=None, metadata={"help": "Further corpora, likewise, whose training pairs are added."}
    )
    source_lang: str = field(default="en", metadata={"help": "Key of the source text in a row."})
    target_lang: str = field(default="de", metadata={"help": "Key of the target text in a row."})
    more_sources: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further source languages of a many-to-one model, each with what marks its texts: fr=>>fr<< puts "
            "that before them, as source_prefix does for source_lang, and fr=fra_Latn is a code beside source_code."
        },
    )
    max_train_pairs: int | None = field(default=None, metadata={"help": "Train on the first so many pairs only."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the training pairs as they come and keep nothing; needs max_steps."}
    )
    token_processes: int | None = field(default=None, metadata={"help": "Processes that turn the texts into tokens."})
    tokens_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Source and target tokens of an optimizer step over all devices, in place of "
            "gradient_accumulation_steps; tokens_per_batch is the most that a device holds then."
        },
    )
    max_length: int = field(default=256, metadata={"help": "Longest sentence in tokens; longer pairs are left out."})

    model: str | None = field(default=None, metadata={"help": "Checkpoint to start from; from scratch if left out."})
    source_code: str | None = field(default=None, metadata={"help": "Source language as mBART or NLLB spell it."})
    target_code: str | None = field(default=None, metadata={"help": "Target language likewise: deu_Latn."})
    source_prefix: str = field(default="", metadata={"help": "Put before every source text, as T5 wants it."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint whose tokenizer a model from scratch takes, such as its teacher's; a joint BPE of "
            "vocab_size is trained on the corpus if left out."
        },
    )
    vocab_size: int = field(default=32_000, metadata={"help": "Joint BPE vocabulary of a model from scratch."})
    d_model: int = field(default=512, metadata={"help": "Width of a model from scratch."})
    layers: int = field(default=6, metadata={"help": "Encoder layers, and decoder layers, from scratch."})
    encoder_layers: int | None = field(default=None, metadata={"help": "Encoder layers where they are not as many."})
    decoder_layers: int | None = field(default=None, metadata={"help": "Decoder layers likewise: few are fast."})
    heads: int = field(default=8, metadata={"help": "Attention heads, from scratch."})
    ffn: int = field(default=2048, metadata={"help": "Feed-forward width, from scratch."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout, from scratch."})

    pattern: str = field(default="2:4", metadata={"help": "N:M, N of M weights are kept."})
    targets: list[str] | None = field(default=None, metadata={"help": "Layers to make sparse; every Linear if None."})
    ignore: list[str] | None = field(default=None, metadata={"help": "Layers that stay dense; heads if None."})
    transposable: bool = field(
        default=False, metadata={"help": "Masks that are 2:4 along the columns of a weight too, for a sparse backward."}
    )
    start: str = field(
        default="magnitude",
        metadata={
            "help": "How a checkpoint is pruned before the training: magnitude leaves the masters dense, and wanda and "
            "sparsegpt prune them by what the layers see of the first training pairs."
        },
    )
    calibration_pairs: int = field(default=256, metadata={"help": "So many training pairs for wanda and sparsegpt."})
    permute: bool = field(default=False, metadata={"help": "Put inner channels in an order first that keeps more."})
    values: str = field(default="bf16", metadata={"help": "Number type of the packed file: fp32, fp16, bf16, int8."})
    standalone: bool = field(default=False, metadata={"help": "Add the code with which transformers alone reads it."})
    average: int = field(default=1, metadata={"help": "Average the dense masters of the last so many checkpoints."})

    split: str = field(default="test", metadata={"help": "The split that is scored."})
    beams: int = field(default=4, metadata={"help": "Beam size of the evaluation."})
    eval_batch: int = field(default=64, metadata={"help": "Sentences a batch of the evaluation."})
    baseline: str | None = field(default=None, metadata={"help": "Output folder of the dense run to compare with."})
    license: str = field(default="apache-2.0", metadata={"help": "License on the model card."})
    push_to: str | None = field(default=None, metadata={"help": "Hub repository that gets the packed model."})

    def __post_init__(self) -> None:
        """Finds here what would otherwise end a run after its training."""
        NMPattern.parse(self.pattern)
        if self.values not in VALUE_DTYPES:
            raise ValueError(f"values: is one of {', '.join(VALUE_DTYPES)}, got {self.values!r}")
        if self.start not in STARTS:
            raise ValueError(f"start: is one of {', '.join(STARTS)}, got {self.start!r}")
        if self.transposable and (self.is_pruned or NMPattern.parse(self.pattern) != NMPattern(2, 4)):
            raise ValueError("transposable: is for pattern 2:4, and for start and permute as they are; leave it out")
        if self.model is None and self.is_pruned:
            raise ValueError("start, permute: prune a trained model, and this one is from scratch; give model")
        for name in COUNTS:
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name}: needs at least 1, got {count}")
        for name in ("tokenizer", "encoder_layers", "decoder_layers"):
            if self.model is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: is for a model from scratch, and model {self.model} has its own; leave it out"
                )
        self._check_sources()
        if self.model is None and self.d_model % self.heads:
            raise ValueError(f"heads: has to divide d_model, got {self.heads} for {self.d_model}")
        if self.baseline is not None:
            file = hypotheses_file(Path(self.baseline), self.split)
            if not file.is_file():
                raise ValueError(f"baseline: {file} is missing; run the dense configuration first")

    def _check_sources(self) -> None:
        entries = [entry.partition("=") for entry in self.more_sources or ()]
        for lang, _, mark in entries:
            if not lang or not mark.strip():
                raise ValueError(
                    f"more_sources: an entry is a language and what marks its texts, fr=>>fr<<, got {lang + mark!r}"
                )
        if entries and self.source_code is None and not self.source_prefix.strip():
            raise ValueError(
                "more_sources: source_lang needs a mark too; give source_prefix, or source_code where the tokenizer "
                "has codes"
            )
        langs = [self.source_lang, *(lang for lang, _, _ in entries)]
        marks = [self.source_code or self.source_prefix.strip(), *(mark.strip() for _, _, mark in entries)]
        for name, found in (("language", langs), ("mark", marks)) if entries else ():
            if len({*found}) < len(found):
                raise ValueError(f"more_sources: each {name} is there once, got {', '.join(found)}")
        if self.target_lang in langs:
            raise ValueError(f"more_sources: {self.target_lang!r} is the target; give other languages")
        if entries and self.streaming:
            raise ValueError("streaming: the pairs of several sources are shuffled together; leave it out")

    @property
    def is_pruned(self) -> bool:
        """Whether the weights of the checkpoint are changed before the training."""
        return self.start != "magnitude" or self.permute

    def start_options(self) -> dict[str, Any]:
        """How the training begins, where it is not as usual, for the record of the run."""
        options: dict[str, Any] = {name: True for name in ("permute", "transposable") if getattr(self, name)}
        if self.start != "magnitude":
            options |= {"start": self.start, "calibration_pairs": self.calibration_pairs}
        return options

    @property
    def depths(self) -> dict[str, int]:
        """How many layers encoder and decoder have, from scratch."""
        return {
            "encoder_layers": self.layers if self.encoder_layers is None else self.encoder_layers,
            "decoder_layers": self.layers if self.decoder_layers is None else self.decoder_layers,
        }


def parse(argv: list[str]) -> tuple[RecipeArguments, SparseTrainingArguments]:
    """One YAML file first, or the one of the first command, then ``--key value`` pairs that win over it."""
    named = bool(argv) and not argv[0].startswith("-")
    file, argv = (Path(argv[0]), argv[1:]) if named else (DEFAULT, argv)
    if not file.is_file():
        raise ValueError(f"recipe: no such file {file}; see recipes/configs")
    parser = Parser("recipe", RecipeArguments, SparseTrainingArguments)
    (recipe, args), given = parser.read(file, argv)
    check(recipe, args)
    said = []
    if not named:
        others = ", ".join(sorted(other.stem for other in CONFIGS.iterdir() if other != DEFAULT))
        said.append(f"runs {DEFAULT}; name another to run it instead: {others}")
    if recipe.tokens_per_step is not None:
        said.append(share_out(recipe.tokens_per_step, args, "gradient_accumulation_steps" in given))
    if args.process_index == 0:
        for line in said:
            print(f"wmt_en_de: {line}", flush=True)
    return recipe, args


def check(recipe: RecipeArguments, args: SparseTrainingArguments) -> None:
    """Refuses what does not go together before anything is read."""
    dense = "sparse_method is 'dense'" if args.sparse_method == "dense" else "a dense tail leaves a dense one"
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"seed: needs a number from 0 to {2**32 - 1}, got {args.seed}")
    if not 0 <= args.learning_rate < math.inf:
        raise ValueError(f"learning_rate: needs a finite number of at least 0, got {args.learning_rate}")
    ends_dense = args.sparse_method == "dense" or bool(args.sparse_dense_tail)
    if ends_dense and recipe.values == "int8":
        raise ValueError(f"values: 'int8' is for packed models and {dense}; choose fp32, fp16 or bf16")
    if ends_dense and recipe.standalone:
        raise ValueError("standalone: is for packed models and this run ends in a dense one; leave it out")
    if ends_dense and recipe.push_to is not None:
        raise ValueError("push_to: sends packed models and this run ends in a dense one; leave it out")
    if recipe.is_pruned and (args.sparse_method == "dense" or METHODS[args.sparse_method].random_mask):
        raise ValueError(f"start, permute: choose masks, and sparse_method {args.sparse_method!r} has none of them")
    if recipe.average > (args.save_total_limit or recipe.average):
        raise ValueError(
            f"average: {recipe.average} checkpoints, and save_total_limit keeps {args.save_total_limit}; raise it"
        )
    if recipe.average > 1 and args.save_strategy == "no":
        raise ValueError(f"average: {recipe.average} checkpoints, and save_strategy 'no' writes none; set it")
    if recipe.streaming and args.max_steps <= 0:
        raise ValueError("streaming: a stream has no length; give max_steps")
    if recipe.streaming and recipe.token_processes is not None:
        raise ValueError("token_processes: a stream becomes tokens where it is read; leave it out")


def share_out(tokens_per_step: int, args: SparseTrainingArguments, accumulation_given: bool) -> str:
    """Sets how many batches of how many tokens a device takes for a step; returns what it has chosen."""
    if accumulation_given:
        raise ValueError(
            "tokens_per_step: gradient_accumulation_steps follows from it and from the number of devices; give one"
        )
    if args.tokens_per_batch is None:
        raise ValueError("tokens_per_step: needs tokens_per_batch, the most tokens that one device holds")
    devices = args.world_size
    batches = -(-tokens_per_step // (devices * args.tokens_per_batch))
    tokens = tokens_per_step // (devices * batches)
    if not tokens:
        raise ValueError(f"tokens_per_step: {tokens_per_step} are less than one for each of {devices} devices")
    args.gradient_accumulation_steps, args.tokens_per_batch = batches, tokens
    return f"a step of {tokens_per_step:,} tokens: {devices} device(s) x {batches} batch(es) of {tokens:,} tokens"
