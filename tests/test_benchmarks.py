"""Each benchmark runs on something tiny and leaves a file of results and its table; no time is asserted."""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from benchmarks import (
    corpora,
    exports,
    generate,
    gpu,
    kernels,
    large,
    memory,
    methods,
    paragraphs,
    patterns,
    placeholders,
    real_text,
    scaling,
    serve,
    startup,
    tables,
    timing,
    training,
)
from benchmarks.peak import peak_mib
from hf_nmsparse import NMSparseConfig, save_packed, sparsify
from hf_nmsparse.kernels import library, native
from hf_nmsparse.srste import METHODS
from tests.processes import fork_server, in_a_child
from tests.test_layering import imports
from tests.tiny import marian, tokenizer

pytestmark = pytest.mark.skipif(library.status().unit is None, reason=library.status().reason)


def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> dict[str, Any]:
    """What the benchmark writes with one thread and two rounds."""
    common = ["--threads", "1", "--rounds", "2", "--note", "a test", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *common, *arguments])
    benchmark.main()
    return tables.read(output)


def assert_table(table: str, columns: list[str]) -> None:
    """A Markdown table with all cells, some of its columns, and a word on the machine."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert set(columns) <= {cell.strip() for cell in lines[0].split("|")}
    assert timing.machine()["cpu"] in table
    assert "a test" in table


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kernels_unit.json"
    record = run(kernels, monkeypatch, file, "--quick", "--budget-ms", "0.1", "--cache-mb", "0.5")
    assert record["unit"] == library.status().unit
    measured = {(tuple(row["shape"]), row["rows"], row["place"]) for row in record["rows"]}
    assert ((512, 2048), 16, "cold") in measured
    assert ((64, 64), 1, "hot") in measured
    for row in record["rows"]:
        assert row["median_us"].keys() == {"torch fp32", *tables.CANDIDATES}
        assert all(time > 0 for time in row["median_us"].values())
        assert row["auto"].keys() == {"fp32", "bf16", "int8"}
        assert all(choice["to_fastest"] <= 1 for choice in row["auto"].values())
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["in x out", "2:4 int8", "auto bf16"])

    monkeypatch.setattr(tables, "MEASURED", tmp_path)
    shown = tables.kernels_table()
    assert_table(shown, ["in x out", "2:4 int8"])
    assert shown.count("| 512x2048 | ") == 2
    assert "64x64" not in shown


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "patterns_unit.json"
    record = run(patterns, monkeypatch, file, "--quick", "--budget-ms", "0.1", "--cache-mb", "0.5")
    shown = {
        "torch fp32",
        "torch bf16",
        *tables.PATTERNS,
        *(name for group in tables.PATTERNS.values() for name in group),
    }
    assert len(record["rows"]) == 8
    assert all(row["median_us"].keys() == shown for row in record["rows"])
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["in x out", "1:4 int8", "4:8 int8"])

    monkeypatch.setattr(tables, "MEASURED", tmp_path)
    short = tables.patterns_table()
    assert_table(short, ["in x out", "1:4 bf16"])
    assert short.count("| 512x2048 | ") == 2
    assert "512x512" not in short


def test_what_is_shown_is_in_the_grid() -> None:
    assert {tuple(shape) for shape in tables.SHAPES} <= {*patterns.SHAPES}
    shapes = {(layer.in_features, layer.out_features) for layer in kernels.LAYERS}
    assert set(kernels.QUICK) <= shapes
    assert {tuple(shape) for shape in tables.SHAPES} <= shapes


def test_heads_have_no_sparse_candidates() -> None:
    with torch.inference_mode():
        found = kernels.candidates(kernels.Layer("a head", 64, 48, bias=False, sparse=False))
        kernels.check(found, torch.randn(3, 64))
    assert found.keys() == {"torch fp32", "torch bf16", "torch int8", "dense int8"}


def test_copies_exceed_what_they_are_to_exceed() -> None:
    weight = torch.zeros(10, dtype=torch.uint8)
    candidate = kernels.Candidate(torch.add, weight, 10, weight.clone)
    assert [len(candidate.copies(size)) for size in (0, 9, 10, 25)] == [1, 1, 2, 3]


@pytest.mark.parametrize("ctranslate2", [False, True], ids=["alone", "beside CTranslate2"])
def test_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctranslate2: bool) -> None:
    if ctranslate2:
        pytest.importorskip("ctranslate2")
    else:
        monkeypatch.setitem(sys.modules, "ctranslate2", None)  # as if it were not installed
    file = tmp_path / "generate.json"
    record = run(generate, monkeypatch, file, "--tiny", "--batches", "1", "4", "16")
    assert [(row["beams"], row["batch"]) for row in record["rows"]] == list(itertools.product((1, 4), (1, 4, 16)))
    for row in record["rows"]:
        loops = set() if row["batch"] == 4 else set(generate.LOOPS)
        assert row["tokens_per_second"].keys() == record["candidates"].keys() - set(generate.LOOPS) | loops
    assert record["same_tokens"]["2:4 fp32"] == record["same_tokens"]["dense fp32"] == 1.0
    assert record["missing"].keys() == (set() if ctranslate2 else set(generate.THEIRS))
    assert record["bytes"]["2:4 int8"] < record["bytes"]["2:4 fp32"] < record["bytes"]["dense fp32"]
    table = file.with_suffix(".md").read_text(encoding="utf-8")
    assert_table(table, ["1 thread, CPU time", "file", "greedy, batch 1", "beam 4, batch 16"])
    assert ("Not measured: CTranslate2 int8" in table) == (not ctranslate2)
    summary = tables.summary_of(record)
    assert_table(summary, ["model", "bytes", "greedy, batch 1, 1 thr.", "beam 4, batch 16, 1 thr."])
    last = [line for line in summary.splitlines() if line.startswith("| 2:4 int8 / ")][-1]
    speeds = record["rows"][0]["tokens_per_second"]
    assert last.split(" | ")[2] == f"{speeds['2:4 int8'] / speeds['dense int8']:.2f}"


def test_a_few_candidates_of_another_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["--batches", "4", "--candidates", "dense int8", "2:4 int8", "--shape", "6+2"]
    record = run(generate, monkeypatch, tmp_path / "generate_6+2.json", "--tiny", *few)
    assert record["baseline"] == "dense int8"
    assert [set(row["tokens_per_second"]) for row in record["rows"]] == [{"dense int8", "2:4 int8"}] * 2
    monkeypatch.setattr(tables, "MEASURED", tmp_path)
    assert tables.generate_table().startswith("| 1 thread, CPU time | file | greedy, batch 4 |")


def test_real_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)  # as if it were not installed
    model = marian()
    model.generation_config = GenerationConfig(max_length=8, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    sparsify(model, NMSparseConfig("2:4"))
    save_packed(model, tmp_path / "packed")
    tokenizer().save_pretrained(tmp_path / "packed")
    (tmp_path / "news").mkdir()
    for side, line in (("en", "A man sleeps in the {}."), ("de", "Ein Mann schläft im {}.")):
        lines = "\n".join(line.format("garden " * count) for count in (3, 1, 2))
        (tmp_path / "news" / f"test.{side}").write_text(f"{lines}\n", encoding="utf-8")
    own = real_text.in_a_process

    def here(candidate: real_text.Candidate, *given: Any) -> dict[str, Any]:
        anew = candidate.name == "transformers' loop, 2:4 fp32"  # a process that imports
        return own(candidate, *given) if anew else real_text.one(*candidate, *given)

    monkeypatch.setattr(real_text, "in_a_process", here)
    file = tmp_path / "real_text.json"
    arguments = [str(tmp_path / "packed"), f"{tmp_path / 'news'}:test", "--rounds", "1", "--beams", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--note", "a test", "--output", str(file)])
    real_text.main()
    record = tables.read(file)
    rows = {row["candidate"]: row for row in record["rows"]}
    assert rows.keys() == {*real_text.ENGINE, *real_text.LOOP, *real_text.OTHERWISE}
    assert all(("same" in row) == (name not in real_text.LOOP) for name, row in rows.items())
    assert rows["engine, 2:4 fp32"]["same"] == 1.0
    assert rows["engine, 2:4 fp32"]["gaps"] == []
    assert all(0 < row["cpu_s"] < row["process_cpu_s"] and row["sentences"] == 3 for row in rows.values())
    assert record["missing"].keys() == {real_text.CTRANSLATE2}
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["text", "candidate", "BLEU", "same sentences"])


def packed_with_news(folder: Path, lines: int) -> None:
    """A packed model and a test set of so many lines."""
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    save_packed(model, folder / "packed")
    tokenizer().save_pretrained(folder / "packed")
    (folder / "news").mkdir()
    for side, line in (("en", "A man sleeps."), ("de", "Ein Mann schläft.")):
        (folder / "news" / f"test.{side}").write_text(f"{line}\n" * lines, encoding="utf-8")


def test_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)  # as if it were not installed
    packed_with_news(tmp_path, 2)
    file = tmp_path / "serve.json"
    arguments = [str(tmp_path / "packed"), f"{tmp_path / 'news'}:test", "--rounds", "1", "--beams", "2"]
    arguments += ["--clients", "1", "3", "--seconds", "0.2", "--minutes", "0.01", "--max-new-tokens", "5"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--note", "a test", "--output", str(file)])
    serve.main()
    record = tables.read(file)
    assert [(row["clients"], row["candidate"]) for row in record["rows"]] == [(n, "engine, 2:4 int8") for n in (1, 3)]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in record["rows"])
    assert record["memory_mib"]["sentences"] > 0
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["clients", "server", "sentences/s", "p95 ms"])


def test_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_with_news(tmp_path, 5)
    file = tmp_path / "paragraphs.json"
    arguments = [
        str(tmp_path / "packed"),
        f"{tmp_path / 'news'}:test",
        "--lines",
        "2",
        "--sentences",
        "5",
        "--beams",
        "1",
    ]
    monkeypatch.setattr(
        sys, "argv", ["benchmark", *arguments, "--beams", "1", "--note", "a test", "--output", str(file)]
    )
    paragraphs.main()
    rows = tables.read(file)["rows"]
    assert [(row["way"], row["paragraphs"], row["sentences"]) for row in rows] == [
        ("whole", 3, 5),
        ("split", 3, 5),
        ("line by line", 3, 5),
    ]
    assert all(0 <= row["lost"] <= 5 for row in rows)
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["given to the model", "BLEU", "sentences lost"])


def test_placeholders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_with_news(tmp_path, 5)
    pairs = [
        ("A {dog} runs.", "Ein {dog} rennt."),
        ("no such", "nichts"),
        ("%s {cat}", "%s {cat}"),
        ("{x}", "verloren"),
    ]
    lines = (json.dumps({"translation": {"en": source, "de": target}}) for source, target in pairs)
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    file = tmp_path / "placeholders.json"
    given = [str(tmp_path / "packed"), str(tmp_path / "pairs.jsonl"), "--note", "a test", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *given])
    placeholders.main()
    rows = tables.read(file)["rows"]
    assert [(row["way"], row["texts"], row["placeholders"]) for row in rows] == [
        ("as they are", 2, 3),
        ("placeholders kept", 2, 3),
        ("as pages", 2, 3),
    ]
    assert [row["kept"] for row in rows[1:]] == [3, 3]
    assert (rows[2]["tags"], rows[2]["tags_kept"], rows[2]["balanced"]) == (2 * 5, 2 * 5, 2)
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["placeholders kept", "BLEU", "tags kept"])


def test_what_is_balanced() -> None:
    assert placeholders.page("a b c d e") == "<p><b>a</b> b c <i class='x'>d</i> e<img></p>"
    assert placeholders.balanced("<p><b>a</b><i class='x'></i><img></p>")
    assert not placeholders.balanced("<p><b></p></b>")
    assert not placeholders.balanced("</b>")


def test_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside CTranslate2; the files of the others are made and read in tests/test_onnx_export.py."""
    pytest.importorskip("ctranslate2")
    for tool in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, tool, None)  # as if it were not installed
    packed_with_news(tmp_path, 3)
    file = tmp_path / "exports.json"
    arguments = [str(tmp_path / "packed"), f"{tmp_path / 'news'}:test", "--length", "8", "--rounds", "1"]
    monkeypatch.setattr(exports, "in_a_process", exports.one)
    monkeypatch.setattr("hf_nmsparse.ctranslate2_export.BEAMS", (1,))  # of a model that has learnt nothing
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--note", "a test", "--output", str(file)])
    exports.main()
    record = tables.read(file)
    names = ["engine, 2:4 fp32", "engine, 2:4 int8", "CTranslate2 fp32", "CTranslate2 int8"]
    assert [(row["beams"], row["candidate"]) for row in record["rows"]] == list(itertools.product((1, 4), names))
    assert {row["same"] for row in record["rows"] if row["beams"] == 1 and row["candidate"].endswith("fp32")} == {1.0}
    assert record["missing"].keys() == {"onnxruntime", "openvino"}
    table = file.with_suffix(".md").read_text(encoding="utf-8")
    assert_table(table, ["runs on", "bytes", "BLEU", "same sentences"])
    assert "Not measured: openvino" in table


