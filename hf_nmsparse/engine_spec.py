"""Model families as data: from the settings in a config.json to what the native engine computes, and from what.

A family is one row of `FAMILIES`. What a setting changes and the engine does not know is refused, so that whatever is
read here computes what transformers computes. This needs neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_nmsparse.kernels.engine import (
    NO_LAYER,
    Activation,
    Array,
    EngineConfig,
    Side,
    SideConfig,
    TableSlot,
    WeightSlot,
)

__all__ = ["FAMILIES", "Family", "Spec", "TableSource", "WeightSource", "read"]


@dataclass(frozen=True)
class Names:
    """How a family calls its modules; ``{side}`` is encoder or decoder, ``{i}`` the layer, ``{last}`` its last part.

    Attributes:
        prefix: What stands before all names but those of the head.
        layer: The modules of one layer stand below it.
        self_attention: Self-attention, whose products are ``products``.
        cross_attention: Cross-attention, whose products are ``products``.
        products: Queries, keys, values and output.
        feed: In and out of a feed-forward block without a gate.
        gated_feed: In, gate and out of one with it; empty where the family has none.
        norms: Of self-attention, cross-attention and feed-forward block.
        final_norm: At the end of a side.
    """

    prefix: str
    layer: str
    self_attention: str
    cross_attention: str
    products: tuple[str, str, str, str]
    feed: tuple[str, ...]
    gated_feed: tuple[str, ...]
    norms: tuple[str, str, str]
    final_norm: str


_BART = Names(
    prefix="model.",
    layer="{side}.layers.{i}.",
    self_attention="self_attn",
    cross_attention="encoder_attn",
    products=("q_proj", "k_proj", "v_proj", "out_proj"),
    feed=("fc1", "fc2"),
    gated_feed=(),
    norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    final_norm="{side}.layer_norm",
)
_T5 = Names(
    prefix="",
    layer="{side}.block.{i}.layer.",
    self_attention="0.SelfAttention",
    cross_attention="1.EncDecAttention",
    products=("q", "k", "v", "o"),
    feed=("{last}.DenseReluDense.wi", "{last}.DenseReluDense.wo"),
    gated_feed=("{last}.DenseReluDense.wi_1", "{last}.DenseReluDense.wi_0", "{last}.DenseReluDense.wo"),
    norms=("0.layer_norm", "1.layer_norm", "{last}.layer_norm"),
    final_norm="{side}.final_layer_norm",
)


@dataclass(frozen=True)
class Family:
    """A row: what the models of one ``model_type`` have in common.

    Attributes:
        architecture: The class of transformers that translates.
        names: How it calls its modules.
        defaults: What a config.json leaves out, as the configuration class of transformers fills it in.
        positions: ``"sinusoidal"`` by index, ``"learned"`` by index, ``"counted"`` (sinusoidal, and only tokens that
            are not padding count), or ``"relative"``: a bias by distance.
        norm_first: Whether norms stand before the blocks.
        embedding_norm: Whether there is one on the embedding.
        final_norm: Whether there is one at the end of each side.
        logits_bias: Whether ``final_logits_bias`` is added to the logits.
        head: The module that makes the logits.
        one_embedding: Whether encoder and decoder have one vocabulary.
        always_tied: Whether embeddings and head are one weight whatever ``tie_word_embeddings`` says.
        head_scaled: Whether the head's input is multiplied with ``hidden ** -0.5``; None: as the configuration says.
        longest_prompt: Above it transformers gives a prompt other attention than generated tokens; None: no limit.
        bias_of_each_layer: Whether each layer has relative biases of its own, or all have those of the first.
    """

    architecture: str
    names: Names
    defaults: Mapping[str, Any]
    positions: str
    norm_first: bool = False
    embedding_norm: bool = False
    final_norm: bool = False
    logits_bias: bool = True
    head: str = "lm_head"
    one_embedding: bool = True
    always_tied: bool = False
    head_scaled: bool | None = False
    longest_prompt: int | None = None
    bias_of_each_layer: bool = False


def _bart(**others: Any) -> dict[str, Any]:
    return {
        "vocab_size": 50265,
        "max_position_embeddings": 1024,
        "encoder_layers": 12,
        "encoder_ffn_dim": 4096,
        "encoder_attention_heads": 16,
        "decoder_layers": 12,
        "decoder_ffn_dim": 4096,
        "decoder_attention_heads": 16,
        "activation_function": "gelu",
        "d_model": 1024,
        "scale_embedding": False,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
        **others,
    }


def _t5(**others: Any) -> dict[str, Any]:
    return {
        "vocab_size": 250112,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        **others,
    }


_T5_ROW: dict[str, Any] = {
    "names": _T5,
    "positions": "relative",
    "norm_first": True,
    "final_norm": True,
    "logits_bias": False,
    "always_tied": True,
}

FAMILIES: dict[str, Family] = {
    "marian": Family(
        "MarianMTModel",
        _BART,
        _bart(vocab_size=58101, pad_token_id=58100, decoder_vocab_size=None, share_encoder_decoder_embeddings=True),
        "sinusoidal",
    ),
    "bart": Family("BartForConditionalGeneration", _BART, _bart(), "learned", embedding_norm=True),
    "mbart": Family(
        "MBartForConditionalGeneration",
        _BART,
        _bart(),
        "learned",
        norm_first=True,
        embedding_norm=True,
        final_norm=True,
    ),
    "m2m_100": Family(
        "M2M100ForConditionalGeneration",
        _BART,
        _bart(vocab_size=128112, activation_function="relu", scale_embedding=True),
        "counted",
        norm_first=True,
        final_norm=True,
        logits_bias=False,
    ),
    "pegasus": Family(
        "PegasusForConditionalGeneration",
        _BART,
        _bart(pad_token_id=0),
        "sinusoidal",
        norm_first=True,
        final_norm=True,
    ),
    "fsmt": Family(
        "FSMTForConditionalGeneration",
        _BART,
        _bart(
            src_vocab_size=42024,
            tgt_vocab_size=42024,
            activation_function="relu",
            scale_embedding=True,
            tie_word_embeddings=False,
        ),
        "counted",
        logits_bias=False,
        head="model.decoder.output_projection",
        one_embedding=False,
        longest_prompt=1,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        defaults=_t5(vocab_size=32128, d_ff=2048, num_layers=6, num_heads=8, feed_forward_proj="relu"),
        head_scaled=None,
        **_T5_ROW,
    ),
    "mt5": Family("MT5ForConditionalGeneration", defaults=_t5(), **_T5_ROW),
    "umt5": Family(
        "UMT5ForConditionalGeneration", defaults=_t5(), head_scaled=True, bias_of_each_layer=True, **_T5_ROW
    ),
}

_ACTIVATIONS = {
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
}

# Other names of a setting, and of it in transformers' own classes.
_ALIASES = {
    "bart": {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
    },
    "t5": {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "head_dim": "d_kv",
    },
}


_MOST_LAYERS = 1024  # tables are made of each, and of each distance, before a file has been looked at
_MOST_REACH = 1 << 16


@dataclass(frozen=True)
class WeightSource:
    """A product's weight.

    Attributes:
        side: Where it belongs.
        layer: Its layer.
        slot: Which product.
        names: Modules whose ``weight`` it is; the first that a file has counts.
        out_features: Rows.
        in_features: Columns.
        bias: The tensor that is its bias, or None.
        bias_may_lack: Whether a file may come without it, which means zeros.
    """

    side: Side
    layer: int
    slot: WeightSlot
    names: tuple[str, ...]
    out_features: int
    in_features: int
    bias: str | None
    bias_may_lack: bool = False


@dataclass(frozen=True)
class TableSource:
    """A table, made of one tensor or two.

    Attributes:
        side: Where it belongs.
        layer: Its layer, `NO_LAYER` for what no layer has.
        slot: Which table.
        names: For each tensor its names; the first that a file has counts.
        shapes: The shapes of these tensors; None for a dimension that may be longer.
        made: Makes the tensor itself where a file lacks it, as it may then; None where it must be there.
        build: Makes the table of the tensors in fp32; None for embeddings, which are used as they are.
    """

    side: Side
    layer: int
    slot: TableSlot
    names: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int | None, ...], ...]
    made: Callable[[], Array] | None = None
    build: Callable[..., Array] | None = None


@dataclass(frozen=True)
class Spec:
    """What the engine needs to know of a model.

    Attributes:
        family: Its row.
        config: What is computed.
        weights: Where the weights of its products come from.
        tables: Where its tables come from.
        padding: The id of padding.
    """

    family: Family
    config: EngineConfig
    weights: tuple[WeightSource, ...]
    tables: tuple[TableSource, ...]
    padding: int | None


@dataclass
class _Settings:
    """Settings of a config.json, with those that it leaves out, checked as they are asked for."""

    kind: str
    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        given = {
            key: self.given[key]
            for key in (name, *(alias for alias, of in self.aliases.items() if of == name))
            if self.given.get(key) is not None
        }
        values = list(given.values())
        if any(value != values[0] for value in values):
            raise _error(f"{self.kind} has {given}, which say the same and differ; correct config.json")
        return values[0] if values else self.defaults.get(name)

    def whole(self, name: str, least: int = 1, most: int = 2**31 - 1) -> int:
        value = self.get(name)
        if type(value) is not int or not least <= value <= most:
            rule = f"from {least} on" if most == 2**31 - 1 else f"from {least} to {most}"
            raise self._wrong(name, f"a whole number {rule}", value)
        return value

    def layers(self, name: str) -> int:
        return self.whole(name, most=_MOST_LAYERS)

    def padding(self) -> int | None:
        return None if self.get("pad_token_id") is None else self.whole("pad_token_id", least=0)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if type(value) is not bool:
            raise self._wrong(name, "true or false", value)
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if type(value) not in (int, float) or not 0 < value < 1:
            raise self._wrong(name, "a number between 0 and 1", value)
        return float(value)

    def activation(self, name: str) -> Activation:
        value = self.get(name)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise self._wrong(name, f"one of {', '.join(_ACTIVATIONS)}", value)
        return _ACTIVATIONS[value]

    def _wrong(self, name: str, rule: str, value: Any) -> ValueError:
        return _error(f"{self.kind}: {name} is {rule}, got {value!r}")


def read(config: Mapping[str, Any], bf16: bool = False) -> Spec:
    """What the engine has to know of the model that a config.json describes.

    Args:
        config: The settings in the file, or those of a configuration of transformers as a dict.
        bf16: Whether the model computes in bf16.

    Raises:
        ValueError: The family, or a setting that changes what is computed, is not known to the engine.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise _error(f"model_type {kind!r} is none of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    _check_model(kind, family, config)
    reader = _read_t5 if family.names is _T5 else _read_bart
    aliases = _ALIASES["t5" if family.names is _T5 else "bart"]
    if kind == "fsmt":
        aliases = aliases | {"vocab_size": "tgt_vocab_size"}
    settings = _Settings(kind, config, family.defaults, aliases)
    engine = reader(family, settings)
    engine.bf16_activations = bf16
    return Spec(family, engine, *_sources(family, settings, engine), settings.padding())


def _check_model(kind: str, family: Family, config: Mapping[str, Any]) -> None:
    """Refuses what is another model than the one that translates, or computes in another way."""
    architectures = config.get("architectures") or [family.architecture]
    if not isinstance(architectures, list) or family.architecture not in architectures:
        raise _error(f"{kind}: the engine runs {family.architecture}, got {architectures}")
    for name, expected in (("is_encoder_decoder", True), ("is_decoder", False), ("add_cross_attention", False)):
        if config.get(name, expected) not in (expected, None):
            raise _error(f"{kind}: {name} is {expected} in models that translate, got {config[name]!r}")
    record = config.get("quantization_config")
    method = record.get("quant_method") if isinstance(record, Mapping) else None
    if record is not None and method != "nmsparse":
        raise _error(
            f"{kind}: quantization_config of {method!r} is not ours; the engine reads nmsparse and dense files"
        )
    # Older files say of their model what is the family's nature here, as it is in transformers.
    for name, nature in (
        ("normalize_before", family.norm_first),
        ("normalize_embedding", family.embedding_norm),
        ("add_final_layer_norm", family.final_norm),
        ("static_position_embeddings", family.positions in ("sinusoidal", "counted")),
        ("add_bias_logits", False),
    ):
        if family.names is _BART and config.get(name, nature) not in (nature, None):
            raise _error(f"{kind}: {name} is {nature} in this family, got {config[name]!r}")


def _read_bart(family: Family, settings: _Settings) -> EngineConfig:
    hidden = settings.whole("d_model")
    scale = math.sqrt(hidden) if settings.flag("scale_embedding") else 1.0
    source, target = _vocabularies(family, settings)
    positions = settings.whole("max_position_embeddings")
    if family.positions == "counted":
        # Rows up to that of padding are used by no other token, and M2M100 has two more than positions.
        padding = settings.whole("pad_token_id", least=0)
        positions = positions if settings.kind == "fsmt" else min(positions, positions + 1 - padding)
        if positions < 1:
            raise _error(f"{settings.kind}: pad_token_id {padding} leaves no positions of max_position_embeddings")
    sides = []
    for side, vocabulary in (("encoder", source), ("decoder", target)):
        heads = settings.whole(f"{side}_attention_heads")
        if hidden % heads:
            raise _error(f"{settings.kind}: d_model {hidden} does not divide into {heads} heads")
        sides.append(
            SideConfig(
                layers=settings.layers(f"{side}_layers"),
                heads=heads,
                head_dim=hidden // heads,
                feed_forward=settings.whole(f"{side}_ffn_dim"),
                vocabulary=vocabulary,
                positions=positions,
                relative_reach=0,
                embedding_scale=scale,
                attention_scale=(hidden // heads) ** -0.5,
            )
        )
    return EngineConfig(
        hidden=hidden,
        activation=settings.activation("activation_function"),
        norm_first=family.norm_first,
        embedding_norm=family.embedding_norm,
        final_norm=family.final_norm,
        target_vocabulary=target,
        norm_epsilon=1e-5,
        head_scale=1.0,
        encoder=sides[0],
        decoder=sides[1],
    )


def _vocabularies(family: Family, settings: _Settings) -> tuple[int, int]:
    """Rows of the two embeddings."""
    if settings.kind == "fsmt":
        return settings.whole("src_vocab_size"), settings.whole("tgt_vocab_size")
    source = settings.whole("vocab_size")
    if _has_one_embedding(family, settings) or not settings.get("decoder_vocab_size"):
        return source, source
    return source, settings.whole("decoder_vocab_size")


def _has_one_embedding(family: Family, settings: _Settings) -> bool:
    if "share_encoder_decoder_embeddings" in family.defaults:
        return settings.flag("share_encoder_decoder_embeddings")
    return family.one_embedding


def _read_t5(family: Family, settings: _Settings) -> EngineConfig:
    hidden, vocabulary = settings.whole("d_model"), settings.whole("vocab_size")
    form = settings.get("feed_forward_proj")
    gated, _, name = form.rpartition("-") if isinstance(form, str) else ("", "", form)
    if gated not in ("", "gated"):
        raise _error(f"{settings.kind}: feed_forward_proj is an activation, or gated- and one, got {form!r}")
    derived = {
        "dense_act_fn": "gelu_new" if form == "gated-gelu" else name,
        "is_gated_act": gated == "gated",
        # T5 1.1 says so by untied embeddings, which transformers ties all the same where a file has no head.
        "scale_decoder_outputs": settings.given.get("tie_word_embeddings") is not False,
    }
    settings.defaults = {**settings.defaults, **derived}
    scaled = settings.flag("scale_decoder_outputs") if family.head_scaled is None else family.head_scaled
    layers = settings.layers("num_layers")
    counts = layers, layers if settings.get("num_decoder_layers") is None else settings.layers("num_decoder_layers")
    buckets, reach = (
        settings.whole(f"relative_attention_{name}", least, _MOST_REACH)
        for name, least in (("num_buckets", 4), ("max_distance", 2))
    )
    if buckets % 2 or reach <= buckets // 2:
        raise _error(
            f"{settings.kind}: relative_attention_num_buckets is even and its half below "
            f"relative_attention_max_distance, got {buckets} and {reach}"
        )
    encoder, decoder = (
        SideConfig(
            layers=count,
            heads=settings.whole("num_heads"),
            head_dim=settings.whole("d_kv"),
            feed_forward=settings.whole("d_ff"),
            vocabulary=vocabulary,
            positions=0,
            relative_reach=reach,
            embedding_scale=1.0,
            attention_scale=1.0,
        )
        for count in counts
    )
    return EngineConfig(
        hidden=hidden,
        activation=settings.activation("dense_act_fn"),
        gated=settings.flag("is_gated_act"),
        rms_norm=True,
        norm_first=True,
        final_norm=True,
        target_vocabulary=vocabulary,
        norm_epsilon=settings.number("layer_norm_epsilon"),
        head_scale=hidden**-0.5 if scaled else 1.0,
        encoder=encoder,
        decoder=decoder,
    )


def _sources(
    family: Family, settings: _Settings, config: EngineConfig
) -> tuple[tuple[WeightSource, ...], tuple[TableSource, ...]]:
    weights: list[WeightSource] = []
    tables: list[TableSource] = []
    embedded = _embedding_names(family, settings)
    for side in Side:
        shape = config.encoder if side == Side.ENCODER else config.decoder
        tables.append(
            TableSource(
                side, NO_LAYER, TableSlot.EMBEDDING, (_weights(embedded[side]),), ((shape.vocabulary, config.hidden),)
            )
        )
        tables += _tables_of_side(family, settings, config, side, shape)
        for i in range(shape.layers):
            weights += _weights_of_layer(family, config, side, shape, i)
            tables += _tables_of_layer(family, settings, config, side, shape, i)
    head = (family.head, *(name for name in embedded[Side.DECODER] if name != family.head))
    if not (family.always_tied or settings.flag("tie_word_embeddings")):
        head = (family.head,)
    bias = "final_logits_bias" if family.logits_bias else None
    weights.append(
        WeightSource(Side.DECODER, NO_LAYER, WeightSlot.HEAD, head, config.target_vocabulary, config.hidden, bias, True)
    )
    return tuple(weights), tuple(tables)


def _embedding_names(family: Family, settings: _Settings) -> dict[Side, tuple[str, ...]]:
    """The modules that may hold the embedding of each side: its own first, then those that it is tied to."""
    prefix = family.names.prefix
    own = {side: f"{prefix}{_word(side)}.embed_tokens" for side in Side}
    if not (family.always_tied or settings.flag("tie_word_embeddings")):
        return {side: (own[side],) for side in Side}
    if not _has_one_embedding(family, settings) and settings.kind == "marian":
        return {Side.ENCODER: (own[Side.ENCODER],), Side.DECODER: (own[Side.DECODER], family.head)}
    shared = (f"{prefix}shared", own[Side.DECODER], own[Side.ENCODER], family.head)
    return {side: (own[side], *(name for name in shared if name != own[side])) for side in Side}


def _word(side: Side) -> str:
    return side.name.lower()


def _weights(modules: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{module}.weight" for module in modules)


def _module(family: Family, side: Side, layer: int, name: str) -> str:
    names = family.names
    return f"{names.prefix}{names.layer}{name}".format(side=_word(side), i=layer, last=1 + side)


def _weights_of_layer(
    family: Family, config: EngineConfig, side: Side, shape: SideConfig, layer: int
) -> Iterator[WeightSource]:
    names, hidden, inner, biased = family.names, config.hidden, shape.heads * shape.head_dim, not config.rms_norm
    rows: list[tuple[WeightSlot, str, int, int]] = []
    for first, attention in ((0, names.self_attention), (4, names.cross_attention))[: 1 + side]:
        for place, product in enumerate(names.products):
            sizes = (hidden, inner) if product == names.products[-1] else (inner, hidden)
            rows.append((WeightSlot(first + place), f"{attention}.{product}", *sizes))
    gate = [WeightSlot.FEED_GATE] if config.gated else []
    slots = (WeightSlot.FEED_IN, *gate, WeightSlot.FEED_OUT)
    for slot, feed in zip(slots, names.gated_feed if config.gated else names.feed, strict=True):
        wide = shape.feed_forward
        rows.append((slot, feed, *((hidden, wide) if slot == WeightSlot.FEED_OUT else (wide, hidden))))
    for slot, name, out_features, in_features in rows:
        module = _module(family, side, layer, name)
        bias = f"{module}.bias" if biased else None
        yield WeightSource(side, layer, slot, (module,), out_features, in_features, bias)


def _norm(side: Side, layer: int, slot: TableSlot, module: str, config: EngineConfig) -> TableSource:
    parts = ("weight",) if config.rms_norm else ("weight", "bias")
    return TableSource(
        side,
        layer,
        slot,
        tuple((f"{module}.{part}",) for part in parts),
        len(parts) * ((config.hidden,),),
        build=lambda *rows: np.stack(rows),
    )


def _tables_of_layer(
    family: Family, settings: _Settings, config: EngineConfig, side: Side, shape: SideConfig, layer: int
) -> Iterator[TableSource]:
    slots = (TableSlot.SELF_NORM, TableSlot.CROSS_NORM, TableSlot.FEED_NORM)
    for slot, name in zip(slots, family.names.norms, strict=True):
        if side == Side.DECODER or slot != TableSlot.CROSS_NORM:
            yield _norm(side, layer, slot, _module(family, side, layer, name), config)
    if family.positions == "relative":
        of = layer if family.bias_of_each_layer else 0
        name = _module(family, side, of, f"{family.names.self_attention}.relative_attention_bias.weight")
        buckets, reach = settings.whole("relative_attention_num_buckets"), shape.relative_reach
        places = _buckets(np.arange(-reach, reach + 1), side == Side.ENCODER, buckets, reach)
        yield TableSource(
            side,
            layer,
            TableSlot.RELATIVE_BIAS,
            ((name,),),
            ((buckets, shape.heads),),
            build=lambda bias: np.ascontiguousarray(bias[places].T),
        )


def _buckets(distance: Array, both_ways: bool, buckets: int, reach: int) -> Array:
    """The bucket of each distance (key's place - query's), as T5 makes them."""
    first: Array | int = 0
    if both_ways:
        buckets //= 2
        first = (distance > 0) * buckets
        distance = np.abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    exact = buckets // 2
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    scaled = np.log(ratio) / np.float32(math.log(reach / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + scaled.astype(np.int64), buckets - 1)
    return first + np.where(distance < exact, distance, far)


def _tables_of_side(
    family: Family, settings: _Settings, config: EngineConfig, side: Side, shape: SideConfig
) -> Iterator[TableSource]:
    prefix = f"{family.names.prefix}{_word(side)}"
    if family.positions != "relative":
        yield _positions(family, settings, config, side, f"{prefix}.embed_positions")
    if family.embedding_norm:
        yield _norm(side, NO_LAYER, TableSlot.EMBEDDING_NORM, f"{prefix}.layernorm_embedding", config)
    if family.final_norm:
        name = family.names.prefix + family.names.final_norm.format(side=_word(side))
        yield _norm(side, NO_LAYER, TableSlot.FINAL_NORM, name, config)


def _positions(family: Family, settings: _Settings, config: EngineConfig, side: Side, module: str) -> TableSource:
    hidden, rows = config.hidden, config.encoder.positions
    offset = {"sinusoidal": 0, "learned": 2}.get(family.positions, (settings.padding() or 0) + 1)
    made = {"sinusoidal": _halves, "counted": _counted}.get(family.positions)
    # M2M100 keeps its table as ``weights``, and in no file.
    names = (f"{module}.weight", f"{module}.weights") if family.positions == "counted" else (f"{module}.weight",)
    return TableSource(
        side,
        NO_LAYER,
        TableSlot.POSITION,
        (names,),
        ((None, hidden),),
        made=None if made is None else lambda: made(offset + rows, hidden),
        build=lambda table: np.ascontiguousarray(table[offset : offset + rows]),
    )


def _halves(rows: int, hidden: int) -> Array:
    """Marian's and Pegasus' positions: sines in the first half of a row, cosines in the second."""
    pairs = np.array([2 * (j // 2) / hidden for j in range(hidden)])
    angles = np.arange(rows)[:, None] / np.power(10000, pairs)
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1).astype(np.float32)


def _counted(rows: int, hidden: int) -> Array:
    """M2M100's and FSMT's positions, which fairseq makes so; no row that is used is that of padding."""
    half = hidden // 2
    step = math.log(10000) / (half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-step))
    angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies[None]
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(table, ((0, 0), (0, hidden % 2)))


def _error(message: str) -> ValueError:
    return ValueError(f"engine: {message}")
