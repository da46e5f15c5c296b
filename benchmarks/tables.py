"""The tables of the benchmarks, each from the record that a benchmark wrote into benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

MEASURED = Path(__file__).parent / "results"

Columns = Mapping[str, Callable[[dict[str, Any]], object]]

# Of the kernels, the layers that benchmarks/README.md shows, and its columns.
SHAPES = ([512, 2048], [1024, 4096], [512, 32000])
CANDIDATES = {
    "torch bf16": "torch bf16",
    "torch int8": "torch int8",
    "dense int8": "own dense int8",
    "2:4 fp32": "2:4 fp32",
    "2:4 fp32, x bf16": "2:4 fp32, x bf16",
    "2:4 bf16": "2:4 bf16",
    "2:4 bf16, x bf16": "2:4 bf16, x bf16",
    "2:4 int8": "2:4 int8",
}

# Of the patterns, what is set beside what: each candidate beside the product that has its numbers and no sparsity.
PATTERNS = {
    "dense int8": ("2:4 int8", "1:4 int8", "4:8 int8"),
    "dense bf16": ("2:4 bf16", "1:4 bf16"),
    "dense bf16, x bf16": ("2:4 bf16, x bf16", "1:4 bf16, x bf16"),
    "dense fp32": ("2:4 fp32", "1:4 fp32"),
}

# Of the whole models, those that README.md shows, as it calls them.
SUMMARY = {
    "dense fp32, transformers' loop": "transformers fp32",
    "2:4 int8, transformers' loop": "2:4 int8, transformers' loop",
    "CTranslate2 int8": "CTranslate2 int8",
    "dense int8": "own dense int8",
    "2:4 int8": "2:4 int8",
}


def masks_table() -> str:
    """How long a mask takes, for the large weight of the benchmark."""
    record = read(MEASURED / "masks.json")

    def of_the_large(part: str) -> list[dict[str, Any]]:
        return [row for row in record[part] if row["shape"] == [1024, 4096]]

    head = ["mask of a 1024x4096 fp32 weight", "threads", "argsort ms", "topk ms", "ours ms", "argsort / ours"]
    rows = table_head(head)
    for row in of_the_large("rows"):
        argsort, topk, ours = (row["median_ms"][name] for name in ("argsort", "topk", "hf_nmsparse"))
        cells = [f"{argsort:.1f}", f"{topk:.1f}", f"{ours:.2f}", f"{argsort / ours:.0f}"]
        rows.append(table_row([row["pattern"], row["threads"], *cells]))
    head = ["transposable 2:4 mask of it", "threads", "torch ms", "ours ms", "torch / ours", "2:4 along rows ms"]
    rows += ["", *table_head(head)]
    for row in of_the_large("transposable"):
        torch, ours, along = (row["median_ms"][name] for name in ("torch", "hf_nmsparse", "along rows"))
        cells = [f"{torch:.0f}", f"{ours:.2f}", f"{torch / ours:.0f}", f"{along:.2f}"]
        rows.append(table_row(["the best of 90 a block", row["threads"], *cells]))
    where = f"{record['cpu']}, {record['cores']} cores, torch {record['torch']}"
    rows += ["", f"Medians of {record['rounds']} interleaved calls, {where}; {record['note']}."]
    return "\n".join(rows)


def kernels_table() -> str:
    """Some layers, with cold weights and all cores, once for each vector unit that was measured."""
    tables = []
    for file in sorted(MEASURED.glob("kernels_*.json")):
        record = read(file)
        threads = max(row["threads"] for row in record["rows"])
        wanted = (threads, "cold")
        shown = [r for r in record["rows"] if (r["threads"], r["place"]) == wanted and r["shape"] in SHAPES]
        columns: Columns = {"in x out": shape_of, "rows": lambda row: row["rows"]}
        names = [name for name in CANDIDATES if name != "2:4 fp32, x bf16"]
        tables.append(speedups(shown, columns, names) + f"\n\n{threads} threads, cold weights. {kernels_notes(record)}")
    return "\n\n".join(tables)


def kernels_of(record: dict[str, Any]) -> str:
    """All rows of a measurement of single layers."""
    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "model": lambda row: row["model"],
        "in x out": shape_of,
        "rows": lambda row: row["rows"],
        "threads": lambda row: row["threads"],
        "weights": lambda row: row["place"],
    }
    columns |= {f"auto {precision}": partial(auto_of, precision=precision) for precision in ("fp32", "bf16", "int8")}
    notes = f"auto: the format, and its speed-up over the dense layer. {kernels_notes(record)}"
    return speedups(record["rows"], columns, list(CANDIDATES)) + f"\n\n{notes}"


def speedups(rows: list[dict[str, Any]], columns: Columns, names: list[str]) -> str:
    """A table of ``columns`` and of the speed-up of each candidate over torch in fp32."""
    lines = table_head([*columns, "torch fp32 µs", *(CANDIDATES[name] for name in names)])
    for row in rows:
        times = row["median_us"]
        fp32 = times["torch fp32"]
        cells = [f"{fp32 / times[name]:.2f}" if name in times else "" for name in names]
        lines.append(table_row([*(column(row) for column in columns.values()), f"{fp32:,.1f}", *cells]))
    return "\n".join(lines)


def kernels_notes(record: dict[str, Any]) -> str:
    """How single layers were measured, and how well the choice of ``compute="auto"`` did."""
    layers = [row for row in record["rows"] if row["model"] != "control"]
    choices = [(precision, choice) for row in layers for precision, choice in row.get("auto", {}).items()]
    formats = sorted({f"{choice['format']} for {precision}" for precision, choice in choices})
    slower = sum(choice["to_dense"] < 1 for _, choice in choices)
    worst = min(choice["to_fastest"] for _, choice in choices)
    return (
        f"Speed-up over torch fp32, medians of {record['rounds']} interleaved turns. Cold weights come from memory: "
        f"each candidate goes round {record['cold_bytes'] / 2**20:,.0f} MiB of copies. torch int8 is dynamic, with the "
        f"{record['int8_engine']} engine. Over all layers, rows, threads and places measured, "
        f'`compute="auto"`, which takes {", ".join(formats)}, is slower than dense in {slower} of {len(choices)} cases '
        f"and has at worst {worst:.0%} of the speed of the fastest mode that keeps the precision. {machine(record)}"
    )


def patterns_table() -> str:
    """Layers of each pattern with cold weights, once for each vector unit that was measured."""
    parts = []
    for file in sorted(MEASURED.glob("patterns_*.json")):
        record = read(file)
        shown = [row for row in record["rows"] if row["place"] == "cold" and row["shape"] in SHAPES]
        parts.append(patterns_of(record, [row for row in shown if row["rows"] != 8]))
    return "\n\n".join(parts)


def patterns_of(record: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> str:
    """Rows of a measurement of patterns, all if None, and what holds of all."""
    names = [name for group in PATTERNS.values() for name in group]
    lines = table_head(["in x out", "rows", "weights", "dense int8 µs", *names])
    for row in record["rows"] if rows is None else rows:
        times = row["median_us"]
        cells = [f"{times[dense] / times[name]:.2f}" for dense, group in PATTERNS.items() for name in group]
        lines.append(table_row([shape_of(row), row["rows"], row["place"], f"{times['dense int8']:,.1f}", *cells]))
    compared = {
        "1:4 int8": ("dense int8", "2:4 int8", "torch fp32", "torch bf16"),
        "4:8 int8": ("dense int8", "torch fp32", "torch bf16"),
        "1:4 bf16": ("dense bf16", "2:4 bf16"),
        "1:4 bf16, x bf16": ("2:4 bf16, x bf16", "torch bf16"),
        "1:4 fp32": ("dense fp32", "2:4 fp32", "torch fp32"),
    }
    said = [
        f"{name}: {', '.join(f'{ratios(record, other, name)} times as fast as {other}' for other in others)}"
        for name, others in compared.items()
    ]
    notes = (
        "Speed-up over the package's dense product in the same numbers, one thread, CPU time, medians of "
        f"{record['rounds']} interleaved turns; cold weights go round {record['cold_bytes'] / 2**20:,.0f} MiB of "
        f"copies. Over all shapes, rows and places measured, least, mean and most: {'; '.join(said)}. {machine(record)}"
    )
    return "\n".join([*lines, "", notes])


def ratios(record: dict[str, Any], other: str, name: str) -> str:
    """How much faster a candidate is than another in a measurement: least, geometric mean and most."""
    found = [row["median_us"][other] / row["median_us"][name] for row in record["rows"]]
    return f"{min(found):.2f}, {geometric_mean(found):.2f} and {max(found):.2f}"


def shape_of(row: dict[str, Any]) -> str:
    """``512x2048``, and a word if it is a head."""
    shape = "x".join(map(str, row["shape"]))
    return f"{shape} (head)" if row.get("model", "").endswith("head") else shape


def auto_of(row: dict[str, Any], precision: str) -> str:
    """What ``compute="auto"`` takes for a precision, and its speed-up over the dense layer."""
    choice = row.get("auto", {}).get(precision)
    return "" if choice is None else f"{choice['format']} {choice['to_dense']:.2f}"


def generate_table() -> str:
    """Whole models of each shape that was measured."""
    return "\n\n".join(
        generate_of(read(file)) for file in sorted(MEASURED.glob("generate*.json"), key=lambda f: f.stem)
    )


def generate_of(record: dict[str, Any]) -> str:
    """Tokens a second of each candidate, and the speed-up over the baseline; a table for each number of threads."""
    baseline, lines = record["baseline"], []
    for threads in dict.fromkeys(row["threads"] for row in record["rows"]):
        settings = [row for row in record["rows"] if row["threads"] == threads]
        clock = "CPU time" if threads == 1 else "wall time"
        what = f"{threads} thread{'s' * (threads > 1)}, {clock}"
        lines += table_head([what, "file", *map(decoding, settings)])
        for name, file in record["candidates"].items():
            speeds = [row["tokens_per_second"] for row in settings]
            cells = [
                f"{each[name]:,.0f} ({each[name] / each[baseline]:.2f})" if name in each else "" for each in speeds
            ]
            lines.append(table_row([name, f"{record['bytes'][file]:,}", *cells]))
        lines.append("")
    exact = [name for name in ("dense fp32", "2:4 fp32", "CTranslate2 fp32") if name in record["same_tokens"]]
    same = ", ".join(f"{name} {record['same_tokens'][name]:.0%}" for name in exact)
    lines += [
        f"Tokens a second, and in brackets the speed-up over {baseline}; bytes of the model file. "
        f"{record['model']}, random weights, {record['source_tokens']} tokens in, {record['new_tokens']} out, medians "
        f"of {record['rounds']} interleaved turns."
        + (f" Greedy tokens that agree with those of transformers in fp32: {same}." if same else "")
        + f" transformers {record['transformers']}, {record['ctranslate2'] or 'no CTranslate2'}; {machine(record)}",
        *(f"\nNot measured: {name} ({why})." for name, why in record["missing"].items()),
    ]
    return "\n".join(lines)


def summary_of(record: dict[str, Any]) -> str:
    """Of the whole models, the few that tell sparsity from kernels: bytes, tokens a second, and two ratios."""
    shown = [row for row in record["rows"] if (row["beams"], row["batch"]) in ((1, 1), (4, 16))]
    shown.sort(key=lambda row: (row["beams"], row["threads"]))
    size = {name: record["bytes"][file] for name, file in record["candidates"].items()}
    names = [name for name in SUMMARY if name in size]
    lines = table_head(["model", "bytes", *(f"{decoding(row)}, {row['threads']} thr." for row in shown)])
    for name in names:
        speeds = [f"{row['tokens_per_second'][name]:,.0f}" for row in shown]
        lines.append(table_row([SUMMARY[name], f"{size[name]:,}", *speeds]))

    def ratio(row: dict[str, Any], name: str) -> float:
        speeds = row["tokens_per_second"]
        return float(speeds["2:4 int8"] / speeds[name])

    ranges = []
    for name in [name for name in names if name in ("dense int8", "CTranslate2 int8")]:
        # The dense int8 candidate has no file of its own: it is rounded as it loads.
        smaller = "" if name == "dense int8" else f"{size['2:4 int8'] / size[name]:.2f}"
        lines.append(table_row([f"2:4 int8 / {SUMMARY[name]}", smaller, *(f"{ratio(row, name):.2f}" for row in shown)]))
        ratios = [ratio(row, name) for row in record["rows"]]
        mean = geometric_mean(ratios)
        ranges.append(f"{min(ratios):.2f} to {max(ratios):.2f} (mean {mean:.2f}) times that of {SUMMARY[name]}")
    lines += [
        "",
        f"Tokens a second, and bytes of the model file. Over all {len(record['rows'])} settings measured the speed of "
        f"2:4 int8 is {' and '.join(ranges)}. {record['model']}, random weights; transformers "
        f"{record['transformers']}, {record['ctranslate2'] or 'no CTranslate2'}; {machine(record)}",
    ]
    return "\n".join(lines)


def real_text_of(record: dict[str, Any]) -> str:
    """Of each candidate what a whole text costs, its BLEU, and how many sentences come out as in transformers' loop."""
    lines = table_head(
        ["text", "candidate", "CPU s", "wall s", "tokens/CPU s", "process CPU s", "MiB", "BLEU", "same sentences"]
    )
    for row in record["rows"]:
        text = f"{row['text']}, {'greedy' if row['beams'] == 1 else 'beam ' + str(row['beams'])}"
        cells = [f"{row[cost]:,.2f}" for cost in ("cpu_s", "wall_s")]
        cells += [f"{row['tokens'] / row['cpu_s']:,.0f}", f"{row['process_cpu_s']:,.1f}", f"{row['peak_mib']:,.0f}"]
        cells += [f"{row['bleu']:.2f}", f"{row['same']:.1%}" if "same" in row else ""]
        lines.append(table_row([text, row["candidate"], *cells]))
    found = [gap for row in record["rows"] for gap in row.get("gaps", ())]
    ties = f", their two translations at most {max(found):.0e} apart" if found else ""
    sentences = max(row["sentences"] for row in record["rows"])
    lines += [
        "",
        f"{record['model']}, the first {sentences:,} sentences of each, 64 a batch, {record['threads']} thread(s); "
        f"medians of {record['rounds']} fresh processes in turns, of transformers' loop one; process: all of it, from "
        f"the first import on. Same sentences: as in transformers' loop on the same file, 64 a batch. Sentences that "
        f"differ in fp32: {len(found)}{ties}. BLEU: `{record['signature']}`. transformers "
        f"{record['transformers']}, {record['ctranslate2'] or 'no CTranslate2'}; {machine(record)}",
        *(f"\nNot measured: {name} ({why})." for name, why in record["missing"].items()),
    ]
    return "\n".join(lines)