def test_peak_memory_is_that_of_the_process_alone() -> None:
    held = bytearray(b"x") * (300 << 20)  # which a child's peak must not show
    command = [sys.executable, "-c", "from benchmarks.peak import peak_mib; print(peak_mib())"]
    process = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1])
    assert 1 < float(process.stdout) < 150
    assert peak_mib() > len(held) >> 20


def test_how_far_two_translations_are_apart(tmp_path: Path) -> None:
    model = marian().eval()
    model.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    model.save_pretrained(tmp_path)
    source, pair = [5, 6, 1], ([7, 8, 9], [7, 4])
    logs = []
    for row in pair:
        given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[0, *row]])}
        with torch.no_grad():
            scores = model(**given).logits[0].log_softmax(-1)
        logs.append(scores[range(len(row) + 1), [*row, 1]])
    [greedy] = real_text.gaps(tmp_path, [[], source], {1: pair}, 1)
    assert greedy == pytest.approx(abs(float(logs[0][1] - logs[1][1])), rel=1e-3)
    [beams] = real_text.gaps(tmp_path, [[], source], {1: pair}, 4)
    assert beams == pytest.approx(abs(float(logs[0].mean() - logs[1].mean())), rel=1e-3)


def test_the_layers_of_a_shape() -> None:
    config = timing.marian(False, (2, 1)).config
    assert (config.encoder_layers, config.decoder_layers) == (2, 1)


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "training.json"
    record = run(training, monkeypatch, file, "--tiny")
    [row] = record["rows"]
    assert len(row["steps"]) == 4
    for step in row["steps"].values():
        assert step["median_ms"] > 0
        low, high = step["interval"]
        assert low <= step["overhead"] <= high
    assert row["steps"]["dense"]["overhead"] == 0
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["training step", "threads", "to dense"])


