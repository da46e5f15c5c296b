"""The door from `generate` to the engine: the same ids as transformers' own, or transformers itself.

Each comparison runs twice: with the engine in C++, and with the one in tests/reference_engine.py.
"""

from __future__ import annotations

import copy
import os
import pickle
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, MarianMTModel

from hf_nmsparse import NMSparseConfig, finalize, generation, save_packed, set_compute, sparsify
from hf_nmsparse.engine_spec import FAMILIES
from hf_nmsparse.generation import engine_for, generate, why_not
from hf_nmsparse.kernels import engine, native
from hf_nmsparse.kernels.engine import UnableError
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from tests.reference_engine import ReferenceEngine
from tests.test_engine_spec import tiny_model
from tests.tiny import hf, marian, t5

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # transformers warns of some settings
NEEDS_ENGINE = pytest.mark.skipif(engine.why_not() is not None, reason="the native library is not used")
WORDS, LONGEST = range(5, 40), 8
EOS = {family: 1 if family.endswith("t5") else 2 for family in FAMILIES}


@pytest.fixture(params=["reference", pytest.param("native", marks=NEEDS_ENGINE)])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An engine, by the door's own means or in torch."""
    if request.param == "reference":
        stock = native.repack

        def repack(format: str, in_features: int, values: Tensor, *rest: Any, **named: Any) -> Tensor:
            if format in ("dense_fp32", "dense_bf16"):
                return values.flatten().view(torch.uint8)
            return stock(format, in_features, values, *rest, **named)

        off = {"0": "HF_NMSPARSE_ENGINE=0 turns it off"}
        monkeypatch.setattr(engine, "why_not", lambda: off.get(os.environ.get("HF_NMSPARSE_ENGINE", "")))
        monkeypatch.setattr(native, "repack", repack)
        monkeypatch.setattr(generation, "Engine", ReferenceEngine)
    return str(request.param)


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine of an earlier test is kept, which may be one of the other kind."""
    monkeypatch.setattr(generation, "_ENGINES", WeakKeyDictionary())


def sentences(count: int, seed: int, eos: int, longest: int = LONGEST) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [[*torch.randint(5, 40, (length,), generator=draw).tolist(), eos] for length in lengths]


def batch_of(rows: list[list[int]], padding: int = 0, left: bool = False) -> dict[str, Tensor]:
    width = max(map(len, rows))
    fill = [(width - len(row)) * [padding] for row in rows]
    ids = [more + row if left else row + more for row, more in zip(rows, fill, strict=True)]
    ones = [
        [0] * len(more) + [1] * len(row) if left else [1] * len(row) + [0] * len(more)
        for row, more in zip(rows, fill, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ones)}


@cache
def trained(family: str) -> Any:
    """A tiny model that has learned a little of copying, so that its distributions are not flat."""
    settings: dict[str, Any] = {"d_model": 32, "eos_token_id": EOS[family], "pad_token_id": 0}
    if family.endswith("t5"):
        torch.manual_seed(1)
        name = family.upper()
        config = getattr(hf, f"{name}Config")(**(t5(40, d_model=32, layers=2) | settings | {"dropout_rate": 0.0}))
        model = getattr(hf, f"{name}ForConditionalGeneration")(config)
    else:
        settings |= {"dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "attention_dropout": 0.0}
        model = tiny_model(family, seed=1, bos_token_id=1, scale_embedding=True, decoder_start_token_id=2, **settings)
        for module in model.modules():  # whose weights are too large to learn from
            if isinstance(module, nn.Linear | nn.Embedding) and module.weight.requires_grad:
                nn.init.normal_(module.weight, std=0.2)
    start = model.config.decoder_start_token_id
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    for step in range(120):
        rows = sentences(24, 1000 + step, EOS[family])
        batch = batch_of(rows)
        target = torch.cat([torch.full((len(rows), 1), start), batch["input_ids"][:, :-1]], dim=1)
        logits = model(**batch, decoder_input_ids=target, use_cache=False).logits
        seen = batch["attention_mask"] == 1
        loss = nn.functional.cross_entropy(logits[seen], batch["input_ids"][seen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2.5
    return model.eval()


def both(model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What the door returns, where it must use the engine, and what transformers returns."""
    assert why_not(model, *args, **kwargs) is None
    return generate(model, *args, **kwargs), type(model).generate(model, *args, **kwargs)


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 10},
    "beam 4": {"num_beams": 4, "max_new_tokens": 10},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 7},
    "by default 20 tokens": {},
    "length penalty": {"num_beams": 3, "length_penalty": 2.0, "max_new_tokens": 12},
    "negative length penalty": {"num_beams": 3, "length_penalty": -1.0, "max_new_tokens": 12},
    "early stopping": {"num_beams": 4, "early_stopping": True, "max_new_tokens": 12},
    "never early": {"num_beams": 4, "early_stopping": "never", "max_new_tokens": 12},
    "several": {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 10},
    "min_length": {"num_beams": 2, "min_length": 9, "max_new_tokens": 12},
    "min_new_tokens": {"min_new_tokens": 9, "max_new_tokens": 12},
    "forced tokens": {"num_beams": 3, "forced_bos_token_id": 7, "forced_eos_token_id": 2, "max_new_tokens": 6},
    "forced tokens, greedy": {"forced_bos_token_id": 7, "forced_eos_token_id": 2, "max_new_tokens": 4},
    "bad words": {"num_beams": 3, "bad_words_ids": [[2], [6], [9, 10], [11, 12, 13], [8, 8]], "max_new_tokens": 10},
    "suppressed": {"suppress_tokens": [6, 7, 8], "begin_suppress_tokens": [9, 10, 11, 12], "max_new_tokens": 10},
    "suppressed after forced": {
        "num_beams": 2,
        "forced_bos_token_id": 7,
        "begin_suppress_tokens": [5, 9, 10, 11, 12],
        "max_new_tokens": 10,
    },
    "n-grams": {"num_beams": 3, "no_repeat_ngram_size": 2, "max_new_tokens": 12},
    "no token twice": {"no_repeat_ngram_size": 1, "max_new_tokens": 12},
    "repetition": {"repetition_penalty": 1.7, "max_new_tokens": 12},
    "repetition, beams": {"num_beams": 4, "repetition_penalty": 1.7, "max_new_tokens": 12},
    "two ends": {"num_beams": 3, "eos_token_id": [2, 9, 10], "max_new_tokens": 12},
    "two ends, greedy": {"eos_token_id": [2, 9, 10], "max_new_tokens": 12},
    "no padding": {"num_beams": 3, "pad_token_id": None, "max_new_tokens": 12},
    "other padding": {"num_beams": 3, "pad_token_id": 3, "max_new_tokens": 12},
    "other padding, greedy": {"pad_token_id": 3, "max_new_tokens": 12},
    "a config": {"generation_config": GenerationConfig(num_beams=2, max_length=9, length_penalty=0.5)},
    "sampling's settings": {"num_beams": 2, "max_new_tokens": 5, "top_k": 3},
    "no cache": {"num_beams": 2, "max_new_tokens": 5, "use_cache": False},
    "much at once": {
        "num_beams": 5,
        "num_return_sequences": 5,
        "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.2,
        "length_penalty": 0.6,
        "min_new_tokens": 3,
        "bad_words_ids": [[14, 15]],
        "early_stopping": True,
        "max_new_tokens": 14,
    },
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_tokens_of_transformers(runner: str, family: str, search: str) -> None:
    model = trained(family)
    batch = batch_of(sentences(12, 3, EOS[family]))
    found, expected = both(model, **batch, **SEARCHES[search])
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
    assert len(set(map(tuple, found.tolist()))) > 6


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("family", ["marian", "t5"])
def test_every_setting_gives_the_tokens_of_transformers(runner: str, family: str, case: str) -> None:
    settings = dict(SETTINGS[case])
    if family == "t5":
        settings = {key: 1 if (key, value) == ("forced_eos_token_id", 2) else value for key, value in settings.items()}
    batch = batch_of(sentences(8, 4, EOS[family]))
    found, expected = both(trained(family), **batch, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_padding(runner: str, family: str) -> None:
    model, rows = trained(family), sentences(5, 5, EOS[family])
    prompt = {"decoder_input_ids": torch.tensor([[model.config.decoder_start_token_id, 6, 7]] * 5)}
    searches: list[dict[str, Any]] = [{}, {"num_beams": 3}]
    for more in searches:
        if family == "fsmt":
            reason = why_not(model, **batch_of(rows), **prompt, **more, max_new_tokens=8)
            assert reason == "a prompt of 3 tokens is longer than the engine takes for this family"
        else:
            found, expected = both(model, **batch_of(rows), **prompt, **more, max_new_tokens=8, min_length=5)
            assert torch.equal(found, expected)
            found, expected = both(  # the start token is put before it
                model, **batch_of(rows), decoder_input_ids=torch.tensor([[6, 7]] * 5), **more, max_new_tokens=8
            )
            assert torch.equal(found, expected)
        left = batch_of(rows, left=True)
        reason = why_not(model, **left, **more, max_new_tokens=8)
        if FAMILIES[family].positions in ("sinusoidal", "learned"):
            assert reason == "sentences are padded on the left, which moves their positions"
        else:
            found, expected = both(model, **left, **more, max_new_tokens=8)
            assert torch.equal(found, expected)
        ids = batch_of(rows)["input_ids"]
        if FAMILIES[family].positions == "counted":
            assert "there is no attention_mask" in str(why_not(model, ids, **more, max_new_tokens=8))
        else:
            found, expected = both(model, ids, **more, max_new_tokens=8)  # padding counts as text then
            assert torch.equal(found, expected)


def test_a_sentence_does_not_depend_on_its_batch(runner: str) -> None:
    model, rows = trained("marian"), sentences(6, 6, 2)
    together = generate(model, **batch_of(rows), num_beams=4, max_new_tokens=10)
    for row, found in zip(rows, together, strict=True):
        alone = generate(model, **batch_of([row]), num_beams=4, max_new_tokens=10)[0]
        assert torch.equal(found[: len(alone)], alone)


@NEEDS_ENGINE
@pytest.mark.parametrize("family", ["marian", "t5"])
@torch.no_grad()
def test_scores_are_the_log_probabilities_of_transformers(family: str) -> None:
    model, rows = trained(family), sentences(5, 11, EOS[family])
    start = model.config.decoder_start_token_id
    targets = [[start, *row] for row in rows]
    found = engine_for(model).score(rows, targets, threads=1)
    for row, target, scores in zip(rows, targets, found, strict=True):
        inputs = {"input_ids": torch.tensor([row]), "decoder_input_ids": torch.tensor([target])}
        expected = model(**inputs).logits[0].log_softmax(-1)
        assert scores[0] == 0
        assert scores[1:] == pytest.approx(expected[range(len(row)), row].tolist(), abs=1e-4)


ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "sampling": ({"do_sample": True}, "the settings say sample"),
    "beam sampling": ({"do_sample": True, "num_beams": 2}, "the settings say beam_sample"),
    "processor": ({"logits_processor": [transformers.MinLengthLogitsProcessor(3, 2)]}, "logits_processor is given"),
    "criterion": ({"stopping_criteria": [transformers.MaxLengthCriteria(3)]}, "stopping_criteria is given"),
    "prefix": ({"prefix_allowed_tokens_fn": lambda batch, ids: [5, 6, 2]}, "prefix_allowed_tokens_fn is given"),
    "streamer": ({"streamer": type("Streamer", (), {"put": print, "end": print})}, "streamer is given"),
    "dict": ({"return_dict_in_generate": True}, "return_dict_in_generate asks for"),
    "attentions": ({"output_attentions": True}, "output_attentions=True"),
    "time": ({"max_time": 1e6}, "the engine has no MaxTimeCriteria"),
    "encoder n-grams": ({"encoder_no_repeat_ngram_size": 2}, "the engine has no EncoderNoRepeatNGram"),
    "bias": ({"sequence_bias": {(5,): 1.0}}, "the engine has no SequenceBias"),
    "invalid values": ({"remove_invalid_values": True}, "the engine has no InfNanRemove"),
    "renormalised": ({"renormalize_logits": True, "num_beams": 2}, "the engine has no LogitNormalization"),
    "decay": ({"exponential_decay_length_penalty": (3, 1.1)}, "the engine has no ExponentialDecay"),
    "cache": ({"cache_implementation": "dynamic"}, "the engine does not know cache_implementation='dynamic'"),
    "decoder mask": ({"decoder_attention_mask": torch.ones(3, 1)}, "decoder_attention_mask is given"),
    "gaps": ({"attention_mask": torch.tensor([[1, 0, 1]] * 3)}, "attention_mask leaves gaps"),
    "nothing": ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 1]])}, "or nothing of it"),
    "weights": ({"attention_mask": torch.full((3, 3), 0.5)}, "not one of 0 and 1"),
    "forced list": ({"forced_eos_token_id": [2, 3]}, "forced_eos_token_id=[2, 3] is not one id"),
    "unknown ids": ({"suppress_tokens": [400]}, "are not ids of the vocabulary of 40"),
    "no early stopping": ({"early_stopping": None, "num_beams": 2}, "the engine does not know early_stopping=None"),
    "far power": ({"length_penalty": 100.0, "num_beams": 2}, "length_penalty=100.0 is no power that fp32 holds"),
    "no power": ({"length_penalty": float("nan"), "num_beams": 2}, "length_penalty=nan is no power that fp32 holds"),
    "unset power": ({"length_penalty": None}, "length_penalty=None is no power that fp32 holds"),
    "penalty": ({"repetition_penalty": 1e39}, "repetition_penalty=1e+39 is beyond fp32"),
    "half a token": ({"max_length": 9.0}, "max_length=9.0 is no whole number"),
    "too long": ({"max_length": 60}, "max_length=60 goes beyond the model's 48 positions"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_the_engine_does_not_know_runs_in_transformers(runner: str, case: str) -> None:
    settings, reason = ELSEWHERE[case]
    model = trained("marian")
    ids = torch.tensor([[5, 6, 2], [7, 8, 2], [9, 10, 2]])
    arguments: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 5} | settings
    if "max_length" in settings:
        arguments["max_new_tokens"] = None
    assert reason in str(why_not(model, **arguments))
    torch.manual_seed(0)
    found = generate(model, **arguments)
    torch.manual_seed(0)
    expected = type(model).generate(model, **arguments)
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)
    else:
        assert type(found) is type(expected)
        assert torch.equal(found.sequences, expected.sequences)


