"""NMLinear: to everything around it an nn.Linear, whose forward is sparse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.layers import NMLinear, sparse_layers
from hf_nmsparse.masks import apply_mask, count_violations, magnitude_mask
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.sparse_model import sparsify

PATTERN = NMPattern(2, 4)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def sparse_network() -> nn.Sequential:
    model = network()
    sparsify(model, NMSparseConfig(PATTERN))
    return model


def sparse_layer(in_features: int = 8, out_features: int = 4, pattern: NMPattern = PATTERN) -> NMLinear:
    return NMLinear.from_stock(nn.Linear(in_features, out_features), pattern)


def masked(layer: nn.Linear, pattern: NMPattern = PATTERN) -> Tensor:
    weight = layer.weight.detach()
    return apply_mask(weight, magnitude_mask(weight, pattern))


def cache_masks(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, NMLinear):
            layer.mask = layer.current_mask()


def test_from_linear_turns_the_layer_itself() -> None:
    linear = nn.Linear(8, 4)
    weight, bias, keys = linear.weight, linear.bias, list(linear.state_dict())
    layer = NMLinear.from_stock(linear, PATTERN)
    assert id(layer) == id(linear)
    assert layer.weight is weight
    assert layer.bias is bias
    assert isinstance(layer, nn.Linear)
    cache_masks(layer)
    assert list(layer.state_dict()) == keys
    assert repr(layer) == "NMLinear(in_features=8, out_features=4, bias=True, pattern=2:4)"


def test_a_layer_that_does_not_divide_stays_a_linear() -> None:
    linear = nn.Linear(6, 4)
    with pytest.raises(ValueError, match="in_features 6 is not a multiple of 4"):
        NMLinear.from_stock(linear, PATTERN)
    assert type(linear) is nn.Linear
    assert not hasattr(linear, "pattern")


def test_to_stock_goes_back_and_remembers_the_pattern() -> None:
    layer = sparse_layer()
    layer.finalize()
    weight, keys = layer.weight, list(layer.state_dict())
    expected = layer(torch.ones(8))
    linear = layer.to_stock()
    assert type(linear) is nn.Linear
    assert linear is layer
    assert linear.weight is weight
    assert list(linear.state_dict()) == keys
    assert "mask" not in vars(linear)
    assert torch.equal(linear(torch.ones(8)), expected)
    assert sparse_layers(linear) == {"": PATTERN}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)], ids=str)
def test_the_forward_is_the_linear_of_the_masked_weight(pattern: NMPattern, bias: bool) -> None:
    layer = NMLinear.from_stock(nn.Linear(16, 8, bias=bias), pattern)
    x = torch.randn(2, 3, 16)
    assert torch.equal(layer(x), F.linear(x, masked(layer, pattern), layer.bias))
    assert not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_without_a_kept_mask_the_forward_follows_the_weight() -> None:
    layer = sparse_layer()
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(1))
    assert torch.equal(layer(torch.ones(8)), F.linear(torch.ones(8), masked(layer), layer.bias))


def test_a_kept_mask_is_the_one_in_use() -> None:
    layer = sparse_layer()
    layer.mask = ~layer.current_mask()
    expected = F.linear(torch.ones(8), apply_mask(layer.weight, layer.mask), layer.bias)
    assert torch.equal(layer(torch.ones(8)), expected)


def test_the_gradient_is_the_dense_one_at_the_masked_weight() -> None:
    layer = sparse_layer()
    weight = masked(layer).requires_grad_()
    x = torch.randn(5, 8)
    F.linear(x, weight, layer.bias).square().sum().backward()
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert weight.grad is not None
    assert torch.equal(layer.weight.grad, weight.grad)
    assert (layer.weight.grad != 0).all()


def test_nothing_of_the_sparse_weight_is_kept_for_the_backward() -> None:
    layer, x = sparse_layer(), torch.randn(5, 8)
    cache_masks(layer)
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.add(tensor.data_ptr()), lambda _: x):
        layer(x)
    assert layer.mask is not None
    assert saved == {tensor.data_ptr() for tensor in (x, layer.weight, layer.mask)}


def test_the_layer_is_differentiable_twice() -> None:
    layer = NMLinear.from_stock(nn.Linear(4, 1, bias=False), PATTERN)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, -1.0, 2.0, -3.0]]))  # used: 4, 0, 0, -3
    x = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    # y = 4 - 24 = -20; y^2 has the gradient 2 y w in x, whose sum 2 y (w1 + ... + w4) has 2 (x + ...) in w.
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert gradient.tolist() == [-160, 0, 0, 120]
    (second,) = torch.autograd.grad(gradient.sum(), layer.weight)
    assert second.tolist() == [[2 * -20 + 2 * 1 * value for value in (1, 2, 4, 8)]]


def test_layers_whose_sparse_weights_share_memory_are_differentiable_twice() -> None:
    torch.manual_seed(0)
    layers = [NMLinear.from_stock(nn.Linear(8, 8), PATTERN) for _ in range(3)]
    used = [nn.Linear(8, 8) for _ in layers]
    for layer, dense in zip(layers, used, strict=True):
        cache_masks(layer)
        dense.load_state_dict({"weight": masked(layer), "bias": layer.bias})

    def second(model: nn.Module) -> torch.Tensor:
        x = torch.linspace(-1, 1, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), x)[0]

    assert torch.equal(second(nn.Sequential(*layers)), second(nn.Sequential(*used)))


def test_an_input_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the weight is torch.float32, got an input of torch.bfloat16; cast one"):
        sparse_layer()(torch.ones(8, dtype=torch.bfloat16))


def test_finalize_writes_the_mask_into_the_weight() -> None:
    layer = sparse_layer()
    expected, weight = masked(layer), layer.weight
    layer.finalize()
    assert layer.weight is weight
    assert torch.equal(layer.weight, expected)
    assert count_violations(layer.weight, PATTERN) == 0
    layer.finalize()
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("cached", [False, True])
def test_deepcopy_is_independent(cached: bool) -> None:
    model = sparse_network()
    if cached:
        cache_masks(model)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 8)
    assert torch.equal(twin(x), model(x))
    assert sparse_layers(twin) == sparse_layers(model) == {"0": PATTERN, "2": PATTERN}
    before = model(x)
    with torch.no_grad():
        first = twin[0]
        assert isinstance(first, NMLinear)
        first.weight.zero_()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "make", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deep", "flat", "pickle"]
)
def test_a_copy_keeps_a_fixed_mask_alone(make: Callable[[NMLinear], NMLinear], fixed: bool) -> None:
    layer = sparse_layer()
    cache_masks(layer)
    layer.fixed_mask = fixed
    mask = layer.current_mask()
    twin = make(layer)
    assert layer.mask is mask
    with torch.no_grad():
        twin.weight.copy_(twin.weight.flip(1))  # what an average or another loop makes of it
    assert torch.equal(twin.current_mask(), mask if fixed else magnitude_mask(twin.weight, PATTERN))


def test_an_average_ranks_its_own_weights() -> None:
    model = sparse_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    SparseStep(model, optimizer, "sr-ste", 0.1)
    x = torch.randn(16, 8)
    average: AveragedModel | None = None
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if average is None:
            average = AveragedModel(model)
        average.update_parameters(model)
    assert average is not None
    fresh = sparse_network()
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(average(x), fresh(x))


# That torch.jit is going is what torch warns of.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_trace_of_a_layer_in_training_is_refused() -> None:
    model = sparse_network()
    with pytest.raises(ValueError, match="what save_packed or export_dense has written"):
        torch.jit.trace(model, torch.randn(3, 8), check_trace=False)


@pytest.mark.parametrize("cached", [False, True])
def test_torch_save_of_the_module(cached: bool, tmp_path: Path) -> None:
    model = sparse_network()
    if cached:
        cache_masks(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))
    assert type(loaded[0]) is NMLinear


def test_the_state_dict_is_that_of_the_dense_model(tmp_path: Path) -> None:
    model = sparse_network()
    cache_masks(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    dense = network()
    assert list(state) == list(dense.state_dict())
    dense.load_state_dict(state)
    assert torch.equal(dense[2].weight, state["2.weight"])  # type: ignore[arg-type]
    assert torch.equal(state["2.weight"], model.state_dict()["2.weight"])


def test_loading_weights_drops_a_kept_mask() -> None:
    layer, other = sparse_layer(), sparse_layer()
    cache_masks(layer)
    layer.load_state_dict(other.state_dict())
    assert layer.mask is None
    assert torch.equal(layer(torch.ones(8)), other(torch.ones(8)))


def test_loading_weights_keeps_a_fixed_mask() -> None:
    layer, other = sparse_layer(), sparse_layer()
    cache_masks(layer)
    layer.fixed_mask = True
    fixed = layer.current_mask()
    assert not torch.equal(fixed, other.current_mask())
    layer.load_state_dict(other.state_dict())
    assert layer.mask is fixed
    assert torch.equal(layer(torch.ones(8)), F.linear(torch.ones(8), apply_mask(other.weight, fixed), other.bias))


@pytest.mark.parametrize("cast", ["to", "half", "double"])
def test_casts_keep_the_mask_of_the_master(cast: str) -> None:
    # In bf16 and fp16 the four weights of each group are equal: their own ranking would keep the first two.
    layer = sparse_layer()
    with torch.no_grad():
        layer.weight.copy_(1 + torch.arange(8) * 2.0**-20)
    cache_masks(layer)
    if cast == "to":
        layer.to(torch.bfloat16)
    else:
        getattr(layer, cast)()
    assert layer.weight.dtype is {"to": torch.bfloat16, "half": torch.float16, "double": torch.float64}[cast]
    assert layer.mask is not None
    assert layer.mask.dtype is torch.uint8
    assert layer.mask.tolist() == [0b1100_1100] * 4
    assert layer(torch.ones(8, dtype=layer.weight.dtype)).dtype is layer.weight.dtype


def test_a_mask_moves_with_the_layer() -> None:
    layer = sparse_layer()
    cache_masks(layer)
    layer.to("meta")
    assert layer.mask is not None
    assert layer.mask.device.type == "meta"


# torch's own tracer instantiates an autograd.Function and then warns of it.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(4, 8)], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_in_one_graph(backend: str, pattern: NMPattern, cached: bool) -> None:
    torch.compiler.reset()
    layer = sparse_layer(16, 8, pattern)
    if cached:
        cache_masks(layer)
    twin = copy.deepcopy(layer)
    twin.mask = layer.mask
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(3, 16)
    for _ in range(2):
        output, expected = compiled(x), twin(x)
        assert torch.equal(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
        assert layer.weight.grad is not None
        assert twin.weight.grad is not None
        assert torch.equal(layer.weight.grad, twin.weight.grad)
        with torch.no_grad():  # other masks, which the graph must not have baked in
            for either in (layer, twin):
                either.weight.copy_(either.weight.flip(1))
                if either.mask is not None:
                    either.mask = magnitude_mask(either.weight, pattern)


def test_autocast_ranks_the_master_and_multiplies_in_bf16() -> None:
    layer = sparse_layer()
    with torch.no_grad():
        layer.weight.copy_(1 + torch.arange(8) * 2.0**-20)  # all equal in bf16
    x = torch.tensor([1.0, 1.0, 0.0, 0.0] * 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, layer.bias.to(torch.bfloat16).detach())  # the inputs of kept weights are zero
    output.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is torch.float32
    assert layer.weight.grad.tolist() == [x.tolist()] * 4  # dense: pruned weights have theirs


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, cached: bool) -> None:
    model = sparse_network()
    if cached:
        cache_masks(model)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 8)
    recomputed = x.clone().requires_grad_()
    checkpoint(model, recomputed, use_reentrant=reentrant).square().sum().backward()
    plain = x.clone().requires_grad_()
    twin(plain).square().sum().backward()
    assert recomputed.grad is not None
    assert plain.grad is not None
    assert torch.equal(recomputed.grad, plain.grad)
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        assert torch.equal(parameter.grad, expected.grad)


def test_an_optimizer_built_before_sparsify_trains_the_same_weights() -> None:
    early, late = network(), network()
    late.load_state_dict(early.state_dict())
    optimizer_of_early = torch.optim.AdamW(early.parameters(), lr=0.1)
    for model in (early, late):
        sparsify(model, NMSparseConfig(PATTERN))
    optimizer_of_late = torch.optim.AdamW(late.parameters(), lr=0.1)
    start = copy.deepcopy(early.state_dict())
    for model, optimizer in ((early, optimizer_of_early), (late, optimizer_of_late)):
        SparseStep(model, optimizer, "sr-ste", 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
    for name, weight in early.state_dict().items():
        assert torch.equal(weight, late.state_dict()[name])
        assert not torch.equal(weight, start[name])


def test_sparse_layers_names_every_form() -> None:
    model = sparse_network()
    first = model[0]
    assert isinstance(first, NMLinear)
    first.to_stock()
    model.append(nn.Linear(4, 4))
    assert sparse_layers(model) == {"0": PATTERN, "2": PATTERN}
