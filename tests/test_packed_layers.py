"""The layers of inference: PackedLinear on the reference product, KernelLinear and Int8Head on the native kernels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_nmsparse.kernels import library, native
from hf_nmsparse.kernels.rounded import rounded
from hf_nmsparse.layers import sparse_layers
from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.packed_layers import Int8Head, KernelLinear, PackedLinear
from hf_nmsparse.packing import pack, unpack
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.rounding import quantize_rows

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(3, 5), NMPattern(16, 32)]


def sparse_linear(pattern: NMPattern, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(7 * pattern.m, 6, bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(apply_mask(linear.weight, magnitude_mask(linear.weight, pattern)))
    return linear


def inputs(linear: nn.Linear) -> Tensor:
    return torch.randn(2, 3, linear.in_features, generator=torch.Generator().manual_seed(1)).to(linear.weight.dtype)


def test_product_by_hand() -> None:
    linear = nn.Linear(4, 2)
    linear.weight = nn.Parameter(torch.tensor([[0.0, 5.0, 0.0, -2.0], [1.0, 0.0, 0.0, 3.0]]))
    linear.bias = nn.Parameter(torch.tensor([10.0, 20.0]))
    out = PackedLinear.from_linear(linear, NMPattern(2, 4))(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert out.tolist() == [[10.0 + 5 * 2 - 2 * 4, 20.0 + 1 + 3 * 4]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layer_equals_the_dense_one(pattern: NMPattern, dtype: torch.dtype, bias: bool) -> None:
    linear = sparse_linear(pattern, bias, dtype)
    packed = PackedLinear.from_linear(linear, pattern)
    x = inputs(linear)
    assert torch.equal(packed(x), F.linear(x, linear.weight, linear.bias))
    back = packed.to_linear()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, linear.weight)
    assert back.bias is linear.bias
    assert sparse_layers(nn.Sequential(packed, back)) == {"0": pattern, "1": pattern}


def test_packed_layer_survives_what_modules_go_through() -> None:
    pattern = NMPattern(2, 4)
    linear = sparse_linear(pattern)
    packed = PackedLinear.from_linear(linear, pattern)
    x = inputs(linear)
    expected = packed(x)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert copied.pattern == pattern
        assert torch.equal(copied(x), expected)
    loaded = PackedLinear(linear.in_features, linear.out_features, pattern)
    loaded.load_state_dict(packed.state_dict())
    assert torch.equal(loaded(x), expected)
    assert "in_features=28, out_features=6, bias=True, pattern=2:4" in repr(packed)
    half = packed.to(torch.bfloat16)
    assert half.weight_indices.dtype == torch.uint8
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.to("meta").weight_indices.is_meta


def test_gradients_reach_values_bias_and_input() -> None:
    pattern = NMPattern(2, 4)
    linear = sparse_linear(pattern)
    packed = PackedLinear.from_linear(linear, pattern)
    x = inputs(linear).requires_grad_()
    packed(x).square().sum().backward()
    assert packed.weight.grad is not None
    assert packed.weight.grad.shape == (6, 14)
    assert packed.bias is not None
    assert packed.bias.grad is not None
    assert x.grad is not None


def test_packed_layer_follows_autocast_as_the_dense_one_does() -> None:
    pattern = NMPattern(2, 4)
    linear = sparse_linear(pattern)
    packed = PackedLinear.from_linear(linear, pattern)
    x = inputs(linear)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = packed(x), linear(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_a_first_call_in_inference_mode_spoils_no_later_gradient() -> None:
    pattern = NMPattern(3, 7)  # no other test fills this pattern's tables
    linear = sparse_linear(pattern)
    packed = PackedLinear.from_linear(linear, pattern)
    with torch.inference_mode():
        packed(inputs(linear))
    packed(inputs(linear)).sum().backward()
    assert packed.weight.grad is not None


def test_packed_layer_refuses_other_weights() -> None:
    with pytest.raises(ValueError, match="in_features 6 is not a multiple of 4"):
        PackedLinear(6, 4, NMPattern(2, 4))
    with pytest.raises(ValueError, match="fc1 has 4 groups"):
        PackedLinear.from_linear(nn.Linear(4, 4), NMPattern(2, 4), "fc1")


def int8_packed(linear: nn.Linear, pattern: NMPattern) -> PackedLinear:
    """A layer as a file with int8 values makes it."""
    tensors = pack(linear.weight, pattern)
    values, scale = quantize_rows(tensors["weight"])
    packed = PackedLinear(
        linear.in_features, linear.out_features, pattern, linear.bias is not None, dtype=linear.weight.dtype, int8=True
    )
    packed.load_state_dict(
        {"weight": values, "weight_indices": tensors["weight_indices"], "weight_scale": scale}
        | ({} if linear.bias is None else {"bias": linear.bias})
    )
    return packed


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


class TestInt8Values:
    """PackedLinear with int8 values and a scale for each row."""

    def test_by_hand(self) -> None:
        linear = nn.Linear(4, 2)
        linear.weight = nn.Parameter(torch.tensor([[0.0, 254.0, 0.0, -2.0], [127.0, 0.0, 0.0, 3.0]]))
        packed = int8_packed(linear, NMPattern(2, 4))
        assert packed.weight.tolist() == [[127, -1], [127, 3]]
        assert not packed.weight.requires_grad
        assert packed.weight_scale is not None
        assert packed.weight_scale.tolist() == [2.0, 1.0]
        assert torch.equal(packed.dense_weight(), linear.weight)
        assert torch.equal(packed(torch.ones(3, 4)), linear(torch.ones(3, 4)))
        assert torch.equal(packed.to_linear().weight, linear.weight)
        assert repr(packed) == "PackedLinear(in_features=4, out_features=2, bias=True, pattern=2:4, values=int8)"

    def test_casts_leave_values_and_scales_as_they_are(self) -> None:
        packed = int8_packed(sparse_linear(NMPattern(2, 4)), NMPattern(2, 4))
        before = {key: tensor.clone() for key, tensor in packed.packed_tensors().items()}
        x = torch.randn(3, 28)
        for cast, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32)):
            getattr(packed, cast)()
            assert packed.dtype == dtype
            assert packed(x.to(dtype)).dtype == dtype
            assert packed.dense_weight().dtype == dtype
            after = packed.packed_tensors()
            assert all(after[key].dtype == before[key].dtype for key in before)
            assert all(torch.equal(after[key], before[key]) for key in before)
        assert packed.to("meta").packed_tensors()["weight_scale"].is_meta

    @pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
    def test_scales_are_fp32_whatever_the_default_type(self, default: torch.dtype) -> None:
        # from_pretrained makes the model's type the default while it builds the model.
        torch.set_default_dtype(default)
        try:
            packed = PackedLinear(8, 4, NMPattern(2, 4), int8=True)
        finally:
            torch.set_default_dtype(torch.float32)
        assert packed.weight_scale is not None
        assert packed.weight_scale.dtype == torch.float32
        assert packed.dtype == default


# Distance to the product with the weight of the file, in norm; the layers are too small for the norm to vary little.
KERNEL_BOUNDS = {"fp32": 1e-6, "bf16": 4e-3, "int8": 3e-2}
FITTING = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(2, 8), NMPattern(1, 16), NMPattern(2, 32)]
FITTING_INT8 = [*FITTING, NMPattern(4, 8), NMPattern(1, 2), NMPattern(2, 6), NMPattern(3, 16)]
needs_library = pytest.mark.skipif(library.status().library is None, reason=library.status().reason)


@needs_library
class TestKernelLinear:
    @pytest.mark.parametrize(
        ("pattern", "format"),
        [(p, numbers) for numbers in ("fp32", "bf16") for p in FITTING] + [(p, "int8") for p in FITTING_INT8],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_it_computes_nearly_what_the_dense_layer_does(
        self, pattern: NMPattern, format: str, dtype: torch.dtype
    ) -> None:
        linear = sparse_linear(pattern, dtype=dtype)
        layer = KernelLinear(PackedLinear.from_linear(linear, pattern), format)
        assert layer.bias is linear.bias
        assert sparse_layers(nn.Sequential(layer)) == {"0": pattern}
        x = inputs(linear)
        out, expected = layer(x), F.linear(x.float(), linear.weight.float(), linear.bias.float())
        assert (out.dtype, out.shape) == (dtype, expected.shape)
        rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]  # of the output
        assert distance(out, expected) < KERNEL_BOUNDS[format] + rounding
        assert layer.weight.shape == linear.weight.shape
        assert (layer.weight.dtype, layer.weight.is_meta) == (dtype, True)

    @pytest.mark.parametrize("pattern", FITTING, ids=str)
    @pytest.mark.parametrize(
        ("format", "dtype"),
        [("fp32", torch.float32), ("fp32", torch.float16), ("fp32", torch.bfloat16), ("bf16", torch.bfloat16)],
    )
    def test_the_weight_of_the_file_comes_back(self, pattern: NMPattern, format: str, dtype: torch.dtype) -> None:
        linear = sparse_linear(pattern, dtype=dtype)
        with torch.no_grad():
            linear.weight[0] = 0.0
            linear.weight[0, -1] = -0.0
        packed = PackedLinear.from_linear(linear, pattern)
        layer = KernelLinear(packed, format)
        back = layer.to_packed()
        assert (back.pattern, back.dtype, back.bias) == (pattern, dtype, linear.bias)
        for found in (layer.packed_tensors(), back.packed_tensors()):
            for key, tensor in packed.packed_tensors().items():
                assert found[key].dtype == tensor.dtype
                assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8))  # -0.0 is not 0.0
        assert torch.equal(layer.dense_weight(), linear.weight)

    @pytest.mark.parametrize("pattern", FITTING_INT8, ids=str)
    def test_int8_values_come_back(self, pattern: NMPattern) -> None:
        linear = sparse_linear(pattern)
        packed = int8_packed(linear, pattern)
        layer = KernelLinear(packed, "int8")
        # A kept value that was rounded to zero has the place that `pack` gives it.
        tensors = packed.packed_tensors()
        canonical = pack(unpack(tensors["weight"], tensors["weight_indices"], pattern), pattern)
        found = layer.packed_tensors()
        assert torch.equal(found["weight"], canonical["weight"])
        assert torch.equal(found["weight_indices"], canonical["weight_indices"])
        assert torch.equal(found["weight_scale"], tensors["weight_scale"])
        assert torch.equal(layer.dense_weight(), packed.dense_weight())
        if pattern in FITTING:
            assert torch.equal(KernelLinear(packed, "fp32").dense_weight(), packed.dense_weight())
        back = layer.to_packed()
        assert torch.equal(back.dense_weight(), packed.dense_weight())
        assert not back.weight.requires_grad

    @pytest.mark.parametrize("pattern", FITTING_INT8, ids=str)
    def test_int8_products_are_those_of_the_dense_kernel(self, pattern: NMPattern) -> None:
        linear = sparse_linear(pattern)
        layer, x = KernelLinear(int8_packed(linear, pattern), "int8"), inputs(linear)
        dense, scale = native.restore(layer.kernel_weight, layer.kernel_format, 6, linear.in_features)
        packed = native.repack("dense_int8", linear.in_features, dense, scale=scale)
        assert torch.equal(layer(x), native.multiply(x, packed, linear.bias, "dense_int8", 6))

    def test_what_it_cannot_compute(self) -> None:
        for pattern, numbers in ((NMPattern(3, 5), "int8"), (NMPattern(4, 8), "fp32"), (NMPattern(1, 2), "bf16")):
            message = f"no {numbers} kernel for {pattern} with .* inputs; choose compute='dense'"
            with pytest.raises(ValueError, match=message):
                KernelLinear(PackedLinear.from_linear(sparse_linear(pattern), pattern), numbers)
        packed = PackedLinear.from_linear(sparse_linear(NMPattern(2, 4)), NMPattern(2, 4))
        with pytest.raises(ValueError, match="the weight lies on meta, not on the CPU; choose compute='dense'"):
            KernelLinear(packed.to("meta"), "fp32")

    @pytest.fixture(params=["fp32", "bf16", "int8", "int8 file"])
    def layer(self, request: pytest.FixtureRequest) -> KernelLinear:
        linear = sparse_linear(NMPattern(2, 4))
        if request.param == "int8 file":
            return KernelLinear(int8_packed(linear, NMPattern(2, 4)), "int8").eval()
        return KernelLinear(PackedLinear.from_linear(linear, NMPattern(2, 4)), request.param).eval()

    def test_copies(self, layer: KernelLinear) -> None:
        x = torch.randn(3, 28)
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(copied(x), layer(x))
            assert torch.equal(copied.kernel_weight, layer.kernel_weight)
            assert copied.kernel_weight.data_ptr() != layer.kernel_weight.data_ptr()
            assert copied.bias is not layer.bias
            assert (copied.pattern, copied.format, copied.training) == (layer.pattern, layer.format, False)
            assert repr(copied) == repr(layer)
        assert f"in_features=28, out_features=6, bias=True, pattern=2:4, format={layer.format}" in repr(layer)
        # What is pickled is what the file holds, never the order of this machine's unit.
        assert layer.kernel_weight.numpy().tobytes() not in pickle.dumps(layer)

    def test_state_dicts(self, layer: KernelLinear) -> None:
        x = torch.randn(3, 28)
        state = layer.state_dict()
        scales = ["weight_scale"] if layer.format == "int8" else []
        assert sorted(state) == ["bias", "weight", "weight_indices", *scales]
        other = copy.deepcopy(layer)
        with torch.no_grad():
            other.bias.zero_()
        other.kernel_weight.zero_()
        assert other.load_state_dict(state) == ([], [])
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.kernel_weight, layer.kernel_weight)
        packed = PackedLinear(28, 6, NMPattern(2, 4), int8=layer.format == "int8")
        packed.load_state_dict(state)  # the names are the same
        assert torch.equal(packed.dense_weight(), layer.dense_weight())
        inside = nn.Sequential(copy.deepcopy(layer))
        assert inside.load_state_dict({f"0.{key}": tensor for key, tensor in state.items()}) == ([], [])

    def test_gradients_of_the_packed_weight_are_refused(self, layer: KernelLinear) -> None:
        with pytest.raises(ValueError, match=r"^kernels: .* prepare_for_training\(model\) .*compute='dense'[^\n]*$"):
            layer.requires_grad_()
        assert layer.requires_grad_(False) is layer
        assert not layer.bias.requires_grad
        nn.Sequential(layer).requires_grad_(True)  # a model asks it of its parameters alone
        assert layer.bias.requires_grad

    def test_a_dense_weight_is_not_left_out_by_a_load_that_is_not_strict(self, layer: KernelLinear) -> None:
        dense = nn.Linear(28, 6).state_dict()
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=r"0\.weight: the layer is packed, .*compute='dense'"):
                nn.Sequential(layer).load_state_dict({f"0.{key}": dense[key] for key in dense}, strict=strict)
        nn.Sequential(layer).load_state_dict({"0.bias": dense["bias"]}, strict=False)
        assert torch.equal(layer.bias, dense["bias"])

    def test_what_does_not_load(self, layer: KernelLinear) -> None:
        state, x = layer.state_dict(), torch.randn(3, 28)
        expected = layer(x)

        def fails(change: dict[str, Any], message: str) -> None:
            changed = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
            with pytest.raises(RuntimeError, match=message):
                nn.Sequential(layer).load_state_dict({f"0.{key}": tensor for key, tensor in changed.items()})
            assert torch.equal(layer(x), expected)

        codes = state["weight_indices"]
        fails({"weight": None}, r"Missing key\(s\) in state_dict: \"0\.weight\"")
        fails({"weight_indices": None}, r"Missing key\(s\) in state_dict: \"0\.weight_indices\"")
        fails({"bias": None}, r"Missing key\(s\) in state_dict: \"0\.bias\"")
        fails({"x": torch.zeros(1)}, r"Unexpected key\(s\) in state_dict: \"0\.x\"")
        fails({"weight_indices": codes | 7}, r"0\.weight_indices: codes of 2:4 are 0 to 5, got 7")
        fails({"weight_indices": codes[:, :2]}, r"0\.weight_indices: shape must be \[6, 3\]")
        fails({"weight_indices": codes.to(torch.int64)}, r"0\.weight_indices: codes are uint8")
        fails({"weight_indices": codes.to("meta")}, "meta")
        fails({"weight": state["weight"][:, :12]}, r"0\.weight: the model's layer is \[6, 28\]")
        fails({"weight": state["weight"][0]}, r"0\.weight: values of 2:4 have rows of a multiple of 2")
        fails({"weight": torch.zeros(6, 28)}, r"0\.weight: the model's layer is \[6, 28\]")
        fails({"bias": torch.zeros(5)}, r"size mismatch for 0\.bias")
        if layer.format == "int8":
            scale = state["weight_scale"]
            fails({"weight_scale": None}, r"Missing key\(s\) in state_dict: \"0\.weight_scale\"")
            fails({"weight_scale": scale[:5]}, r"0\.weight_scale: scales are fp32 \[6\]")
            fails({"weight_scale": -scale}, r"0\.weight_scale: scales are positive")
            fails({"weight": state["weight"].float()}, r"0\.weight_scale: only values of int8 have a scale")
        else:
            fails({"weight": state["weight"] * float("nan")}, r"0\.weight: values must be finite")
            fails({"weight_scale": torch.ones(6)}, r"Unexpected key\(s\) in state_dict: \"0\.weight_scale\"")
            fails({"weight": torch.ones(6, 14, dtype=torch.int8)}, r"0\.weight_scale: scales are missing beside int8")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_casts(self, layer: KernelLinear, dtype: torch.dtype) -> None:
        x = torch.randn(3, 28)
        expected, weight = layer(x), layer.kernel_weight
        layer.to(dtype)
        assert (layer.dtype, layer.weight.dtype) == (dtype, dtype)
        assert torch.equal(layer.kernel_weight, weight)
        out = layer(x.to(dtype))
        assert out.dtype == dtype
        assert distance(out, expected) < 1e-2  # input, bias and output were rounded, to 8 bits at least
        assert layer.dense_weight().dtype == dtype
        assert layer.state_dict()["weight"].dtype == (torch.int8 if layer.format == "int8" else dtype)
        # Inputs of another type than the layer's are computed in theirs, as autocast hands them over.
        assert layer(x).dtype == torch.float32

    def test_a_layer_without_data(self, layer: KernelLinear) -> None:
        layer.to("meta")
        assert layer.kernel_weight.is_meta
        assert layer.bias is not None
        assert layer.bias.is_meta
        with torch.no_grad(), pytest.raises(ValueError, match="bytes on meta are no"):
            layer(torch.randn(3, 28))
        assert layer(torch.randn(3, 28, device="meta")).shape == (3, 6)

    def test_float64_is_refused(self, layer: KernelLinear) -> None:
        with pytest.raises(ValueError, match=r"x is in fp32, bf16 or fp16, got torch\.float64; cast it"):
            layer.double()(torch.randn(3, 28).double())

    def test_gradients_reach_bias_and_input_alone(self, layer: KernelLinear) -> None:
        x = torch.randn(2, 5, 28)
        dense = nn.Linear(28, 6)
        dense.weight, dense.bias = nn.Parameter(layer.dense_weight()), copy.deepcopy(layer.bias)
        grads = []
        for module in (layer, dense):
            given = x.clone().requires_grad_()
            module(given).sum().backward()
            bias = module.bias
            assert bias is not None
            assert bias.grad is not None
            grads.append((given.grad, bias.grad))
        assert torch.equal(grads[0][1], grads[1][1])
        torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=1e-6)  # one sum in another order
        assert [name for name, _ in layer.named_parameters()] == ["bias"]

    def test_autocast(self, layer: KernelLinear) -> None:
        x = torch.randn(3, 28)
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(layer(x), expected) < 1e-2
            assert distance(layer(F.linear(x, torch.eye(28))), expected) < 1e-2  # its input is in bf16


class Tied(nn.Module):
    """An embedding and the output projection that shares its weight."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.head = nn.Linear(24, 50, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(tokens))
        return logits


