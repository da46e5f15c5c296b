from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel
from transformers.utils import logging

from hf_nmsparse.calibration import Calibration
from hf_nmsparse.cli import main
from hf_nmsparse.commands import _copy_files_beside
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.devices import device_of
from hf_nmsparse.kernels import engine
from hf_nmsparse.kernels.order import WIDEST_INT8
from hf_nmsparse.line_files import _decoded
from hf_nmsparse.masks import count_violations
from hf_nmsparse.metrics import compare, score
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.pipeline import translate
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.saving import save_packed
from hf_nmsparse.sparse_model import finalize, sparsify
from hf_nmsparse.terminal import plain
from tests import tiny
from tests.test_plots import write_run
from tests.test_texts import FAMILIES
from tests.test_texts import folder as vocabularies  # noqa: F401  # a fixture

hf: Any = transformers  # whose classes take keywords that their signatures do not name

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


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "bert": lambda folder: hf.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}),
    "bart": lambda folder: hf.BartTokenizer(
        vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5}, merges=[]
    ),
    "byt5": lambda folder: hf.ByT5Tokenizer(),
    "pegasus": lambda folder: hf.PegasusTokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)], offset=0
    ),
    "prophetnet": lambda folder: hf.ProphetNetTokenizer(
        **written(folder, "vocab_file", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n[X_SEP]\na\nman\n")
    ),
    "bartpho": lambda folder: hf.BartphoTokenizer(
        str(folder / "sp.model"), **written(folder, "monolingual_vocab_file", "▁a 1\n▁man 1\n")
    ),
}


def written(folder: Path, argument: str, content: Any) -> dict[str, str]:
    """An argument of a tokenizer that names a file of this content."""
    file = folder / argument
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return {argument: str(file)}


