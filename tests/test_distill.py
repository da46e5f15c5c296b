"""Sequence-level distillation: what is chosen, left out and resumed, on one process and on two, and a student of it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_nmsparse import Translator
from hf_nmsparse.bulk import BLANK, NOTHING, TOO_LONG, Candidate, Search
from hf_nmsparse.corpus import load_corpus
from hf_nmsparse.evaluation import Evaluation
from hf_nmsparse.shards import Shards
from hf_nmsparse.tokenizer import train_tokenizer
from recipes.distill import nearest_by, run, translated
from recipes.distill_arguments import DistillArguments, parse
from recipes.teachers import mean_of
from tests.processes import ROOT, in_two
from tests.recipe_runs import PAIRS, run_recipe, tiny, write_corpus
from tests.teachers import save_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and two teachers of its tokens whose random weights are sure of something."""
    folder = tmp_path_factory.mktemp("distill")
    write_corpus(folder / "corpus")
    for name, seed in (("teacher", 0), ("other", 1)):
        save_teacher(folder / name, seed)
    return folder


def arguments(place: Path, output: Path, **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        "corpus": place / "corpus",
        "teachers": place / "teacher",
        "output_dir": output,
        "shard_size": 50,
        "beams": 2,
        "threads": 1,
        "use_cpu": "true",
        "format": "jsonl",
        **changes,
    }
    return [
        part
        for key, value in given.items()
        if value is not None
        for part in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]


def distil(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["distill.py", *argv])
    run()


