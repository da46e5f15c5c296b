"""Trains a translation model with N:M sparsity, packs it, loads the packed file in a fresh process and scores it there.

    accelerate launch recipes/wmt_en_de.py [recipes/configs/CONFIG.yaml] [--key value ...]

One YAML file says everything, without one wmt14_transformer_base_2of4.yaml; keys on the command line win over it. Keys
are the fields of RecipeArguments in arguments.py and of SparseTrainingArguments, which has all of
Seq2SeqTrainingArguments. After a stop the same command resumes from the last complete checkpoint.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import concatenate_datasets
from huggingface_hub import HfApi
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, however the script is started
from hf_nmsparse import (
    Calibration,
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
from hf_nmsparse.averaging import average_checkpoints, last_checkpoints
from hf_nmsparse.cards import write_card
from hf_nmsparse.checkpoints import checkpoints, last_complete_checkpoint
from hf_nmsparse.corpus import Rows
from hf_nmsparse.evaluation import Evaluation, evaluation_record
from hf_nmsparse.files import check_writable, model_folder, replaced
from hf_nmsparse.layers import NMLayer
from hf_nmsparse.loading import load_seq2seq
from hf_nmsparse.metrics import SentenceStatistics, compare, score
from hf_nmsparse.number_types import VALUE_DTYPES
from hf_nmsparse.packed_files import check_folder, read_object
from hf_nmsparse.packed_format import PackedFormatError
from hf_nmsparse.pipeline import translate
from hf_nmsparse.preemption import Preempted
from hf_nmsparse.products import multiply_with_onednn
from hf_nmsparse.run_files import hypotheses_file, one_line, read_lines, reference_file, source_file, write_lines
from hf_nmsparse.srste import METHODS
from hf_nmsparse.tokenizer import tokenise, train_tokenizer
from recipes.arguments import RecipeArguments, parse
from recipes.corpora import first_of, read_corpus
from recipes.mistakes import in_one_line
from recipes.sources import Source, sources_of, tags_of, without_known_targets
from recipes.threads import take_all_cores

# Of a stream: how many pairs the tokenizer is trained on, and among how many the next one is drawn.
TOKENIZER_PAIRS, SHUFFLED = 1_000_000, 100_000

# What a run cannot go on with if it is another than at its beginning; and of a model from scratch.
OF_THE_MODEL = (
    *("model", "source_lang", "more_sources", "target_lang", "pattern", "targets", "ignore"),
    *("start", "calibration_pairs", "permute", "transposable"),
)
OF_THE_TOKENIZER = ("tokenizer", "vocab_size", "max_length")
FROM_SCRATCH = (*OF_THE_TOKENIZER, "d_model", "heads", "ffn")

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
        tokens = args.tokens_per_batch or 2 * recipe.max_length * args.train_batch_size
        if not args.bf16:
            multiply_with_onednn(tokens, recipe.max_length)

    # The data, raw; then the tokenizer and the model; then the data as tokens, cached on disk.
    sources = sources_of(recipe)
    corpora = {source.lang: read_splits(recipe, args, source.lang) for source in sources}
    if len(sources) > 1:
        corpora = without_known_targets(corpora)
    corpus = corpora[recipe.source_lang]
    with args.main_process_first(desc="settings"):
        keep_settings(recipe, output)
    with args.main_process_first(desc="tokenizer"):
        tokenizer = load_tokenizer(recipe, [splits["train"] for splits in corpora.values()], output)
    if args.distill_from is not None:
        check_teacher(args.distill_from, tokenizer)
    if recipe.streaming:
        corpus["train"] = corpus["train"].shuffle(seed=args.seed, buffer_size=SHUFFLED)
    model = load_model(recipe, tokenizer)
    # Nothing to translate, but model, tokenizer and languages are checked here rather than after the training.
    translate(model, tokenizer, [""], src_lang=recipe.source_code, tgt_lang=recipe.target_code)
    with args.main_process_first(desc="tokens"):
        tokens = {
            split: tokens_of(recipe, sources, corpora, split, tokenizer)
            for split in ("train", "validation")
            if split in corpus
        }

    # The linear layers of the blocks become N:M layers: their weights stay dense masters, the forward masks them. What
    # prunes them at once has done so before the first checkpoint.
    begun = last_complete_checkpoint(output)
    make_sparse(model, recipe, args, tokens["train"] if begun is None else None)

    trainer = SparseTrainer(
        model=model,
        args=args,
        train_dataset=tokens["train"],
        eval_dataset=tokens.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=begun)
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
        for layer in [layer for layer in model.modules() if isinstance(layer, NMLayer)]:
            layer.to_stock()
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
    references = list(corpus[recipe.split]["target"])
    write_lines(reference_file(output, recipe.split), map(one_line, references))
    hypotheses = translate_in_fresh_process(saved, corpus, sources[0], recipe, output, recipe.split)
    evaluation = evaluate(recipe, trainer, saved, sparse, hypotheses, references)
    run_logs.write_curve(trainer.state.log_history, output / "curve.json")
    run_logs.write_layers(trainer.state.log_history, output / "layers.parquet")
    SentenceStatistics.of(hypotheses, references).write(output / "sentences.json")
    evaluation.write(output / "evaluation.json")
    scores = {source.lang: score_source(saved, corpora[source.lang], source, recipe, output) for source in sources[1:]}
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
    for lang, scored in scores.items():
        print(f"{saved}: from {lang} BLEU {scored['bleu']:.2f}, chrF {scored['chrf']:.2f}")
    if scores:
        with replaced(output / "more_sources.json") as beside:
            beside.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    if evaluation.against_dense is not None:
        print(f"against the dense model: {evaluation.against_dense['verdict']}")
    if recipe.push_to is not None:
        print(push_to_hub(saved, recipe.push_to))


def read_splits(recipe: RecipeArguments, args: SparseTrainingArguments, source_lang: str) -> dict[str, Rows]:
    """The splits of the corpus in one source language, with the further training pairs."""
    languages = source_lang, recipe.target_lang
    corpus = read_corpus(recipe.corpus, *languages, recipe.corpus_config, recipe.streaming)
    for split in ("train", recipe.split):
        if split not in corpus:
            raise ValueError(f"corpus {recipe.corpus}: no split {split!r}; it has {', '.join(corpus)}")
    if args.eval_strategy != "no" and "validation" not in corpus:
        raise ValueError(
            f"corpus {recipe.corpus}: no split 'validation', which eval_strategy {args.eval_strategy.value!r} needs; "
            "give --eval_strategy no"
        )
    for name in recipe.more_train or ():
        more = read_corpus(name, *languages, None, recipe.streaming)
        if "train" not in more:
            raise ValueError(f"more_train: {name} has no split 'train'; it has {', '.join(more)}")
        corpus["train"] = concatenate_datasets([corpus["train"], more["train"]])
    if recipe.max_train_pairs is not None:
        corpus["train"] = first_of(corpus["train"], recipe.max_train_pairs)
    return corpus


def tokens_of(
    recipe: RecipeArguments,
    sources: list[Source],
    corpora: dict[str, dict[str, Rows]],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Rows:
    """A split of all source languages as tokens, each marked as its language is."""
    parts = []
    for source in reversed(sources):  # that of source_lang is set last, and stays
        source.set_on(tokenizer)
        rows = corpora[source.lang][split]
        parts.append(tokenise(rows, tokenizer, recipe.max_length, source.prefix, recipe.token_processes))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts[::-1])


def check_hub(repo: str) -> None:
    """Makes the repository where there is none and asks for the right to write to it, before the training."""
    hub = HfApi()
    try:
        hub.auth_check(hub.create_repo(repo, exist_ok=True).repo_id, write=True)
    except Exception as error:  # of an HTTP library that is another in each version of the client
        reason = " ".join(str(error).split())
        raise ValueError(f"push_to: nothing can be pushed to {repo!r}: {reason}") from error


def pretrained(load: Callable[..., Any], model: str, key: str = "model", **settings: Any) -> Any:
    """What ``load`` gives for the value of a key; what a user can mend is one line."""
    try:
        return load(model, **settings)
    except (OSError, ImportError, ValueError) as error:
        [reason, *_] = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{key}: {model}: {reason}") from error


def load_tokenizer(recipe: RecipeArguments, train: list[Rows], output: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint; from scratch a given one or one of the corpus, kept in the output folder."""
    if recipe.model is not None:
        tokenizer = pretrained(AutoTokenizer.from_pretrained, recipe.model)
        for language, code in (("src_lang", recipe.source_code), ("tgt_lang", recipe.target_code)):
            if code is not None and hasattr(tokenizer, language):
                setattr(tokenizer, language, code)
        return tokenizer
    folder = output / "tokenizer"
    if not folder.is_dir() and recipe.tokenizer is not None:
        given = pretrained(AutoTokenizer.from_pretrained, recipe.tokenizer, "tokenizer")
        if given.pad_token_id is None or given.eos_token_id is None:
            raise ValueError(f"tokenizer: {recipe.tokenizer} has no padding or no end of a sentence; name another")
        given.model_max_length = recipe.max_length  # as one that is trained here has it
        with replaced(folder) as beside:
            given.save_pretrained(beside)
    elif not folder.is_dir():
        parts = [first_of(rows, TOKENIZER_PAIRS) for rows in train] if recipe.streaming else train
        texts = (text for column in ("source", "target") for rows in parts for text in rows[column])
        with replaced(folder) as beside:
            trained = train_tokenizer(texts, recipe.vocab_size, recipe.max_length, tags_of(recipe))
            trained.save_pretrained(beside)
    return AutoTokenizer.from_pretrained(folder)


