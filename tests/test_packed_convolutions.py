"""Convolutions and transformers' Conv1D in packed files: format version 2, a matrix and a record of its stock shape."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, Wav2Vec2Config, Wav2Vec2ForCTC

from hf_nmsparse import standalone
from hf_nmsparse.checkpoint_fit import model_layer
from hf_nmsparse.compute import set_compute
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.layers import NMConv2d, NMLayer, channel_dim, sparse_layers
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.packed_format import PackedFormatError, matrix_shape
from hf_nmsparse.packing import from_matrix, to_matrix
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.quantizer import prepare_for_training
from hf_nmsparse.saving import export_dense, save_packed
from hf_nmsparse.sparse_model import finalize, report, sparsify
from hf_nmsparse.sparsity_record import SparsityRecord
from tests.tiny import hf, resnet

Tensors = dict[str, Tensor]
CONFIG = NMSparseConfig("2:4", convolutions=True)


def gpt2() -> Any:
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def whisper() -> Any:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 16))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(d_model=16, max_source_positions=10, max_target_positions=10, **sizes, **heads, **tokens)
    )


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "resnet": (resnet, {"pixel_values": torch.ones(2, 1, 8, 8)}),
    "gpt2": (gpt2, {"input_ids": torch.tensor([[3, 4, 5]])}),  # Conv1D
    "whisper": (whisper, {"input_features": torch.ones(1, 8, 20), "decoder_input_ids": torch.tensor([[3, 4]])}),
}
models = pytest.mark.parametrize("name", MODELS)


def training(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    sparsify(model, CONFIG)
    return model


@torch.no_grad()
def output(model: Any, name: str) -> Tensor:
    inputs = {key: x.to(model.dtype) if x.is_floating_point() else x for key, x in MODELS[name][1].items()}
    logits: Tensor = model(**inputs).logits
    return logits


def load(model: Any, folder: Path, compute: str = "auto", **kwargs: Any) -> Any:
    return type(model).from_pretrained(folder, quantization_config=NMSparseQuantizationConfig(compute), **kwargs)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("shape", "dim", "matrix"),
    [((6, 8, 3, 2), 1, (6, 48)), ((6, 8, 1, 1), 1, (6, 8)), ((6, 8, 5), 1, (6, 40)), ((8, 6), 0, (6, 8))],
)
def test_the_matrix_and_back(shape: tuple[int, ...], dim: int, matrix: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    assert to_matrix(weight, dim).shape == matrix == matrix_shape(shape)
    back = from_matrix(to_matrix(weight, dim), weight.shape, dim)
    assert torch.equal(back, weight)
    assert back.stride() == weight.stride()  # by which torch takes the algorithm of a convolution


def test_the_bytes_of_a_convolution_by_hand(tmp_path: Path) -> None:
    """One output channel of a kernel of two places: a row of two groups, the second place after the first."""
    model = resnet(hidden_sizes=[4], depths=[1], embedding_size=4)
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution"
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, :, 0, 0] = torch.tensor([0.0, 1.5, 0.0, -2.0])  # {1, 3} is code 4
        layer.weight[0, :, 0, 1] = torch.tensor([0.5, 0.0, 0.25, 0.0])  # {0, 2} is code 1
    sparsify(model, NMSparseConfig("2:4", [name], convolutions=True))
    save_packed(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors[f"{name}.weight"].shape == (4, 18)
    assert tensors[f"{name}.weight"][0, :4].tolist() == [1.5, -2.0, 0.5, 0.25]
    assert tensors[f"{name}.weight_indices"][0].tolist() == [4 + 1 * 8, 0, 0, 0]
    assert tensors[f"{name}.weight_shape"].tolist() == [4, 4, 3, 3]
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert record["format_version"] == 2
    assert "convolutions" not in record
    summary = check_folder(tmp_path)
    assert (summary.format_version, summary.layers) == (2, {name: (4, 36)})


@models
def test_save_load_and_save_again(name: str, tmp_path: Path) -> None:
    model = training(name)
    expected = output(model, name)
    save_packed(model, tmp_path / "packed")
    check_folder(tmp_path / "packed")
    for compute in ("auto", "dense", "reference"):
        loaded = load(model, tmp_path / "packed", compute)
        assert sparse_layers(loaded) == sparse_layers(model)
        for layer_name, layer in model.named_modules():
            if isinstance(layer, NMLayer) and not isinstance(layer, nn.Linear):
                found: Any = loaded.get_submodule(layer_name)
                assert torch.equal(found.weight, layer.masked(layer.weight.detach(), layer.current_mask()))
                assert type(found) is layer.stock  # computes dense
        torch.testing.assert_close(output(loaded, name), expected, rtol=0, atol=1e-5)
        assert report(loaded).violations == 0
        save_packed(loaded, tmp_path / "again")
        loaded.save_pretrained(tmp_path / "stock verb")
        assert weights(tmp_path / "packed") == weights(tmp_path / "again") == weights(tmp_path / "stock verb")
    save_packed(model, tmp_path / "packed")  # and the same bytes from the training
    assert weights(tmp_path / "packed") == weights(tmp_path / "again")


@models
@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_other_values(name: str, values: str, tmp_path: Path) -> None:
    model = training(name)
    save_packed(model, tmp_path, values, max_shard_size="4KB")
    loaded = load(model, tmp_path)
    torch.testing.assert_close(output(loaded, name).float(), output(model, name), rtol=0, atol=0.02)
    for layer_name in sparse_layers(model):
        layer = model.get_submodule(layer_name)
        if not isinstance(layer, nn.Linear):
            rows = loaded.get_submodule(layer_name).weight.movedim(channel_dim(layer), -1)
            assert (rows != 0).reshape(-1, 4).sum(dim=1).max() == 2


@models
def test_standalone_and_export_are_the_dense_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = training(name)
    save_packed(model, tmp_path / "packed", "int8")
    dense = load(model, tmp_path / "packed", "dense")
    record = standalone.PackedRecord.read(AutoConfig.from_pretrained(tmp_path / "packed").quantization_config, "m")
    found = standalone.dense_tensors(load_file(tmp_path / "packed" / "model.safetensors"), record, "m")
    state = dense.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.items())
    assert all(tensor.stride() == state[key].stride() for key, tensor in found.items())
    export_dense(dense, tmp_path / "dense")
    stock = type(model).from_pretrained(tmp_path / "dense")
    assert torch.equal(output(stock, name), output(dense, name))
    if name == "resnet":
        save_packed(model, tmp_path / "alone", standalone=True)
        assert check_folder(tmp_path / "alone").standalone
        config = json.loads((tmp_path / "alone" / "config.json").read_text())
        assert "AutoModelForImageClassification" in config["auto_map"]
        monkeypatch.delitem(sys.modules, "hf_nmsparse")  # a reader that has it lets it read
        alone = standalone.NMSparseModelForImageClassification.from_pretrained(
            tmp_path / "alone", config=AutoConfig.from_pretrained(tmp_path / "alone", trust_remote_code=False)
        )
        finalize(model)
        assert all(torch.equal(tensor, alone.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_a_training_goes_on_from_packed_and_from_its_checkpoint(tmp_path: Path) -> None:
    model = training("resnet")
    save_packed(model, tmp_path / "packed")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    set_compute(loaded, "reference")  # convolutions stay as they are
    prepare_for_training(loaded)
    assert {name for name, layer in loaded.named_modules() if isinstance(layer, NMConv2d)} == set(sparse_layers(model))
    assert loaded.config.quantization_config["convolutions"] is True
    model.save_pretrained(tmp_path / "masters")
    resumed = type(model).from_pretrained(tmp_path / "masters")
    assert sparse_layers(resumed) == sparse_layers(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_what_a_model_is_built_with_may_be_parametrized(tmp_path: Path) -> None:
    """The positions of wav2vec2 are a convolution under weight_norm, in the model and in its files."""
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        vocab_size=20,
    )
    model = Wav2Vec2ForCTC(config).eval()
    sparsify(model, NMSparseConfig("2:4", convolutions=True))
    save_packed(model, tmp_path / "packed")
    export_dense(model, tmp_path / "dense")
    sound = torch.randn(1, 400)
    for folder in ("packed", "dense"):
        loaded = Wav2Vec2ForCTC.from_pretrained(tmp_path / folder).eval()
        assert torch.equal(loaded(sound).logits, model(sound).logits)


def test_files_of_linear_layers_stay_version_1(tmp_path: Path) -> None:
    model = training("whisper")
    for layer in list(model.modules()):
        if isinstance(layer, NMLayer) and not isinstance(layer, nn.Linear):
            del layer.to_stock().pattern
    save_packed(model, tmp_path)
    assert check_folder(tmp_path).format_version == 1
    assert not any("weight_shape" in key for key in load_file(tmp_path / "model.safetensors"))


def test_version_and_convolutions_agree() -> None:
    assert NMSparseQuantizationConfig(convolutions=True).format_version == 2
    with pytest.raises(ValueError, match="with convolutions True format_version is 2, got 1"):
        NMSparseQuantizationConfig(convolutions=True, format_version=1)
    record = {"quant_method": "nmsparse", "format": "packed", "format_version": 2, "pattern": "2:4", "values": "fp32"}
    assert SparsityRecord.read(record).to_dict() == record
    with pytest.raises(PackedFormatError, match="unknown key 'convolutions'"):
        SparsityRecord.read({**record, "convolutions": True})


def test_what_a_layer_is_to_a_file() -> None:
    kinds = (nn.Linear(4, 2), nn.Conv2d(4, 2, 3), nn.Conv3d(4, 2, 1), nn.Embedding(4, 2), nn.ReLU())
    found = [model_layer(layer) for layer in kinds]
    assert [layer.matrix for layer in found] == [(2, 4), (2, 36), None, None, None]
    assert [layer.convolution for layer in found] == [False, True, False, False, False]


LAYER = "resnet.encoder.stages.1.layers.0.layer.1.convolution"  # [16, 16, 3, 3]
VALUES, CODES, SHAPE = (f"{LAYER}.{leaf}" for leaf in ("weight", "weight_indices", "weight_shape"))


def shape(*sizes: int) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[SHAPE] = torch.tensor(sizes)

    return damage


def put(key: str, tensor: Tensor | None) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor

    return damage


def bad_code(tensors: Tensors) -> None:
    tensors[CODES] |= 7


# Name: the damage, what the package's readers say, and whether the model's own layers are needed to see it.
DAMAGE: dict[str, tuple[Callable[[Tensors], None], str, bool]] = {
    "code": (bad_code, f"{CODES}: codes of 2:4 are 0 to 5, got 7", False),
    "no codes": (put(CODES, None), f"{CODES}: codes are missing beside the shape", False),
    "no values": (put(VALUES, None), f"{VALUES}: values are missing beside the codes", False),
    "no shape": (put(SHAPE, None), f"{SHAPE}: the shape is missing beside the weight of a convolution", True),
    "type of the shape": (
        put(SHAPE, torch.tensor([16, 16, 3, 3], dtype=torch.int32)),
        f"{SHAPE}: shapes are int64 [2] to [4], got I32 [4]",
        False,
    ),
    "matrix": (
        put(SHAPE, torch.ones(2, 2, dtype=torch.int64)),
        f"{SHAPE}: shapes are int64 [2] to [4], got I64",
        False,
    ),
    "one number": (shape(16), f"{SHAPE}: shapes are int64 [2] to [4], got I64 [1]", False),
    "zero": (shape(16, 16, 3, 0), f"{SHAPE}: a shape has positive numbers", False),
    "negative": (shape(16, 16, -3, -3), f"{SHAPE}: a shape has positive numbers", False),
    "huge": (shape(16, 2**62, 3, 3), "the model's layer is ", False),
    "channels": (shape(16, 18, 4, 2), f"{SHAPE}: 18 input channels of [16, 18, 4, 2] make no groups of 2:4", False),
    "another kernel": (shape(16, 16, 9, 1), f"{SHAPE}: the model's layer is Conv2d [16, 16, 3, 3], got ", True),
    "another number of places": (shape(16, 16, 3, 2), "the model's layer is ", False),
    "transposed": (shape(144, 16), f"{SHAPE}: the model's layer is Conv2d [16, 16, 3, 3], got [144, 16]", True),
    "shape of a linear layer": (
        lambda tensors: tensors.update({key.replace(LAYER, "classifier.1"): tensors[key] for key in (VALUES, CODES)}),
        "classifier.1.weight: the model's layer is [10, 16], got values of a layer [16, 144]",
        True,
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_packed(training("resnet"), folder)
    return folder


def alone(folder: Path) -> None:
    record = standalone.PackedRecord.read(AutoConfig.from_pretrained(folder).quantization_config, "m")
    standalone.dense_tensors(load_file(folder / "model.safetensors"), record, "m")


READERS: dict[str, Callable[[Path], Any]] = {
    "dense": lambda folder: load(resnet(), folder, "dense"),
    "reference": lambda folder: load(resnet(), folder, "reference"),
    "check_folder": check_folder,
    "standalone": alone,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(whole: Path, tmp_path: Path, name: str, reader: str) -> None:
    damage, message, needs_the_model = DAMAGE[name]
    if needs_the_model and reader in ("check_folder", "standalone"):
        return  # transformers finds another shape than the model's behind the latter
    folder = shutil.copytree(whole, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        READERS[reader](folder)
    if reader == "standalone":  # with words of its own
        assert LAYER in str(caught.value)
    else:
        assert isinstance(caught.value, PackedFormatError)
        assert message in str(caught.value)


def test_version_1_has_no_shapes(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    for read in (check_folder, lambda folder: load(resnet(), folder)):
        with pytest.raises(PackedFormatError, match="says version 1 of the format, which has no shapes"):
            read(folder)
