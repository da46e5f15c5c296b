"""Trains image classifiers on scikit-learn's digits: dense, and by N:M methods with the masks of the paper.

    python recipes/images.py recipes/image_studies/digits_resnet.yaml [--only NAME ...]

A study is one YAML file: a model of transformers, what all its trainings share, and for each run what is different. The
runs follow each other in one process of one CPU thread, less than a minute each. What is done is skipped, so that the
same command finishes a study that was stopped. A sparse model is packed, and the accuracy is that of the packed files,
loaded again. Each run leaves recipes/results/images/STUDY/RUN.json; `results_table.py` makes the table and pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, however the script is started
from benchmarks import tables
from hf_nmsparse import (
    NMPattern,
    NMSparseConfig,
    SparseTrainerMixin,
    SparseTrainingArguments,
    finalize,
    save_packed,
    sparsify,
)
from hf_nmsparse.files import model_folder, replaced
from hf_nmsparse.settings import read_settings
from recipes.mistakes import in_one_line

RESULTS = Path(__file__).parent / "results" / "images"
TEST_IMAGES = 901  # of 1,797; the other half are 28 whole batches of 32
_FILE_NAME = re.compile(r"\w[\w.-]*")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's distribution, two-sided, by the number of seeds


@dataclass(frozen=True)
class Study:
    """A study as its YAML file describes it.

    Attributes:
        name: Name of the file.
        model: The ``model_type`` of transformers.
        config: What its configuration is told.
        enlarge: How many times higher and wider the images are than 8x8: a ResNet's stem alone takes a quarter.
        training: What all runs tell `SparseTrainingArguments`.
        seeds: The seeds of every run.
        runs: For each name what is different: ``pattern``, ``after`` (the run whose model this one starts from) and
            settings of `SparseTrainingArguments`.
    """

    name: str
    model: str
    config: dict[str, Any]
    enlarge: int
    training: dict[str, str]
    seeds: tuple[int, ...]
    runs: dict[str, dict[str, str]]

    @classmethod
    def read(cls, file: Path) -> Study:
        """Reads a study.

        Raises:
            ValueError: The file breaks a rule.
        """
        record = read_settings(file)
        due = {"model": str, "config": dict, "enlarge": str, "training": dict, "seeds": list, "runs": dict}
        if record.keys() != due.keys():
            raise ValueError(f"images: {file} holds the keys {', '.join(due)}, got {', '.join(record)}")
        for key, kind in due.items():
            if not isinstance(record[key], kind):
                raise ValueError(f"images: {file}: {key} is a {kind.__name__}, got {record[key]!r}")
        for key in ("seeds", "runs"):
            if not record[key]:
                raise ValueError(f"images: {file}: {key} holds nothing; give one")
        for key, value in (("enlarge", record["enlarge"]), *(("seeds", seed) for seed in record["seeds"])):
            if not (isinstance(value, str) and value.isdecimal()) or (key == "enlarge" and int(value) < 1):
                least = 1 if key == "enlarge" else 0
                raise ValueError(f"images: {file}: {key} needs whole numbers of at least {least}, got {value!r}")
        for name, run in record["runs"].items():
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"images: {file}: {name!r} is no name of a run, which is a file's too")
            if not isinstance(run, dict):
                raise ValueError(f"images: {file}: {name} holds keys and values, got {run!r}")
            if "after" in run and run["after"] not in record["runs"].keys() - {name}:
                raise ValueError(f"images: {file}: {name} starts after {run['after']!r}, which is no other run")
        seeds = tuple(map(int, record["seeds"]))
        config = {key: _number(value) for key, value in record["config"].items()}
        if record["model"] not in CONFIG_MAPPING:
            raise ValueError(f"images: {file}: transformers knows no model {record['model']!r}; name one such as vit")
        known = AutoConfig.for_model(record["model"])
        if unknown := [key for key in config if not hasattr(known, key)]:
            raise ValueError(f"images: {file}: config of {record['model']} has no {', '.join(unknown)}; leave it out")
        enlarge = int(record["enlarge"])
        return cls(file.stem, record["model"], config, enlarge, record["training"], seeds, record["runs"])


def _number(value: Any) -> Any:
    """The texts of a YAML file as the numbers that they are, in lists too."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    try:
        return json.loads(value)
    except ValueError:
        return value


class ImageTrainer(SparseTrainerMixin, Trainer):
    """The Trainer of transformers for N:M layers."""


