"""The table of model families. To add one, add an entry to the file of its kind."""

from __future__ import annotations

from peftkit.archs.families import dense, encoders, hybrids, mixtures, states
from peftkit.archs.family import Family

FAMILIES: tuple[Family, ...] = (
    *dense.FAMILIES,
    *mixtures.FAMILIES,
    *states.FAMILIES,
    *hybrids.FAMILIES,
    *encoders.FAMILIES,
)
ROLES: dict[str, str] = {
    "q": "query projection",
    "k": "key projection",
    "v": "value projection",
    "o": "attention output projection",
    "qkv": "fused query, key and value projection",
    "q_a": "query projection to a low rank",
    "kv_a": "key and value projection to a low rank",
    "kv_b": "keys and values from the low rank",
    "r": "receptance (RWKV)",
    "gate": "gate of the feed-forward",
    "up": "up projection of the feed-forward",
    "gate_up": "fused gate and up projection",
    "down": "down projection of the feed-forward",
    "ssm_in": "input projection of a state layer",
    "ssm_ba": "gates of a linear-attention layer",
    "ssm_x": "projection to step, B and C of a state layer",
    "ssm_dt": "step projection of a state layer",
    "ssm_out": "output projection of a state layer",
    "mix": "projection that mixes a shared block in",
    "router": "router of a mixture",
    "experts_gate_up": "fused gate and up projections of all routed experts",
    "experts_up": "up projections of all routed experts",
    "experts_down": "down projections of all routed experts",
    "latent_in": "projection of a mixture's input to a low rank",
    "latent_out": "projection of a mixture's output from the low rank",
    "other": "a linear layer whose role is unknown",
}
ATTENTION_ROLES = ("q", "k", "v", "o", "qkv", "q_a", "kv_a", "kv_b")
EXPERT_ROLES = ("experts_gate_up", "experts_up", "experts_down")
