"""How a loaded model computes, and how it is switched to another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_nmsparse.compute import set_compute
from hf_nmsparse.layers import sparse_layers
from hf_nmsparse.packed_layers import PackedLinear
from hf_nmsparse.quantizer import prepare_for_training
from hf_nmsparse.saving import save_packed
from hf_nmsparse.sparse_model import finalize
from tests.loaded_models import FC1, build, load, logits, masked, same_files, training


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Marian in fp32, in one file."""
    folder = tmp_path_factory.mktemp("packed")
    save_packed(training(), folder)
    return folder


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """What the model in these files says."""
    return logits(masked(training()))


class TestSetCompute:
    def test_there_and_back(self, packed: Path, expected: Tensor, tmp_path: Path) -> None:
        model = load(packed)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        set_compute(model, "reference")
        assert {type(model.get_submodule(name)) for name in sparse_layers(model)} == {PackedLinear}
        assert len(sparse_layers(model)) == 32
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path)
        assert same_files(packed, tmp_path)
        set_compute(model, "reference")
        set_compute(model, "dense")
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert type(model.get_submodule(FC1)) is nn.Linear
        assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize("family", ["marian", "t5"])
    @pytest.mark.parametrize("values", ["fp32", "int8"])
    @pytest.mark.parametrize("compute", ["auto", "dense", "reference"])
    def test_what_is_frozen_stays_so(self, compute: str, values: str, family: str, tmp_path: Path) -> None:
        save_packed(training(family), tmp_path, values)
        for part in ("model", "encoder", "decoder", "nothing"):
            trained = []
            for start, forms in (("dense", ()), (compute, ("dense", "reference", "auto", "dense"))):
                model = load(tmp_path, start)
                if part != "nothing":
                    (model if part == "model" else getattr(model, f"get_{part}")()).requires_grad_(False)
                for form in forms:
                    set_compute(model, form)
                trained.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
            assert trained[0] == trained[1], part
            assert bool(trained[0]) == (part != "model")
        model = load(tmp_path, compute).requires_grad_(False)
        assert not any(parameter.requires_grad for parameter in model.dequantize().parameters())
        model = load(tmp_path, compute).requires_grad_(False)
        prepare_for_training(model)
        assert all(model.get_submodule(name).weight.requires_grad for name in sparse_layers(model))

    @pytest.mark.parametrize("values", ["fp32", "int8"])
    def test_a_number_type_that_no_kernel_knows(self, values: str, tmp_path: Path) -> None:
        save_packed(training(), tmp_path, values)
        message = r"^kernels: models compute in fp32, fp16 or bf16, got torch.float64; .* compute='dense'$"
        for compute in ("auto", "fp32", "int8"):
            with pytest.raises(ValueError, match=message):
                load(tmp_path, compute, dtype=torch.float64)
        model = load(tmp_path, "reference", dtype=torch.float64)
        assert torch.isfinite(logits(model)).all()
        with pytest.raises(ValueError, match=message):
            set_compute(model, "fp32")

    def test_a_change_that_fails_leaves_the_model_as_it_was(self, packed: Path) -> None:
        model = load(packed)
        with torch.no_grad():
            model.get_submodule("model.decoder.layers.1.fc2").weight += 1
        before = logits(model)
        for compute in ("reference", "fp32"):
            message = r"^set_compute: model.decoder.layers.1.fc2.weight breaks 2:4 in 512 .* call finalize\(model\)"
            with pytest.raises(ValueError, match=message):
                set_compute(model, compute)
            assert {type(model.get_submodule(name)) for name in sparse_layers(model)} == {nn.Linear}
            assert model.hf_quantizer.quantization_config.compute == "dense"
            assert torch.equal(logits(model), before)
        finalize(model)
        set_compute(model, "reference")

    def test_a_head_that_is_not_possible_leaves_the_model_as_it_was(
        self, packed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(packed)
        monkeypatch.setattr(model, "get_output_embeddings", nn.Identity)
        with pytest.raises(ValueError, match=r"^head: 'int8' needs an output projection"):
            set_compute(model, "reference", "int8")
        assert {type(model.get_submodule(name)) for name in sparse_layers(model)} == {nn.Linear}

    def test_a_device_map_of_one_device_is_no_offloading(self, packed: Path, expected: Tensor) -> None:
        model = load(packed, device_map="auto")
        set_compute(model, "reference")
        assert torch.equal(logits(model), expected)

    def test_refusals(self, packed: Path) -> None:
        with pytest.raises(
            ValueError,
            match=r"set_compute: compute is one of 'auto', 'fp32', .*'dense', 'reference', got 'fast'",
        ):
            set_compute(load(packed), "fast")
        for model in (build(), training()):
            with pytest.raises(ValueError, match="set_compute: the model was not loaded from a packed checkpoint"):
                set_compute(model, "dense")
