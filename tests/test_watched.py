"""What counts as a change of a tensor."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_nmsparse.kernels.watched import WatchedParameter, state_of, watch


def parameter() -> nn.Parameter:
    made = nn.Parameter(torch.arange(4.0))
    watch(made)
    return made


def test_changes_are_counted() -> None:
    weight = parameter()
    states = [state_of(weight)]
    with torch.no_grad():
        weight.add_(1)
    states.append(state_of(weight))
    weight.data.add_(1)
    states.append(state_of(weight))
    weight.data = torch.ones(4)
    states.append(state_of(weight))
    weight.grad = torch.ones(4)
    torch.optim.SGD([weight], lr=0.1, fused=True).step()
    states.append(state_of(weight))
    assert len(set(states)) == len(states)
    assert state_of(weight) == states[-1]


def test_only_plain_parameters_are_watched() -> None:
    class Mine(nn.Parameter):
        pass

    for tensor in (torch.ones(2), Mine(torch.ones(2))):
        kind = type(tensor)
        watch(tensor)
        assert type(tensor) is kind
    with torch.inference_mode():
        made = nn.Parameter(torch.ones(2))
    watch(made)
    assert type(made) is nn.Parameter
    with pytest.raises(RuntimeError):
        state_of(made)


def test_it_is_a_parameter_everywhere_else() -> None:
    weight = parameter()
    assert isinstance(weight, WatchedParameter)
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert isinstance(twin, nn.Parameter)
        assert torch.equal(twin, weight)
    weight.to_parameter()
    assert type(weight) is nn.Parameter
    assert state_of(weight)[0] == 0
