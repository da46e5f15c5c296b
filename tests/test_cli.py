from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel
from transformers.utils import logging

from hf_nmsparse.cli import main
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.masks import count_violations
from hf_nmsparse.metrics import compare, score
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.pipeline import translate
from hf_nmsparse.sparsify import sparsify
from tests import tiny
from tests.test_plots import write_run

SENTENCES = ["The garden is big.", "A man", "", "sleeps in the garden. The garden is big.", "Der Garten", "A man"]
LAYER = "model.encoder.layers.0.fc1"


@pytest.fixture(autouse=True)
def _progress_bar() -> Iterator[None]:
    """The commands turn transformers' progress bar off, for the whole process."""
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders "training" and "packed" of one model, and "dense", another that is not sparse."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny.marian(init_std=0.5)
    model.save_pretrained(folder / "dense")
    tiny.tokenizer().save_pretrained(folder / "dense")
    sparsify(model, NMSparseConfig("2:4"))
    model.save_pretrained(folder / "training")
    tiny.tokenizer().save_pretrained(folder / "training")
    assert main(["pack", str(folder / "training"), str(folder / "packed")]) == 0
    return folder


def translations(folder: Path, **kwargs: Any) -> list[str]:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return [" ".join(text.splitlines()) for text in translate(model, tokenizer, SENTENCES, **kwargs)]


