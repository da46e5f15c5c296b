"""A corpus in shards: nothing is lost or there twice, whoever translates it and whenever a process is killed."""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_nmsparse import Translator
from hf_nmsparse.bulk import BLANK, TOO_LONG
from hf_nmsparse.corpus import load_corpus
from hf_nmsparse.glossary import Glossary
from hf_nmsparse.pairs import read_column
from hf_nmsparse.placeholders import keeps_placeholders
from hf_nmsparse.shards import sha256_of
from hf_nmsparse.translate_corpus import main
from tests.processes import fork_server, in_two
from tests.recipe_runs import PAIRS
from tests.teachers import save_teacher

SOURCES = [source for source, _ in PAIRS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("corpora") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 lines: a blank one, one that is too long, and 28 that were there before."""
    file = tmp_path_factory.mktemp("corpora") / "mono.en"
    lines = [*SOURCES[:50], "", "The dog runs now. " * 20, *SOURCES[40:], *SOURCES[:18]]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def arguments(model: Path, output: Path, *inputs: Path | str, **changes: Any) -> list[str]:
    given = {"model": model, "output": output, "shard_size": 40, "threads": 1, "format": "jsonl", **changes}
    words = [str(name) for name in inputs]
    for key, value in given.items():
        words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def translated(output: Path) -> list[dict[str, Any]]:
    files = sorted(output.glob("train-*"))
    assert {file.name for file in output.iterdir()} == {"manifest.json", *(file.name for file in files)}
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def check_whole(output: Path, rows: int) -> dict[str, Any]:
    """Every line is in one file, and the manifest is right."""
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    first = 0
    for shard in manifest["shards"]:
        file = output / shard["file"]
        assert (shard["sha256"], shard["bytes"], shard["first"]) == (sha256_of(file), file.stat().st_size, first)
        first += sum(count for kind, count in shard["rows"].items() if kind != "pairs")
    assert first == rows
    return manifest


def test_every_line_is_translated_once(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    given = arguments(model, output, text, score=True)
    assert main(given) == 0
    lines = text.read_text(encoding="utf-8").split("\n")[:-1]
    there = [line for line in range(len(lines)) if line not in (50, 51)]
    rows = translated(output)
    assert [row["line"] for row in rows] == there
    best = Translator(model, threads=1).translate([lines[line] for line in there], return_scores=True)
    for row, line, one in zip(rows, there, best, strict=True):
        assert row["translation"] == {"en": lines[line], "de": one.text}
        assert one.token_scores is not None
        assert row["score"] == pytest.approx(sum(one.token_scores) / len(one.token_scores), abs=1e-4)
    manifest = check_whole(output, len(lines))
    assert manifest["rows"] == {"translated": len(there), "pairs": len(there), BLANK: 1, TOO_LONG: 1}
    assert [shard["rows"].get(BLANK) for shard in manifest["shards"]] == [None, 1, None, None]
    printed = capsys.readouterr().out
    assert "150 texts in 4 shards; the native engine, 1 thread(s)" in printed
    assert " sentences/s, " in printed
    assert "tokens/s, 0:00:00 left" in printed

    before = (output / "manifest.json").stat().st_mtime_ns
    assert main(given) == 0
    assert (output / "manifest.json").stat().st_mtime_ns == before


def test_all_formats_hold_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    for form in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet"):
        for number in (1, 2):
            assert main(arguments(model, tmp_path / f"{form}{number}", text, format=form, score=True)) == 0
        one, two = (sorted((tmp_path / f"{form}{number}").glob("train-*")) for number in (1, 2))
        assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
        found = [line for file in one for line in read_column(file, "de")]
        assert found == [row["translation"]["de"] for row in translated(tmp_path / "jsonl1")]
    files = [str(file) for file in sorted((tmp_path / "parquet1").glob("train-*"))]
    assert datasets.Dataset.from_parquet(files).to_list() == translated(tmp_path / "jsonl1")
    # Compressed shards one after the other are a file that the recipe reads.
    joined = tmp_path / "joined"
    joined.mkdir()
    for form in ("gz", "zst"):
        parts = sorted((tmp_path / f"jsonl.{form}1").glob("train-*"))
        (joined / f"train.jsonl.{form}").write_bytes(b"".join(part.read_bytes() for part in parts))
        assert len(load_corpus(str(joined), "en", "de")["train"]) == 148
        (joined / f"train.jsonl.{form}").unlink()


def test_all_inputs_are_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, and whatever else is in their rows."""
    rows = [{"en": source, "other": 1} for source in SOURCES[:9]]
    nested = [{"translation": {"en": source, "fr": None}} for source in SOURCES[:9]]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, nested)).encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "d.parquet")
    with pa.CompressedOutputStream(str(tmp_path / "e.txt.zst"), "zstd") as stream:
        stream.write("\n".join(SOURCES[:9]).encode())
    hub = [*nested[:8], {"translation": {"en": None}}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: hub if given == ("user/name", None) else None)
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.parquet", "e.txt.zst")]
    assert main(arguments(model, tmp_path / "out", *files, "user/name")) == 0
    found = [row["translation"]["en"] for row in translated(tmp_path / "out")]
    assert found == SOURCES[:9] * 5 + SOURCES[:8]
    assert check_whole(tmp_path / "out", 54)["rows"][BLANK] == 1