def check_teacher(teacher: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a teacher whose tokens are others than the model's: word by word it would teach nonsense."""
    if pretrained(AutoTokenizer.from_pretrained, teacher, "distill_from").get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"distill_from: {teacher} has other tokens than the model; a model from scratch takes them over with "
            f"--tokenizer {teacher}"
        )


def keep_settings(recipe: RecipeArguments, output: Path) -> None:
    """Writes what makes the model what it is beside its checkpoints, once those of another model are ruled out."""
    now = {name: getattr(recipe, name) for name in (*OF_THE_MODEL, *(() if recipe.model else FROM_SCRATCH))}
    now |= {} if recipe.model else recipe.depths
    file = output / "model_settings.json"
    try:
        begun = read_object(file) if file.is_file() else now
    except PackedFormatError as error:
        raise ValueError(f"{error}; delete it if the run in {output} goes on with its model") from error
    if "layers" in begun:  # a run from before the two had depths of their own
        begun |= dict.fromkeys(("encoder_layers", "decoder_layers"), begun.pop("layers"))
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
        **recipe.depths,
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


def make_sparse(
    model: PreTrainedModel, recipe: RecipeArguments, args: SparseTrainingArguments, pairs: Rows | None = None
) -> None:
    """Gives the model its N:M layers, if the method has any, pruned by ``pairs`` where a training begins with it."""
    if args.sparse_method == "dense":
        return
    soft = METHODS[args.sparse_method].soft
    config = NMSparseConfig(recipe.pattern, recipe.targets, recipe.ignore, soft, transposable=recipe.transposable)
    if pairs is None or recipe.start == "magnitude":
        sparsify(model, config, permute=recipe.permute and pairs is not None)
        return
    calibration = Calibration.of_pairs(model, pairs, recipe.calibration_pairs, method=recipe.start)
    sparsify(model, config, calibration=calibration, permute=recipe.permute)


