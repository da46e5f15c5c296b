from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_nmsparse.engine_spec import FAMILIES
from hf_nmsparse.module_fit import misfit
from tests.test_engine_spec import tiny_model
from tests.tiny import marian


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_as_it_is_made_fits(family: str) -> None:
    assert misfit(tiny_model(family), [nn.Linear]) is None


def test_a_look_changes_nothing() -> None:
    model, state = marian(), torch.get_rng_state()
    before = model.config.to_dict()
    assert misfit(model, [nn.Linear]) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == before


def test_what_differs_is_named_as_long_as_it_does() -> None:
    model: Any = marian()
    attention = model.model.encoder.layers[0].self_attn
    attention.scaling, scaling = 2.0, attention.scaling
    assert misfit(model, [nn.Linear]) == (
        f"model.encoder.layers.0.self_attn.scaling is 2.0, and the configuration says {scaling!r}"
    )
    attention.scaling = scaling
    model.config.decoder_layers = 1
    assert misfit(model, [nn.Linear]) == "the model has a model.decoder.layers.1, and the configuration says otherwise"
    del model.model.decoder.layers[1]
    assert misfit(model, [nn.Linear]) is None


def test_what_stands_for_a_linear_layer_and_what_is_free() -> None:
    class Other(nn.Linear):
        pass

    model: Any = marian()
    model.model.encoder.layers[0].fc1.__class__ = Other
    assert misfit(model, [nn.Linear, Other]) is None
    assert misfit(model, [nn.Linear]) == ("model.encoder.layers.0.fc1 is a Other, and the configuration says Linear")
    model.model.encoder.layers[0].fc1.__class__ = nn.Linear
    model.model.encoder.layers[0].dropout = 0.5
    model.model.encoder.of_mine = 3
    assert misfit(model.eval(), [nn.Linear]) is None
