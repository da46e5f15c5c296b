"""What is saved is the model itself, whole and in its pattern, whatever is wrapped around it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from hf_nmsparse import (
    NMSparseConfig,
    NMSparseQuantizationConfig,
    export_dense,
    finalize,
    prepare_for_training,
    push_to_hub,
    save_packed,
    saving,
    set_compute,
    sparsify,
)
from hf_nmsparse.kernels import library
from hf_nmsparse.layers import sparse_layers
from hf_nmsparse.masks import count_violations, magnitude_mask, unpack_bits
from hf_nmsparse.packed_layers import KernelLinear, PackedLinear
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.saving import retied
from tests.tiny import hf, marian

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch.compile's own


PATTERN = NMPattern(2, 4)


def sparse(**overrides: Any) -> Any:
    model = marian(**overrides)
    sparsify(model, NMSparseConfig("2:4"))
    return model


def same_files(left: Path, right: Path) -> bool:
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (left, right)]
    return contents[0] == contents[1]


def load(path: Path, compute: str) -> Any:
    how = NMSparseQuantizationConfig(compute=compute)
    return hf.AutoModelForSeq2SeqLM.from_pretrained(path, quantization_config=how)


def _parts(wrap: Callable[[nn.Module], Any]) -> Callable[[Any], Any]:
    """Wraps one side and each layer of the other."""

    def wrapped(model: Any) -> Any:
        model.model.decoder = wrap(model.model.decoder)
        layers = model.model.encoder.layers
        for place, layer in enumerate(layers):
            layers[place] = wrap(layer)
        return model

    return wrapped


def _compiled_twice(model: Any) -> Any:
    return torch.compile(_parts(torch.compile)(model))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compile": torch.compile,
    "data parallel": nn.DataParallel,
    "average": torch.optim.swa_utils.AveragedModel,
    "compile in data parallel": lambda model: nn.DataParallel(torch.compile(model)),
    "data parallel in compile": lambda model: torch.compile(nn.DataParallel(model)),
    "parts compiled": _parts(torch.compile),
    "parts and whole compiled": _compiled_twice,
    "parts checkpointed": _parts(checkpoint_wrapper),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
class TestWrappers:
    def test_a_training_model(self, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
        for save in (save_packed, export_dense):
            save(sparse(), tmp_path / save.__name__)
            wrapped = wrap(sparse())
            save(wrapped, tmp_path / f"{save.__name__} wrapped")
            assert same_files(tmp_path / save.__name__, tmp_path / f"{save.__name__} wrapped")
            given = {key: tensor for key, tensor in wrapped.state_dict().items() if key != "n_averaged"}
            save(wrapped, tmp_path / f"{save.__name__} given", state_dict=given)
            assert same_files(tmp_path / save.__name__, tmp_path / f"{save.__name__} given")

    @pytest.mark.parametrize("values", ["fp32", "int8"])
    @pytest.mark.parametrize("compute", ["auto", "dense", "reference"])
    def test_a_packed_model(self, wrap: Callable[[Any], Any], compute: str, values: str, tmp_path: Path) -> None:
        save_packed(sparse(), tmp_path / "packed", values)
        save_packed(wrap(load(tmp_path / "packed", compute)), tmp_path / "again", values)
        assert same_files(tmp_path / "packed", tmp_path / "again")

    def test_a_packed_model_computes_and_trains(self, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
        save_packed(sparse(), tmp_path)
        wrapped = wrap(load(tmp_path, "reference"))
        set_compute(wrapped, "dense")
        assert {type(module) for module in sparse_modules(wrapped)} == {nn.Linear}
        prepare_for_training(wrapped)
        assert {type(module).__name__ for module in sparse_modules(wrapped)} == {"NMLinear"}


class TestPackedLayers:
    """What is packed stays packed, and the file is the one that packing the dense weights gives."""

    def both_ways(self, model: Any, folder: Path, values: str | None) -> None:
        """Saves a model with packed layers, and with dense ones that hold the same numbers."""
        twin = copy.deepcopy(model)
        for name in sparse_layers(twin):
            layer = twin.get_submodule(name)
            twin.set_submodule(name, layer if type(layer) is nn.Linear else layer.to_linear())
        save_packed(model, folder / "packed again", values)
        save_packed(twin, folder / "dense again", values)
        assert same_files(folder / "packed again", folder / "dense again")

    @pytest.mark.parametrize("values", ["fp32", "fp16", "bf16", "int8"])
    @pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_of_a_loaded_model(self, tied: bool, stored: str, values: str, tmp_path: Path) -> None:
        save_packed(sparse(tie_word_embeddings=tied), tmp_path / "packed", stored)
        self.both_ways(load(tmp_path / "packed", "reference"), tmp_path, values)

    @pytest.mark.parametrize("values", ["fp32", "bf16", "int8"])
    def test_of_a_model_made_by_hand(self, values: str, tmp_path: Path) -> None:
        model = marian()
        for name in ("model.encoder.layers.0.fc1", "model.decoder.layers.1.fc2"):
            layer: Any = model.get_submodule(name)
            mask = unpack_bits(magnitude_mask(layer.weight, PATTERN), layer.weight.shape)
            layer.weight = nn.Parameter(layer.weight.detach() * mask)
            model.set_submodule(name, PackedLinear.from_linear(layer, PATTERN))
        self.both_ways(model, tmp_path, values)

    @pytest.mark.skipif(library.status().library is None, reason=library.status().reason)
    @pytest.mark.parametrize("values", [None, "fp32", "fp16", "int8"])
    @pytest.mark.parametrize("compute", ["fp32", "bf16", "int8"])
    @pytest.mark.parametrize("head", ["dense", "int8"])
    def test_in_the_order_of_a_kernel(self, head: str, compute: str, values: str | None, tmp_path: Path) -> None:
        save_packed(sparse(), tmp_path / "packed")
        config = NMSparseQuantizationConfig(compute=compute, head=head)
        model = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "packed", quantization_config=config)
        assert {type(layer) for layer in sparse_modules(model)} == {KernelLinear}
        if compute == "int8" and values in (None, "int8"):  # dense layers would be rounded once more
            twin = copy.deepcopy(model)
            set_compute(twin, "reference")
            save_packed(model, tmp_path / "again", values)
            save_packed(twin, tmp_path / "unpacked", values)
            assert same_files(tmp_path / "again", tmp_path / "unpacked")
        else:
            for name in sparse_layers(model):
                model.set_submodule(name, model.get_submodule(name).to_packed())
            self.both_ways(model, tmp_path, values)

    def test_nothing_is_packed_once_more(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_packed(sparse(), tmp_path / "packed")
        model = load(tmp_path / "packed", "reference")

        def never(*args: Any) -> None:
            raise AssertionError

        monkeypatch.setattr(saving, "pack", never)
        monkeypatch.setattr(PackedLinear, "dense_weight", never)
        save_packed(model, tmp_path / "again")
        assert same_files(tmp_path / "packed", tmp_path / "again")

    def test_values_that_become_zero_are_packed_as_zeros_are(self, tmp_path: Path) -> None:
        """In a narrower type, or because they were trained."""
        save_packed(sparse(), tmp_path / "packed")
        model = load(tmp_path / "packed", "reference")
        layer = model.get_submodule("model.encoder.layers.0.fc1")
        with torch.no_grad():
            layer.weight[:, 1] = 1e-12
            layer.weight[:, 3] = -1e-12
            layer.weight[:, 4] = 0.0
        self.both_ways(model, tmp_path, "fp16")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda layer: layer.weight_indices.fill_(255), r"weight_indices: codes of 2:4 are 0 to 5, got 7"),
            (lambda layer: layer.weight.data.fill_(float("nan")), r"weight holds NaN or infinity"),
        ],
    )
    def test_damage_is_told(self, change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
        save_packed(sparse(), tmp_path / "packed")
        model = load(tmp_path / "packed", "reference")
        change(model.get_submodule("model.encoder.layers.0.fc1"))
        with pytest.raises(ValueError, match=rf"^save\S* \S*layers.0.fc1.{message}"):
            save_packed(model, tmp_path / "again")
        assert not (tmp_path / "again").exists()


def sparse_modules(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(name) for name in sparse_layers(model)]


class TestStateDict:
    @pytest.mark.parametrize("save", [save_packed, export_dense])
    def test_one_that_lacks_a_tensor_or_has_others_is_refused(self, save: Callable[..., None], tmp_path: Path) -> None:
        model = sparse()
        for lost in ("model.encoder.layers.0.fc1.bias", "model.encoder.layers.0.fc1.weight", "final_logits_bias"):
            state = model.state_dict()
            del state[lost]
            with pytest.raises(ValueError, match=rf"^{save.__name__}: state_dict: {lost} is missing; give all tensors"):
                save(model, tmp_path / "new", state_dict=state)
        with pytest.raises(ValueError, match="the model has no other; give the tensors of the model alone"):
            save(model, tmp_path / "new", state_dict=model.state_dict() | {"other": torch.zeros(1)})
        assert not (tmp_path / "new").exists()

    def test_one_tensor_of_those_that_are_tied_will_do(self, tmp_path: Path) -> None:
        model = sparse()
        save_packed(model, tmp_path / "whole")
        for lost in ("lm_head.weight", "model.shared.weight"):
            state = model.state_dict()
            del state[lost]
            save_packed(model, tmp_path / lost, state_dict=state)
            loaded = load(tmp_path / lost, "dense")
            assert torch.equal(loaded.model.shared.weight, model.model.shared.weight)


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key",
    [
        "model.encoder.layers.0.fc1.weight",
        "model.encoder.layers.0.fc1.bias",
        "model.shared.weight",
        "final_logits_bias",
    ],
)
def test_what_is_no_number_is_not_packed(key: str, number: float, values: str, tmp_path: Path) -> None:
    model = sparse()
    with torch.no_grad():
        model.state_dict()[key].view(-1)[3] = number
    with pytest.raises(ValueError, match=r"^\S+ \S[^\n]+$") as caught:
        save_packed(model, tmp_path / "new", values)
    assert key.rpartition(".")[0] in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_weight_that_has_left_its_pattern_is_not_exported(tmp_path: Path) -> None:
    save_packed(sparse(), tmp_path / "packed")
    model = load(tmp_path / "packed", "dense")
    with torch.no_grad():
        model.model.encoder.layers[1].fc2.weight += 1  # as a merge of adapters does it
    message = r"model.encoder.layers.1.fc2.weight breaks 2:4 in 512 groups; call finalize\(model\), which masks it once"
    with pytest.raises(ValueError, match=rf"^export_dense: {message}"):
        export_dense(model, tmp_path / "dense")
    with pytest.raises(ValueError, match=r"fc2.weight"):
        save_packed(model, tmp_path / "again")
    assert not (tmp_path / "dense").exists()
    finalize(model)
    export_dense(model, tmp_path / "dense")
    weight = load_file(tmp_path / "dense/model.safetensors")["model.encoder.layers.1.fc2.weight"]
    assert not count_violations(weight, model.model.encoder.layers[1].fc2.pattern)
    save_packed(model, tmp_path / "again")
    assert torch.equal(load(tmp_path / "again", "dense").model.encoder.layers[1].fc2.weight, weight)


@pytest.mark.parametrize("key", ["model.encoder.layers.0.fc1.bias", "model.shared.weight", "final_logits_bias"])
def test_what_is_no_number_is_not_exported(key: str, tmp_path: Path) -> None:
    model = sparse()
    with torch.no_grad():
        model.state_dict()[key].view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match=rf"^save: {key} holds NaN or infinity; [^\n]+$"):
        export_dense(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("save", [save_packed, export_dense])
@pytest.mark.parametrize(
    ("change", "undo", "remedy"),
    [
        (weight_norm, lambda layer: remove_parametrizations(layer, "weight"), "parametrize.remove_parametrizations"),
        (
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            lambda layer: prune.remove(layer, "weight"),
            "prune.remove",
        ),
    ],
    ids=["weight_norm", "prune"],
)
def test_a_weight_that_torch_computes_anew_is_not_saved(
    save: Callable[..., None], change: Any, undo: Any, remedy: str, tmp_path: Path
) -> None:
    model = marian()
    sparsify(model, NMSparseConfig("2:4", ignore=["fc1"]))
    change(model.model.encoder.layers[1].fc1)
    with pytest.raises(ValueError, match=rf"^{save.__name__}: model.encoder.layers.1.fc1.[^\n]*{remedy} first$"):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    undo(model.model.encoder.layers[1].fc1)
    save(model, tmp_path / "new")
    hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new")


LAST = {"pad_token_id": 299, "decoder_start_token_id": 299, "eos_token_id": 0}


class TestMarianThatStartsFromItsPadding:
    def test_a_start_that_ctranslate2_would_not_see_is_refused(self, tmp_path: Path) -> None:
        model = sparse(**LAST)
        assert not model.model.shared.weight[299].any()
        export_dense(model, tmp_path / "zero")
        with torch.no_grad():
            model.model.shared.weight[299, 3] = 1e-6
        with pytest.raises(ValueError, match=r"^export_dense: row 299 of model.shared.weight, the padding, from which"):
            export_dense(model, tmp_path / "moved")
        save_packed(model, tmp_path / "packed")

    def test_others_are_exported(self, tmp_path: Path) -> None:
        for number, special in enumerate(({}, LAST | {"decoder_start_token_id": 0}, {"pad_token_id": 298})):
            model = sparse(**special)
            with torch.no_grad():
                model.model.shared.weight[-2:] = 1
            export_dense(model, tmp_path / str(number))


class TestDequantize:
    @pytest.mark.parametrize("values", ["fp32", "bf16", "int8"])
    @pytest.mark.parametrize("compute", ["auto", "int8", "dense", "reference"])
    def test_an_ordinary_dense_model(self, compute: str, values: str, tmp_path: Path) -> None:
        save_packed(sparse(), tmp_path / "packed", values)
        expected = load(tmp_path / "packed", "dense")
        if compute == "int8":  # which rounds weights that are not int8 in the file
            set_compute(expected, "int8")
            set_compute(expected, "dense")
        model = load(tmp_path / "packed", compute).dequantize()
        assert {type(module) for module in model.modules() if "Linear" in type(module).__name__} == {nn.Linear}
        assert not sparse_layers(model)
        assert not hasattr(model, "hf_quantizer")
        for key, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key
        model.save_pretrained(tmp_path / "dense")
        loaded = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense")
        assert not hasattr(loaded.config, "quantization_config")
        assert loaded.num_parameters() == marian().num_parameters()

    def test_in_another_number_type(self, tmp_path: Path) -> None:
        save_packed(sparse(), tmp_path)
        assert load(tmp_path, "auto").dequantize(torch.bfloat16).dtype == torch.bfloat16

    def test_a_dequantized_model_can_be_made_sparse_again(self, tmp_path: Path) -> None:
        save_packed(sparse(), tmp_path / "packed")
        model = load(tmp_path / "packed", "auto").dequantize()
        sparsify(model, NMSparseConfig("2:4"))
        save_packed(model, tmp_path / "again")
        assert same_files(tmp_path / "packed", tmp_path / "again")


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft with transformers 5.23
class TestAdapters:
    def adapted(self, model: Any, inside: bool = False) -> Any:
        import peft

        config = peft.LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False)
        if inside:
            model.add_adapter(config)
            return model
        return peft.get_peft_model(model, config)

    @pytest.mark.parametrize("inside", [False, True])
    @pytest.mark.parametrize("start", ["training", "dense"])
    def test_a_model_with_adapters_is_refused(self, start: str, inside: bool, tmp_path: Path) -> None:
        save_packed(sparse(), tmp_path / "packed")
        model = self.adapted(sparse() if start == "training" else load(tmp_path / "packed", "dense"), inside)
        for wrapped in (model, torch.compile(model), *([] if inside else [model.get_base_model()])):
            for save in (save_packed, export_dense):
                with pytest.raises(ValueError, match=rf"^{save.__name__}: the model holds PEFT adapters, [^\n]+$"):
                    save(wrapped, tmp_path / "new")
            with pytest.raises(ValueError, match=r"^save_packed: the model holds PEFT adapters"):
                push_to_hub(wrapped, "user/model")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("start", ["training", "dense"])
    def test_a_merged_model_is_packed_as_the_message_says(self, start: str, tmp_path: Path) -> None:
        save_packed(sparse(), tmp_path / "packed")
        model = self.adapted(sparse() if start == "training" else load(tmp_path / "packed", "dense"))
        merged = model.merge_and_unload()
        finalize(merged)
        save_packed(merged, tmp_path / "again")
        ids: dict[str, Tensor] = {"input_ids": torch.tensor([[5, 6, 1]]), "decoder_input_ids": torch.tensor([[0, 7]])}
        loaded = load(tmp_path / "again", "dense")
        assert torch.equal(loaded.eval()(**ids).logits, copy.deepcopy(merged).eval()(**ids).logits)
        export_dense(merged, tmp_path / "dense")


def test_what_is_no_model_of_transformers_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, NMSparseConfig("2:4"))
    with pytest.raises(ValueError, match=r"^save_packed: writes models of transformers, got Sequential$"):
        save_packed(model, tmp_path)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform == "win32", reason="files have no limit of size there")
@pytest.mark.parametrize("bytes_left", [0, 2_000, 100_000])
@pytest.mark.parametrize("save", [save_packed, export_dense])
def test_a_disk_that_is_full_is_one_line(save: Callable[..., None], bytes_left: int, tmp_path: Path) -> None:
    import resource

    (tmp_path / "old").mkdir()
    model, before = sparse(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
        for folder in (tmp_path / "old", tmp_path / "new"):
            with pytest.raises(ValueError, match=rf"^{save.__name__}: {folder} could not be written: [^\n]+$"):
                save(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


@pytest.mark.parametrize("save", [save_packed, export_dense])
def test_an_empty_path_is_not_the_current_folder(
    save: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^{save.__name__}: path is empty; name a path, [^\n]+$"):
        save(sparse(), "")
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for save in (save_packed, export_dense):
            with pytest.raises(ValueError, match=rf"^{save.__name__}: {path} could not be written: [^\n]+$"):
                save(sparse(), path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", [save_packed, export_dense])
def test_other_weights_are_ranked_by_themselves(save: Callable[..., None], dtype: torch.dtype, tmp_path: Path) -> None:
    """The live mask is that of the layer's own weight, a cast copy of it included, and of no other."""
    model, other = sparse(seed=0), sparse(seed=1)
    for layer in map(model.get_submodule, sparse_layers(model)):
        layer.mask = layer.current_mask()
    for name, weights in (("own", model), ("other", other)):
        state = {key: tensor.to(dtype) for key, tensor in weights.state_dict().items()}
        save(model, tmp_path / name, state_dict=retied(model, state))
        expected = copy.deepcopy(weights)
        if name == "other":
            expected.load_state_dict(state)
        finalize(expected)
        save(expected.to(dtype), tmp_path / f"{name}-expected")
    for name in ("own", "other"):
        files = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, f"{name}-expected"))
        found, wanted = files
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor.float(), wanted[key].float()) for key, tensor in found.items())