def test_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "methods.json"
    fork_server()  # before the benchmark starts one that imports less, which other tests would be left with
    monkeypatch.setattr(
        sys,
        "argv",
        ["benchmark", "--tiny", "--starts", "1", "--rounds", "2", "--note", "a test", "--output", str(file)],
    )
    methods.main()
    rows = {row["name"]: row for row in tables.read(file)["rows"]}
    assert rows.keys() == {
        *("bare loop", "bare loop, again", "bare loop, torch's loss", "dense", *METHODS),
        *("sr-ste, 4:8", "sr-ste, 1:4", "sr-ste, 2:8", "sr-ste, 1:16", "sr-ste, fc1, fc2"),
        *("dense, distilled", "sr-ste, distilled", "dense, freed memory goes back"),
    }
    assert rows["bare loop"]["to_bare"] == rows["dense"]["to_dense"] == [0, 0, 0]
    assert all(row["median_ms"] > 0 and row["to_bare"][1] <= row["to_bare"][2] for row in rows.values())
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["training", "ms a step"])


def test_startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    for side, word in (("en", "house"), ("de", "Haus")):
        (tmp_path / "text" / f"train.{side}").write_text("".join(f"{word} {word} {n}\n" for n in range(300)))
    startup.write_corpus(tmp_path / "text", 2_000, tmp_path / "corpus")
    lines = (tmp_path / "corpus" / "train.jsonl").read_text().splitlines()
    assert len(set(lines)) == 2_000
    assert json.loads(lines[300]) == {"translation": {"en": "1 house house 0", "de": "1 Haus Haus 0"}}
    monkeypatch.setattr(startup, "BATCHES", 3)
    found = startup.start(tmp_path / "corpus", None)
    assert 0 < found["corpus"] < found["tokens"] < found["first batch"] <= found["3 batches"]
    assert 0 < found["MiB before"] <= found["MiB at the peak"] >= found["MiB after"] > 0
    streamed = startup.start(tmp_path / "corpus", None, stream=True)
    assert 0 <= streamed["corpus"] < streamed["first batch"] <= streamed["3 batches"]
    rows = [{"pairs": 2_000, "start": "first", **found}, {"pairs": 2_000, "start": "stream", **streamed}]
    record = {**timing.machine(), "corpus": "text", "batch": "few", "processes": 1, "note": "a test", "rows": rows}
    assert_table(tables.startup_of(record), ["pairs", "first batch, s", "MiB before", "MiB at the peak"])