def decoding(row: dict[str, Any]) -> str:
    """Beam and batch of a measurement in a few words."""
    return f"{'greedy' if row['beams'] == 1 else 'beam ' + str(row['beams'])}, batch {row['batch']}"


def training_of(record: dict[str, Any]) -> str:
    """Time of a step of each candidate, and the overhead over the dense one with its interval."""
    rows = table_head(["training step", "threads", "ms", "to dense", "95%"])
    for row in record["rows"]:
        for name, step in row["steps"].items():
            low, high = step["interval"]
            change = ["", ""] if name == "dense" else [f"{step['overhead']:+.1%}", f"{low:+.1%} to {high:+.1%}"]
            rows.append(table_row([name, row["threads"], f"{step['median_ms']:,.0f}", *change]))
    rows += [
        "",
        f"{record['model']}, {record['batch']}x{record['length']} tokens a side, fp32, {record['optimizer']}; medians "
        f"of {record['rounds']} interleaved steps, intervals by bootstrap over the rounds. The second dense model "
        f"shows the noise. {machine(record)}",
    ]
    return "\n".join(rows)


def methods_of(record: dict[str, Any]) -> str:
    """Time of a step of each training, over the bare loop's and over the dense training's, with intervals."""
    rows = table_head(["training", "ms a step", "to the bare loop (95%)", "to dense (95%)"])
    for row in record["rows"]:
        bare = row["name"].startswith("bare")
        name = row["name"] if bare else f"SparseTrainer, {row['name']}"
        changes = [
            "" if empty else "{:+.1%} ({:+.1%} to {:+.1%})".format(*row[key])
            for key, empty in (("to_bare", row["name"] == "bare loop"), ("to_dense", bare or row["name"] == "dense"))
        ]
        rows.append(table_row([name, f"{row['median_ms']:,.0f}", *changes]))
    rows += [
        "",
        f"{record['model']}, {record['batch']} a batch, {record['threads']} thread, {record['optimizer']}, label "
        f"smoothing, clipping; medians of {record['rounds']} interleaved steps, their means over {record['starts']} "
        f"starts of all processes, intervals by bootstrap over starts and steps. {machine(record)}",
    ]
    return "\n".join(rows)


