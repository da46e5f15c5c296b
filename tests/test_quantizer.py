"""Packed checkpoints and those of the training, through the doors of transformers."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_nmsparse import packed_files, quantizer
from hf_nmsparse.compute import set_compute
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.kernels import library
from hf_nmsparse.layers import NMLinear, sparse_layers
from hf_nmsparse.number_types import VALUE_DTYPES
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.packed_format import PackedFormatError
from hf_nmsparse.packed_layers import KernelLinear, PackedLinear
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.quantizer import prepare_for_training
from hf_nmsparse.saving import export_dense, push_to_hub, save_packed
from hf_nmsparse.sparse_model import sparsify
from tests.loaded_models import FAMILIES, FC1, build, load, logits, masked, same_files, training
from tests.tiny import hf

COMPUTES = ("dense", "reference")  # the ones that compute what the training model computes, to the bit
KERNELS = library.status().unit not in (None, "scalar")  # whether plain from_pretrained runs on them
FLOATS = {name: dtype for name, dtype in VALUE_DTYPES.items() if dtype.is_floating_point}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(BITS[left.dtype]), right.view(BITS[right.dtype]))


def record_of(path: Path) -> Any:
    return json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Marian in fp32, in one file."""
    folder = tmp_path_factory.mktemp("packed")
    save_packed(training(), folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards that part a layer's two tensors."""
    folder = tmp_path_factory.mktemp("sharded")
    save_packed(training(), folder, max_shard_size="8KB")
    return folder


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """What the model in these files says."""
    return logits(masked(training()))


class TestSavePacked:
    def test_the_file_by_hand(self, tmp_path: Path) -> None:
        model = training(targets=["fc1"], ignore=["decoder"])
        weight = model.get_parameter(f"{FC1}.weight")
        with torch.no_grad():
            weight.zero_()
            weight[0, :12] = torch.tensor([1.0, -4.0, 3.0, 2.0, 0.5, 0.5, 0.5, 0.5, -1.0, 0.25, 0.0, 2.0])
        save_packed(model, tmp_path, values="bf16")
        tensors = load_file(tmp_path / "model.safetensors")
        assert tensors[f"{FC1}.weight"].shape == (64, 16)
        assert tensors[f"{FC1}.weight"][0].tolist() == [-4.0, 3.0, 0.5, 0.5, -1.0, 2.0] + [0.0] * 10
        assert tensors[f"{FC1}.weight_indices"].shape == (64, 3)
        # Codes 3 = {1,2}, 0 = {0,1}, 2 = {0,3}, then 0: 3 bits each, least significant first.
        assert tensors[f"{FC1}.weight_indices"][0].tolist() == [3 | 0 << 3 | (2 << 6) % 256, 2 >> 2, 0]
        packed_keys = {key for key in tensors if key.endswith("_indices")}
        assert packed_keys == {f"model.encoder.layers.{i}.fc1.weight_indices" for i in (0, 1)}
        assert {tensor.dtype for key, tensor in tensors.items() if key not in packed_keys} == {torch.bfloat16}
        assert tensors.keys() - packed_keys == load_stock_keys(tmp_path / "stock")
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        assert config["dtype"] == "bfloat16"
        assert config["quantization_config"] == {
            "quant_method": "nmsparse",
            "format": "packed",
            "format_version": 1,
            "pattern": "2:4",
            "values": "bf16",
            "targets": ["fc1"],
            "ignored": ["decoder"],
            "producer": "hf-nmsparse 0.1.0",
        }

    def test_masks_are_ranked_before_the_cast(self, tmp_path: Path) -> None:
        model = training()
        with torch.no_grad():  # one number in bf16
            model.get_parameter(f"{FC1}.weight")[:] = torch.tensor([1.0, 1.0001, 1.0002, 1.0003]).repeat(8)
        save_packed(model, tmp_path, values="bf16")
        assert load_file(tmp_path / "model.safetensors")[f"{FC1}.weight_indices"][7].tolist() == [
            0b01_101_101,
            0b1_101_101_1,
            0b101_101_10,
        ]

    def test_the_mask_in_use_is_the_one_that_is_written(self, tmp_path: Path) -> None:
        model = training()
        layer = model.get_submodule(FC1)
        layer.mask = torch.full((64 * 32 // 8,), 0b0011_0011, dtype=torch.uint8)
        save_packed(model, tmp_path)
        assert not load_file(tmp_path / "model.safetensors")[f"{FC1}.weight_indices"].any()

    def test_the_model_goes_on_training(self, tmp_path: Path) -> None:
        model = training()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        config = model.config.to_dict()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        SparseStep(model, optimizer, "sr-ste", decay=2e-4)
        save_packed(model, tmp_path, values="fp16")
        after = model.state_dict()
        assert all(torch.equal(after[key], before[key]) and after[key].dtype == torch.float32 for key in before)
        assert model.training
        assert model.config.to_dict() == config
        assert model.config.quantization_config == {"quant_method": "nmsparse", "format": "dense", "pattern": "2:4"}
        assert isinstance(model.get_submodule(FC1), NMLinear)
        model(input_ids=torch.tensor([[5, 2]]), labels=torch.tensor([[6, 2]])).loss.backward()
        optimizer.step()
        assert not torch.equal(model.get_parameter(f"{FC1}.weight"), before[f"{FC1}.weight"])

    def test_the_same_model_gives_the_same_bytes(self, packed: Path, tmp_path: Path) -> None:
        save_packed(training(), tmp_path)
        assert same_files(packed, tmp_path)

    def test_gathered_weights_are_taken(self, packed: Path, tmp_path: Path) -> None:
        model = training()
        gathered = copy.deepcopy(dict(model.state_dict()))  # tied tensors stay tied
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        save_packed(model, tmp_path, state_dict=gathered)
        assert same_files(packed, tmp_path)

    @pytest.mark.parametrize("pattern", ["1:2", "1:4", "4:8", "2:8", "1:16", "16:32"])
    @pytest.mark.parametrize("compute", COMPUTES)
    def test_patterns(self, pattern: str, compute: str, tmp_path: Path) -> None:
        model = training(pattern=pattern)
        save_packed(model, tmp_path)
        loaded = load(tmp_path, compute)
        assert set(sparse_layers(loaded).values()) == {NMPattern.parse(pattern)}
        assert torch.equal(logits(loaded), logits(masked(model)))

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"^save_packed: a packed model has one pattern, this model has none; call"
        ):
            save_packed(build(), tmp_path)
        with pytest.raises(
            ValueError, match="save_packed: values is one of 'fp32', 'fp16', 'bf16', 'int8', got 'int4'"
        ):
            save_packed(training(), tmp_path, values="int4")
        with pytest.raises(ValueError, match=r"values in fp32, fp16, bf16, this model is in torch\.float64"):
            save_packed(training().double(), tmp_path)
        mixed = training(targets=["fc1"])
        NMLinear.from_stock(mixed.get_submodule("model.encoder.layers.0.fc2"), NMPattern(1, 4))
        with pytest.raises(ValueError, match="has one pattern, this model has 1:4, 2:4"):
            save_packed(mixed, tmp_path)
        large = training()
        with torch.no_grad():
            large.get_parameter(f"{FC1}.weight")[0, 0] = 1e5
        with pytest.raises(ValueError, match=rf"{FC1}\.weight has numbers too large for torch\.float16; choose bf16"):
            save_packed(large, tmp_path, values="fp16")
        with torch.no_grad():
            large.get_parameter(f"{FC1}.weight")[0, 0] = float("inf")
        with pytest.raises(ValueError, match=rf"{FC1}\.weight holds NaN or infinity"):
            save_packed(large, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_loaded_layer_that_was_changed_is_not_rounded(self, packed: Path, tmp_path: Path) -> None:
        model = load(packed)
        with torch.no_grad():
            model.get_parameter(f"{FC1}.weight")[:2, :4] = 1.0
        message = rf"{FC1}\.weight has 2 groups with more than 2 non-zero weights"
        with pytest.raises(ValueError, match=message):
            save_packed(model, tmp_path)
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path)


def load_stock_keys(folder: Path) -> set[str]:
    build().save_pretrained(folder)
    return set(load_file(folder / "model.safetensors"))


class TestFromPretrained:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("values", FLOATS)
    def test_both_ways_compute_what_the_training_model_computes(self, family: str, values: str, tmp_path: Path) -> None:
        model = training(family)
        save_packed(model, tmp_path / "first", values=values)
        twin = masked(model, VALUE_DTYPES[values])
        if family.startswith("t5") and values == "fp16":  # where transformers keeps T5's wo in fp32
            for name, layer in twin.named_modules():
                if name.endswith(".wo"):
                    layer.float()
        wanted = logits(twin)
        assert values != "fp32" or torch.equal(wanted, logits(model))
        for compute in COMPUTES:
            loaded = load(tmp_path / "first", compute)
            kind = nn.Linear if compute == "dense" else PackedLinear
            assert loaded.dtype == VALUE_DTYPES[values]
            assert sparse_layers(loaded) == sparse_layers(model)
            assert {type(loaded.get_submodule(name)) for name in sparse_layers(loaded)} == {kind}
            assert torch.equal(logits(loaded), wanted)
            loaded.save_pretrained(tmp_path / compute)
            assert same_files(tmp_path / "first", tmp_path / compute)
            save_packed(loaded, tmp_path / f"{compute} again")
            assert same_files(tmp_path / "first", tmp_path / f"{compute} again")

    @pytest.mark.parametrize("compute", COMPUTES)
    def test_shards(self, packed: Path, sharded: Path, expected: Tensor, compute: str, tmp_path: Path) -> None:
        where = json.loads((sharded / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        assert len(set(where.values())) > 2
        loaded = load(sharded, compute)
        assert torch.equal(logits(loaded), expected)
        save_packed(loaded, tmp_path / "shards", max_shard_size="8KB")
        assert same_files(sharded, tmp_path / "shards")
        loaded.save_pretrained(tmp_path / "again", max_shard_size="8KB")
        assert same_files(sharded, tmp_path / "again")  # the index counts the weights of the dense form
        loaded.save_pretrained(tmp_path / "one")
        assert same_files(packed, tmp_path / "one")

    @pytest.mark.parametrize("cls", [hf.AutoModelForSeq2SeqLM, hf.MarianMTModel])
    def test_without_a_configuration(self, packed: Path, expected: Tensor, cls: Any) -> None:
        model, info = cls.from_pretrained(packed, output_loading_info=True)
        assert {key: len(found) for key, found in info.items()} == dict.fromkeys(info, 0)
        assert type(model.get_submodule(FC1)) is (KernelLinear if KERNELS else nn.Linear)
        assert model.is_quantized
        difference = logits(model) - expected  # fp32 sums in another order
        assert float(difference.norm() / expected.norm()) < 1e-6

    @pytest.mark.parametrize("compute", COMPUTES)
    @pytest.mark.parametrize("cls", [hf.AutoModel, hf.MarianModel])
    def test_the_base_model(self, packed: Path, cls: Any, compute: str, tmp_path: Path) -> None:
        base = load(packed, compute, cls=cls)
        assert len(sparse_layers(base)) == 32
        assert torch.equal(logits(base), logits(masked(training()).model))
        base.save_pretrained(tmp_path)
        back = load(tmp_path, compute)
        assert torch.equal(logits(back)[..., 5], logits(load(packed))[..., 5])
        assert torch.equal(logits(load(tmp_path, compute, cls=cls)), logits(base))

    @pytest.mark.parametrize("compute", COMPUTES)
    def test_another_number_type(self, packed: Path, compute: str, tmp_path: Path) -> None:
        model = load(packed, compute, dtype=torch.bfloat16)
        assert torch.equal(logits(model), logits(masked(training(), torch.bfloat16)))
        model.save_pretrained(tmp_path / "loaded")
        save_packed(training(), tmp_path / "trained", values="bf16")
        assert same_files(tmp_path / "loaded", tmp_path / "trained")
        save_packed(load(packed, compute), tmp_path / "saved", values="bf16")
        assert same_files(tmp_path / "saved", tmp_path / "trained")

    @pytest.mark.parametrize("compute", COMPUTES)
    @pytest.mark.parametrize("device_map", ["auto", "cpu"])
    def test_device_map(self, packed: Path, expected: Tensor, device_map: str, compute: str, tmp_path: Path) -> None:
        model = load(packed, compute, device_map=device_map)
        assert torch.equal(logits(model), expected)
        assert len(sparse_layers(model)) == 32
        model.save_pretrained(tmp_path)
        assert same_files(packed, tmp_path)

    def test_gradients_reach_the_layers_that_stayed_dense(self, packed: Path) -> None:
        model = load(packed, "reference")
        model(input_ids=torch.tensor([[5, 2]]), labels=torch.tensor([[6, 2]])).loss.backward()
        assert model.get_parameter("model.shared.weight").grad is not None

    def test_a_configuration_is_for_packed_files(self, tmp_path: Path) -> None:
        build().save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match=r"for packed checkpoints and this one is dense; load it without, then call"
        ):
            load(tmp_path)

    def test_a_state_dict_is_refused(self, packed: Path) -> None:
        with pytest.raises(ValueError, match="a sparse model is loaded from its files, not from a state_dict"):
            hf.MarianMTModel.from_pretrained(None, config=hf.AutoConfig.from_pretrained(packed), state_dict={})

    def test_another_method_is_still_refused(self, packed: Path) -> None:
        with pytest.raises(ValueError, match="you are passing a FineGrainedFP8Config"):
            hf.AutoModelForSeq2SeqLM.from_pretrained(packed, quantization_config=hf.FineGrainedFP8Config())


class TestConfiguration:
    def test_keys_and_values(self) -> None:
        for wrong, message in (
            (
                {"dequantize": True},
                "unknown key 'dequantize'; known keys are compute, head, pattern, values, embeddings",
            ),
            (
                {"compute": "sparse"},
                "compute is one of 'auto', 'fp32', 'bf16', 'int8', 'semi_structured', 'dense', 'reference', got",
            ),
            ({"values": "int4"}, "values is one of 'fp32', 'fp16', 'bf16', 'int8', got 'int4'"),
            ({"format": "bitmask"}, "format is one of 'packed', 'dense', got 'bitmask'"),
            ({"format_version": True}, "format_version True is unknown"),
            ({"pattern": "4:2"}, "N:M needs 1 <= N < M"),
            ({"producer": 3}, "producer is a text, got 3"),
        ):
            with pytest.raises(ValueError, match=message):
                NMSparseQuantizationConfig(**wrong)

    @pytest.mark.parametrize(
        ("change", "rule"),
        [
            (
                {"format_version": 3},
                "format_version 3 is unknown, this package reads 1 and 2; install a newer hf-nmsparse",
            ),
            ({"format_version": None}, "format_version is missing"),
            ({"format": "bitmask"}, "format is one of 'packed', 'dense', got 'bitmask'"),
            ({"format": None}, "format is one of 'packed', 'dense', got None"),
            ({"pattern": None}, "pattern is missing"),
            ({"pattern": "4:2"}, "pattern: N:M needs 1 <= N < M <= 32, got 4:2; 2:4 keeps 2 of 4"),
            ({"pattern": [2, 4]}, "pattern: expected N:M such as '2:4', got [2, 4]; in YAML keep the quotes"),
            ({"values": "int4"}, "values is one of 'fp32', 'fp16', 'bf16', 'int8', got 'int4'"),
            ({"embeddings": "int8"}, "embeddings are int8 beside values of int8 only, got 'int8' beside 'fp32'"),
            ({"values": None}, "values is missing"),
            ({"targets": [3]}, "config: targets holds layer names such as 'fc1', got 3"),
            ({"compute": "reference"}, "unknown key 'compute'"),
            ({"ignore": ["fc1"]}, "unknown key 'ignore'"),
            ({"reader": "os.system"}, "unknown key 'reader'; known keys are quant_method, format, format_version"),
        ],
    )
    def test_records_that_break_a_rule(self, packed: Path, tmp_path: Path, change: dict[str, Any], rule: str) -> None:
        folder = tmp_path / "m"
        shutil.copytree(packed, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        record = {**config["quantization_config"], **change}
        config["quantization_config"] = {key: value for key, value in record.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for read in (load, check_folder):
            with pytest.raises(PackedFormatError) as caught:
                read(folder)
            assert str(caught.value).startswith("config.json: ")
            assert rule in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_a_loading_checks_each_file_once(self, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[str] = []

        def watched(path: str, **kwargs: Any) -> Any:
            opened.append(path)
            return safe_open(path, **kwargs)

        monkeypatch.setattr(packed_files, "safe_open", watched)
        load(packed)
        assert [Path(path).name for path in opened] == ["model.safetensors"]

    def test_a_second_import_registers_once(self, packed: Path) -> None:
        code = (
            "import importlib, sys, warnings; warnings.simplefilter('error')\n"
            "from transformers import AutoModelForSeq2SeqLM\n"
            "from hf_nmsparse import packed_files, quantization_config, quantizer, saving\n"
            "for module in (quantization_config, packed_files, saving, quantizer) * 2: importlib.reload(module)\n"
            "config = quantization_config.NMSparseQuantizationConfig(compute='reference')\n"
            "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], quantization_config=config)\n"
            f"print(type(model.get_submodule({FC1!r})).__name__)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(packed)], capture_output=True, text=True, check=False)
        assert done.stdout == "PackedLinear\n", done.stderr[-2000:]


class TestDamage:
    """A file that breaks a rule is refused before a layer is built from it."""

    @pytest.fixture(autouse=True)
    def _no_layer_is_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def never(*args: Any) -> None:
            raise AssertionError("a layer was built from a damaged file")

        monkeypatch.setattr(quantizer, "_empty_packed", never)
        monkeypatch.setattr(quantizer, "unpack", never)

    def refused(self, folder: Path, message: str, needs_model: bool = False) -> None:
        for compute in COMPUTES:
            with pytest.raises(PackedFormatError) as caught:
                load(folder, compute)
            assert message in str(caught.value)
            assert "\n" not in str(caught.value)
        if not needs_model:
            with pytest.raises(PackedFormatError) as caught:
                check_folder(folder)
            assert message in str(caught.value)

    def test_padding_bits(self, tmp_path: Path) -> None:
        save_packed(training(pattern="4:8"), tmp_path)  # 4 codes of 7 bits leave 4 bits of the fourth byte
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[f"{FC1}.weight_indices"][5, 3] |= 1 << 7
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        self.refused(tmp_path, f"model.safetensors: {FC1}.weight_indices: padding bits at the end of a row must be 0")

    @pytest.mark.parametrize("length", [0, 7, 100, -1])
    def test_truncated(self, packed: Path, tmp_path: Path, length: int) -> None:
        folder = tmp_path / "m"
        shutil.copytree(packed, folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:length])
        self.refused(folder, "model.safetensors: the file is not a whole safetensors file (")

    def test_a_header_that_promises_more_than_the_file_holds(self, packed: Path, tmp_path: Path) -> None:
        folder = tmp_path / "m"
        shutil.copytree(packed, folder)
        header = json.dumps(
            {f"{FC1}.weight_indices": {"dtype": "U8", "shape": [2**40, 3], "data_offsets": [0, 3 * 2**40]}}
        )
        content = len(header).to_bytes(8, "little") + header.encode()
        (folder / "model.safetensors").write_bytes(content + bytes(12))
        self.refused(folder, "model.safetensors: the file is not a whole safetensors file (")

    def test_a_damaged_shard_is_named(self, sharded: Path, tmp_path: Path) -> None:
        folder = tmp_path / "m"
        shutil.copytree(sharded, folder)
        where = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        shard = where[f"{FC1}.weight_indices"]
        tensors = load_file(folder / shard)
        tensors[f"{FC1}.weight_indices"][3, 0] |= 7
        save_file(tensors, folder / shard, {"format": "pt"})
        self.refused(folder, f"{FC1}.weight_indices: codes of 2:4 are 0 to 5, got 7")

    def test_a_pickle_is_not_read(self, packed: Path, tmp_path: Path) -> None:
        folder = tmp_path / "m"
        shutil.copytree(packed, folder)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        self.refused(folder, "pytorch_model.bin: a sparse checkpoint is a safetensors file", needs_model=True)
        with pytest.raises(PackedFormatError, match=r"^model\.safetensors: there is no such file in the folder"):
            check_folder(folder)


class TestCheckFolder:
    def test_summary(self, packed: Path, sharded: Path, tmp_path: Path) -> None:
        summary = check_folder(packed)
        model = build()
        dense = sum(tensor.nbytes for tensor in set(model.state_dict(keep_vars=True).values()))
        sparse = 16 * (32 * 32) + 4 * (2 * 64 * 32) + 8 * (32 * 32)  # self-attention, feed-forward, cross-attention
        assert summary.pattern == NMPattern(2, 4)
        assert (summary.values, summary.targets, summary.ignored) == ("fp32", None, None)
        assert (summary.producer, summary.format_version) == ("hf-nmsparse 0.1.0", 1)
        assert summary.layers == {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        assert summary.packed_bytes == sum(t.nbytes for t in load_file(packed / "model.safetensors").values())
        assert summary.dense_bytes - summary.packed_bytes == sparse * 4 // 2 - sparse * 3 // 32
        assert dense - summary.dense_bytes == unsaved_bytes(model, packed)
        assert check_folder(str(sharded)) == summary
        save_packed(training(targets=["fc1"], ignore=["decoder"]), tmp_path)
        summary = check_folder(tmp_path)
        assert (summary.targets, summary.ignored) == (("fc1",), ("decoder",))
        assert list(summary.layers) == ["model.encoder.layers.0.fc1", "model.encoder.layers.1.fc1"]

    def test_folders_that_are_not_packed(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^check_folder: \S+ holds no config\.json, so no saved model$"):
            check_folder(tmp_path / "none")
        for name, model in (("dense", build()), ("training", training())):
            model.save_pretrained(tmp_path / name)
            with pytest.raises(ValueError, match=rf"^check_folder: \S+{name} holds no packed model; save_packed\("):
                check_folder(tmp_path / name)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ("{", "model.safetensors.index.json: the file is no JSON"),
            ("[" * 100_000, "model.safetensors.index.json: the file is no JSON"),
            ("[]", "model.safetensors.index.json: the file is no JSON object"),
            ("{}", "model.safetensors.index.json: weight_map is missing"),
            (
                '{"weight_map": {"a": "../other/model.safetensors"}}',
                "../other/model.safetensors: there is no such file",
            ),
            ('{"weight_map": {"a": "model-2.safetensors"}}', "model-2.safetensors: there is no such file"),
            ('{"weight_map": {"a": 3}}', "3: there is no such file in the folder"),
        ],
    )
    def test_indices_that_break_a_rule(self, packed: Path, tmp_path: Path, index: str, message: str) -> None:
        (tmp_path / "m").mkdir()
        (tmp_path / "other").mkdir()
        shutil.copy(packed / "config.json", tmp_path / "m")
        shutil.copy(packed / "model.safetensors", tmp_path / "other")
        (tmp_path / "m" / "model.safetensors.index.json").write_text(index, encoding="utf-8")
        with pytest.raises(PackedFormatError) as caught:
            check_folder(tmp_path / "m")
        assert str(caught.value).startswith(message)


def unsaved_bytes(model: Any, folder: Path) -> int:
    saved = {key.removesuffix("_indices") for key in load_file(folder / "model.safetensors")}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    kept = {id(state[key]) for key in saved}
    return sum(tensor.nbytes for tensor in {id(t): t for t in state.values() if id(t) not in kept}.values())


@pytest.mark.parametrize("values", ["fp32", "int8"])
@pytest.mark.parametrize("compute", ["auto", "dense", "reference"])
def test_parameters_are_those_of_the_dense_model(compute: str, values: str, tmp_path: Path) -> None:
    save_packed(training(), tmp_path, values)
    stock, model = build(), load(tmp_path, compute)
    embeddings = stock.num_parameters() - stock.num_parameters(exclude_embeddings=True)
    again = pickle.loads(pickle.dumps(model))
    for loaded in (model, copy.deepcopy(model), again):
        assert loaded.num_parameters() == stock.num_parameters()
        assert loaded.num_parameters(exclude_embeddings=True) == stock.num_parameters() - embeddings
    changed = copy.deepcopy(model)
    set_compute(changed, "dense")
    changed.resize_token_embeddings(110)
    assert changed.num_parameters() == stock.num_parameters() + 10 * 32
    assert model.num_parameters() == stock.num_parameters()
    assert "num_parameters" not in model.dequantize().__dict__


class TestPrepareForTraining:
    @pytest.mark.parametrize("compute", COMPUTES)
    def test_an_ordinary_model_with_sparse_layers(
        self, packed: Path, expected: Tensor, compute: str, tmp_path: Path
    ) -> None:
        model = load(packed, compute)
        prepare_for_training(model)
        assert {type(model.get_submodule(name)) for name in sparse_layers(model)} == {NMLinear}
        assert not model.is_quantized
        assert getattr(model, "hf_quantizer", None) is None
        assert not hasattr(model, "quantization_method")
        assert model.config.quantization_config == {"quant_method": "nmsparse", "format": "dense", "pattern": "2:4"}
        assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "embed" not in name)
        assert torch.equal(logits(model), expected)
        save_packed(model, tmp_path / "again")
        assert same_files(packed, tmp_path / "again")
        prepare_for_training(model)  # nothing is left to do

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        SparseStep(model, optimizer, "sr-ste", decay=2e-4)
        before = model.get_parameter(f"{FC1}.weight").detach().clone()
        model.train()(input_ids=torch.tensor([[5, 2]]), labels=torch.tensor([[6, 2]])).loss.backward()
        optimizer.step()
        after = model.get_parameter(f"{FC1}.weight")
        assert not torch.equal(after, before)
        assert after[before == 0].any()  # pruned weights are trained like all others

    def test_rules_come_along(self, tmp_path: Path) -> None:
        save_packed(training(targets=["fc1", "fc2"], ignore=["decoder"]), tmp_path)
        model = load(tmp_path)
        prepare_for_training(model)
        assert model.config.quantization_config == {
            "quant_method": "nmsparse",
            "format": "dense",
            "pattern": "2:4",
            "targets": ["fc1", "fc2"],
            "ignore": ["decoder"],
        }
        assert [name for name in sparse_layers(model) if "decoder" in name or "fc" not in name] == []

    def test_rules_that_do_not_fit_become_the_names_of_the_layers(self, tmp_path: Path) -> None:
        save_packed(training(targets=["model.encoder.*"]), tmp_path)
        base = load(tmp_path, cls=hf.AutoModel)
        names = list(sparse_layers(base))
        assert names[0] == "encoder.layers.0.self_attn.k_proj"
        prepare_for_training(base)
        assert list(sparse_layers(base)) == names
        again = copy.deepcopy(build().model)
        sparsify(
            again,
            NMSparseConfig.from_dict(
                {key: base.config.quantization_config[key] for key in ("pattern", "targets", "ignore")}
            ),
        )
        assert list(sparse_layers(again)) == names

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="prepare_for_training: the model was not loaded from a packed checkpoint"):
            prepare_for_training(build())


class TestCheckpointsOfTheTraining:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_they_load_ready_to_train(self, family: str, tmp_path: Path) -> None:
        model = training(family, pattern="1:4")
        model.save_pretrained(tmp_path / "first")
        assert record_of(tmp_path / "first") == {"quant_method": "nmsparse", "format": "dense", "pattern": "1:4"}
        loaded, info = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "first", output_loading_info=True)
        assert {key: len(found) for key, found in info.items()} == dict.fromkeys(info, 0)
        assert sparse_layers(loaded) == sparse_layers(model)
        assert {type(loaded.get_submodule(name)) for name in sparse_layers(loaded)} == {NMLinear}
        assert not loaded.is_quantized
        assert getattr(loaded, "hf_quantizer", None) is None
        assert loaded.config.quantization_config == model.config.quantization_config
        assert torch.equal(logits(loaded), logits(model))
        loaded.float().save_pretrained(tmp_path / "second")
        assert same_files(tmp_path / "first", tmp_path / "second")

    def test_rules_are_kept(self, tmp_path: Path) -> None:
        model = training(targets=["fc1"], ignore=["decoder"])
        model.save_pretrained(tmp_path)
        loaded = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        assert list(sparse_layers(loaded)) == ["model.encoder.layers.0.fc1", "model.encoder.layers.1.fc1"]
        assert record_of(tmp_path)["ignore"] == ["decoder"]

    def test_a_choice_to_compute_changes_nothing(self, tmp_path: Path) -> None:
        training().save_pretrained(tmp_path)
        assert isinstance(load(tmp_path, "reference").get_submodule(FC1), NMLinear)

    def test_a_state_dict_that_is_given_is_what_is_saved(self, packed: Path, tmp_path: Path) -> None:
        training().save_pretrained(tmp_path / "first")
        prepared = load(packed)
        prepare_for_training(prepared)
        for model in (hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "first"), prepared):
            gathered = copy.deepcopy(dict(model.state_dict()))  # tied tensors stay tied
            gathered[f"{FC1}.weight"] += 1
            model.save_pretrained(tmp_path / "second", state_dict=gathered)
            saved = load_file(tmp_path / "second/model.safetensors")
            assert torch.equal(saved[f"{FC1}.weight"], gathered[f"{FC1}.weight"])
            assert not any(key.endswith("_indices") for key in saved)

    @pytest.mark.parametrize("start", ["packed", "training"])
    def test_the_stock_trainer_trains_and_saves_them(self, packed: Path, start: str, tmp_path: Path) -> None:
        if start == "packed":
            model = load(packed)
            prepare_for_training(model)
        else:
            training().save_pretrained(tmp_path / "start")
            model = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "start")
        args = hf.Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1, use_cpu=True, disable_tqdm=True
        )
        rows = [{"input_ids": [5, 6, 2], "labels": [7, 8, 2]}] * 4
        trainer = hf.Seq2SeqTrainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        last = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run/checkpoint-2")
        assert sparse_layers(last) == sparse_layers(model)
        assert all(torch.equal(tensor, last.state_dict()[key]) for key, tensor in model.state_dict().items())
        resumed = hf.Seq2SeqTrainer(
            model=hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run/checkpoint-1"),
            args=args,
            train_dataset=rows,
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
        assert all(torch.equal(t, resumed.model.state_dict()[key]) for key, t in model.state_dict().items())


class TestExportDense:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_stock_checkpoint(self, family: str, tmp_path: Path) -> None:
        build(family).save_pretrained(tmp_path / "stock")
        model = training(family)
        export_dense(model, tmp_path / "dense")
        assert record_of(tmp_path / "dense") is None
        stock, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "dense"))
        assert {key: tensor.shape for key, tensor in stock.items()} == {key: t.shape for key, t in dense.items()}
        for name, pattern in sparse_layers(model).items():
            groups = dense[f"{name}.weight"].reshape(-1, pattern.m)
            assert ((groups != 0).sum(dim=1) == pattern.n).all()
            assert not torch.signbit(groups[groups == 0]).any()
        loaded = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense")
        assert sparse_layers(loaded) == {}
        assert not hasattr(loaded, "hf_quantizer")
        assert torch.equal(logits(loaded), logits(masked(model)))
        assert isinstance(next(m for m in model.modules() if isinstance(m, NMLinear)), NMLinear)

    @pytest.mark.parametrize("compute", COMPUTES)
    def test_of_a_packed_model(self, packed: Path, compute: str, tmp_path: Path) -> None:
        export_dense(training(), tmp_path / "trained")
        loaded = load(packed, compute)
        export_dense(loaded, tmp_path / "loaded")
        assert same_files(tmp_path / "trained", tmp_path / "loaded")
        assert loaded.is_quantized
        export_dense(loaded, tmp_path / "shards", max_shard_size="8KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2

    def test_a_dense_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"the model has no sparse layer; model\.save_pretrained\(path\) writes"):
            export_dense(build(), tmp_path)


