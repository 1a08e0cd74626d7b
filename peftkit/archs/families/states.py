"""State-space families without attention: RWKV, Mamba and its kin."""

from __future__ import annotations

from peftkit.archs.families.mixers import IN_PROJ_NOTE, KERNELS, PACKING_NOTE, dt_rank, mamba, mamba2
from peftkit.archs.families.pieces import LM, NO_KEY_VALUES, decoder, layer_norm, norms, rms
from peftkit.archs.family import BlockPart, Family, Linear, Weight

_NO_PREFIX = {"prefix": NO_KEY_VALUES}
_MAMBA_SIZES = {
    "inner": ("intermediate_size", "expand*hidden"),
    "state": "state_size",
    "kernel": "conv_kernel",
    "dt_rank": dt_rank("time_step_rank"),
    "heads": "1",
    "head_dim": "hidden",
    "ffn": "inner",
    "positions": "0",
}
_MAMBA_DEFAULTS = {"expand": 2, "state_size": 16, "conv_kernel": 4, "time_step_rank": "auto"}

FAMILIES: tuple[Family, ...] = (
    decoder(
        "RWKV",
        ("rwkv",),
        BlockPart(
            (
                Linear("attention.key", "k", "hidden", "attention_hidden"),
                Linear("attention.value", "v", "hidden", "attention_hidden"),
                Linear("attention.receptance", "r", "hidden", "attention_hidden"),
                Linear("attention.output", "o", "attention_hidden", "hidden"),
                Linear("feed_forward.key", "up", "hidden", "ffn"),
                Linear("feed_forward.receptance", "r", "hidden", "hidden"),
                Linear("feed_forward.value", "down", "ffn", "hidden"),
            ),
            (
                Weight("attention.time", "2*attention_hidden+3*hidden", "states"),
                Weight("feed_forward.time", "2*hidden", "states"),
                layer_norm("ln1"),
                layer_norm("ln2"),
            ),
            state="5*hidden",
        ),
        BlockPart(weights=(layer_norm("pre_ln"),), kind="first"),
        block="rwkv.blocks.{i}",
        heads=LM,
        outside=(layer_norm("rwkv.ln_out"),),
        embeddings="embeddings",
        head="head",
        sizes={
            "attention_hidden": ("attention_hidden_size", "hidden"),
            "heads": "1",
            "head_dim": "attention_hidden",
            "positions": "0",
        },
        kinds=lambda sizes: [frozenset({"first"}) if i == 0 else frozenset() for i in range(sizes["layers"])],
        positions="none",
        norm="LayerNorm",
        activation=("", "squared ReLU"),
        refuses=_NO_PREFIX,
        packs=False,
        cached_prompts=False,
        batches_generation=False,
        overrides={"rescale_every": 0},
        mind=(
            PACKING_NOTE,
            "its step-by-step decoding is wrong for several prompts at once: prompts are answered one by one",
            "rescale_every is set to 0: it would halve the weights at evaluation, but not the adapters beside them",
            "training runs a loop over tokens where its CUDA kernel is missing: slow",
        ),
    ),
    *(
        decoder(
            name,
            (model_type,),
            mamba("mixer", bias="use_bias"),
            norms("norm"),
            block="backbone.layers.{i}",
            heads=LM,
            outside=(rms("backbone.norm_f"),),
            embeddings="embeddings",
            tied_by_default=True,
            sizes=_MAMBA_SIZES,
            defaults=_MAMBA_DEFAULTS,
            positions="none",
            refuses=_NO_PREFIX,
            packs=False,
            cached_prompts=False,
            mind=(PACKING_NOTE, IN_PROJ_NOTE),
            kernels=KERNELS,
            skip_4bit=skip,
        )
        for name, model_type, skip in (
            ("Mamba", "mamba", ("dt_proj",)),  # multiplied as a matrix, which packed bytes are not
            ("FalconMamba", "falcon_mamba", ()),
        )
    ),
    decoder(
        "Mamba-2",
        ("mamba2",),
        mamba2("mixer", bias="use_bias"),
        norms("norm"),
        block="backbone.layers.{i}",
        heads=LM,
        outside=(rms("backbone.norm_f"),),
        embeddings="embeddings",
        sizes={
            "inner": "expand*hidden",
            "state": "state_size",
            "groups": "n_groups",
            "kernel": "conv_kernel",
            "ssm_heads": "num_heads",
            "heads": "1",
            "head_dim": "hidden",
            "ffn": "inner",
            "positions": "0",
        },
        defaults={"expand": 2, "state_size": 128, "n_groups": 8, "conv_kernel": 4, "num_heads": 128},
        positions="none",
        refuses=_NO_PREFIX,
        packs=False,
        cached_prompts=False,
        mind=(PACKING_NOTE, IN_PROJ_NOTE),
        kernels=KERNELS,
    ),
)