def training_name(
    method: str, pattern: str | None = "2:4", targets: Iterable[str] | None = None, distilled: bool = False
) -> str:
    """How benchmarks/methods.py names a training, by what its evaluation records: ``sr-ste, 1:4``."""
    words = [method, *([pattern] if pattern not in (None, "2:4") else []), *(targets or ())]
    return ", ".join([*words, "distilled"] if distilled else words)


def step_times() -> dict[str, float]:
    """Of each training, the time of a step relative to a dense one; none where nothing was measured."""
    file = MEASURED / "methods.json"
    rows = read(file)["rows"] if file.is_file() else []
    return {row["name"]: 1 + row["to_dense"][0] for row in rows if row["name"] != "dense"}


def faults_of(record: dict[str, Any]) -> str:
    """Kills by the moment they fell in, and how many of the trainings ended as an undisturbed one."""
    rows = table_head(["killed in", "kills", "bit-identical after the resume"])
    for moment in dict.fromkeys(row["moment"] for row in record["rows"]):
        ends = [row["identical"] for row in record["rows"] if row["moment"] == moment]
        rows.append(table_row([moment, len(ends), sum(ends)]))
    ends = [row["identical"] for row in record["rows"]]
    return "\n".join([*rows, table_row(["all", len(ends), sum(ends)]), "", machine(record)])


