"""Packed models without the package: the file beside the weights, read by transformers alone."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, BertConfig, BertForMaskedLM, BertModel, MarianModel, T5EncoderModel

from hf_nmsparse import cli, saving, standalone
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.layers import sparse_layers
from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.number_types import VALUE_DTYPES
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.packed_format import PackedFormatError
from hf_nmsparse.packing import pack, unpack
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.quantizer import prepare_for_training
from hf_nmsparse.saving import export_dense, push_to_hub, save_packed
from hf_nmsparse.sparse_model import sparsify
from hf_nmsparse.standalone import PackedRecord, dense_tensors, dense_weight
from tests.hub import local_hub
from tests.packed_models import BUILDERS, contents, sparse
from tests.processes import in_a_fresh_one
from tests.tiny import tokenizer

READER = "modeling_nmsparse.py"
AUTO_MAP = {
    "AutoModel": "modeling_nmsparse.NMSparseModel",
    "AutoModelForSeq2SeqLM": "modeling_nmsparse.NMSparseModelForSeq2SeqLM",
}
LAYER = "model.encoder.layers.0.fc1"
# How each family is saved: every number type, shards, tied and untied int8 embeddings and none.
SAVED: dict[str, dict[str, Any]] = {
    "marian": {"values": "int8"},
    "bart": {"values": "bf16", "max_shard_size": "5KB"},
    "m2m100": {"values": "fp32"},
    "t5": {"values": "int8", "embeddings": "float"},
    "t5 untied": {"values": "int8"},
}


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, and "1:4"."""
    root = tmp_path_factory.mktemp("saved")
    for family, how in SAVED.items():
        save_packed(sparse(family), root / family, standalone=True, **how)
    save_packed(sparse("marian", "1:4"), root / "1:4", "fp16", standalone=True)
    return root


def without_package(code: str, *arguments: object, **environment: str) -> str:
    """Runs code in a fresh process that cannot import the package, and returns what it printed."""
    strict = {**os.environ, "PYTHONWARNINGS": "error::UserWarning", **environment}
    return in_a_fresh_one("-c", BLOCKED + code, *arguments, environment=strict)


BLOCKED = """
import sys
sys.modules["hf_nmsparse"] = None  # an import of it raises ImportError
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

def refused(kind, message, *arguments, **keywords):
    try:
        AutoModelForSeq2SeqLM.from_pretrained(*arguments, **keywords)
    except kind as error:
        assert message in str(error) and "\\n" not in str(error), error
    else:
        sys.exit(f"{arguments} was loaded where {message!r} was expected")
"""

READ_AND_COMPARE = """
saved, other = map(Path, sys.argv[1:])
trusted = {"trust_remote_code": True}
loads = [
    (auto, folder, dtype)
    for folder in sorted(saved.iterdir())
    for auto in (AutoModel, AutoModelForSeq2SeqLM)
    for dtype in ("auto", *((torch.float32, torch.float16) if folder.name.startswith("t5") else ()))
]
alone = [auto.from_pretrained(folder, dtype=dtype, **trusted) for auto, folder, dtype in loads]
assert len(alone) == 20

marian = saved / "marian"
refused(RuntimeError, "mismatched", marian)
for name, value in {"variant": "fp16", "state_dict": {}}.items():
    refused(ValueError, f"leave out {name}", marian, **{name: value}, **trusted)
for folder in other.iterdir():
    refused((RuntimeError, ValueError), (folder / "message").read_text(), folder, **trusted)

model, info = AutoModelForSeq2SeqLM.from_pretrained(marian, output_loading_info=True, device_map="cpu", **trusted)
assert not any(info.values()), info
assert model.name_or_path == model.config.name_or_path == str(marian)
model.save_pretrained(saved.parent / "again")
fresh = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(marian), **trusted)
assert type(fresh) is type(model) and fresh.config.to_dict().keys().isdisjoint({"auto_map", "quantization_config"})
tied = ("model.shared", "model.decoder.embed_tokens", "lm_head")
others = ("model.encoder", "model.decoder.embed_positions", "model.decoder.layer_norm")
places = {**dict.fromkeys(tied + others, "cpu"), "model.decoder.layers": "disk"}
offloaded = AutoModelForSeq2SeqLM.from_pretrained(
    saved / "m2m100", device_map=places, offload_folder=saved.parent / "offload", **trusted
)

del sys.modules["hf_nmsparse"]
import hf_nmsparse
from hf_nmsparse.packed_layers import KernelLinear
from tests.packed_models import output

for (auto, folder, dtype), model in zip(loads, alone, strict=True):
    how = hf_nmsparse.NMSparseQuantizationConfig(compute="dense", head="dense")
    packed = auto.from_pretrained(folder, dtype=dtype, quantization_config=how)
    assert type(model) is type(packed) and type(model).__module__.startswith("transformers.models.")
    ours, theirs = model.state_dict(), packed.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), (folder, dtype, key)
    assert torch.equal(output(model), output(packed)), (folder, dtype)
    assert model.config.to_dict() == {k: v for k, v in packed.config.to_dict().items() if k != "quantization_config"}
    if auto is AutoModelForSeq2SeqLM:
        assert model.generation_config.to_dict() == packed.generation_config.to_dict()
assert torch.equal(output(offloaded), output(alone[loads.index((AutoModelForSeq2SeqLM, saved / "m2m100", "auto"))]))

model = AutoModelForSeq2SeqLM.from_pretrained(marian, **trusted)  # now the package loads it
print(model.hf_quantizer.quantization_config.values, hasattr(model.config, "auto_map"))
"""


