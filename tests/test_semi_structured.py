"""compute="semi_structured" without a GPU: what is refused, what is chosen, and the layer around the product.

Where a product is needed, a dense tensor stands in for torch's semi-structured one; tests/gpu has the real one.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_nmsparse import NMPattern, save_packed, set_compute
from hf_nmsparse.compute import computing_packed
from hf_nmsparse.kernels import semi_structured
from hf_nmsparse.layers import sparse_layers
from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.packed_layers import PackedLinear, SemiStructuredLinear
from tests.loaded_models import load, logits, same_files, training

TWO_OF_FOUR = NMPattern(2, 4)
GPU = torch.device("cuda", 0)
real_why_not = semi_structured.why_not


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with sparse tensor cores, as far as questions go."""
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.fixture
def stand_in(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU pass for that GPU and a dense weight for a compressed one."""
    monkeypatch.setattr(
        semi_structured,
        "why_not",
        lambda pattern, rows, columns, dtype, device: real_why_not(pattern, rows, columns, dtype, GPU),
    )
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensorCUSPARSELT, "from_dense", torch.clone)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    save_packed(training(), tmp_path / "packed", values="bf16")
    return tmp_path / "packed"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("pattern", "shape", "dtype", "device", "reason"),
    [
        ("2:4", (64, 32), torch.bfloat16, "cuda:0", None),
        ("1:4", (16, 16), torch.float16, "cuda:0", None),
        ("2:8", (64, 32), torch.bfloat16, "cuda:0", None),
        ("4:8", (64, 32), torch.bfloat16, "cuda:0", "4:8 is no part of 2:4"),
        ("2:6", (64, 48), torch.bfloat16, "cuda:0", "2:6 is no part of 2:4"),
        (
            "2:4",
            (64, 32),
            torch.float32,
            "cuda:0",
            "it takes fp16 and bf16 and the weight is torch.float32; load with dtype=torch.bfloat16",
        ),
        ("2:4", (64, 24), torch.bfloat16, "cuda:0", "it takes multiples of 16 and the weight is 64x24"),
        ("2:4", (8, 32), torch.bfloat16, "cuda:0", "it takes multiples of 16 and the weight is 8x32"),
        ("2:4", (64, 32), torch.bfloat16, "cpu", "the weight lies on cpu, not on a GPU"),
    ],
)
def test_what_it_takes(
    pattern: str, shape: tuple[int, int], dtype: torch.dtype, device: str, reason: str | None
) -> None:
    found = semi_structured.why_not(NMPattern.parse(pattern), *shape, dtype, torch.device(device))
    assert found == reason


def test_gpus_without_sparse_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = (TWO_OF_FOUR, 64, 32, torch.bfloat16, GPU)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert semi_structured.why_not(*layer) == "this build of torch has no cuSPARSELt"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    assert semi_structured.why_not(*layer) == "T4 has no sparse tensor cores"


def test_on_a_cpu_it_is_refused_in_one_line(packed: Path) -> None:
    with pytest.raises(ValueError, match=r"^semi_structured: the weight lies on cpu, not on a GPU; or choose compute="):
        load(packed, "semi_structured")
    with pytest.raises(
        ValueError, match=r"^semi_structured: it takes fp16 and bf16 and the weight is torch\.float32; "
    ):
        load(packed, "semi_structured", dtype=torch.float32)
    model = load(packed, "dense")
    with pytest.raises(ValueError, match=r"^semi_structured: the weight lies on cpu"):
        set_compute(model, "semi_structured")


@pytest.mark.usefixtures("stand_in")
class TestLayer:
    def test_it_loads_computes_and_saves_as_the_dense_model(self, packed: Path, tmp_path: Path) -> None:
        model, dense = load(packed, "semi_structured"), load(packed, "dense")
        layers = [model.get_submodule(name) for name in sparse_layers(model)]
        assert {type(layer) for layer in layers} == {SemiStructuredLinear}
        assert torch.equal(logits(model), logits(dense))
        model.save_pretrained(tmp_path / "again")
        assert same_files(packed, tmp_path / "again")

    def test_input_and_bias_get_the_gradients_of_the_dense_layer(self, packed: Path) -> None:
        sparse, dense = load(packed, "semi_structured"), load(packed, "dense")
        name = next(iter(sparse_layers(sparse)))
        grads: list[Any] = []
        for layer in (sparse.get_submodule(name), dense.get_submodule(name)):
            x = torch.linspace(-1, 1, 3 * layer.in_features).reshape(3, -1).to(torch.bfloat16).requires_grad_()
            layer(x).square().sum().backward()
            grads.append((x.grad, layer.bias.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])

    def test_int8_files_compute_in_the_number_type_of_the_model(self, tmp_path: Path) -> None:
        save_packed(training().to(torch.bfloat16), tmp_path, values="int8")
        assert torch.equal(logits(load(tmp_path, "semi_structured")), logits(load(tmp_path, "dense")))

    def test_there_and_back(self, packed: Path) -> None:
        model = load(packed, "dense")
        before = logits(model)
        for compute in ("semi_structured", "reference", "semi_structured", "dense"):
            set_compute(model, compute)
            assert torch.equal(logits(model), before)
        assert not any(isinstance(layer, SemiStructuredLinear) for layer in model.modules())

    def test_copies_pickles_and_state_dicts(self) -> None:
        linear = nn.Linear(32, 16).to(torch.bfloat16)
        with torch.no_grad():
            linear.weight.copy_(apply_mask(linear.weight, magnitude_mask(linear.weight, TWO_OF_FOUR)))
        layer = SemiStructuredLinear(PackedLinear.from_linear(linear, TWO_OF_FOUR))
        x = torch.randn(3, 32, dtype=torch.bfloat16)
        expected = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), expected)
        other = copy.deepcopy(layer)
        other.kernel_weight = torch.zeros_like(other.kernel_weight)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), expected)
        assert set(layer.state_dict()) == {"weight", "weight_indices", "bias"}

    def test_another_number_type_is_refused(self, packed: Path) -> None:
        """The compressed weight keeps its own: a cast would tear values and places apart."""
        model = load(packed, "semi_structured").to(torch.float16)
        with pytest.raises(
            ValueError, match=r"the weight is torch\.bfloat16 on cpu, got an input of torch\.float16 on"
        ):
            logits(model)

    def test_a_layer_of_odd_shape_is_refused(self) -> None:
        layer = PackedLinear(24, 16, TWO_OF_FOUR, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="it takes multiples of 16 and the weight is 16x24; or choose compute="):
            SemiStructuredLinear(layer)


LAYERS: dict[str, Any] = {
    "narrow": nn.Linear(32, 64, dtype=torch.bfloat16, device="meta"),
    "wide": nn.Linear(64, 32, dtype=torch.bfloat16, device="meta"),
    "odd": nn.Linear(24, 32, dtype=torch.bfloat16, device="meta"),
    "exact": nn.Linear(64, 32, device="meta"),
    "int8": PackedLinear(64, 64, TWO_OF_FOUR, dtype=torch.bfloat16, device="meta", int8=True),
}


@pytest.mark.usefixtures("hopper")
class TestAuto:
    @pytest.fixture(autouse=True)
    def wide_is_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(semi_structured, "is_faster", lambda rows, columns, dtype, device: columns == 64)

    @pytest.mark.parametrize("device_map", ["cuda", "cuda:0", {"": GPU}, {"model": "cuda:0", "lm_head": GPU}])
    def test_a_gpu_takes_the_layers_that_are_faster(self, device_map: Any) -> None:
        assert computing_packed(LAYERS, "auto", TWO_OF_FOUR, device_map) == ["wide", "int8"]

    @pytest.mark.parametrize("device_map", [{"a": "cuda:0", "b": "cpu"}, {"a": "cuda:0", "b": "disk"}, "xpu"])
    def test_elsewhere_they_are_dense(self, device_map: Any) -> None:
        assert list(computing_packed(LAYERS, "auto", TWO_OF_FOUR, device_map)) == []

    def test_a_choice_is_no_question_of_speed(self) -> None:
        assert list(computing_packed(LAYERS, "dense", TWO_OF_FOUR, "cuda")) == []
        assert list(computing_packed(LAYERS, "semi_structured", TWO_OF_FOUR, "cuda")) == list(LAYERS)


@pytest.mark.parametrize("winner", [None, 1, 64, 4096])
def test_the_shape_test_asks_for_every_number_of_rows(winner: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse products take one second, dense ones two, but for the number of rows where dense wins."""
    asked: list[int] = []

    def seconds(call: Any, device: torch.device) -> float:
        x: Tensor = call.args[0]
        if call.func is semi_structured.linear:
            asked.append(x.shape[0])
            return 1.0
        return 0.5 if x.shape[0] == winner else 2.0

    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensorCUSPARSELT, "from_dense", torch.clone)
    monkeypatch.setattr(semi_structured, "_seconds", seconds)
    semi_structured.is_faster.cache_clear()
    assert semi_structured.is_faster(32, 64, torch.bfloat16, torch.device("cpu")) is (winner is None)
    assert asked == [rows for rows in semi_structured.ROWS if winner is None or rows <= winner]
    semi_structured.is_faster.cache_clear()