def startup_of(record: dict[str, Any]) -> str:
    """Seconds to the end of each part of a start, and the peak of memory."""
    parts = [name for name in record["rows"][0] if name not in ("pairs", "start") and "MiB" not in name]
    memory = ["MiB before", "MiB at the peak", "MiB after"]
    rows = table_head(["pairs", "start", *(f"{part}, s" for part in parts), *memory])
    for row in record["rows"]:
        seconds = [f"{row[part]:,.1f}" for part in parts]
        rows.append(table_row([f"{row['pairs']:,}", row["start"], *seconds, *(row[name] for name in memory)]))
    rows += [
        "",
        f"{record['corpus']}, repeated; {record['batch']} a batch; seconds since the start; texts to tokens in "
        f"{record['processes']} process(es); MiB that the process has for itself. {machine(record)}",
    ]
    return "\n".join(rows)


def scaling_of(record: dict[str, Any]) -> str:
    """Time of a step by the number of processes, and the tokens a second relative to one."""
    rows = table_head(["processes", "ms a step", "tokens a second"])
    alone = record["rows"][0]
    for row in record["rows"]:
        speed = row["processes"] * alone["step_ms"] / row["step_ms"] / alone["processes"]
        rows.append(table_row([row["processes"], f"{row['step_ms']:,.0f}", f"{speed:.2f}x"]))
    rows += [
        "",
        f"{record['method']}, DDP on gloo, one thread and {record['batch']} a process; medians of {record['rounds']} "
        f"trainings in turns, {record['steps']} steps each. {machine(record)}",
    ]
    return "\n".join(rows)


