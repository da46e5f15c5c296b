"""Trains a translation model with N:M sparsity, packs it, loads the packed file in a fresh process and scores it there.

    accelerate launch recipes/wmt_en_de.py [recipes/configs/CONFIG.yaml] [--key value ...]

One YAML file says everything, without one wmt14_transformer_base_2of4.yaml; keys on the command line win over it. Keys
are the fields of RecipeArguments below and of SparseTrainingArguments, which has all of Seq2SeqTrainingArguments. A run
that was stopped goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import traceback
from argparse import Action
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import torch
from accelerate import PartialState
from datasets import IterableDataset, concatenate_datasets
from huggingface_hub import HfApi
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    HfArgumentParser,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, however the script is started
from hf_nmsparse import (
    NMSparseConfig,
    SparseTrainer,
    SparseTrainingArguments,
    finalize,
    push_to_hub,
    report,
    run_logs,
    save_packed,
    sparsify,
)
from hf_nmsparse.allocator import keep_freed_memory
from hf_nmsparse.averaging import average_checkpoints, checkpoints, last_checkpoints
from hf_nmsparse.cards import write_card
from hf_nmsparse.corpus import Rows, load_corpus
from hf_nmsparse.files import check_writable, model_folder, replaced
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.loading import load_seq2seq
from hf_nmsparse.metrics import Evaluation, SentenceStatistics, compare, evaluation_record, score
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.packing import VALUE_DTYPES
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.pipeline import translate
from hf_nmsparse.settings import read_settings
from hf_nmsparse.srste import METHODS
from hf_nmsparse.tokenizer import tokenise, train_tokenizer
from hf_nmsparse.trainer import Preempted, last_whole_checkpoint
from recipes.threads import take_all_cores

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = CONFIGS / "wmt14_transformer_base_2of4.yaml"

# Of a stream: how many pairs the tokenizer is trained on, and among how many the next one is drawn.
TOKENIZER_PAIRS, SHUFFLED = 1_000_000, 100_000

# Of the recipe's arguments, what is counted.
COUNTS = (
    "max_train_pairs",
    "token_processes",
    "tokens_per_step",
    "max_length",
    "d_model",
    "layers",
    "heads",
    "ffn",
    "average",
    "beams",
    "eval_batch",
)

# What a run cannot go on with if it is another than at its beginning; and of a model from scratch.
OF_THE_MODEL = ("model", "source_lang", "target_lang", "pattern", "targets", "ignore")
OF_THE_TOKENIZER = ("vocab_size", "max_length")
FROM_SCRATCH = (*OF_THE_TOKENIZER, "d_model", "layers", "heads", "ffn")

# Of the training arguments, what the card lists.
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "label_smoothing_factor",
    "tokens_per_batch",
    "gradient_accumulation_steps",
    "max_grad_norm",
)


@dataclass
class RecipeArguments:
    """What is trained on what; how it is trained is in SparseTrainingArguments."""

    corpus: str = field(metadata={"help": "Hub dataset, local folder or 'homeassistant'; see hf_nmsparse.corpus."})
    corpus_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset: de-en."})
    more_train: list[str] | None = field(
        default=None, metadata={"help": "Further corpora, likewise, whose training pairs are added."}
    )
    source_lang: str = field(default="en", metadata={"help": "Key of the source text in a row."})
    target_lang: str = field(default="de", metadata={"help": "Key of the target text in a row."})
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
    vocab_size: int = field(default=32_000, metadata={"help": "Joint BPE vocabulary of a model from scratch."})
    d_model: int = field(default=512, metadata={"help": "Width of a model from scratch."})
    layers: int = field(default=6, metadata={"help": "Encoder layers, and decoder layers, from scratch."})
    heads: int = field(default=8, metadata={"help": "Attention heads, from scratch."})
    ffn: int = field(default=2048, metadata={"help": "Feed-forward width, from scratch."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout, from scratch."})

    pattern: str = field(default="2:4", metadata={"help": "N:M, N of M weights are kept."})
    targets: list[str] | None = field(default=None, metadata={"help": "Layers to make sparse; every Linear if None."})
    ignore: list[str] | None = field(default=None, metadata={"help": "Layers that stay dense; heads if None."})
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
        for name in COUNTS:
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name}: needs at least 1, got {count}")
        if self.model is None and self.d_model % self.heads:
            raise ValueError(f"heads: has to divide d_model, got {self.heads} for {self.d_model}")
        if self.baseline is not None:
            file = hypotheses_file(Path(self.baseline), self.split)
            if not file.is_file():
                raise ValueError(f"baseline: {file} is missing; run the dense configuration first")


def main() -> None:
    """The whole run, from text to a scored and packed model."""
    recipe, args = parse(sys.argv[1:])
    set_seed(args.seed)
    output = Path(args.output_dir)
    check_writable(output)
    if recipe.push_to is not None and args.process_index == 0:
        check_hub(recipe.push_to)
    if args.device.type == "cpu":
        keep_freed_memory()
        threads = take_all_cores() if args.world_size == 1 else None
        if threads is not None:
            print(f"wmt_en_de: {threads} CPU thread(s), one for each core; OMP_NUM_THREADS sets another number")

    # The data, raw; then the tokenizer and the model; then the data as tokens, cached on disk.
    languages = recipe.source_lang, recipe.target_lang
    corpus = load_corpus(recipe.corpus, *languages, recipe.corpus_config, recipe.streaming)
    for split in ("train", recipe.split):
        if split not in corpus:
            raise ValueError(f"corpus {recipe.corpus}: no split {split!r}; it has {', '.join(corpus)}")
    if args.eval_strategy != "no" and "validation" not in corpus:
        raise ValueError(
            f"corpus {recipe.corpus}: no split 'validation', which eval_strategy {args.eval_strategy.value!r} needs; "
            "give --eval_strategy no"
        )
    for name in recipe.more_train or ():
        more = load_corpus(name, *languages, streaming=recipe.streaming)
        if "train" not in more:
            raise ValueError(f"more_train: {name} has no split 'train'; it has {', '.join(more)}")
        corpus["train"] = concatenate_datasets([corpus["train"], more["train"]])
    if recipe.max_train_pairs is not None:
        corpus["train"] = first_of(corpus["train"], recipe.max_train_pairs)
    with args.main_process_first(desc="settings"):
        keep_settings(recipe, output)
    with args.main_process_first(desc="tokenizer"):
        tokenizer = load_tokenizer(recipe, corpus["train"], output)
    if recipe.streaming:
        corpus["train"] = corpus["train"].shuffle(seed=args.seed, buffer_size=SHUFFLED)
    model = load_model(recipe, tokenizer)
    # Nothing to translate, but model, tokenizer and languages are checked here rather than after the training.
    translate(model, tokenizer, [""], src_lang=recipe.source_code, tgt_lang=recipe.target_code)
    with args.main_process_first(desc="tokens"):
        tokens = {
            split: tokenise(corpus[split], tokenizer, recipe.max_length, recipe.source_prefix, recipe.token_processes)
            for split in ("train", "validation")
            if split in corpus
        }

    # The linear layers of the blocks become N:M layers: their weights stay dense masters, the forward masks them.
    make_sparse(model, recipe, args)

    trainer = SparseTrainer(
        model=model,
        args=args,
        train_dataset=tokens["train"],
        eval_dataset=tokens.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(output))
    masters = trainer.gathered()
    if not trainer.is_world_process_zero():
        return
    if masters is not None:  # FSDP2 has sharded the model: the rest is done with one that is whole
        trainer.model = model = load_model(recipe, tokenizer)
        make_sparse(model, recipe, args)
        model.load_state_dict(masters)

    # The mean of the last dense masters, masked once more: the masks of the checkpoints differ.
    if recipe.average > 1:
        count = min(recipe.average, len(checkpoints(output)))
        if count < recipe.average:  # a short run, to try something
            print(f"wmt_en_de: averages {count} checkpoint(s), all that the run has; average is {recipe.average}")
        mean = average_checkpoints(last_checkpoints(output, count))
        model.load_state_dict({**model.state_dict(), **mean})  # tied and computed weights are in no file
    sparse = args.sparse_method != "dense" and not args.sparse_dense_tail
    if not sparse:
        for layer in [layer for layer in model.modules() if isinstance(layer, NMLinear)]:
            layer.to_linear()
        model.config.__dict__.pop("quantization_config", None)
        saved = output / "dense"
        with model_folder(saved) as folder:
            model.to(VALUE_DTYPES[recipe.values]).save_pretrained(folder)
    else:
        finalize(model)
        report(model)
        saved = output / "packed"
        save_packed(model, saved, values=recipe.values, standalone=recipe.standalone)
    tokenizer.save_pretrained(saved)

    # A fresh process loads these very files and translates; its output is what is scored and goes on the card.
    sources, references = list(corpus[recipe.split]["source"]), list(corpus[recipe.split]["target"])
    write_lines(reference_file(output, recipe.split), map(one_line, references))
    hypotheses = translate_in_fresh_process(saved, sources, recipe, output)
    evaluation = evaluate(recipe, trainer, saved, sparse, hypotheses, references)
    run_logs.write_curve(trainer.state.log_history, output / "curve.json")
    run_logs.write_layers(trainer.state.log_history, output / "layers.parquet")
    SentenceStatistics.of(hypotheses, references).write(output / "sentences.json")
    evaluation.write(output / "evaluation.json")
    write_card(
        saved,
        evaluation,
        recipe.push_to or card_name(output),
        source_lang=recipe.source_code or recipe.source_lang,
        target_lang=recipe.target_code or recipe.target_lang,
        license=recipe.license,
        multilingual=recipe.target_code is not None,
        standalone=recipe.standalone,
        dataset=recipe.corpus if recipe.corpus_config and not Path(recipe.corpus).is_dir() else None,
        settings={key: getattr(args, key) for key in SETTINGS},
    )
    print(f"{saved}: BLEU {evaluation.bleu:.2f} ({evaluation.signature}), chrF {evaluation.chrf:.2f}")
    if evaluation.against_dense is not None:
        print(f"against the dense model: {evaluation.against_dense['verdict']}")
    if recipe.push_to is not None:
        print(push_to_hub(saved, recipe.push_to))


class Parser(HfArgumentParser):
    """Says in one line what is wrong, and takes the values of a file as it takes those of a command line."""

    def __init__(self) -> None:
        hints = (get_type_hints(kind) for kind in (RecipeArguments, SparseTrainingArguments))
        self.types: dict[str, Any] = {key: hint for found in hints for key, hint in found.items()}
        self.keys: dict[str, Action] = {}
        super().__init__((RecipeArguments, SparseTrainingArguments), allow_abbrev=False)

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        """Adds an argument, and keeps it by its key."""
        action = super().add_argument(*args, **kwargs)
        if action.dest in self.types:
            self.keys[action.dest] = action
        return action

    def error(self, message: str) -> NoReturn:
        """In place of a page of usage."""
        raise ValueError(f"recipe: {message}")

    def check_known(self, key: str, where: str) -> None:
        """Refuses what is no key, and names the one that was meant."""
        if key not in self.keys:
            near = get_close_matches(key, self.keys, 1)
            raise ValueError(f"recipe: {where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))

    def arguments_of(self, file: Path) -> list[str]:
        """The settings of a file as a command line would have them; what none can have becomes the default."""
        arguments = []
        for key, value in read_settings(file).items():
            self.check_known(key, str(file))
            admitted = kinds(self.types[key])
            if isinstance(value, str):
                arguments.append(f"--{key}={value}")
            elif isinstance(value, dict) and dict in admitted:
                arguments.append(f"--{key}={json.dumps(value)}")
            elif type(value) in admitted and all(isinstance(item, str) for item in value or ()):
                self.set_defaults(**{key: value})
            else:
                raise ValueError(f"recipe: {file}: {key}: cannot be {json.dumps(value)}; see --help")
        return arguments


def kinds(hint: Any) -> set[Any]:
    """The types that an annotation admits, without what they hold."""
    every = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {get_origin(kind) or kind for kind in every}


def parse(argv: list[str]) -> tuple[RecipeArguments, SparseTrainingArguments]:
    """One YAML file first, or the one of the first command, then ``--key value`` pairs that win over it."""
    named = bool(argv) and not argv[0].startswith("-")
    file, argv = (Path(argv[0]), argv[1:]) if named else (DEFAULT, argv)
    if not file.is_file():
        raise ValueError(f"recipe: no such file {file}; see recipes/configs")
    parser = Parser()
    arguments = [*parser.arguments_of(file), *argv]
    try:
        recipe, args, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    for argument in unknown:
        parser.check_known(argument.lstrip("-").partition("=")[0].replace("-", "_"), "command line")
    check(recipe, args)
    said = []
    if not named:
        others = ", ".join(sorted(other.stem for other in CONFIGS.iterdir() if other != DEFAULT))
        said.append(f"runs {DEFAULT}; name another to run it instead: {others}")
    if recipe.tokens_per_step is not None:
        keys = {argument.removeprefix("--").partition("=")[0].replace("-", "_") for argument in arguments}
        said.append(share_out(recipe.tokens_per_step, args, "gradient_accumulation_steps" in keys))
    if args.process_index == 0:
        for line in said:
            print(f"wmt_en_de: {line}", flush=True)
    return recipe, args


def check_hub(repo: str) -> None:
    """Makes the repository where there is none and asks for the right to write to it, before the training."""
    hub = HfApi()
    try:
        hub.auth_check(hub.create_repo(repo, exist_ok=True).repo_id, write=True)
    except Exception as error:  # of an HTTP library that is another in each version of the client
        reason = " ".join(str(error).split())
        raise ValueError(f"push_to: nothing can be pushed to {repo!r}: {reason}") from error


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


def first_of(rows: Rows, count: int) -> Rows:
    """The first so many pairs, or all if there are fewer."""
    return rows.take(count if isinstance(rows, IterableDataset) else min(count, len(rows)))


def pretrained(load: Callable[..., Any], model: str, **settings: Any) -> Any:
    """What ``load`` gives; what a user can mend is one line."""
    try:
        return load(model, **settings)
    except (OSError, ImportError, ValueError) as error:
        [reason, *_] = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"model: {model}: {reason}") from error


def load_tokenizer(recipe: RecipeArguments, train: Rows, output: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint, or one trained on the corpus and kept in the output folder."""
    if recipe.model is not None:
        tokenizer = pretrained(AutoTokenizer.from_pretrained, recipe.model)
        for language, code in (("src_lang", recipe.source_code), ("tgt_lang", recipe.target_code)):
            if code is not None and hasattr(tokenizer, language):
                setattr(tokenizer, language, code)
        return tokenizer
    folder = output / "tokenizer"
    if not folder.is_dir():
        rows = first_of(train, TOKENIZER_PAIRS) if recipe.streaming else train
        texts = (text for column in ("source", "target") for text in rows[column])
        with replaced(folder) as beside:
            train_tokenizer(texts, recipe.vocab_size, recipe.max_length).save_pretrained(beside)
    return AutoTokenizer.from_pretrained(folder)


