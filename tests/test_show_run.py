"""The page on a finished run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from transformers import GenerationConfig

from hf_nmsparse import NMSparseConfig, save_packed, sparsify
from hf_nmsparse.run_files import hypotheses_file, reference_file, source_file, write_lines
from recipes import show_run
from tests.test_plots import write_run
from tests.tiny import marian, tokenizer

SOURCES = [f"A man sleeps in garden {number}." for number in range(12)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What the recipe leaves of a run, its model of random weights."""
    folder = write_run(tmp_path / "run", 25.0, layers=True, method="sr-ste", pattern="2:4", decay=2e-4)
    texts = {source_file: SOURCES, reference_file: ["Ein Mann."] * 12, hypotheses_file: ["Ein Garten."] * 12}
    for file, lines in texts.items():
        write_lines(file(folder, "test"), lines)
    model = marian()
    model.generation_config = GenerationConfig(
        num_beams=2, max_length=8, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0
    )
    sparsify(model, NMSparseConfig("2:4"))
    save_packed(model, folder / "packed", values="bf16")
    tokenizer().save_pretrained(folder / "packed")
    return folder


def test_the_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_run.main([str(run)]) == 0
    page = capsys.readouterr().out
    for number in (0, 2, 4, 7, 9):  # five of twelve, at equal distances
        assert f"  source     {SOURCES[number]}\n  reference  Ein Mann.\n  2:4        Ein Garten.\n" in page
    assert page.count("  source ") == show_run.SHOWN
    rows = re.findall(r"^(dense export|packed) +([\d,]+) +([\d,]+) +([\d,]+)$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == ["dense export", "packed"]
    (dense, *_), (packed, *_) = ([int(number.replace(",", "")) for number in numbers] for _, *numbers in rows)
    assert packed == (run / "packed" / "model.safetensors").stat().st_size < dense
    assert "\n12 test sentences, beam 2, both in bfloat16, 1 thread(s) of " in page
    assert "\nBLEU 25.00  sig, 10 sentences\n" in page
    named = [Path(word.rstrip(",")) for word in page.partition("model, card")[2].split() if "/" in word]
    assert {run / "packed" / "README.md", run / "curve.json", run / "plots" / "flips.png"} <= set(named)
    (run / "packed" / "README.md").touch()  # the recipe writes it
    assert all(file.exists() for file in named)


def test_a_run_without_a_packed_model_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "packed")
    assert show_run.main([str(run)]) == 2
    said = f"show_run: {run} holds no packed model; give the folder of a finished sparse run\n"
    assert capsys.readouterr().err == said