def corpora_of(record: dict[str, Any]) -> str:
    """Lines a second of a corpus by the processes that translate it, and what that is relative to one."""
    rows = table_head(["processes", "seconds", "least to most", "lines/s", "to one process"])
    alone = record["rows"][0]["seconds"]
    for row in record["rows"]:
        taken, speed = row["all_seconds"], record["lines"] / row["seconds"]
        cells = [row["what"], f"{row['seconds']:.1f}", f"{min(taken):.1f} to {max(taken):.1f}", f"{speed:,.0f}"]
        rows.append(table_row([*cells, f"{alone / row['seconds']:.2f}x"]))
    rows += [
        "",
        f"{record['model']}, {record['lines']:,} lines in shards of {record['shard_size']:,}, beam {record['beams']}, "
        f"one thread a process; seconds of whole commands, medians of {record['rounds']} turns. {machine(record)}",
    ]
    return "\n".join(rows)


def memory_of(record: dict[str, Any]) -> str:
    """Memory of a training at its peak, and what that is relative to the dense one of the same batch."""
    columns = ["training", "tokens a side", "tensors MiB", "to dense", "masks MiB", "process MiB", "lowest to highest"]
    rows = table_head([*columns, "to dense"])
    for row in record["rows"]:
        dense = next(other for other in record["rows"] if (other["what"], other["batch"]) == ("dense", row["batch"]))
        tensors, process = (
            "" if row is dense else f"{row[part] / dense[part] - 1:+.1%}" for part in ("tensors_mib", "process_mib")
        )
        cells = [row["what"], f"{row['batch'] * record['length']:,}", f"{row['tensors_mib']:,.0f}", tensors]
        cells += [row["masks_mib"] or "", f"{row['process_mib']:,.0f}"]
        rows.append(table_row([*cells, " to ".join(f"{mib:,.0f}" for mib in row["range_mib"]), process]))
    rows += [
        "",
        f"{record['model']}, fp32, {record['optimizer']}; the most that is held at a time in {record['steps']} steps, "
        f"of processes the median of {record['rounds']} in turns. {machine(record)}",
    ]
    return "\n".join(rows)