def damaged(saved: Path, root: Path) -> None:
    """Folders in ``root`` that break a rule, each with a file that holds a part of the expected message."""

    def folder(name: str, family: str, message: str) -> Path:
        (root / name).mkdir(parents=True)
        for file in (saved / family).iterdir():
            (root / name / file.name).write_bytes(file.read_bytes())
        (root / name / "message").write_text(message)
        return root / name / "model.safetensors"

    weights = folder("code", "marian", f"{root / 'code'}: {LAYER}.weight: codes of 2:4 are 0 to 5; the file is damaged")
    tensors = load_file(weights)
    tensors[f"{LAYER}.weight_indices"][3, 0] |= 7
    save_file(tensors, weights, {"format": "pt"})
    weights = folder("no codes", "marian", "mismatched")  # a matrix of int8 that does not have the layer's shape
    tensors = load_file(weights)
    del tensors[f"{LAYER}.weight_indices"]
    save_file(tensors, weights, {"format": "pt"})
    for lost in (f"{LAYER}.bias", "final_logits_bias", "model.decoder.layers.0.fc1", "model.shared"):
        weights = folder(lost, "marian", "is missing, which the model has; the file is damaged")
        tensors = load_file(weights)
        save_file({key: t for key, t in tensors.items() if not key.startswith(lost)}, weights, {"format": "pt"})
    weights = folder("compiled", "marian", "is missing, which the model has; the file is damaged")
    save_file({f"_orig_mod.{key}": tensor for key, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    weights = folder("cut", "marian", "model.safetensors: no whole safetensors file (")
    weights.write_bytes(weights.read_bytes()[:-1])
    weights = folder("version", "marian", "format_version 3 is unknown, this file reads 1 and 2; install hf-nmsparse")
    record = settings(weights.parent)
    record["quantization_config"]["format_version"] = 3
    (weights.parent / "config.json").write_text(json.dumps(record))
    index = folder("index", "bart", "model.safetensors.index.json: no JSON with a weight_map").with_name(
        "model.safetensors.index.json"
    )
    index.write_text("{}")
    index = folder("outside", "bart", "'../model.safetensors' is no file name").with_name(index.name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../model.safetensors"}}))


def test_a_process_without_the_package_gets_what_the_package_computes_dense(saved: Path, tmp_path: Path) -> None:
    damaged(saved, tmp_path / "damaged")
    printed = without_package(READ_AND_COMPARE, saved, tmp_path / "damaged", HF_HOME=str(tmp_path / "home"))
    assert printed == "int8 False\n"
    again = saved.parent / "again"  # a model that was loaded alone saves as any dense one
    assert {"auto_map", "quantization_config"}.isdisjoint(settings(again))
    assert {file.name for file in again.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


PULL = """
model = AutoModelForSeq2SeqLM.from_pretrained("user/tiny", trust_remote_code=True, revision="v1", token="hf_other")
ids = AutoTokenizer.from_pretrained("user/tiny")("A garden", return_tensors="pt")
assert model.generate(**ids, max_new_tokens=3).shape == (1, 4)
torch.save(model.state_dict(), sys.argv[1])
for where in ({"local_files_only": True}, {"subfolder": "below"}):
    again = AutoModelForSeq2SeqLM.from_pretrained("user/tiny", trust_remote_code=True, **where).state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())
refused(RuntimeError, "mismatched", "user/tiny")
"""


def test_the_hub(tmp_path: Path) -> None:
    model = sparse()
    save_packed(model, tmp_path / "m", standalone=True, max_shard_size="40KB")
    tokenizer().save_pretrained(tmp_path / "m")
    files = contents(tmp_path / "m")
    assert sum(name.endswith(".safetensors") for name in files) > 2
    with local_hub() as hub:
        hub.repos["user/tiny"] = files | {f"below/{name}": file for name, file in files.items() if name != READER}
        without_package(PULL, tmp_path / "state.pt", **hub.environment(tmp_path / "home"), HF_HUB_OFFLINE="0")
        pinned = {path: token for path, token in hub.tokens.items() if "Bearer hf_other" in token}
    assert "api/models/user/tiny/revision/v1" in pinned
    fetched = {path.rpartition("/")[2] for path in pinned}
    assert fetched >= {name for name in files if name.startswith("model")} | {"config.json", "generation_config.json"}
    found, layers = torch.load(tmp_path / "state.pt"), sparse_layers(model)
    for key, tensor in model.state_dict().items():
        layer = layers.get(key.removesuffix(".weight"))
        expected = tensor if layer is None else apply_mask(tensor, magnitude_mask(tensor, layer))
        assert torch.equal(found[key], expected), key


class TestSave:
    def test_what_is_added(self, saved: Path, tmp_path: Path) -> None:
        model = sparse()
        save_packed(model, tmp_path / "plain")
        save_packed(model, tmp_path / "with", standalone=True)
        plain, added = contents(tmp_path / "plain"), contents(tmp_path / "with")
        assert added.pop(READER) == Path(standalone.__file__).read_bytes()
        assert settings(tmp_path / "with") == settings(tmp_path / "plain") | {"auto_map": AUTO_MAP}
        assert {**added, "config.json": b""} == {**plain, "config.json": b""}
        assert not hasattr(model.config, "auto_map")

    def test_it_is_deterministic_and_replaces_what_was_there(self, tmp_path: Path) -> None:
        save_packed(sparse("t5"), tmp_path / "a", standalone=True)
        for folder in ("a", "b"):
            save_packed(sparse(), tmp_path / folder, standalone=True)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def test_a_process_that_leaves_the_writing_to_another_writes_nothing(self, tmp_path: Path) -> None:
        save_packed(sparse(), tmp_path, is_main_process=False, standalone=True)
        assert contents(tmp_path) == {}

    def test_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sparse().save_pretrained(tmp_path / "training")
        for target, options, line in (
            ("plain", [], "standalone     no, this package reads it"),
            ("with", ["--standalone"], "standalone     yes, with trust_remote_code=True"),
        ):
            assert cli.main(["pack", str(tmp_path / "training"), str(tmp_path / target), *options]) == 0
            assert line in capsys.readouterr().out
        assert settings(tmp_path / "with")["auto_map"] == AUTO_MAP
        assert (tmp_path / "with" / READER).is_file()

    def test_on_the_way_to_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sent: dict[str, bytes] = {}

        class Hub:
            def __init__(self, token: str | None) -> None:
                pass

            def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
                return SimpleNamespace(repo_id=repo_id)

            def upload_folder(self, folder_path: Path, **kwargs: Any) -> Any:
                sent.update(contents(Path(folder_path)))
                return SimpleNamespace(commit_url="commit")

        monkeypatch.setattr(saving, "HfApi", Hub)
        push_to_hub(sparse(), "user/m", standalone=True)
        assert sent[READER] == Path(standalone.__file__).read_bytes()
        assert json.loads(sent["config.json"])["auto_map"] == AUTO_MAP

    @pytest.mark.parametrize("kind", [BertForMaskedLM, T5EncoderModel])
    def test_a_class_that_no_such_auto_class_makes(self, kind: Any, tmp_path: Path) -> None:
        if kind is BertForMaskedLM:
            config: Any = BertConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
        else:
            config = BUILDERS["t5"]().config
        model = kind(config)
        sparsify(model, NMSparseConfig("2:4"))
        with pytest.raises(ValueError, match=rf"AutoModel(ForImageClassification)? loads, and {kind.__name__} is not"):
            save_packed(model, tmp_path / "m", standalone=True)
        assert not (tmp_path / "m").exists()

    @pytest.mark.parametrize(
        ("model", "autos"),
        [
            (lambda: sparse().model, set(AUTO_MAP)),
            (lambda: BertModel(BertConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2)), {"AutoModel"}),
        ],
    )
    def test_base_models(self, model: Callable[[], Any], autos: set[str], tmp_path: Path) -> None:
        base = model()
        if not isinstance(base, MarianModel):
            sparsify(base, NMSparseConfig("2:4"))
        save_packed(base, tmp_path, standalone=True)
        assert settings(tmp_path)["auto_map"].keys() == autos


class TestWithThePackage:
    def test_it_loads_packed_and_unasked(self, saved: Path) -> None:
        model = AutoModelForSeq2SeqLM.from_pretrained(saved / "marian")
        assert len(sparse_layers(model)) == 32
        assert model.hf_quantizer.quantization_config.values == "int8"

    def test_a_plain_save_drops_the_reader_and_save_packed_gives_it_again(self, saved: Path, tmp_path: Path) -> None:
        model = AutoModelForSeq2SeqLM.from_pretrained(saved / "m2m100")
        model.save_pretrained(tmp_path / "plain")
        save_packed(model, tmp_path / "with", standalone=True)
        first = contents(saved / "m2m100")
        assert contents(tmp_path / "with") == first
        del first[READER]
        found = contents(tmp_path / "plain")
        config = json.loads(first.pop("config.json"))
        del config["auto_map"]
        assert json.loads(found.pop("config.json")) == config
        assert found == first

    def test_neither_training_nor_dense_files_mention_it(self, saved: Path, tmp_path: Path) -> None:
        model = AutoModelForSeq2SeqLM.from_pretrained(saved / "m2m100")
        export_dense(model, tmp_path / "dense")
        model.get_encoder().save_pretrained(tmp_path / "part")
        prepare_for_training(model)
        model.save_pretrained(tmp_path / "training")
        for name in ("dense", "part", "training"):
            assert "auto_map" not in settings(tmp_path / name)
            assert not (tmp_path / name / READER).exists()

    def test_other_code_stays(self, tmp_path: Path) -> None:
        model = sparse()
        other = {"AutoTokenizer": ["own.Tokenizer", None]}
        model.config.auto_map = {"AutoModel": "user/m--modeling_nmsparse.NMSparseModel", **other}
        save_packed(model, tmp_path / "plain")
        assert settings(tmp_path / "plain")["auto_map"] == other
        save_packed(model, tmp_path / "with", standalone=True)
        assert settings(tmp_path / "with")["auto_map"] == AUTO_MAP | other

    def test_check_folder(self, saved: Path, tmp_path: Path) -> None:
        assert check_folder(saved / "marian").standalone
        save_packed(sparse(), tmp_path)
        assert not check_folder(tmp_path).standalone
        save_packed(sparse(), tmp_path, standalone=True)
        (tmp_path / READER).unlink()
        with pytest.raises(PackedFormatError, match=f"^config.json: auto_map names {READER}, which the folder has not"):
            check_folder(tmp_path)


def test_the_file_needs_nothing_of_the_package() -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(standalone.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"safetensors", "torch", "transformers"}


class TestDenseWeight:
    def test_by_hand(self) -> None:
        # 2:4 has 3-bit codes: 0 {0,1}, 5 {2,3}, 2 {0,3} are the bits 000 101 010, lowest first 000 101 010 -> 0xA8, 0
        codes = torch.tensor([[0b10101000, 0b0]], dtype=torch.uint8)
        values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, -0.0]])
        expected = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0, 5.0, 0.0, 0.0, -0.0]])
        found = dense_weight(values, codes, 2, 4)
        assert torch.equal(found, expected)
        assert torch.equal(torch.signbit(found), torch.signbit(expected))

    @given(st.data())
    def test_it_agrees_with_the_package(self, data: st.DataObject) -> None:
        m = data.draw(st.integers(2, 16) | st.just(32))
        pattern = NMPattern(data.draw(st.integers(1, m - 1)), m)
        rows, groups = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 19))
        dtype = data.draw(st.sampled_from(list(VALUE_DTYPES.values())))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        weight = torch.randint(-3, 4, (rows, groups * m), generator=generator).to(torch.float32)
        weight = apply_mask(weight, magnitude_mask(weight, pattern)).to(dtype)
        packed = pack(weight, pattern)
        found = dense_weight(packed["weight"], packed["weight_indices"], pattern.n, pattern.m)
        assert found.dtype == dtype
        expected = unpack(packed["weight"], packed["weight_indices"], pattern)
        assert torch.equal(found, expected)
        assert torch.equal(found, weight)
        assert torch.equal(torch.signbit(found), torch.signbit(expected))

    @pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 16), (3, 7), (31, 32)])
    def test_every_code(self, n: int, m: int) -> None:
        pattern = NMPattern(n, m)
        rows = [list(row) for row in all_kept(n, m)]
        weight = torch.tensor(rows, dtype=torch.float32)
        packed = pack(weight, pattern)
        assert torch.equal(dense_weight(packed["weight"], packed["weight_indices"], n, m), weight)

    @pytest.mark.parametrize(
        ("values", "codes", "message"),
        [
            (torch.ones(1, 3), torch.zeros(1, 1, dtype=torch.uint8), "rows of 2:4 hold a multiple of 2 values, got 3"),
            (
                torch.ones(1, 4),
                torch.zeros(1, 2, dtype=torch.uint8),
                r"codes are uint8 \[1, 1\], got torch.uint8 \[1, 2",
            ),
            (torch.ones(2, 4), torch.zeros(1, 1, dtype=torch.uint8), r"codes are uint8 \[2, 1\]"),
            (torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.int8), r"codes are uint8 \[1, 1\], got torch.int8"),
            (torch.ones(1, 4), torch.tensor([[0b110000]], dtype=torch.uint8), "codes of 2:4 are 0 to 5"),
            (torch.ones(1, 4), torch.tensor([[0b1000000]], dtype=torch.uint8), "padding bits at the end of a row"),
        ],
    )
    def test_bad(self, values: Tensor, codes: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=f"^here: {message}") as raised:
            dense_weight(values, codes, 2, 4, "here")
        assert "\n" not in str(raised.value)


