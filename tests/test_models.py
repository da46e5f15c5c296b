"""Families of models from tiny random configurations: sparsify, a step, finalize, and back from a packed file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.layers import NMConv2d, NMLinear
from hf_nmsparse.optimizer import SparseStep
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.saving import save_packed
from hf_nmsparse.sparse_model import finalize, report, sparsify
from tests.tiny import bart, hf, t5

BART, T5 = bart(40, d_model=16, layers=1), t5(40, d_model=16, layers=1)
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": [8, 8],
    "patch_size": 4,
}
BLOCK = 4 + 2 + 4 + 4 + 2  # encoder: attention and feed-forward; decoder: two attentions and feed-forward


def text() -> dict[str, Any]:
    return {"input_ids": torch.tensor([[5, 6, 7, 2]]), "labels": torch.tensor([[8, 9, 2]])}


def image(**labels: Any) -> dict[str, Any]:
    return {"pixel_values": torch.rand(1, 3, 8, 8), **labels}


def boxes() -> list[dict[str, torch.Tensor]]:
    return [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]


def detr() -> Any:
    backbone = hf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_queries=3,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_labels=3,
    )
    return hf.DetrForObjectDetection(config)


def perceiver() -> Any:
    config = hf.PerceiverConfig(
        num_latents=4,
        d_latents=16,
        d_model=322,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
        train_size=[8, 8],
    )
    return hf.PerceiverForOpticalFlow(config)


def flow() -> dict[str, Any]:
    return {"inputs": torch.rand(1, 2, 27, 8, 8)}


# Family: how it is built, what it is fed, how many of its linear layers become sparse, why the others do not.
FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], int, dict[str, int]]] = {
    "marian": (lambda: hf.MarianMTModel(hf.MarianConfig(**BART)), text, BLOCK, {"the output head": 1}),
    "bart": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), text, BLOCK, {"the output head": 1}),
    "mbart": (lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**BART)), text, BLOCK, {"the output head": 1}),
    "pegasus": (
        lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**BART)),
        text,
        BLOCK,
        {"the output head": 1},
    ),
    "m2m100": (
        lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**BART, encoder_layerdrop=0, decoder_layerdrop=0)),
        text,
        BLOCK,
        {"the output head": 1},
    ),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), text, BLOCK, {"the output head": 1}),
    "t5 v1.1": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        text,
        BLOCK + 2,
        {"the output head": 1},
    ),
    "mt5": (lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)), text, BLOCK + 2, {"the output head": 1}),
    "umt5": (lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5)), text, BLOCK + 2, {"the output head": 1}),
    "nllb-moe": (
        lambda: hf.NllbMoeForConditionalGeneration(
            hf.NllbMoeConfig(
                **BART,
                encoder_layerdrop=0,
                decoder_layerdrop=0,
                num_experts=2,
                encoder_sparse_step=1,
                decoder_sparse_step=1,
                expert_capacity=8,
            )
        ),
        text,
        BLOCK + 4,  # two experts on either side in place of one feed-forward block
        {"the output head": 1, "ignore rule 'router'": 2},
    ),
    "fsmt": (
        lambda: hf.FSMTForConditionalGeneration(
            hf.FSMTConfig(**BART, langs=["en", "de"], src_vocab_size=40, tgt_vocab_size=40)
        ),
        lambda: {**text(), "decoder_input_ids": torch.tensor([[2, 8, 9]])},  # FSMT makes none from labels
        BLOCK,
        {"ignore rule 'output_projection'": 1},
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT, num_labels=3)),
        lambda: image(labels=torch.tensor([1])),
        6,
        {"ignore rule 'classifier'": 1},
    ),
    "yolos": (
        lambda: hf.YolosForObjectDetection(hf.YolosConfig(**VIT, num_detection_tokens=3, num_labels=3)),
        lambda: image(labels=boxes()),
        6,
        {"ignore rule 'class_labels_classifier'": 3, "ignore rule 'bbox_predictor'": 3},
    ),
    "detr": (
        detr,
        lambda: {"pixel_values": torch.rand(1, 3, 32, 32), "labels": boxes()},
        BLOCK,
        {"ignore rule 'class_labels_classifier'": 1, "ignore rule 'bbox_predictor'": 3},
    ),
    "perceiver": (
        perceiver,
        flow,
        12,
        {"in_features 322 is not a multiple of 4": 7, "in_features 54 is not a multiple of 4": 1},
    ),
}


def loss_of(outputs: Any) -> torch.Tensor:
    loss: torch.Tensor | None = getattr(outputs, "loss", None)
    return outputs.logits.square().mean() if loss is None else loss


def output_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    build, feed, sparse, reasons = FAMILIES[family]
    torch.manual_seed(0)
    model, inputs = build(), feed()
    keys = set(model.state_dict())
    dense = sparsify(model, NMSparseConfig("2:4"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NMLinear)}
    assert (len(layers), Counter(dense.values())) == (sparse, Counter(reasons))
    assert set(model.state_dict()) == keys

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    SparseStep(model, optimizer, "sr-ste", decay=2e-4)
    loss = loss_of(model.train()(**inputs))
    loss.backward()
    assert torch.isfinite(loss)
    assert [name for name, layer in layers.items() if layer.weight.grad is None] == []
    optimizer.step()

    save_packed(model, tmp_path)
    finalize(model)
    assert report(model).violations == 0
    expected = output_of(model.eval(), inputs)
    plain = output_of(type(model).from_pretrained(tmp_path).eval(), inputs)  # on the kernels, where there are any
    assert float((plain - expected).norm() / expected.norm()) < 1e-5  # fp32, a dozen layers of sums in another order
    loaded = type(model).from_pretrained(tmp_path, quantization_config=NMSparseQuantizationConfig("dense")).eval()
    assert torch.equal(output_of(loaded, inputs), expected)
    for name, layer in layers.items():
        assert torch.equal(loaded.get_submodule(name).weight, layer.weight)


def scenes(count: int) -> dict[str, Any]:
    """Noise, and in it a bright square of one of two colours."""
    generator = torch.Generator().manual_seed(0)
    pixels, labels = 0.1 * torch.randn(count, 3, 32, 32, generator=generator), []
    for scene in pixels:
        kind = int(torch.randint(2, (), generator=generator))
        left, top = torch.randint(4, 18, (2,), generator=generator).tolist()
        scene[kind, top : top + 10, left : left + 10] += 2
        box = torch.tensor([[left + 5, top + 5, 10, 10]]) / 32
        labels.append({"class_labels": torch.tensor([kind]), "boxes": box})
    return {"pixel_values": pixels, "labels": labels}


def test_a_detector_with_sparse_convolutions_learns_and_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = detr()
    dense = sparsify(model, NMSparseConfig("2:4", convolutions=True))
    assert dense["model.backbone.model.embedder.embedder.convolution"] == "in_channels 3 is not a multiple of 4"
    sparse = {name for name, layer in model.named_modules() if isinstance(layer, NMConv2d)}
    assert {"model.input_projection", "model.backbone.model.encoder.stages.1.layers.0.layer.1.convolution"} < sparse
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    step = SparseStep(model, optimizer, "sr-ste")
    inputs, losses = scenes(8), []
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    assert sum(flips.sad for name, flips in step.take_flips().items() if name in sparse) > 0
    finalize(model.eval())
    save_packed(model, tmp_path)
    back = type(model).from_pretrained(tmp_path, quantization_config=NMSparseQuantizationConfig("dense"))
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        found, again = model(inputs["pixel_values"]), back(inputs["pixel_values"])
    assert torch.equal(found.logits, again.logits)
    assert torch.equal(found.pred_boxes, again.pred_boxes)


def shifted_noise(shifts: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of frames, the second of which is the first moved round, as patches of 3x3; and how each pixel moved."""
    first = torch.randn(len(shifts), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    second = torch.stack([frame.roll(shift, dims=(1, 2)) for frame, shift in zip(first, shifts, strict=True)])
    frames = torch.nn.functional.pad(torch.stack([first, second], dim=1).flatten(0, 1), (1, 1, 1, 1), mode="circular")
    patches = torch.nn.functional.unfold(frames, 3).reshape(len(shifts), 2, 27, 8, 8)
    return patches, torch.tensor(shifts).float()[:, None, None].expand(-1, 8, 8, 2)


def test_optical_flow_is_learnt_and_comes_back(tmp_path: Path) -> None:
    """The motions add up to nothing, so that a loss below their mean square of 0.5 has been read from the frames."""
    torch.manual_seed(0)
    model = perceiver()
    assert not any(isinstance(layer, torch.nn.Conv2d) for layer in model.modules())
    sparsify(model, NMSparseConfig("2:4"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = SparseStep(model, optimizer, "sr-ste")
    inputs, flow = shifted_noise([(1, 0), (-1, 0), (0, 1), (0, -1)])
    losses = []
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss = (20 * model(inputs=inputs).logits - flow).square().mean()  # a unit is 20 pixels, as in DeepMind's code
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert sum(flips.sad for flips in step.take_flips().values()) > 0
    finalize(model.eval())
    assert report(model).violations == 0
    save_packed(model, tmp_path)
    back = type(model).from_pretrained(tmp_path, quantization_config=NMSparseQuantizationConfig("dense")).eval()
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(output_of(model, {"inputs": inputs}), output_of(back, {"inputs": inputs}))