def large_of(record: dict[str, Any]) -> str:
    """What pruning and training of a large model hold at their peak, and how long a step is."""
    rows = table_head(
        ["what", "GB at the peak", "of packing", "s a step", "steps", "loss, first and last", "GB packed, int8"]
    )
    for row in record["rows"]:
        cells: list[object] = [row["what"], f"{row['peak_mib'] * 2**20 / 1e9:.1f}"]
        if "steps" in row:
            cells.append(f"{row['packing_peak_mib'] * 2**20 / 1e9:.1f}")
            cells += [f"{row['seconds_a_step']:.1f}", row["steps"], f"{row['first_loss']:.2f}, {row['last_loss']:.2f}"]
        else:
            cells += ["", f"{row['seconds']:.0f} in all", "", ""]
        rows.append(table_row([*cells, f"{row['packed_bytes'] / 1e9:.2f}"]))
    notes: dict[str, list[str]] = {}
    for row in record["rows"]:
        notes.setdefault(row["note"], []).append(row["what"])
    note = "; ".join(f"{', '.join(names)}: {note}" if len(notes) > 1 else note for note, names in notes.items() if note)
    where = machine(record | {"note": note})
    left_out = f" Not installed: {', '.join(record['missing'])}." if record["missing"] else ""
    rows += [
        "",
        f"{record['model']}, {record['dense_bytes'] / 1e9:.2f} GB in fp32; 2:4 SR-STE, {record['batch']} pairs of "
        f"{record['length']} tokens a side a step, {record['threads']} thread(s). Peak: the most that the process was "
        "resident with as it loaded and trained, and then as it packed, each candidate in a process of its own; s a "
        f"step: the median but for the first.{left_out} transformers {record['transformers']}; {where}",
    ]
    return "\n".join(rows)


