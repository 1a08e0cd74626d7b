"""Dataclasses that describe a model family and the shapes of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from peftkit.archs.sizes import Expression, Sizes

Task = Literal["causal-lm", "seq2seq", "classification", "multi-label", "token-classification"]
TASKS: tuple[Task, ...] = ("causal-lm", "seq2seq", "classification", "multi-label", "token-classification")
Positions = Literal["rope", "alibi", "learned", "relative", "none", "unknown"]
SHARED_WEIGHT = "several layers share one weight: merging would add every adapter to it"
ROLES_NOT_BY_DEFAULT = ("router", "experts_gate_up", "experts_up", "experts_down")


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    `name` is its path inside the block; `d_in`, `d_out` and `num` are expressions of sizes. With `num` it is
    one 3-D parameter of so many matrices (the fused experts of a mixture).
    """

    name: str
    role: str
    d_in: str
    d_out: str
    bias: bool | str = False  # or the key of config.json that decides
    num: str = ""
    blocked_reason: str = ""  # why it must not be adapted
    by_parameter: bool = False  # PEFT would take its name for the routed experts: reach it by its weight


@dataclass(frozen=True)
class Weight:
    """Parameters outside linear layers: norms, convolutions, routers, states. `size` includes the bias."""

    name: str
    size: str
    role: str = "norms"


@dataclass(frozen=True)
class BlockPart:
    """A piece of the blocks whose layer has its `kind`; an empty kind is in every layer.

    `cache` counts the numbers cached per token and layer in generation, `state` those per sequence and layer.
    """

    linears: tuple[Linear, ...] = ()
    weights: tuple[Weight, ...] = ()
    kind: str = ""
    cache: str = ""
    state: str = ""


LayerKinds = Callable[[Sizes], list[frozenset[str]]]


@dataclass(frozen=True)
class Stack:
    """A stack of blocks, for example a decoder. `block` is a path with {i}; `layers` is the number of blocks.

    `kinds` returns the set of kinds of each layer, for families whose layers differ.
    """

    block: str
    parts: tuple[BlockPart, ...]
    layers: str = "layers"
    kinds: LayerKinds | None = None


@dataclass(frozen=True)
class TaskHead:
    """The head of a task. `modules` are the names that PEFT trains and saves whole beside an adapter.

    Beside a `container` (a module of modules under the one name that PEFT accepts) PEFT merges LoRA only.
    """

    weights: tuple[Weight, ...]
    modules: tuple[str, ...]
    container: bool = False


@dataclass(frozen=True)
class Family:
    """One model family: the only place that knows its module names.

    `sizes` maps names of sizes to keys of config.json or expressions, where they differ from the common ones;
    `defaults` gives keys that a config.json may omit. `refuses` maps methods that cannot work on this family
    to the measured reason.
    """

    name: str
    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    heads: Mapping[Task, TaskHead]
    outside: tuple[Weight, ...] = ()  # beside the blocks: final norms, position tables
    embeddings: str = "embed_tokens"
    head: str = "lm_head"
    head_bias: bool = False
    tied_by_default: bool = False
    sizes: Mapping[str, Expression] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    positions: Positions | Callable[[Sizes], Positions] = "rope"
    window: int | None = None  # where config.json has a sliding window: 0: in every layer, n: but every n-th
    norm: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_place: Literal["pre", "post", "pre and post"] = "pre"
    activation: tuple[str, ...] = ("hidden_act", "silu")  # key of config.json, default
    refuses: Mapping[str, str] = field(default_factory=dict)
    packs: bool = True  # packed documents do not see each other
    batches_generation: bool = True  # cached decoding of several prompts at once is right
    cached_prompts: bool = True  # cached decoding behind virtual tokens is right
    skip_4bit: tuple[str, ...] = ()  # layers that 4-bit would break
    overrides: Mapping[str, object] = field(default_factory=dict)  # of the configuration, at loading
    mind: tuple[str, ...] = ()  # what a user should know
    kernels: tuple[str, ...] = ()  # packages that make it fast on a GPU
    fused_attention: bool = True  # transformers can run its attention as one kernel
    inferred: bool = False  # made by looking at a model of no known family

    def task_head(self, task: Task) -> TaskHead | None:
        """Return the head of a task, None where the family has none. One class or several come of the same."""
        return self.heads.get("classification" if task == "multi-label" and task not in self.heads else task)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every different linear layer, in block order."""
        return tuple(linear for stack in self.stacks for part in stack.parts for linear in part.linears)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that linear layers of this family play, in block order."""
        return tuple(dict.fromkeys(linear.role for linear in self.linears))

    @property
    def has_experts(self) -> bool:
        """True if some feed-forwards are mixtures of experts in 3-D parameters."""
        return any(linear.num for linear in self.linears)

    @property
    def is_recurrent(self) -> bool:
        """True if some layers keep a state instead of attending to every token."""
        return any(part.state for stack in self.stacks for part in stack.parts)

    @property
    def has_attention(self) -> bool:
        """True if some layers have attention, which prefix tuning needs."""
        return bool({"q", "qkv"} & set(self.roles))


