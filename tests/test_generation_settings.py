"""Settings of ``generate``: all that transformers has are known, followed, or refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from hf_nmsparse.engine_spec import read
from hf_nmsparse.generation_settings import NAMES, read_settings, search_of
from tests.test_engine_spec import BART

SPEC = read({"model_type": "bart", **BART})
OWN = {"decoder_start_token_id": 2, "eos_token_id": 2}


def search(own: dict[str, Any] | None = None, prompt_length: int = 1, **given: Any) -> Any:
    return search_of(SPEC, OWN if own is None else OWN | own, given, prompt_length, threads=1)


def test_every_setting_of_transformers_is_known() -> None:
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} == NAMES


def test_old_settings_in_config_json_count_where_there_is_no_other_file(tmp_path: Path) -> None:
    config = {"num_beams": 6, "max_length": 512, "d_model": 16, "top_k": None}
    assert read_settings(tmp_path, config) == {"max_length": 512, "num_beams": 6}
    (tmp_path / "generation_config.json").write_text(json.dumps({"num_beams": 3, "max_length": None, "of_mine": 1}))
    assert read_settings(tmp_path, config) == {"num_beams": 3}


def test_what_is_not_set_is_off() -> None:
    found = search()
    assert (found.start, found.eos, found.banned, found.begin_banned) == (2, [2], [], [])
    config = found.config
    assert (config.beams, config.returned, config.sample, config.forced_bos, config.forced_eos) == (1, 1, 0, -1, -1)
    assert config.max_length == 49  # the positions, which end before 256 new tokens do


def test_the_call_goes_before_the_model() -> None:
    own = {"num_beams": 4, "length_penalty": 2.0, "max_length": 30, "forced_bos_token_id": 5, "early_stopping": True}
    config = search(own).config
    assert (config.beams, config.length_penalty, config.max_length, config.forced_bos) == (4, 2.0, 30, 5)
    assert config.early_stopping == 1
    config = search(own, num_beams=2, length_penalty=0.5, max_new_tokens=7, forced_bos_token_id=None).config
    assert (config.beams, config.length_penalty, config.max_length, config.forced_bos) == (2, 0.5, 8, -1)
    assert search(own, prompt_length=4, max_new_tokens=7).config.max_length == 11
    assert search({"max_length": 512}).config.max_length == 49


def test_tokens_that_are_banned() -> None:
    found = search({"bad_words_ids": [[3], [2], [4, 5]]}, suppress_tokens=[7], begin_suppress_tokens=[8])
    assert found.banned == [[3], [4, 5], [7]]  # EOS alone is no bad word to transformers
    assert found.begin_banned == [8]


def test_sampling_has_the_defaults_of_transformers() -> None:
    config = search(do_sample=True, temperature=0.5).config
    assert (config.sample, config.temperature, config.top_k, config.top_p) == (1, 0.5, 50, 1.0)
    assert search({"top_k": 3, "typical_p": 0.2}).config.top_k == 0  # without effect on greedy search


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beams": 4}, "there is no setting 'beams'; settings are those of GenerationConfig"),
        ({"num_beams": 0}, "num_beams needs at least 1, got 0"),
        ({"num_beams": 10**12}, "num_beams is at most 2147482623, got 1000000000000"),
        ({"num_beams": "4"}, "num_beams needs at least 1, got '4'"),
        ({"num_beams": True}, "num_beams needs at least 1, got True"),
        ({"num_beams": 256}, "the engine takes 255 of num_beams, got 256; translate with transformers"),
        ({"eos_token_id": [5] * 65}, "the engine takes 64 of eos_token_id, got 65; translate with transformers"),
        ({"max_length": 50}, "max_length 50 is beyond the 48 positions of the decoder; give at most 49"),
        ({"max_new_tokens": 49}, "max_new_tokens 49 is beyond the 48 positions of the decoder; give at most 48"),
        ({"max_length": 1}, "max_length 1 leaves no room behind a prompt of 1 tokens"),
        ({"early_stopping": "soon"}, "early_stopping is True, False or 'never', got 'soon'"),
        ({"early_stopping": [True]}, "early_stopping is True, False or 'never', got [True]"),
        ({"length_penalty": float("nan")}, "length_penalty is a number from -1000 to 1000, got nan"),
        ({"do_sample": 1}, "do_sample is True or False, got 1"),
        ({"do_sample": True, "temperature": 0}, "temperature is a number from"),
        ({"do_sample": True, "min_p": 0.1}, "the engine does not know min_p=0.1; translate with transformers"),
        ({"renormalize_logits": True}, "the engine does not know renormalize_logits=True"),
        ({"num_beam_groups": 2}, "the engine does not know num_beam_groups=2"),
        ({"eos_token_id": 40}, "eos_token_id: 40 is none of the 40 tokens of the model; set another"),
        ({"bad_words_ids": [[-1]]}, "bad_words_ids: -1 is none of the 40 tokens"),
        ({"bad_words_ids": [3]}, "bad_words_ids is a list of lists of tokens"),
        ({"decoder_start_token_id": [2, 3]}, "decoder_start_token_id needs one token for all sentences"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id or bos_token_id needs to be set"),
    ],
)
def test_what_is_not_possible_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^translate: ") as error:
        search(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_and_arrays_of_numpy_and_torch_are_numbers() -> None:
    given: dict[str, Any] = {
        "num_beams": np.int64(4),
        "length_penalty": np.float32(0.5),
        "do_sample": np.bool_(False),
        "eos_token_id": torch.tensor([2, 3]),
        "bad_words_ids": [np.array([4, 5])],
        "suppress_tokens": np.array([7]),
    }
    found = search(**given)
    expected = search(
        num_beams=4,
        length_penalty=0.5,
        do_sample=False,
        eos_token_id=[2, 3],
        bad_words_ids=[[4, 5]],
        suppress_tokens=[7],
    )
    assert bytes(found.config) == bytes(expected.config)
    assert replace(found, config=None) == replace(expected, config=None)
    with pytest.raises(ValueError, match=r"num_beams needs at least 1, got True"):
        search(num_beams=np.bool_(True))
    with pytest.raises(ValueError, match=r"num_beams needs at least 1, got 4\.0"):
        search(num_beams=np.float64(4))