def translate_in_fresh_process(
    saved: Path, corpus: dict[str, Rows], source: Source, recipe: RecipeArguments, output: Path, name: str
) -> list[str]:
    """Translates the scored split with the saved files in a process that has nothing else of this run.

    ``name`` is that of the files of its texts.
    """
    texts, hypotheses = source_file(output, name), hypotheses_file(output, name)
    write_lines(texts, [source.prefix + one_line(text) for text in corpus[recipe.split]["source"]])
    command = [sys.executable, "-m", "hf_nmsparse", "translate", "--model", str(saved)]
    command += ["--input", str(texts), "--output", str(hypotheses)]
    command += ["--batch-size", str(recipe.eval_batch), "--beams", str(recipe.beams)]
    for option, code in (("--src-lang", source.code), ("--tgt-lang", recipe.target_code)):
        command += [] if code is None else [option, code]
    subprocess.run(command, check=True)
    return read_lines(hypotheses)


def score_source(
    saved: Path, corpus: dict[str, Rows], source: Source, recipe: RecipeArguments, output: Path
) -> dict[str, Any]:
    """The scores of a further source language, in the split of the others."""
    name = f"{recipe.split}.{source.lang}"
    references = list(corpus[recipe.split]["target"])
    write_lines(reference_file(output, name), map(one_line, references))
    return asdict(score(translate_in_fresh_process(saved, corpus, source, recipe, output, name), references))


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
        options={**recipe.start_options(), **args.sparse_options()},
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


def run() -> None:
    """Runs `main`; what a user can mend is one line, anything else a traceback."""
    with in_one_line("wmt_en_de"):
        try:
            main()
            PartialState().destroy_process_group()  # gloo's threads, where they outlive Python, abort the process
        except Preempted as stop:
            print(f"wmt_en_de: {stop}", file=sys.stderr)
            raise


if __name__ == "__main__":
    run()
