"""From examples to tokenized training and evaluation sets on disk, with a ledger of every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.archs import Task
from peftkit.data.chat.spans import choose_style, read_template
from peftkit.data.chat.template import NO_CHATS, Style, ensure_template
from peftkit.data.formats import Example
from peftkit.data.rows import cache
from peftkit.data.rows.examples import Examples
from peftkit.data.rows.lazy import Picked
from peftkit.data.rows.tally import Tally
from peftkit.data.tokens.encode import needs_template
from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.scan_tokens import Watch
from peftkit.data.tokens.tokenize import InMemory, Work, fill, write
from peftkit.data.tokens.truncate import Fitted, refuse_long
from peftkit.errors import Problem, UserError
from peftkit.plan.plan import DataPlan

_LOOKED_AT = 512  # examples that tell whether turns have to be told apart


@dataclass(frozen=True)
class Seen:
    """What the checks saw in tokens: `ends` are the last tokens learnt with their counts, commonest first."""

    tally: Tally
    ends: tuple[tuple[int, int], ...] = ()
    largest_id: int = 0

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Seen:
        """What a `Watch` wrote."""
        ends = tuple((token, count) for token, count in value["ends"])
        return cls(Tally.from_json(value["tally"]), ends, value["largest_id"])


@dataclass(frozen=True)
class Prepared:
    """Tokenized sets and what became of the rows. `fingerprint` is of those on disk."""

    train: Sequence[Tokenized]
    eval: Sequence[Tokenized]
    eval_examples: Sequence[Example]
    style: Style
    seen: Seen
    fitted: Fitted = field(default_factory=Fitted)  # of all rows, those held out as well
    fingerprint: str = ""

    @property
    def default_template(self) -> bool:
        """Whether chats are rendered with peftkit's own template, for want of another."""
        return self.style.source == "the default"

    @property
    def num_tokens(self) -> int:
        from peftkit.data.tokens.store import Counts

        return int(Counts.of(self.train).tokens.sum())

    @property
    def num_learnt(self) -> int:
        from peftkit.data.tokens.store import Counts

        return int(Counts.of(self.train).learnt.sum())


def prepare(
    examples: Examples,
    tokenizer: Any,
    plan: DataPlan,
    *,
    task: Task = "causal-lm",
    labels: Sequence[str] = (),
    stops: frozenset[int] = frozenset(),
) -> Prepared:
    """Render, tokenize, mask and fit; kept on disk by content hash where the examples came from a recipe.

    `stops` are tokens at which generation stops. Raises UserError where no row is left to learn from.
    """
    style, source = NO_CHATS, ""
    if plan.chat_template is not None:
        tokenizer.chat_template = read_template(Path(plan.chat_template))
        source = Path(plan.chat_template).name
    without_chats = examples.format in {"text", "seq2seq"}
    if task == "causal-lm" and not without_chats:
        style = choose_style(examples.train or examples.eval, tokenizer, mask=plan.mask, source=source)
    elif needs_template(examples.train[:_LOOKED_AT]) or needs_template(examples.eval[:_LOOKED_AT]):
        default = ensure_template(tokenizer)
        style = Style("the default" if default else "the model's own", None, "the last answer is the target")
    work = Work(tokenizer, plan, task, tuple(labels), style, stops)
    if not examples.key:
        train, held, fitted = InMemory(), InMemory(), [Fitted(), Fitted()]
        watch = Watch(tokenizer, task)
        fill(examples.train, work, train, watch, fitted[0])
        fill(examples.eval, work, held, watch, fitted[1])
        made = (tuple(train.rows), tuple(held.rows), held.examples)
        return _result(examples, work, made, fitted, Seen.from_json(watch.to_json()), "")
    key = work.key(examples)
    found = cache.find("tokens", key)
    if found is None:
        with cache.going_on("tokens", key) as folder:
            meta = write(examples, work, folder)
            found = cache.publish(folder, "tokens", key, meta), meta
    from peftkit.data.tokens.store import TokenRows

    folder, meta = found
    paths = [folder / file for file in meta["files"]]
    rows, held_rows = (
        TokenRows([path for path in paths if path.name.startswith(name)]) for name in ("train", "eval")
    )
    fitted = [Fitted.from_json(value) for value in meta["fitted"]]
    sets = (rows, held_rows, held_rows.examples.tolist())
    return _result(examples, work, sets, fitted, Seen.from_json(meta["seen"]), meta["fingerprint"])


def _result(
    examples: Examples, work: Work, sets: Any, fitted: list[Fitted], seen: Seen, fingerprint: str
) -> Prepared:
    """The prepared sets. Raises UserError where one that should have rows has none."""
    train, held, numbers = sets
    refuse_long(fitted, work.plan)
    if examples.train and not train:
        raise UserError(_nothing_left(fitted[0], seen.tally, work.plan))
    if examples.eval and not held:
        got = f"held-out rows that are all longer than {work.plan.max_length} tokens"
        if not fitted[1].num_dropped:
            got = "held-out rows in which no token is learnt"
        raise UserError(Problem("data.eval", got, "rows that fit", "raise train.max_length"))
    return Prepared(
        train=train,
        eval=held,
        eval_examples=Picked(examples.eval, numbers),
        style=work.style,
        seen=seen,
        fitted=fitted[0].joined(fitted[1]),
        fingerprint=fingerprint,
    )


def _nothing_left(found: Fitted, tally: Tally, plan: DataPlan) -> list[Problem]:
    """Why no row is left to learn from."""
    masked = tally.of("masked-rows")
    if masked.count:
        fix = "see data.mask and data.truncation"
        return [Problem(where, what, "an answer to learn", fix) for where, what in masked.rows]
    return [
        Problem(
            "train.max_length",
            f"{plan.max_length}, and all {found.num_rows} rows are longer",
            f"room for rows of {found.shortest} to {found.longest} tokens",
            f"set train.max_length: {found.longest}",
        )
    ]
