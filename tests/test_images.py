"""recipes/images.py: a tiny study of each model, what it skips, and its table and picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_nmsparse.packed_files import check_folder
from recipes import images
from recipes.images import Study, digits, interval, late_flips, main

STUDIES = sorted((Path(images.__file__).parent / "image_studies").glob("*.yaml"))


def write(folder: Path, **changes: Any) -> Path:
    record: dict[str, Any] = {
        "model": "vit",
        "config": {"num_channels": 1, "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1},
        "enlarge": 1,
        "training": {"max_steps": 4, "logging_steps": 2, "learning_rate": 0.01},
        "seeds": [1, 2],
        "runs": {
            "dense": {"sparse_method": "dense"},
            "ste-2of4": {"pattern": "2:4", "sparse_method": "ste"},
            "sr-ste-2of4": {"pattern": "2:4"},
            "asp-2of4": {"pattern": "2:4", "sparse_method": "asp", "after": "dense"},
        },
    } | changes
    record["config"] |= {"num_attention_heads": 2, "intermediate_size": 8, "num_labels": 10}
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(record).replace("{", "{ "))  # JSON is YAML
    return file


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_studies_here_are_read(file: Path) -> None:
    study = Study.read(file)
    assert study.seeds == (1, 2, 3)
    assert {"dense", "ste-2of4", "sr-ste-2of4", "asp-2of4", "ste-1of4", "sr-ste-1of4", "asp-1of4"} <= study.runs.keys()
    assert study.config["num_labels"] == 10


def test_the_digits() -> None:
    train, test = digits(2)
    assert (len(train), len(test)) == (896, 901)
    pixels = torch.stack([image["pixel_values"] for image in train + test])
    assert pixels.shape == (1797, 1, 16, 16)
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)
    assert torch.equal(pixels[..., ::2, ::2], pixels[..., 1::2, 1::2])
    again, _ = digits(2)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(train, again, strict=True))


def test_a_study_and_what_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--outputs", str(tmp_path / "outputs"), "--results", str(tmp_path / "results")]
    main([str(write(tmp_path)), *places, "--only", "sr-ste-2of4", "asp-2of4"])  # which needs dense
    main([str(write(tmp_path)), *places])
    done = sorted(file.name for file in (tmp_path / "results" / "tiny").glob("*.json"))
    assert done == [
        f"{run}-s{seed}.json" for run in ("asp-2of4", "dense", "sr-ste-2of4", "ste-2of4") for seed in (1, 2)
    ]
    record = json.loads((tmp_path / "results" / "tiny" / "sr-ste-2of4-s1.json").read_text())
    assert (record["decay"], record["steps"], record["images"]) == (2e-4, 4, [896, 901])
    assert 0 < record["accuracy"] < 100
    assert [entry["step"] for entry in record["curve"]] == [2, 4]
    assert check_folder(tmp_path / "outputs" / "tiny" / "sr-ste-2of4-s1").packed_bytes < record["bytes"]
    capsys.readouterr()
    monkeypatch.setattr(images, "train", None)  # nothing is trained again
    main([str(write(tmp_path)), *places])
    assert capsys.readouterr().out == ""
    rows = images.table(tmp_path / "results").splitlines()
    assert rows[0].startswith("| study | run |")
    found = [row.split(" | ")[1:5] for row in rows[2:6]]
    assert found[0] == ["dense", "dense", "dense", "2"]
    assert sorted(found[1:]) == [
        ["asp-2of4", "2:4", "asp, after dense", "2"],
        ["sr-ste-2of4", "2:4", "sr-ste, λ 0.0002", "2"],
        ["ste-2of4", "2:4", "ste", "2"],
    ]
    assert any("than under SR-STE" in row for row in rows)
    assert [file.name for file in images.plot(tmp_path / "results")] == ["tiny_flips.png"]


def test_numbers() -> None:
    assert interval([1.0]) == "+1.0"
    assert interval([1.0, 2.0, 3.0]) == "+2.0 (-0.5 to +4.5)"  # 4.303 / sqrt(3)
    curve = [{"flip_rate": rate} for rate in (4.0, 3.0, 2.0, 1.0)]
    assert late_flips({"curve": curve}) == 1.0
    assert late_flips({"curve": [{"flip_rate": 0.0}]}) is None
    assert images.table(Path("nowhere")) == "It has not been measured yet."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {"asp": {"after": "nobody"}}}, "asp starts after 'nobody', which is no other run"),
        ({"runs": {"asp": {"after": "asp"}}}, "asp starts after 'asp', which is no other run"),
        ({"runs": {"../asp": {}}}, "'../asp' is no name of a run"),
        ({"runs": {}}, "runs holds nothing; give one"),
        ({"seeds": []}, "seeds holds nothing; give one"),
        ({"seeds": [1, "x"]}, "seeds needs whole numbers of at least 0, got 'x'"),
        ({"enlarge": 0}, "enlarge needs whole numbers of at least 1, got '0'"),
        ({"enlarge": 1.5}, "enlarge needs whole numbers of at least 1, got '1.5'"),
        ({"model": "foo"}, "transformers knows no model 'foo'"),
        ({"config": {"hidden_sz": 8}}, "config of vit has no hidden_sz; leave it out"),
        ({"runs": {"asp": 3}}, "asp holds keys and values"),
        ({"model": ["vit"]}, "model is a str"),
        ({"more": 1}, "holds the keys model, config, enlarge, training, seeds, runs"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Study.read(write(tmp_path, **changes))
    with pytest.raises(SystemExit, match="images: 'nobody' is no run; the runs are dense"):
        main([str(write(tmp_path)), "--only", "nobody", "--results", str(tmp_path)])


def test_a_run_without_a_log(tmp_path: Path) -> None:
    training = {"max_steps": 2, "logging_steps": 3}
    places = ["--outputs", str(tmp_path / "outputs"), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit, match="dense ends after 2 steps, before its first log; give smaller logging_steps"):
        main([str(write(tmp_path, training=training)), *places, "--only", "dense"])
