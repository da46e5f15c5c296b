r"""How real text translates with a trained model: time, memory, BLEU, and whether the tokens are transformers'.

    python -m benchmarks.real_text outputs/multi30k_2of4/packed \
        ../shared/data/multi30k:test ../shared/data/wmt-news:validation --note "what else the machine was doing"

The model is packed anew in fp32, bf16 and int8, and converted for CTranslate2 where that is installed. Each candidate
translates the first thousand sentences of each split, of all lengths and in the order of the file, in a fresh process:
the engine, as `Translator`, and CTranslate2 are given all of them at once, transformers' loop sorted batches, 64
sentences each. The processes take turns. ``CPU s`` and ``wall s`` are those of the translation, ids to ids; ``process
CPU s`` and ``MiB`` those of the whole process, from its first import on.

On the first split each file runs in transformers' loop too, and the tokens are compared. In fp32 nothing is rounded, so
that a sentence that differs is to be a tie: both translations are scored by the engine, and ``gap`` is how far apart
they are: with beams what these are ranked by, greedily the log-probabilities of the first tokens that differ. What is
rounded comes out otherwise in other batches of the loop too: how often, its row with 16 sentences a batch shows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from benchmarks.peak import peak_mib

# torch and transformers are imported where they are used: a process of CTranslate2 is measured without them.

VALUES = ("fp32", "bf16", "int8")
ENGINE = {f"engine, 2:4 {values}": values for values in VALUES}
LOOP = {f"transformers' loop, 2:4 {values}": values for values in VALUES}
OTHER_BATCH = 16
OTHERWISE = {f"{name}, {OTHER_BATCH} a batch": values for name, values in LOOP.items() if values != "fp32"}
CTRANSLATE2 = "CTranslate2 int8"
DENSE = "engine, dense int8"  # of dense files, which recipes/front.py gives
BATCH = 64
TIE = 1e-4
_WARM = 8  # sentences before the clock starts

Rows = list[list[int]]


class Candidate(NamedTuple):
    """A name that `translator` knows, the folder of its files, and the JSON file of the tokens that it is given."""

    name: str
    folder: Path
    source: Path


def translator(name: str, folder: Path, beams: int, threads: int) -> Callable[[Rows], Rows]:
    """What gives the new tokens of each sentence, EOS left out."""
    if name == CTRANSLATE2:
        return by_ctranslate2(folder, beams, threads)
    if name in ENGINE or name == DENSE:
        return by_engine(folder, beams, threads, "int8" if name == DENSE else "auto")
    return by_loop(folder, beams, threads, OTHER_BATCH if name in OTHERWISE else BATCH)


def by_engine(folder: Path, beams: int, threads: int, compute: str = "auto") -> Callable[[Rows], Rows]:
    from hf_nmsparse import Translator

    translator = Translator(folder, compute=compute, threads=threads)
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]

    def translate(rows: Rows) -> Rows:
        found = translator.translate_ids(rows, num_beams=beams, do_sample=False, batch_size=BATCH)
        return [[token for token in one.tokens if token != end] for one in found]

    return translate


def by_loop(folder: Path, beams: int, threads: int, batch: int) -> Callable[[Rows], Rows]:
    import torch
    import transformers
    from transformers import AutoModelForSeq2SeqLM

    import hf_nmsparse  # noqa: F401  # with it transformers loads packed files

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    padding, end = model.config.pad_token_id, model.config.eos_token_id
    pad = torch.nn.utils.rnn.pad_sequence

    def generate(rows: Rows) -> Rows:
        tokens = [torch.tensor(row) for row in rows]
        mask = pad([torch.ones_like(row) for row in tokens], batch_first=True)
        given = {"input_ids": pad(tokens, True, padding), "attention_mask": mask}
        found = type(model).generate(model, **given, num_beams=beams, do_sample=False)  # its own is the engine's
        return [row[: row.index(end)] if end in row else row for row in found[:, 1:].tolist()]

    def translate(rows: Rows) -> Rows:
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        made: dict[int, list[int]] = {}
        for start in range(0, len(rows), batch):
            places = order[start : start + batch]
            made |= zip(places, generate([rows[place] for place in places]), strict=True)
        return [made[place] for place in range(len(rows))]

    return translate


def by_ctranslate2(folder: Path, beams: int, threads: int) -> Callable[[Rows], Rows]:
    ctranslate2 = importlib.import_module("ctranslate2")
    translator = ctranslate2.Translator(str(folder), compute_type="int8", intra_threads=threads, inter_threads=1)
    names, settings = (json.loads((folder / file).read_text()) for file in ("names.json", "settings.json"))
    places = {name: place for place, name in enumerate(names)}

    def translate(rows: Rows) -> Rows:
        texts = [[names[token] for token in row] for row in rows]
        found = translator.translate_batch(texts, beam_size=beams, max_batch_size=BATCH, **settings)
        return [[places[token] for token in result.hypotheses[0]] for result in found]

    return translate


def one(name: str, folder: Path, source: Path, beams: int, threads: int) -> dict[str, Any]:
    """What a candidate does in this process, and what it costs."""
    rows = json.loads(source.read_text())
    translate = translator(name, folder, beams, threads)
    translate(rows[:_WARM])
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = translate(rows)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    used = {"process_cpu_s": time.process_time(), "peak_mib": peak_mib()}
    return {"tokens": tokens, "cpu_s": cpu, "wall_s": wall} | used


def in_a_process(candidate: Candidate, beams: int, threads: int) -> dict[str, Any]:
    given = [*map(str, candidate), str(beams), str(threads)]
    command = [sys.executable, "-m", "benchmarks.real_text", "--one", *given]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def save(model: Path, folder: Path, with_ctranslate2: bool) -> dict[str, Path]:
    """The files of each candidate, by its name."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from hf_nmsparse import NMSparseQuantizationConfig, export_dense, save_packed

    def dense() -> Any:
        config = NMSparseQuantizationConfig(compute="dense")
        return AutoModelForSeq2SeqLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)

    for values in VALUES:
        save_packed(dense(), folder / values, values=values)
    folders = {name: folder / values for name, values in (ENGINE | LOOP | OTHERWISE).items()}
    if with_ctranslate2:
        export_dense(dense(), folder / "dense")
        folders[CTRANSLATE2] = for_ctranslate2(folder / "dense", model)
    return folders


