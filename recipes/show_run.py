"""Shows what a finished run of the recipe has made, on one page.

    python recipes/show_run.py outputs/demo

Prints a few test sentences with their reference and the packed model's translation, bytes and tokens a second of the
packed model and of its dense export, BLEU with its signature, and where everything lies; draws the plots of the run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, however the script is started
from benchmarks import timing
from hf_nmsparse import export_dense
from hf_nmsparse.loading import load_seq2seq
from hf_nmsparse.pipeline import translate
from hf_nmsparse.plots import plot_runs, read_run
from hf_nmsparse.run_files import hypotheses_file, read_lines, reference_file, source_file

SHOWN = 5
MEASURED = 32
BATCHES = (1, 16)


def page(folder: Path, rounds: int = 5) -> str:
    """The page of the run in ``folder``; its plots are drawn beside it.

    Raises:
        ValueError: The folder holds no finished run that ends in a packed model.
    """
    packed = folder / "packed"
    if not (packed / "config.json").is_file():
        raise ValueError(f"show_run: {folder} holds no packed model; give the folder of a finished sparse run")
    run = read_run(folder)
    evaluation = run.evaluation
    texts = [read_lines(file(folder, evaluation.split)) for file in (source_file, reference_file, hypotheses_file)]
    lines = [f"{evaluation.model}; {run.settings}; {evaluation.corpus}, {evaluation.split}", ""]
    for source, reference, translation in evenly(list(zip(*texts, strict=True)), SHOWN):
        lines += [f"  source     {source}", f"  reference  {reference}", f"  {evaluation.pattern:9}  {translation}", ""]
    lines += speeds(packed, evenly(texts[0], MEASURED), rounds)
    plots = plot_runs([run], folder / "plots")
    lines += ["", f"BLEU {evaluation.bleu:.2f}  {evaluation.signature}, {evaluation.sentences:,} sentences", ""]
    places = {"model, card": [packed, packed / "README.md"], "plots": plots}
    places["curves"] = [file for file in (folder / "curve.json", folder / "layers.parquet") if file.is_file()]
    lines += [f"{name:12} {', '.join(map(str, files))}" for name, files in places.items()]
    return "\n".join(lines)


def speeds(packed: Path, sources: list[str], rounds: int) -> list[str]:
    """Bytes and tokens a second of a packed model and of its dense export: same sentences, turns taken."""
    tokenizer = AutoTokenizer.from_pretrained(packed)
    model = load_seq2seq(str(packed))
    with TemporaryDirectory() as temporary:
        dense = Path(temporary)
        export_dense(model, dense)
        models = {"dense export": (load_seq2seq(str(dense)), size(dense)), "packed": (model, size(packed))}
    found: dict[str, list[float]] = {name: [] for name in models}
    for batch in BATCHES:
        candidates = {
            name: partial(translate, loaded.eval(), tokenizer, sources, batch) for name, (loaded, _) in models.items()
        }
        tokens = {name: sum(map(len, tokenizer(run()).input_ids)) for name, run in candidates.items()}  # warms up too
        for name, seconds in timing.in_turns(candidates, rounds).items():
            found[name].append(tokens[name] / statistics.median(seconds))
    head = "".join(f"{f'batch {batch}':>12}" for batch in BATCHES)
    lines = [f"{'':14}{'bytes':>14}{head}   tokens a second"]
    for name, (_, bytes_) in models.items():
        lines.append(f"{name:14}{bytes_:14,}" + "".join(f"{speed:12,.0f}" for speed in found[name]))
    beams = model.generation_config.num_beams or 1
    return [
        *lines,
        f"{len(sources)} test sentences, beam {beams}, both in {str(model.dtype).removeprefix('torch.')}, "
        f"{torch.get_num_threads()} thread(s) of {timing.machine()['cpu']}, medians of {rounds} turns",
    ]


def size(folder: Path) -> int:
    """Bytes of the weights of a model."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def evenly(rows: list[Any], count: int) -> list[Any]:
    """So many of the rows, from the first on at equal distances; all if there are fewer."""
    count = min(count, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def main(argv: list[str] | None = None) -> int:
    """Prints the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of the run")
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        print(page(options.run))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
