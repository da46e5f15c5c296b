"""The verbs: which layers a configuration selects and why not the others, finalize, report."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

from hf_nmsparse.config import DEFAULT_IGNORE, NMSparseConfig
from hf_nmsparse.layers import NMLinear, sparse_layers
from hf_nmsparse.masks import apply_mask, magnitude_mask
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.sparse_model import finalize, report, select_layers, sparsify
from tests.tiny import bart, hf, marian, t5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.out_proj = nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)


class Model(nn.Module):
    """Two stacks of blocks, an odd layer, an embedding and an output head tied to it, as translation models have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.encoder = nn.ModuleList([Block(), Block()])
        self.decoder = nn.ModuleList([Block()])
        self.odd = nn.Linear(6, 8)
        self.unembed = nn.Linear(8, 12, bias=False)
        self.unembed.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed


LAYERS = [
    f"{block}.{layer}"
    for block in ("encoder.0", "encoder.1", "decoder.0")
    for layer in ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")
]


def selected(targets: Any = None, ignore: Any = None) -> list[str]:
    chosen, _ = select_layers(Model(), NMSparseConfig("2:4", targets, ignore))
    return list(chosen)


def test_every_layer_that_can_is_selected() -> None:
    chosen, dense = select_layers(Model(), NMSparseConfig("2:4"))
    assert list(chosen) == LAYERS
    assert dense == {"odd": "in_features 6 is not a multiple of 4", "unembed": "the output head"}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("fc1", ["encoder.0.fc1", "encoder.1.fc1", "decoder.0.fc1"]),
        ("encoder.1.fc1", ["encoder.1.fc1"]),
        ("0.fc2", ["encoder.0.fc2", "decoder.0.fc2"]),
        ("self_attn.q_proj", [f"{block}.self_attn.q_proj" for block in ("encoder.0", "encoder.1", "decoder.0")]),
        ("decoder", [name for name in LAYERS if name.startswith("decoder")]),
        ("encoder.0", [name for name in LAYERS if name.startswith("encoder.0")]),
        ("self_attn", [name for name in LAYERS if "self_attn" in name]),
        ("decoder.*", [name for name in LAYERS if name.startswith("decoder")]),
        ("*.fc?", [name for name in LAYERS if ".fc" in name]),
        ("encoder.*.fc1", ["encoder.0.fc1", "encoder.1.fc1"]),
        ("encoder.[1-9].fc1", ["encoder.1.fc1"]),
        ("*_proj", [name for name in LAYERS if name.endswith("_proj")]),
        ("*", LAYERS),
    ],
)
def test_target_rules(rule: str, expected: list[str]) -> None:
    assert selected(targets=[rule]) == expected


@pytest.mark.parametrize(
    ("rule", "ignored"),
    [
        ("fc1", ["encoder.0.fc1", "encoder.1.fc1", "decoder.0.fc1"]),
        ("encoder", [name for name in LAYERS if name.startswith("encoder")]),
        ("encoder.0.*", [name for name in LAYERS if name.startswith("encoder.0")]),
    ],
)
def test_ignore_rules(rule: str, ignored: list[str]) -> None:
    chosen, dense = select_layers(Model(), NMSparseConfig("2:4", ignore=[rule]))
    assert list(chosen) == [name for name in LAYERS if name not in ignored]
    assert {name: dense[name] for name in ignored} == dict.fromkeys(ignored, f"ignore rule {rule!r}")


def test_ignore_wins_over_targets_and_targets_leave_their_reason() -> None:
    chosen, dense = select_layers(Model(), NMSparseConfig("2:4", ["decoder"], ["fc1"]))
    assert list(chosen) == ["decoder.0.self_attn.q_proj", "decoder.0.self_attn.out_proj", "decoder.0.fc2"]
    assert dense["decoder.0.fc1"] == "ignore rule 'fc1'"
    assert dense["encoder.0.fc2"] == "no target rule matches"


@pytest.mark.parametrize("field", ["targets", "ignore"])
@pytest.mark.parametrize(
    "rule", ["fc3", "attn", "c1", "fc", "FC1", "encoder.0.fc1.weight", "embed", "encoder.fc1", "x*"]
)
def test_a_rule_that_matches_nothing_is_refused_with_an_example(field: str, rule: str) -> None:
    config = NMSparseConfig.from_dict({"pattern": "2:4", field: ["fc2", rule]})
    with pytest.raises(
        ValueError, match=f"{field} rule '{re.escape(rule)}' matches no linear layer .*'encoder.0.self_attn"
    ) as error:
        sparsify(Model(), config)
    assert "fc2" not in str(error.value)


