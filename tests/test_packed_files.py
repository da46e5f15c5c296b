"""Checkpoints that lack something, or hold what is no number, are refused in every form and by every door."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_nmsparse import NMSparseConfig, NMSparseQuantizationConfig, PackedFormatError, save_packed, sparsify
from hf_nmsparse.packed_files import check_folder
from tests.tiny import bart, hf, t5

BART, T5 = bart(100, d_model=32, layers=1) | {"forced_eos_token_id": None}, t5(100, d_model=32, layers=1)
FAMILIES: dict[str, Callable[[], Any]] = {
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**BART)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**BART)),
    "m2m100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**BART)),
    "pegasus": lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**BART)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5-untied": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, tie_word_embeddings=False)),
}
FC1 = "model.encoder.layers.0.fc1"


def save(folder: Path, form: str, family: str = "marian", **kwargs: Any) -> Any:
    """Saves a tiny sparse model as packed values of ``form``, or as a checkpoint of the training."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    sparsify(model, NMSparseConfig("2:4"))
    if form == "training":
        model.save_pretrained(folder, **kwargs)
    else:
        save_packed(model, folder, values=form, **kwargs)
    return model


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a checkpoint of one file whose tensors ``change`` has had."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path, compute: str = "auto", cls: Any = hf.AutoModelForSeq2SeqLM, **kwargs: Any) -> Any:
    return cls.from_pretrained(folder, quantization_config=NMSparseQuantizationConfig(compute=compute), **kwargs)


