"""Calibration: the batch, and the pass that prunes layer by layer without its padding."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_nmsparse import calibration as module
from hf_nmsparse import one_shot
from hf_nmsparse.calibration import Calibration, prune_layers
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.layers import NMLinear
from hf_nmsparse.losses import decoder_inputs
from hf_nmsparse.masks import count_violations, magnitude_mask
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.sparse_model import finalize, select_layers, sparsify
from tests.test_permutation import FAMILIES
from tests.tiny import marian, token_pairs

TWO_OF_FOUR = NMPattern(2, 4)
METHODS = list(one_shot.ONE_SHOT)


def test_a_batch_of_pairs() -> None:
    """Two sentences of two tokens each: lengths that could be taken for one another get a column more."""
    model = marian()
    pairs = [{"input_ids": [5, 1], "labels": [7, 8]}, {"input_ids": [6, 1], "labels": [1]}]
    given = Calibration.of_pairs(model, pairs).inputs
    assert given["input_ids"].tolist() == [[5, 1, 0], [6, 1, 0]]
    assert given["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert given["decoder_input_ids"].tolist() == [[0, 7, 8, 0], [0, 1, 0, 0]]
    assert given["decoder_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]


def test_the_first_pairs_that_are_short_enough() -> None:
    pairs = [{"input_ids": [number] * length, "labels": [1]} for number, length in enumerate([1, 9, 2, 3], 3)]
    given = Calibration.of_pairs(marian(), iter(pairs), count=2, longest=5).inputs
    assert given["input_ids"][:, 0].tolist() == [3, 5]
    with pytest.raises(ValueError, match="calibration: no pair of 1 to 1 tokens a side; give other text"):
        Calibration.of_pairs(marian(), pairs[1:], longest=1)
    long = [{"input_ids": [5] * length, "labels": [1] * length} for length in (62, 63, 5)]  # a model of 64 positions
    model = marian()
    calibration = Calibration.of_pairs(model, long)
    assert calibration.inputs["attention_mask"].sum(dim=1).tolist() == [62, 5]
    sparsify(model, NMSparseConfig("2:4"), calibration=calibration)


@pytest.mark.parametrize(
    ("inputs", "method", "message"),
    [
        ({}, "magnitude", "calibration: method is one of wanda, sparsegpt, got 'magnitude'"),
        (
            {"attention_mask": torch.ones(2, 3), "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])},
            "wanda",
            "different numbers, got masks of [2, 3] and [2, 3]; pad one of them",
        ),
        ({"attention_mask": torch.tensor([[1, 0], [1, 1]])}, "wanda", "different numbers, got masks of [2, 2]"),
    ],
)
def test_refusals(inputs: dict[str, Tensor], method: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Calibration(inputs, method)


def seen(monkeypatch: pytest.MonkeyPatch, model: Any, given: Calibration) -> dict[int, Tensor]:
    """What each layer is calibrated on, by the order in which they are reached, as the method sees it."""
    found: dict[int, Tensor] = {}

    def method(weight: Tensor, inputs: Tensor, pattern: NMPattern) -> Tensor:
        found[len(found)] = inputs
        return one_shot.wanda(weight, inputs, pattern)

    monkeypatch.setattr(module, "ONE_SHOT", {given.method: method})
    chosen, _ = select_layers(model, NMSparseConfig("2:4"))
    prune_layers(model, chosen, TWO_OF_FOUR, given)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_does_not_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair beside a longer one is seen as alone: on both sides and through both attentions."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    pairs = [{"input_ids": [5, 6, 2], "labels": [7, 8, 9, 2]}, {"input_ids": [4, 9, 9, 8, 3, 2], "labels": [5, 2]}]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    together = seen(monkeypatch, model, Calibration.of_pairs(model, pairs, method="wanda"))
    chosen, _ = select_layers(model, NMSparseConfig("2:4"))
    assert len(together) == len(chosen)
    assert {len(rows) for rows in together.values()} == {3 + 6, 4 + 2}
    # The first layer sees the dense embeddings, which do not depend on what has been pruned.
    model.load_state_dict(state)
    alone = [seen(monkeypatch, model, Calibration.of_pairs(model, [pair], method="wanda")) for pair in pairs[:1]]
    first = together[0].reshape(-1, together[0].shape[1])
    assert all((first - row).abs().sum(dim=1).min() < 1e-4 for row in alone[0][0])


def test_layers_see_what_comes_out_of_pruned_layers() -> None:
    """The second layer's input is that of the pruned first one, and its Hessian of it alone."""
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.Sequential(first, nn.ReLU(), second)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(50, 8)
    sparsify(model, NMSparseConfig("2:4"), calibration=Calibration({"input": x}))
    one = one_shot.sparsegpt(dense["0.weight"], x, TWO_OF_FOUR)
    hidden = torch.relu(torch.nn.functional.linear(x, one, dense["0.bias"]))
    assert torch.equal(first.weight, one)
    assert torch.allclose(second.weight, one_shot.sparsegpt(dense["2.weight"], hidden, TWO_OF_FOUR), atol=1e-6)


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4"])
def test_masks_of_magnitudes_agree(text: str, method: str, permute: bool) -> None:
    """Pruned masters are zero, so that the first forward and `finalize` change nothing."""
    model = marian(init_std=0.3).train()
    pairs = token_pairs(40)
    given = Calibration.of_pairs(model, pairs, count=30, method=method)
    sparsify(model, NMSparseConfig(text), calibration=given, permute=permute)
    layers = [layer for layer in model.modules() if isinstance(layer, NMLinear)]
    assert len(layers) == 32
    assert all(count_violations(layer.weight, layer.pattern) == 0 for layer in layers)
    assert all(layer.training for layer in model.modules())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    finalize(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_training_goes_on_from_there() -> None:
    """Of SR-STE: the first masks are the pruning's, and what it pruned may come back."""
    model = marian(init_std=0.3)
    given = Calibration.of_pairs(model, token_pairs(40), method="wanda")
    sparsify(model, NMSparseConfig("2:4"), calibration=given)
    layer = model.model.encoder.layers[0].fc1
    pruned = layer.weight == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    step = SparseStep(model, optimizer, method="sr-ste", decay=2e-4)
    assert torch.equal(layer.current_mask(), magnitude_mask((~pruned).float(), TWO_OF_FOUR))
    labels = torch.tensor([[8, 9, 1]])
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": decoder_inputs(model, labels)}
    for _ in range(3):
        torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (layer.weight[pruned] != 0).any()
    step.remove()


@pytest.mark.parametrize("method", METHODS)
def test_the_outputs_of_a_model_change_less(method: str) -> None:
    """On the very text of the calibration, beside magnitudes."""
    dense, by_magnitude, model = (marian(init_std=0.2).eval() for _ in range(3))
    given = Calibration.of_pairs(model, token_pairs(60), method=method)
    sparsify(by_magnitude, NMSparseConfig("2:4"))
    sparsify(model, NMSparseConfig("2:4"), calibration=given)
    real = given.inputs["decoder_attention_mask"].bool()
    with torch.no_grad():
        outputs = [one(**given.inputs).logits[real] for one in (dense, by_magnitude, model)]
    assert (outputs[2] - outputs[0]).square().mean() < 0.9 * (outputs[1] - outputs[0]).square().mean()


def test_errors_name_the_layer_and_leave_no_hook() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "left": nn.Linear(8, 8)})
    model.forward = lambda x, **_: model["used"](x)
    config = NMSparseConfig("2:4")
    for inputs, message in (
        ({"x": torch.rand(3, 2, 8)}, "the batch never reaches left; give more text, or let ignore keep it dense"),
        ({"x": torch.full((2, 8), torch.nan)}, "the input of used holds NaN or infinity; check the model"),
        (
            {"x": torch.rand(3, 2, 8), "attention_mask": torch.ones(3, 4)},
            "the tokens that reach used are [3, 2] and the masks of the batch [3, 4], [4, 3]",
        ),
        ({"x": torch.rand(3, 2, 8), "attention_mask": torch.zeros(3, 2)}, "nothing but padding"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sparsify(model, config, calibration=Calibration(inputs))
        assert not any(layer._forward_pre_hooks for layer in model.modules())
    with pytest.raises(ValueError, match="trained masters know their masks; leave out calibration and permute"):
        sparsify(model, config, trained=True, permute=True)
    with pytest.raises(ValueError, match=r"takes a Calibration, got dict; see Calibration\.of_pairs"):
        sparsify(model, config, calibration={})  # type: ignore[arg-type]