def all_kept(n: int, m: int) -> list[list[int]]:
    """Every row of m with n ones."""
    if m == 0:
        return [[]]
    with_one = [[1, *rest] for rest in all_kept(n - 1, m - 1)] if n else []
    return with_one + ([[0, *rest] for rest in all_kept(n, m - 1)] if n < m else [])


RECORD = {"quant_method": "nmsparse", "format": "packed", "format_version": 1, "pattern": "2:4", "values": "int8"}


class TestRecord:
    def test_what_save_packed_writes(self, saved: Path) -> None:
        found = {
            folder.name: PackedRecord.read(settings(folder)["quantization_config"], "m") for folder in saved.iterdir()
        }
        assert found == {
            "marian": PackedRecord(2, 4, torch.int8, True),
            "bart": PackedRecord(2, 4, torch.bfloat16, False),
            "m2m100": PackedRecord(2, 4, torch.float32, False),
            "t5": PackedRecord(2, 4, torch.int8, False),
            "t5 untied": PackedRecord(2, 4, torch.int8, True),
            "1:4": PackedRecord(1, 4, torch.float16, False),
        }

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"quant_method": "gptq"}, "is not nmsparse's"),
            ({"format": "dense"}, "format is packed, got 'dense'"),
            ({"format_version": True}, "format_version True is unknown"),
            ({"format_version": None}, "format_version None is unknown"),
            ({"pattern": "4:2"}, "pattern is N:M with 1 <= N < M <= 32, got '4:2'"),
            ({"pattern": "2:40"}, "got '2:40'"),
            ({"pattern": ["2", "4"]}, "pattern is N:M"),
            ({"values": "int4"}, "values are one of fp32, fp16, bf16, int8, got 'int4'"),
            ({"values": ["fp32"]}, "values are one of"),
            ({"embeddings": "int4"}, "got 'int4'"),
            ({"values": "fp32", "embeddings": "int8"}, "embeddings are int8 beside values of int8 only"),
        ],
    )
    def test_bad(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=r"^m: config\.json: quantization_config: ") as raised:
            PackedRecord.read(RECORD | change, "m")
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("record", [None, "nmsparse", []])
    def test_none(self, record: Any) -> None:
        with pytest.raises(ValueError, match=r"^m: config\.json: quantization_config: is not nmsparse's"):
            PackedRecord.read(record, "m")


def test_tensors_that_config_json_does_not_declare(saved: Path) -> None:
    tensors = load_file(saved / "marian" / "model.safetensors")
    with pytest.raises(ValueError, match=r"^m: model\.shared\.weight: has a scale that config.json does not declare"):
        dense_tensors(tensors, PackedRecord(2, 4, torch.int8, False), "m")
    with pytest.raises(ValueError, match=r"^m: model\.decoder\S+k_proj\.weight: is no matrix of torch\.bfloat16"):
        dense_tensors(tensors, PackedRecord(2, 4, torch.bfloat16, False), "m")
    with pytest.raises(ValueError, match=r"^m: no key ends in \.weight_indices; the file is damaged"):
        dense_tensors({"a.weight": torch.ones(1, 1)}, PackedRecord(2, 4, torch.bfloat16, False), "m")
    values = {"a.weight": torch.tensor([[1.0, torch.nan]]), "a.weight_indices": torch.zeros(1, 1, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"^m: a\.weight: holds NaN or infinity"):
        dense_tensors(values, PackedRecord(2, 4, torch.float32, False), "m")
