"""The mirror of the C++ engine's structures, and what is refused before C++ sees it."""

from __future__ import annotations

import ctypes
import re
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_nmsparse.kernels import engine
from hf_nmsparse.kernels.engine import (
    Activation,
    EarlyStopping,
    EngineConfig,
    SearchConfig,
    SideConfig,
    TableSlot,
    WeightSlot,
)

CSRC = Path(engine.__file__).parent / "csrc"
needs_engine = pytest.mark.skipif(engine.why_not() is not None, reason="the native library is not used")


def declared(kind: str, name: str) -> str:
    """The body of a struct or an enum of the headers, without comments."""
    headers = [(CSRC / header).read_text(encoding="utf-8") for header in ("engine/api.h", "unit.h")]
    text = re.sub(r"//[^\n]*", "", "\n".join(headers))
    found = re.search(rf"{kind} {name}\b[^{{]*{{(.*?)}};", text, re.DOTALL)
    assert found is not None, name
    return found[1]


@pytest.mark.parametrize("structure", [SideConfig, EngineConfig, SearchConfig], ids=lambda kind: kind.__name__)
def test_structures_are_those_of_the_header(structure: type[ctypes.Structure]) -> None:
    types: dict[str, Any] = {"int32_t": ctypes.c_int32, "float": ctypes.c_float, "SideConfig": SideConfig}
    expected = [
        (name.strip(), types[kind])
        for kind, names in re.findall(r"(\w+) ([\w, ]+);", declared("struct", structure.__name__))
        for name in names.split(",")
    ]
    assert [tuple(row) for row in structure._fields_] == expected
    assert ctypes.sizeof(structure) == sum(ctypes.sizeof(kind) for _, kind in expected)


@pytest.mark.parametrize("enum", [Activation, WeightSlot, TableSlot, EarlyStopping], ids=lambda kind: kind.__name__)
def test_numbers_are_those_of_the_header(enum: type[IntEnum]) -> None:
    values = [int(value) for value in re.findall(r"\w+ = (\d+)", declared("enum", enum.__name__))]
    counts = enum is not EarlyStopping  # the last entry of the others is their number
    assert values == [*sorted(entry.value for entry in enum), *([len(enum)] if counts else [])]


def test_structures_say_their_size_and_what_is_off() -> None:
    config = EngineConfig(hidden=8, norm_first=True, encoder=SideConfig(layers=1), decoder=SideConfig(layers=2))
    assert config.size == ctypes.sizeof(EngineConfig) == 4 * (13 + 2 * 9)
    assert (config.norm_first, config.decoder.layers) == (1, 2)
    search = SearchConfig(max_length=20, threads=1, beams=4)
    assert search.size == ctypes.sizeof(SearchConfig)
    assert (search.beams, search.returned, search.forced_bos, search.unknown_token) == (4, 1, -1, -1)
    assert (search.repetition_penalty, search.length_penalty, search.top_p) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"^engine: SearchConfig has no best$"):
        SearchConfig(max_length=20, threads=1, best=4)


@pytest.mark.skipif(engine.why_not() is None, reason="there is an engine")
def test_without_an_engine_it_says_why() -> None:
    with pytest.raises(ValueError, match=r"^engine: the native library .*; translate with transformers$"):
        engine.Engine(EngineConfig(), [], [])


@needs_engine
def test_a_model_that_lacks_something_is_one_line() -> None:
    side = SideConfig(layers=1, heads=2, head_dim=4, feed_forward=8, vocabulary=9, positions=4, attention_scale=0.5)
    config = EngineConfig(hidden=8, target_vocabulary=9, norm_epsilon=1e-5, head_scale=1.0, encoder=side, decoder=side)
    with pytest.raises(ValueError, match=r"^engine: [^\n]+$"):
        engine.Engine(config, [], [])
    table = engine.Table(engine.Side.ENCODER, -1, TableSlot.EMBEDDING, np.zeros((9, 7), np.float32))
    with pytest.raises(ValueError, match=r"^engine: [^\n]+$"):
        engine.Engine(config, [], [table])
    with pytest.raises(ValueError, match="two dimensions of fp32, bf16, int8 or fp16"):
        engine.Engine(config, [], [engine.Table(engine.Side.ENCODER, -1, TableSlot.EMBEDDING, np.zeros((9, 8)))])
    with pytest.raises(ValueError, match="tables of int8, and no others, have a scale a row"):
        engine.Engine(
            config, [], [engine.Table(engine.Side.ENCODER, -1, TableSlot.EMBEDDING, np.zeros((9, 8), np.int8))]
        )