def keep_settings(recipe: RecipeArguments, output: Path) -> None:
    """Writes what makes the model what it is beside its checkpoints, once those of another model are ruled out."""
    now = {name: getattr(recipe, name) for name in (*OF_THE_MODEL, *(() if recipe.model else FROM_SCRATCH))}
    file = output / "model_settings.json"
    begun = read_object(file) if file.is_file() else now
    kept = list(dict.fromkeys([*now, *begun])) if checkpoints(output) else []
    if (output / "tokenizer").is_dir() and not recipe.model:
        kept += OF_THE_TOKENIZER
    for name in kept:
        if now.get(name) != begun.get(name, now.get(name)):
            raise ValueError(
                f"{name}: the run in {output} began with {begun.get(name)!r}, got {now.get(name)!r}; give the same, or "
                "another output_dir"
            )
    with replaced(file) as beside:
        beside.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: no JSON object; delete it if the run goes on with the model that it began with")
    return content


def load_model(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The checkpoint in fp32, or a Transformer from scratch: Marian's, post-norm, with one embedding for all ends."""
    if recipe.model is not None:
        return pretrained(load_seq2seq, recipe.model, dtype=torch.float32)
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=recipe.d_model,
        encoder_layers=recipe.layers,
        decoder_layers=recipe.layers,
        encoder_attention_heads=recipe.heads,
        decoder_attention_heads=recipe.heads,
        encoder_ffn_dim=recipe.ffn,
        decoder_ffn_dim=recipe.ffn,
        dropout=recipe.dropout,
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=max(512, recipe.max_length),
        forced_eos_token_id=None,
        **special,
    )
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig(
        num_beams=recipe.beams, max_length=recipe.max_length, bad_words_ids=[[tokenizer.pad_token_id]], **special
    )
    return model