def for_ctranslate2(dense: Path, tokenizer: Path) -> Path:
    """The files that `by_ctranslate2` reads, beside the dense fp32 checkpoint that they are made of."""
    from transformers import AutoTokenizer, GenerationConfig

    from benchmarks.generate import ctranslate2_files

    config = json.loads((dense / "config.json").read_text())
    names = AutoTokenizer.from_pretrained(tokenizer).convert_ids_to_tokens(range(config["vocab_size"]))
    folder = ctranslate2_files(dense, names, [CTRANSLATE2], config["eos_token_id"])[CTRANSLATE2]
    limit = GenerationConfig.from_pretrained(dense).max_length - 1  # which counts the start token
    (folder / "names.json").write_text(json.dumps(names))
    (folder / "settings.json").write_text(json.dumps({"max_decoding_length": limit}))
    return folder


def gaps(folder: Path, sources: Rows, pairs: Mapping[int, tuple[list[int], list[int]]], beams: int) -> list[float]:
    """How far apart two translations of each of some sentences are, by the engine's own scores."""
    from transformers import AutoModelForSeq2SeqLM

    from hf_nmsparse.generation import engine_for

    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    engine, config = engine_for(model), model.generation_config
    start, end, penalty = config.decoder_start_token_id, config.eos_token_id, config.length_penalty or 1.0
    found = []
    for place, pair in pairs.items():
        targets = [[start, *row, end] for row in pair]
        one, other = engine.score([sources[place]] * 2, targets, 1)
        if beams == 1:
            at = next(at for at, tokens in enumerate(zip(*targets, strict=False)) if tokens[0] != tokens[1])
            found.append(abs(float(one[at] - other[at])))
        else:
            ranks = [float(scores.sum(dtype="float64")) / (len(scores) - 1) ** penalty for scores in (one, other)]
            found.append(abs(ranks[0] - ranks[1]))
    return found


def measure(
    folders: Mapping[str, Path], source: Path, beams: int, threads: int, rounds: int, compared: bool
) -> dict[str, dict[str, Any]]:
    """Of each candidate the tokens, and medians of what they cost; transformers' loop runs once."""
    from benchmarks import timing

    quick = [name for name in folders if name not in LOOP | OTHERWISE]
    loops = [name for name in LOOP | OTHERWISE if compared or name == "transformers' loop, 2:4 int8"]
    candidates = {name: Candidate(name, folders[name], source) for name in (*quick, *loops)}
    return in_processes(candidates, [*loops, *timing.turns(quick, rounds)], beams, threads)