def test_back_translation(model: Path, text: Path, tmp_path: Path) -> None:
    """Samples of a seed, several of each, marked; other shards have others."""
    given = {"sample": True, "temperature": 30, "n_best": 2, "tag": "<BT>", "source_lang": "de", "target_lang": "en"}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        assert main(arguments(model, tmp_path / name, text, seed=seed, **given)) == 0
    rows = translated(tmp_path / "one")
    assert [row["line"] for row in rows[:4]] == [0, 0, 1, 1]
    assert all(row["translation"]["en"].startswith("<BT> ") for row in rows)
    assert rows[0]["translation"]["en"] != rows[1]["translation"]["en"]
    assert rows == translated(tmp_path / "same") != translated(tmp_path / "other")
    by_text: dict[str, set[str]] = {}
    for row in rows:
        by_text.setdefault(row["translation"]["de"], set()).add(row["translation"]["en"])
    assert max(map(len, by_text.values())) > 2  # of a text that is in two shards


def test_placeholders_and_a_glossary(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the translator has them; the manifest says so, and other terms under the same name are others."""
    lines = ["The {dog} runs to %s.", "The cat runs."]
    text, terms = tmp_path / "mono.en", tmp_path / "terms.tsv"
    text.write_text("\n".join(lines), encoding="utf-8")
    terms.write_text("cat\tSchwan\n", encoding="utf-8")
    given = arguments(model, tmp_path / "out", text, keep_placeholders=True, glossary=terms)
    assert main(given) == 0
    asked: dict[str, Any] = {"keep_placeholders": True, "glossary": Glossary.read(terms)}
    best = Translator(model, threads=1).translate(lines, **asked)
    assert [row["translation"]["de"] for row in translated(tmp_path / "out")] == [one.text for one in best]
    assert keeps_placeholders(lines[0], best[0].text)
    assert "Schwan" in best[1].text
    settings = check_whole(tmp_path / "out", 2)["settings"]
    assert settings["keep_placeholders"] is True
    assert settings["glossary"] == f"terms.tsv {sha256_of(terms)[:16]}"

    assert main(arguments(model, tmp_path / "out", text, glossary=terms)) == 2
    assert "keep_placeholders: the translations in " in capsys.readouterr().err
    terms.write_text("cat\tSchwein\n", encoding="utf-8")
    assert main(given) == 2
    assert "glossary: the translations in " in capsys.readouterr().err
    monkeypatch.setenv("HF_NMSPARSE_ENGINE", "0")
    assert main(arguments(model, tmp_path / "torch", text, glossary=terms)) == 2
    assert "glossary: needs the native engine, and transformers on cpu translates" in capsys.readouterr().err


def test_a_run_of_before_there_were_these_settings_goes_on(model: Path, text: Path, tmp_path: Path) -> None:
    assert main(arguments(model, tmp_path / "out", text)) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for name in ("keep_placeholders", "glossary"):
        assert manifest["settings"].pop(name) is None
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert main(arguments(model, tmp_path / "out", text)) == 0


def test_pairs_are_scored(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From all that has rows, and into all formats; what has no score is counted."""
    pairs = [*PAIRS[:90], ("The dog runs.", ""), (" ", "b"), ("a", "Der Hund. " * 20), *PAIRS[:7]]
    (tmp_path / "a.tsv").write_text("en\tde\n" + "".join(f"{one}\t{other}\n" for one, other in pairs))
    rows = [{"translation": {"en": one, "de": other}} for one, other in pairs]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"de": other, "en": one}) for one, other in pairs))
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: rows)
    files = [tmp_path / name for name in ("a.tsv", "b.parquet", "c.jsonl")]
    assert main(arguments(model, tmp_path / "out", *files, "user/name", score_pairs=True)) == 0
    assert "400 pairs in 10 shards; the native engine" in capsys.readouterr().out
    manifest = check_whole(tmp_path / "out", 400)
    assert manifest["rows"] == {"scored": 388, "pairs": 388, BLANK: 8, TOO_LONG: 4}
    assert manifest["settings"]["score_pairs"] is True
    found = translated(tmp_path / "out")
    there = [place for place in range(400) if place % 100 not in (90, 91, 92)]
    assert [row["line"] for row in found] == there
    given = [pairs[place % 100] for place in there]
    best = Translator(model, threads=1).score([one for one, _ in given], [other for _, other in given])
    for row, (source, target), one in zip(found, given, best, strict=True):
        assert row["translation"] == {"en": source, "de": target}
        assert row["tokens"] == len(one.tokens)
        assert row["total"] == pytest.approx(one.total, abs=1e-3)
        assert row["score"] == pytest.approx(one.total / len(one.tokens), abs=1e-4)

    given_parquet = arguments(model, tmp_path / "parquet", files[1], score_pairs=True, format="parquet")
    assert main(given_parquet) == 0
    shards = [str(file) for file in sorted((tmp_path / "parquet").glob("train-*"))]
    assert datasets.Dataset.from_parquet(shards).to_list() == found[:97]
    capsys.readouterr()
    assert main(arguments(model, tmp_path / "parquet", files[1], format="parquet")) == 2
    assert "texts: the translations in " in capsys.readouterr().err
    monkeypatch.setenv("HF_NMSPARSE_ENGINE", "0")
    assert main(arguments(model, tmp_path / "torch", files[2], score_pairs=True)) == 0
    for row, other in zip(translated(tmp_path / "torch"), found, strict=False):
        assert row == {**other, "score": pytest.approx(other["score"], abs=1e-3), "total": row["total"]}
        assert row["total"] == pytest.approx(other["total"], abs=1e-2)


