"""The study runner: its grid, what it skips, what it runs again, and a whole study that is killed and goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from hf_nmsparse.evaluation import Evaluation
from hf_nmsparse.metrics import SentenceStatistics
from recipes import results_table
from recipes.arguments import parse
from recipes.study import Runner, Study, main, only_one
from tests.recipe_runs import tiny, write_corpus
from tests.test_plots import write_run

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "recipes" / "studies").glob("*.yaml"))


def write_study(folder: Path, **record: Any) -> Path:
    (folder / "base.yaml").write_text("corpus: c\n")
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({"base": "base.yaml", **record}, sort_keys=False))
    return file


RUNS = {"dense": {"sparse_method": "dense"}, "asp": {"sparse_method": "asp", "after": "dense"}}


def runner(folder: Path, **record: Any) -> Runner:
    study = Study.read(write_study(folder, **{"runs": RUNS, **record}))
    return Runner(study, folder / "outputs", folder / "results", jobs=1, extra=[])


def finish(runner: Runner, name: str, left: bool = True, **facts: Any) -> None:
    """Leaves what a finished run leaves, as far as the runner looks at it; its model only if ``left``."""
    for folder in (runner.outputs / name, runner.results / name):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps({"train_seconds": 60.0, **facts}))
    if left:
        (runner.outputs / name / "dense").mkdir(exist_ok=True)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_studies_here_are_made_of_valid_runs(file: Path, tmp_path: Path) -> None:
    study = Study.read(file)
    whole = Runner(study, tmp_path, tmp_path / "results", 1, ["--use_cpu", "true"])
    for run in whole.runs.values():
        for other in run.needs:
            finish(whole, other)
        arguments = whole.command(run)
        _, args = parse(arguments[arguments.index(str(study.base)) :])
        assert args.output_dir == str(tmp_path / run.name)
        assert run.name.endswith(f"-s{args.seed}")


def test_the_first_seed_of_all_comes_first(tmp_path: Path) -> None:
    grid = Study.read(write_study(tmp_path, runs={**RUNS, "one": {"seeds": [1]}}, seeds=[1, 2])).grid()
    assert [run.name for run in grid] == ["dense-s1", "asp-s1", "one-s1", "dense-s2", "asp-s2"]
    assert [run.needs for run in grid] == [set(), {"dense-s1"}, set(), set(), {"dense-s2"}]
    assert grid[4].settings == {"sparse_method": "asp", "seed": 2}


def test_shared_settings_give_way(tmp_path: Path) -> None:
    [run] = Study.read(write_study(tmp_path, settings={"a": 1, "b": 2}, runs={"x": {"b": 3}})).grid()
    assert run.settings == {"a": "1", "b": "3", "seed": 1}


def test_settings_are_what_they_look_like(tmp_path: Path) -> None:
    """YAML has 2:4 for 124 and the language no for a falsehood."""
    file = write_study(tmp_path, runs={})
    file.write_text("base: base.yaml\nruns:\n  1of4: {pattern: 1:4, source_lang: no, lr_scheduler_kwargs: {a: 1e-3}}\n")
    study = Runner(Study.read(file), tmp_path, tmp_path, jobs=1, extra=[])
    command = " ".join(study.command(study.runs["1of4-s1"]))
    assert '--pattern 1:4 --source_lang no --lr_scheduler_kwargs {"a": "1e-3"} --seed 1' in command


def test_what_is_done_is_skipped(tmp_path: Path) -> None:
    study = runner(tmp_path)
    assert [run.name for run in study.pending([])] == ["dense-s1", "asp-s1"]
    finish(study, "dense-s1")
    assert [run.name for run in study.pending([])] == ["asp-s1"]
    assert study.pending(["dense"]) == []
    assert [run.name for run in study.pending(["asp-s1"])] == ["asp-s1"]
    finish(study, "asp-s1")
    assert study.pending([]) == []


def test_a_model_that_is_gone_is_trained_again(tmp_path: Path) -> None:
    study = runner(tmp_path)
    finish(study, "dense-s1", left=False)
    assert [run.name for run in study.pending([])] == ["dense-s1", "asp-s1"]
    finish(study, "asp-s1")
    assert study.pending([]) == []


def test_what_has_begun_goes_first(tmp_path: Path) -> None:
    study = runner(tmp_path, runs={"a": {}, "b": {}, "c": {}})
    (tmp_path / "outputs" / "b-s1").mkdir(parents=True)
    assert [run.name for run in study.pending([])] == ["b-s1", "a-s1", "c-s1"]


def test_a_run_reads_the_models_it_needs(tmp_path: Path) -> None:
    study = runner(tmp_path, runs={**RUNS, "kd": {"teacher": "dense", "targets": ["fc1", "fc2"]}})
    finish(study, "dense-s1")
    model = str(tmp_path / "outputs" / "dense-s1" / "dense")
    asp, kd = (" ".join(study.command(study.runs[name])) for name in ("asp-s1", "kd-s1"))
    assert f"--model {model}" in asp
    assert f"--distill_from {model}" in kd
    assert "--targets fc1 fc2" in kd
    assert "--seed 1" in kd


def test_results_name_other_runs_and_not_their_place(tmp_path: Path) -> None:
    study = runner(tmp_path)
    model = str(tmp_path / "outputs" / "dense-s1" / "dense")
    finish(study, "asp-s1", base_model=model, options={"distill_from": model}, model="a/b")
    study.collect("asp-s1")
    kept = json.loads((tmp_path / "results" / "asp-s1" / "evaluation.json").read_text())
    assert (kept["base_model"], kept["options"], kept["model"]) == ("dense-s1", {"distill_from": "dense-s1"}, "a/b")


def test_the_time_left(tmp_path: Path) -> None:
    study = runner(tmp_path, runs={"a": {}, "b": {}, "c": {}})
    assert study.seconds_left(study.pending([])) is None
    finish(study, "a-s1", train_seconds=100.0)
    finish(study, "b-s1", train_seconds=50.0)
    assert study.seconds_left(study.pending([])) == 75


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"runs": {"a": {"after": "b"}}}, "run 'a' needs 'b', which is no run"),
        ({"runs": {"a": {"after": "b"}, "b": {"seeds": [2]}}}, "run 'a-s1' needs 'b-s1'; give both the same seeds"),
        ({"runs": {"a": {}}, "layers": ["a"]}, "layers names 'a', which is no run with its seed, such as 'a-s1'"),
        ({"runs": {}, "seed": 1}, "holds the keys base, layers, runs, seeds, settings"),
        ({"runs": ["a"]}, "runs holds a name for each run, and keys and values of the recipe below"),
        ({"runs": {"a": "ste"}}, "runs holds a name for each run"),
        ({"runs": {}, "base": "none.yaml"}, "none.yaml is missing"),
        ({"runs": {}, "seeds": 12}, 'grid.yaml: seeds cannot be "12"'),
        ({"runs": {}, "seeds": [1.5]}, 'seeds: a list of whole numbers, got ["1.5"]'),
        ({"runs": {"a": {"seeds": 12}}}, 'seeds: a list of whole numbers, got "12"'),
        ({"runs": {}, "layers": "a-s1"}, 'grid.yaml: layers cannot be "a-s1"'),
        ({"runs": {"a": {"model": None}}}, "grid.yaml: model has no value"),
    ],
)
def test_studies_that_are_refused(
    tmp_path: Path, record: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_study(tmp_path, **record)
    assert main([str(file), "--outputs", str(tmp_path / "o"), "--results", str(tmp_path / "r")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("study: ")
    assert printed.count("\n") == 1


def test_unknown_runs_and_a_second_runner_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(write_study(tmp_path, runs=RUNS)), "--outputs", str(tmp_path / "o"), "--results", str(tmp_path)]
    assert main([*arguments, "--only", "stee"]) == 2
    assert "'stee' is no run; the runs are dense, asp" in capsys.readouterr().err
    assert main([*arguments, "--jobs", "0"]) == 2
    assert "--jobs needs a number of at least 1, got 0" in capsys.readouterr().err
    with only_one(tmp_path / "o" / "grid"):
        assert main(arguments) == 2
    assert "another process runs the study" in capsys.readouterr().err


@pytest.mark.long
def test_a_study_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, then two runs that need its model. The runner is killed without a chance, then told to stop."""
    corpus = write_corpus(tmp_path / "corpus")
    words = tiny(corpus, tmp_path / "unused", max_steps=20, save_steps=5, average=2)
    settings = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    (tmp_path / "base.yaml").write_text("".join(f"{key}: '{value}'\n" for key, value in settings.items()))
    runs = {**RUNS, "taught": {"sparse_method": "sr-ste", "teacher": "dense"}}
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"base": "base.yaml", "runs": runs, "layers": ["asp-s1"]}))
    command = [sys.executable, str(ROOT / "recipes" / "study.py"), str(file), "--jobs", "2"]
    command += ["--outputs", str(tmp_path / "outputs"), "--results", str(tmp_path / "results")]
    outputs, results = tmp_path / "outputs" / "grid", tmp_path / "results" / "grid"

    def started(file: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (outputs / "dense-s1" / file).exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    first = started("tokenizer")
    orphans = psutil.Process(first.pid).children(recursive=True)
    for process in [psutil.Process(first.pid), *orphans]:
        process.suspend()
    first.kill()
    first.wait()
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (refused.returncode, refused.stderr.count("another process runs the study")) == (2, 1)
    for process in orphans:
        process.kill()
    psutil.wait_procs(orphans, timeout=60)
    second = started("checkpoint-5")
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 143
    assert not (results / "dense-s1").exists()

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    logs = "".join(log.read_text()[-2000:] for log in outputs.glob("*/log.txt"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "grid: 3 runs, 3 to do, 2 at a time" in done.stdout
    evaluations = {folder.name: Evaluation.read(folder / "evaluation.json") for folder in results.iterdir()}
    assert {name: run.steps for name, run in evaluations.items()} == {"dense-s1": 20, "asp-s1": 20, "taught-s1": 20}
    assert evaluations["asp-s1"].base_model == "dense-s1"
    assert evaluations["taught-s1"].options["distill_from"] == "dense-s1"
    small = {"evaluation.json", "curve.json", "sentences.json"}
    assert {file.name for file in (results / "taught-s1").iterdir()} == small
    assert {file.name for file in (results / "asp-s1").iterdir()} == small | {"layers.parquet"}

    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "3 runs, 0 to do" in again.stdout

    table = results_table.study_of(results)
    dense, *others = [line.strip("| ").split(" | ") for line in table.splitlines()[2:5]]
    assert [dense[0], *sorted(cells[0] for cells in others)] == ["dense", "asp", "taught"]
    differences = [float(cells[4].split()[0]) for cells in others]
    assert differences == sorted(differences, reverse=True)
    assert "2:4, asp" in table
    assert "2:4, sr-ste, λ 0.0002, distilled 0.5" in table
    shutil.rmtree(results / "dense-s1")  # a study whose dense runs are still to come
    assert "| 2:4, asp, after dense | 1 |" in results_table.study_of(results)


def test_runs_are_set_beside_the_dense_run_that_was_trained_alike(tmp_path: Path) -> None:
    taught = {"distill_from": "dense-s1", "distill_weight": 0.5, "distill_temperature": 1.0}
    sparse = {"method": "asp", "pattern": "2:4", "base_model": "dense-s1"}
    # In so many of eight sentences the last word is right, as the others are.
    for name, right, facts in (
        ("dense-s1", 0, {"method": "dense"}),
        ("dense-s2", 4, {"method": "dense", "seed": 2}),
        ("again-s1", 8, {"method": "dense", "base_model": "dense-s1"}),
        ("longer-s1", 0, {"method": "dense", "base_model": "dense-s1", "steps": 200}),
        ("pruned-s1", 0, {**sparse, "steps": 1}),
        ("asp-s1", 4, {**sparse, "validation_loss": 2.5}),
        ("asp-s2", 4, {**sparse, "base_model": "dense-s2", "seed": 2, "validation_loss": 2.6}),
        ("taught-s1", 8, {"method": "ste", "pattern": "2:4", "options": taught}),
        ("plain-s1", 0, {"method": "ste", "pattern": "2:4"}),
    ):
        write_run(tmp_path / name, 50.0, **facts)
        words = ["a b c d e"] * right + ["a b c d x"] * (8 - right)
        SentenceStatistics.of(words, ["a b c d e"] * 8).write(tmp_path / name / "sentences.json")
    lines = [line.strip("| ").split("|") for line in results_table.study_of(tmp_path).splitlines()]
    rows = {cells[0].strip(): [cell.strip() for cell in cells] for cells in lines if len(cells) > 5}
    place = rows["run"].index("to dense trained alike (95%)")
    alike = {name: cells[place] for name, cells in rows.items() if name != "run" and "---" not in name}
    assert alike.keys() == {"dense", "again", "longer", "pruned", "asp", "taught", "plain"}
    assert alike["asp"].startswith("-")
    assert alike["asp"].endswith(", 1 of 2 seeds")
    assert {name for name, compared in alike.items() if compared} == {"asp"}  # no other is as long
    assert rows["asp"][place - 2].startswith("+")  # beside the plain dense runs of both seeds
    assert rows["plain"][place - 2] == "+0.00 (+0.00 to +0.00)"
    loss = rows["run"].index("validation loss")
    assert (rows["asp"][loss], rows["plain"][loss]) == ("2.550", "")