def in_processes(
    candidates: Mapping[str, Candidate], turns: Iterable[str], beams: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Of each candidate the tokens, and medians of what its turns cost, each a fresh process."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in candidates}
    for name in turns:
        found[name].append(in_a_process(candidates[name], beams, threads))
        if found[name][-1]["tokens"] != found[name][0]["tokens"]:
            raise SystemExit(f"real_text: {name} translates the same sentences otherwise in another process")
    costs = ("cpu_s", "wall_s", "process_cpu_s", "peak_mib")
    return {
        name: {"tokens": turns[0]["tokens"]}
        | {cost: round(statistics.median(turn[cost] for turn in turns), 4) for cost in costs}
        for name, turns in found.items()
    }


def same(found: Mapping[str, dict[str, Any]], name: str) -> tuple[str, list[int]] | None:
    """The loop that runs the same file, and the sentences that it translates otherwise."""
    loop = next((loop for loop, values in LOOP.items() if (ENGINE | OTHERWISE).get(name) == values), None)
    if loop not in found:
        return None
    pairs: Sequence[tuple[list[int], list[int]]] = [*zip(found[name]["tokens"], found[loop]["tokens"], strict=True)]
    return loop, [place for place, (ours, theirs) in enumerate(pairs) if ours != theirs]


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        name, folder, source, beams, threads = sys.argv[2:]
        print(json.dumps(one(name, Path(folder), Path(source), int(beams), int(threads))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a packed model, English to German")
    parser.add_argument("texts", nargs="+", help="folders of corpora, each with a split: FOLDER:SPLIT")
    parser.add_argument("--sentences", type=int, default=1000, help="the first so many of each split")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each candidate but transformers' loop")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, help="the JSON file; a table goes beside it")
    options = parser.parse_args()

    import transformers
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from benchmarks import tables, timing
    from hf_nmsparse.corpus import load_corpus
    from hf_nmsparse.metrics import score

    transformers.logging.disable_progress_bar()
    machine, rows, missing = timing.machine(), [], {}
    try:
        version = f"CTranslate2 {importlib.import_module('ctranslate2').__version__}"
    except ImportError as error:
        version, missing = None, {CTRANSLATE2: str(error)}
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    with TemporaryDirectory() as temporary:
        folders = save(options.model, Path(temporary), version is not None)
        for text in options.texts:
            corpus, split = text.rsplit(":", 1)
            test = load_corpus(corpus, "en", "de", None)[split]
            sources, references = (list(test[side])[: options.sentences] for side in ("source", "target"))
            ids = tokenizer(sources, truncation=True)["input_ids"]
            given = Path(temporary) / "source.json"
            given.write_text(json.dumps(ids))
            for beams in options.beams:
                found = measure(folders, given, beams, options.threads, options.rounds, text == options.texts[0])
                for name, measured in found.items():
                    tokens = measured["tokens"]
                    hypotheses = tokenizer.batch_decode(tokens, skip_special_tokens=True)
                    result = score(hypotheses, references)
                    row = {"text": f"{Path(corpus).name}, {split}", "beams": beams, "candidate": name}
                    row |= {"sentences": len(ids), "tokens": sum(map(len, tokens)), "bleu": round(result.bleu, 2)}
                    row |= {cost: value for cost, value in measured.items() if cost != "tokens"}
                    compared = same(found, name)
                    if compared is not None:
                        loop, places = compared
                        row["same"] = round(1 - len(places) / len(ids), 4)
                        if name.endswith("fp32"):
                            pairs = {place: (tokens[place], found[loop]["tokens"][place]) for place in places}
                            row["gaps"] = [float(f"{gap:.1e}") for gap in gaps(folders[name], ids, pairs, beams)]
                    rows.append(row)
                    print(row, flush=True)

    record = {
        "benchmark": "real text, medians of fresh processes in turns",
        **machine,
        "transformers": transformers.__version__,
        "ctranslate2": version,
        "model": timing.describe(AutoModelForSeq2SeqLM.from_pretrained(options.model)),
        "rounds": options.rounds,
        "threads": options.threads,
        "signature": result.signature,
        "note": options.note,
        "missing": missing,
    }
    output = options.output or timing.RESULTS / "real_text.json"
    timing.write(output, record, rows, tables.real_text_of(record | {"rows": rows}))
    print(output)


if __name__ == "__main__":
    main()
