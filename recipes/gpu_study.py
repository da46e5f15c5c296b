"""What a GPU says in one call of some minutes: the tests for GPUs, their benchmark, and dense and 2:4 models trained.

    python -m recipes.gpu_study --prepare outputs/tokens --corpus ../shared/data/multi30k    (on any machine)
    python -m recipes.gpu_study outputs/tokens --minutes 9                                   (on the GPU)

The second needs torch, transformers, accelerate and sacrebleu alone, neither datasets nor evaluate, and no network. It
runs `tests/gpu` where pytest is installed and `benchmarks/gpu.py`, each once, and trains Transformer-base in bf16 for
the rest of the time: 2:4 SR-STE for half of it, and the dense model up to the same step. Both go through the file that
would be published and are scored on the test set. Called again with the same output folder it goes on from the
checkpoints. JSON for the tables goes to recipes/results/gpu and benchmarks/results, below ``--results``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from hf_nmsparse import NMSparseConfig, SparseTrainer, SparseTrainingArguments, finalize, save_packed, sparsify
from hf_nmsparse.checkpoints import last_complete_checkpoint
from hf_nmsparse.evaluation import evaluation_record
from hf_nmsparse.files import model_folder, replaced
from hf_nmsparse.loading import load_seq2seq
from hf_nmsparse.metrics import SentenceStatistics, compare, score
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.pipeline import translate
from hf_nmsparse.run_files import (
    hypotheses_file,
    one_line,
    read_lines,
    reference_file,
    source_file,
    write_lines,
)
from hf_nmsparse.run_logs import write_curve

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "validation")
SCORED = "test"
MOST_BYTES = 50 * 2**20
"""What a machine with a GPU may be sent."""

PATTERN, SEED = "2:4", 1
METHODS = ("sr-ste", "dense")
"""In the order of training: the dense model follows up to the step that the sparse one has reached."""

EVALUATION_SECONDS = 50
"""What is left of the time for checkpoint, validation, files and translation of each model."""


@dataclass(frozen=True)
class Shape:
    """A Transformer and how it is trained.

    Attributes:
        d_model: Width.
        layers: Of the encoder, and of the decoder.
        heads: Attention heads.
        ffn: Feed-forward width.
        tokens_per_batch: As in `SparseTrainingArguments`.
        warmup_steps: The same.
        max_steps: Where a training is done, however much time is left.
        beams: Of the evaluation.
    """

    d_model: int = 512
    layers: int = 6
    heads: int = 8
    ffn: int = 2048
    tokens_per_batch: int = 8192
    warmup_steps: int = 1000
    max_steps: int = 10_000
    beams: int = 4


TINY = Shape(32, 1, 2, 64, tokens_per_batch=512, warmup_steps=4, max_steps=8, beams=1)


def prepare(corpora: Sequence[Path], target: Path, source_lang: str, target_lang: str, vocabulary: int) -> None:
    """Writes tokens, tokenizer and test set of corpora; validation and test are those of the first.

    Raises:
        ValueError: ``target`` is there, a split is missing, or what is written is more than `MOST_BYTES`.
    """
    from hf_nmsparse.pairs import find_files, read_pairs
    from hf_nmsparse.tokenizer import train_tokenizer

    if target.exists():
        raise ValueError(f"gpu_study: {target} is there already; name a new folder")

    def pairs(corpus: Path, split: str) -> list[dict[str, str]]:
        if not corpus.is_dir():
            raise ValueError(f"gpu_study: no folder {corpus}; give folders with train.*, validation.* and test.*")
        files = find_files(corpus, split, source_lang, target_lang)
        if not files:
            raise ValueError(f"gpu_study: {corpus} has no split {split}, which it needs; name another corpus first")
        return list(read_pairs(files, source_lang, target_lang))

    first = corpora[0]
    rows = {split: pairs(first, split) for split in (*SPLITS, SCORED)}
    for corpus in corpora[1:]:
        rows["train"] += pairs(corpus, "train")
    tokenizer = train_tokenizer((row[side] for side in ("source", "target") for row in rows["train"]), vocabulary, 256)
    with replaced(target) as folder:
        folder.mkdir()
        tokenizer.save_pretrained(folder / "tokenizer")
        for split in SPLITS:
            save_file(_tokens(rows[split], tokenizer), folder / f"{split}.safetensors")
        for file, side in ((source_file, "source"), (reference_file, "target")):
            write_lines(file(folder, SCORED), [one_line(row[side]) for row in rows[SCORED]])
        names = " + ".join(corpus.resolve().name for corpus in corpora)
        (folder / "prepared.json").write_text(json.dumps({"corpus": names}) + "\n", encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > MOST_BYTES:
            raise ValueError(f"gpu_study: tokens take {size:,} bytes, over {MOST_BYTES:,}; name fewer corpora")
    print(f"{target}: {len(rows['train']):,} pairs, {size:,} bytes")


def _tokens(rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """The tokens of pairs, one sentence after the other, and how many each has; pairs that are too long stay out."""
    encoded = tokenizer([row["source"] for row in rows], text_target=[row["target"] for row in rows], verbose=False)
    pairs = [
        pair
        for pair in zip(encoded["input_ids"], encoded["labels"], strict=True)
        if max(map(len, pair)) <= tokenizer.model_max_length
    ]
    found = {}
    for side, sentences in zip(("source", "target"), zip(*pairs, strict=True), strict=True):
        found[side] = torch.tensor([token for tokens in sentences for token in tokens], dtype=torch.int32)
        found[f"{side} lengths"] = torch.tensor([len(tokens) for tokens in sentences], dtype=torch.int32)
    return found


def read_tokens(file: Path) -> list[dict[str, list[int]]]:
    """The pairs of a file that `prepare` wrote.

    Raises:
        ValueError: There is no such file.
    """
    if not file.is_file():
        raise ValueError(f"gpu_study: no file {file}; make it with --prepare")
    found = load_file(file)
    sides = []
    for side in ("source", "target"):
        sentences = found[side].split(found[f"{side} lengths"].tolist())
        sides.append([tokens.tolist() for tokens in sentences])
    return [{"input_ids": source, "labels": target} for source, target in zip(*sides, strict=True)]


def run_tests(file: Path, end: float) -> None:
    """Runs `tests/gpu` in a process of its own and keeps what it says; a failure does not end the study."""
    if find_spec("pytest") is None:
        said = "not run: pytest is not installed"
    else:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu"]
        if find_spec("hypothesis") is None:  # which tests/conftest.py sets up, and tests/gpu has no use for
            command.append("--noconftest")
        said = _said(command, end)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{said}\n", encoding="utf-8")
    print(f"tests/gpu: {said.splitlines()[-1]}", flush=True)


def run_benchmark(file: Path, end: float, tiny: bool) -> None:
    """Runs `benchmarks/gpu.py`, which writes its results to ``file``; a failure does not end the study."""
    note = "before the trainings of recipes/gpu_study.py; nothing else ran"
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(file), "--note", note]
    said = _said([*command, *(["--tiny"] if tiny else [])], end)
    print(f"benchmarks/gpu.py: {said.splitlines()[-1]}", flush=True)


def _said(command: Sequence[str], end: float) -> str:
    """What a process prints, and below it how it has ended; it is ended a minute before the study's time is up."""
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    limit = max(end - time.monotonic() - 60, 1)
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=limit, **output)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s, when no time was left"
    return f"{done.stdout.rstrip()}\nexit status {done.returncode}"