def test_other_translations_of_the_same_texts_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, target in enumerate(("Der Hund.", "Ein Hund.")):
        (tmp_path / "pairs.jsonl").write_text(json.dumps({"en": "The dog.", "de": target}))
        assert main(arguments(model, tmp_path / "out", tmp_path / "pairs.jsonl", score_pairs=True)) == 2 * number
    assert "texts: the translations in " in capsys.readouterr().err


def of_two(argv: Sequence[str]) -> None:
    sys.exit(main(argv))


def test_two_processes_give_the_files_of_one(model: Path, text: Path, tmp_path: Path) -> None:
    done = in_two(of_two, arguments(model, tmp_path / "two", text))
    assert [one.returncode for one in done] == [0, 0], [one.stderr[-3000:] for one in done]
    assert main(arguments(model, tmp_path / "one", text)) == 0
    assert translated(tmp_path / "two") == translated(tmp_path / "one")
    assert check_whole(tmp_path / "two", 150) == check_whole(tmp_path / "one", 150)


def killed(argv: Sequence[str], moments: Sequence[float]) -> None:
    """Starts the command again and again, and kills it after so many seconds."""
    context = fork_server()
    for moment in moments:
        process = context.Process(target=of_two, args=(argv,))
        process.start()
        process.join(moment)
        process.kill()
        process.join()
        process.close()


def check_kills(model: Path, text: Path, folder: Path, times: int, longest: float) -> None:
    lines = text.read_text(encoding="utf-8") * 8
    many = folder / "many.en"
    many.write_text(lines, encoding="utf-8")
    given = {"shard_size": 12, "batch_size": 4}
    moments = [random.uniform(0.01, longest) for _ in range(times)]
    killed(arguments(model, folder / "killed", many, **given), moments)
    assert main(arguments(model, folder / "killed", many, **given)) == 0, moments
    assert main(arguments(model, folder / "whole", many, **given)) == 0
    assert check_whole(folder / "killed", 1200) == check_whole(folder / "whole", 1200), moments
    assert translated(folder / "killed") == translated(folder / "whole"), moments


def test_killed_at_any_moment_it_goes_on(model: Path, text: Path, tmp_path: Path) -> None:
    check_kills(model, text, tmp_path, times=5, longest=0.6)


@pytest.mark.long  # fifty starts of a process
def test_killed_at_many_moments_it_goes_on(model: Path, text: Path, tmp_path: Path) -> None:
    check_kills(model, text, tmp_path, times=50, longest=1.0)


