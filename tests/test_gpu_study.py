"""The study for GPUs on the CPU, with a tiny model: in pieces, as calls of some minutes each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer

from hf_nmsparse.checkpoints import checkpoints
from hf_nmsparse.evaluation import Evaluation
from hf_nmsparse.plots import read_run
from recipes import gpu_study
from recipes.gpu_study import main, read_tokens, step_milliseconds

PAIRS = [(f"A man sees {number} dogs.", f"Ein Mann sieht {number} Hunde.") for number in range(60)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    folder.mkdir()
    for split, pairs in (("train", PAIRS), ("validation", PAIRS[:8]), ("test", PAIRS[:4])):
        rows = [json.dumps({"translation": {"en": source, "de": target}}) for source, target in pairs]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokens(corpus: Path) -> Path:
    target = corpus.parent / "tokens"
    assert main(["--prepare", str(target), "--corpus", str(corpus), str(corpus), "--vocabulary", "300"]) == 0
    return target


@pytest.fixture
def alone() -> Iterator[mock.Mock]:
    """Tests and benchmark of GPUs as if they had run."""
    with mock.patch.object(gpu_study, "_said", return_value="lines\nexit status 0") as said:
        yield said


def test_tokens_survive_their_files(tokens: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    rows = read_tokens(tokens / "train.safetensors")
    assert len(rows) == 2 * len(PAIRS)  # the corpus was named twice
    assert rows[7] == {"input_ids": tokenizer(PAIRS[7][0])["input_ids"], "labels": tokenizer(PAIRS[7][1])["input_ids"]}
    assert len(read_tokens(tokens / "validation.safetensors")) == 8


def test_a_call_goes_on_where_the_last_one_stopped(
    tokens: Path, tmp_path: Path, alone: mock.Mock, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tokens), "--tiny", "--output", str(tmp_path / "out"), "--results", str(tmp_path)]
    assert main([*command, "--minutes", "0.000001"]) == 0  # a step each
    results = tmp_path / "recipes" / "results" / "gpu"
    for name, method in (("sr-ste-s1", "sr-ste"), ("dense-s1", "dense")):
        evaluation = Evaluation.read(results / name / "evaluation.json")
        assert (evaluation.steps, evaluation.sentences, evaluation.corpus) == (1, 4, "corpus + corpus")
        assert [folder.name for folder in checkpoints(tmp_path / "out" / method)] == ["checkpoint-1"]
    assert "no difference shown" in capsys.readouterr().out.splitlines()[-1]

    assert main([*command, "--minutes", "5"]) == 0
    for name in ("sr-ste-s1", "dense-s1"):
        run = read_run(results / name)  # as tables and reports read it
        assert (run.evaluation.steps, run.evaluation.values) == (gpu_study.TINY.max_steps, "bf16")
        assert [row["step"] for row in run.curve if "loss" in row] == [1, 8]
        assert json.loads((results / name / "speed.json").read_text(encoding="utf-8"))["step_ms"] > 0
    assert Evaluation.read(results / "sr-ste-s1" / "evaluation.json").pattern == "2:4"

    capsys.readouterr()
    assert main([*command, "--minutes", "5"]) == 0  # nothing is left to train
    assert "sr-ste: step 8, " in capsys.readouterr().out
    assert (results / "tests.txt").read_text(encoding="utf-8") == "lines\nexit status 0\n"
    tests = [call.args[0] for call in alone.call_args_list if "tests/gpu" in call.args[0]]
    assert len(tests) == 1
    assert "--tiny" in alone.call_args.args[0]


def test_a_dense_run_that_is_behind_is_not_compared(
    tokens: Path, tmp_path: Path, alone: mock.Mock, capsys: pytest.CaptureFixture[str]
) -> None:
    train, method_of = gpu_study.train, iter(gpu_study.METHODS)

    def hurried(*args: Any) -> Any:
        late = time.monotonic() + (100 if next(method_of) == "sr-ste" else 0)
        given: Any = (*args[:-1], late)
        return train(*given)

    command = [str(tokens), "--tiny", "--output", str(tmp_path / "out"), "--results", str(tmp_path), "--minutes", "5"]
    with mock.patch.object(gpu_study, "train", hurried):
        assert main(command) == 0
    assert "the dense model is at step 1 of 8; call again" in capsys.readouterr().out


def test_the_processes_are_ended_in_time() -> None:
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert gpu_study._said(waits, time.monotonic()) == "ended after 1 s, when no time was left"
    fails = [sys.executable, "-c", "print('no'); raise SystemExit(3)"]
    assert gpu_study._said(fails, time.monotonic() + 120) == "no\nexit status 3"


def test_a_step_between_logs() -> None:
    log = [{"step": step, "loss": 1.0, "train_seconds": seconds} for step, seconds in ((10, 1), (20, 2), (30, 9))]
    assert step_milliseconds([*log[:2], {"step": 20, "eval_loss": 1.0}]) == 100
    assert step_milliseconds(log) == 400  # of 100 and 700
    assert step_milliseconds(log[:1]) is None


def test_it_needs_no_more_than_a_bare_machine_has() -> None:
    missing = ("datasets", "evaluate", "pyarrow", "matplotlib", "hypothesis", "pytest", "ctranslate2", "jinja2")
    code = f"import sys\nsys.modules.update(dict.fromkeys({missing}))\nimport recipes.gpu_study, benchmarks.gpu"
    subprocess.run([sys.executable, "-c", code], cwd=gpu_study.ROOT, check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "gpu_study: give a folder of tokens, or --prepare and --corpus to make one"),
        (["{tmp}", "--corpus", "x"], "gpu_study: give a folder of tokens, or --prepare and --corpus to make one"),
        (["{tmp}", "--tiny"], "gpu_study: no file {tmp}/prepared.json; make it with --prepare"),
        (["{tmp}", "--minutes", "0"], "gpu_study: --minutes needs a number above 0, got 0.0"),
        (["--prepare", "{tmp}", "--corpus", "x"], "gpu_study: {tmp} is there already; name a new folder"),
        (["--prepare", "{tmp}/a", "--corpus", "x"], "gpu_study: no folder x; give folders with train.*"),
        (["--prepare", "{tmp}/a", "--corpus", "{tmp}"], "gpu_study: {tmp} has no split train, which it needs"),
    ],
)
def test_what_is_wrong(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    assert capsys.readouterr().err.startswith(message.format(tmp=tmp_path))


def test_too_much_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(gpu_study, "MOST_BYTES", 1000):
        command = ["--prepare", str(tmp_path / "a"), "--corpus", str(corpus), "--vocabulary", "300"]
        assert main(command) == 2
    assert "bytes, over 1,000; name fewer corpora" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tokens)]) == 2
    assert capsys.readouterr().err == "gpu_study: there is no GPU here; --tiny tries the study on the CPU\n"