class TestWhatIsMissing:
    @pytest.mark.parametrize("form", ["fp32", "int8", "training"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_tensor_of_any_kind(self, family: str, form: str, tmp_path: Path) -> None:
        model = save(tmp_path / "whole", form, family)
        kinds = {
            re.sub(r"(en|de)coder|\d+|[qkvo]_proj|[qkvo]\\b", "", key): key
            for key in load_file(tmp_path / "whole/model.safetensors")
        }
        assert len(kinds) > 8
        for key in kinds.values():

            def lose(tensors: dict[str, Tensor], key: str = key) -> None:
                del tensors[key]

            folder = changed(tmp_path / "whole", tmp_path / "changed", lose)
            if family == "pegasus" and "embed_positions" in key:  # which the model computes: no number is lost
                assert torch.equal(load(folder).get_parameter(key), model.get_parameter(key))
                continue
            with pytest.raises(PackedFormatError, match=r"^[^\n]+$") as caught:
                load(folder)
            assert key in str(caught.value) or key.rpartition(".")[0] in str(caught.value)

    @pytest.mark.parametrize("compute", ["auto", "dense", "reference"])
    @pytest.mark.parametrize("cls", [hf.AutoModelForSeq2SeqLM, hf.MarianMTModel, hf.AutoModel])
    @pytest.mark.parametrize(
        "lost", [f"{FC1}.", f"{FC1}.bias", "model.decoder.", "model.encoder.layers.0.final_layer_norm.bias"]
    )
    def test_by_any_door(self, lost: str, cls: Any, compute: str, tmp_path: Path) -> None:
        def lose(tensors: dict[str, Tensor]) -> None:
            for key in [key for key in tensors if key.startswith(lost)]:
                del tensors[key]

        save(tmp_path / "whole", "fp32")
        folder = changed(tmp_path / "whole", tmp_path / "changed", lose)
        with pytest.raises(
            PackedFormatError, match=r"^model.safetensors: \S+ (is|and \d+ more tensors are) missing; save the"
        ):
            load(folder, compute, cls)

    def test_in_shards_and_spread_over_devices(self, tmp_path: Path) -> None:
        save(tmp_path, "fp32", max_shard_size="20KB")
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        lost = content["weight_map"][f"{FC1}.bias"]
        content["weight_map"] = {key: file for key, file in content["weight_map"].items() if file != lost}
        index.write_text(json.dumps(content))
        for device_map in (None, "auto", "cpu"):
            with pytest.raises(PackedFormatError, match="missing; save the whole model again"):
                load(tmp_path, device_map=device_map)

    def test_what_transformers_makes_itself_may_be_missing(self, tmp_path: Path) -> None:
        model = save(tmp_path / "whole", "fp32")
        assert not any("embed_positions" in key for key in load_file(tmp_path / "whole/model.safetensors"))
        base = load(tmp_path / "whole", cls=hf.AutoModel)
        table = base.encoder.embed_positions.weight
        assert torch.equal(table, model.model.encoder.embed_positions.weight)
        base.save_pretrained(tmp_path / "base")  # has no bias of the logits, which are zeros then
        assert not load(tmp_path / "base").final_logits_bias.any()
        del base

        def another_tie(tensors: dict[str, Tensor]) -> None:
            tensors["lm_head.weight"] = tensors.pop("model.shared.weight")

        again = load(changed(tmp_path / "whole", tmp_path / "tied", another_tie))
        assert torch.equal(again.model.shared.weight, model.model.shared.weight)

    def test_tables_that_transformers_computes_may_be_missing_from_a_decoder(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        apart = BART | {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
        model = hf.MarianMTModel(hf.MarianConfig(**apart, decoder_vocab_size=100))
        sparsify(model, NMSparseConfig("2:4"))
        save_packed(model, tmp_path, "fp32")
        decoder = load(tmp_path, "dense", hf.MarianForCausalLM)
        expected = model.model.decoder.embed_positions.weight
        assert torch.equal(decoder.model.decoder.embed_positions.weight, expected)

    def test_a_bias_of_the_logits_is_none_of_that(self, tmp_path: Path) -> None:
        save(tmp_path / "whole", "fp32")
        folder = changed(tmp_path / "whole", tmp_path / "changed", lambda tensors: tensors.pop("final_logits_bias"))
        with pytest.raises(PackedFormatError, match="final_logits_bias is missing"):
            load(folder)


@pytest.mark.parametrize("form", ["fp32", "int8", "training"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_keys_that_carry_a_wrappers_prefix_are_refused(prefix: str, form: str, tmp_path: Path) -> None:
    def wrap(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[prefix + key] = tensors.pop(key)

    save(tmp_path / "whole", form)
    folder = changed(tmp_path / "whole", tmp_path / "changed", wrap)
    reason = f"the keys begin with '{prefix.partition('.')[0]}.'"
    with pytest.raises(PackedFormatError, match=reason):
        load(folder)
    if form != "training":
        with pytest.raises(PackedFormatError, match=reason):
            check_folder(folder)


def _nan(tensor: Tensor) -> Tensor:
    return tensor.index_fill(0, torch.tensor([0]), float("nan"))


def _infinity(tensor: Tensor) -> Tensor:
    return tensor.index_fill(0, torch.tensor([0]), float("-inf"))


def _integers(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32)


def _eight_bits(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("damage", [_nan, _infinity, _integers, _eight_bits])
@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
def test_what_stands_beside_packed_weights_is_finite_and_floating_point(
    form: str, damage: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    save(tmp_path / "whole", form, embeddings="float" if form == "int8" else None)
    keys = (
        f"{FC1}.bias",
        "model.encoder.layers.0.final_layer_norm.weight",
        "model.decoder.layers.0.final_layer_norm.bias",
        "model.shared.weight",
    )
    for key in keys:

        def hurt(tensors: dict[str, Tensor], key: str = key) -> None:
            tensors[key] = damage(tensors[key])

        folder = changed(tmp_path / "whole", tmp_path / "changed", hurt)
        for read in (load, check_folder):
            with pytest.raises(PackedFormatError, match=rf"^model.safetensors: {re.escape(key)}: [^\n]+$"):
                read(folder)


@pytest.mark.parametrize("damage", [_nan, _infinity, _integers, _eight_bits])
def test_a_checkpoint_of_the_training_is_finite_and_floating_point(
    damage: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    save(tmp_path / "whole", "training")
    for key in (f"{FC1}.weight", f"{FC1}.bias", "model.shared.weight"):

        def hurt(tensors: dict[str, Tensor], key: str = key) -> None:
            tensors[key] = damage(tensors[key])

        folder = changed(tmp_path / "whole", tmp_path / "changed", hurt)
        with pytest.raises(PackedFormatError, match=rf"^model.safetensors: {re.escape(key)}: [^\n]+$"):
            hf.AutoModelForSeq2SeqLM.from_pretrained(folder)


class TestIndices:
    def test_an_index_without_metadata(self, tmp_path: Path) -> None:
        save(tmp_path, "fp32", max_shard_size="20KB")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
        with pytest.raises(PackedFormatError, match=r"^model.safetensors.index.json: metadata is missing; save"):
            check_folder(tmp_path)

    def test_an_index_that_names_files_elsewhere(self, tmp_path: Path) -> None:
        save(tmp_path / "other", "fp32", max_shard_size="20KB")
        for form in ("fp32", "training"):
            model = tmp_path / form
            save(model, form, max_shard_size="20KB")
            index = model / "model.safetensors.index.json"
            content = json.loads(index.read_text())
            for elsewhere in ("../other/", f"{tmp_path}/other/", f"../{form}/../other/"):
                named = {key: elsewhere + file for key, file in content["weight_map"].items()}
                index.write_text(json.dumps({**content, "weight_map": named}))
                with pytest.raises(PackedFormatError, match="is not in the folder of the model"):
                    load(model)
        with pytest.raises(PackedFormatError, match="there is no such file in the folder"):
            check_folder(tmp_path / "fp32")

    def test_a_path_with_dots_in_it_is_a_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(tmp_path / "model", "fp32", max_shard_size="20KB")
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        for path in ("../model", f"{tmp_path}/work/../model"):
            load(Path(path))
            load(Path(path), subfolder="")
        load(Path(".."), subfolder="model")

    @pytest.mark.parametrize("change", ["renamed", "moved", "left out"])
    def test_an_index_that_does_not_fit_its_files(self, change: str, tmp_path: Path) -> None:
        save(tmp_path, "fp32", max_shard_size="20KB")
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        key, files = f"{FC1}.bias", content["weight_map"]
        file = files.pop(key)
        if change == "renamed":
            files[f"{FC1}.bia"] = file
        elif change == "moved":
            files[key] = next(other for other in files.values() if other != file)
        index.write_text(json.dumps(content))
        with pytest.raises(
            PackedFormatError, match=rf"^model.safetensors.index.json: {FC1}.bia\S* is in .* the index says"
        ):
            check_folder(tmp_path)

    def test_a_tensor_that_two_shards_hold(self, tmp_path: Path) -> None:
        save(tmp_path, "fp32", max_shard_size="20KB")
        first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
        save_file({**load_file(second), **load_file(first)}, second, {"format": "pt"})
        for read in (load, check_folder):
            with pytest.raises(PackedFormatError, match=r"the tensor is in model-00001-of-\d+.safetensors, too"):
                read(tmp_path)


def test_a_dense_model_of_a_packed_ones_configuration_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    save(tmp_path / "packed", "fp32")
    model = hf.AutoModelForSeq2SeqLM.from_config(hf.AutoConfig.from_pretrained(tmp_path / "packed"))
    model.save_pretrained(tmp_path / "dense")
    loaded = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded.config, "quantization_config")
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    with pytest.raises(PackedFormatError, match="so no layer is packed"):
        check_folder(tmp_path / "dense")