def test_default_ignore_rules_may_match_nothing_and_leave_heads_dense() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), **{name: nn.Linear(8, 4) for name in DEFAULT_IGNORE}})
    chosen, dense = select_layers(model, NMSparseConfig("2:4"))
    assert list(chosen) == ["body"]
    assert dense == {name: f"ignore rule {name!r}" for name in DEFAULT_IGNORE}
    chosen, dense = select_layers(model, NMSparseConfig("2:4", ignore=[]))
    assert list(chosen) == ["body", *DEFAULT_IGNORE]
    assert dense == {}


def test_the_head_and_ties_stay_dense_whatever_the_rules_say() -> None:
    model = Model()
    model.extra = nn.Linear(8, 12, bias=False)
    model.extra.weight = model.embed.weight
    chosen, dense = select_layers(model, NMSparseConfig("2:4", targets=["*"], ignore=[]))
    assert list(chosen) == LAYERS
    assert dense["unembed"] == "the output head"
    assert dense["extra"] == "tied to embed"


def test_two_linear_layers_with_one_weight_stay_dense() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    chosen, dense = select_layers(model, NMSparseConfig("2:4"))
    assert list(chosen) == ["c"]
    assert dense == {"a": "tied to b", "b": "tied to a"}


def test_a_module_used_twice_is_one_layer() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert sparsify(model, NMSparseConfig("2:4")) == {}
    assert model[0] is model[2]
    assert sparse_layers(model) == {"0": NMPattern(2, 4)}


def test_attention_that_reads_its_weight_stays_dense() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "body": nn.Linear(8, 8)})
    chosen, dense = select_layers(model, NMSparseConfig("2:4"))
    assert list(chosen) == ["body"]
    assert dense == {"attention.out_proj": "its class is NonDynamicallyQuantizableLinear, not nn.Linear"}


def test_an_encoder_layer_that_reads_its_weights_stays_dense() -> None:
    # Its fast path in inference would multiply with the dense master.
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model.adapter = nn.Sequential(nn.Linear(8, 8))
    chosen, dense = select_layers(model, NMSparseConfig("2:4"))
    assert list(chosen) == ["adapter.0"]
    assert dense["linear1"] == dense["linear2"] == "nn.TransformerEncoderLayer reads its weight without calling it"


def pruned(linear: nn.Linear, name: str = "weight") -> nn.Linear:
    prune.l1_unstructured(linear, name, amount=0.5)
    return linear


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "compute",
    [
        pruned,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
    ],
)
def test_a_weight_that_is_computed_stays_dense(compute: Any) -> None:
    reason = "its weight is computed from other tensors, by a parametrization or by pruning"
    model = nn.ModuleDict({"computed": compute(nn.Linear(8, 8)), "body": nn.Linear(8, 8)})
    expected = model.eval()["computed"](torch.ones(8))
    assert sparsify(model, NMSparseConfig("2:4")) == {"computed": reason}
    assert torch.equal(model["computed"](torch.ones(8)), expected)
    assert report(model, file=io.StringIO()).layers[0].note == reason
    with pytest.raises(ValueError, match=rf"no layer of the model can be 2:4 sparse \(0: {reason}\)"):
        sparsify(nn.Sequential(compute(nn.Linear(8, 8))), NMSparseConfig("2:4"))


def test_a_computed_layer_that_is_no_target_stops_nothing() -> None:
    model = nn.ModuleDict({"pruned": pruned(nn.Linear(8, 8)), "body": nn.Linear(8, 8)})
    assert sparsify(model, NMSparseConfig("2:4", targets=["body"])) == {"pruned": "no target rule matches"}
    biased = nn.ModuleDict({"pruned": pruned(nn.Linear(8, 8), "bias"), "body": nn.Linear(8, 8)})
    [(name, reason)] = sparsify(biased, NMSparseConfig("2:4")).items()
    assert (name, reason) == ("pruned", "its bias is computed from other tensors, by a parametrization or by pruning")


class Codes(Tensor):
    """As quantizers keep weights: a tensor of their own class."""


