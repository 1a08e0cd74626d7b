"""The vocabulary in which a model family is described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Linear:
    """A linear layer that stands in every block.

    `name` is its path inside the block; `d_in` and `d_out` name entries of `Dims`, joined by '+'.
    """

    name: str
    role: str
    d_in: str
    d_out: str
    bias: bool | str = False  # or the key of config.json that decides


@dataclass(frozen=True)
class Family:
    """One model family: the only place that knows its names.

    `config_keys` maps our names of sizes to the keys of this family's config.json where they differ from
    the usual ones. `norms_per_block` counts norm weights of the hidden size in each block.
    """

    name: str
    model_types: tuple[str, ...]
    block: str  # path of block i, for example "model.layers.{i}"
    linears: tuple[Linear, ...]
    ia3_targets: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    ia3_feedforward: tuple[str, ...] = ("down_proj",)
    embeddings: str = "embed_tokens"
    head: str = "lm_head"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    final_norm: str = "norm"
    norm_bias: bool = False
    qk_norm: bool = False
    head_bias: bool = False
    learned_positions: bool = False
    tied_by_default: bool = False
    config_keys: Mapping[str, str] = field(default_factory=dict)

    def target(self, linear: Linear) -> str:
        """The shortest ending that names this layer and no other: 'q_proj', but 'mlp.c_proj' in GPT-2."""
        last = linear.name.rsplit(".", 1)[-1]
        twins = [other for other in self.linears if other.name.rsplit(".", 1)[-1] == last]
        return last if len(twins) == 1 else linear.name

    @property
    def targets(self) -> tuple[str, ...]:
        """What names every linear layer of a block."""
        return tuple(self.target(linear) for linear in self.linears)

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Role -> target names, in block order."""
        found: dict[str, tuple[str, ...]] = {}
        for linear in self.linears:
            found[linear.role] = (*found.get(linear.role, ()), self.target(linear))
        return found


@dataclass(frozen=True)
class Dims:
    """Sizes of a model. `q` and `kv` are heads x head size for queries and for keys or values."""

    num_layers: int
    hidden: int
    q: int
    kv: int
    ffn: int
    vocab: int
    head_dim: int
    positions: int

    def width(self, expression: str) -> int:
        """'q+kv+kv' -> the sum of those sizes."""
        return sum(int(getattr(self, name)) for name in expression.split("+"))


@dataclass(frozen=True)
class Module:
    """One module of a concrete model: its full name, the role it plays, its sizes."""

    name: str
    role: str
    d_in: int
    d_out: int
    bias: bool = False

    @property
    def num_parameters(self) -> int:
        return self.d_in * self.d_out + (self.d_out if self.bias else 0)


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know of a model before any tensor is loaded."""

    family: str
    model_type: str
    dims: Dims
    modules: tuple[Module, ...]  # linear layers inside the blocks
    num_parameters: int
    tied_embeddings: bool
    source: str
