"""Convolutions and transformers' Conv1D in sparse training: groups along the input channels, as the paper has them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_nmsparse.calibration import Calibration
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.conv1d import NMConv1D
from hf_nmsparse.layers import NMConv1d, NMConv2d, NMLayer, channel_dim, sparse_layers
from hf_nmsparse.masks import count_violations
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.schedule import Schedule
from hf_nmsparse.sparse_model import finalize, report, sparsify
from hf_nmsparse.srste import METHODS, soft_threshold

PATTERN = NMPattern(2, 4)
CONFIG = NMSparseConfig(PATTERN, convolutions=True)

# A layer of each kind with eight input channels, and what goes through it.
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(8, 5, 3, stride=2, padding=1, padding_mode="reflect"), (2, 8, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(8, 5, 3, padding=2, dilation=2, bias=False), (2, 8, 6)),
    "transposed": (lambda: Conv1D(5, 8), (2, 3, 8)),
}
kinds = pytest.mark.parametrize("kind", LAYERS)


def sparse(kind: str, **settings: Any) -> Any:
    layer = LAYERS[kind][0]()
    sparsify(layer, NMSparseConfig(PATTERN, convolutions=True, **settings))
    return layer


def official_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """The mask of SparseConv in github.com/NM-sparsity, written down from its rule: groups of M along the channels."""
    channels_last = weight.detach().abs().permute(0, 2, 3, 1)
    groups = channels_last.reshape(-1, m)
    pruned = torch.argsort(groups, dim=1)[:, : m - n]
    return torch.ones_like(groups).scatter_(1, pruned, 0).reshape(channels_last.shape).permute(0, 3, 1, 2)


class OfficialWeight(torch.autograd.Function):
    """Its forward and backward: ``mask * w``, and ``grad + decay * (1 - mask) * w``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int, m: int, decay: float) -> Tensor:
        mask = official_mask(weight, n, m)
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, mask = ctx.saved_tensors
        return grads[0] + ctx.decay * (1 - mask) * weight, None, None, None


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_the_official_rule_over_200_steps(n: int, m: int) -> None:
    """With a decay so large that the mask changes and pruned weights shrink visibly."""
    torch.manual_seed(0)
    ours: Any = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
    weights = [layer.weight.detach().clone().requires_grad_() for layer in (ours[0], ours[2])]
    biases = [layer.bias.detach().clone().requires_grad_() for layer in (ours[0], ours[2])]
    started = [official_mask(weight, n, m) for weight in weights]
    sparsify(ours, NMSparseConfig(NMPattern(n, m), convolutions=True))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    SparseStep(ours, optimizer, "sr-ste", decay=0.02)
    theirs = torch.optim.SGD([*weights, *biases], lr=0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(200):
        x, target = torch.randn(4, 8, 5, 5).double(), torch.randn(4, 4, 5, 5).double()
        used = [OfficialWeight.apply(weight, n, m, 0.02) for weight in weights]
        hidden = F.relu(F.conv2d(x, used[0], biases[0], padding=1))
        for step, output in ((theirs, F.conv2d(hidden, used[1], biases[1])), (optimizer, ours(x))):
            step.zero_grad()
            F.mse_loss(output, target).backward()
            step.step()
    for layer, weight, before in zip((ours[0], ours[2]), weights, started, strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-6)
        assert not torch.equal(official_mask(weight, n, m), before)


def test_groups_lie_along_the_channels_of_each_place() -> None:
    """By hand: two output channels, a kernel of one row and two places, four input channels."""
    layer = nn.Conv2d(4, 2, (1, 2), bias=False)
    rows = [[[1.0, -4.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]], [[0.0, -1.0, 0.0, -2.0], [-9.0, 8.0, 7.0, -6.0]]]
    kept = [[[0.0, -4.0, 3.0, 0.0], [5.0, 5.0, 0.0, 0.0]], [[0.0, -1.0, 0.0, -2.0], [-9.0, 8.0, 0.0, 0.0]]]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows)[:, None].permute(0, 3, 1, 2))  # [out, 1, 2, in] to [out, in, 1, 2]
    sparsify(layer, CONFIG)
    finalize(layer)
    assert layer.weight[:, :, 0].transpose(1, 2).tolist() == kept
    assert not layer.weight.signbit()[layer.weight == 0].any()