class TestArguments:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "COMMAND"),
            (["quantize"], "invalid choice: 'quantize'"),
            (["prune", "a", "{tmp}/new", "--method", "random"], "invalid choice: 'random'"),
            (["prune", "a", "{tmp}/new"], "prune: --method sparsegpt needs a text; give --calibration"),
            (
                ["prune", "a", "{tmp}/new", "--method", "magnitude", "--calibration", "{tmp}/file"],
                "prune: --method magnitude reads no text; leave out --calibration",
            ),
            (["prune", "a", "{tmp}/new", "--calibration", "{tmp}/file", "--pattern", "4:2"], "N:M needs 1 <= N < M"),
            (["inspect"], "PATH"),
            (["translate"], "--model; see nmsparse translate --help"),
            (["translate", "--model", "m", "--beams", "0"], "--beams: needs a number of at least 1, got '0'"),
            (["translate", "--model", "m", "--batch-size", "x"], "--batch-size: needs a number of at least 1, got 'x'"),
            (["pack", "a", "b", "--values", "int4"], "invalid choice: 'int4'"),
            (["pack", "a", "b", "--embeddings", "int4"], "invalid choice: 'int4'"),
            (["pack", "a", "{tmp}/file"], "{tmp}/file is there already; give a new folder"),
            (["pack", "a", "{tmp}/file/new"], "Not a directory"),
            (["pack", "a", ""], "argument DST: is empty; name a path, as . for the current folder; see nmsparse pack"),
            (["prune", "a", "", "--method", "magnitude"], "argument DST: is empty; name a path"),
            (["export", "a", ""], "argument DST: is empty; name a path"),
            (["convert", "a", ""], "argument DST: is empty; name a path"),
            (["shortlist", "", "--corpus", "{tmp}/file"], "argument MODEL: is empty; name a path"),
            (["plot", "{tmp}", "--output", ""], "argument --output: is empty; name a path"),
            (["report", "{tmp}", "--output", ""], ". is a folder; name a file"),
            (["pack", "{tmp}/file", "{tmp}/new"], "no folder {tmp}/file"),
            (["export", "a/b/c", "{tmp}/new"], "no folder a/b/c"),
            (["convert", "{tmp}", "{tmp}/new"], "config.json"),
            (["inspect", "{tmp}/file"], "holds no config.json"),
            (["inspect", "p", "q"], "unrecognized arguments: q"),
            (["inspect", "9" * 5000], "File name too long"),
            (["translate", "--model", "m", "--compute", "fp8"], "invalid choice: 'fp8'"),
            (["translate", "--model", "m", "--head", "fp8"], "invalid choice: 'fp8'"),
            (["translate", "--model", "m", "--threads", "-1"], "--threads: needs a number of at least 1, got '-1'"),
            (["translate", "--model", "m", "--max-length", "1.5"], "--max-length: needs a number of at least 1"),
            (["translate", "--model", "m", "--input", ""], "is a folder; name a file"),
            (["translate", "--model", "m", "--input", "{tmp}/file", "--output", ""], ". is a folder; name a file"),
            (
                ["translate", "--model", "m", "--input", "{tmp}/file", "--output", "{tmp}/file/x"],
                "no folder {tmp}/file",
            ),
            (["evaluate", "--model", "m", "--source", "{tmp}/file"], "--reference"),
            (["evaluate", "--model", "m", "--source", "{tmp}", "--reference", "{tmp}/file"], "{tmp} is a folder"),
            (["plot", "{tmp}/file"], "{tmp}/file holds no evaluation.json"),
            (["plot", "{tmp}", "--format", "pdf"], "invalid choice: 'pdf'"),
            (["doctor", "{tmp}"], "{tmp} holds no config.json; name the folder of a model"),
        ],
    )
    def test_bad(self, argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_text("A man\n", encoding="utf-8")
        fails([part.format(tmp=tmp_path) for part in argv], message.format(tmp=tmp_path), capsys)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_what_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        monkeypatch.setattr("os.access", lambda path, mode: False)
        argv = ["translate", "--model", "m", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
        fails(argv, "out cannot be written: permission denied", capsys)

    def test_doctor_of_models(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        known, unknown = tmp_path / "known", tmp_path / "unknown"
        tiny.marian().save_pretrained(known)
        unknown.mkdir()
        (unknown / "config.json").write_text('{"model_type": "led"}')
        steers = tmp_path / "a\x1b[2Jb"  # what a terminal would follow
        steers.mkdir()
        shutil.copy(unknown / "config.json", steers)
        main(["doctor", str(known), str(unknown), str(steers)])
        out = capsys.readouterr().out
        assert "\x1b" not in out
        lines = out.splitlines()[-3:-1]
        engine_is_here = engine.why_not() is None
        assert lines[0].startswith(f"{known}: " + ("the engine translates" if engine_is_here else "transformers"))
        assert lines[1].startswith(f"{unknown}: transformers translates: ")
        assert not engine_is_here or "model_type 'led' is none of" in lines[1]
        (unknown / "config.json").write_text('{"model_type": "gpt2"}')
        main(["doctor", str(unknown)])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == f"{unknown}: nothing translates: model_type 'gpt2' is no encoder-decoder"

    @pytest.mark.parametrize(
        ("pattern", "values", "said"),
        [
            ("2:4", "bf16", "the engine translates"),
            ("1:2", "bf16", "the engine translates"),
            ("4:8", "int8", "the engine translates"),
            ("4:8", "bf16", "the engine translates; 4:8 in bf16 has no kernel and computes dense"),
            ("3:4", "int8", "the engine translates; 3:4 in int8 has no kernel and computes dense"),
            ("2:4", None, "transformers translates: it is a training checkpoint; write it with nmsparse pack"),
        ],
    )
    @pytest.mark.skipif(engine.why_not() is not None, reason="no engine on this machine")
    def test_doctor_of_sparse_models(
        self, tmp_path: Path, pattern: str, values: str | None, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = tiny.marian()
        sparsify(model, NMSparseConfig(pattern))
        if values is None:
            model.save_pretrained(tmp_path)
        else:
            save_packed(model, tmp_path, values)
        main(["doctor", str(tmp_path)])
        assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}: {said}"
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["pattern"] = "4:2"
        (tmp_path / "config.json").write_text(json.dumps(config))
        main(["doctor", str(tmp_path)])
        assert (
            f"{tmp_path}: nothing translates: config.json: pattern: N:M needs"
            in capsys.readouterr().out.splitlines()[-1]
        )

    @pytest.mark.skipif(engine.why_not() is not None, reason="no engine on this machine")
    def test_doctor_of_a_layer_too_wide_for_int8(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = tiny.marian(encoder_layers=1, encoder_ffn_dim=WIDEST_INT8 + 4)
        sparsify(model, NMSparseConfig("2:4"))
        save_packed(model, tmp_path, "int8")
        main(["doctor", str(tmp_path)])
        assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}: the engine translates"

    @pytest.mark.parametrize("command", ["pack", "export", "prune"])
    def test_a_model_that_does_not_translate(
        self, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)).save_pretrained(tmp_path / "gpt")
        options = ["--method", "magnitude"] if command == "prune" else []
        argv = [command, str(tmp_path / "gpt"), str(tmp_path / "new"), *options]
        fails(argv, "gpt is a model of 'gpt2', which does not translate; name an encoder-decoder", capsys)

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as raised:
            main(["--help"])
        assert raised.value.code == 0
        text = capsys.readouterr().out
        assert all(command in text for command in ("inspect", "pack", "export", "translate", "evaluate"))


@pytest.fixture(scope="module")
def shell(models: Path) -> Callable[[str], subprocess.CompletedProcess[bytes]]:
    """Runs a command in bash, in a fresh process; ``nmsparse`` stands for this one."""

    def run(command: str) -> subprocess.CompletedProcess[bytes]:
        own = f"{shlex.quote(sys.executable)} -m hf_nmsparse"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", "-c", command.replace("nmsparse", own, 1)], capture_output=True, cwd=models, env=environment
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done

    return run


class TestStandardStreams:
    """What the shell closes with ``>&-`` is None in Python."""

    def test_all_of_them_closed(self, models: Path, tmp_path: Path, shell: Any) -> None:
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        files = f"--input {tmp_path}/in --output {tmp_path}/out"
        done = shell(f"nmsparse translate --model packed --max-length 6 {files} <&- >&- 2>&-")
        assert done.returncode == 0
        # The file took the number of no standard stream: nothing else was written to it.
        [expected, *_] = translations(models / "packed", max_length=6)[1:]
        assert (tmp_path / "out").read_text(encoding="utf-8") == f"{expected}\n"

    def test_an_output_that_takes_nothing(self, shell: Any) -> None:
        done = shell("nmsparse inspect packed >/dev/full")
        assert done.returncode == 2
        assert done.stderr == b"nmsparse: [Errno 28] standard output could not be written: No space left on device\n"

    @pytest.mark.parametrize(
        ("stream", "argv", "message"),
        [
            ("stdout", ["inspect", "packed"], "standard output is closed; open it or send it to /dev/null"),
            ("stdout", ["translate", "--model", "packed"], "standard output is closed; open it or give --output FILE"),
            ("stdin", ["translate", "--model", "packed"], "standard input is closed; open it or name a file"),
            (
                "stdin",
                ["evaluate", "--model", "packed", "--source", "-", "--reference", "-"],
                "standard input is closed",
            ),
        ],
    )
    def test_closed(
        self,
        stream: str,
        argv: list[str],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A man\n")))
        monkeypatch.setattr(sys, stream, None)
        fails(argv, message, capsys)

    def test_without_standard_error_nothing_goes_elsewhere(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stderr", None)
        assert main(["prune"]) == 2
        assert capsys.readouterr().out == ""


HOSTILE = "\nforged\x1b[31m\x9b\x07\r\x08\u202e\u2028\ud800"


def is_plain(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


class TestNothingSteersTheTerminal:
    @given(st.text(alphabet=st.characters(exclude_categories=[])))
    def test_any_text(self, text: str) -> None:
        assert is_plain(plain(text))
        assert plain(text).count("\n") == text.count("\n")

    def test_ordinary_text_is_left_as_it_is(self) -> None:
        assert plain("größer: 日本語\n") == "größer: 日本語\n"

    @pytest.mark.parametrize("key", ["producer", "targets", "ignored", "pattern", "values", "format_version"])
    def test_what_config_json_carries(
        self, models: Path, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(models / "packed", tmp_path / "m")
        config = json.loads((tmp_path / "m/config.json").read_text(encoding="utf-8"))
        config["quantization_config"][key] = [HOSTILE] if key in ("targets", "ignored") else HOSTILE
        (tmp_path / "m/config.json").write_text(json.dumps(config), encoding="utf-8")
        capsys.readouterr()
        status = main(["inspect", str(tmp_path / "m"), "--layers"])
        captured = capsys.readouterr()
        assert "\\x1b[31m" in (captured.out if status == 0 else captured.err)
        assert "\nforged" not in captured.out + captured.err
        assert is_plain(captured.out)
        assert is_plain(captured.err)

    def test_keys_of_a_checkpoint(self, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(models / "dense", tmp_path / "m")
        tensors = load_file(tmp_path / "m/model.safetensors") | {"\x1b[31m.weight": torch.zeros(2)}
        save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        main(["translate", "--model", str(tmp_path / "m"), "--input", str(tmp_path / "in"), "--max-length", "3"])
        captured = capfd.readouterr()
        assert "\x1b" not in captured.err + captured.out

    @pytest.mark.parametrize(
        "argv",
        [
            [HOSTILE],
            ["inspect", HOSTILE],
            ["pack", HOSTILE, "new"],
            ["plot", HOSTILE],
            ["report", HOSTILE],
            ["translate", "--model", "m", "--input", HOSTILE],
            ["translate", "--model", "m", "--beams", HOSTILE],
            ["translate", "--model", "m", "--device", HOSTILE],
            ["evaluate", "--model", "m", "--source", HOSTILE, "--reference", "r"],
        ],
    )
    def test_arguments(self, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("nmsparse: ")
        assert error.count("\n") == 1
        assert is_plain(error)


class TestReading:
    @given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\n\0\ufeff"))))
    def test_only_a_line_feed_ends_a_line(self, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        expected = [line.removesuffix("\r") for line in lines]
        assert list(_decoded(io.BytesIO(text.encode()), "f")) == expected
        assert list(_decoded(io.BytesIO(text.encode("utf-8-sig")), "f")) == expected

    @pytest.mark.parametrize(
        ("content", "lines"),
        [
            (b"\xef\xbb\xbfa\nb", ["a", "b"]),
            (b"\xef\xbb\xbf", []),
            (b"a\n\xef\xbb\xbfb\n", ["a", "\ufeffb"]),
            (b"a\rb\r\nc\r\r\n", ["a\rb", "c\r"]),
            (b"a\n\nb\r", ["a", "", "b\r"]),
            ("a\u2028b\x85c\x0bd\x0ce\x1cf\n".encode(), ["a\u2028b\x85c\x0bd\x0ce\x1cf"]),
        ],
    )
    def test_lines(self, content: bytes, lines: list[str]) -> None:
        assert list(_decoded(io.BytesIO(content), "f")) == lines

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("A man\n".encode("utf-16"), "f is UTF-16; make it UTF-8, such as with iconv"),
            (b"\xfe\xff\x00A", "f is UTF-16; make it UTF-8, such as with iconv"),
            ("A man\n".encode("utf-32"), "f is UTF-32; make it UTF-8, such as with iconv"),
            ("A man\n".encode("utf-16-le"), "f is no text: line 1 holds a NUL; make it UTF-8"),
            (b"A man\nschl\xe4ft\n", "f is not UTF-8 after line 1; make it UTF-8, such as with iconv"),
        ],
    )
    def test_other_encodings(self, content: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            list(_decoded(io.BytesIO(content), "f"))

    def test_a_line_that_does_not_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hf_nmsparse.line_files._LONGEST_LINE", 1000)
        assert list(_decoded(io.BytesIO(b"a\n" + b"b" * 999 + b"\n" + b"c" * 1000), "f")) == [
            "a",
            "b" * 999,
            "c" * 1000,
        ]
        with pytest.raises(ValueError, match=r"^f is no text of lines: line 2 has more than 1,000 bytes$"):
            list(_decoded(io.BytesIO(b"a\n" + b"b" * 1001), "f"))

    @pytest.mark.parametrize(
        ("command", "pipe"),
        [
            ("translate", "--input"),
            ("evaluate", "--source"),
            ("evaluate", "--reference"),
            ("evaluate", "--baseline"),
        ],
    )
    def test_pipes_are_files(self, models: Path, tmp_path: Path, command: str, pipe: str) -> None:
        argv = [command, "--model", str(models / "packed"), "--max-length", "6"]
        for argument in ["--input"] if command == "translate" else ["--source", "--reference", "--baseline"]:
            (tmp_path / argument).write_text("A man\nDer Garten\n", encoding="utf-8")
            argv += [argument, str(tmp_path / argument)]
        assert main([*argv, "--output", str(tmp_path / "expected")]) == 0
        (tmp_path / pipe).unlink()
        os.mkfifo(tmp_path / pipe)
        text = ("\ufeffA man\nDer Garten\n", "utf-8")
        writer = threading.Thread(target=(tmp_path / pipe).write_text, args=text)
        writer.start()
        assert main([*argv, "--output", str(tmp_path / "got")]) == 0
        writer.join()
        assert (tmp_path / "got").read_bytes() == (tmp_path / "expected").read_bytes() != b""


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
            ("version", "format_version 3 is unknown"),
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
            settings["quantization_config"]["format_version"] = 3
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

    def test_a_full_disk_leaves_nothing_behind(self, models: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        script = f"""
import resource, sys
from hf_nmsparse.calibration import Calibration
from hf_nmsparse.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for command in ("pack", "export"):
    for target in ("new/of/it", "empty"):
        assert main([command, {str(models / "training")!r}, target]) == 2
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=tmp_path, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == 4
        assert all("could not be written: " in line and "File too large" in line for line in lines)
        assert all(f"{target} could" in line for line, target in zip(lines, ["new/of/it", "empty"] * 2, strict=True))
        assert [path.name for path in tmp_path.rglob("*")] == ["empty"]

    @pytest.mark.parametrize("command", ["pack", "export"])
    def test_what_fails_leaves_what_others_have_put_there_meanwhile(
        self,
        models: Path,
        tmp_path: Path,
        command: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def full(*_: Any) -> None:
            for folder in (tmp_path / "a", tmp_path / "a/b"):
                (folder / "config.json").write_text("of another", encoding="utf-8")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("shutil.copyfile", full)
        fails([command, str(models / "training"), str(tmp_path / "a/b")], "No space left on device", capsys)
        assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
            "a",
            "a/b",
            "a/config.json",
            "a/b/config.json",
        }

    @pytest.mark.parametrize("command", ["pack", "export", "convert"])
    def test_a_folder_by_way_of_one_that_is_not_there(
        self, models: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "there/config.json").write_text("precious", encoding="utf-8")
        target = f"{tmp_path}/none/../there"
        fails([command, str(models / "training"), target], f"{target} is there already; give a new folder", capsys)
        assert (tmp_path / "there/config.json").read_text(encoding="utf-8") == "precious"
        if command == "pack":
            assert main([command, str(models / "training"), f"{tmp_path}/none/../new"]) == 0
            assert {file.name for file in tmp_path.iterdir()} == {"there", "new"}

    @pytest.mark.parametrize("command", ["pack", "export"])
    def test_what_fails_late_leaves_nothing_behind(
        self,
        models: Path,
        tmp_path: Path,
        command: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("shutil.copyfile", full)
        fails([command, str(models / "training"), str(tmp_path / "a/b")], "No space left on device", capsys)
        assert not list(tmp_path.iterdir())

    @pytest.mark.usefixtures("vocabularies")
    @pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses:UserWarning")
    @pytest.mark.parametrize("name", [*FAMILIES, *TOKENIZERS])
    def test_every_tokenizer_opens_in_the_copy(self, tmp_path: Path, vocabularies: Path, name: str) -> None:  # noqa: F811
        tokenizer = TOKENIZERS[name](vocabularies) if name in TOKENIZERS else FAMILIES[name].tokenizer(vocabularies)
        source, target = tmp_path / "source", tmp_path / "target"
        tokenizer.save_pretrained(source)
        target.mkdir()
        for unwanted in ("optimizer.pt", "trainer_state.json"):
            (source / unwanted).touch()
        _copy_files_beside(str(source), target)
        files = {folder: {file.name: file.read_bytes() for file in folder.iterdir()} for folder in (source, target)}
        assert files[source].keys() - files[target].keys() == {"optimizer.pt", "trainer_state.json"}
        assert files[source].items() >= files[target].items()
        opened = type(tokenizer).from_pretrained(target)
        assert opened("a man sleeps")["input_ids"] == tokenizer("a man sleeps")["input_ids"]

    def test_a_tokenizer_that_does_not_load_here(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        names = {*hf.FSMTTokenizer.vocab_files_names.values(), "tokenizer_config.json"}
        for name in names:
            (tmp_path / name).write_text('{"tokenizer_class": "MissingTokenizer"}', encoding="utf-8")
        (tmp_path / "to").mkdir()
        capsys.readouterr()
        _copy_files_beside(str(tmp_path), tmp_path / "to")
        assert {file.name for file in (tmp_path / "to").iterdir()} == names
        error = capsys.readouterr().err
        assert "no tokenizer could be loaded" in error
        assert error.endswith("; its files of unusual names stay behind\n")

    def test_a_chat_template_and_a_processor_go_along(self, models: Path, tmp_path: Path) -> None:
        names = {"chat_template.jinja", "processor_config.json", "preprocessor_config.json"}
        for name in names:
            (tmp_path / name).write_text("{}", encoding="utf-8")
        (tmp_path / "to").mkdir()
        _copy_files_beside(str(tmp_path), tmp_path / "to")
        assert {file.name for file in (tmp_path / "to").iterdir()} == names

    def test_code_of_a_folder_is_neither_run_nor_asked_about(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
        shutil.copytree(models / "training", tmp_path / "m")
        (tmp_path / "m/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
        for file, change in (
            ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}),
            ("config.json", {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}),
        ):
            settings = json.loads((tmp_path / "m" / file).read_text(encoding="utf-8"))
            (tmp_path / "m" / file).write_text(json.dumps(settings | change), encoding="utf-8")
            status = main(["export", str(tmp_path / "m"), str(tmp_path / file)])
        assert status == 2
        assert "contains custom code" in capsys.readouterr().err
        assert not (tmp_path / "ran").exists()

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


class TestExportForOthers:
    """``--for``; what the files hold is tested with the modules that write them."""

    @pytest.fixture
    def sentences(self, tmp_path: Path) -> str:
        (tmp_path / "sentences.txt").write_text("The garden is big.\n\nA man sleeps.\n", encoding="utf-8")
        return str(tmp_path / "sentences.txt")

    @pytest.mark.parametrize("name", ["packed", "training", "dense"])
    def test_ctranslate2(
        self, models: Path, tmp_path: Path, sentences: str, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The models' padding is first, as in older models of the recipe."""
        ctranslate2 = pytest.importorskip("ctranslate2")
        target = tmp_path / "new"
        command = ["export", str(models / name), str(target), "--for", "ctranslate2", "--sentences", sentences]
        assert main([*command, "--quantization", "int8"]) == 0
        said = capsys.readouterr().out.splitlines()
        told = "in fp32 it translates 2 of 2 sentences greedily and with 4 beams as transformers does"
        assert said[0] == f"{target}: for ctranslate2; {told}"
        assert said[1].startswith("what is written is in int8, and translates so: ")
        assert {"model.bin", "config.json", "tokenizer.json"} <= {file.name for file in target.iterdir()}
        assert not (target / "model.safetensors").exists()
        tokenizer: Any = AutoTokenizer.from_pretrained(target)
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("The garden is big.")["input_ids"])
        translator = ctranslate2.Translator(str(target), intra_threads=1)
        [found] = translator.translate_batch([tokens], max_decoding_length=8)
        assert tokenizer.convert_tokens_to_string(found.hypotheses[0])

    def test_onnx(
        self,
        models: Path,
        tmp_path: Path,
        sentences: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def export_onnx(model: Any, folder: Path, sources: list[list[int]], quantization: str | None) -> int:
            assert (type(model), len(sources), quantization) == (MarianMTModel, 2, None)
            (folder / "config.json").write_text("{}", encoding="utf-8")
            return 2

        monkeypatch.setattr("hf_nmsparse.onnx_export.export_onnx", export_onnx)
        monkeypatch.setattr("hf_nmsparse.commands.find_spec", lambda name: name)
        target = tmp_path / "new"
        assert main(["export", str(models / "packed"), str(target), "--for", "onnx", "--sentences", sentences]) == 0
        told = "in fp32 it translates 2 of 2 sentences greedily as transformers does"
        assert capsys.readouterr().out == f"{target}: for onnx; {told}\n"
        assert {"config.json", "tokenizer.json"} <= {file.name for file in target.iterdir()}

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["packed", "dense", "--for", "ctranslate2"], "is there already; give a new folder"),
            (["packed", "new", "--for", "ctranslate2", "--quantization", "int3"], "quantization is one of 'int8'"),
            (["packed", "new", "--for", "onnx", "--quantization", "float16"], "quantization is one of 'int8', got"),
            (["packed", "new", "--quantization", "int8"], "--quantization and --sentences go with --for"),
            (["packed", "new", "--for", "onnx", "--sentences", "{tmp}/empty"], "holds no sentence; give some"),
            (["packed", "new", "--for", "onnx", "--sentences", "{tmp}/none"], "none"),
            (["packed", "new", "--for", "tflite"], "invalid choice: 'tflite'"),
            (["none", "new", "--for", "ctranslate2"], "no folder"),
            (["bart", "new", "--for", "ctranslate2"], "writes Marian models, which the recipe trains, and this one is"),
            (["broken", "new", "--for", "ctranslate2"], "cannot be loaded"),
        ],
    )
    def test_refusals(
        self, models: Path, tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for needed in ("ctranslate2", "onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(needed)
        (tmp_path / "empty").write_text("\n", encoding="utf-8")
        if argv[0] in ("bart", "broken"):
            folder = models / argv[0]
            if argv[0] == "bart":
                hf.BartForConditionalGeneration(hf.BartConfig(**tiny.bart(300, 16, 1))).save_pretrained(folder)
                tiny.tokenizer().save_pretrained(folder)
            else:
                shutil.copytree(models / "dense", folder, dirs_exist_ok=True)
                weights = (folder / "model.safetensors").read_bytes()
                (folder / "model.safetensors").write_bytes(weights[:-100])
        source, target, *rest = (part.replace("{tmp}", str(tmp_path)) for part in argv)
        fails(["export", str(models / source), str(models / target), *rest], message, capsys)
        assert not (models / "new").exists()

    @pytest.mark.parametrize(
        ("tool", "missing"), [("ctranslate2", "ctranslate2"), ("onnx", "onnx, onnxruntime, onnxscript")]
    )
    def test_what_is_not_installed_is_named(
        self,
        models: Path,
        tmp_path: Path,
        tool: str,
        missing: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("hf_nmsparse.commands.find_spec", lambda name: None)
        told = f"export: --for {tool} needs {missing}: pip install 'hf-nmsparse[export]'"
        fails(["export", str(models / "packed"), str(tmp_path / "new"), "--for", tool], told, capsys)
        assert not (tmp_path / "new").exists()


class TestPrune:
    @pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
    def test_from_dense_to_packed(
        self, models: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The files hold what `sparsify` makes of the same pairs; tokenizer and settings go along."""
        for name, lines in (("source", ["The garden is big.", "A man"]), ("target", ["Der Garten ist groß.", "Mann"])):
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        text = [] if method == "magnitude" else ["--calibration", str(tmp_path / "source"), str(tmp_path / "target")]
        argv = ["prune", str(models / "dense"), str(tmp_path / "packed"), "--method", method, *text]
        assert main([*argv, "--pattern", "4:8", "--permute"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[: len(out) - 9] == ([] if method == "magnitude" else ["calibrated on 2 of 2 sentences"])
        assert out[-9:-7] == ["pattern        4:8, 4 of every 8 weights are kept", "values         fp32"]
        model, tokenizer = MarianMTModel.from_pretrained(models / "dense"), tiny.tokenizer()
        calibration = None
        if method != "magnitude":
            texts = [(tmp_path / name).read_text(encoding="utf-8").splitlines() for name in ("source", "target")]
            rows = zip(*(tokenizer(lines)["input_ids"] for lines in texts), strict=True)
            pairs = [{"input_ids": source, "labels": target} for source, target in rows]
            calibration = Calibration.of_pairs(model, pairs, method=method)
        sparsify(model, NMSparseConfig("4:8"), calibration=calibration, permute=True)
        finalize(model)
        packed = AutoModelForSeq2SeqLM.from_pretrained(
            tmp_path / "packed", quantization_config=NMSparseQuantizationConfig(compute="dense")
        )
        for name, tensor in packed.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
        assert translations(tmp_path / "packed")[2] == ""

    @pytest.mark.parametrize("values", ["bf16", "int8"])
    def test_the_model_translates_the_text_itself(
        self, models: Path, tmp_path: Path, values: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "source").write_text("\n".join([*SENTENCES, "x " * 200]), encoding="utf-8")
        shutil.copytree(models / "dense", tmp_path / "dense")
        settings = json.loads((tmp_path / "dense/generation_config.json").read_text())
        (tmp_path / "dense/generation_config.json").write_text(json.dumps(settings | {"max_length": 20}))
        argv = ["prune", str(tmp_path / "dense"), str(tmp_path / "packed"), "--calibration", str(tmp_path / "source")]
        assert main([*argv, "--values", values, "--lines", "6"]) == 0
        assert "calibrated on 5 of 6 sentences" in capsys.readouterr().out  # and the blank one is none
        assert check_folder(tmp_path / "packed").values == values

    @pytest.mark.parametrize(
        ("source", "argv", "message"),
        [
            ("packed", ["--method", "magnitude"], "packed is sparse already; give the dense model"),
            ("training", ["--method", "magnitude"], "training is sparse already; give the dense model"),
            ("dense", ["--calibration", "{tmp}/none"], "no file {tmp}/none"),
            ("dense", ["--calibration", "{tmp}/text", "{tmp}/text", "{tmp}/text"], "got 3 files"),
            ("dense", ["--calibration", "{tmp}/text", "{tmp}/short"], "are not aligned"),
            ("dense", ["--calibration", "{tmp}/blank"], "calibration: no pair of 1 to 62 tokens a side"),
            ("dense", ["--calibration", "{tmp}/text", "--src-lang", "en"], "leave out src_lang, got 'en'"),
        ],
    )
    def test_refusals(
        self, models: Path, tmp_path: Path, source: str, argv: list[str], message: str, capsys: Any
    ) -> None:
        for name, text in (("text", "A man\nA man\n"), ("short", "Mann\n"), ("blank", "\n\n")):
            (tmp_path / name).write_text(text, encoding="utf-8")
        given = [part.format(tmp=tmp_path) for part in argv]
        fails(["prune", str(models / source), str(tmp_path / "new"), *given], message.format(tmp=tmp_path), capsys)
        assert not (tmp_path / "new").exists()


class TestTranslate:
    @pytest.mark.parametrize("name", ["packed", "training", "dense"])
    @pytest.mark.parametrize("batch_size", ["1", "4"])
    def test_files(self, models: Path, tmp_path: Path, name: str, batch_size: str) -> None:
        (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in SENTENCES), encoding="utf-8")
        command = ["translate", "--model", str(models / name), "--batch-size", batch_size, "--max-length", "6"]
        files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
        assert main([*command, *files, "--beams", "2"]) == 0
        lines = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")
        assert lines == [*translations(models / name, split=True, max_length=6, num_beams=2), ""]

    def test_a_line_of_several_sentences_is_translated_sentence_by_sentence(
        self, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in.txt").write_text("The dog runs. A man sleeps.\n", encoding="utf-8")
        argv = [
            "translate",
            "--model",
            str(models / "packed"),
            "--input",
            str(tmp_path / "in.txt"),
            "--max-length",
            "6",
        ]
        model, tokenizer = (kind.from_pretrained(models / "packed") for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
        for flags, sentences in (
            ([], ["The dog runs.", "A man sleeps."]),
            (["--no-split"], ["The dog runs. A man sleeps."]),
        ):
            assert main([*argv, *flags]) == 0
            found = translate(model, tokenizer, sentences, max_length=6)
            assert capsys.readouterr().out == " ".join(" ".join(found).splitlines()) + "\n"

    @pytest.mark.parametrize("name", ["packed", "training", "dense"])
    def test_chunks_of_a_file_keep_the_order(
        self, models: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hf_nmsparse.commands._CHUNK", 4)
        (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in SENTENCES), encoding="utf-8")
        files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
        assert main(["translate", "--model", str(models / name), *files, "--max-length", "6"]) == 0
        lines = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")
        assert lines == [*translations(models / name, split=True, max_length=6), ""]

    @pytest.mark.skipif(engine.why_not() is not None, reason="there is no native engine")
    @pytest.mark.parametrize(("name", "content"), [("in.txt", "A dog runs.\n"), ("in.html", "<p>A <b>dog</b> runs.")])
    def test_a_glossary(
        self, models: Path, tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / name).write_text(content, encoding="utf-8")
        (tmp_path / "terms.tsv").write_text("dog\tman|men\n", encoding="utf-8")
        given = ["translate", "--model", str(models / "packed"), "--input", str(tmp_path / name), "--max-length", "20"]
        terms = ["--glossary", str(tmp_path / "terms.tsv")]
        assert main([*given, *terms]) == 0
        assert re.search(r"\bman\b", capsys.readouterr().out)
        fails([*given, "--glossary", str(tmp_path / "no.tsv")], "glossary: ", capsys)
        fails([*given, *terms, "--compute", "dense"], "the engine does not run it, which --glossary needs", capsys)

    @pytest.mark.parametrize("compute", ["dense", "reference"])
    def test_compute(self, models: Path, tmp_path: Path, compute: str, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in SENTENCES), encoding="utf-8")
        options = ["--input", str(tmp_path / "in.txt"), "--max-length", "6", "--compute", compute]
        capsys.readouterr()
        assert main(["translate", "--model", str(models / "packed"), *options]) == 0
        assert capsys.readouterr().out.split("\n") == [*translations(models / "packed", split=True, max_length=6), ""]
        fails(["translate", "--model", str(models / "training"), *options], "set_compute: ", capsys)

    @pytest.mark.skipif(engine.why_not() is not None, reason="there is no native engine")
    @pytest.mark.parametrize("chosen", [True, False])
    def test_it_runs_on_the_engine_and_needs_no_torch(self, models: Path, tmp_path: Path, chosen: bool) -> None:
        (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in SENTENCES), encoding="utf-8")
        options = ["--input", str(tmp_path / "in.txt"), "--max-length", "6", "--beams", "2", "--device", "cpu"]
        argv = ["translate", "--model", str(models / "packed"), *options]
        code = f"import sys; from hf_nmsparse.cli import main; main({argv!r}); print('torch' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"HF_NMSPARSE_ENGINE": str(int(chosen)), "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            check=True,
            encoding="utf-8",
        )
        expected = translations(models / "packed", split=True, max_length=6, num_beams=2)
        assert done.stdout.split("\n") == [*expected, str(not chosen), ""]

    def test_a_break_inside_a_translation_is_a_space(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("HF_NMSPARSE_ENGINE", "0")
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
            (["--input", "{tmp}/in.txt", "--max-length", "200"], "max_length 200 is beyond the 64 positions"),
            (["--input", "{tmp}"], "{tmp} is a folder; name a file"),
            (["--input", "{tmp}/utf16.txt"], "utf16.txt is UTF-16; make it UTF-8"),
            (["--input", "{tmp}/in.txt", "--threads", "9" * 20], "--threads: needs a number of at most 1024, got 9999"),
            (["--input", "{tmp}/in.txt", "--threads", "1025"], "--threads: needs a number of at most 1024, got 1025"),
            (["--input", "{tmp}/in.txt", "--beams", "9" * 5000], "--beams: needs a number of at most 2147483647"),
            (["--input", "{tmp}/in.txt", "--batch-size", str(2**31)], "--batch-size: needs a number of at most 2147"),
            (["--input", "{tmp}/in.txt", "--max-length", str(2**63)], "--max-length: needs a number of at most 2147"),
            (["--input", "{tmp}/in.txt", "--model", "{tmp}/in.txt"], "no folder {tmp}/in.txt"),
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
        (tmp_path / "utf16.txt").write_text("A man\n", encoding="utf-16")
        (tmp_path / "latin1.txt").write_bytes("schläft\n".encode("latin-1"))
        options = [option.format(tmp=tmp_path) for option in options]
        argv = ["translate", "--model", str(models / "packed"), *options]
        fails(argv, message.format(tmp=tmp_path), capsys)
        assert (tmp_path / "in.txt").read_text(encoding="utf-8") == "A man\n"

    @pytest.mark.parametrize(
        "kind", [TypeError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError, NotImplementedError]
    )
    def test_whatever_generate_raises_is_one_line(
        self,
        models: Path,
        tmp_path: Path,
        kind: type[Exception],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise kind("some\nreason")

        monkeypatch.setenv("HF_NMSPARSE_ENGINE", "0")
        monkeypatch.setattr(MarianMTModel, "generate", fail)
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        argv = ["translate", "--model", str(models / "dense"), "--input", str(tmp_path / "in")]
        fails([*argv, "--output", str(tmp_path / "out")], f"dense cannot translate: {kind.__name__}: ", capsys)
        assert not (tmp_path / "out").exists()

    def test_a_long_error_is_cut(self, capsys: pytest.CaptureFixture[str]) -> None:
        fails(["inspect", "x" * 2000], "xxx ...", capsys)

    @pytest.mark.parametrize("command", ["translate", "evaluate"])
    def test_an_output_is_whole_or_as_it_was(
        self,
        models: Path,
        tmp_path: Path,
        command: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        out = tmp_path / "out"
        out.write_text("precious", encoding="utf-8")
        out.chmod(0o600)
        (tmp_path / "link").symlink_to("out")
        source = ["--input", str(tmp_path / "in")]
        if command == "evaluate":
            source = ["--source", str(tmp_path / "in"), "--reference", str(tmp_path / "in")]
        argv = [command, "--model", str(models / "packed"), "--max-length", "4", *source]
        outputs = ["--output"] if command == "translate" else ["--output", "--json"]
        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", full)
            for output in outputs:
                fails([*argv, output, str(tmp_path / "link")], f"{out} could not be written: No space left", capsys)
                assert out.read_text(encoding="utf-8") == "precious"
        assert main([*argv, outputs[-1], str(tmp_path / "link")]) == 0
        assert out.read_text(encoding="utf-8") != "precious"
        assert out.stat().st_mode & 0o777 == 0o600
        assert {file.name for file in tmp_path.iterdir()} == {"in", "out", "link"}

    def test_a_pipe_is_written_to(self, models: Path, tmp_path: Path) -> None:
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        os.mkfifo(tmp_path / "pipe")
        argv = ["translate", "--model", str(models / "packed"), "--max-length", "4", "--input", str(tmp_path / "in")]
        got: list[str] = []
        reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text(encoding="utf-8")))
        reader.start()
        assert main([*argv, "--output", str(tmp_path / "pipe")]) == 0
        reader.join()
        assert got == [f"{translations(models / 'packed', max_length=4)[1]}\n"]

    def test_a_link_to_standard_output_is_written_to(self, models: Path, tmp_path: Path, shell: Any) -> None:
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        (tmp_path / "link").symlink_to("/dev/stdout")
        command = f"nmsparse translate --model packed --max-length 4 --input {tmp_path}/in --output {tmp_path}/link"
        (tmp_path / "file").write_text("before\n", encoding="utf-8")
        assert shell(f"{{ {command}; echo after; }} >>{tmp_path}/file").returncode == 0
        expected = translations(models / "packed", max_length=4)[1]
        assert (tmp_path / "file").read_text(encoding="utf-8") == f"before\n{expected}\nafter\n"
        assert (tmp_path / "link").is_symlink()

    @pytest.mark.parametrize(
        "device", ["abacus", "meta", "", "cuda:99", "cuda:x", "privateuseone", "mkldnn", "cpu:0:1", "\n"]
    )
    def test_a_device_without_numbers(self, device: str) -> None:
        with pytest.raises(ValueError, match=f"^--device {device}: ."):
            device_of(device)

    def test_what_is_no_translation_model(
        self, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(models / "dense", tmp_path / "m")
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        for changes, message in (
            ({"model_type": "gpt2"}, "is a model of 'gpt2', which does not translate"),
            ({"model_type": "abacus"}, "model type `abacus`"),
            ({"dtype": "nonsense"}, "nonsense"),
            ({"d_model": "x"}, "Field 'd_model' expected int"),
            ({"activation_function": "x"}, "KeyError: 'x'"),
        ):
            config = json.loads((models / "dense/config.json").read_text(encoding="utf-8"))
            (tmp_path / "m/config.json").write_text(json.dumps(config | changes), encoding="utf-8")
            fails(["translate", "--model", str(tmp_path / "m"), "--input", str(tmp_path / "in")], message, capsys)

    @pytest.mark.parametrize("index", ['{"weight_map": {"a"', "[]", "{}", '{"weight_map": {"a": 3}}', "\0"])
    @pytest.mark.parametrize("command", ["translate", "export"])
    def test_a_damaged_index(
        self, models: Path, tmp_path: Path, index: str, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(models / "packed", tmp_path / "m")
        (tmp_path / "m/model.safetensors").rename(tmp_path / "m/model-00001-of-00001.safetensors")
        (tmp_path / "m/model.safetensors.index.json").write_text(index, encoding="utf-8")
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        options = ["--model", str(tmp_path / "m"), "--input", str(tmp_path / "in")]
        fails(
            [command, *(options if command == "translate" else [str(tmp_path / "m"), str(tmp_path / "new")])],
            "",
            capsys,
        )
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("settings", ["{", "[]", '{"num_beams": "a"}', '{"decoder_start_token_id": 99999}'])
    def test_damaged_generation_settings(
        self, models: Path, tmp_path: Path, settings: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(models / "packed", tmp_path / "m")
        (tmp_path / "m/generation_config.json").write_text(settings, encoding="utf-8")
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        fails(["translate", "--model", str(tmp_path / "m"), "--input", str(tmp_path / "in")], "", capsys)

    def test_the_tokenizer_of_another_model(
        self, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(models / "dense", tmp_path / "m")
        vocabulary = {word: 500 * index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
        hf.BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path / "m")
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        message = "token 1500 is beyond the 300 of the model; give it the tokenizer"
        fails(["translate", "--model", str(tmp_path / "m"), "--input", str(tmp_path / "in")], message, capsys)

    @pytest.mark.parametrize("options", [["--tgt-lang", "de"], ["--max-length", "200"]])
    def test_an_output_is_left_alone_when_the_settings_are_wrong(
        self, models: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out").write_text("precious", encoding="utf-8")
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
        fails(["translate", "--model", str(models / "packed"), *files, *options], "translate: ", capsys)
        assert (tmp_path / "out").read_text(encoding="utf-8") == "precious"

    def test_standard_input_is_an_input_too(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in").write_text("A man\n", encoding="utf-8")
        with (tmp_path / "in").open(encoding="utf-8") as file:
            monkeypatch.setattr(sys, "stdin", file)
            argv = ["translate", "--model", str(models / "packed"), "--output", str(tmp_path / "in")]
            fails(argv, "is an input; name another output", capsys)
        assert (tmp_path / "in").read_text(encoding="utf-8") == "A man\n"

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

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
    def test_a_signal_leaves_nothing_half_written(self, models: Path, tmp_path: Path, name: str) -> None:
        number = getattr(signal, name)
        assert signal.getsignal(number) == signal.SIG_DFL
        source, output = tmp_path / "in", tmp_path / "out"
        os.mkfifo(source)

        begun, ended = threading.Event(), threading.Event()

        def end() -> None:
            with source.open("w", encoding="utf-8") as lines:
                lines.write("A man\n")
                lines.flush()
                while not any(path.name.startswith(".out.") for path in tmp_path.iterdir()) and not ended.wait(0.01):
                    pass
                begun.set()
                signal.pthread_kill(threading.main_thread().ident or 0, number)
                ended.wait(60)  # the input goes on as long as the command runs

        thread = threading.Thread(target=end)
        thread.start()
        arguments = ["translate", "--model", str(models / "packed"), "--input", str(source), "--output", str(output)]
        with pytest.raises(SystemExit) as error:
            main([*arguments, "--batch-size", "1"])
        assert begun.is_set()
        ended.set()
        thread.join()
        assert error.value.code == 128 + number
        assert list(tmp_path.iterdir()) == [source]
        assert signal.getsignal(number) == signal.SIG_DFL


class TestDocuments:
    def test_a_document_has_the_translations_of_lines(self, models: Path, tmp_path: Path) -> None:
        command = ["translate", "--model", str(models / "packed"), "--max-length", "6"]
        lines = ["The garden is big.", "A man sleeps. The dog runs.", "A man"]
        (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        rows = [{"id": number, "text": line} for number, line in enumerate(lines)]
        (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        for kind in ("txt", "jsonl"):
            files = ["--input", str(tmp_path / f"in.{kind}"), "--output", str(tmp_path / f"out.{kind}")]
            assert main([*command, *files]) == 0
        expected = [line.strip() for line in (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")[:-1]]
        found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
        assert found == [{**row, "translation": text} for row, text in zip(rows, expected, strict=True)]

    def test_markup(self, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "in.md").write_text("# The *garden* is `big`\n\n```\nA man\n```\n", encoding="utf-8")
        files = ["--input", str(tmp_path / "in.md"), "--output", str(tmp_path / "out.md"), "--max-length", "9"]
        if engine.why_not() is None:
            assert main(["translate", "--model", str(models / "packed"), *files]) == 0
            heading, rest = (tmp_path / "out.md").read_text(encoding="utf-8").split("\n", 1)
            assert heading.startswith("# ")
            assert heading.count("`big`") == 1
            assert heading.count("*") == 2 or ("<em>" in heading and "</em>" in heading)
            assert rest == "\n```\nA man\n```\n"
        argv = ["translate", "--model", str(models / "packed"), *files[:3], str(tmp_path / "new.md")]
        fails([*argv, "--compute", "dense"], "packed: the engine does not run it, by whose attention markup", capsys)
        assert not (tmp_path / "new.md").exists()

    def test_standard_streams(self, shell: Any) -> None:
        cue = "1\\n00:00:01,000 --> 00:00:02,000\\n%s\\n"
        done = shell(f"nmsparse translate --model packed --max-length 6 --format srt < <(printf '{cue % 'A man'}')")
        assert done.stderr == b""
        head, text, end = done.stdout.decode().rsplit("\n", 2)
        assert (head, end) == ("1\n00:00:01,000 --> 00:00:02,000", "")
        assert text

    def test_a_format_that_the_suffix_does_not_say(self, models: Path, tmp_path: Path) -> None:
        (tmp_path / "in.md").write_text("A man\nA man\n", encoding="utf-8")
        command = ["translate", "--model", str(models / "packed"), "--max-length", "6", "--format", "txt"]
        assert main([*command, "--input", str(tmp_path / "in.md"), "--output", str(tmp_path / "out")]) == 0
        one, other, end = (tmp_path / "out").read_text(encoding="utf-8").split("\n")
        assert (one, end) == (other, "")

    @pytest.mark.parametrize(
        ("name", "content", "options", "message"),
        [
            ("in.docx", b"PK", [], "in.docx: is no Word document (.docx), or a damaged or encrypted one: "),
            ("in.parquet", b"PAR1", [], "in.parquet: is no parquet file, or a damaged one: "),
            ("in.jsonl", b'{"a": 1}', [], "in.jsonl: no column holds text; name one with --column: it has a"),
            ("in.csv", b"a,b\nx,y\n", ["--column", "c"], "in.csv: no column 'c'; it has a, b"),
            ("in.tsv", b"a\nx\n", ["--to-column", "a"], "in.tsv: has a column 'a' already"),
            ("in.po", b"msgid", [], "in.po: line 1 is no line of a message catalogue: 'msgid'"),
            ("in.md", b"a\0", [], "in.md: line 1 holds a NUL"),
            ("in.vtt", b"\xff\xfea\0", [], "in.vtt: is UTF-16"),
            ("in.srt", b"", [], "in.srt: is empty; there is nothing to translate"),
            ("in.txt", b"a", ["--column", "c"], "--column is for jsonl, tsv, csv, parquet, and not for txt"),
            ("in.srt", b"a", ["--no-split"], "--no-split is for lines of text, and not for srt; leave it out"),
            ("in.srt", b"a", ["--format", "rtf"], "invalid choice: 'rtf'"),
            ("in.md", b"A man", [], "no folder {tmp}/m"),
        ],
    )
    def test_bad(
        self, name: str, content: bytes, options: list[str], message: str, tmp_path: Path, capsys: Any
    ) -> None:
        (tmp_path / name).write_bytes(content)
        (tmp_path / "out").write_text("as it was")
        files = ["--input", str(tmp_path / name), "--output", str(tmp_path / "out")]
        fails(["translate", "--model", f"{tmp_path}/m", *files, *options], message.format(tmp=tmp_path), capsys)
        assert (tmp_path / "out").read_text() == "as it was"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out"])

    def test_what_cannot_be_replaced_is_not_written_before_all_is_there(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in.jsonl").write_text('{"a": "x"}\n', encoding="utf-8")
        capsys.readouterr()
        assert main(["translate", "--model", str(tmp_path / "m"), "--input", str(tmp_path / "in.jsonl")]) == 2
        assert capsys.readouterr().out == ""

    def test_the_output_is_the_input(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "in.md").write_text("A man", encoding="utf-8")
        argv = ["translate", "--model", "m", "--input", f"{tmp_path}/in.md", "--output", f"{tmp_path}/in.md"]
        fails(argv, "in.md is an input; name another output", capsys)


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
            (["--json", "{tmp}/new", "--output", "{tmp}/new"], "new is given as --output and as --json"),
            (["--json", "{tmp}/./new", "--output", "{tmp}/new"], "new is given as --output and as --json"),
            (["--json", "{tmp}/link", "--output", "{tmp}/new"], "link is given as --output and as --json"),
            (["--json", "{tmp}/one", "--output", "{tmp}/two"], "one is given as --output and as --json"),
            (["--json", "{tmp}/link", "--output", "{tmp}/ref"], "ref is an input; name another output"),
            (["--baseline", "{tmp}"], "{tmp} is a folder; name a file"),
            (["--tokenize", "ja-mecab"], "tokenize 'ja-mecab' is not ready on this machine: Japanese tokenization"),
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
        (tmp_path / "link").symlink_to("new")
        (tmp_path / "one").touch()
        (tmp_path / "two").hardlink_to(tmp_path / "one")
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


class TestReport:
    def test_a_page(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run, page = str(write_run(tmp_path / "run", 30.0, method="dense")), tmp_path / "report.html"
        assert main(["report", run, "--output", str(page)]) == 0
        assert capsys.readouterr().out == f"{page}\n"
        written = page.read_text(encoding="utf-8")
        assert main(["report", run, "--output", "-"]) == 0
        assert capsys.readouterr().out == written

    def test_what_is_wrong(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = str(write_run(tmp_path / "run", 30.0, method="dense"))
        fails(["report", str(tmp_path)], "holds no evaluation.json; give folders of finished runs", capsys)
        fails(["report", run, "--output", str(tmp_path)], "is a folder; name a file", capsys)
        fails(["report", run, "--comet", "none", "--output", "-"], "--comet: no file none", capsys)