def make_sparse(model: PreTrainedModel, recipe: RecipeArguments, args: SparseTrainingArguments) -> None:
    """Gives the model its N:M layers, if the method has any."""
    if args.sparse_method != "dense":
        soft = METHODS[args.sparse_method].soft
        sparsify(model, NMSparseConfig(recipe.pattern, recipe.targets, recipe.ignore, soft))


def translate_in_fresh_process(saved: Path, sources: list[str], recipe: RecipeArguments, output: Path) -> list[str]:
    """Translates with the saved files in a process that has nothing else of this run."""
    source, hypotheses = source_file(output, recipe.split), hypotheses_file(output, recipe.split)
    write_lines(source, [recipe.source_prefix + one_line(text) for text in sources])
    command = [sys.executable, "-m", "hf_nmsparse", "translate", "--model", str(saved)]
    command += ["--input", str(source), "--output", str(hypotheses)]
    command += ["--batch-size", str(recipe.eval_batch), "--beams", str(recipe.beams)]
    for option, code in (("--src-lang", recipe.source_code), ("--tgt-lang", recipe.target_code)):
        command += [] if code is None else [option, code]
    subprocess.run(command, check=True)
    return read_lines(hypotheses)


def evaluate(
    recipe: RecipeArguments,
    trainer: SparseTrainer,
    saved: Path,
    sparse: bool,
    hypotheses: list[str],
    references: list[str],
) -> Evaluation:
    """Scores the translations, beside those of the dense run if one is named, and says what was run."""
    args = trainer.args
    against = None
    if recipe.baseline is not None:
        against = compare(hypotheses, read_lines(hypotheses_file(Path(recipe.baseline), recipe.split)), references)
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    spared = 0
    if sparse:
        found = check_folder(saved)
        spared = found.dense_bytes - found.packed_bytes
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}  # the last of each
    return evaluation_record(
        score(hypotheses, references),
        against,
        corpus=" + ".join(map(corpus_name, [recipe.corpus, *(recipe.more_train or ())])),
        split=recipe.split,
        model=f"{describe(trainer.model)}, beam {recipe.beams}",
        method=args.sparse_method,
        pattern=recipe.pattern if sparse else None,
        targets=recipe.targets if sparse else None,
        decay=args.sparse_decay or None,
        options=args.sparse_options(),
        seed=args.seed,
        steps=trainer.state.global_step,
        train_seconds=logged["train_seconds"],
        flip_rate=logged.get("flip_rate"),
        validation_loss=logged.get("eval_loss"),
        values=recipe.values,
        packed_bytes=size if sparse else None,
        dense_bytes=size + spared,
        base_model=recipe.model,
    )