def test_groups_of_a_transposed_weight_by_hand() -> None:
    layer = Conv1D(2, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 9.0], [-4.0, 0.5], [3.0, 0.25], [2.0, -1.0]]))
    sparsify(layer, CONFIG)
    assert torch.equal(
        layer(torch.eye(4)) - layer.bias, torch.tensor([[0.0, 9.0], [-4.0, 0.0], [3.0, 0.0], [0.0, -1.0]])
    )


@kinds
def test_the_forward_is_the_stock_one_with_the_masked_weight(kind: str) -> None:
    build, shape = LAYERS[kind]
    stock = build()
    layer = copy.deepcopy(stock)
    assert sparsify(layer, CONFIG) == {}
    assert isinstance(layer, NMLayer)
    assert isinstance(layer, type(stock))
    assert "pattern=2:4" in repr(layer)
    x, start = torch.randn(shape), layer.weight.detach().clone()
    output = layer(x)
    assert not torch.equal(output, stock(x))
    with torch.no_grad():
        stock.weight.copy_(layer.masked(layer.weight, layer.current_mask()))
    assert torch.equal(output, stock(x))
    assert torch.equal(layer.weight, start)
    rows = stock.weight.movedim(channel_dim(stock), -1)
    assert count_violations(rows, PATTERN) == 0
    assert (rows != 0).float().mean() == 0.5
    output.square().sum().backward()
    stock(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, stock.weight.grad)  # the dense gradient at the masked weight
    finalize(layer)
    assert torch.equal(layer.weight, stock.weight)
    assert type(layer.to_stock()) is type(stock)
    assert sparse_layers(layer) == {"": PATTERN}


@kinds
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_it(kind: str, method: str) -> None:
    torch.manual_seed(0)
    layer = sparse(kind, soft=METHODS[method].soft)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    step = SparseStep(layer, optimizer, method, steps=8, track_groups=True)
    x = torch.randn(LAYERS[kind][1])
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (layer(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    flips = step.take_flips()[""]
    assert flips.weights == layer.weight.numel()
    assert (flips.sad > 0) == (not METHODS[method].fixed_mask)
    assert torch.equal(layer.mask, layer.current_mask())
    state = step.layer_states()[""]
    assert state.kept > state.pruned
    assert state.changed is not None
    assert (state.changed > 0) == (not METHODS[method].fixed_mask)
    step.load_state_dict(step.state_dict())
    finalize(layer)
    assert count_violations(layer.rows(), PATTERN) == 0


@kinds
def test_the_rule_decays_what_is_pruned(kind: str) -> None:
    layer = sparse(kind)
    before = layer.weight.detach().clone()
    kept = layer.masked(before, layer.current_mask()) != 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    SparseStep(layer, optimizer, "sr-ste", decay=0.5)
    layer.weight.grad = torch.zeros_like(before)
    optimizer.step()
    assert torch.equal(layer.weight, torch.where(kept, before, before / 2))


def test_schedules_reach_it() -> None:
    layer, x = sparse("conv2d"), torch.randn(1, 8, 6, 6)
    step = SparseStep(
        layer, torch.optim.SGD(layer.parameters(), 0.1), "sr-ste", schedule=Schedule(dense_head=0.5), steps=2
    )
    stock = nn.Conv2d(8, 5, 3, stride=2, padding=1, padding_mode="reflect")
    stock.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), stock(x))
    with pytest.raises(ValueError, match=r"a layer of 5x8x3x3 computes with its pruned weights times 1"):
        finalize(layer)
    step.start(1, 2)
    assert not torch.equal(layer(x), stock(x))
    layer.pruned_scale = 0.5
    with torch.no_grad():
        stock.weight.copy_((stock.weight + layer.masked(stock.weight, layer.current_mask())) / 2)
    torch.testing.assert_close(layer(x), stock(x))


def test_the_soft_threshold_is_that_of_the_rows() -> None:
    layer = sparse("conv2d", soft=True)
    rows = layer.rows().contiguous().detach()
    expected = soft_threshold(rows, layer.current_mask(), PATTERN).movedim(-1, 1)
    assert torch.equal(layer.masked(layer.weight, layer.current_mask()), expected)


def test_channels_last_weights_stay_so() -> None:
    torch.manual_seed(0)
    layer, x = sparse("conv2d"), torch.randn(2, 8, 6, 6)
    twin = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    output = twin(last)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, layer(x))
    assert torch.equal(twin.current_mask(), layer.current_mask())
    assert layer.masked(layer.weight, layer.current_mask()).is_contiguous()
    used = twin.masked(twin.weight, twin.current_mask())
    assert used.is_contiguous(memory_format=torch.channels_last)
    for each, inputs in ((layer, x), (twin, last)):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        SparseStep(each, optimizer, "sr-ste")
        each(inputs).square().sum().backward()
        optimizer.step()
    assert twin.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(twin.weight, layer.weight)
    assert torch.equal(twin.mask, layer.mask)


