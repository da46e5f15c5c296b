"""What a large model takes on one machine: pruning and SR-STE of a model with the shape of NLLB-600M, random weights.

    python -m benchmarks.large --note "what else the machine was doing"

`nmsparse prune` of a checkpoint, and `SparseTrainer` on it under each way of saving memory that transformers offers: an
optimizer with smaller state, autocast to bf16, gradient checkpointing, frozen embeddings. Every candidate is a process
of its own: it loads the checkpoint, makes it 2:4, trains, packs it in int8, and says what it has held at most. Most
take four steps, which is when all that a training holds is there; those marked `whole` take all of `--steps`. It takes
about half an hour on two cores and 6 GB of disk, and writes benchmarks/results/large.json and a table beside it.
torchao and bitsandbytes are needed for the candidates alone that are theirs; where they are not installed, these are
left out and listed. With `--only` the rows stay that the file has of other candidates.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DataCollatorForSeq2Seq, M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

from benchmarks import tables, timing
from benchmarks.peak import peak_mib
from hf_nmsparse import NMSparseConfig, SparseTrainer, SparseTrainingArguments, cli, save_packed, sparsify
from hf_nmsparse.loading import load_seq2seq

BATCH, LENGTH, SHORT = 8, 16, 4
LETTERS = "abcdefghijklmnopqrst"


@dataclass(frozen=True)
class Way:
    """A way to train the model.

    Attributes:
        optim: As transformers names the optimizer.
        masters: Number type of the weights.
        embeddings: Whether the embeddings, which are the output projection too, train.
        settings: Further training arguments.
        needs: The package that has the optimizer.
        whole: Whether it takes all steps.
    """

    optim: str
    masters: torch.dtype = torch.float32
    embeddings: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    needs: str = "torch"
    whole: bool = False


LEAN = {"bf16": True, "activation_checkpointing": True}
WAYS = {
    "AdamW, fp32": Way("adamw_torch_fused"),
    "AdamW, bf16 autocast, checkpointing": Way("adamw_torch_fused", settings=LEAN),
    "8-bit AdamW of torchao, likewise": Way("adamw_torch_8bit", settings=LEAN, needs="torchao"),
    "8-bit AdamW of bitsandbytes, likewise": Way("adamw_bnb_8bit", settings=LEAN, needs="bitsandbytes", whole=True),
    "Adafactor, likewise": Way("adafactor", settings=LEAN),
    "8-bit AdamW of bitsandbytes, likewise, frozen embeddings": Way(
        "adamw_bnb_8bit", embeddings=False, settings=LEAN, needs="bitsandbytes"
    ),
    "AdamW, likewise, frozen embeddings": Way("adamw_torch_fused", embeddings=False, settings=LEAN),
    "Adafactor, likewise, bf16 masters": Way(
        "adafactor", masters=torch.bfloat16, settings={"activation_checkpointing": True}
    ),
    "Adafactor, bf16 autocast, checkpointing, frozen embeddings": Way(
        "adafactor", embeddings=False, settings=LEAN, whole=True
    ),
}
PRUNING = {"nmsparse prune, SparseGPT": "sparsegpt", "nmsparse prune, Wanda": "wanda"}  # to the option --method
CANDIDATES = (*PRUNING, *WAYS)


def write_checkpoint(folder: Path, tiny: bool) -> None:
    """A model of the shape and a tokenizer of a few letters."""
    torch.manual_seed(0)
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS]
    tokenizer = NllbTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[],
        extra_special_tokens=["eng_Latn", "deu_Latn"],
    )
    shape = (256_206, 1_024, 12, 16) if not tiny else (300, 32, 1, 2)
    size, width, layers, heads = shape
    sides = ("encoder", "decoder")
    settings: dict[str, Any] = {f"{side}_layers": layers for side in sides}
    settings |= {f"{side}_attention_heads": heads for side in sides}
    settings |= {f"{side}_ffn_dim": 4 * width for side in sides}
    settings |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = M2M100Config(vocab_size=size, d_model=width, max_position_embeddings=1_024, **settings)
    M2M100ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sentences(count: int, seed: int) -> list[str]:
    """Made-up sentences of as many letters as make a side of a batch with its two special tokens."""
    draws = random.Random(seed)
    return ["".join(draws.choices(LETTERS, k=LENGTH - 3)) for _ in range(count)]


def prune(folder: Path, method: str) -> dict[str, Any]:
    """The command, with 256 pairs of sentences; seconds, and the most that the process held."""
    files = []
    for side in ("source", "target"):
        files.append(folder / f"{side}.txt")
        files[-1].write_text("\n".join(sentences(256, len(files))) + "\n", encoding="utf-8")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder.parent) as target:
        arguments = ["--calibration", *map(str, files), "--src-lang", "eng_Latn", "--tgt-lang", "deu_Latn"]
        cli.main(["prune", str(folder), f"{target}/pruned", *arguments, "--method", method, "--values", "int8"])
        size = sum(file.stat().st_size for file in Path(target).glob("pruned/*.safetensors"))
    return {"seconds": round(time.perf_counter() - start, 1), "peak_mib": round(peak_mib()), "packed_bytes": size}


class _Clock(transformers.TrainerCallback):
    """When steps begin and end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def train(folder: Path, way: Way, steps: int) -> dict[str, Any]:
    """A training, and what the process held at most when the model was loaded, trained and packed."""
    model: Any = load_seq2seq(str(folder), dtype=way.masters)
    tokenizer = NllbTokenizer.from_pretrained(folder, src_lang="eng_Latn", tgt_lang="deu_Latn")
    if not way.embeddings:
        model.get_input_embeddings().requires_grad_(False)
    sparsify(model, NMSparseConfig("2:4"))
    loaded = peak_mib()
    texts = zip(sentences(BATCH * steps, 1), sentences(BATCH, 2) * steps, strict=True)  # targets that can be learnt
    pairs = [tokenizer(source, text_target=target).data for source, target in texts]
    clock = _Clock()
    with tempfile.TemporaryDirectory(dir=folder.parent) as output:
        args = SparseTrainingArguments(
            output,
            optim=way.optim,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            label_smoothing_factor=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
            **way.settings,
        )
        trainer = SparseTrainer(
            model=model,
            args=args,
            train_dataset=pairs,  # type: ignore[arg-type]  # a list does
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            callbacks=[clock],
        )
        trainer.train()
        trained = peak_mib()
        save_packed(model, Path(output) / "packed", values="int8")
        size = sum(file.stat().st_size for file in Path(output).glob("packed/*.safetensors"))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": steps,
        "seconds_a_step": round(statistics.median(clock.seconds[1:]), 2),
        "first_step_seconds": round(clock.seconds[0], 2),
        "loaded_mib": round(loaded),
        "peak_mib": round(trained),
        "packing_peak_mib": round(peak_mib()),
        "first_loss": round(logged[0]["loss"], 3),
        "last_loss": round(logged[-1]["loss"], 3),
        "flip_rate": logged[-1]["flip_rate"],
        "packed_bytes": size,
    }


