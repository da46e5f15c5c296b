r"""How fast a model translates in the formats that it can be exported to, and whether the translations stay the same.

    pip install ctranslate2 onnx onnxruntime onnxscript openvino
    python -m benchmarks.exports outputs/multi30k_2of4/packed ../shared/data/multi30k:test --note "nothing else ran"

The model is packed in fp32 and int8 for the engine, and exported to CTranslate2 and ONNX in both, as ``nmsparse export
--for`` does it. OpenVINO reads the ONNX files. What is not installed is left out, and the table says so. Each candidate
translates the same sentences in fresh processes, which take turns, on one thread: once before the clock starts, since
some tools compile for the shapes that they meet, and once for the time, CPU seconds from ids to ids. Of ONNX files only
greedy search is measured; the loop around them is that of `hf_nmsparse.onnx_export.greedy`. Beams stop as soon as there
are four finished translations, as CTranslate2 does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# torch and transformers are imported where they are used: most processes are measured without them.

Rows = list[list[int]]

REFERENCE = "engine, 2:4 fp32"
"""Whose sentences the others' are compared with: they are those of transformers."""

CANDIDATES = {  # by the folder of the files and the tool that has to be there
    REFERENCE: ("packed_fp32", None),
    "engine, 2:4 int8": ("packed_int8", None),
    "CTranslate2 fp32": ("ctranslate2_fp32", "ctranslate2"),
    "CTranslate2 int8": ("ctranslate2_int8", "ctranslate2"),
    "onnxruntime fp32": ("onnx_fp32", "onnxruntime"),
    "onnxruntime int8": ("onnx_int8", "onnxruntime"),
    "OpenVINO fp32": ("onnx_fp32", "openvino"),
    "OpenVINO int8": ("onnx_int8", "openvino"),
}
WITH_BEAMS = [name for name in CANDIDATES if name.startswith(("engine", "CTranslate2"))]
BATCH = 64


def translator(name: str, folder: Path, task: Mapping[str, Any], beams: int) -> Callable[[], Rows]:
    """What gives the new tokens of each sentence, EOS left out."""
    if name.startswith("engine"):
        return by_engine(folder, task, beams)
    if name.startswith("CTranslate2"):
        return by_ctranslate2(folder, task, beams, name)
    return by_onnx(folder, task, name)


def by_engine(folder: Path, task: Mapping[str, Any], beams: int) -> Callable[[], Rows]:
    from hf_nmsparse import Translator

    engine = Translator(folder, threads=1)
    settings: dict[str, Any] = {"num_beams": beams, "do_sample": False, "max_new_tokens": task["length"]}
    settings |= {"early_stopping": True} if beams > 1 else {}

    def translate() -> Rows:
        found = engine.translate_ids(task["sources"], batch_size=BATCH, **settings)
        return [[token for token in one.tokens if token != task["end"]] for one in found]

    return translate


def by_ctranslate2(folder: Path, task: Mapping[str, Any], beams: int, name: str) -> Callable[[], Rows]:
    ctranslate2 = importlib.import_module("ctranslate2")
    compute = "int8" if name.endswith("int8") else "float32"
    translator = ctranslate2.Translator(str(folder), compute_type=compute, intra_threads=1, inter_threads=1)
    names = task["names"]
    places = {name: place for place, name in enumerate(names)}
    settings = {"max_decoding_length": task["length"], "min_decoding_length": 0, "max_batch_size": BATCH}

    def translate() -> Rows:
        texts = [[names[token] for token in row] for row in task["sources"]]
        found = translator.translate_batch(texts, beam_size=beams, **settings)
        return [[places[token] for token in result.hypotheses[0]] for result in found]

    return translate


def by_onnx(folder: Path, task: Mapping[str, Any], name: str) -> Callable[[], Rows]:
    from hf_nmsparse.export_check import Expected
    from hf_nmsparse.onnx_export import greedy, sessions

    runs = openvino_runs(folder, 1) if name.startswith("OpenVINO") else sessions(folder, 1)
    given = Expected(**{key: task[key] for key in ("sources", "length", "start", "end", "padding")}, translations={})
    return lambda: greedy(runs, given, BATCH)


