"""NMSparseConfig: what it takes, what it writes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.pattern import NMPattern


def test_defaults() -> None:
    config = NMSparseConfig()
    assert (config.pattern, config.targets, config.ignore) == (NMPattern(2, 4), None, None)


def test_what_is_given_is_normalised() -> None:
    config = NMSparseConfig(NMPattern(4, 8), targets="fc1", ignore=["fc2", "out_proj"])
    assert (config.pattern, config.targets, config.ignore) == (NMPattern(4, 8), ("fc1",), ("fc2", "out_proj"))
    assert config == NMSparseConfig("4:8", ("fc1",), iter(["fc2", "out_proj"]))
    assert hash(config) == hash(NMSparseConfig("4:8", ["fc1"], ["fc2", "out_proj"]))


@pytest.mark.parametrize(
    ("config", "record"),
    [
        (NMSparseConfig(), {"pattern": "2:4"}),
        (NMSparseConfig("1:4", ["fc1"]), {"pattern": "1:4", "targets": ["fc1"]}),
        (NMSparseConfig("4:8", ignore=[]), {"pattern": "4:8", "ignore": []}),
        (NMSparseConfig("2:4", ["a", "b"], ["c"]), {"pattern": "2:4", "targets": ["a", "b"], "ignore": ["c"]}),
    ],
)
def test_the_record_survives_json(config: NMSparseConfig, record: dict[str, Any]) -> None:
    assert config.to_dict() == record
    assert NMSparseConfig.from_dict(json.loads(json.dumps(record))) == config


def test_an_unknown_key_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown key 'target'; known keys are pattern, targets, ignore"):
        NMSparseConfig.from_dict({"pattern": "2:4", "target": ["fc1"]})


def test_no_targets_are_refused_and_no_ignored_layers_are_not() -> None:
    with pytest.raises(ValueError, match="targets is empty, so no layer would be sparse"):
        NMSparseConfig("2:4", targets=[])
    assert NMSparseConfig("2:4", ignore=[]).ignore == ()


@pytest.mark.parametrize("field", ["targets", "ignore"])
@pytest.mark.parametrize("rules", [5, True, 2.5, {"fc1": True}, [1], [None], [["fc1"]], "", ["fc1", ""]])
def test_what_is_no_list_of_names_is_refused(field: str, rules: Any) -> None:
    with pytest.raises(ValueError, match=f"config: {field} .*layer names such as 'fc1', got "):
        NMSparseConfig.from_dict({field: rules})


def test_a_bad_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="got 124; in YAML keep the quotes"):
        NMSparseConfig.from_dict({"pattern": 124})


def test_it_is_frozen_and_replaceable() -> None:
    config = NMSparseConfig("2:4", ["fc1"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.pattern = NMPattern(1, 4)  # type: ignore[misc]
    assert dataclasses.replace(config, pattern=NMPattern(1, 4)) == NMSparseConfig("1:4", ["fc1"])
