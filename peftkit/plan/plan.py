"""The plan: everything decided, each decision with its source. No `auto` is left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from peftkit.errors import Problem, UserError
from peftkit.methods import PeftSpec
from peftkit.rundir import RunDir, read_sealed
from peftkit.units import html_table

Dtype = str  # "float32" | "bfloat16" | "float16", as torch names them


@dataclass(frozen=True)
class Decision:
    """One decided value. `source` is a recipe line, the command line, "default" or "decided"."""

    key: str
    value: Any
    source: str
    reason: str = ""


@dataclass(frozen=True)
class BasePlan:
    """The base model and the precision of its weights."""

    id: str
    kind: str
    revision: str | None
    trust_remote_code: bool
    dtype: Dtype
    quant_type: str | None  # 4-bit data type, or None
    double_quant: bool
    compute_dtype: Dtype
    task: str  # which head is put on top
    labels: tuple[str, ...]  # of a classifier, in the order of its outputs
    inferred: bool  # no known family: TRL's fused loss may not find its way around in it
    head_modules: tuple[str, ...]  # may be missing from the weights: they start from nothing
    skip_4bit: tuple[str, ...]  # modules kept out of 4-bit: the head, and what the family needs
    experts_4bit: tuple[str, ...]  # fused expert parameters to quantize, by their endings
    overrides: Mapping[str, Any]  # of the configuration, at loading
    attention: str | None  # transformers' implementation; None where the model has none, or is unknown
    end_token: str | None = None  # what ends an answer, where the recipe names it
    new_tokens: Mapping[str, str] = field(default_factory=dict)  # added to the vocabulary: what each starts from


@dataclass(frozen=True)
class MethodPlan:
    """The method with targets resolved. `trainable_by_role` is None only in a plan that is refused."""

    name: str
    peft: PeftSpec | None
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    token_rows: tuple[str, ...]
    lr_ratio: float | None
    trainable_by_role: Mapping[str, int] | None
    num_parameters: int
    roles: Mapping[str, str]  # path of a module with * for numbers -> its role
    trainable_by_layers: Mapping[str, int] = field(default_factory=dict)  # ranges of alike layers
    start_from: str | None = None  # the folder of the adapter that is trained on

    @property
    def num_trainable(self) -> int | None:
        return None if self.trainable_by_role is None else sum(self.trainable_by_role.values())


@dataclass(frozen=True)
class DataPlan:
    """The data that is read and how it becomes tokens and labels."""

    train: tuple[str, ...]
    eval: str | float | None
    format: str
    columns: Mapping[str, str]
    mask: str
    truncation: str
    max_length: int
    chat_template: str | None = None  # a file, instead of the model's own
    system: str | None = None  # for chats that bring none
    waive: tuple[str, ...] = ()  # checks that may fail
    weighted: bool = False  # rows or turns do not all weigh the same in the loss


@dataclass(frozen=True)
class RateSearch:
    """The search for the learning rate that is still to be made, before the first step.

    At most `max_forks` forks of `fork_steps` steps each, at the usual rate and around it. Unless it `is_exact`, a
    usual rate that is nearly right goes half way only.
    """

    fork_steps: int
    max_forks: int
    usual: float
    is_exact: bool


@dataclass(frozen=True)
class TrainPlan:
    """The settings of training. `num_steps` is None until the number of rows is known.

    With `packing` the rows of `batch_size` and `micro_batch` are packs of examples.
    """

    num_steps: int | None
    num_warmup_steps: int
    learning_rate: float
    schedule: str
    max_grad_norm: float
    weight_decay: float
    optimizer: str
    batch_size: int
    micro_batch: int
    accumulation: int
    gradient_checkpointing: str  # "none" | "selective" | "full"
    autocast: str | None  # "bf16" | "fp16" | None
    eval_steps: int
    checkpoint_steps: int
    patience: int | None
    min_delta: float
    on_oom: str = "stop"
    on_spike: str = "rollback"
    rollbacks: tuple[tuple[int, int], ...] = ()  # each: the step gone back to, the one set aside, or 0
    schedule_arguments: Mapping[str, float] = field(default_factory=dict)  # transformers' own, beside the warm-up
    restart_step: int = 0  # where the schedule begins anew: an escalation that goes on past the end
    packing: bool = False
    sampling: str = "shuffled"  # or "grouped by length": rows of like length together
    neftune: float | None = None  # noise on the embeddings, in transformers' terms
    label_smoothing: float = 0.0
    rate_search: RateSearch | None = None  # None once the rate is found
    num_rows: int | None = None  # drawn in all, where whole passes end within the last step


@dataclass(frozen=True)
class EvaluatePlan:
    """Metrics beside the loss. `generation_batch` prompts are answered at once."""

    metric: str | None
    max_examples: int
    max_new_tokens: int
    generation_batch: int
    use_cache: bool


@dataclass(frozen=True)
class DiagnosePlan:
    """The target of the diagnosis, its steps, and the bounds of an escalation.

    `look_steps` are the steps at which the run pauses for a diagnosis; its end is diagnosed unless it is off.
    """

    escalate: str = "off"  # "off" | "recommend" | "auto"
    metric: str = "eval_loss"
    target: float | None = None
    reference: str | None = None
    max_rank: int = 256
    max_trainable: int | None = None
    max_memory_bytes: int | None = None
    max_escalations: int = 2
    compute_share: float = 0.15
    look_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Growth:
    """An escalation: its step, its cause, and its changes of the recipe.

    One that did not pay off is rolled back: `kept` is False, at the look of the step `undone_step`. What it gains is
    measured on `rows`, held-out rows by number, whose losses were `row_losses`; `overhead` is what its look took.
    """

    step: int
    cause: str
    overrides: tuple[str, ...]
    kept: bool = True
    undone_step: int = 0
    rows: tuple[int, ...] = ()
    row_losses: tuple[float, ...] = ()
    overhead: float = 0.0

    @property
    def is_new_start(self) -> bool:
        """Whether the adapter began anew: nothing of before is left in it."""
        return self.kept and self.cause == "learning rate too high"


@dataclass(frozen=True)
class Batch:
    """The shapes of one micro-batch.

    `num_labels` is the target's length of an encoder-decoder, `num_learnt` counts the tokens in the loss.
    Fields that start with `eval_` describe the held-out rows that are evaluated together; no rows means no
    evaluation. With `is_packed` each row holds several documents, which a mask separates.
    """

    num_rows: int
    num_tokens: int
    num_labels: int
    num_learnt: int
    is_padded: bool
    eval_rows: int = 0
    eval_tokens: int = 0
    eval_labels: int = 0
    is_packed: bool = False


@dataclass(frozen=True)
class Peak:
    """The peak of one phase of the work: bytes on the device by component."""

    phase: str  # "forward" | "backward" | "optimizer step" | "evaluation" | "checkpoint write" | ...
    components: Mapping[str, int]

    @property
    def allocated_bytes(self) -> int:
        return sum(self.components.values())


@dataclass(frozen=True)
class Memory:
    """The memory that a plan needs.

    `reserved_bytes` is held by torch's allocator, `context_bytes` by the process beside it.
    """

    depth: str  # "closed form" | "traced"
    peaks: tuple[Peak, ...]
    reserved_bytes: int
    context_bytes: int
    host_bytes: int  # optimizer states that live in host memory
    bound: str  # what is known of the error, where the numbers are only a bound

    def __post_init__(self) -> None:
        sizes = [self.reserved_bytes, self.context_bytes, self.host_bytes]
        sizes += [size for peak in self.peaks for size in peak.components.values()]
        if not self.peaks or min(sizes) < 0:
            raise ValueError("peaks and sizes in bytes are expected")

    @property
    def peak(self) -> Peak:
        """The highest peak of all phases."""
        return max(self.peaks, key=lambda peak: peak.allocated_bytes)

    @property
    def needed_bytes(self) -> int:
        """Bytes that the device must have free."""
        return self.reserved_bytes + self.context_bytes

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Memory:
        """Restore the value that `asdict` wrote. Raises ValueError for anything else."""
        return TypeAdapter(cls).validate_json(json.dumps(value), strict=True)


@dataclass(frozen=True)
class RanksPlan:
    """The processes that train together: how many, and what each holds."""

    num: int = 1
    strategy: str = "none"  # or "ddp": the whole model in each


@dataclass(frozen=True)
class Plan:
    """Everything decided for one run."""

    base: BasePlan
    method: MethodPlan
    data: DataPlan
    train: TrainPlan
    evaluate: EvaluatePlan
    device: str
    seed: int
    decisions: tuple[Decision, ...]
    diagnose: DiagnosePlan = DiagnosePlan()
    growths: tuple[Growth, ...] = ()
    batch: Batch | None = None  # the largest micro-batch that will come
    memory: Memory | None = None
    ranks: RanksPlan = RanksPlan()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # and of its parts, when it is read

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for plan.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """Restore the plan that `to_json` wrote. Raises ValueError for unknown, missing and invalid values."""
        return _plan_adapter().validate_json(json.dumps(value), strict=True)

    def _repr_html_(self) -> str:
        return html_table([(one.key, str(one.value), one.reason or one.source) for one in self.decisions])


@cache
def _plan_adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


def read_plan(run: RunDir) -> Plan:
    """Read the plan of a run. Raises UserError if plan.json cannot be read."""
    path = run.path / "plan.json"
    try:
        return Plan.from_json(read_sealed(path))
    except ValidationError as error:
        fault = error.errors()[0]
        got = f"a plan that cannot be read ({'.'.join(map(str, fault['loc']))}: {fault['msg']})"
        raise UserError(Problem(str(path), got, "the plan of a run")) from None