def test_a_quantized_weight_stays_dense() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("int8", "codes", "body")})
    int8, codes = model["int8"], model["codes"]
    int8.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    codes.weight = nn.Parameter(torch.zeros(8, 8).as_subclass(Codes))
    assert sparsify(model, NMSparseConfig("2:4")) == {
        "int8": "its weight is a Tensor of torch.int8, not of plain floats",
        "codes": "its weight is a Codes of torch.float32, not of plain floats",
    }


def test_another_subclass_stays_dense() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.ModuleDict({"scaled": Scaled(8, 8), "body": nn.Linear(8, 8)})
    assert sparsify(model, NMSparseConfig("2:4")) == {"scaled": "its class is Scaled, not nn.Linear"}
    assert type(model["scaled"]) is Scaled


def test_sparse_model_changes_what_it_selects_and_nothing_else() -> None:
    model = Model()
    keys, state = list(model.state_dict()), {name: value.clone() for name, value in model.state_dict().items()}
    dense = sparsify(model, NMSparseConfig("1:4", targets=["fc1"]))
    chosen = ["encoder.0.fc1", "encoder.1.fc1", "decoder.0.fc1"]
    assert sparse_layers(model) == dict.fromkeys(chosen, NMPattern(1, 4))
    assert all(type(model.get_submodule(name)) is NMLinear for name in chosen)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in dense)
    assert sorted([*chosen, *dense]) == sorted([*LAYERS, "odd", "unembed"])
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.unembed.weight is model.embed.weight


def test_a_bare_linear_layer() -> None:
    layer = nn.Linear(8, 4)
    assert sparsify(layer, NMSparseConfig("2:4")) == {}
    assert isinstance(layer, NMLinear)


def test_sparse_model_twice_is_refused() -> None:
    model = Model()
    sparsify(model, NMSparseConfig("2:4", targets=["fc1"]))
    with pytest.raises(ValueError, match="the model is sparse already"):
        sparsify(model, NMSparseConfig("2:4", targets=["fc2"]))
    assert len(sparse_layers(model)) == 3


def test_a_failed_sparsify_leaves_the_model_dense() -> None:
    model = Model()
    with pytest.raises(ValueError, match="rule 'nothing'"):
        sparsify(model, NMSparseConfig("2:4", targets=["fc1", "nothing"]))
    assert sparse_layers(model) == {}
    sparsify(model, NMSparseConfig("2:4"))


def test_a_model_without_a_layer_to_make_sparse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no layer of the model can be 2:4 sparse \(it has no nn.Linear\)"):
        sparsify(nn.Sequential(nn.ReLU()), NMSparseConfig("2:4"))
    for layer in (nn.Conv2d(8, 8, 3), Conv1D(8, 8)):
        hint = r"it has no nn.Linear\); NMSparseConfig\(convolutions=True\) takes its convolutions$"
        with pytest.raises(ValueError, match=hint):
            sparsify(nn.Sequential(layer), NMSparseConfig("2:4"))
    with pytest.raises(ValueError, match=r"targets rule 'fc1' matches no linear layer of the model$"):
        sparsify(nn.Sequential(nn.ReLU()), NMSparseConfig("2:4", targets=["fc1"]))
    with pytest.raises(ValueError, match=r"can be 4:8 sparse \(0: in_features 12 is not a multiple of 8\)"):
        sparsify(nn.Sequential(nn.Linear(12, 8)), NMSparseConfig("4:8"))
    with pytest.raises(ValueError, match=r"can be 2:4 sparse \(unembed: the output head\)"):
        sparsify(Model(), NMSparseConfig("2:4", targets=["unembed"]))


def test_a_hugging_face_model_remembers_the_configuration() -> None:
    model = marian()
    dense = sparsify(model, NMSparseConfig("2:4", targets=["fc1", "fc2"]))
    assert len(sparse_layers(model)) == 8
    assert dense["lm_head"] == "no target rule matches"
    assert model.config.quantization_config == {
        "quant_method": "nmsparse",
        "format": "dense",
        "pattern": "2:4",
        "targets": ["fc1", "fc2"],
    }
    assert model.lm_head.weight is model.get_input_embeddings().weight


@dataclass(frozen=True)
class Settings:
    width: int = 8


