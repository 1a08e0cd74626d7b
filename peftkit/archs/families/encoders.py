"""Encoder-decoders (T5, BART) and encoders that classify (BERT and its kin)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkit.archs.families.pieces import layer_norm, norms, rms, two_layer_ffn
from peftkit.archs.family import BlockPart, Family, LayerKinds, Linear, Stack, Task, TaskHead, Weight
from peftkit.archs.sizes import Sizes

_SEQ2SEQ: Mapping[Task, TaskHead] = {"seq2seq": TaskHead((), ())}
_PACKING_NOTE = "packing is for decoders: an encoder reads whole examples"


def _t5_attention(place: str, *, cache: bool) -> BlockPart:
    return BlockPart(
        (
            Linear(f"{place}.q", "q", "hidden", "q"),
            Linear(f"{place}.k", "k", "hidden", "q"),
            Linear(f"{place}.v", "v", "hidden", "q"),
            Linear(f"{place}.o", "o", "q", "hidden"),
        ),
        cache="2*q" if cache else "",
    )


def _t5_feedforward(place: str) -> tuple[BlockPart, ...]:
    down = Linear(f"{place}.wo", "down", "ffn", "hidden")
    return (
        BlockPart((Linear(f"{place}.wi", "up", "hidden", "ffn"), down), kind="plain"),
        BlockPart(
            (Linear(f"{place}.wi_0", "gate", "hidden", "ffn"), Linear(f"{place}.wi_1", "up", "hidden", "ffn"), down),
            kind="gated",
        ),
    )


def _t5_kinds(layers: str, *, in_every_layer: bool) -> LayerKinds:
    """Return the layer kinds of T5: relative positions in its first layer, in umT5 in every layer."""

    def kinds(sizes: Sizes) -> list[frozenset[str]]:
        is_gated = str(sizes.key("feed_forward_proj")).startswith("gated")
        shape = "gated" if is_gated else "plain"
        return [frozenset({shape, "positions"} if in_every_layer or i == 0 else {shape}) for i in range(sizes[layers])]

    return kinds


def _t5(name: str, model_type: str, *, positions_in_every_layer: bool, feed_forward: str) -> Family:
    table = "relative_attention_num_buckets*heads"
    encoder = (
        _t5_attention("layer.0.SelfAttention", cache=False),
        BlockPart(
            weights=(Weight("layer.0.SelfAttention.relative_attention_bias", table, "positions"),), kind="positions"
        ),
        *_t5_feedforward("layer.1.DenseReluDense"),
        norms("layer.0.layer_norm", "layer.1.layer_norm"),
    )
    decoder = (
        _t5_attention("layer.0.SelfAttention", cache=True),
        BlockPart(
            weights=(Weight("layer.0.SelfAttention.relative_attention_bias", table, "positions"),), kind="positions"
        ),
        _t5_attention("layer.1.EncDecAttention", cache=False),
        *_t5_feedforward("layer.2.DenseReluDense"),
        norms("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
    )
    return Family(
        name,
        (model_type,),
        (
            Stack(
                "encoder.block.{i}",
                encoder,
                "num_layers",
                _t5_kinds("num_layers", in_every_layer=positions_in_every_layer),
            ),
            Stack("decoder.block.{i}", decoder, "layers", _t5_kinds("layers", in_every_layer=positions_in_every_layer)),
        ),
        _SEQ2SEQ,
        (rms("encoder.final_layer_norm"), rms("decoder.final_layer_norm")),
        embeddings="shared",
        tied_by_default=True,
        sizes={
            "layers": ("num_decoder_layers", "num_layers"),
            "hidden": "d_model",
            "heads": "num_heads",
            "kv_heads": "heads",
            "head_dim": "d_kv",
            "ffn": "d_ff",
            "positions": "0",
        },
        defaults={"relative_attention_num_buckets": 32, "feed_forward_proj": feed_forward},
        positions="relative",
        activation=("feed_forward_proj", feed_forward),
        packs=False,
        skip_4bit=("wo",),
        mind=(_PACKING_NOTE, "transformers keeps `wo` out of 4-bit: it overflows in fp16"),
    )


def _bart_attention(place: str, *, cache: bool) -> BlockPart:
    return BlockPart(
        (
            Linear(f"{place}.q_proj", "q", "hidden", "hidden", True),
            Linear(f"{place}.k_proj", "k", "hidden", "hidden", True),
            Linear(f"{place}.v_proj", "v", "hidden", "hidden", True),
            Linear(f"{place}.out_proj", "o", "hidden", "hidden", True),
        ),
        cache="2*hidden" if cache else "",
    )


def _bert(name: str, model_types: tuple[str, ...], place: str, heads: Mapping[Task, TaskHead], **fields: Any) -> Family:
    return Family(
        name,
        model_types,
        (
            Stack(
                f"{place}.encoder.layer.{{i}}",
                (
                    BlockPart(
                        (
                            Linear("attention.self.query", "q", "hidden", "hidden", True),
                            Linear("attention.self.key", "k", "hidden", "hidden", True),
                            Linear("attention.self.value", "v", "hidden", "hidden", True),
                            Linear("attention.output.dense", "o", "hidden", "hidden", True),
                            Linear("intermediate.dense", "up", "hidden", "ffn", True),
                            Linear("output.dense", "down", "ffn", "hidden", True),
                        )
                    ),
                    norms("attention.output.LayerNorm", "output.LayerNorm", biased=True),
                ),
            ),
        ),
        heads,
        (
            Weight(f"{place}.embeddings.position_embeddings", "max_position_embeddings*hidden", "positions"),
            Weight(f"{place}.embeddings.token_type_embeddings", "type_vocab_size*hidden", "positions"),
            layer_norm(f"{place}.embeddings.LayerNorm"),
        ),
        embeddings="word_embeddings",
        defaults={"type_vocab_size": 2, "pad_token_id": 1},
        positions="learned",
        norm="LayerNorm",
        norm_place="post",
        activation=("hidden_act", "gelu"),
        packs=False,
        mind=(_PACKING_NOTE,),
        **fields,
    )


_CLASSIFIER = Weight("classifier", "num_labels*hidden+num_labels", "head")
_DENSE = "hidden*hidden+hidden"

FAMILIES: tuple[Family, ...] = (
    _t5("T5", "t5", positions_in_every_layer=False, feed_forward="relu"),
    _t5("umT5", "umt5", positions_in_every_layer=True, feed_forward="gated-gelu"),
    Family(
        "BART",
        ("bart",),
        (
            Stack(
                "model.encoder.layers.{i}",
                (
                    _bart_attention("self_attn", cache=False),
                    two_layer_ffn("", "fc1", "fc2", ffn="encoder_ffn_dim"),
                    norms("self_attn_layer_norm", "final_layer_norm", biased=True),
                ),
                "encoder_layers",
            ),
            Stack(
                "model.decoder.layers.{i}",
                (
                    _bart_attention("self_attn", cache=True),
                    _bart_attention("encoder_attn", cache=False),
                    two_layer_ffn("", "fc1", "fc2", ffn="decoder_ffn_dim"),
                    norms("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", biased=True),
                ),
            ),
        ),
        _SEQ2SEQ,
        (
            Weight("model.encoder.embed_positions", "(positions+2)*hidden", "positions"),
            Weight("model.decoder.embed_positions", "(positions+2)*hidden", "positions"),
            layer_norm("model.encoder.layernorm_embedding"),
            layer_norm("model.decoder.layernorm_embedding"),
        ),
        embeddings="shared",
        tied_by_default=True,
        sizes={
            "layers": "decoder_layers",
            "hidden": "d_model",
            "heads": "decoder_attention_heads",
            "kv_heads": "heads",
            "head_dim": "hidden//heads",
            "ffn": "decoder_ffn_dim",
        },
        positions="learned",
        norm="LayerNorm",
        norm_place="post",
        activation=("activation_function", "gelu"),
        packs=False,
        mind=(_PACKING_NOTE,),
    ),
    _bert(
        "BERT",
        ("bert",),
        "bert",
        {
            "classification": TaskHead(
                (Weight("bert.pooler.dense", _DENSE, "head"), _CLASSIFIER), ("pooler.dense", "classifier")
            ),
            "token-classification": TaskHead((_CLASSIFIER,), ("classifier",)),
        },
    ),
    _bert(
        "RoBERTa",
        ("roberta", "xlm-roberta"),
        "roberta",
        {
            "classification": TaskHead(
                (Weight("classifier.dense", _DENSE, "head"), Weight("classifier.out_proj", _CLASSIFIER.size, "head")),
                ("classifier",),
                container=True,
            ),
            "token-classification": TaskHead((_CLASSIFIER,), ("classifier",)),
        },
        sizes={"positions": "max_position_embeddings-pad_token_id-1"},  # the first stand for padding
    ),
    Family(
        "DistilBERT",
        ("distilbert",),
        (
            Stack(
                "distilbert.transformer.layer.{i}",
                (
                    BlockPart(
                        (
                            Linear("attention.q_lin", "q", "hidden", "hidden", True),
                            Linear("attention.k_lin", "k", "hidden", "hidden", True),
                            Linear("attention.v_lin", "v", "hidden", "hidden", True),
                            Linear("attention.out_lin", "o", "hidden", "hidden", True),
                        )
                    ),
                    two_layer_ffn("ffn", "lin1", "lin2"),
                    norms("sa_layer_norm", "output_layer_norm", biased=True),
                ),
            ),
        ),
        {
            "classification": TaskHead(
                (Weight("pre_classifier", _DENSE, "head"), _CLASSIFIER), ("pre_classifier", "classifier")
            ),
            "token-classification": TaskHead((_CLASSIFIER,), ("classifier",)),
        },
        (
            Weight("distilbert.embeddings.position_embeddings", "positions*hidden", "positions"),
            layer_norm("distilbert.embeddings.LayerNorm"),
        ),
        embeddings="word_embeddings",
        sizes={"layers": "n_layers", "hidden": "dim", "heads": "n_heads", "kv_heads": "heads", "ffn": "hidden_dim"},
        positions="learned",
        norm="LayerNorm",
        norm_place="post",
        activation=("activation", "gelu"),
        refuses={"prefix": "transformers gives it no past keys and values"},
        packs=False,
        mind=(_PACKING_NOTE,),
    ),
    Family(
        "ModernBERT",
        ("modernbert",),
        (
            Stack(
                "model.layers.{i}",
                (
                    BlockPart(
                        (
                            Linear("attn.Wqkv", "qkv", "hidden", "3*hidden", "attention_bias"),
                            Linear("attn.Wo", "o", "hidden", "hidden", "attention_bias"),
                            Linear("mlp.Wi", "gate_up", "hidden", "2*ffn", "mlp_bias"),
                            Linear("mlp.Wo", "down", "ffn", "hidden", "mlp_bias"),
                        )
                    ),
                    norms("mlp_norm"),
                    norms("attn_norm", kind="later"),
                    BlockPart(weights=(Weight("attn_norm", "0", "identity"),), kind="first"),
                ),
                kinds=lambda sizes: [frozenset({"later"} if i else {"first"}) for i in range(sizes["layers"])],
            ),
        ),
        {
            task: TaskHead(
                (Weight("head.dense", "hidden*hidden", "head"), Weight("head.norm", "hidden", "head"), _CLASSIFIER),
                ("head.dense", "head.norm", "classifier"),
            )
            for task in ("classification", "token-classification")
        },
        (rms("model.embeddings.norm"), rms("model.final_norm")),
        embeddings="tok_embeddings",
        norm="LayerNorm",
        activation=("hidden_activation", "gelu"),
        refuses={"prefix": "transformers gives it no past keys and values"},
        packs=False,
        mind=(_PACKING_NOTE,),
    ),
)