@dataclass(frozen=True)
class Dims:
    """Sizes of a model. `q` and `kv` are heads x head size for queries and for keys or values."""

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    q: int
    kv: int
    ffn: int
    vocab: int
    head_dim: int
    positions: int


@dataclass(frozen=True)
class Module:
    """One linear layer of a concrete model: its full name, the role it plays, its sizes."""

    name: str
    role: str
    d_in: int
    d_out: int
    bias: bool = False
    num: int = 0  # of matrices in a 3-D parameter; 0 for an ordinary layer
    blocked_reason: str = ""
    by_parameter: bool = False

    @property
    def num_parameters(self) -> int:
        return max(1, self.num) * (self.d_in * self.d_out + (self.d_out if self.bias else 0))

    @property
    def in_experts(self) -> bool:
        return self.num > 0


@dataclass(frozen=True)
class Tensor:
    """Other parameters of a concrete model under one name."""

    name: str
    role: str
    num_parameters: int


@dataclass(frozen=True)
class ModelShape:
    """Shapes of a concrete model, known before any tensor is loaded."""

    family: Family
    model_type: str
    task: Task
    dims: Dims
    modules: tuple[Module, ...]  # linear layers inside the blocks
    tensors: tuple[Tensor, ...]  # everything else
    tied_embeddings: bool
    positions: Positions
    rope_type: str  # "default", or how the base stretches its rotary positions already
    experts_per_token: int
    cache_per_token: int  # numbers that generation keeps per token, all layers
    num_windowed: int  # layers that keep the last `window` tokens only
    window: int
    state_per_sequence: int  # numbers that generation keeps whatever the length
    num_cached_layers: int
    activation: str
    source: str
    unread_keys: tuple[str, ...] = ()  # of config.json, that look like sizes: the family's table knows none of them

    @property
    def task_head(self) -> TaskHead:
        head = self.family.task_head(self.task)
        assert head is not None, "the shape is computed for a task that the family has"
        return head

    @property
    def num_parameters(self) -> int:
        return sum(m.num_parameters for m in self.modules) + sum(t.num_parameters for t in self.tensors)

    def cache_at(self, length: int) -> int:
        """Return the numbers cached for a text of `length` tokens, sliding windows considered."""
        if not self.num_cached_layers:
            return 0
        full = self.cache_per_token * (self.num_cached_layers - self.num_windowed) * length
        windowed = self.cache_per_token * self.num_windowed * min(length, self.window)
        return (full + windowed) // self.num_cached_layers

    def by_role(self) -> dict[str, int]:
        """Count parameters by role, in model order; sums to `num_parameters`."""
        counts: dict[str, int] = {}
        sizes = [(m.role, m.num_parameters) for m in self.modules]
        for role, num in sizes + [(t.role, t.num_parameters) for t in self.tensors]:
            counts[role] = counts.get(role, 0) + num
        return counts

    @property
    def attention(self) -> str:
        """Kind of attention: MHA, GQA, MQA, MLA or none; '+ state' if some layers are recurrent."""
        if not self.family.has_attention:
            return "none"
        dims = self.dims
        if any(module.role == "kv_b" for module in self.modules):
            kind = "MLA"
        else:
            kind = "MHA" if dims.kv_heads == dims.heads else "MQA" if dims.kv_heads == 1 else "GQA"
        return f"{kind} + state" if self.family.is_recurrent else kind


def wildcard_name(name: str) -> str:
    """Replace the layer numbers of a name by *: 'model.layers.*.mlp.up_proj'."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _endings(name: str) -> list[str]:
    """Return 'q_proj', 'self_attn.q_proj', ... up to the whole name."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def shortest_names(names: Iterable[str], all_names: Iterable[str]) -> tuple[str, ...]:
    """Return the shortest endings that match exactly `names` among `all_names`, each once, in order.

    shortest_names(["l.0.attn.out", "l.1.attn.out"], ["l.0.attn.out", "l.1.attn.out", "l.0.mlp.out"])
    # "out" would match l.0.mlp.out too
    -> ("attn.out",)
    """
    selected = set(names)
    names_by_ending: dict[str, set[str]] = {}
    for name in all_names:
        for ending in _endings(name):
            names_by_ending.setdefault(ending, set()).add(name)
    endings: dict[str, None] = {}
    for name in names:
        ending = next(e for e in _endings(name) if names_by_ending.get(e, {name}) <= selected)
        endings[ending] = None
    return tuple(endings)
