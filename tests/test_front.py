"""The front of made-up runs: what is measured of their models, how they become points, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, MarianMTModel

from hf_nmsparse import NMSparseConfig, save_packed, sparsify
from hf_nmsparse.evaluation import Evaluation
from hf_nmsparse.kernels import library
from hf_nmsparse.rounding import quantize_rows
from hf_nmsparse.run_files import reference_file, source_file, write_lines
from hf_nmsparse.tokenizer import train_tokenizer
from recipes import front
from tests.test_plots import write_run
from tests.tiny import VOCABULARY, marian

SOURCES = ["A man sleeps in the garden.", "A dog runs.", "A child waits there now."]
REFERENCES = ["Ein Mann schläft im Garten.", "Ein Hund rennt.", "Ein Kind wartet."]
STUDY = "tiny_study"


def model_of_random_weights() -> MarianMTModel:
    """Its tokens are those of the recipe's tokenizer: the padding is the last."""
    tokens: dict[str, Any] = {"eos_token_id": 0, "pad_token_id": VOCABULARY - 1}
    tokens["decoder_start_token_id"] = VOCABULARY - 1
    model = marian(**tokens)
    model.generation_config = GenerationConfig(max_length=8, **tokens)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``outputs`` and ``results`` of a study with a dense run and one of its students, which is 2:4."""
    folder = tmp_path_factory.mktemp("study")
    runs: dict[str, dict[str, Any]] = {
        "dense-s1": {"method": "dense"},
        "taught-s1": {"method": "sr-ste", "pattern": "2:4", "options": {"distill_from": "dense-s1"}},
    }
    for name, facts in runs.items():
        output = write_run(folder / "outputs" / STUDY / name, 20.0, **facts)
        result = folder / "results" / STUDY / name
        result.mkdir(parents=True)
        shutil.copy(output / "evaluation.json", result)
        write_lines(source_file(output, "test"), SOURCES)
        write_lines(reference_file(output, "test"), REFERENCES)
        model: Any = model_of_random_weights()
        saved = output / ("dense" if facts["method"] == "dense" else "packed")
        if facts["method"] == "dense":
            model.to(torch.bfloat16).save_pretrained(saved)
        else:
            sparsify(model, NMSparseConfig("2:4"))
            save_packed(model, saved, values="bf16")
        train_tokenizer([*SOURCES, *REFERENCES], VOCABULARY, max_length=64).save_pretrained(saved)
    return folder


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    return [STUDY, "--outputs", str(folder / "outputs"), "--results", str(folder / "results"), *more]


@pytest.mark.skipif(library.status().unit is None, reason=library.status().reason)
@pytest.mark.parametrize("ctranslate2", [False, True], ids=["alone", "beside CTranslate2"])
def test_the_front(study: Path, monkeypatch: pytest.MonkeyPatch, ctranslate2: bool) -> None:
    pytest.importorskip("matplotlib")
    if ctranslate2:
        pytest.importorskip("ctranslate2")
    else:
        monkeypatch.setitem(sys.modules, "ctranslate2", None)  # as if it were not installed
    assert front.main(arguments(study, "--rounds", "1", "--note", "a test")) == 0
    record = json.loads((study / "results" / "front.json").read_text())
    dense, sparse = record["rows"]
    keys = ("run", "pattern", "method", "teacher")
    assert [dense[key] for key in keys] == ["dense", None, "dense", None]
    assert [sparse[key] for key in keys] == ["taught", "2:4", "sr-ste", "dense"]
    shape = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "ffn": 64, "seeds": [1], "after": None}
    assert shape.items() <= dense.items()
    assert shape.items() <= sparse.items()
    assert dense["parameters"] == sparse["parameters"] == sum(weight.numel() for weight in marian().parameters())
    bf16 = study / "outputs" / STUDY / "dense-s1" / "dense" / "model.safetensors"
    assert sparse["bytes"] < dense["bytes"] < bf16.stat().st_size
    for row in (dense, sparse):
        assert row["extremes"]["bleu"] == [row["bleu"]] * 2
        assert row["tokens_per_second"] > 0 < row["peak_mib"]
    for key in ("ctranslate2_tokens_per_second", "ctranslate2_bytes", "ctranslate2_bleu"):
        assert (dense[key] is not None) == ctranslate2
        assert sparse[key] is None
    assert (record["ctranslate2"] is not None) == ctranslate2
    assert record["signature"].startswith("nrefs:1|case:mixed")
    table = (study / "results" / "front.md").read_text(encoding="utf-8")
    assert table == front.table_of(record) + "\n"
    assert "| taught | 2:4 | sr-ste | dense |  | 2+2 | 32 | 64 |" in table
    assert "a test" in table
    assert {file.name for file in (study / "results" / "plots").iterdir()} == {"front_bytes.png", "front_speed.png"}


def test_dense_models_are_rounded_as_their_file_would_be(tmp_path: Path) -> None:
    model = model_of_random_weights()
    exact = {name: weight.clone() for name, weight in model.state_dict().items()}
    size = front.save_rounded(model, tmp_path)
    rounded = load_file(tmp_path / "model.safetensors")
    shared = rounded["model.shared.weight"]
    values, scale = quantize_rows(exact["model.shared.weight"])
    assert torch.equal(shared, values * scale[:, None])
    assert all(map(torch.equal, quantize_rows(shared), (values, scale)))  # so the engine has the weights of the file
    fc1 = rounded["model.encoder.layers.0.fc1.weight"]
    assert not torch.equal(fc1, exact["model.encoder.layers.0.fc1.weight"])
    assert torch.equal(rounded["final_logits_bias"], exact["final_logits_bias"])
    matrices = [tensor for name, tensor in rounded.items() if tensor.dim() == 2 and name != "final_logits_bias"]
    numbers = sum(matrix.numel() + 4 * len(matrix) for matrix in matrices)
    rest = 4 * (sum(map(torch.numel, rounded.values())) - sum(map(torch.numel, matrices)))
    assert 0 < size - numbers - rest < 20_000  # what names the tensors


def test_points_are_added(tmp_path: Path) -> None:
    def point(run: str, size: int, **more: Any) -> dict[str, Any]:
        facts = {"study": "s", "run": run, "pattern": None, "bytes": size, "bleu": 1.0}
        return facts | more

    machine = {"cpu": "c", "cores": 1, "unit": None, "torch": "t", "torch_unit": "u", "note": ""}
    record = machine | dict.fromkeys(front.SAME, "as before")
    file = tmp_path / "front.json"
    with pytest.raises(ValueError, match=r"there is no .*front.json to add to; leave --add out"):
        front.added(file, record, [])
    file.write_text(json.dumps(record | {"rows": [point("old", 2), point("again", 3)]}))
    here = [point("again", 3, bleu=2.0), point("new", 1)]
    assert front.added(file, record, here) == (record, [point("new", 1), point("old", 2), point("again", 3, bleu=2.0)])
    elsewhere = record | {"cpu": "d"}
    written, points = front.added(file, elsewhere, here)
    assert written == record
    other = {"machine": "d, 1 cores, kernels on None, torch t on u."}
    assert points == [point("new", 1, **other), point("old", 2), point("again", 3, bleu=2.0, **other)]
    with pytest.raises(ValueError, match="was measured with rounds as before, now it is 5"):
        front.added(file, record | {"rounds": 5}, here)


def test_points_are_means_over_the_seeds() -> None:
    def finished(name: str, seed: int) -> front.Finished:
        facts: dict[str, Any] = {"corpus": "c", "split": "test", "model": "m", "steps": 1, "dense_bytes": 1}
        start = {"start": "sparsegpt", "distill_from": "large-s1"} if name.startswith("b") else {}
        record = Evaluation(
            **facts,
            method="sr-ste",
            pattern="2:4",
            seed=seed,
            options=start,
            base_model="dense-s2",
            bleu=0.0,
            chrf=0.0,
            signature="",
            chrf_signature="",
            sentences=1,
        )
        return front.Finished("s", name, record, Path())

    shape = {"d_model": 8, "encoder_layers": 6, "decoder_layers": 2, "ffn": 16, "parameters": 1000}
    rows = [
        shape | {"bytes": size, "bleu": bleu, "chrf": 50.0, "tokens_per_second": speed, "peak_mib": 1.0}
        for size, bleu, speed in ((900, 30.0, 100.0), (900, 31.0, 110.0), (800, 20.0, 90.0))
    ]
    runs = [finished("a-s3", 3), finished("a-s1", 1), finished("b-s1", 1)]
    small, large = front.points_of(runs, rows)
    assert (large["run"], large["seeds"], large["bleu"], large["extremes"]["bleu"]) == (
        "a",
        [1, 3],
        30.5,
        [30.0, 31.0],
    )
    assert (large["tokens_per_second"], large["bytes"], large["after"]) == (105.0, 900, "dense")
    assert (small["start"], small["teacher"], small["ctranslate2_bytes"]) == ("sparsegpt", "large", None)
    facts: dict[str, Any] = {"beams": 4, "threads": 1, "rounds": 1, "sentences": 1, "text": "t", "transformers": "5"}
    facts |= {"ctranslate2": None, "signature": "sig", "chrf_signature": "chrf", "note": ""}
    machine = {"cpu": "c", "cores": 1, "unit": None, "torch": "t", "torch_unit": "u"}
    table = front.table_of({**facts, **machine, "rows": [small, large]})
    assert "| b | 2:4 | sr-ste, from sparsegpt | large | dense | 6+2 | 8 | 16 | 1,000 | 800 | 1 | 20.00 |" in table
    assert "| 2 | 30.50 (30.00 to 31.00) | 50.00 (50.00 to 50.00) | 105 |  |  |" in table
    table = front.table_of({**facts, **machine, "rows": [small | {"machine": "d."}, large]})
    assert " | 90* |  |  |" in table
    assert " | 105 |  |  |" in table
    assert table.endswith("\n\n* On another machine, whose speeds do not compare with those above: d.")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rounds", "0"], "front: --rounds needs a number of at least 1, got 0"),
        (["--only", "asp"], "front: 'asp' is no finished run; these are dense-s1, taught-s1"),
        (["none"], "/results/none holds no finished run; run recipes/study.py first"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(
    study: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert front.main([*more, *arguments(study)] if more == ["none"] else arguments(study, *more)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("front: ")
    assert line.endswith(said)


def test_runs_that_cannot_be_compared_are_refused(study: Path) -> None:
    given: tuple[Any, ...] = ([STUDY], [], study / "outputs", study / "results")
    assert [run.name for run in front.finished_runs(*given)] == ["dense-s1", "taught-s1"]
    taught = study / "outputs" / STUDY / "taught-s1"
    write_lines(reference_file(taught, "test"), ["Ein Mann."] * 3)
    with pytest.raises(ValueError, match=r"taught-s1 has another test set than .*dense-s1; give studies of one"):
        front.finished_runs(*given)
    shutil.rmtree(taught / "packed")
    with pytest.raises(ValueError, match="taught-s1/packed is gone; bring it back, or name the runs that are whole"):
        front.finished_runs(*given)
    assert [run.name for run in front.finished_runs([STUDY], ["dense"], *given[2:])] == ["dense-s1"]
