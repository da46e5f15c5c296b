"""Runs of the recipe that a test has time for: a corpus of a few sentences, a very small model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from recipes.wmt_en_de import run
from tests.processes import ROOT, in_a_child, in_a_fresh_one

NOUNS = {"man": "Mann", "dog": "Hund", "child": "Kind", "woman": "Frau", "cat": "Katze"}
VERBS = {"sleeps": "schläft", "runs": "rennt", "eats": "isst", "waits": "wartet"}
PLACES = {"here": "hier", "there": "dort", "outside": "draußen", "inside": "drinnen", "today": "heute", "now": "jetzt"}
PAIRS = [
    (f"The {noun} {verb} {place}.", f"Jetzt {VERBS[verb]} {NOUNS[noun]} {PLACES[place]}.")
    for noun in NOUNS
    for verb in VERBS
    for place in PLACES
]


def write_corpus(folder: Path) -> Path:
    for split, rows in {"train": PAIRS, "validation": PAIRS[::12], "test": PAIRS[::10]}.items():
        lines = (json.dumps({"translation": {"en": en, "de": de}}) for en, de in rows)
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def launch(accelerate: str, *arguments: str, fails: bool = False) -> str:
    """`accelerate launch` as the README says it; what it printed, or its standard error where it is to fail."""
    command = ["-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / accelerate), "--main_process_port", "0"]
    script = ROOT / "recipes" / "wmt_en_de.py"
    if accelerate == "fsdp2.yaml":  # on two CPU processes that are taken for GPUs
        command += ["--num_processes", "2", "--mixed_precision", "no"]
        script = ROOT / "tests" / "fsdp2_on_cpu.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return in_a_fresh_one(*command, script, *arguments, fails=fails, environment=environment)


def run_recipe(*arguments: str, fails: bool = False) -> str:
    """What `launch` does with one process, in a child that need not import anything."""
    done = in_a_child(_recipe, arguments)
    assert bool(done.returncode) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


def _recipe(arguments: tuple[str, ...]) -> None:
    sys.argv = ["wmt_en_de.py", *arguments]
    run()


def tiny(corpus: Path, output: Path, **settings: Any) -> list[str]:
    values: dict[str, Any] = {
        "corpus": corpus,
        "output_dir": output,
        "max_length": 40,
        "vocab_size": 300,
        "d_model": 32,
        "layers": 1,
        "heads": 2,
        "ffn": 64,
        "max_steps": 300,
        "dropout": 0,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 50,
        "tokens_per_batch": 500,
        "beams": 2,
        "learning_rate": 0.01,
        "warmup_steps": 20,
        "save_total_limit": 3,
        "logging_steps": 1,
        "use_cpu": "true",
        **settings,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]
