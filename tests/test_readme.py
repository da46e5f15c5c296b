"""The README is executed: its Python blocks in order, its commands, its printed table and its numbers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from hf_nmsparse import NMSparseConfig, cli, save_packed, sparsify
from recipes import results_table
from recipes.wmt_en_de import parse
from tests.tiny import marian, tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def code(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny packed model where the README has the demo's."""
    monkeypatch.chdir(tmp_path)
    model = marian()
    model.generation_config = GenerationConfig(max_length=8, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    sparsify(model, NMSparseConfig("2:4"))
    save_packed(model, "outputs/demo/packed")
    tokenizer().save_pretrained("outputs/demo/packed")
    return tmp_path


def test_python_blocks_and_commands_run(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The blocks name no device and report to nobody, as a user's first try; the tests stay on the CPU and are quiet.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names: dict[str, Any] = {}
    for block in code("python"):
        with torch.random.fork_rng():
            exec(compile(block, "README.md", "exec"), names)
        printed = capsys.readouterr().out
        if "table = report(model)" in block:
            [table] = code("text")
            assert printed == table
    assert {"config.json", "model.safetensors"} <= {file.name for file in (demo / "out" / "dense").iterdir()}

    (demo / "source.txt").write_text("The device is not connected.\n")
    (demo / "reference.txt").write_text("Das Gerät ist nicht verbunden.\n", encoding="utf-8")
    [commands] = [block for block in code("bash") if "nmsparse" in block]
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "nmsparse"
        assert cli.main(arguments) == 0, command


def test_shell_blocks_name_what_is_there(tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for block in code("bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
            elif words[0] == "accelerate":
                script, config = words[2:]
                assert (ROOT / script).is_file()
                parse([str(ROOT / config), "--output_dir", str(tmp_path), "--use_cpu", "true"])
            else:
                assert words[0] == "nmsparse"


def test_files_that_it_names_exist() -> None:
    for path in re.findall(r"`((?:hf_nmsparse|recipes|tests|benchmarks)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", results_table.TABLES)
def test_tables_are_those_of_the_files(name: str) -> None:
    begin, end = results_table.markers(name)
    _, found, rest = README.partition(begin)
    table, ended, _ = rest.partition(end)
    assert found
    assert ended
    assert table.strip() == results_table.TABLES[name]().strip()