def test_more_beams_and_ends_than_the_engine_takes_run_in_transformers(runner: str) -> None:
    model = marian(vocab_size=800).eval()
    for settings in ({"num_beams": 256}, {"eos_token_id": list(range(1, 66))}):
        arguments: dict[str, Any] = {"input_ids": torch.tensor([[5, 6, 1]]), "max_new_tokens": 3} | settings
        assert "the engine takes 255 beams and 64 tokens of eos_token_id at most" in str(why_not(model, **arguments))
        assert torch.equal(generate(model, **arguments), type(model).generate(model, **arguments))


def test_errors_are_those_of_transformers(runner: str) -> None:
    model, batch = trained("marian"), batch_of(sentences(2, 7, 2))
    wrongs: list[dict[str, Any]] = [{"num_return_sequences": 2}, {"max_length": 1}, {"nonsense": 3}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r".") as expected:
            type(model).generate(model, **batch, **wrong)
        with pytest.raises(ValueError, match=r".") as found:
            generate(model, **batch, **wrong)
        assert str(found.value) == str(expected.value)
    with pytest.raises(IndexError):
        generate(model, torch.tensor([[5, 400]]))


class TestModels:
    """What a model must be for the engine."""

    def test_training_mode(self, runner: str) -> None:
        model = copy.deepcopy(trained("marian"))
        assert why_not(model) is None
        model.model.encoder.train()
        assert why_not(model) == "model.encoder is in training mode; call model.eval()"
        with pytest.raises(ValueError, match=r"^engine: model.encoder is in training mode"):
            engine_for(model)

    def test_hooks(self, runner: str) -> None:
        model = copy.deepcopy(trained("marian"))
        handle = model.lm_head.register_forward_hook(lambda *_: None)
        assert why_not(model) == "lm_head has hooks or another forward"
        handle.remove()
        model.lm_head.forward = lambda x: x
        assert why_not(model) == "lm_head has hooks or another forward"
        del model.lm_head.forward
        with torch.no_grad():  # after which transformers leaves hooks of its own behind
            model(torch.tensor([[5]]), decoder_input_ids=torch.tensor([[0]]), output_attentions=True)
        assert why_not(model) is None
        with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
            assert why_not(model) == "all modules of torch have hooks"

    def test_other_modules(self, runner: str) -> None:
        class Adapted(nn.Linear):
            pass

        model = copy.deepcopy(trained("marian"))
        model.lm_head.__class__ = Adapted
        assert "lm_head is a tests.test_generation." in str(why_not(model))
        model.lm_head = nn.Linear(32, 41, bias=False).eval()
        assert "lm_head is [41, 32], and the configuration says [40, 32]" in str(why_not(model))

    def test_modules_that_are_not_those_of_the_configuration(self, runner: str) -> None:
        def more_layers(model: Any) -> None:
            model.model.decoder.layers.append(copy.deepcopy(model.model.decoder.layers[0]))

        def fewer_layers(model: Any) -> None:
            del model.model.encoder.layers[-1]

        def another_scale(model: Any) -> None:
            model.model.decoder.embed_scale = 3.0

        def another_configuration(model: Any) -> None:
            model.config.scale_embedding = not model.config.scale_embedding

        def another_activation(model: Any) -> None:
            model.model.encoder.layers[0].activation_fn = nn.Tanh().eval()

        reasons = {
            more_layers: "the model has a model.decoder.layers.",
            fewer_layers: "the model has no model.encoder.layers.",
            another_scale: "model.decoder.embed_scale is 3.0, and the configuration says ",
            another_configuration: "embed_scale is ",
            another_activation: "model.encoder.layers.0.activation_fn is a Tanh, and the configuration says ",
        }
        batch = batch_of(sentences(3, 8, EOS["marian"]))
        for change, reason in reasons.items():
            model = copy.deepcopy(trained("marian"))
            assert why_not(model) is None
            change(model)
            assert reason in str(why_not(model))
            settings: dict[str, Any] = {**batch, "max_new_tokens": 5, "use_cache": False}
            assert torch.equal(generate(model, **settings), type(model).generate(model, **settings))

    def test_other_classes(self, runner: str) -> None:
        class Mine(MarianMTModel):
            pass

        model = copy.deepcopy(trained("marian"))
        model.__class__ = Mine
        assert "is not MarianMTModel of transformers" in str(why_not(model))

    def test_number_types(self, runner: str) -> None:
        model = copy.deepcopy(trained("marian"))
        assert why_not(model.bfloat16()) is None
        assert "computes in torch.float16" in str(why_not(model.half()))
        model.float().model.encoder.layers[0].fc1.half()
        assert "model.encoder.layers.0.fc1.weight is torch.float16, and the model torch.float32" in str(why_not(model))
        with torch.autocast("cpu", torch.bfloat16):
            assert why_not(trained("marian")) == "autocast is on"

    def test_inference_mode(self, runner: str) -> None:
        with torch.inference_mode():
            model = marian()
        assert "was made in inference mode" in str(why_not(model.eval()))

    def test_other_devices(self, runner: str) -> None:
        model = copy.deepcopy(trained("marian")).to("meta")
        assert "lies on meta" in str(why_not(model))

    def test_other_families(self, runner: str) -> None:
        sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        model = hf.LEDForConditionalGeneration(hf.LEDConfig(vocab_size=20, decoder_attention_heads=2, **sizes))
        assert "model_type 'led' is none of" in str(why_not(model.eval()))

    def test_it_can_be_turned_off(self, runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_NMSPARSE_ENGINE", "0")
        model, batch = trained("marian"), batch_of(sentences(2, 8, 2))
        assert why_not(model, **batch) == "HF_NMSPARSE_ENGINE=0 turns it off"
        assert torch.equal(generate(model, **batch), type(model).generate(model, **batch))


@pytest.mark.skipif(engine.why_not() is None, reason="there is an engine")
def test_without_an_engine_transformers_runs() -> None:
    model, batch = trained("marian"), batch_of(sentences(2, 8, 2))
    assert str(why_not(model, **batch)).startswith("the native library")
    assert torch.equal(generate(model, **batch), type(model).generate(model, **batch))


class TestChanges:
    """The engine follows the model."""

    @NEEDS_ENGINE
    @pytest.mark.parametrize("compute", ["fp32", "int8"])
    def test_it_is_kept_between_calls_of_a_packed_model(self, compute: str, tmp_path: Path) -> None:
        model = marian()
        sparsify(model, NMSparseConfig("2:4"))
        finalize(model)
        save_packed(model, tmp_path)
        asked = NMSparseQuantizationConfig(compute=compute)
        loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=asked)
        first = engine_for(loaded)
        loaded.generate(**batch_of(sentences(4, 9, 2)), max_new_tokens=3)
        assert engine_for(loaded) is first

    def test_it_is_kept_and_renewed(self, runner: str) -> None:
        model = copy.deepcopy(trained("marian"))
        batch = batch_of(sentences(4, 9, 2))
        first = engine_for(model)
        assert engine_for(model) is first
        both(model, **batch)
        assert engine_for(model) is first

        def changed() -> None:
            nonlocal first
            assert engine_for(model) is not first
            first = engine_for(model)
            found, expected = both(model, **batch, max_new_tokens=8)
            assert torch.equal(found, expected)

        with torch.no_grad():
            model.model.encoder.layers[0].fc1.weight.mul_(1.5)
        changed()
        model.model.decoder.layers[1].final_layer_norm.bias.data.add_(0.5)
        changed()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
        changed()
        model.final_logits_bias = torch.randn(1, 40)
        changed()
        model.load_state_dict({key: value.clone() for key, value in trained("marian").state_dict().items()})
        changed()
        fused = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        fused.step()
        changed()
        model.bfloat16()
        assert engine_for(model) is not first

    def test_a_model_in_training(self, runner: str) -> None:
        model = copy.deepcopy(trained("marian"))
        batch = batch_of(sentences(4, 9, 2))
        dense = generate(model, **batch, max_new_tokens=8)
        sparsify(model, NMSparseConfig("2:4"))
        found, expected = both(model.eval(), **batch, max_new_tokens=8)
        assert torch.equal(found, expected)
        assert not torch.equal(found, dense)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        found, expected = both(model, **batch, max_new_tokens=8)
        assert torch.equal(found, expected)

    def test_a_token_without_a_position_is_left_to_transformers(
        self, runner: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, batch = copy.deepcopy(trained("m2m_100")), batch_of(sentences(3, 3, 2))
        with torch.no_grad():
            model.lm_head.weight[0] = 3 * model.lm_head.weight[5:].mean(dim=0)  # padding is likely now
            model.lm_head.weight[0].add_(0.5 * model.lm_head.weight[7])
        for beams in (1, 4):
            arguments: dict[str, Any] = {**batch, "max_new_tokens": 12, "num_beams": beams}
            arguments["suppress_tokens"] = [2, *range(5, 38)]
            assert why_not(model, **arguments) is None
            expected = type(model).generate(model, **arguments)
            assert torch.equal(generate(model, **arguments), expected)
        monkeypatch.setattr(generation, "_engine", refuse)
        assert torch.equal(generate(model, **arguments), expected)


def refuse(model: Any, spec: Any) -> Any:
    raise UnableError("engine: refused")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model in a packed file."""
    model = copy.deepcopy(trained("marian"))
    sparsify(model, NMSparseConfig("2:4"))
    finalize(model)
    folder = tmp_path_factory.mktemp("packed")
    save_packed(model, folder)
    return folder


def load(folder: Path, compute: str, head: str | None = None) -> Any:
    config = NMSparseQuantizationConfig(compute=compute, head=head)
    return MarianMTModel.from_pretrained(folder, quantization_config=config)


class TestLoadedModels:
    """`from_pretrained` puts the door on packed models."""

    @pytest.mark.parametrize("compute", ["auto", "fp32", "reference", "dense"])
    def test_the_tokens_are_the_same(self, runner: str, packed: Path, compute: str) -> None:
        model: Any = load(packed, compute)
        batch = batch_of(sentences(8, 4, 2))
        assert why_not(model, **batch, num_beams=4) is None
        before = ReferenceEngine.made
        found = model.generate(**batch, num_beams=4, max_new_tokens=10)
        assert runner == "native" or ReferenceEngine.made == before + 1
        assert torch.equal(found, type(model).generate(model, **batch, num_beams=4, max_new_tokens=10))

    def test_modes_change(self, runner: str, packed: Path) -> None:
        model: Any = MarianMTModel.from_pretrained(packed)
        first = engine_for(model)
        set_compute(model, "dense")
        assert engine_for(model) is not first
        batch = batch_of(sentences(8, 4, 2))
        found, expected = both(model, **batch, max_new_tokens=10)
        assert torch.equal(found, expected)

    def test_int8_is_near(self, runner: str, packed: Path) -> None:
        model: Any = load(packed, "int8", "int8")
        batch = batch_of(sentences(16, 4, 2))
        found, expected = both(model, **batch, min_new_tokens=6, max_new_tokens=6)
        assert (found == expected).float().mean() > 0.6  # the reference rounds no activations

    def test_copies_have_their_own(self, runner: str, packed: Path) -> None:
        model: Any = MarianMTModel.from_pretrained(packed)
        twin = copy.deepcopy(model)
        assert twin.generate.args[0] is twin
        assert pickle.loads(pickle.dumps(model)).generate.args[0] is not model
        with torch.no_grad():
            twin.model.decoder.layers[0].fc1.bias.add_(1)
        batch = batch_of(sentences(8, 4, 2))
        for one in (twin, model):
            assert torch.equal(*both(one, **batch))

    def test_a_model_made_dense_has_its_own_again(self, packed: Path) -> None:
        model: Any = MarianMTModel.from_pretrained(packed)
        assert "generate" in vars(model)
        model.dequantize()
        assert "generate" not in vars(model)


@pytest.mark.skipif(engine.why_not() is not None, reason="there is no native engine")
@pytest.mark.parametrize("beams", [1, 2])
def test_the_bias_of_a_bf16_head_is_added_to_what_is_rounded(beams: int) -> None:
    model: Any = marian(vocab_size=40).bfloat16().eval()
    norm = model.model.decoder.layers[-1].final_layer_norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.zero_()[:2] = 1.0  # what the head sees of every token
        model.lm_head.weight.zero_()[7, :2] = torch.tensor([0.25, -(2.0**-11)])
        # The sum is 0.25 in bf16, and 100.75 is 101. Added before it is rounded it would be 100.5, as that of token 5.
        model.final_logits_bias.zero_()[:, [5, 7]] = 100.5
    settings: dict[str, Any] = {"input_ids": torch.tensor([[5, 6, 1]]), "num_beams": beams, "max_new_tokens": 3}
    assert why_not(model, **settings) is None
    found = generate(model, **settings)
    assert found[0, 1:].tolist() == [7, 7, 7]
    assert torch.equal(found, type(model).generate(model, **settings))
