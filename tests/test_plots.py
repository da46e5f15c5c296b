"""Pictures of made-up runs: which are drawn, and that they hold what they should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_nmsparse.evaluation import evaluation_record
from hf_nmsparse.metrics import Score
from hf_nmsparse.plots import LoggedRun, _differing, _lambda, _of_shared_seeds, _pattern, plot_runs, read_run, read_runs
from hf_nmsparse.run_logs import write_curve, write_layers

FACTS: dict[str, Any] = {"corpus": "c", "split": "test", "model": "m", "steps": 20, "dense_bytes": 10}
TAUGHT = {"sparse_dense_head": 0.1, "distill_from": "dense", "distill_weight": 0.5, "distill_temperature": 2.0}


def write_run(folder: Path, bleu: float, seed: int = 1, layers: bool = False, **facts: Any) -> Path:
    """The files that the recipe leaves."""
    log: list[dict[str, Any]] = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 20, "eval_loss": 2.5}]
    if facts["method"] != "dense":
        log[0] |= {"sad": 8.0, "flip_rate": 0.1, "flip_rate/model.fc1": 0.1}
        log[1] |= {"sad": 4.0, "flip_rate": 0.05, "flip_rate/model.fc1": 0.05}
    folder.mkdir(parents=True)
    evaluation_record(Score(bleu, 50.0, "sig", "chrf", 10), seed=seed, **{**FACTS, **facts}).write(
        folder / "evaluation.json"
    )
    write_curve(log, folder / "curve.json")
    if layers:
        write_layers(log, folder / "layers.parquet")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[LoggedRun]:
    return [
        read_run(write_run(tmp_path / name, bleu, **facts))
        for name, bleu, facts in (
            ("dense-s1", 36.0, {"method": "dense"}),
            ("a-s1", 35.0, {"method": "sr-ste", "pattern": "2:4", "decay": 1e-4}),
            ("a-s2", 35.5, {"method": "sr-ste", "pattern": "2:4", "decay": 1e-4, "seed": 2}),
            ("b-s1", 34.0, {"method": "sr-ste", "pattern": "2:4", "decay": 1e-3, "layers": True}),
            ("c-s1", 30.0, {"method": "sr-ste", "pattern": "1:4", "decay": 1e-4}),
            ("ramp-s1", 34.0, {"method": "sr-ste", "pattern": "4:8", "decay": 1e-4, "options": {"sparse_ramp": 0.25}}),
            ("ste-s1", 34.5, {"method": "ste", "pattern": "2:4", "targets": ["fc1", "fc2"]}),
            ("kd-s1", 35.5, {"method": "ste", "pattern": "2:4", "options": TAUGHT}),
            ("again-s1", 37.0, {"method": "dense", "base_model": "dense-s1"}),
            ("both-s1", 33.0, {"method": "ste", "pattern": "2:4", "options": {"transposable": True, "permute": True}}),
            ("taught-s1", 38.0, {"method": "dense", "options": {**TAUGHT, "distill_temperature": 1.0}}),
        )
    ]


def test_the_words_for_a_run(runs: list[LoggedRun]) -> None:
    assert [run.settings for run in runs] == [
        "dense",
        "2:4, sr-ste, λ 0.0001",
        "2:4, sr-ste, λ 0.0001",
        "2:4, sr-ste, λ 0.001",
        "1:4, sr-ste, λ 0.0001",
        "4:8, sr-ste, λ 0.0001, ramp 0.25",
        "2:4, ste, fc1+fc2",
        "2:4, ste, dense head 0.1, distilled 0.5, T 2",
        "dense, after dense",
        "2:4, ste, permuted, transposable",
        "dense, dense head 0.1, distilled 0.5",
    ]
    assert [run.sparsity for run in runs] == [0, 0.5, 0.5, 0.5, 0.75, 0.5, 0.5, 0.5, 0, 0.5, 0]


def test_means_are_over_the_seeds_that_all_have(runs: list[LoggedRun]) -> None:
    names = [[run.name for run in group] for group in _of_shared_seeds([runs[1:4], runs[:1]], _lambda)]
    assert names == [["a-s1", "b-s1"], ["dense-s1"]]
    assert [len(group) for group in _of_shared_seeds([[runs[2]], runs[:1]], _lambda)] == [1, 1]  # no seed in common


def test_groups_differ_in_one_thing_alone(runs: list[LoggedRun]) -> None:
    sparse = [run for run in runs if run.evaluation.pattern is not None]
    names = {of: [[run.name for run in group] for group in _differing(sparse, of)] for of in (_pattern, _lambda)}
    assert names == {_pattern: [["a-s1", "a-s2", "c-s1"]], _lambda: [["a-s1", "a-s2", "b-s1"]]}


def test_every_picture_that_there_are_numbers_for(runs: list[LoggedRun], tmp_path: Path) -> None:
    files = plot_runs(runs, tmp_path / "plots", "svg")
    assert [file.name for file in files] == ["flips.svg", "sparsity.svg", "decay.svg", "layers-b-s1.svg"]
    again = plot_runs(runs, tmp_path / "again", "svg")
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    # text is drawn as paths, with the text itself in comments
    flips = files[0].read_text(encoding="utf-8")
    # neither the dense model that was trained on nor the one with a teacher is the baseline
    assert "(2 seeds)" not in files[2].read_text(encoding="utf-8")
    assert "<!-- 2:4, sr-ste, λ 0.0001 (2 seeds) -->" in flips
    assert "<!-- dense -->" not in flips
    assert "<!-- dense -->" in files[2].read_text(encoding="utf-8")
    sparsity = files[1].read_text(encoding="utf-8")
    assert [f"<!-- {pattern} -->" in sparsity for pattern in ("2:4", "1:4", "4:8")] == [True, True, False]
    assert "<!-- fc1 -->" in files[3].read_text(encoding="utf-8")


def test_the_legend_is_in_the_order_in_which_the_curves_end(runs: list[LoggedRun], tmp_path: Path) -> None:
    low = replace(runs[1], curve=[{"step": 10, "flip_rate": 0.9}, {"step": 20, "flip_rate": 0.01}])
    high = replace(runs[3], curve=[{"step": 10, "flip_rate": 0.02}, {"step": 20, "flip_rate": 0.03}])
    [flips, *_] = plot_runs([low, high], tmp_path / "plots", "svg")
    text = flips.read_text(encoding="utf-8")
    assert 0 < text.index(f"<!-- {high.settings} -->") < text.index(f"<!-- {low.settings} -->")


def test_one_run_has_its_flips(runs: list[LoggedRun], tmp_path: Path) -> None:
    [file] = plot_runs(runs[1:2], tmp_path / "plots")
    assert file.name == "flips.png"
    assert file.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(runs: list[LoggedRun], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plot: nothing to draw; give at least one sparse run"):
        plot_runs(runs[:1], tmp_path)
    with pytest.raises(ValueError, match="plot: format is one of png, svg, got 'pdf'"):
        plot_runs(runs, tmp_path, "pdf")
    (tmp_path / "a-s1" / "curve.json").unlink()
    with pytest.raises(ValueError, match=r"a-s1 holds no curve\.json; give folders of finished runs"):
        read_run(tmp_path / "a-s1")


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("evaluation.json", "sparse_ramp", "x", "evaluation.json: sparse_ramp: a number is needed, got 'x'"),
        ("evaluation.json", "sparse_ramp", [1], r"evaluation.json: sparse_ramp: a number is needed, got \[1\]"),
        ("evaluation.json", "distill_from", "dense", "evaluation.json: distill_weight: a number is needed, got None"),
        ("curve.json", "step", "1", "curve.json: step: a number is needed, got '1'"),
        ("curve.json", "step", None, "curve.json: step: a number is needed, got None"),
        ("curve.json", "flip_rate", {}, "curve.json: flip_rate: a number is needed, got {}"),
        ("curve.json", "flip_rate", True, "curve.json: flip_rate: a number is needed, got True"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path: Path, file: str, key: str, value: Any, message: str) -> None:
    write_run(tmp_path / "a", 35.0, method="ste", pattern="2:4")
    content = json.loads((tmp_path / "a" / file).read_text(encoding="utf-8"))
    (content[0] if file == "curve.json" else content["options"])[key] = value
    (tmp_path / "a" / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "a")


def test_every_run_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / place for place in ("x/run", "y/run", "z/run", "z/other")]
    for folder in folders:
        write_run(folder, 35.0, method="ste", pattern="2:4", layers=True)
    monkeypatch.chdir(tmp_path / "x/run")
    runs = read_runs([Path(), *folders[1:]])
    assert [run.name for run in runs] == ["x-run", "y-run", "z-run", "other"]
    assert [file.name for file in plot_runs(runs, tmp_path / "plots")][1:] == [f"layers-{run.name}.png" for run in runs]
    assert read_run(Path()).name == "run"
    with pytest.raises(ValueError, match=r"runs: .*run is given twice; name each run once"):
        read_runs([Path(), folders[0]])
    with pytest.raises(ValueError, match="plot: several runs are named 'run'; read them with read_runs"):
        plot_runs([read_run(folder) for folder in folders], tmp_path / "plots")


def test_a_dollar_is_no_tex(tmp_path: Path) -> None:
    run = write_run(tmp_path / "$a_b^{$", 35.0, method="ste", pattern="2:4", targets=["$a_b", "c$"], layers=True)
    _, layers = plot_runs([read_run(run)], tmp_path / "plots", "svg")
    assert "<!-- $a_b^{$: 2:4, ste, $a_b+c$ -->" in layers.read_text(encoding="utf-8")