def refusal(monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        distil(monkeypatch, *argv)
    assert "\n" not in str(stopped.value.code)
    return str(stopped.value.code)


@pytest.fixture(autouse=True)
def threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.distill.take_all_cores", lambda: None)  # which is for the whole process


def interrupt(*args: Any, **more: Any) -> None:
    raise KeyboardInterrupt


def rows(file: Path) -> list[tuple[str, str]]:
    pairs = [json.loads(line)["translation"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [(pair["en"], pair["de"]) for pair in pairs]


def test_the_best_translations_become_a_corpus(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    distil(monkeypatch, *arguments(place, output))
    sources = [source for source, _ in PAIRS]
    best = Translator(place / "teacher", threads=1).translate(sources, num_beams=2)
    assert rows(output / "train.jsonl") == [(source, one.text) for source, one in zip(sources, best, strict=True)]
    assert rows(output / "test.jsonl") == PAIRS[::10]
    assert rows(output / "validation.jsonl") == PAIRS[::12]
    splits = load_corpus(str(output), "en", "de")
    assert list(splits["train"]["target"]) == [one.text for one in best]
    printed = capsys.readouterr().out
    assert "distill: 120 sources in 3 shards; the native engine, 1 thread(s)" in printed
    assert re.search(r"distill: 2 of 3 shards, [\d.,]+ sentences/s, [\d.,]+ tokens/s, 0:00:0\d left", printed)
    assert f"{output}/train.jsonl: 120 of 120 sources; left out: none" in printed
    assert json.loads((output / "distill.json").read_text())["rows"] == {"translated": 120}
    assert not (output / "shards").exists()

    distil(monkeypatch, *arguments(place, output))
    assert "train.jsonl is finished; delete" in capsys.readouterr().out
    for name in ("train", "validation", "test"):
        file = output / f"{name}.jsonl"
        content = file.read_bytes()
        file.write_bytes(content.replace(b"a", b"b", 1))
        told = refusal(monkeypatch, *arguments(place, output))
        assert told == f"distill: {file}: is missing, or not as it was written; begin again in another folder"
        file.unlink()
        assert refusal(monkeypatch, *arguments(place, output)) == told
        file.write_bytes(content)
    record = json.loads((output / "distill.json").read_text())
    for files, count in ((record["files"][1:], 2), ([*record["files"][1:], 5, {"file": []}], 2), ({}, 0)):
        (output / "distill.json").write_text(json.dumps({**record, "files": files}))
        told = refusal(monkeypatch, *arguments(place, output))
        assert told == f"distill: {output}/distill.json: names {count} of 3 files; begin again in another folder"


def test_a_run_that_was_killed_before_its_record_was_written_ends(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are there, and whether all of them are whole nobody has said."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "end", interrupt)
        with pytest.raises(SystemExit, match="130"):
            distil(patch, *arguments(place, output))
    whole = (output / "train.jsonl").read_bytes()
    (output / "train.jsonl").write_bytes(b"")
    (output / "test.jsonl").unlink()
    distil(monkeypatch, *arguments(place, output))
    assert "train.jsonl: 120 of 120 sources" in capsys.readouterr().out
    assert (output / "train.jsonl").read_bytes() == whole
    assert rows(output / "test.jsonl") == PAIRS[::10]

    # And where it was killed a moment after: what it would have removed goes.
    (output / "shards").mkdir()
    distil(monkeypatch, *arguments(place, output))
    assert not (output / "shards").exists()


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_other_formats_hold_the_same(kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"max_train_pairs": 7, "beams": 1}
    for name, form in (("plain", "jsonl"), ("one", kind), ("two", kind)):
        distil(monkeypatch, *arguments(place, tmp_path / name, format=form, **given))
    splits = [load_corpus(str(tmp_path / name), "en", "de") for name in ("plain", "one")]
    for split in ("train", "validation", "test"):
        assert splits[0][split].to_list() == splits[1][split].to_list()
    assert len(splits[0]["train"]) == 7
    assert (tmp_path / "one" / f"train.{kind}").read_bytes() == (tmp_path / "two" / f"train.{kind}").read_bytes()


@pytest.mark.parametrize(
    ("metric", "chosen"),
    [
        ("bleu", "a b c d e x y z"),  # the words are the reference's, and what follows costs little
        ("chrf", "abcde"),
    ],
)
def test_the_choice_is_by_the_sentence_score(metric: str, chosen: str) -> None:
    reference = {"bleu": "a b c d e", "chrf": "abcdef"}[metric]
    assert nearest_by(metric)(["q q", chosen, "w"], reference) == chosen
    assert nearest_by(metric)([f"{chosen} ", chosen], reference) == f"{chosen} "  # of equal ones the first


class Told:
    """A teacher that says what it is told."""

    name, longest = "told", 4.0

    def __init__(self, found: dict[str, list[str]]) -> None:
        self.found, self.asked = found, list[str]()

    def count(self, texts: list[str], search: Search, target: bool = False) -> list[int]:
        return [len(text.split()) for text in texts]

    def translate(self, texts: list[str], search: Search) -> list[list[Candidate]]:
        self.asked += texts
        return [[Candidate(one, 1) for one in self.found[text][: search.count]] for text in texts]


def test_what_is_left_out_has_a_reason() -> None:
    teacher: Any = Told({">> a b": ["x"], ">> c": [" ", ""], ">> d": ["", "y"]})
    args = DistillArguments("o", ["t"], corpus="c", source_prefix=">> ", beams=2, interpolation="chrf")
    given = {"source": ["a b", "  ", "one two three four", "c", "d"], "target": ["r"] * 5}
    made = [
        {"source": "a b", "target": "x"},
        {"left_out": BLANK},
        {"left_out": TOO_LONG},
        {"left_out": NOTHING},
        {"source": "d", "target": "y"},
    ]
    assert translated(given, teacher, args) == (made, 2)
    assert teacher.asked == [">> a b", ">> c", ">> d"]


def test_interpolation_takes_the_nearest_of_the_beams(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is the last of them here, which is its own nearest."""
    sources = [source for source, _ in PAIRS[:20]]
    translator = Translator(place / "teacher", threads=1)
    found = translator.translate(sources, num_beams=4, num_return_sequences=4)
    last = [one.alternatives[-1].text for one in found]
    assert all(one.text != text for one, text in zip(found, last, strict=True))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = [json.dumps({"en": source, "de": text}) for source, text in zip(sources, last, strict=True)]
    (corpus / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for metric in ("chrf", "bleu"):
        output = tmp_path / metric
        distil(monkeypatch, *arguments(place, output, corpus=corpus, beams=4, interpolation=metric))
        assert rows(output / "train.jsonl") == list(zip(sources, last, strict=True))


def test_several_teachers_are_averaged(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [str(place / "teacher"), str(place / "other")]
    output = tmp_path / "out"
    distil(monkeypatch, *arguments(place, output, teachers=models, max_train_pairs=10))
    search = Search(batch_size=3, settings={"num_beams": 2})
    found = mean_of(models, CPU).translate([source for source, _ in PAIRS[:10]], search)
    assert [target for _, target in rows(output / "train.jsonl")] == [best.text for [best] in found]


def test_a_text_of_one_language(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "mono.txt"
    lines = ["The man sleeps here.", "", "The dog runs now. " * 20, "The cat eats."]
    text.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    output = tmp_path / "out"
    distil(monkeypatch, *arguments(place, output, corpus=None, text=text))
    assert [source for source, _ in rows(output / "train.jsonl")] == [lines[0], lines[3]]
    assert "train.jsonl: 2 of 4 sources; left out: 1 blank, 1 too long" in capsys.readouterr().out
    assert {file.name for file in output.iterdir()} == {"train.jsonl", "distill.json"}


def test_where_everything_is_left_out_it_is_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = refusal(monkeypatch, *arguments(place, tmp_path / "out", max_length=2))
    assert told.endswith("train.jsonl: all sources are left out; look at them, or raise max_length")


def test_a_stopped_run_goes_on_where_it_was(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    distil(monkeypatch, *arguments(place, whole))
    written, write = list[int](), Shards.write

    def stop_after_two(self: Shards, shard: int, given: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, given)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write", stop_after_two)
        with pytest.raises(SystemExit, match="130"):
            distil(patch, *arguments(place, output))
    assert [file.name for file in sorted((output / "shards").glob("*.jsonl"))] == ["000000.jsonl", "000001.jsonl"]
    assert not list(output.glob("train*"))
    kept = [file.stat().st_mtime_ns for file in sorted((output / "shards").iterdir())]

    for changes, message in (
        ({"beams": 3}, "distill: beams: the translations in {} began with 2, got 3; give the same, or another"),
        ({"teachers": place / "other"}, "distill: teachers: the translations in {} began with ['teacher "),
        ({"max_train_pairs": 119}, "distill: texts: the translations in {} began with '120 with digest "),
    ):
        assert refusal(monkeypatch, *arguments(place, output, **changes)).startswith(message.format(output))
    assert [file.stat().st_mtime_ns for file in sorted((output / "shards").iterdir())] == kept

    capsys.readouterr()
    distil(monkeypatch, *arguments(place, output))
    printed = capsys.readouterr().out
    assert printed.count(" of 3 shards, ") == printed.count("distill: 3 of 3 shards, ") == 1
    assert (output / "train.jsonl").read_bytes() == (whole / "train.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": None}, "teachers: name one model or several"),
        ({"corpus": None}, "corpus: give it, or text in its place, and not both"),
        ({"text": "x"}, "corpus: give it, or text in its place, and not both"),
        ({"output_dir": ""}, "output_dir is empty; name a path, as . for the current folder"),
        ({"beams": 0}, "beams: needs at least 1, got 0"),
        ({"format": "tsv"}, "format: is one of jsonl.gz, jsonl.zst, jsonl, parquet, got 'tsv'"),
        ({"interpolation": "ter"}, "interpolation: is one of chrf, bleu, got 'ter'"),
        ({"interpolation": "chrf", "beams": 1}, "interpolation: chooses among beams, and beams is 1; raise it"),
        ({"interpolation": "chrf", "corpus": None, "text": "x"}, "interpolation: needs references, which text has not"),
        ({"beam": 1}, "arguments: command line: unknown key 'beam'; did you mean 'beams'?"),
        ({"compute": "int4"}, "compute: 'int4' is for the native engine, which is not taken for translator: compute"),
        ({"teachers": "none/here"}, "model: none/here cannot be loaded: "),
        ({"corpus": "none/here"}, "corpus 'none/here': no local folder"),
        ({"corpus": None, "text": "none.txt"}, "text: no file none.txt"),
    ],
)
def test_mistakes_are_one_line(
    changes: dict[str, Any], message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = refusal(monkeypatch, *arguments(place, tmp_path / "out", **changes))
    assert told.startswith(f"distill: {message}")


def test_teachers_of_other_tokens_are_not_averaged(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokens"
    shutil.copytree(place / "other", other)
    train_tokenizer(["Etwas ganz anderes."] * 9, 300, max_length=40).save_pretrained(other)
    with pytest.raises(ValueError, match=r"teachers: .*teacher and .*tokens have other tokens; average models of the"):
        mean_of([str(place / "teacher"), str(other)], CPU)


def test_the_published_distillations_parse() -> None:
    for file in sorted((ROOT / "recipes" / "distillations").glob("*.yaml")):
        assert parse([str(file), "--beams", "9"]).beams == 9
    with pytest.raises(ValueError, match=r"arguments: no such file nowhere\.yaml; see recipes/distillations"):
        parse(["nowhere.yaml"])


def of_two(argv: list[str]) -> None:
    """What each of two processes does in the test below."""
    sys.argv = ["distill", *argv]
    run()


def test_two_processes_give_the_bytes_of_one(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"shard_size": 25, "format": "jsonl.gz"}
    first, second = in_two(of_two, arguments(place, tmp_path / "two", **given))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[-3000:] + second.stderr[-3000:]
    assert "train.jsonl.gz: 120 of 120 sources; left out: none" in first.stdout
    distil(monkeypatch, *arguments(place, tmp_path / "one", **given))
    one, two = (tmp_path / name / "train.jsonl.gz" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_student_learns_from_translations_and_word_by_word(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe on what was written, with the tokens and the words of the teacher; other tokens are refused."""
    output, student = tmp_path / "out", tmp_path / "student"
    distil(monkeypatch, *arguments(place, output))
    config = str(ROOT / "recipes" / "configs" / "demo.yaml")
    given = {"distill_from": place / "teacher", "max_steps": 3, "save_steps": 3, "average": 1, "decoder_layers": 2}
    refused = run_recipe(config, *tiny(output, student, **given), fails=True)
    assert f"distill_from: {place / 'teacher'} has other tokens than the model; a model from scratch takes" in refused
    shutil.rmtree(student)
    run_recipe(config, *tiny(output, student, **given, tokenizer=place / "teacher"))
    evaluation = Evaluation.read(student / "evaluation.json")
    assert (evaluation.corpus, evaluation.sentences, evaluation.steps) == ("out", 12, 3)
    assert evaluation.options["distill_from"] == str(place / "teacher")
    assert ", 1+2 layers" in evaluation.model
    tokens = [json.loads((folder / "tokenizer.json").read_text()) for folder in (place / "teacher", student / "packed")]
    assert tokens[0]["model"] == tokens[1]["model"]