@pytest.mark.long
def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scaling.json"
    arguments = ["--tiny", "--rounds", "1", "--steps", "2", "--note", "a test", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    scaling.main()
    rows = tables.read(file)["rows"]
    assert [row["processes"] for row in rows] == [1, 2]
    assert all(row["step_ms"] > 0 for row in rows)
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["processes", "tokens a second"])


@pytest.mark.long
def test_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_with_news(tmp_path, 0)
    text, file = tmp_path / "text.txt", tmp_path / "corpora.json"
    text.write_text("A man sleeps.\n\nA dog.\nA man.\nThe house.\nOne more.\n", encoding="utf-8")
    arguments = [str(tmp_path / "packed"), str(text), "--lines", "4", "--shard-size", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--note", "a test", "--output", str(file)])
    corpora.main()
    record = tables.read(file)
    assert record["lines"] == 4
    assert [row["what"] for row in record["rows"]] == [corpora.ONE, corpora.TWO, corpora.APART]
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["processes", "lines/s", "to one process"])


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="trainings are killed in processes that were forked")
def test_faults(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"  # in a process of its own: forking wants one thread
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.faults", "--kills", "3", "--note", "a test"]
    subprocess.run([*command, "--output", str(file)], check=True, cwd=Path(__file__).parents[1])
    rows = tables.read(file)["rows"]
    assert [row["moment"] for row in rows] == ["training", "checkpoint", "packing"]
    assert all(row["identical"] for row in rows)
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["killed in", "kills"])


