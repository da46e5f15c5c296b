"""The front of quality, bytes and speed: what dense and 2:4 models in int8 score for their bytes and their time.

    python -m recipes.front multi30k_tiny front [--only NAME ...] --note "what else the machine was doing"

takes the finished runs of studies: of each its evaluation in recipes/results/STUDY/RUN, and its model and test set in
outputs/STUDY/RUN. Each model is rounded to int8, and translates the whole test set with four beams on one thread, in
fresh processes that take turns: on the engine, and a dense one on CTranslate2 too where that is installed. Runs that
differ in their seed alone are one point. The points go to recipes/results/front.json, with a table beside it and two
pictures in recipes/results/plots; `python recipes/results_table.py --write` puts them into recipes/README.md.
``--add`` keeps the points that are there. What is then added from another machine has its place among the bytes, and
its speed stands in the table alone, marked.

The packed format has no dense layers in int8. So the bytes of a dense model are those of a file of the same layout
without codes: int8 and a scale for each row of linear layers and token embeddings, fp32 for the rest. CTranslate2's
file holds Marian's positions too, which are computed, so that a dense model would look larger by it than it has to be.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, however the script is started
from benchmarks import real_text, tables, timing
from benchmarks.real_text import CTRANSLATE2, DENSE, Candidate
from hf_nmsparse import NMSparseQuantizationConfig, save_packed
from hf_nmsparse.evaluation import Evaluation
from hf_nmsparse.loading import load_seq2seq
from hf_nmsparse.metrics import score
from hf_nmsparse.packed_files import SCALE
from hf_nmsparse.rounding import quantize_rows
from hf_nmsparse.run_files import read_lines, reference_file, source_file
from recipes.front_plots import plot_front

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKED = "engine, 2:4 int8"
BEAMS, THREADS = 4, 1


@dataclass(frozen=True)
class Finished:
    """A finished run of a study.

    Attributes:
        study: Name of the study.
        name: Name of the run, with its seed.
        evaluation: Its record.
        output: Its folder, with the test set.
    """

    study: str
    name: str
    evaluation: Evaluation
    output: Path

    @property
    def group(self) -> tuple[str, str]:
        """What runs that differ in their seed alone have in common."""
        return self.study, without_seed(self.name)

    @property
    def model(self) -> Path:
        """The folder of its model."""
        return self.output / ("dense" if self.evaluation.pattern is None else "packed")

    @property
    def texts(self) -> tuple[list[str], list[str]]:
        """Source and references of the test set."""
        split = self.evaluation.split
        return read_lines(source_file(self.output, split)), read_lines(reference_file(self.output, split))


def without_seed(name: str) -> str:
    """``dense`` for ``dense-s1``."""
    return name.rpartition("-s")[0] or name


def finished_runs(studies: Sequence[str], only: Sequence[str], outputs: Path, results: Path) -> list[Finished]:
    """The runs of some studies, by the names of these and of the runs, or those of ``only``, with or without a seed.

    Raises:
        ValueError: There are none, a name is unknown, a model or test set is gone, or two test sets differ.
    """
    runs: list[Finished] = []
    for study in dict.fromkeys(studies):
        files = sorted((results / study).glob("*/evaluation.json"))
        if not files:
            raise ValueError(f"front: {results / study} holds no finished run; run recipes/study.py first")
        for file in files:
            name = file.parent.name
            runs.append(Finished(study, name, Evaluation.read(file), outputs / study / name))
    for name in only:
        if not any(name in (run.name, run.group[1]) for run in runs):
            raise ValueError(f"front: {name!r} is no finished run; these are {', '.join(run.name for run in runs)}")
    runs = [run for run in runs if not only or run.name in only or run.group[1] in only]
    for run in runs:
        split = run.evaluation.split
        for path in (run.model, source_file(run.output, split), reference_file(run.output, split)):
            if not path.exists():
                raise ValueError(f"front: {path} is gone; bring it back, or name the runs that are whole with --only")
        if run.texts != runs[0].texts:
            raise ValueError(f"front: {run.output} has another test set than {runs[0].output}; give studies of one")
    return runs


def save_int8(run: Finished, folder: Path, with_ctranslate2: bool) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files of each candidate of a run by its name, and what is known of the model without running it."""
    dense = NMSparseQuantizationConfig(compute="dense")
    given = {} if run.evaluation.pattern is None else {"quantization_config": dense}
    model = load_seq2seq(run.model, dtype=torch.float32, **given)
    config = model.config
    facts = {
        "d_model": config.d_model,
        "encoder_layers": config.num_hidden_layers if hasattr(config, "num_decoder_layers") else config.encoder_layers,
        "decoder_layers": getattr(config, "num_decoder_layers", None) or config.decoder_layers,
        "ffn": getattr(config, "d_ff", None) or config.encoder_ffn_dim,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if run.evaluation.pattern is not None:
        save_packed(model, folder / "packed", values="int8")
        return {PACKED: folder / "packed"}, facts | {"bytes": size_of(folder / "packed")}
    folders = {}
    if with_ctranslate2:
        model.save_pretrained(folder / "exact")
        folders[CTRANSLATE2] = real_text.for_ctranslate2(folder / "exact", run.model)
        facts["ctranslate2_bytes"] = size_of(folders[CTRANSLATE2])
    facts["bytes"] = save_rounded(model, folder / "dense")
    return {DENSE: folder / "dense", **folders}, facts


def size_of(folder: Path) -> int:
    """Bytes of the files that hold weights."""
    return sum(file.stat().st_size for kind in ("*.safetensors", "model.bin") for file in folder.glob(kind))


def save_rounded(model: PreTrainedModel, folder: Path) -> int:
    """Saves a dense model whose weights are rounded as those of packed int8 files are, and still numbers of fp32.

    Rounded once more they stay what they are, so that the engine computes with the int8 weights of the file that is
    counted.

    Returns:
        The bytes of a file that holds these weights in int8.
    """
    rounded: dict[str, dict[str, Tensor]] = {}
    for name, module in model.named_modules():
        tokens = isinstance(module, nn.Embedding) and module.num_embeddings == model.config.vocab_size
        if isinstance(module, nn.Linear) or tokens:
            assert isinstance(module.weight, Tensor)
            values, scale = quantize_rows(module.weight)
            module.weight.data.copy_(values * scale[:, None])
            rounded[f"{name}.weight"] = {f"{name}.weight": values, name + SCALE: scale}
    model.save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            tensors |= rounded.get(key, {key: tensor})
    return len(to_bytes(tensors, {"format": "pt"}))


def measure(runs: Sequence[Finished], rounds: int, with_ctranslate2: bool) -> list[dict[str, Any]]:
    """Of each run what `save_int8` says, its scores, and what its translations cost."""
    found, candidates = [], {}
    sources, references = runs[0].texts
    with TemporaryDirectory() as temporary:
        for number, run in enumerate(runs):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            tokenizer: Any = AutoTokenizer.from_pretrained(run.model)
            ids = folder / "source.json"
            ids.write_text(json.dumps(tokenizer(sources, truncation=True)["input_ids"]))
            folders, facts = save_int8(run, folder, with_ctranslate2)
            places = {name: f"{run.study}/{run.name}, {name}" for name in folders}
            candidates |= {places[name]: Candidate(name, file, ids) for name, file in folders.items()}
            found.append((facts, places, tokenizer))
            print(f"{run.study}/{run.name}: {facts['bytes']:,} bytes", flush=True)
        print(f"{len(candidates)} candidates, {rounds} processes of each", flush=True)
        measured = real_text.in_processes(candidates, timing.turns(candidates, rounds), BEAMS, THREADS)
    rows = []
    for facts, places, tokenizer in found:
        row = dict(facts)
        for name, place in places.items():
            tokens, cpu = measured[place]["tokens"], measured[place]["cpu_s"]
            result = score(tokenizer.batch_decode(tokens, skip_special_tokens=True), references)
            speed = sum(map(len, tokens)) / cpu
            if name == CTRANSLATE2:
                row |= {"ctranslate2_bleu": result.bleu, "ctranslate2_tokens_per_second": speed}
                continue
            row |= {"bleu": result.bleu, "chrf": result.chrf, "tokens_per_second": speed}
            row |= {"peak_mib": measured[place]["peak_mib"]}
            row |= {"signature": result.signature, "chrf_signature": result.chrf_signature}
        rows.append(row)
    return rows


def points_of(runs: Sequence[Finished], measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A point for each group of runs: means over the seeds, and the lowest and the highest of the scores."""
    groups: dict[tuple[str, str], list[tuple[Finished, Mapping[str, Any]]]] = {}
    for run, row in zip(runs, measured, strict=True):
        groups.setdefault(run.group, []).append((run, row))
    points = []
    for (study, name), members in groups.items():
        first, rows = members[0][0].evaluation, [row for _, row in members]
        teacher = first.options.get("distill_from")
        point: dict[str, Any] = {
            "study": study,
            "run": name,
            "seeds": sorted(run.evaluation.seed for run, _ in members),
            "method": first.method,
            "pattern": first.pattern,
            "start": first.options.get("start"),
            "teacher": None if teacher is None else without_seed(teacher),
            "after": None if first.base_model is None else without_seed(first.base_model),
        }
        for key in ("d_model", "encoder_layers", "decoder_layers", "ffn", "parameters"):
            point[key] = rows[0][key]

        def mean(key: str, digits: int | None = None, rows: list[Mapping[str, Any]] = rows) -> float | None:
            return round(statistics.fmean(row[key] for row in rows), digits) if key in rows[0] else None

        point["bytes"] = mean("bytes")
        point["extremes"] = {}
        for key in ("bleu", "chrf"):
            point[key] = mean(key, 2)
            point["extremes"][key] = [round(pick(row[key] for row in rows), 2) for pick in (min, max)]
        point |= {key: mean(key, 1) for key in ("tokens_per_second", "peak_mib", "ctranslate2_tokens_per_second")}
        point |= {"ctranslate2_bytes": mean("ctranslate2_bytes"), "ctranslate2_bleu": mean("ctranslate2_bleu", 2)}
        points.append(point)
    return in_order(points)


def table_of(record: Mapping[str, Any]) -> str:
    """A row for each point, dense models first, from small to large."""
    columns = ["run", "pattern", "method", "teacher", "after", "layers", "d", "ffn", "parameters", "bytes", "seeds"]
    lines = tables.table_head([*columns, "BLEU", "chrF", "tokens/CPU s", "CTranslate2 tokens/CPU s", "its bytes"])
    for point in record["rows"]:
        method = point["method"] if point["start"] is None else f"{point['method']}, from {point['start']}"
        cells = [point["run"], point["pattern"] or "dense", method, point["teacher"] or "", point["after"] or ""]
        cells += [f"{point['encoder_layers']}+{point['decoder_layers']}", point["d_model"], point["ffn"]]
        cells += [f"{point['parameters']:,}", f"{point['bytes']:,}", len(point["seeds"])]
        for key in ("bleu", "chrf"):
            low, high = point["extremes"][key]
            cells.append(f"{point[key]:.2f}" + (f" ({low:.2f} to {high:.2f})" if len(point["seeds"]) > 1 else ""))
        for key in ("tokens_per_second", "ctranslate2_tokens_per_second", "ctranslate2_bytes"):
            mark = "*" if "second" in key and "machine" in point else ""
            cells.append("" if point[key] is None else f"{point[key]:,.0f}{mark}")
        lines.append(tables.table_row(cells))
    lines += [
        "",
        f"int8, beam {record['beams']}, all {record['sentences']:,} sentences of {record['text']}, "
        f"{real_text.BATCH} a batch, {record['threads']} thread; speed: medians of {record['rounds']} fresh processes "
        "in turns. Means over the seeds, and the lowest and highest. Parameters count pruned weights. Bytes: of the "
        "packed int8 file, and of a dense model those of a file of the same layout without codes; CTranslate2's holds "
        f"Marian's positions too. BLEU: `{record['signature']}`; chrF: `{record['chrf_signature']}`. transformers "
        f"{record['transformers']}, {record['ctranslate2'] or 'no CTranslate2'}; {tables.machine(dict(record))}",
    ]
    for machine in dict.fromkeys(point["machine"] for point in record["rows"] if "machine" in point):
        lines += ["", f"* On another machine, whose speeds do not compare with those above: {machine}"]
    return "\n".join(lines)


SAME = ("text", "sentences", "beams", "threads", "rounds", "signature", "chrf_signature", "transformers", "ctranslate2")
"""What records have in common whose points stand in one table."""


def added(
    file: Path, record: Mapping[str, Any], points: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A record with its points, and some points more.

    Args:
        file: The record, as it was written.
        record: What is now known of the machine and the measurement.
        points: What was measured; they replace those of the same runs.

    Raises:
        ValueError: There is no record, or it was measured otherwise.
    """
    if not file.exists():
        raise ValueError(f"front: there is no {file} to add to; leave --add out")
    before = tables.read(file)
    for key in SAME:
        if before[key] != record[key]:
            raise ValueError(f"front: {file} was measured with {key} {before[key]}, now it is {record[key]}")
    machine = tables.machine(dict(record))
    if machine != tables.machine(before):
        points = [point | {"machine": machine} for point in points]
    new = {(point["study"], point["run"]) for point in points}
    kept = [point for point in before.pop("rows") if (point["study"], point["run"]) not in new]
    return before, in_order([*kept, *points])


def in_order(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense models first, from small to large."""
    return sorted(points, key=lambda point: (point["pattern"] or "", point["bytes"], point["run"]))


def main(argv: list[str] | None = None) -> int:
    """Measures the front and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="STUDY", help="names of studies, such as multi30k_tiny")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these runs, with or without their seed")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of the runs (default: outputs)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each candidate; medians are over these")
    parser.add_argument("--add", action="store_true", help="keep the other points, whatever machine they are from")
    parser.add_argument("--note", default="", help="what the reader has to know about the machine")
    options = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    machine = timing.machine()  # before this run is its load
    try:
        if options.rounds < 1:
            raise ValueError(f"front: --rounds needs a number of at least 1, got {options.rounds}")
        runs = finished_runs(options.studies, options.only, options.outputs, options.results)
        try:
            version = f"CTranslate2 {importlib.import_module('ctranslate2').__version__}"
        except ImportError:
            version = None
        measured = measure(runs, options.rounds, version is not None)
    except ValueError as error:
        print(str(error) if str(error).startswith("front") else f"front: {error}", file=sys.stderr)
        return 2
    first = runs[0].evaluation
    record = {
        "benchmark": "the front of quality, bytes and speed, medians of fresh processes in turns",
        **machine,
        "transformers": transformers.__version__,
        "ctranslate2": version,
        "text": f"{first.corpus.partition(' + ')[0]}, {first.split}",
        "sentences": len(runs[0].texts[0]),
        "beams": BEAMS,
        "threads": THREADS,
        "rounds": options.rounds,
        "signature": measured[0]["signature"],
        "chrf_signature": measured[0]["chrf_signature"],
        "note": options.note,
    }
    points = points_of(runs, measured)
    output = options.results / "front.json"
    if options.add:
        try:
            record, points = added(output, record, points)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    timing.write(output, record, points, table_of(record | {"rows": points}))
    print(output, *plot_front(points, options.results / "plots"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