class _Until(TrainerCallback):
    """Ends a training at a time, and leaves a checkpoint there and at its last step."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self.deadline or state.global_step >= state.max_steps:
            control.should_save = control.should_log = control.should_training_stop = True


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> MarianMTModel:
    """A model of the recipe's kind from scratch."""
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": shape.layers, f"{side}_attention_heads": shape.heads, f"{side}_ffn_dim": shape.ffn}
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=shape.d_model,
        dropout=0.2,
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=512,
        forced_eos_token_id=None,
        **sides,
        **special,
    )
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig(
        num_beams=shape.beams, max_length=256, bad_words_ids=[[tokenizer.pad_token_id]], **special
    )
    return model


def arguments(method: str, shape: Shape, max_steps: int, output: Path) -> SparseTrainingArguments:
    """How either model is trained: as the recipe trains Transformer-base, but for the warm-up, and in bf16."""
    return SparseTrainingArguments(
        str(output),
        sparse_method=method,
        sparse_log_layers=False,
        seed=SEED,
        max_steps=max_steps,
        per_device_eval_batch_size=64,
        tokens_per_batch=shape.tokens_per_batch,
        learning_rate=7e-4,
        lr_scheduler_type="inverse_sqrt",
        warmup_steps=shape.warmup_steps,
        adam_beta2=0.98,
        adam_epsilon=1e-9,
        label_smoothing_factor=0.1,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
    )