@pytest.mark.parametrize("config", [{"width": 8}, Settings()], ids=["dict", "dataclass"])
def test_a_configuration_of_another_kind_is_left_alone(config: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.config = config
    sparsify(model, NMSparseConfig("2:4"))
    assert config in ({"width": 8}, Settings())


def test_finalize_masks_every_layer() -> None:
    model = Model()
    sparsify(model, NMSparseConfig("2:4", targets=["fc1", "fc2"]))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NMLinear)}
    expected = {name: apply_mask(layer.weight.detach(), layer.current_mask()) for name, layer in layers.items()}
    others = {name: value.clone() for name, value in model.state_dict().items() if "fc" not in name}
    finalize(model)
    assert all(torch.equal(layer.weight, expected[name]) for name, layer in layers.items())
    assert not any(torch.signbit(layer.weight[layer.weight == 0]).any() for layer in layers.values())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())


def test_finalize_keeps_what_a_fixed_mask_keeps() -> None:
    layer = NMLinear.from_stock(nn.Linear(4, 1, bias=False), NMPattern(2, 4))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    layer.mask, layer.fixed_mask = torch.tensor([0b0011], dtype=torch.uint8), True
    finalize(layer)
    assert layer.weight.tolist() == [[1.0, 2.0, 0.0, 0.0]]


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [compiled, nn.DataParallel, lambda model: compiled(nn.DataParallel(model)), lambda m: nn.DataParallel(compiled(m))],
)
def test_wrapped_models_are_looked_through(wrap: Any) -> None:
    model, plain = marian(), marian()
    wrapped = wrap(model)
    config = NMSparseConfig("2:4", targets=["model.encoder.*", "fc1"])
    assert sparsify(wrapped, config) == sparsify(plain, config)
    assert sparse_layers(model) == sparse_layers(plain)
    assert model.config.quantization_config == plain.config.quantization_config
    finalize(wrapped)
    assert str(report(wrapped, file=io.StringIO())) == str(report(model, file=io.StringIO()))
    assert report(wrapped, file=io.StringIO()).violations == 0
    assert [row.name for row in report(wrapped, file=io.StringIO()).sparse] == list(sparse_layers(plain))
    with pytest.raises(ValueError, match="the model is sparse already"):
        sparsify(wrapped, config)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # in torch.compile itself
