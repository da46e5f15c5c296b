"""From a trained model to the file and back, beside what test_quantizer asks: kernels, int8, copies, offloading."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForSeq2SeqLM, MarianMTModel

from hf_nmsparse.compute import set_compute
from hf_nmsparse.kernels import library
from hf_nmsparse.layers import sparse_layers
from hf_nmsparse.packed_layers import Int8Head, KernelLinear
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.saving import export_dense, save_packed
from hf_nmsparse.sparse_model import finalize
from tests.packed_models import BUILDERS, contents, output, sparse
from tests.processes import in_a_fresh_one

FC1 = "model.encoder.layers.0.fc1"


def load(path: Path, compute: str | None = None, kind: Any = AutoModelForSeq2SeqLM, **kwargs: Any) -> Any:
    if compute is not None:
        kwargs["quantization_config"] = NMSparseQuantizationConfig(compute)
    return kind.from_pretrained(path, **kwargs)


# What each way to compute adds to the rounding of the file, in norm: sums in another order; bf16 values; int8 values,
# activations and head.
BOUNDS = {"auto": 1e-6, "fp32": 1e-6, "bf16": 3e-3, "int8": 4e-2}


@pytest.mark.skipif(library.status().library is None, reason=library.status().reason)
@pytest.mark.parametrize("compute", BOUNDS)
@pytest.mark.parametrize("family", BUILDERS)
def test_kernels_compute_nearly_that(family: str, compute: str, tmp_path: Path) -> None:
    model = sparse(family)
    save_packed(model, tmp_path / "a")
    loaded = load(tmp_path / "a", compute)
    expected = output(model)
    assert float((output(loaded) - expected).norm() / expected.norm()) < BOUNDS[compute]
    assert {type(loaded.get_submodule(name)) for name in sparse_layers(model)} == {KernelLinear}
    assert type(loaded.get_output_embeddings()) is (Int8Head if compute == "int8" else nn.Linear)
    loaded.save_pretrained(tmp_path / "b")
    save_packed(loaded, tmp_path / "c")
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    if BOUNDS[compute] < 1e-5:  # the others hold rounded values, and write them
        assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.skipif(library.status().library is None, reason=library.status().reason)
@pytest.mark.parametrize("embeddings", ["int8", "float"])
@pytest.mark.parametrize("family", BUILDERS)
def test_int8_file(family: str, embeddings: str, tmp_path: Path) -> None:
    model = sparse(family)
    expected = output(model)
    save_packed(model, tmp_path / "a", values="int8", embeddings=embeddings)
    tensors = load_file(tmp_path / "a/model.safetensors")
    names = sparse_layers(model)
    assert {tensors[f"{name}.weight"].dtype for name in names} == {torch.int8}
    scaled = {key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")}
    assert bool(scaled - names.keys()) == (embeddings == "int8")
    outputs = {}
    for compute in ("auto", "int8", "dense", "reference", "fp32"):
        loaded = load(tmp_path / "a", compute)
        outputs[compute] = output(loaded)
        assert float((outputs[compute] - expected).norm() / expected.norm()) < BOUNDS["int8"]
        if compute in ("auto", "int8", "reference"):
            loaded.save_pretrained(tmp_path / compute)
            assert contents(tmp_path / "a") == contents(tmp_path / compute)
    assert torch.equal(outputs["auto"], outputs["int8"])
    assert torch.equal(outputs["dense"], outputs["reference"])
    for close in ("fp32",):
        assert float((outputs[close] - outputs["dense"]).norm() / outputs["dense"].norm()) < 1e-6


@pytest.mark.skipif(library.status().library is None, reason=library.status().reason)
def test_an_int8_head_changes_no_file(tmp_path: Path) -> None:
    save_packed(sparse(), tmp_path / "a")
    config = NMSparseQuantizationConfig(head="int8")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "a", quantization_config=config)
    head = loaded.get_output_embeddings()
    assert type(head) is Int8Head
    assert head.weight is loaded.get_input_embeddings().weight
    loaded.save_pretrained(tmp_path / "b")
    save_packed(loaded, tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    copied, pickled = copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))
    assert torch.equal(output(copied), output(loaded))
    assert torch.equal(output(pickled), output(loaded))
    set_compute(loaded, "dense")
    assert type(loaded.get_output_embeddings()) is nn.Linear


@pytest.mark.skipif(library.status().library is None, reason=library.status().reason)
def test_every_switch_from_mode_to_mode(tmp_path: Path) -> None:
    model = sparse()
    expected = output(model)
    save_packed(model, tmp_path)
    modes = ("auto", "fp32", "bf16", "int8", "dense", "reference")
    for first in modes:
        for second in modes:
            loaded = load(tmp_path, first)
            set_compute(loaded, second)
            rounded = max(BOUNDS.get(mode, 0.0) for mode in (first, second))
            assert float((output(loaded) - expected).norm() / expected.norm()) <= 2 * rounded, (first, second)


@pytest.mark.parametrize("compute", ["dense", "reference"])
@pytest.mark.parametrize("values", ["fp16", "bf16"])
def test_half_the_width(values: str, compute: str, tmp_path: Path) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[values]
    model = sparse()
    with torch.no_grad():  # equal in 16 bits, and in the master the later two are larger
        model.get_submodule(FC1).weight[0, :4] = torch.tensor([1.0, 1.0, 1.0 + 2**-16, -1.0 - 2**-16])
    save_packed(model, tmp_path / "a", values=values)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a/model.safetensors").values()} == {dtype, torch.uint8}
    loaded = load(tmp_path / "a", compute)
    assert loaded.dtype == dtype
    finalize(model)
    stock = MarianMTModel(loaded.config).eval()
    stock.load_state_dict(model.state_dict())
    assert torch.equal(output(loaded), output(stock.to(dtype)))
    set_compute(loaded, "dense")
    assert loaded.get_submodule(FC1).weight[0, :4].tolist() == [0.0, 0.0, 1.0, -1.0]
    loaded.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("compute", ["dense", "reference"])
def test_t5_computes_wo_in_fp32_and_its_file_stays_in_fp16(compute: str, tmp_path: Path) -> None:
    save_packed(sparse("t5"), tmp_path / "a", values="fp16")
    loaded = load(tmp_path / "a", compute)
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_35_of_64_bytes(tmp_path: Path) -> None:
    model = sparse()
    save_packed(model, tmp_path, values="bf16")
    tensors = load_file(tmp_path / "model.safetensors")
    names = sparse_layers(model)
    packed = sum(tensors[f"{name}.weight{suffix}"].nbytes for name in names for suffix in ("", "_indices"))
    assert packed * 64 == sum(model.get_submodule(name).weight.numel() * 2 for name in names) * 35


@pytest.mark.parametrize("compute", ["dense", "reference"])
def test_every_door(compute: str, tmp_path: Path) -> None:
    model = sparse()
    save_packed(model, tmp_path / "whole")
    save_packed(model.model, tmp_path / "base")
    named = load(tmp_path / "whole", compute, MarianMTModel)
    assert torch.equal(output(named), output(model))
    assert sparse_layers(named) == sparse_layers(model)
    base = load(tmp_path / "whole", compute, AutoModel)
    assert torch.equal(output(base), output(model.model))
    assert sparse_layers(base) == sparse_layers(model.model)
    assert torch.equal(output(load(tmp_path / "base", compute).model), output(model.model))
    tokens = torch.tensor([[5, 6, 7, 1]])
    whole = load(tmp_path / "whole", compute)
    assert torch.equal(whole.generate(tokens, max_length=6), model.generate(tokens, max_length=6))


@pytest.mark.parametrize("compute", ["dense", "reference"])
def test_offloaded_to_disk(compute: str, tmp_path: Path) -> None:
    model = sparse("m2m100")
    save_packed(model, tmp_path / "a", max_shard_size="20KB")
    tied = ("model.shared", "model.decoder.embed_tokens", "lm_head")  # which transformers cannot split over places
    others = ("model.encoder", "model.decoder.embed_positions", "model.decoder.layer_norm")
    places = {**dict.fromkeys(tied + others, "cpu"), "model.decoder.layers": "disk"}
    loaded = load(tmp_path / "a", compute, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(output(loaded), output(model))
    for save in (save_packed, export_dense, lambda model, path: model.save_pretrained(path)):
        with pytest.raises(ValueError, match="is offloaded; load the model without offloading"):
            save(loaded, tmp_path / "b")
    with pytest.raises(ValueError, match="is offloaded; load the model again"):
        set_compute(loaded, "reference" if compute == "dense" else "dense")


@pytest.mark.parametrize("compute", ["dense", "reference"])
def test_copies_of_a_loaded_model(compute: str, tmp_path: Path) -> None:
    save_packed(sparse(), tmp_path / "a")
    loaded = load(tmp_path / "a", compute)
    for place, copied in enumerate((copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)))):
        assert torch.equal(output(copied), output(loaded))
        copied.save_pretrained(tmp_path / str(place))
        assert contents(tmp_path / "a") == contents(tmp_path / str(place))


def test_a_process_without_the_package_fails_loudly(tmp_path: Path) -> None:
    save_packed(sparse(), tmp_path)
    code = """
import sys
from transformers import AutoModel, AutoModelForSeq2SeqLM, MarianMTModel
for kind in (AutoModel, AutoModelForSeq2SeqLM, MarianMTModel):
    try:
        kind.from_pretrained(sys.argv[1])
    except RuntimeError as error:
        assert "mismatch" in str(error), error
    else:
        sys.exit(f"{kind.__name__} loaded a packed file")
assert "hf_nmsparse" not in sys.modules
"""
    in_a_fresh_one("-c", code, tmp_path, cwd=tmp_path)