def test_other_settings_texts_and_damaged_files_are_refused(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, other = tmp_path / "out", tmp_path / "other.en"
    assert main(arguments(model, output, text)) == 0
    other.write_text(text.read_text(encoding="utf-8") + "One more.\n", encoding="utf-8")
    for given, message in (
        (arguments(model, output, text, beams=2), f"beams: the translations in {output} began with None, got 2"),
        (arguments(model, output, other), f"texts: the translations in {output} began with '150 with digest"),
    ):
        capsys.readouterr()
        assert main(given) == 2
        assert message in capsys.readouterr().err

    # Shards of what was finished that are gone, changed or not known.
    done = tmp_path / "done"
    assert main(arguments(model, done, text)) == 0
    record = json.loads((done / "manifest.json").read_text())
    first, second = (done / shard["file"] for shard in record["shards"][:2])
    first.write_bytes(content := first.read_bytes() + b"x")
    assert main(arguments(model, done, text)) == 2
    assert f"{first}: is missing, or not as it was written" in capsys.readouterr().err
    first.write_bytes(content[:-1])
    assert main(arguments(model, done, text)) == 0
    second.unlink()
    assert main(arguments(model, done, text)) == 2
    assert f"{second}: is missing, or not as it was written" in capsys.readouterr().err
    for shards, count in ((record["shards"][1:], 3), (5, 0), (None, 0)):
        (done / "manifest.json").write_text(json.dumps({**record, "shards": shards}))
        assert main(arguments(model, done, text)) == 2
        assert f"manifest.json: names {count} of 4 shards" in capsys.readouterr().err

    # A shard that somebody has changed before all were there.
    begun = tmp_path / "begun"
    assert main(arguments(model, begun, text)) == 0
    manifest = json.loads((begun / "manifest.json").read_text())
    (begun / "shards").mkdir()
    for number, shard in enumerate(manifest["shards"]):
        (begun / "shards" / f"{number:06}.json").write_text(json.dumps(shard))
    (begun / "manifest.json").write_text(json.dumps({"settings": manifest["settings"]}))
    file = begun / manifest["shards"][1]["file"]
    file.write_bytes(file.read_bytes()[:-1])
    assert main(arguments(model, begun, text)) == 2
    assert f"{file}: is not as it was written; delete it and run again" in capsys.readouterr().err
    file.unlink()
    assert main(arguments(model, begun, text)) == 0
    assert check_whole(begun, 150) == check_whole(output, 150)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_best": 2}, "--n-best 2 needs as many --beams, got None; or give --sample"),
        ({"sample": True, "beams": 3}, "--sample draws tokens, and --beams 3 searches; leave one of them out"),
        ({"top_p": 0.9}, "--top-p is for --sample; give that too, or leave it out"),
        ({"target_lang": "en"}, "--source-lang and --target-lang are both 'en'; rows need two names"),
        ({"beams": 0}, "argument --beams: needs a number of at least 1, got '0'; see --help"),
        ({"prefix": "x", "keep_placeholders": True}, "--keep-placeholders would read --prefix as text; leave one out"),
        (
            {"score_pairs": True},
            "corpus: {text} has one text a line; rows of en and de are in jsonl, json, parquet, tsv",
        ),
        (
            {"score_pairs": True, "beams": 2},
            "--beams is for translations to be made, and --score-pairs makes none; lea",
        ),
        ({"score_pairs": True, "score": True}, "--score is for translations to be made, and --score-pairs makes none"),
        ({"glossary": "nowhere"}, "glossary: nowhere cannot be read: No such file or directory"),
        ({"compute": "int8", "device": "meta"}, "--device meta: "),
    ],
)
def test_mistakes_are_one_line(
    changes: dict[str, Any], message: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model, tmp_path / "out", text, **changes)) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"translate_corpus: {message.replace('{text}', str(text))}")
    assert told.count("\n") == 1


def test_an_empty_output_is_not_the_current_folder(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--model", str(model), "--output", "", str(text)]) == 2
    assert capsys.readouterr().err == "translate_corpus: --output is empty; name a path, as . for the current folder\n"
    assert not list(tmp_path.iterdir())


def test_inputs_that_are_none_are_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "other.jsonl").write_text('{"fr": "x"}\n{"en": 3}\n')
    for name, message in (
        (tmp_path, f"{tmp_path} is a folder; name the files in it"),
        ("nowhere.txt", "no file nowhere.txt, and no 'user/name' on the Hub either"),
        (tmp_path / "empty.txt", f"{tmp_path / 'empty.txt'}: no texts"),
        (tmp_path / "other.jsonl", f"corpus: {tmp_path / 'other.jsonl'}, line 1: no language 'en'; it has fr"),
    ):
        assert main(arguments(model, tmp_path / "out", name)) == 2
        assert capsys.readouterr().err.startswith(f"translate_corpus: {message}")


def test_without_an_engine_it_is_transformers(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model, tmp_path / "engine", text)) == 0
    monkeypatch.setenv("HF_NMSPARSE_ENGINE", "0")
    assert main(arguments(model, tmp_path / "torch", text)) == 0
    assert "4 shards; transformers on cpu" in capsys.readouterr().out
    assert translated(tmp_path / "torch") == translated(tmp_path / "engine")