def fresh(rows: int = 50) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, 24))


def assign(model: Tied, weight: nn.Parameter) -> None:
    model.embedding.weight = model.head.weight = weight
    model.head.bias = nn.Parameter(torch.zeros(len(weight)))


def renew(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        module.weight.data.normal_()


def train(model: Tied, optimizer: Any, **options: Any) -> None:
    model(torch.arange(20)).square().sum().backward()
    optimizer([model.embedding.weight], lr=0.5, **options).step()
    model.zero_grad()


def train_with_a_look(model: Tied) -> None:
    """A forward between the gradient and the step, as a metric or a closure makes it."""
    model(torch.arange(20)).square().sum().backward()
    with torch.no_grad():
        model(torch.arange(20))
    torch.optim.AdamW([model.embedding.weight], lr=0.5, fused=True).step()
    model.zero_grad()


def step_twice(model: Tied) -> None:
    """Two steps with one gradient, looked at in between."""
    model(torch.arange(20)).square().sum().backward()
    optimizer = torch.optim.SGD([model.embedding.weight], lr=0.5, fused=True)
    for _ in range(2):
        with torch.no_grad():
            model(torch.arange(20))
        optimizer.step()
    model.zero_grad()


def train_the_embedding_alone(model: Tied) -> None:
    """With a gradient that the head has no part in, as that of an encoder."""
    model.embedding(torch.arange(20)).square().sum().backward()
    torch.optim.SGD([{"params": [model.embedding.weight]}], lr=5, fused=True).step()
    model.zero_grad()


def in_place(model: Tied, context: Any) -> None:
    with context():
        model.embedding.weight.normal_()


# Every way in which the weight that head and embedding share may come to hold other numbers.
CHANGES: dict[str, Callable[[Tied], Any]] = {
    "copy into data": lambda model: model.embedding.weight.data.copy_(fresh()),
    "some rows of data": lambda model: model.head.weight.data[3:9].normal_(std=3),
    "data set": lambda model: setattr(model.embedding.weight, "data", fresh().data),
    "in place": lambda model: in_place(model, torch.no_grad),
    "in place, inference mode": lambda model: in_place(model, torch.inference_mode),
    "detached": lambda model: model.head.weight.detach().normal_(),
    "one number": lambda model: model.head.weight.detach()[7, 5].mul_(-1000),
    "nn.init": lambda model: nn.init.normal_(model.embedding.weight),
    "load_state_dict": lambda model: model.load_state_dict(Tied().state_dict()),
    "load_state_dict of the embedding": lambda model: model.embedding.load_state_dict({"weight": fresh()}),
    "load_state_dict, assigned": lambda model: model.load_state_dict(Tied().state_dict(), assign=True),
    "another parameter": lambda model: assign(model, fresh()),
    "a larger one": lambda model: assign(model, fresh(60)),
    "a smaller one": lambda model: assign(model, fresh(40)),
    "swapped": lambda model: torch.utils.swap_tensors(model.embedding.weight, fresh()),
    "SGD": lambda model: train(model, torch.optim.SGD),
    "SGD, fused": lambda model: train(model, torch.optim.SGD, fused=True),
    "AdamW, fused": lambda model: train(model, torch.optim.AdamW, fused=True),
    "fused, after a forward in between": train_with_a_look,
    "fused, twice with one gradient": step_twice,
    "fused, with a gradient of the embedding alone": train_the_embedding_alone,
    "AdamW, foreach": lambda model: train(model, torch.optim.AdamW, foreach=True),
    "vector_to_parameters": lambda model: nn.utils.vector_to_parameters(torch.randn(50 * 24), [model.embedding.weight]),
    "there and back": lambda model: model.to(torch.float16).apply(renew).float(),
}


@needs_library
class TestInt8Head:
    def test_the_layer_itself_is_turned(self) -> None:
        model = Tied()
        linear, weight, keys = model.head, model.embedding.weight, list(model.state_dict())
        tokens = torch.arange(50)
        expected = model(tokens)
        head = Int8Head.from_linear(linear)
        assert head is linear is model.head
        assert isinstance(head, nn.Linear)
        assert head.weight is weight is model.embedding.weight
        assert list(model.state_dict()) == keys
        assert 0 < distance(model(tokens), expected) < 2e-2  # as the issue of kernels promises
        back = head.to_linear()
        assert back is linear
        assert type(back) is nn.Linear
        assert not list(back.buffers())
        assert torch.equal(model(tokens), expected)
        Int8Head.from_linear(back).to_linear()
        assert torch.equal(model(tokens), expected)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
    )
    def test_copies_stay_tied(self, how: Callable[[Tied], Tied], bias: bool) -> None:
        model, tokens = Tied(bias), torch.arange(50)
        Int8Head.from_linear(model.head)
        copied = how(model)
        assert type(copied.head) is Int8Head
        assert copied.head.weight is copied.embedding.weight
        assert copied.head.weight is not model.head.weight
        assert torch.equal(copied(tokens), model(tokens))
        assert list(copied.state_dict()) == list(model.state_dict())

    def test_loading_renews_the_rounded_weight(self) -> None:
        model, other, tokens = Tied(), Tied(), torch.arange(50)
        head = Int8Head.from_linear(model.head)
        model.load_state_dict(other.state_dict())
        assert distance(model(tokens), other(tokens)) < 2e-2
        assert head.weight is model.embedding.weight
        with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
            model.load_state_dict(other.state_dict() | {"head.weight": torch.zeros(50, 20)})

    def test_casts(self) -> None:
        model, tokens = Tied(), torch.arange(50)
        Int8Head.from_linear(model.head)
        expected = model(tokens)
        for dtype in (torch.bfloat16, torch.float16):
            cast = copy.deepcopy(model).to(dtype)
            assert cast(tokens).dtype == dtype
            assert distance(cast(tokens), expected) < 2e-2  # embeddings, and with them the inputs, were rounded
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"the head lies on meta, not on the CPU; choose head=.dense."),
        ):
            model.to("meta").head(torch.randn(1, 24))

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
    def test_it_follows_every_change_of_the_embedding(self, change: str, mode: str) -> None:
        model, tokens = Tied(), torch.arange(20)
        head = Int8Head.from_linear(model.head)
        context = getattr(torch, mode)
        with context():
            before = model(tokens).detach()
        for _ in range(2):  # the second time what the first one left is in use
            CHANGES[change](model)
            with context():
                after = model(tokens).detach()
                expected = F.linear(model.embedding(tokens), head.weight, head.bias).detach()
                assert distance(after, expected) < 2e-2
                assert distance(after[..., :40], before[..., :40]) > 4e-2
                assert torch.equal(model(tokens), after)
            before = after

    def test_it_rounds_only_after_a_change(self) -> None:
        model, tokens = Tied(), torch.arange(50)
        Int8Head.from_linear(model.head)
        kept = rounded(model.head.weight)
        with torch.no_grad():
            for _ in range(3):
                model(tokens)
            model.state_dict()
            list(model.parameters())
        model.head.weight.requires_grad_(False)
        model(tokens)
        assert rounded(model.head.weight) is kept

    def test_a_compiled_head_follows_too(self) -> None:
        torch.compiler.reset()
        model, tokens = Tied(), torch.arange(20)
        Int8Head.from_linear(model.head)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(compiled(tokens), model(tokens))
                model.embedding.weight.data.mul_(-3)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch.compile's own
    def test_a_compiled_step_counts_too(self) -> None:
        torch.compiler.reset()
        model, tokens = Tied(), torch.arange(20)
        Int8Head.from_linear(model.head)
        optimizer = torch.optim.SGD(model.parameters(), lr=1)
        step = torch.compile(optimizer.step, backend="aot_eager")
        for _ in range(3):
            before = model(tokens).detach()
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            step()
            expected = F.linear(model.embedding(tokens), model.head.weight, model.head.bias)
            assert distance(model(tokens), expected) < 2e-2
            assert distance(before, expected) > 4e-2

    def test_a_weight_made_in_inference_mode_is_not_counted_and_not_rounded(self) -> None:
        with torch.inference_mode():
            model, tokens = Tied(), torch.arange(20)
            Int8Head.from_linear(model.head)
            for _ in range(2):
                expected = F.linear(model.embedding(tokens), model.head.weight, model.head.bias)
                assert torch.equal(model(tokens), expected)
                model.embedding.weight.mul_(-3)

    def test_gradients_are_those_of_the_dense_head(self) -> None:
        model, tokens, upstream = Tied(), torch.randint(50, (3, 4)), torch.randn(3, 4, 50)
        dense = copy.deepcopy(model)
        Int8Head.from_linear(model.head)
        for either in (model, dense):
            either(tokens).backward(upstream)
        for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)

    def test_the_weight_is_an_ordinary_parameter_to_others(self) -> None:
        model = Tied()
        keys = set(vars(model.embedding.weight))
        Int8Head.from_linear(model.head)
        assert isinstance(model.embedding.weight, nn.Parameter)
        assert type(model.state_dict()["embedding.weight"]) is Tensor
        assert type(pickle.loads(pickle.dumps(model.embedding.weight))) is nn.Parameter
        assert len(pickle.dumps(model.head)) < len(pickle.dumps(Tied().head)) + 500  # the rounded rows stay here
        model.head.to_linear()  # type: ignore[operator]
        assert type(model.embedding.weight) is nn.Parameter
        assert set(vars(model.embedding.weight)) == keys

    @pytest.mark.parametrize("in_features", [1, 3, 17, 100])
    def test_any_width(self, in_features: int) -> None:
        linear, x = nn.Linear(in_features, 33), torch.randn(9, in_features)
        expected = linear(x)
        assert distance(Int8Head.from_linear(linear)(x), expected) < 3e-2

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="the head lies on meta, not on the CPU; choose head='dense'"):
            Int8Head.from_linear(nn.Linear(4, 4, device="meta"))
        wide = nn.Linear(65537, 1)
        with pytest.raises(ValueError, match="int8 takes up to 65536 inputs, got 65537; keep it dense"):
            Int8Head.from_linear(wide)
        assert type(wide) is nn.Linear