def test_a_compiled_model_computes_sparse_after_sparsify() -> None:
    """It may have been traced while it was dense."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    wrapped, x = compiled(model), torch.randn(3, 8)
    dense = wrapped(x)
    sparsify(wrapped, NMSparseConfig("2:4"))
    assert torch.equal(wrapped(x), model(x))
    assert not torch.equal(wrapped(x), dense)


def test_finalize_masks_what_was_unpacked_and_changed_since() -> None:
    """As PEFT merges an adapter into the layers of a model that was loaded with ``compute="dense"``."""
    model = Model()
    sparsify(model, NMSparseConfig("2:4", targets=["fc1"]))
    finalize(model)
    for name in sparse_layers(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, NMLinear)
        merged = layer.to_stock()
        with torch.no_grad():
            merged.weight += 0.1 * torch.randn_like(merged.weight)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in sparse_layers(model)}  # type: ignore[operator]
    assert report(model, file=io.StringIO()).violations > 0
    finalize(model)
    assert report(model, file=io.StringIO()).violations == 0
    for name, weight in weights.items():
        expected = apply_mask(weight, magnitude_mask(weight, NMPattern(2, 4)))
        assert torch.equal(model.get_submodule(name).weight, expected)  # type: ignore[arg-type]


NO_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


def adapted(model: Any, kind: str = "lora", **settings: Any) -> Any:
    import peft

    settings = {"target_modules": ["q_proj", "v_proj", "fc1"], **settings}
    if kind == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))
    if kind == "dora":
        return peft.get_peft_model(model, peft.LoraConfig(r=4, use_dora=True, **settings))
    if kind == "ia3":
        return peft.get_peft_model(model, peft.IA3Config(feedforward_modules=["fc1"], **settings))
    if kind == "loha":
        return peft.get_peft_model(model, peft.LoHaConfig(r=4, **settings))
    if kind == "prefix":
        return peft.get_peft_model(
            model, peft.PrefixTuningConfig("SEQ_2_SEQ_LM", num_virtual_tokens=2, prefix_projection=True)
        )
    model.add_adapter(peft.LoraConfig(r=4, **settings))
    return model


@NO_PEFT
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "loha", "prefix", "add_adapter"])
def test_adapters_of_peft_are_left_alone(kind: str) -> None:
    plain = marian()
    expected = sparsify(plain, NMSparseConfig("2:4"))
    model = adapted(marian(), kind)
    dense = sparsify(model, NMSparseConfig("2:4"))
    adapters = [name for name, reason in dense.items() if reason == "a PEFT adapter"]
    linears = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    assert set(adapters) == {name for name in linears if not name.endswith("lm_head")}
    assert bool(adapters) == (kind in ("lora", "dora", "prefix", "add_adapter"))
    assert len(dense) - len(adapters) == len(expected)
    prefix = "base_model." if kind == "prefix" else "base_model.model."
    stock = {name.removeprefix(prefix).replace(".base_layer", "") for name in sparse_layers(model)}
    assert stock == sparse_layers(plain).keys()
    assert model.config.quantization_config["pattern"] == "2:4"
    assert [row.note for row in report(model, file=io.StringIO()).layers if row.name in adapters] == [
        "a PEFT adapter"
    ] * len(adapters)


@NO_PEFT
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_layers_that_peft_copies_and_an_adapted_head_stay_dense() -> None:
    model = adapted(marian(), target_modules=["fc1", "lm_head"], modules_to_save=["fc2"])
    dense = sparsify(model, NMSparseConfig("2:4"))
    copied = {name: reason for name, reason in dense.items() if ".fc2." in name}
    assert len(copied) == 8  # each with its copy
    assert set(copied.values()) == {"a PEFT adapter"}
    assert dense["base_model.model.lm_head.base_layer"] == "the output head"
    assert not any("fc2" in name or "lora" in name for name in sparse_layers(model))


@NO_PEFT
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("unpacked", [False, True])
def test_a_merged_model_is_finalized_and_packed(tmp_path: Path, unpacked: bool) -> None:
    from transformers import MarianMTModel

    from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
    from hf_nmsparse.saving import save_packed

    model: Any = marian()
    sparsify(model, NMSparseConfig("2:4"))
    if unpacked:
        save_packed(model, tmp_path / "base", values="fp32")
        dense = NMSparseQuantizationConfig(compute="dense")
        model = MarianMTModel.from_pretrained(tmp_path / "base", quantization_config=dense)
    model = adapted(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    merged = model.merge_and_unload()
    assert len(sparse_layers(merged)) == 32
    assert report(merged, file=io.StringIO()).violations > 0
    finalize(merged)
    assert report(merged, file=io.StringIO()).violations == 0
    save_packed(merged, tmp_path / "packed", values="fp32")
    loaded = MarianMTModel.from_pretrained(tmp_path / "packed", quantization_config=NMSparseQuantizationConfig("dense"))
    tokens = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        logits = [each.eval()(input_ids=tokens, decoder_input_ids=tokens).logits for each in (merged, loaded)]
    assert torch.equal(*logits)


def test_finalize_needs_a_sparse_model() -> None:
    with pytest.raises(ValueError, match="finalize: the model has no N:M layer in training; call sparsify"):
        finalize(Model())


def small_model() -> nn.ModuleDict:
    model = nn.ModuleDict({"body": nn.Linear(8, 2), "odd": nn.Linear(3, 2), "head": nn.Linear(8, 1)})
    with torch.no_grad():
        model.get_parameter("body.weight").copy_(torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [1, 0, 0, 1, 1, 1, 1, 0]]))
    return model


def test_the_report_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    sparsify(model, NMSparseConfig("2:4", ignore=["head"]))
    result = report(model)
    assert capsys.readouterr().out.splitlines() == [
        "layer  shape  pattern  kept    violations",
        "body   2x8    2:4      50.0%   3",
        "odd    2x3    dense    100.0%  in_features 3 is not a multiple of 4",
        "head   1x8    dense    100.0%  ignore rule 'head'",
        "1 sparse and 2 dense linear layers, 16 sparse weights, 3 groups violate their pattern",
    ]
    assert result.violations == 3


def test_the_report_as_an_object() -> None:
    model = small_model()
    sparsify(model, NMSparseConfig("1:4", targets=["body"]))
    finalize(model)
    printed = io.StringIO()
    result = report(model, file=printed)
    assert printed.getvalue() == f"{result}\n"
    assert [(row.name, row.shape, row.pattern, row.kept, row.violations) for row in result.layers] == [
        ("body", (2, 8), NMPattern(1, 4), 0.25, 0),
        ("odd", (2, 3), None, 1.0, 0),
        ("head", (1, 8), None, 1.0, 0),
    ]
    assert [row.name for row in result.sparse] == ["body"]
    assert result.layers[1].note == "no target rule matches"
    assert result.violations == 0


def test_the_report_of_a_dense_model() -> None:
    result = report(small_model(), file=io.StringIO())
    assert result.sparse == ()
    assert [row.note for row in result.layers] == ["", "", ""]


@pytest.mark.parametrize("config", ["2:4", None, NMPattern(2, 4), {"pattern": "2:4"}])
def test_what_is_no_configuration_is_one_line(config: Any) -> None:
    with pytest.raises(ValueError, match=r"^sparsify: takes a configuration such as NMSparseConfig\('2:4'\), got "):
        sparsify(Model(), config)


def test_what_is_no_model_is_one_line() -> None:
    calls: dict[str, Any] = {"finalize": finalize, "report": report}
    calls["sparsify"] = lambda model: sparsify(model, NMSparseConfig("2:4"))
    for name, call in calls.items():
        for model in (None, "Helsinki-NLP/opus-mt-de-en"):
            with pytest.raises(ValueError, match=f"^{name}: takes a model, got {type(model).__name__}"):
                call(model)


COMPUTED: dict[str, tuple[Any, Any]] = {
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), lambda layer: prune.remove(layer, "weight")),
    "weight_norm": (
        parametrizations.weight_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_is_not_finalized(kind: str) -> None:
    compute, remove = COMPUTED[kind]
    model = Model()
    sparsify(model, NMSparseConfig("2:4"))
    layer = model.get_submodule("encoder.1.fc1")
    compute(layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"encoder\.1\.fc1 is computed .* call .*prune.remove\(.*remove_parametrizations"
    ):
        finalize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    remove(layer)
    finalize(model)
    assert report(model, io.StringIO()).violations == 0


def test_a_mask_that_keeps_too_much_is_an_error() -> None:
    model = Model()
    sparsify(model, NMSparseConfig("2:4"))
    layer = model.get_submodule("encoder.1.fc1")
    assert isinstance(layer, NMLinear)
    layer.mask, layer.fixed_mask = ~torch.zeros_like(layer.current_mask()), True
    with pytest.raises(ValueError, match=r"finalize: encoder\.1\.fc1 breaks 2:4 in 32 groups with the mask that it"):
        finalize(model)


def encoder_decoder() -> Any:
    parts = [hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)] * 2
    return hf.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)


SHARED: dict[str, tuple[Any, str]] = {
    "marian": (lambda: hf.MarianConfig(**bart(300, 32, 1)), "MarianMTModel"),
    "m2m_100": (lambda: hf.M2M100Config(**bart(300, 32, 1)), "M2M100ForConditionalGeneration"),
    "t5": (lambda: hf.T5Config(**t5(300, 32, 1)), "T5ForConditionalGeneration"),
    "parts": (encoder_decoder, "EncoderDecoderModel"),
}


@pytest.mark.parametrize("family", SHARED)
def test_a_configuration_that_models_share_stays_dense(family: str, tmp_path: Path) -> None:
    make, name = SHARED[family]
    config = make()
    sparse, dense = (getattr(hf, name)(config) for _ in range(2))
    if family != "parts":
        assert dense.config is config

    def sharing(model: Any) -> list[list[bool]]:
        found = [value for part in model.modules() for key, value in vars(part).items() if "config" in key]
        return [[one is other for other in found] for one in found]

    before, given = sharing(sparse), config.to_dict()
    sparsify(sparse, NMSparseConfig("2:4"))
    assert config.to_dict() == given
    assert sharing(sparse) == before
    assert not any(value is config for part in sparse.modules() for value in vars(part).values())
    for model, layers in ((sparse, len(sparse_layers(sparse))), (dense, 0)):
        model.save_pretrained(tmp_path / str(layers))
        again = getattr(hf, name).from_pretrained(tmp_path / str(layers))
        assert len(sparse_layers(again)) == layers
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