def gpu_of(record: dict[str, Any]) -> str:
    """What was measured on a GPU: work on one weight, training steps, packed layers and whole models."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        parts.setdefault(row["part"], []).append(row)
    weights = [row for row in record["rows"] if "us" in row and row["part"] != "packed layer"]
    rows = table_head(["of a weight", "shape", "argsort µs", "topk", "torch", "Triton", "torch / Triton"])
    for row in weights:
        found = row["us"]
        cells = [f"{found[name]:,.1f}" if name in found else "" for name in ("argsort", "topk", "torch", "Triton")]
        what = f"{row['part']}, {row['what']}"
        rows.append(table_row([what, shape_of(row), *cells, f"{found['torch'] / found['Triton']:.1f}"]))
    rows += ["", *table_head(["training step", "ms", "to dense", "95%", "peak MiB"])]
    for row in parts["training step"]:
        low, high = row["interval"]
        change = ["", ""] if row["what"] == "dense" else [f"{row['to_dense']:+.1%}", f"{low:+.1%} to {high:+.1%}"]
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,}"
        rows.append(table_row([row["what"], f"{row['ms']:,.1f}", *change, peak]))
    if "packed layer" in parts:
        counts = list(dict.fromkeys(row["rows"] for row in parts["packed layer"]))
        rows += ["", *table_head(["in x out", *(f"{count} rows" for count in counts), "auto takes"])]
        for shape in dict.fromkeys(shape_of(row) for row in parts["packed layer"]):
            found = [row for row in parts["packed layer"] if shape_of(row) == shape]
            cells = [f"{row['us']['dense'] / row['us']['semi_structured']:.2f}" for row in found]
            rows.append(table_row([shape, *cells, "semi_structured" if found[0]["auto"] else "dense"]))
        rows += ["", "Speed-up of the layer on sparse tensor cores over the dense one, both bf16."]
    names = list(parts["generate"][0]["tokens_per_second"])
    rows += ["", *table_head(["generate", *names])]
    for row in parts["generate"]:
        rows.append(table_row([decoding(row), *(f"{row['tokens_per_second'][name]:,.0f}" for name in names)]))
    rows += [
        "",
        f"Tokens a second of a packed bf16 file. Steps are of {record['batch']}x{record['length']} tokens a side under "
        f"bf16 autocast; medians of {record['rounds']} interleaved turns, of {record['calls']} calls each for single "
        f"weights and layers. {record['gpu']}, CUDA {record.get('cuda')}, Triton {record.get('triton')}, cuSPARSELt "
        f"{record.get('cusparselt')}. {machine(record)}",
    ]
    rows += ["", *(f"Not measured: {name} ({why})." for name, why in record["missing"].items())]
    return "\n".join(rows).rstrip()


def serve_of(record: dict[str, Any]) -> str:
    """Sentences a second and the times of single ones, of both servers."""
    lines = table_head(["search", "clients", "server", "sentences/s", "p50 ms", "p95 ms", "p99 ms"])
    for row in record["rows"]:
        search = "greedy" if row["beams"] == 1 else f"beam {row['beams']}"
        times = [f"{row[f'p{percent}_ms']:,.1f}" for percent in (50, 95, 99)]
        lines.append(table_row([search, row["clients"], row["candidate"], f"{row['sentences_per_s']:,.0f}", *times]))
    memory, most = record["memory_mib"], max(row["clients"] for row in record["rows"])
    limit = f", at most {record['max_new_tokens']} new tokens" if record["max_new_tokens"] else ""
    lines += [
        "",
        f"{record['model']}, sentences of {record['text']}{limit}; {record['threads']} thread(s) of a server, "
        f"clients on the same machine; medians of {record['rounds']} turns of {record['seconds']:g} seconds in fresh "
        f"servers. Memory of the engine's server under {most} clients: {memory['early']:,.1f} MiB after "
        f"{record['minutes'] / 4:g} minutes, {memory['late']:,.1f} MiB after {record['minutes']:g} and "
        f"{memory['sentences']:,} sentences. "
        f"{'CTranslate2 ' + record['ctranslate2'] if record['ctranslate2'] else 'No CTranslate2'}; {machine(record)}",
    ]
    return "\n".join(lines)


def paragraphs_of(record: dict[str, Any]) -> str:
    """BLEU and lost sentences of paragraphs, by how they are given to the model."""
    lines = table_head(["text", "given to the model", "BLEU", "sentences lost", "CPU s"])
    for row in record["rows"]:
        lost = f"{row['lost']:,} of {row['sentences']:,}"
        lines.append(table_row([row["text"], row["way"], f"{row['bleu']:.2f}", lost, f"{row['cpu_s']:.2f}"]))
    lines += [
        "",
        f"{record['model']}, beam {record['beams']}, one thread; paragraphs of {record['lines']} lines, BLEU of whole "
        f"paragraphs, `{record['signature']}`. {machine(record)}",
    ]
    return "\n".join(lines)


def placeholders_of(record: dict[str, Any]) -> str:
    """Placeholders, tags and BLEU of the texts of an interface."""
    lines = table_head(["", "placeholders kept", "texts that kept all", "tags kept", "BLEU", "chrF", "CPU s"])
    for row in record["rows"]:
        of_tags = f"{row['tags_kept']:,} of {row['tags']:,}" if "tags" in row else "-"
        kept, whole = f"{row['kept']:,} of {row['placeholders']:,}", f"{row['whole']:,} of {row['texts']:,}"
        figures = [f"{row[name]:.2f}" for name in ("bleu", "chrf", "cpu_s")]
        lines.append(table_row([row["way"], kept, whole, of_tags, *figures]))
    if balanced := [f"{row['balanced']:,} of {row['texts']:,}" for row in record["rows"] if "balanced" in row]:
        lines += ["", f"Of the pages {balanced[0]} are balanced."]
    lines += [
        "",
        f"{record['model']}, beam {record['beams']}, one thread; BLEU and chrF `{record['signature']}`. "
        f"{machine(record)}",
    ]
    return "\n".join(lines)


def glossary_of(record: dict[str, Any]) -> str:
    """Terms that came out as the glossary says, and BLEU."""
    lines = table_head(["glossary", "terms kept", "BLEU", "chrF", "CPU s"])
    for row in record["rows"]:
        figures = [f"{row[name]:.2f}" for name in ("bleu", "chrf", "cpu_s")]
        lines.append(table_row([row["glossary"], f"{row['kept']:,} of {row['terms']:,}", *figures]))
    sentences = f"{record['rows'][0]['sentences']:,} sentences of {record['text']}, one by one"
    lines += [
        "",
        f"{record['model']}, beam {record['beams']}, one thread; {sentences}; BLEU and chrF `{record['signature']}`. "
        f"{machine(record)}",
    ]
    return "\n".join(lines)


def exports_of(record: dict[str, Any]) -> str:
    """Speed, size and translations of a model in the formats of other tools."""
    lines = table_head(
        ["search", "runs on", "bytes", "tokens/CPU s", "to the engine in int8", "BLEU", "same sentences"]
    )
    speeds = {(row["beams"], row["candidate"]): row["tokens"] / row["cpu_s"] for row in record["rows"]}
    for row in record["rows"]:
        search = "greedy" if row["beams"] == 1 else f"beam {row['beams']}"
        speed = speeds[row["beams"], row["candidate"]]
        ratio = speed / speeds[row["beams"], "engine, 2:4 int8"]
        cells = [f"{row['bytes']:,}", f"{speed:,.0f}", f"{ratio:.2f}", f"{row['bleu']:.2f}", f"{row['same']:.1%}"]
        lines.append(table_row([search, row["candidate"], *cells]))
    versions = ", ".join(f"{tool} {version}" for tool, version in record["versions"].items())
    lines += [
        "",
        f"{record['model']}, the first {record['sentences']:,} sentences of {record['text']}, at most "
        f"{record['length']} new tokens, {record['batch']} a batch, 1 thread; medians of {record['rounds']} fresh "
        "processes in turns. Bytes of ONNX are those of three files, two of which hold the decoder. Same sentences: "
        "as on the engine in fp32, which gives those of transformers. "
        f"BLEU: `{record['signature']}`. transformers {record['transformers']}"
        f"{', ' + versions if versions else ''}; {machine(record)}",
        *(f"\nNot measured: {tool} ({why})." for tool, why in record["missing"].items()),
    ]
    return "\n".join(lines)


def measured_table(name: str) -> str:
    """The table of a benchmark's file."""
    return OF[name](read(MEASURED / f"{name}.json"))


