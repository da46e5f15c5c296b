"""One-shot pruning of a single layer: choices and corrections by hand, and errors of outputs beside magnitude's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_nmsparse.masks import apply_mask, count_violations, magnitude_mask
from hf_nmsparse.one_shot import ONE_SHOT, sparsegpt, wanda
from hf_nmsparse.pattern import NMPattern

TWO_OF_FOUR = NMPattern(2, 4)


def correlated(tokens: int, width: int) -> Tensor:
    """Inputs of a few common causes, whose columns differ in size too."""
    return torch.randn(tokens, width // 4) @ torch.randn(width // 4, width) * torch.rand(width).exp()


def test_wanda_by_hand() -> None:
    inputs = torch.tensor([[3.0, 0.0, 1.0, 0.0], [4.0, 1.0, 0.0, 2.0]])  # norms 5, 1, 1, 2
    weight = torch.tensor([[1.0, 4.0, -6.0, 2.0], [0.0, -1.0, 1.0, -1.0]])
    # scores 5 4 6 4 and 0 1 1 2: of equal ones the lower index
    assert torch.equal(wanda(weight, inputs, TWO_OF_FOUR), torch.tensor([[1.0, 0, -6, 0], [0, -1, 0, -1]]))


def test_sparsegpt_by_hand() -> None:
    """One of two in H = [[2, 1], [1, 2]]: removing w moves the other by w * H_12 / H_22."""
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    # H^-1 = [[2, -1], [-1, 2]] / 3, U = [[sqrt(2/3), -1/sqrt(6)], [0, sqrt(1/2)]]: costs w1^2 * 3/2 and w2^2 * 2.
    weight = torch.tensor([[1.0, 2.0], [2.0, 1.0], [2.1, 2.0]])
    expected = torch.tensor([[0.0, 2.5], [2.0, 0.0], [0.0, 3.05]])  # 1.5 * 2.1^2 = 6.6 < 2 * 2^2
    assert torch.allclose(sparsegpt(weight, inputs, NMPattern(1, 2), damping=0.0), expected)


def test_sparsegpt_solves_the_least_squares_where_the_pruned_come_first() -> None:
    """Two rows of one group: what is kept is the best that these two columns can do for the outputs of all four."""
    inputs = correlated(40, 8)[:, :4] + torch.randn(40, 4)
    weight = torch.tensor([[0.01, -0.02, 1.0, 2.0], [0.02, 0.01, -3.0, 1.0]])
    pruned = sparsegpt(weight, inputs, TWO_OF_FOUR, damping=0.0)
    best = torch.linalg.lstsq(inputs[:, 2:], inputs @ weight.t()).solution.t()
    assert torch.equal(pruned[:, :2], torch.zeros(2, 2))
    assert torch.allclose(pruned[:, 2:], best, atol=1e-5)


def test_damping_adds_to_the_diagonal() -> None:
    inputs, weight = torch.eye(2), torch.tensor([[1.0, 2.0]])
    more = torch.cat([inputs, inputs * 0.5**0.5])  # H = 1.5 I, as a damping of 0.5 makes of I
    both = (sparsegpt(weight, inputs, NMPattern(1, 2), 0.5), sparsegpt(weight, more, NMPattern(1, 2), 0.0))
    assert torch.equal(*both)


@given(st.sampled_from(["1:2", "2:4", "3:4", "4:8", "1:16"]), st.integers(0, 1000))
def test_independent_inputs_need_no_correction(text: str, seed: int) -> None:
    """With a diagonal Hessian SparseGPT keeps what Wanda keeps, as it is."""
    torch.manual_seed(seed)
    pattern, weight, inputs = NMPattern.parse(text), torch.randn(6, 32), torch.diag(torch.rand(32) + 0.1)
    assert torch.allclose(sparsegpt(weight, inputs, pattern, damping=0.0), wanda(weight, inputs, pattern))


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "2:3"])
def test_errors_of_outputs(text: str) -> None:
    """SparseGPT's are below Wanda's, and these below magnitude's; blocks of columns are crossed."""
    pattern, inputs, weight = NMPattern.parse(text), correlated(600, 192), torch.randn(32, 192)

    def error(pruned: Tensor) -> float:
        return float((inputs @ (weight - pruned).t()).square().mean())

    by_magnitude = apply_mask(weight, magnitude_mask(weight, pattern))
    pruned = {name: prune(weight, inputs, pattern) for name, prune in ONE_SHOT.items()}
    assert all(count_violations(one, pattern) == 0 for one in pruned.values())
    assert error(pruned["sparsegpt"]) < 0.7 * error(pruned["wanda"])
    assert error(pruned["wanda"]) < 0.95 * error(by_magnitude)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = torch.randn(8, 48), correlated(100, 48)
    whole = sparsegpt(weight, inputs, TWO_OF_FOUR)
    monkeypatch.setattr("hf_nmsparse.one_shot._BLOCK", 8)
    assert torch.allclose(sparsegpt(weight, inputs, TWO_OF_FOUR), whole, atol=1e-6)


@pytest.mark.parametrize("prune", ONE_SHOT.values(), ids=ONE_SHOT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weight_given_stays(prune: Callable[[Tensor, Tensor, NMPattern], Tensor], dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8, dtype=dtype)
    before = weight.clone()
    pruned = prune(weight, torch.randn(30, 8), TWO_OF_FOUR)
    assert torch.equal(weight, before)
    assert pruned.dtype == dtype
    assert torch.equal(magnitude_mask(pruned, TWO_OF_FOUR), magnitude_mask((pruned != 0).to(dtype), TWO_OF_FOUR))


def test_inputs_that_are_never_there() -> None:
    """Channels of zeros are pruned first, whatever stands in their weights."""
    inputs = torch.randn(20, 4)
    inputs[:, :2] = 0
    weight = torch.tensor([[100.0, 100.0, 0.1, 0.2]])
    for prune in ONE_SHOT.values():
        assert torch.allclose(prune(weight, inputs, TWO_OF_FOUR), torch.tensor([[0.0, 0.0, 0.1, 0.2]]))
    assert sparsegpt(weight, torch.zeros(3, 4), TWO_OF_FOUR).count_nonzero() == 2


def test_fewer_tokens_than_channels() -> None:
    weight, inputs = torch.randn(4, 16), torch.randn(3, 16)
    assert sparsegpt(weight, inputs, TWO_OF_FOUR).isfinite().all()
    with pytest.raises(ValueError, match="the Hessian of 1 tokens is singular with a damping of 0; give more"):
        sparsegpt(weight, torch.ones(1, 16), TWO_OF_FOUR, damping=0.0)