def train(
    method: str, tokens: Path, shape: Shape, max_steps: int, output: Path, deadline: float
) -> tuple[SparseTrainer, PreTrainedTokenizerBase]:
    """Trains on from the last checkpoint, up to a step or a time."""
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    model = new_model(shape, tokenizer)
    if method != "dense":
        sparsify(model, NMSparseConfig(PATTERN))
    train_rows, validation_rows = (read_tokens(tokens / f"{split}.safetensors") for split in SPLITS)
    trainer = SparseTrainer(
        model=model,
        args=arguments(method, shape, max_steps, output),
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        callbacks=[_Until(deadline)],
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output))
    return trainer, tokenizer


def step_milliseconds(log: Sequence[dict[str, Any]]) -> float | None:
    """Median time of a step between two logs; None where there are none. Logs around a stop are far apart."""
    points = [(row["step"], row["train_seconds"]) for row in log if "loss" in row]
    found = [
        1000 * (end - begin) / (step - before) for (before, begin), (step, end) in pairwise(points) if step > before
    ]
    return statistics.median(found) if found else None


def evaluate(
    method: str, trainer: SparseTrainer, tokenizer: PreTrainedTokenizerBase, tokens: Path, shape: Shape, results: Path
) -> None:
    """Writes the file that would be published, loads it on the device, scores it, and keeps all that tables read."""
    output, device = Path(str(trainer.args.output_dir)), trainer.args.device
    loss = trainer.evaluate()["eval_loss"]
    model: Any = trainer.model
    sparse, saved = method != "dense", output / "model"
    if sparse:
        finalize(model)
        save_packed(model, saved, values="bf16")
    else:
        with model_folder(saved) as beside:
            model.to(torch.bfloat16).save_pretrained(beside)
    loaded = load_seq2seq(str(saved)).to(device)
    references = read_lines(reference_file(tokens, SCORED))
    hypotheses = [one_line(line) for line in translate(loaded, tokenizer, read_lines(source_file(tokens, SCORED)), 256)]
    for file in (source_file, reference_file):
        shutil.copyfile(file(tokens, SCORED), file(output, SCORED))
    write_lines(hypotheses_file(output, SCORED), hypotheses)
    statistics_ = SentenceStatistics.of(hypotheses, references)
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    found = check_folder(saved) if sparse else None
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    log = trainer.state.log_history
    logged = {key: value for entry in log for key, value in entry.items()}  # the last of each
    record = evaluation_record(
        score(hypotheses, references),
        corpus=json.loads((tokens / "prepared.json").read_text(encoding="utf-8"))["corpus"],
        split=SCORED,
        model=f"MarianMTModel, {shape.layers}+{shape.layers} layers, d {shape.d_model}, beam {shape.beams}, on {where}",
        method=method,
        pattern=PATTERN if sparse else None,
        decay=trainer.args.sparse_decay or None,
        seed=SEED,
        steps=trainer.state.global_step,
        values="bf16",
        train_seconds=logged.get("train_seconds"),
        flip_rate=logged.get("flip_rate"),
        validation_loss=loss,
        packed_bytes=size if sparse else None,
        dense_bytes=size + (0 if found is None else found.dense_bytes - found.packed_bytes),
    )
    place = kept(results) / f"{method}-s{SEED}"
    speed = {"step_ms": step_milliseconds(log), "device": where, **asdict(shape)}
    for folder in (output, place):
        folder.mkdir(parents=True, exist_ok=True)
        write_curve(log, folder / "curve.json")
        statistics_.write(folder / "sentences.json")
        (folder / "speed.json").write_text(json.dumps(speed, indent=2) + "\n", encoding="utf-8")
        record.write(folder / "evaluation.json")
    taken = "" if speed["step_ms"] is None else f", {speed['step_ms']:.1f} ms a step"
    print(f"{method}: step {record.steps:,}{taken}, validation loss {loss:.3f}, BLEU {record.bleu:.2f} on {where}")