def fails(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A user's error: one line on standard error and status 2."""
    capsys.readouterr()
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nmsparse: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


class TestArguments:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "COMMAND"),
            (["prune"], "invalid choice: 'prune'"),
            (["inspect"], "PATH"),
            (["translate"], "--model; see nmsparse translate --help"),
            (["translate", "--model", "m", "--beams", "0"], "--beams: needs a number of at least 1, got '0'"),
            (["translate", "--model", "m", "--batch-size", "x"], "--batch-size: needs a number of at least 1, got 'x'"),
            (["pack", "a", "b", "--values", "int4"], "invalid choice: 'int4'"),
        ],
    )
    def test_bad(self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        fails(argv, message, capsys)

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as raised:
            main(["--help"])
        assert raised.value.code == 0
        text = capsys.readouterr().out
        assert all(command in text for command in ("inspect", "pack", "export", "translate", "evaluate"))


class TestInspect:
    def test_packed(self, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert main(["inspect", str(models / "packed"), "--layers"]) == 0
        text = capsys.readouterr().out
        stored = sum(tensor.nbytes for tensor in load_file(models / "packed/model.safetensors").values())
        dense = sum(tensor.nbytes for tensor in load_file(models / "dense/model.safetensors").values())
        assert "pattern        2:4, 2 of every 4 weights are kept" in text
        assert "values         fp32" in text
        assert "sparse layers  32, every one valid" in text
        assert f"packed bytes   {stored:,}, {stored / dense:.1%} of dense" in text
        assert f"dense bytes    {dense:,}\n" in text
        # 64 rows of 8 groups: 16 fp32 values and 3 bytes of codes a row
        assert f"{LAYER}  64x32  {64 * (16 * 4 + 3):,} bytes" in text

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("code", f"model.safetensors: {LAYER}.weight_indices: codes of 2:4 are 0 to 5, got 7"),
            ("truncated", "model.safetensors"),
            ("no weights", "model.safetensors"),
            ("version", "format_version 2 is unknown"),
            ("no config", "holds no config.json"),
        ],
    )
    def test_every_damage_is_one_line(
        self, models: Path, tmp_path: Path, damage: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "m"
        shutil.copytree(models / "packed", folder)
        weights, config = folder / "model.safetensors", folder / "config.json"
        if damage == "code":
            tensors = load_file(weights)
            tensors[f"{LAYER}.weight_indices"][3, 0] |= 7
            save_file(tensors, weights, {"format": "pt"})
        elif damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        elif damage == "no weights":
            weights.unlink()
        elif damage == "version":
            settings = json.loads(config.read_text(encoding="utf-8"))
            settings["quantization_config"]["format_version"] = 2
            config.write_text(json.dumps(settings), encoding="utf-8")
        else:
            config.unlink()
        fails(["inspect", str(folder)], message, capsys)
        fails(
            ["export", str(folder), str(tmp_path / "new")], "config.json" if damage == "no config" else message, capsys
        )

    @pytest.mark.parametrize("name", ["dense", "training", "none"])
    def test_not_packed(self, models: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        fails(["inspect", str(models / name)], f"{models / name} holds no ", capsys)


class TestPackAndExport:
    def test_a_packed_model_says_what_the_training_checkpoint_says(self, models: Path) -> None:
        assert translations(models / "packed", max_length=6) == translations(models / "training", max_length=6)

    def test_values(self, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["pack", str(models / "training"), str(tmp_path / "m"), "--values", "bf16"]) == 0
        assert "values         bf16" in capsys.readouterr().out
        assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
        assert main(["pack", str(tmp_path / "m"), str(tmp_path / "again"), "--values", "fp32"]) == 0

    @pytest.mark.parametrize("command", ["pack", "export"])
    def test_what_lies_beside_the_model_goes_along_as_it_is(self, models: Path, tmp_path: Path, command: str) -> None:
        shutil.copytree(models / "training", tmp_path / "from")
        beside = {
            "README.md": b"a card\n",
            "generation_config.json": b'{"num_beams": 3, "max_length": 6}',
            "source.spm": b"\x00\xff",
            "tokenizer.json": (models / "training/tokenizer.json").read_bytes(),
        }
        for name, content in {**beside, "optimizer.pt": b"", "trainer_state.json": b"{}"}.items():
            (tmp_path / "from" / name).write_bytes(content)
        assert main([command, str(tmp_path / "from"), str(tmp_path / "to")]) == 0
        assert {name: (tmp_path / "to" / name).read_bytes() for name in beside} == beside
        assert {file.name for file in (tmp_path / "to").iterdir()} == {
            *beside,
            "config.json",
            "model.safetensors",
            "tokenizer_config.json",
        }

    def test_export_and_pack_are_inverse(self, models: Path, tmp_path: Path) -> None:
        assert main(["export", str(models / "packed"), str(tmp_path / "dense")]) == 0
        config = json.loads((tmp_path / "dense/config.json").read_text(encoding="utf-8"))
        assert "quantization_config" not in config
        model = MarianMTModel.from_pretrained(tmp_path / "dense")
        assert count_violations(model.get_parameter(f"{LAYER}.weight"), NMPattern(2, 4)) == 0
        assert translations(tmp_path / "dense", max_length=6) == translations(models / "packed", max_length=6)
        assert main(["pack", str(tmp_path / "dense"), str(tmp_path / "packed"), "--pattern", "2:4"]) == 0
        again, packed = (load_file(folder / "packed/model.safetensors") for folder in (tmp_path, models))
        assert again.keys() == packed.keys()
        assert all(torch.equal(again[key], packed[key]) for key in packed)

    def test_export_masks_a_training_checkpoint(self, models: Path, tmp_path: Path) -> None:
        assert main(["export", str(models / "training"), str(tmp_path / "dense")]) == 0
        assert translations(tmp_path / "dense", max_length=6) == translations(models / "packed", max_length=6)

    def test_layers_that_are_not_masked_stay_dense(
        self, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["export", str(models / "packed"), str(tmp_path / "dense")]) == 0
        tensors = load_file(tmp_path / "dense/model.safetensors")
        tensors[f"{LAYER}.weight"][0, :4] = 1.0
        save_file(tensors, tmp_path / "dense/model.safetensors", {"format": "pt"})
        capsys.readouterr()
        assert main(["pack", str(tmp_path / "dense"), str(tmp_path / "packed"), "--pattern", "2:4"]) == 0
        captured = capsys.readouterr()
        assert captured.err == f"nmsparse: {LAYER} is not 2:4 sparse and stays dense\n"
        assert "sparse layers  31" in captured.out
        kept = load_file(tmp_path / "packed/model.safetensors")
        assert torch.equal(kept[f"{LAYER}.weight"], tensors[f"{LAYER}.weight"])
        assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "packed") is not None

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["pack", "dense", "new"], "says nothing of sparsity; if its weights are masked, give --pattern 2:4"),
            (["pack", "dense", "new", "--pattern", "2:4"], "no linear layer of the model is 2:4 sparse; train it"),
            (["pack", "dense", "new", "--pattern", "2/4"], "expected N:M such as '2:4', got '2/4'"),
            (["pack", "training", "new", "--pattern", "2:4"], "knows its own pattern; leave out --pattern"),
            (["pack", "training", "dense"], "is there already; give a new folder"),
            (["export", "packed", "dense"], "is there already; give a new folder"),
            (["export", "dense", "new"], "the model has no sparse layer"),
            (["pack", "none", "new"], "no folder"),
        ],
    )
    def test_refusals(self, models: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        command, source, target, *rest = argv
        fails([command, str(models / source), str(models / target), *rest], message, capsys)
        assert not (models / "new").exists()


class TestTranslate:
    @pytest.mark.parametrize("name", ["packed", "training", "dense"])
    @pytest.mark.parametrize("batch_size", ["1", "4"])
    def test_files(self, models: Path, tmp_path: Path, name: str, batch_size: str) -> None:
        (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in SENTENCES), encoding="utf-8")
        command = ["translate", "--model", str(models / name), "--batch-size", batch_size, "--max-length", "6"]
        files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
        assert main([*command, *files, "--beams", "2"]) == 0
        lines = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")
        assert lines == [*translations(models / name, max_length=6, num_beams=2), ""]

    @pytest.mark.parametrize("name", ["packed", "training", "dense"])
    def test_chunks_of_a_file_keep_the_order(
        self, models: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hf_nmsparse.cli._CHUNK", 4)
        (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in SENTENCES), encoding="utf-8")
        files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
        assert main(["translate", "--model", str(models / name), *files, "--max-length", "6"]) == 0
        lines = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")
        assert lines == [*translations(models / name, max_length=6), ""]

    @pytest.mark.parametrize("compute", ["dense", "reference"])
    def test_compute(self, models: Path, tmp_path: Path, compute: str, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in SENTENCES), encoding="utf-8")
        options = ["--input", str(tmp_path / "in.txt"), "--max-length", "6", "--compute", compute]
        capsys.readouterr()
        assert main(["translate", "--model", str(models / "packed"), *options]) == 0
        assert capsys.readouterr().out.split("\n") == [*translations(models / "packed", max_length=6), ""]
        fails(["translate", "--model", str(models / "training"), *options], "set_compute: ", capsys)

    def test_a_break_inside_a_translation_is_a_space(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = "Il dit\u00a0:\nnon\u2028\x0bet"
        monkeypatch.setattr(
            "hf_nmsparse.pipeline.translate", lambda model, tokenizer, texts, *_, **__: [said for _ in texts]
        )
        (tmp_path / "in.txt").write_text("A man\n", encoding="utf-8")
        capsys.readouterr()
        assert main(["translate", "--model", str(models / "packed"), "--input", str(tmp_path / "in.txt")]) == 0
        assert capsys.readouterr().out == "Il dit\u00a0: non  et\n"

    def test_standard_input_and_output(
        self, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # A line separator, a carriage return and a missing line feed at the end are no lines of their own.
        text = "A man\u2028sleeps\r\nDer \x0b Garten\n\nA man"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
        capsys.readouterr()
        assert main(["translate", "--model", str(models / "packed"), "--max-length", "4", "--threads", "1"]) == 0
        lines = capsys.readouterr().out.split("\n")
        assert len(lines) == 5
        assert lines[2] == lines[4] == ""

    def test_no_lines(self, models: Path, tmp_path: Path) -> None:
        (tmp_path / "in.txt").touch()
        files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
        assert main(["translate", "--model", str(models / "packed"), *files]) == 0
        assert (tmp_path / "out.txt").read_bytes() == b""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--input", "{tmp}/none.txt"], "no file {tmp}/none.txt"),
            (["--input", "{tmp}/in.txt", "--output", "{tmp}/in.txt"], "is an input; name another output"),
            (
                ["--input", "{tmp}/in.txt", "--output", "{tmp}/no/such/file"],
                "no folder {tmp}/no/such to write file into",
            ),
            (["--input", "{tmp}/in.txt", "--output", "{tmp}"], "{tmp} is a folder; name a file"),
            (["--input", "{tmp}/in.txt", "--model", "{tmp}/none"], "no folder {tmp}/none"),
            (["--input", "{tmp}/in.txt", "--tgt-lang", "de"], "leave out tgt_lang, got 'de'"),
            (["--input", "{tmp}/in.txt", "--model", "{tmp}"], "config.json"),
            (["--input", "{tmp}/in.txt", "--model", "{tmp}/bare"], "{tmp}/bare: no tokenizer could be loaded"),
            (["--input", "{tmp}/in.txt", "--max-length", "1"], "max_length"),
            (["--input", "{tmp}/in.txt", "--device", "abacus"], "--device abacus: "),
            (["--input", "{tmp}/latin1.txt"], "latin1.txt is not UTF-8 after line"),
        ],
    )
    def test_bad(
        self,
        models: Path,
        tmp_path: Path,
        options: list[str],
        message: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "in.txt").write_text("A man\n", encoding="utf-8")
        MarianMTModel.from_pretrained(models / "dense").save_pretrained(tmp_path / "bare")  # no tokenizer
        (tmp_path / "latin1.txt").write_bytes("schläft\n".encode("latin-1"))
        options = [option.format(tmp=tmp_path) for option in options]
        argv = ["translate", "--model", str(models / "packed"), *options]
        fails(argv, message.format(tmp=tmp_path), capsys)
        assert (tmp_path / "in.txt").read_text(encoding="utf-8") == "A man\n"

    def test_an_output_is_left_alone_when_the_model_fails(
        self, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(models / "packed", tmp_path / "m")
        (tmp_path / "m/model.safetensors").write_bytes(b"\x00" * 100)
        (tmp_path / "out.txt").write_text("precious", encoding="utf-8")
        (tmp_path / "in.txt").write_text("A man\n", encoding="utf-8")
        files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
        fails(["translate", "--model", str(tmp_path / "m"), *files], "model.safetensors", capsys)
        assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "precious"

    def test_a_stream_is_answered_batch_by_batch_and_may_break(self, models: Path) -> None:
        command = [sys.executable, "-m", "hf_nmsparse", "translate", "--model", str(models / "packed")]
        command += ["--batch-size", "2", "--max-length", "4", "--threads", "1"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8") as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdin.write("A man\nDer Garten\n")
            process.stdin.flush()
            # The answer comes while standard input is still open.
            assert [process.stdout.readline()[-1:] for _ in range(2)] == ["\n", "\n"]
            process.stdout.close()
            process.stdin.write("A man\nDer Garten\n")
            process.stdin.close()
            assert process.wait(timeout=60) == 1
            assert "Traceback" not in (errors := process.stderr.read()), errors
            assert "BrokenPipe" not in errors


class TestEvaluate:
    @pytest.fixture
    def corpus(self, tmp_path: Path) -> list[str]:
        (tmp_path / "src").write_text("".join(f"{line}\n" for line in SENTENCES), encoding="utf-8")
        (tmp_path / "ref").write_text("".join(f"{line or 'x'}\n" for line in SENTENCES), encoding="utf-8")
        return ["--source", str(tmp_path / "src"), "--reference", str(tmp_path / "ref"), "--max-length", "6"]

    def test_scores(self, models: Path, tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        references = [line or "x" for line in SENTENCES]
        baseline = tmp_path / "base"
        baseline.write_text("".join(f"{line}\n" for line in references), encoding="utf-8")
        capsys.readouterr()
        argv = ["evaluate", "--model", str(models / "packed"), *corpus, "--json", str(tmp_path / "out.json")]
        assert main([*argv, "--baseline", str(baseline), "--output", str(tmp_path / "hyp"), "--beams", "1"]) == 0
        hypotheses = translations(models / "packed", max_length=6)
        expected, comparison = score(hypotheses, references), compare(hypotheses, references, references)
        assert capsys.readouterr().out == f"{expected}\n{comparison}\n"
        assert (tmp_path / "hyp").read_text(encoding="utf-8") == "".join(f"{text}\n" for text in hypotheses)
        stored = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        assert stored["bleu"] == expected.bleu
        assert stored["signature"] == expected.signature
        assert stored["against_baseline"]["verdict"] == comparison.verdict
        assert stored["arguments"]["beams"] == 1
        assert stored["arguments"]["source"] == str(tmp_path / "src")
        assert stored["versions"]["sacrebleu"]

    def test_without_a_baseline(self, models: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert main(["evaluate", "--model", str(models / "packed"), *corpus, "--tokenize", "char"]) == 0
        text = capsys.readouterr().out
        assert "tok:char" in text
        assert "against" not in text

    @pytest.mark.parametrize("short", ["ref", "base"])
    def test_files_that_are_not_aligned(
        self, models: Path, tmp_path: Path, corpus: list[str], short: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("ref", "base"):
            (tmp_path / name).write_text("a\n" * (5 if name == short else 6), encoding="utf-8")
        argv = ["evaluate", "--model", str(models / "packed"), *corpus, "--baseline", str(tmp_path / "base")]
        message = f"{tmp_path / 'src'} has 6 lines and {tmp_path / short} has 5; they must be aligned"
        fails(argv, message, capsys)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--tokenize", "moses"], "tokenize 'moses' is unknown"),
            (["--baseline", "{tmp}/none"], "no file {tmp}/none"),
            (["--output", "{tmp}/ref"], "ref is an input; name another output"),
            (["--json", "{tmp}/none/out.json"], "no folder {tmp}/none to write out.json into"),
        ],
    )
    def test_a_mistake_shows_before_the_translation(
        self,
        tmp_path: Path,
        corpus: list[str],
        options: list[str],
        message: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        options = [option.format(tmp=tmp_path) for option in options]
        fails(["evaluate", "--model", "m", *corpus, *options], message.format(tmp=tmp_path), capsys)

    def test_an_empty_file(self, tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "src").write_text("", encoding="utf-8")
        (tmp_path / "ref").write_text("", encoding="utf-8")
        fails(["evaluate", "--model", "m", *corpus], "src is empty", capsys)


class TestPlot:
    def test_pictures(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = write_run(tmp_path / "run", 30.0, layers=True, method="sr-ste", pattern="2:4")
        assert main(["plot", str(run), "--output", str(tmp_path / "plots"), "--format", "svg"]) == 0
        files = [str(tmp_path / "plots" / name) for name in ("flips.svg", "layers-run.svg")]
        assert capsys.readouterr().out.splitlines() == files
        assert all(Path(file).is_file() for file in files)

    def test_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fails(["plot", str(tmp_path)], "holds no evaluation.json; give folders of finished runs of the recipe", capsys)
