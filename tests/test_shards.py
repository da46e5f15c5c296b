"""Shards of an output folder: which are there, whether they are whole, and with what they were made."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hf_nmsparse.pairs import write_rows
from hf_nmsparse.shards import Digest, Progress, Shards, name_of_model, share_of


def shards_in(folder: Path, rows: int = 3) -> Shards:
    return Shards(folder, rows=rows, size=2, record="record.json", names="shards/{number:06}-of-{all}.jsonl")


def write(rows: list[Mapping[str, Any]], file: Path) -> dict[str, int]:
    write_rows(file, rows, "jsonl")
    return {"tokens": len(rows)}


def written(folder: Path) -> Shards:
    """Three rows in two shards."""
    shards = shards_in(folder)
    assert not shards.begin({"beams": 1})
    shards.write(0, partial(write, [{"source": "a"}] * 2))
    assert shards.missing() == [1]
    shards.write(1, partial(write, [{"left_out": "blank"}]))
    return shards


def test_what_is_written_is_read_and_known(tmp_path: Path) -> None:
    shards = shards_in(tmp_path)
    progress = Progress(shards)
    assert progress.say().startswith("0 of 2 shards, 0.0 sentences/s, 0 tokens/s, unknown time left")
    assert written(tmp_path) == shards
    assert [list(shards.rows_of(shard)) for shard in shards.all] == [[0, 1], [2]]
    assert list(shards.read()) == [{"source": "a"}, {"source": "a"}, {"left_out": "blank"}]
    assert [(each["file"], each["tokens"]) for each in shards.checked()] == [
        ("000000-of-2.jsonl", 2),
        ("000001-of-2.jsonl", 1),
    ]
    assert not shards.is_ended()
    assert progress.say().startswith("2 of 2 shards, ")
    late = Progress(shards_in(tmp_path / "other"))
    shards.end({"beams": 1}, {"translated": 2})
    assert shards.begin({"beams": 1})
    assert {file.name for file in tmp_path.iterdir()} == {"record.json"}
    assert late.say().startswith("0 of 2 shards")


def test_another_process_may_end_before_the_last_word(tmp_path: Path) -> None:
    shards = shards_in(tmp_path, rows=1)
    progress = Progress(shards)
    shards.begin({})
    shards.write(0, partial(write, [{"source": "a"}]))
    (tmp_path / "shards" / "000000.json").unlink()
    with pytest.raises(
        ValueError, match=r"000000\.json: cannot be read: .*; delete .*000000-of-1\.jsonl and run again$"
    ):
        progress.say()
    (tmp_path / "record.json").write_text('{"settings": {}, "rows": {}}')
    assert progress.say() == "1 of 1 shards"


def test_damaged_shards_and_records_are_one_line(tmp_path: Path) -> None:
    shards = written(tmp_path)
    for damage, message in (("", "has 0 rows, and 1 are due"), ("{\n", "cannot be read"), (None, "cannot be read")):
        if damage is None:
            shards.file_of(1).unlink()
        else:
            shards.file_of(1).write_text(damage)
            with pytest.raises(ValueError, match=r"of-2\.jsonl: is not as it was written; delete it and run again$"):
                list(shards.checked())
        with pytest.raises(ValueError, match=rf"000001-of-2\.jsonl: {message}.*; delete it and run again$"):
            list(shards.read())
    with pytest.raises(ValueError, match=r"^beams: the translations in .* began with 1, got 2; give the same, or"):
        shards.begin({"beams": 2})
    record = tmp_path / shards.record
    record.write_text("[")
    with pytest.raises(ValueError, match=r"record\.json: the file is no JSON; choose another output_dir, or delete"):
        shards.begin({"beams": 1})
    record.unlink()
    (tmp_path / "train.tsv").touch()
    with pytest.raises(ValueError, match=r"output_dir: .* holds train\.tsv, of something else; choose another"):
        shards.begin({"beams": 1})


def test_each_shard_is_of_one_process() -> None:
    for processes in (1, 2, 3, 9):
        shares = [share_of(range(7), process, processes) for process in range(processes)]
        assert sorted(shard for share in shares for shard in share) == list(range(7))


def test_models_and_texts_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    assert len({name_of_model(str(tmp_path / name)) for name in ("one", "other")}) == 2
    before = name_of_model(str(tmp_path / "one"))
    for name in ("tokenizer.json", "source.spm", "vocab.json"):
        (tmp_path / "one" / name).write_text("ids")
        assert before != (before := name_of_model(str(tmp_path / "one")))
    assert name_of_model("user/model") == "user/model"
    assert len({str(Digest().add_all(texts)) for texts in (["ab", "c"], ["a", "bc"], ["abc"])}) == 3