class TestPushToHub:
    """What is refused before the Hub is asked; the pushes themselves are in test_hub."""

    def test_refusals(self, packed: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^push_to_hub: \S+ is written already; give values to save_packed"):
            push_to_hub(packed, "a/b", values="bf16")
        with pytest.raises(ValueError, match=r"is written already; give max_shard_size to save_packed"):
            push_to_hub(str(packed), "a/b", max_shard_size="8KB")
        with pytest.raises(ValueError, match=r"holds no config\.json, so no saved model"):
            push_to_hub(tmp_path, "a/b")
        with pytest.raises(ValueError, match="this model has none; call sparsify"):
            push_to_hub(build(), "a/b")
        training().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds no packed model"):
            push_to_hub(tmp_path, "a/b")


def test_negative_zeros_survive(tmp_path: Path) -> None:
    model = training()
    with torch.no_grad():
        model.get_parameter(f"{FC1}.weight").copy_(torch.tensor([-0.0, 0.0, 0.0, -2.0]).repeat(64, 8))
    save_packed(model, tmp_path)
    for compute in COMPUTES:
        loaded = load(tmp_path, compute)
        set_compute(loaded, "dense")
        weight = loaded.get_parameter(f"{FC1}.weight").detach()
        assert same_bits(weight, torch.tensor([-0.0, 0.0, 0.0, -2.0]).repeat(64, 8))