def fails_in_its_second_step(wait: Callable[[], None]) -> None:
    wait()
    raise ValueError("the second step")


def test_a_training_that_fails_says_so_in_its_step() -> None:
    training = methods.Training(fails_in_its_second_step)
    training()
    with pytest.raises(RuntimeError, match="the second step"):
        training()
    training.stop()


def test_a_step_without_the_library_does_not_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("called")

    tokens = torch.randint(2, 100, (2, 4))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    step = training.trainer(timing.marian(tiny=True), True, batch, kernels=False)
    with_library = training.trainer(timing.marian(tiny=True), True, batch)
    monkeypatch.setattr(native, "_library", fail)
    step()
    with pytest.raises(AssertionError, match="called"):
        with_library()


def test_turns_are_taken_by_all_in_every_round() -> None:
    taken: list[str] = []
    seconds = timing.in_turns({name: lambda name=name: taken.append(name) for name in "abc"}, 4)  # type: ignore[misc]
    assert {name: len(found) for name, found in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert [sorted(taken[i : i + 3]) for i in range(0, 12, 3)] == [["a", "b", "c"]] * 4


def test_a_file_of_results_is_json_with_a_row_a_line(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.json"
    timing.write(file, {"seed": 0}, [{"rows": 1}, {"rows": 4}], "| a |")
    assert json.loads(file.read_text()) == {"seed": 0, "rows": [{"rows": 1}, {"rows": 4}]}
    assert '  {"rows": 1},\n' in file.read_text()
    assert file.with_suffix(".md").read_text() == "| a |\n"


def test_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where Triton's kernels and sparse tensor cores take no part."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, for which the table has more rows")
    file = tmp_path / "gpu.json"
    record = run(gpu, monkeypatch, file, "--tiny")
    parts = {row["part"] for row in record["rows"]}
    assert parts == {"mask and flips", "decay", "sparse weight in bf16", "training step", "generate"}
    assert record["missing"] == {"semi_structured": "the weight lies on cpu, not on a GPU"}
    table = file.with_suffix(".md").read_text(encoding="utf-8")
    assert "Not measured: semi_structured (the weight lies on cpu, not on a GPU)." in table
    assert "| 2:4 SR-STE, no Triton |" in table


def test_no_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="gpu: there is no GPU here; --tiny tries the script on the CPU"):
        gpu.main()


def test_the_gpu_table_with_packed_layers() -> None:
    """From a record by hand, as a GPU would leave it."""
    machine = {"cpu": "c", "cores": 1, "unit": None, "torch": "t", "torch_unit": "u", "note": ""}
    layer = {"part": "packed layer", "shape": [512, 2048], "auto": False}
    rows = [
        {"part": "decay", "what": "2:4", "shape": [4, 8], "us": {"torch": 30.0, "Triton": 10.0}},
        {"part": "training step", "what": "dense", "ms": 10, "to_dense": 0, "interval": [0, 0], "peak_mib": 1000},
        {"part": "training step", "what": "x", "ms": 11, "to_dense": 0.1, "interval": [0, 0.2], "peak_mib": 1010},
        layer | {"rows": 1, "us": {"dense": 10.0, "semi_structured": 20.0}},
        layer | {"rows": 64, "us": {"dense": 10.0, "semi_structured": 8.0}},
        {"part": "generate", "beams": 4, "batch": 16, "tokens_per_second": {"dense": 1000.0, "auto": 2000.0}},
    ]
    versions = {"gpu": "H100", "cuda": "13", "triton": "3.6", "cusparselt": 80}
    record = {"batch": 2, "length": 3, "rounds": 4, "calls": 5, "missing": {}} | machine | versions
    table = tables.gpu_of(record | {"rows": rows}).splitlines()
    assert "| decay, 2:4 | 4x8 |  |  | 30.0 | 10.0 | 3.0 |" in table
    assert "| x | 11.0 | +10.0% | +0.0% to +20.0% | 1,010 |" in table
    assert "| 512x2048 | 0.50 | 1.25 | dense |" in table
    assert "| beam 4, batch 16 | 1,000 | 2,000 |" in table


def print_measure(measure: str, *given: Any) -> None:
    print(json.dumps(memory.MEASURES[measure](*given)))


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "memory.json"
    monkeypatch.setattr(memory, "BATCHES", (2,))
    monkeypatch.setattr(memory, "CANDIDATES", ("dense", "2:4 SR-STE"))
    own = memory.in_a_process

    def in_children_but_one(*given: Any) -> Any:
        if given[:2] == ("process", "2:4 SR-STE"):
            return own(*given)
        return json.loads(in_a_child(print_measure, *given).stdout.splitlines()[-1])

    monkeypatch.setattr(memory, "in_a_process", in_children_but_one)
    monkeypatch.setattr(sys, "argv", ["memory", "--tiny", "--rounds", "1", "--note", "a test", "--output", str(file)])
    memory.main()
    dense, sparse = tables.read(file)["rows"]
    # 64 x 64 of 4 + 8 projections, and 64 x 256 of 2 x 2 feed-forward layers, one bit each
    assert (dense["masks_mib"], sparse["masks_mib"]) == (0, round((12 * 64**2 + 4 * 64 * 256) / 8 / 2**20, 2))
    shared = 64 / 1024  # the sparse weight of the largest layer
    assert sparse["tensors_mib"] - dense["tensors_mib"] == pytest.approx(sparse["masks_mib"] + shared, abs=0.02)
    assert 0 < dense["range_mib"][0] <= dense["process_mib"] <= dense["range_mib"][1]
    assert_table(
        file.with_suffix(".md").read_text(encoding="utf-8"), ["training", "tensors MiB", "process MiB", "to dense"]
    )


def print_of_large(*given: Any) -> None:
    print(json.dumps(large.measure(*given)))


def test_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning, a way that takes all steps, and one whose package is not there."""
    file = tmp_path / "large.json"
    monkeypatch.setattr(
        large,
        "in_a_process",
        lambda *given: json.loads(in_a_child(print_of_large, *given[:3]).stdout.splitlines()[-1]),
    )
    monkeypatch.setattr(large, "find_spec", lambda name: None if name == "torchao" else name)
    only = [
        "nmsparse prune, Wanda",
        "8-bit AdamW of torchao, likewise",
        "Adafactor, bf16 autocast, checkpointing, frozen embeddings",
    ]
    arguments = ["--tiny", "--steps", "6", "--note", "a test", "--output", str(file), "--only", *only]
    monkeypatch.setattr(sys, "argv", ["large", *arguments])
    large.main()
    record = tables.read(file)
    assert record["missing"] == only[1:2]
    pruned, trained = record["rows"]
    assert pruned["packed_bytes"] == trained["packed_bytes"] < record["dense_bytes"]
    assert trained["steps"] == 6
    assert 0 < trained["loaded_mib"] <= trained["peak_mib"] <= trained["packing_peak_mib"]
    assert trained["flip_rate"] > 0
    assert_table(file.with_suffix(".md").read_text(encoding="utf-8"), ["what", "GB at the peak", "s a step"])

    # Another run, of what was missing: the other rows stay, in the order of the candidates.
    monkeypatch.setattr(large, "find_spec", lambda name: name)
    other = {key: trained[key] for key in trained.keys() - {"what", "load", "note"}}
    monkeypatch.setattr(large, "in_a_process", lambda *given: other | {"steps": given[2]})
    again = ["large", "--tiny", "--note", "later", "--output", str(file), "--only", only[1]]
    monkeypatch.setattr(sys, "argv", again)
    large.main()
    record = tables.read(file)
    assert record["missing"] == []
    assert [row["what"] for row in record["rows"]] == only
    assert (record["rows"][0], record["rows"][2]) == (pruned, trained)
    assert (record["rows"][1]["steps"], record["rows"][1]["note"]) == (large.SHORT, "later")
    text = file.with_suffix(".md").read_text(encoding="utf-8")
    assert text.endswith(f"{only[0]}, {only[2]}: a test; {only[1]}: later.\n")
    monkeypatch.setattr(sys, "argv", [*again, "--threads", "7"])
    with pytest.raises(ValueError, match=r"has rows of another threads; give another --output, or no --only"):
        large.main()


@pytest.mark.parametrize("file", sorted(Path(timing.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_the_recipes_may_use_the_benchmarks_and_not_the_other_way(file: Path) -> None:
    assert not [name for name in imports(ast.parse(file.read_text(encoding="utf-8"))) if name.startswith("recipes")]