def openvino_runs(folder: Path, threads: int) -> dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]]:
    """What runs each of the ONNX files in a folder, in OpenVINO, in fp32 where it would take bf16 by itself."""
    from hf_nmsparse.onnx_export import ENCODER, FIRST, NEXT

    openvino = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}

    def run_of(name: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
        compiled = openvino.Core().compile_model(str(folder / f"{name}.onnx"), "CPU", settings)
        names = [next(filter(ours, output.get_names())) for output in compiled.outputs]

        def run(given: Mapping[str, Any]) -> Mapping[str, Any]:
            return dict(zip(names, compiled(dict(given)).to_tuple(), strict=True))

        return run

    def ours(name: str) -> bool:  # an output may have others beside the one of the file
        return name in ("last_hidden_state", "logits") or name.startswith("present.")

    return {name: run_of(name) for name in (ENCODER, FIRST, NEXT)}


def one(name: str, folder: Path, task: Path, beams: int) -> dict[str, Any]:
    """What a candidate does in this process, and the seconds that it takes."""
    translate = translator(name, folder, json.loads(task.read_text()), beams)
    translate()
    start = time.process_time()
    tokens = translate()
    return {"tokens": tokens, "cpu_s": time.process_time() - start}


def in_a_process(name: str, folder: Path, task: Path, beams: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.exports", "--one", name, str(folder), str(task), str(beams)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def save(model: Path, folder: Path, wanted: Sequence[str], tokenizer: Any, sources: Rows) -> dict[str, Path]:
    """Writes the files of all candidates that are not there; returns the folder of each."""
    import torch

    from hf_nmsparse import save_packed
    from hf_nmsparse.ctranslate2_export import export_ctranslate2
    from hf_nmsparse.export_check import as_dense
    from hf_nmsparse.loading import load_seq2seq
    from hf_nmsparse.onnx_export import export_onnx

    def loaded() -> Any:
        return load_seq2seq(str(model), dtype=torch.float32)

    folders = {name: folder / CANDIDATES[name][0] for name in wanted}
    for path in dict.fromkeys(folders.values()):
        if path.exists():
            continue
        kind, _, numbers = path.name.partition("_")
        quantization = None if numbers == "fp32" else numbers
        if kind == "packed":
            save_packed(loaded(), path, numbers)
        elif kind == "ctranslate2":
            export_ctranslate2(as_dense(loaded()), tokenizer, path, sources, quantization)
        else:
            path.mkdir(parents=True)
            export_onnx(as_dense(loaded()), path, sources, quantization)
    return folders


def size(folder: Path) -> int:
    """Bytes of the model in a folder."""
    return sum(path.stat().st_size for kind in ("*.safetensors", "model.bin", "*.onnx") for path in folder.glob(kind))


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        name, folder, task, beams = sys.argv[2:]
        print(json.dumps(one(name, Path(folder), Path(task), int(beams))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a packed Marian model, English to German")
    parser.add_argument("text", help="folder of a corpus, with a split: FOLDER:SPLIT")
    parser.add_argument("--sentences", type=int, default=200, help="the first so many of the split")
    parser.add_argument("--length", type=int, default=64, help="most new tokens of a sentence")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each candidate")
    parser.add_argument("--files", type=Path, help="keeps the exported files here, and takes those that are here")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, help="the JSON file; a table goes beside it")
    options = parser.parse_args()

    import transformers
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from benchmarks import tables, timing
    from hf_nmsparse.corpus import load_corpus
    from hf_nmsparse.ctranslate2_export import vocabulary_of
    from hf_nmsparse.metrics import score

    transformers.logging.disable_progress_bar()
    machine, missing, versions = timing.machine(), {}, {}
    for tool in dict.fromkeys(tool for _, tool in CANDIDATES.values() if tool is not None):
        try:
            versions[tool] = str(importlib.import_module(tool).__version__).partition("-")[0]
        except ImportError as error:
            missing[tool] = str(error)
    wanted = [name for name, (_, tool) in CANDIDATES.items() if tool not in missing]
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(options.model)
    config = model.config
    corpus, split = options.text.rsplit(":", 1)
    test = load_corpus(corpus, "en", "de", None)[split]
    sources, references = (list(test[side])[: options.sentences] for side in ("source", "target"))
    ids = tokenizer(sources, truncation=True)["input_ids"]
    task = {"sources": ids, "length": options.length, "names": vocabulary_of(model, tokenizer)}
    task |= {"start": config.decoder_start_token_id, "end": config.eos_token_id, "padding": config.pad_token_id}

    rows: list[dict[str, Any]] = []
    signature = ""
    with TemporaryDirectory() as temporary:
        folders = save(options.model, options.files or Path(temporary), wanted, tokenizer, ids[:16])
        file = Path(temporary) / "task.json"
        file.write_text(json.dumps(task))
        for beams in (1, 4):
            names = [name for name in wanted if beams == 1 or name in WITH_BEAMS]
            seconds: dict[str, list[float]] = {name: [] for name in names}
            tokens: dict[str, Rows] = {}
            for name in timing.turns(names, options.rounds):
                found = in_a_process(name, folders[name], file, beams)
                tokens[name] = found["tokens"]
                seconds[name].append(found["cpu_s"])
            for name in names:
                result = score(tokenizer.batch_decode(tokens[name], skip_special_tokens=True), references)
                signature = result.signature
                cpu, count = statistics.median(seconds[name]), sum(map(len, tokens[name]))
                equal = sum(ours == theirs for ours, theirs in zip(tokens[name], tokens[REFERENCE], strict=True))
                row = {"beams": beams, "candidate": name, "bytes": size(folders[name]), "tokens": count}
                row |= {"cpu_s": round(cpu, 4), "bleu": round(result.bleu, 2), "same": round(equal / len(ids), 4)}
                rows.append(row)
                print(row, flush=True)

    record = {
        "benchmark": "exports, medians of fresh processes in turns",
        **machine,
        "transformers": transformers.__version__,
        "versions": versions,
        "model": timing.describe(model),
        "text": f"{Path(corpus).name}, {split}",
        "sentences": len(ids),
        "length": options.length,
        "batch": BATCH,
        "rounds": options.rounds,
        "signature": signature,
        "note": options.note,
        "missing": missing,
    }
    output = options.output or timing.RESULTS / "exports.json"
    timing.write(output, record, rows, tables.exports_of(record | {"rows": rows}))
    print(output)


if __name__ == "__main__":
    main()
