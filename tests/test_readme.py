"""The README files are executed: Python blocks in order, commands, what is printed, links, and numbers."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from hf_nmsparse import NMSparseConfig, NMSparseQuantizationConfig, cli, save_packed, sparsify
from recipes import results_table
from recipes.arguments import parse
from recipes.study import Study
from tests.tiny import marian, token_pairs, tokenizer

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "benchmarks/README.md", "recipes/README.md", "recipes/serve/README.md", "model_cards/README.md")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
each_page = pytest.mark.parametrize("page", PAGES)


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks, in their order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


def code(page: str, language: str) -> list[str]:
    return [text for kind, text in blocks(page) if kind == language]


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page are called on the Hub and on GitHub."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tiny models where the pages have the demo's and OPUS-MT's."""
    monkeypatch.chdir(tmp_path)
    model = marian()
    model.generation_config = GenerationConfig(max_length=24, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    model.save_pretrained("Helsinki-NLP/opus-mt-en-de")
    tokenizer().save_pretrained("Helsinki-NLP/opus-mt-en-de")
    sparsify(model, NMSparseConfig("2:4"))
    save_packed(model, "outputs/demo/packed")
    tokenizer().save_pretrained("outputs/demo/packed")
    return tmp_path


@each_page
def test_python_blocks_and_commands_run(
    page: str, demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The blocks name no device and report to nobody, as a user's first try; the tests stay on the CPU and are quiet.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names: dict[str, Any] = {"pairs": token_pairs(16)}
    found = blocks(page)
    for (language, text), (after, shown) in zip(found, [*found[1:], ("", "")], strict=True):
        if language != "python":
            continue
        with torch.random.fork_rng():
            exec(compile(text, page, "exec"), names)
        printed = capsys.readouterr().out
        if after == "text":
            assert printed == shown

    (demo / "source.txt").write_text("The device is not connected.\n")
    (demo / "reference.txt").write_text("Das Gerät ist nicht verbunden.\n", encoding="utf-8")
    for line in "".join(code(page, "bash")).splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "nmsparse":
            assert cli.main(arguments) == 0, line
    if page == "README.md":
        assert {"config.json", "model.safetensors"} <= {file.name for file in Path("outputs/mine/dense").iterdir()}


@each_page
def test_shell_blocks_name_what_is_there(page: str, tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in "".join(code(page, "bash")).splitlines():
        match shlex.split(line, comments=True):
            case ["make", target]:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE)
            case ["accelerate", "launch", script, *config]:
                assert (ROOT / script).is_file()
                default = ROOT / "recipes/configs/wmt14_transformer_base_2of4.yaml"
                parse([*(config or [str(default)]), "--output_dir", str(tmp_path), "--use_cpu", "true"])
            case ["python", "-m", module, *_, "--note", _]:
                assert find_spec(module)
            case ["python", "recipes/study.py", study]:
                assert Study.read(ROOT / study).runs
            case ["pytest", folder]:
                assert list((ROOT / folder).glob("test_*.py"))
            case words:
                assert words[0] == "nmsparse" or words == ["pip", "install", "."]


@each_page
def test_files_that_it_names_exist(page: str) -> None:
    for path in re.findall(r"`((?:hf_nmsparse|recipes|tests|benchmarks|model_cards)/[\w/.]+)`", PAGES[page]):
        assert (ROOT / path).exists(), path


@each_page
def test_links_and_images_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^()\s]+)\)", PAGES[page])
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_records_are_records() -> None:
    [record] = code("model_cards/README.md", "json")
    found = NMSparseQuantizationConfig.from_dict(json.loads(record))
    assert found.to_dict() == json.loads(record)


@pytest.mark.parametrize("name", results_table.TABLES)
def test_tables_are_those_of_the_files(name: str) -> None:
    begin, end = results_table.markers(name)
    _, found, rest = results_table.home(name).read_text(encoding="utf-8").partition(begin)
    table, ended, _ = rest.partition(end)
    assert found
    assert ended
    assert table.strip() == results_table.TABLES[name]().strip()


def test_each_table_has_one_place() -> None:
    marked = re.findall(r"^<!-- (.*): recipes/results_table.py -->$", "\n".join(PAGES.values()), re.MULTILINE)
    assert sorted(marked) == sorted(results_table.TABLES)