def quality_table() -> str:
    """What each way to compute costs in BLEU."""
    record = read(MEASURED / "quality.json")
    rows = table_head(["computes", "activations", "BLEU", "to dense (95%)", "chrF", "same translations", "bytes"])
    for row in record["rows"]:
        low, high = row["interval"]
        change = "" if row is record["rows"][0] else f"{row['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
        same = f"{row['same_translations'] / record['sentences']:.1%}"
        scores = [row["activations"], f"{row['bleu']:.2f}", change, f"{row['chrf']:.2f}"]
        rows.append(table_row([row["mode"], *scores, same, f"{row['bytes']:,}"]))
    rows += [
        "",
        f"{record['model']} on {record['corpus']}, {record['sentences']:,} sentences, beam {record['beams']}; "
        f"intervals by paired bootstrap; `{record['signature']}`; kernels on {record['versions']['kernels']}, "
        f"torch {record['versions']['torch']}, transformers {record['versions']['transformers']}.",
    ]
    return "\n".join(rows)


def read(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def table_row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table_head(columns: list[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [table_row(columns), f"|{'---|' * len(columns)}"]


def machine(record: dict[str, Any]) -> str:
    """Where a number was measured."""
    unit = f"kernels on {record['unit']}, torch {record['torch']} on {record['torch_unit']}"
    note = f"; {record['note']}" if record["note"] else ""
    return f"{record['cpu']}, {record['cores']} cores, {unit}{note}."


# A table is there once its benchmark has been run.
OF = {
    "real_text": real_text_of,
    "training": training_of,
    "methods": methods_of,
    "faults": faults_of,
    "startup": startup_of,
    "scaling": scaling_of,
    "corpora": corpora_of,
    "memory": memory_of,
    "large": large_of,
    "gpu": gpu_of,
    "serve": serve_of,
    "paragraphs": paragraphs_of,
    "placeholders": placeholders_of,
    "glossary": glossary_of,
    "exports": exports_of,
}
"""Tables that show one file of a benchmark, which has the table's name."""

FILES = {name: f"{name}.json" for name in (*OF, "masks", "quality")}
FILES |= {"kernels": "kernels_*.json", "patterns": "patterns_*.json"}
FILES |= {"generate": "generate*.json", "summary": "generate.json"}
MAKERS: dict[str, Callable[[], str]] = {
    "summary": lambda: summary_of(read(MEASURED / "generate.json")),
    "masks": masks_table,
    "generate": generate_table,
    "kernels": kernels_table,
    "patterns": patterns_table,
    "quality": quality_table,
    **{name: partial(measured_table, name) for name in OF},
}
TABLES = {name: make for name, make in MAKERS.items() if any(MEASURED.glob(FILES[name]))}
"""What makes each table that README files show."""