def study(tokens: Path, output: Path, results: Path, minutes: float, tiny: bool) -> None:
    """Does all that fits into the time, and leaves what a later call goes on with.

    Raises:
        ValueError: The tokens are not there, or there is no GPU.
    """
    began, shape = time.monotonic(), TINY if tiny else Shape()
    if not torch.cuda.is_available() and not tiny:
        raise ValueError("gpu_study: there is no GPU here; --tiny tries the study on the CPU")
    for name in ("prepared.json", *(f"{split}.safetensors" for split in SPLITS)):
        if not (tokens / name).is_file():
            raise ValueError(f"gpu_study: no file {tokens / name}; make it with --prepare")
    end = began + 60 * minutes
    tests, benchmark = kept(results) / "tests.txt", results / "benchmarks" / "results" / "gpu.json"
    if not tests.is_file():
        run_tests(tests, end)
    if not benchmark.is_file():
        run_benchmark(benchmark, end, tiny)
    steps: list[int] = []
    for method, share in zip(METHODS, (0.5, 1.0), strict=True):
        now = time.monotonic()
        left = end - now - EVALUATION_SECONDS * (len(METHODS) - len(steps))
        deadline = now + share * max(left, 0)
        trainer, tokenizer = train(method, tokens, shape, min([shape.max_steps, *steps]), output / method, deadline)
        steps.append(trainer.state.global_step)
        evaluate(method, trainer, tokenizer, tokens, shape, results)
        del trainer  # and its memory on the GPU
    if len(set(steps)) > 1:
        print(f"the dense model is at step {steps[1]:,} of {steps[0]:,}; call again before the two are compared")
        return
    sparse, dense = (hypotheses_file(output / method, SCORED) for method in METHODS)
    print(compare(*(read_lines(file) for file in (sparse, dense, reference_file(tokens, SCORED)))))


def kept(results: Path) -> Path:
    """Where the results of the trainings go: a study, to the tables."""
    return results / "recipes" / "results" / "gpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares tokens or runs the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", nargs="?", type=Path, help="folder that --prepare made")
    parser.add_argument("--prepare", type=Path, metavar="DST", help="make tokens of --corpus in this new folder")
    parser.add_argument("--corpus", nargs="+", type=Path, help="folders as the recipe reads them, the one scored first")
    parser.add_argument("--languages", nargs=2, default=("en", "de"), metavar="KEY", help="source and target")
    parser.add_argument("--vocabulary", type=int, default=8000, help="entries of the tokenizer (default: 8000)")
    parser.add_argument("--minutes", type=float, default=9, help="what the whole call may take (default: 9)")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="checkpoints and texts of the runs")
    parser.add_argument("--results", type=Path, default=ROOT, help="where the JSON goes (default: this checkout)")
    parser.add_argument("--tiny", action="store_true", help="a very small model: tries the study, on a CPU too")
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        prepares = options.prepare is not None
        if prepares == (options.tokens is not None) or prepares != (options.corpus is not None):
            raise ValueError("gpu_study: give a folder of tokens, or --prepare and --corpus to make one")
        if prepares:
            prepare(options.corpus, options.prepare, *options.languages, options.vocabulary)
        elif not options.minutes > 0:
            raise ValueError(f"gpu_study: --minutes needs a number above 0, got {options.minutes}")
        else:
            study(options.tokens, options.output, options.results.resolve(), options.minutes, options.tiny)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