def card_name(output: Path) -> str:
    """The name of the output folder as the Hub can have it."""
    name = re.sub("-{2,}", "-", re.sub(r"[^\w.-]", "-", output.resolve().name, flags=re.ASCII))
    name = re.sub(r"\.{2,}", ".", name)[:96].removesuffix(".git").strip("-.")
    return name or "model"


def corpus_name(corpus: str) -> str:
    """How a record names a corpus: a folder by its own name."""
    return Path(corpus).name if Path(corpus).is_dir() else corpus


def describe(model: PreTrainedModel) -> str:
    """Class, size and shape of a model in a few words."""
    config, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    if hasattr(config, "encoder_layers"):
        layers = f"{config.encoder_layers}+{config.decoder_layers}"
    else:  # T5's names
        layers = f"{config.num_layers}+{config.num_decoder_layers}"
    return f"{type(model).__name__}, {parameters:,} parameters, {layers} layers, d {config.d_model}"


def source_file(output: Path, split: str) -> Path:
    """Where a run keeps the source texts of a split."""
    return output / f"{split}.source.txt"


def reference_file(output: Path, split: str) -> Path:
    """Where it keeps their references."""
    return output / f"{split}.reference.txt"


def hypotheses_file(output: Path, split: str) -> Path:
    """Where it keeps its translations of them."""
    return output / f"{split}.hypotheses.txt"


def one_line(text: str) -> str:
    """A text with single spaces and nothing that ends a line."""
    return " ".join(text.split())


def write_lines(file: Path, lines: Iterable[str]) -> None:
    """Writes a text file, a line each."""
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, without what ends them."""
    return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def run() -> None:
    """Runs `main`; what a user can mend is one line, anything else a traceback."""
    try:
        main()
        PartialState().destroy_process_group()  # gloo's threads, where they outlive Python, abort the process
    except Preempted as stop:
        print(f"wmt_en_de: {stop}", file=sys.stderr)
        raise
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent.name
        if raised_in not in ("hf_nmsparse", "recipes"):
            raise
        sys.exit(f"wmt_en_de: {error}")


if __name__ == "__main__":
    run()