def digits(enlarge: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images for training and for testing, one channel from -1 to 1; the same parts in every run."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    pixels = pixels.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, found.target, strict=True)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [rows[place] for place in order]
    return shuffled[TEST_IMAGES:], shuffled[:TEST_IMAGES]


@torch.no_grad()
def accuracy(model: Any, images: Sequence[dict[str, Any]]) -> float:
    """The percentage of the images whose class a model finds."""
    pixels = torch.stack([image["pixel_values"] for image in images])
    labels = torch.tensor([image["labels"] for image in images])
    found: Tensor = model.eval()(pixel_values=pixels).logits.argmax(dim=1)
    return 100 * float((found == labels).float().mean())


def train(study: Study, name: str, seed: int, outputs: Path) -> dict[str, Any]:
    """Trains a run, leaves its model under ``outputs``, and returns what is kept of it."""
    settings = dict(study.runs[name])
    pattern, after = settings.pop("pattern", None), settings.pop("after", None)
    folder = outputs / f"{name}-s{seed}"
    set_seed(seed)
    if after is None:
        config = AutoConfig.for_model(study.model, **study.config)
        model = AutoModelForImageClassification.from_config(config)
    else:
        model = AutoModelForImageClassification.from_pretrained(outputs / f"{after}-s{seed}")
    if pattern is not None:
        sparsify(model, NMSparseConfig(pattern, convolutions=True))
    given = study.training | settings | {"output_dir": str(folder), "seed": str(seed)}
    given |= {"use_cpu": "true", "save_strategy": "no", "disable_tqdm": "true", "sparse_log_layers": "false"}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    (arguments,) = HfArgumentParser(SparseTrainingArguments).parse_args_into_dataclasses(words)  # type: ignore[arg-type]
    images, held_out = digits(study.enlarge)
    trainer = ImageTrainer(model=model, args=arguments, train_dataset=images)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    if not log:
        steps = trainer.state.global_step
        raise ValueError(f"images: {name} ends after {steps} steps, before its first log; give smaller logging_steps")
    if pattern is None:
        with model_folder(folder) as place:
            model.save_pretrained(place)
    else:
        finalize(model)
        save_packed(model, folder)
    measured = AutoModelForImageClassification.from_pretrained(folder)
    kept = ("step", "loss", "sad", "flip_rate")
    return {
        "study": study.name,
        "run": name,
        "seed": seed,
        "pattern": pattern,
        "method": arguments.sparse_method,
        "decay": arguments.sparse_decay,
        "after": after,
        "accuracy": accuracy(measured, held_out),
        "images": [len(images), len(held_out)],
        "parameters": model.num_parameters(),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "steps": trainer.state.global_step,
        "train_seconds": round(max(entry["train_seconds"] for entry in log), 1),
        "versions": {package: version(package) for package in ("torch", "transformers", "scikit-learn")},
        "curve": [{key: float(f"{entry[key]:.5g}") for key in kept if key in entry} for entry in log],
    }


def run(study: Study, only: Sequence[str], outputs: Path, results: Path) -> None:
    """Trains what is not done, and what another run starts from and is gone; the first seed of every run first."""
    for name in only:
        if name not in study.runs:
            raise ValueError(f"images: {name!r} is no run; the runs are {', '.join(study.runs)}")
    for seed in study.seeds:
        for name in only or study.runs:
            kept = results / study.name / f"{name}-s{seed}.json"
            if kept.is_file():
                continue
            after = study.runs[name].get("after")
            if after is not None and not (outputs / f"{after}-s{seed}" / "model.safetensors").is_file():
                train(study, after, seed, outputs)
            record = train(study, name, seed, outputs)
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replaced(kept) as file:
                curve = ",\n".join(map(json.dumps, record.pop("curve")))
                head = json.dumps(record, indent=1).removesuffix("\n}")
                file.write_text(f'{head},\n "curve": [\n{curve}\n]}}\n', encoding="utf-8")
            print(f"{kept.stem}: {record['accuracy']:.1f}%, {record['train_seconds']:.0f} s", flush=True)


def records(results: Path = RESULTS) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What the runs have left, by study and by name of the run."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(results.glob("*/*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(record["study"], {}).setdefault(record["run"], []).append(record)
    return found


def interval(numbers: Sequence[float]) -> str:
    """``+0.2 (-0.6 to +1.0)``: the mean and its 95% interval by Student's distribution; no interval of one number."""
    mean = statistics.fmean(numbers)
    if len(numbers) not in T_95:
        return _signed(mean)
    half = T_95[len(numbers)] * statistics.stdev(numbers) / math.sqrt(len(numbers))
    return f"{_signed(mean)} ({_signed(mean - half)} to {_signed(mean + half)})"


def _signed(number: float) -> str:
    """A number with its sign, which that of a rounded zero is not."""
    return f"{round(number, 1) + 0.0:+.1f}"


def late_flips(record: dict[str, Any]) -> float | None:
    """The mean flip rate over the last quarter of a run; None where no mask changes or there is none."""
    rates = [entry["flip_rate"] for entry in record["curve"] if "flip_rate" in entry]
    late = rates[-max(1, len(rates) // 4) :]
    return statistics.fmean(late) if any(late) else None


def table(results: Path = RESULTS) -> str:
    """A row for each run of each study: means over the seeds, beside the dense runs of the same seeds.

    Dense runs come first, then the others by pattern, the best first.
    """
    found = records(results)
    if not found:
        return "It has not been measured yet."
    columns = ["study", "run", "pattern", "method", "seeds", "accuracy (lowest to highest)", "to dense (95%)"]
    lines = tables.table_head([*columns, "SAD", "flip rate at the end", "bytes"])
    for study, runs in found.items():
        dense = {record["seed"]: record["accuracy"] for record in runs.get("dense", [])}
        for name, seeds in sorted(runs.items(), key=_place):
            scores = [record["accuracy"] for record in seeds]
            spread = f"{statistics.fmean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"
            pairs = [record["accuracy"] - dense[record["seed"]] for record in seeds if record["seed"] in dense]
            flips = [rate for rate in map(late_flips, seeds) if rate is not None]
            sad = [entry["sad"] for record in seeds for entry in record["curve"] if flips and "sad" in entry]
            first = seeds[0]
            method = first["method"] if not first["decay"] else f"{first['method']}, λ {first['decay']:g}"
            method += f", after {first['after']}" if first["after"] else ""
            cells = [study, name, first["pattern"] or "dense", method, len(seeds), spread]
            cells += [interval(pairs) if pairs and name != "dense" else ""]
            cells += [f"{statistics.fmean(sad):.0f}" if sad else "", f"{statistics.fmean(flips):.2g}" if flips else ""]
            lines.append(tables.table_row([*cells, f"{first['bytes']:,}"]))
    return "\n".join([*lines, "", notes(found)])


def _place(entry: tuple[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """Where a run stands in the table."""
    first = entry[1][0]
    kept = 1.0 if first["pattern"] is None else NMPattern.parse(first["pattern"]).density
    return -kept, -statistics.fmean(record["accuracy"] for record in entry[1])


def notes(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """What the rows have in common, and whether STE's masks change more than SR-STE's."""
    each = [record for runs in found.values() for seeds in runs.values() for record in seeds]
    first = each[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    said = [
        f"{first['images'][0]:,} images for training and {first['images'][1]:,} for the accuracy, in percent, of the "
        "packed files; the interval is that of the paired difference over the seeds, by Student's distribution. SAD: "
        "mask entries that a step changes, mean over the run; at the end: over its last quarter.",
    ]
    for study, runs in found.items():
        for name in sorted(runs):
            other = name.replace("ste-", "sr-ste-", 1)
            if name.startswith("ste-") and other in runs:
                rates = [statistics.fmean(late_flips(record) or 0 for record in runs[one]) for one in (name, other)]
                word, both = "more" if rates[0] > rates[1] else "no more", f"{rates[0]:.2g} and {rates[1]:.2g}"
                said.append(f"{study}, {name}: at the end masks change {word} than under SR-STE, {both} a step.")
    return "\n".join(f"- {line}" for line in [*said, f"Versions: {versions}; fp32, one CPU thread."])


def plot(results: Path = RESULTS) -> list[Path]:
    """Draws the flip rates of each study against steps, a line for each run that changes its masks."""
    from matplotlib import pyplot

    drawn = []
    for study, runs in records(results).items():
        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        for name, seeds in runs.items():
            if late_flips(seeds[0]) is None:
                continue
            steps = [entry["step"] for entry in seeds[0]["curve"] if "flip_rate" in entry]
            rates = [[entry["flip_rate"] for entry in one["curve"] if "flip_rate" in entry] for one in seeds]
            axes.plot(steps, [statistics.fmean(column) for column in zip(*rates, strict=True)], label=name)
        axes.set(xlabel="optimizer step", ylabel="flip rate: fraction of the mask that a step changes", yscale="log")
        axes.grid(alpha=0.3)
        figure.legend(fontsize="small", loc="outside right upper")
        file = results / f"{study}_flips.png"
        figure.savefig(file, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
        drawn.append(file)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these runs alone, of every seed")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/images"), help="folder of the models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # more only wait for each other over images of 8x8
    with in_one_line("images"):
        study = Study.read(options.study)
        run(study, options.only, options.outputs / study.name, options.results)


if __name__ == "__main__":
    main()
