"""The recipe's schema, and the only place of its defaults.

Every field's description is its documentation: the JSON Schema, `peftkit schema` and the docs use it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from peftkit.methods import Options
from peftkit.methods.adalora import AdaloraOptions
from peftkit.methods.base import Auto, NonNegativeInt, PositiveFloat, PositiveInt
from peftkit.methods.full import FullOptions
from peftkit.methods.ia3 import Ia3Options
from peftkit.methods.ln import LnOptions
from peftkit.methods.lora import LoraOptions
from peftkit.methods.oft import OftOptions
from peftkit.methods.prefix import PrefixOptions
from peftkit.methods.prompt import PromptOptions
from peftkit.methods.qlora import QloraOptions
from peftkit.methods.vera import VeraOptions
from peftkit.units import parse_share

AnyMethod = Annotated[
    FullOptions
    | LoraOptions
    | QloraOptions
    | PrefixOptions
    | Ia3Options
    | PromptOptions
    | VeraOptions
    | OftOptions
    | AdaloraOptions
    | LnOptions,
    Field(discriminator="name"),
]


def _share(value: object) -> Any:
    """Parse '5%' as 0.05; other values are returned as they are."""
    return parse_share(value) if isinstance(value, str) and value.strip().endswith("%") else value


def _encoding(name: str) -> str:
    """Return the name of a text encoding that Python has. Raises ValueError for any other."""
    try:
        "".encode(name)
    except LookupError:
        raise ValueError(
            "an encoding of text is expected, such as windows-1252, utf-16, shift_jis or gb18030"
        ) from None
    return name


Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_share)]


class RopeScaling(Options):
    """Scaling of rotary positions beyond the trained context length."""

    kind: Literal["linear", "dynamic", "yarn"] = Field(
        "yarn", description="linear: positions divided; dynamic: NTK, grows with the length; yarn: by wavelength"
    )
    factor: float = Field(gt=1, description="how many times the trained context length")
    trained: PositiveInt | None = Field(None, description="that length, where config.json claims more; its own else")


class Base(Options):
    """The model to start from."""

    id: str = Field(description="hub id, folder, .gguf file, or embedded:NAME")
    revision: str | None = Field(None, description="commit, tag or branch on the hub")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="sdpa: fused kernels; eager: plain products, to see attention weights"
    )
    rope_scaling: RopeScaling | None = Field(None, description="a longer context, for families with RoPE")
    dequantize: bool = Field(
        False, description="convert a quantized checkpoint once to bfloat16 (FP8, MXFP4, bitsandbytes)"
    )


FormatName = Literal[
    "auto",
    "chat",
    "prompt-completion",
    "instruction",
    "question-answer",
    "preference",
    "unpaired-preference",
    "seq2seq",
    "classification",
    "multi-label",
    "token-classification",
    "text",
]
Columns = Annotated[
    dict[str, str],
    Field(description="our field name -> your column name, or a Jinja line such as '{{ title }}: {{ body }}'"),
]


class Source(Options):
    """One source of rows. Whatever it leaves out is taken from `data`."""

    path: str = Field(description="file, folder, glob, URL (https://, s3://, ...) or hub id")
    config: str | None = Field(None, description="of a hub dataset")
    split: str = Field("train", description="of a hub dataset")
    revision: str | None = Field(None, description="of a hub dataset: commit, tag or branch")
    rows: PositiveInt | None = Field(None, description="number of rows to take, sampled with the seed")
    weight: PositiveFloat | None = Field(None, description="share of the mixture, relative to the others")
    format: FormatName | None = None
    columns: Columns | None = None
    encoding: Annotated[str, AfterValidator(_encoding)] | None = Field(
        None, description="of a text file that is not UTF-8, such as windows-1252"
    )


class Chat(Options):
    """Rendering of chats as text."""

    template: str | None = Field(None, description="file with a Jinja chat template, instead of the model's")
    system: str | None = Field(None, description="system prompt for chats without one")
    thinking: Literal["keep", "drop"] = Field("keep", description="reasoning in the answers")
    repair: Literal["auto", "off"] = Field(
        "auto", description="join neighbouring turns of one role, take a first assistant turn as context; off: refuse"
    )
    end_token: str | None = Field(None, description="token that ends an answer, instead of the tokenizer's own")


AnySource = str | Source


CheckName = Literal[
    "malformed-rows",
    "encoding",
    "missing-fields",
    "empty-answers",
    "roles",
    "repairs",
    "media",
    "rated-answers",
    "unused-columns",
    "chosen-equals-rejected",
    "preference-length",
    "secrets",
    "emails",
    "control-characters",
    "mojibake",
    "special-tokens",
    "foreign-markers",
    "duplicates",
    "near-duplicates",
    "leakage",
    "near-leakage",
    "held-out",
    "labels",
    "unseen-labels",
    "languages",
    "lengths",
    "template",
    "reasoning",
    "round-trip",
    "unknown-tokens",
    "double-bos",
    "masked-rows",
    "end-token",
    "end-agreement",
    "pad-token",
    "rows-dropped",
    "cut-answers",
    "vocabulary",
    "enough-data",
]


class Data(Options):
    """Training data and held-out data."""

    train: AnySource | Annotated[list[AnySource], Field(min_length=1)] = Field(
        description="file, folder, glob, URL or hub id; a mapping with config, split, rows, ...; or a list"
    )
    eval: Annotated[AnySource | Share | None, BeforeValidator(_share)] = Field(
        0.05, description="file, hub split, a share of train such as 5%, or null"
    )
    group: str | None = Field(None, description="column whose rows stay on one side of the split")
    format: FormatName = "auto"
    columns: Columns = Field(default_factory=dict)
    chat: Chat = Chat()
    mask: Literal["completion", "assistant", "last-turn", "all"] = Field(
        "completion", description="tokens that count in the loss; on chats, completion means assistant turns"
    )
    truncation: Literal["auto", "keep_end", "drop", "split", "error"] = Field(
        "auto", description="rows longer than max_length: auto drops them (raw text is split), and says so"
    )
    waive: list[CheckName] = Field([], description="names of data checks that may fail")

    @property
    def sources(self) -> tuple[Source, ...]:
        """Return the sources of the rows to train on."""
        given = self.train if isinstance(self.train, list) else [self.train]
        return tuple(source if isinstance(source, Source) else Source(path=source) for source in given)


SCHEDULE_KEYS = {"cycles": {"restarts"}, "decay": {"wsd"}, "min_rate": {"cosine", "wsd"}}  # of which kinds


class Schedule(Options):
    """The learning-rate schedule."""

    kind: Literal["cosine", "linear", "constant", "restarts", "wsd"] = Field(
        "cosine", description="restarts: cosine, begun anew `cycles` times; wsd: warm-up, stable, decay"
    )
    warmup: Share = Field(0.05, description="share of the steps over which the rate rises from zero")
    warmup_steps: NonNegativeInt | None = Field(None, description="the same in steps, instead of warmup")
    min_rate: Share = Field(
        0.0, description="share of the rate that is left at the end, of cosine and wsd; a warm-up of wsd begins there"
    )
    cycles: PositiveInt = Field(2, description="of restarts")
    decay: Share = Field(0.1, description="share of the steps over which wsd falls")


class EarlyStopping(Options):
    """Early stopping, when the evaluation loss no longer falls."""

    patience: PositiveInt = Field(3, description="evaluations without improvement before stopping")
    min_delta: float = Field(0.0, ge=0, description="what counts as an improvement of the loss")


class Train(Options):
    """The settings of training."""

    epochs: PositiveFloat = Field(3.0, description="passes over the data, unless max_steps is given")
    max_steps: PositiveInt | None = Field(None, description="optimizer steps; overrides epochs")
    learning_rate: Auto | PositiveFloat = "auto"
    schedule: Schedule = Schedule()
    max_grad_norm: PositiveFloat = Field(1.0, description="gradient clipping")
    weight_decay: float = Field(0.0, ge=0)
    neftune: PositiveFloat | None = Field(
        None, description="noise on the embeddings while training, 5 in the paper (Jain et al. 2023)"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each target that is spread over all tokens or classes, in training alone"
    )
    optimizer: Literal[
        "auto",
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "adafactor",
        "sgd",
        "schedule_free_adamw",
    ] = "auto"
    batch_size: Auto | PositiveInt = Field("auto", description="examples per optimizer step")
    micro_batch: Auto | PositiveInt = Field(
        "auto", description="examples per forward pass; with packing, packs of them"
    )
    packing: Auto | bool = Field(
        "auto", description="several examples in one row of max_length tokens, kept apart: hardly any padding"
    )
    max_length: Auto | PositiveInt = Field(
        "auto", description="tokens per example; 2048, or less if the model's context is shorter"
    )
    gradient_checkpointing: Auto | bool | Literal["selective"] = Field(
        "auto", description="recompute activations to save memory: in every layer, or (selective) in every second"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    eval_steps: Auto | PositiveInt = Field("auto", description="optimizer steps between evaluations")
    checkpoint_steps: Auto | PositiveInt = Field("auto", description="optimizer steps between checkpoints")
    early_stopping: EarlyStopping | None = None
    on_spike: Literal["rollback", "skip", "stop"] = Field(
        "rollback",
        description="non-finite loss or gradients, or a loss spike. rollback: after three in a "
        "row, to the last checkpoint at half the rate; skip: non-finite steps are left out; stop: at once "
        "if non-finite, else at the third spike",
    )
    on_oom: Literal["stop", "adapt"] = Field(
        "stop", description="out of memory: stop and say what fits, or go on with smaller micro-batches"
    )


class EvaluateOptions(Options):
    """Metrics that are measured besides the loss."""

    metric: Literal["auto", "exact_match", "token_f1", "accuracy", "micro_f1", "macro_f1", "entity_f1"] | None = Field(
        "auto",
        description="measured before and after training. exact_match, token_f1: of greedy answers; accuracy, "
        "macro_f1: of classes; micro_f1: of texts with several; entity_f1: of tagged spans; auto: the first of these "
        "that the task has",
    )
    max_examples: PositiveInt = Field(100, description="number of held-out examples for the metric")
    max_new_tokens: PositiveInt = Field(32, description="length of generated answers")


class Devices(Options):
    """The devices to train on."""

    count: Auto | PositiveInt = Field(
        "auto", description="GPUs, or processes on a CPU, that share out each step; auto: as launched, else one"
    )
    restarts: int = Field(0, ge=0, description="times that the run is resumed in new processes after one has died")

    price_per_hour: PositiveFloat | None = Field(None, description="of the device, in any currency")


class Target(Options):
    """The quality that the run should reach; without one, no run is called lagging."""

    metric: Literal["eval_loss", "exact_match", "accuracy"] = "eval_loss"
    value: float = Field(description="eval_loss: at most this, in nats; others: at least this, from 0 to 1")


class Bounds(Options):
    """The limits of an escalation."""

    max_rank: PositiveInt = Field(256, description="of LoRA")
    max_trainable: PositiveInt | None = Field(None, description="trainable parameters")
    max_memory: str | None = Field(None, description="of the device, such as 20GiB; null: what it has")
    max_escalations: PositiveInt = Field(2, description="changes in one run")
    compute: Share = Field(0.15, description="share of the run's compute that the diagnosis may take")


class Diagnose(Options):
    """The diagnosis: whether quality lags, why, and what is done about it."""

    escalate: Literal["off", "recommend", "auto"] = Field(
        "recommend", description="recommend: a verdict, and the next recipe; auto: grow the adapter where that pays"
    )
    target: Target | None = None
    reference: Literal["full"] | None = Field(
        None, description="full: compare with short trainings of the adapted weights themselves (costs extra)"
    )
    bounds: Bounds = Bounds()


class Recipe(Options):
    """One fine-tuning run."""

    base: Base
    method: AnyMethod
    data: Data
    start_from: str | None = Field(
        None, description="a run or an adapter folder to go on training: its base and its settings are taken from it"
    )
    task: Literal["auto", "causal-lm", "seq2seq", "classification", "multi-label", "token-classification"] = "auto"
    train: Train = Train()
    evaluate: EvaluateOptions = EvaluateOptions()
    diagnose: Diagnose = Diagnose()
    devices: Devices = Devices()
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: object) -> Any:
        """Expand `base: gpt2` to `base: {id: gpt2}`, and `method: lora` to `method: {name: lora}`."""
        if isinstance(values, dict):
            values = dict(values)
            for key, inner in (("base", "id"), ("method", "name")):
                if isinstance(values.get(key), str):
                    values[key] = {inner: values[key]}
        return values