@kinds
def test_autocast_ranks_the_master(kind: str) -> None:
    layer = sparse(kind)
    with torch.no_grad():  # all equal in bf16: the master's own order decides
        layer.rows().copy_(1 + torch.arange(8) * 2.0**-20)
    x = torch.ones(LAYERS[kind][1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype is torch.bfloat16
    output.sum().backward()
    assert layer.weight.grad.dtype is torch.float32
    kept = layer.in_rows(layer.masked(layer.weight.detach(), layer.current_mask())) != 0
    assert kept.reshape(-1, 8).eq(torch.tensor([False, False, True, True] * 2)).all()


@kinds
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_copies_pickles_and_compiles(kind: str) -> None:
    layer, x = sparse(kind), torch.randn(LAYERS[kind][1])
    expected = layer(x)
    layer.mask = layer.current_mask()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.mask is None
        assert torch.equal(twin(x), expected)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.grouped = nn.Conv1d(16, 16, 3, groups=2)
        self.narrow = nn.Conv2d(6, 8, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2)
        self.volume = nn.Conv3d(8, 8, 1)
        self.body = nn.Conv2d(16, 8, 1)
        self.text = nn.Conv1d(8, 8, 3)
        self.gpt = Conv1D(8, 6)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)


def test_what_stays_dense_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    model = Mixed()
    assert sparsify(model, NMSparseConfig("2:4", ignore=["head"], convolutions=True)) == {
        "stem": "in_channels 3 is not a multiple of 4",
        "depthwise": "its channels are convolved in 16 groups of their own",
        "grouped": "its channels are convolved in 2 groups of their own",
        "narrow": "in_channels 6 is not a multiple of 4",
        "up": "its class is ConvTranspose2d, not nn.Conv2d",
        "volume": "its class is Conv3d, not nn.Conv2d",
        "gpt": "in_features 6 is not a multiple of 4",
        "head": "ignore rule 'head'",
    }
    assert [type(model.get_submodule(name)) for name in ("body", "text")] == [NMConv2d, NMConv1d]
    found = report(model)
    assert [layer.name for layer in found.sparse] == ["body", "text", "linear"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(maxsplit=4) == ["stem", "16x3x3x3", "dense", "100.0%", "in_channels 3 is not a multiple of 4"]
    assert lines[7].split() == ["body", "8x16x1x1", "2:4", "50.0%", "32"]
    assert lines[-1].startswith("3 sparse and 8 dense layers, 384 sparse weights, ")
    assert found.violations == 32 + 48 + 16
    finalize(model)
    assert report(model).violations == 0


def test_convolutions_are_left_alone_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    model = Mixed()
    assert sparsify(model, NMSparseConfig("2:4")) == {}
    assert sparse_layers(model) == {"linear": PATTERN, "head": PATTERN}
    assert report(model).layers[0].name == "linear"
    assert "2 sparse and 0 dense linear layers" in capsys.readouterr().out
    with pytest.raises(ValueError, match="targets rule 'body' matches no linear layer of the model; this model has"):
        sparsify(Mixed(), NMSparseConfig("2:4", targets=["body"]))
    with pytest.raises(ValueError, match="rule 'nobody' matches no linear layer or convolution of the model"):
        sparsify(Mixed(), NMSparseConfig("2:4", targets=["nobody"], convolutions=True))


def test_a_layer_that_does_not_divide_stays_as_it_is() -> None:
    layer = nn.Conv2d(6, 4, 1)
    with pytest.raises(ValueError, match="in_features 6 is not a multiple of 4"):
        NMConv2d.from_stock(layer, PATTERN)
    assert type(layer) is nn.Conv2d


def test_calibration_prunes_linear_layers_alone() -> None:
    calibration = Calibration({"input": torch.ones(1, 4)})
    with pytest.raises(ValueError, match=r"calibration prunes nn\.Linear alone; body is none, leave it to ignore"):
        sparsify(Mixed(), NMSparseConfig("2:4", ignore=["head"], convolutions=True), calibration=calibration)


def test_the_transposed_layer_is_one_to_others() -> None:
    layer = sparse("transposed")
    assert isinstance(layer, NMConv1D)
    assert isinstance(layer, Conv1D)