def measure(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """What a candidate measures, in this process."""
    return prune(folder, PRUNING[name]) if name in PRUNING else train(folder, WAYS[name], steps)


def in_a_process(name: str, folder: Path, steps: int, threads: int) -> dict[str, Any]:
    """What a candidate measures in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.large", "--one", name, str(folder)]
    command += ["--steps", str(steps), "--threads", str(threads)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return measured


def rows_of_earlier_runs(file: Path, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What ``file`` has of each candidate.

    Raises:
        ValueError: It was measured on another machine or model than ``record`` says.
    """
    if not file.exists():
        return {}
    earlier = tables.read(file)
    other = [name for name, value in record.items() if earlier.get(name) != value]
    if other:
        raise ValueError(f"--only: {file} has rows of another {', '.join(other)}; give another --output, or no --only")
    return {row["what"]: row for row in earlier["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps of the candidates that take them all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, metavar="CANDIDATE", help="and keep the other rows")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", default=timing.RESULTS / "large.json", type=Path, help="a table goes beside")
    parser.add_argument("--tiny", action="store_true", help="a very small model: tries the script")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.one[0], Path(options.one[1]), options.steps)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_checkpoint(folder, options.tiny)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        machine = timing.machine()
        load = machine.pop("load")
        record = {
            "benchmark": "what a large model takes",
            **machine,
            "transformers": transformers.__version__,
            "model": f"An M2M100 model of NLLB-600M's shape, {size // 4:,} parameters, random weights",
            "dense_bytes": size,
            "batch": BATCH,
            "length": LENGTH,
            "threads": options.threads,
            "seed": 0,
        }
        measured = rows_of_earlier_runs(options.output, record) if options.only else {}
        missing = []
        for name in options.only or CANDIDATES:
            way = WAYS.get(name)
            if way is not None and find_spec(way.needs) is None:
                missing.append(name)
                continue
            steps = options.steps if way is not None and way.whole else SHORT
            found = in_a_process(name, folder, steps, options.threads)
            measured[name] = {"what": name, **found, "load": load, "note": options.note}
            print(measured[name], flush=True)
            rows = [measured[candidate] for candidate in CANDIDATES if candidate in measured]
            whole = record | {"missing": [candidate for candidate in missing if candidate not in measured]}
            # After each candidate: a later one may take more memory than there is.
            timing.write(options.output, whole, rows, tables.large_of(whole | {"rows": rows}))
    print(options.output)


if __name__ == "__main__":
    main()
