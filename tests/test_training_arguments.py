"""What SparseTrainingArguments takes and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_nmsparse import SparseTrainingArguments
from tests.test_trainer import arguments


def test_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="deepspeed: its engine steps inside of backward, where the rule of 'sr-ste'"):
        arguments(tmp_path, deepspeed="zero2.json")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"the gradients; train under DDP or FSDP2$"):
        arguments(tmp_path)


def test_an_empty_folder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^output_dir is empty; name a path, as \. for the current folder$"):
        SparseTrainingArguments("", use_cpu=True)
    assert SparseTrainingArguments(use_cpu=True).output_dir  # of transformers


def test_transformers_own_way_with_sigterm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="enable_jit_checkpoint: SparseTrainer saves on SIGTERM by itself; leave it"):
        arguments(tmp_path, enable_jit_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_values": "int4"}, "sparse_values is one of 'fp32', 'fp16', 'bf16', 'int8', got 'int4'"),
        ({"sparse_method": "dense", "sparse_values": "bf16"}, "leave sparse_values and sparse_standalone out"),
        ({"sparse_method": "dense", "sparse_standalone": True}, "leave sparse_values and sparse_standalone out"),
    ],
)
def test_what_a_push_could_not_send_is_refused_before_the_training(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    if settings.get("sparse_method") == "dense":
        settings = {"sparse_decay": None, **settings}
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"push_to_hub": True},
            "^push_to_hub: sparse_dense_tail ends with a model that is dense, which cannot be packed",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "^load_best_model_at_end: sparse_dense_tail ends with a model that is dense, which is that of the last",
        ),
    ],
)
def test_a_dense_tail_and_what_needs_a_sparse_end_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, sparse_dense_tail=0.25, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_method": "srste"}, "sparse_method: got 'srste'; the methods are ste, sr-ste"),
        ({"sparse_decay": -1.0}, "sparse_decay: needs a finite number >= 0, got -1.0"),
        ({"sparse_method": "ste", "sparse_decay": 0.1}, "'ste' has no decay"),
        ({"sparse_method": "dense", "sparse_decay": 0.1}, "the dense method has no decay"),
        ({"tokens_per_batch": 0}, "tokens_per_batch: needs at least 1, a whole number of tokens, got 0"),
        ({"tokens_per_batch": "a"}, "tokens_per_batch: needs at least 1, a whole number of tokens, got 'a'"),
        ({"tokens_per_batch": 10.5}, "tokens_per_batch: needs at least 1, a whole number of tokens, got 10.5"),
        ({"sparse_decay": "a"}, "sparse_decay: needs a finite number >= 0, got 'a'"),
        ({"distill_weight": "x"}, "distill_weight: is above 0 and at most 1, got 'x'"),
        ({"distill_temperature": "x"}, "distill_temperature: needs a finite number above 0, got 'x'"),
        ({"sparse_ramp": 2.0}, "schedule: ramp is a fraction of the run from 0 to 1, got 2.0"),
        ({"sparse_method": "asp", "sparse_decay": None, "sparse_interval": 2}, "'asp' has no schedule of masks"),
        ({"sparse_method": "dense", "sparse_decay": None, "sparse_fade": 0.1}, "'dense' has no schedule; leave"),
        ({"distill_weight": 0.0}, "distill_weight: is above 0 and at most 1, got 0.0"),
        ({"distill_temperature": -1.0}, "distill_temperature: needs a finite number above 0, got -1.0"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_defaults_of_the_methods(tmp_path: Path) -> None:
    decays = {
        method: arguments(tmp_path, sparse_method=method, sparse_decay=None).sparse_decay
        for method in ("sr-ste", "sr-ste-decoupled", "ste", "asp", "dense")
    }
    assert decays == {"sr-ste": 2e-4, "sr-ste-decoupled": 0.4, "ste": 0.0, "asp": 0.0, "dense": 0.0}


def test_options_are_what_differs(tmp_path: Path) -> None:
    assert arguments(tmp_path).sparse_options() == {}
    assert arguments(tmp_path, sparse_ramp=0.25, sparse_interval=40).sparse_options() == {
        "sparse_ramp": 0.25,
        "sparse_interval": 40,
    }
    assert arguments(tmp_path, sparse_method="decaying-mask", sparse_decay=None).sparse_options() == {
        "sparse_fade": 0.5
    }
    assert arguments(tmp_path, distill_from="a/b").sparse_options() == {
        "distill_from": "a/b",
        "distill_weight": 0.5,
        "distill_temperature": 1.0,
    }
