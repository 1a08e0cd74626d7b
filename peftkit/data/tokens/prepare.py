"""From examples to tokenized training and evaluation sets on disk, with counts of every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.archs import Task
from peftkit.data.chat.spans import choose_style, read_template
from peftkit.data.chat.template import NO_CHATS, Style, ensure_chat_template
from peftkit.data.formats import Example
from peftkit.data.rows import cache
from peftkit.data.rows.examples import Examples
from peftkit.data.rows.lazy import Subset
from peftkit.data.rows.tally import Tally
from peftkit.data.tokens.encode import has_several_turns
from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.scan_tokens import TokenScanner
from peftkit.data.tokens.tokenize import MemoryWriter, TokenizeJob, write_rows, write_token_files
from peftkit.data.tokens.truncate import TruncationCounts, refuse_long_rows
from peftkit.errors import Problem, UserError
from peftkit.plan.plan import DataPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE_EXAMPLES = 512  # examples that tell whether turns have to be told apart


@dataclass(frozen=True)
class TokenScan:
    """Findings of the token checks. `ends` are (last token in the loss, count), commonest first."""

    tally: Tally
    ends: tuple[tuple[int, int], ...] = ()
    largest_id: int = 0

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TokenScan:
        """Restore the findings that a scan wrote as JSON."""
        ends = tuple((token, count) for token, count in value["ends"])
        return cls(Tally.from_json(value["tally"]), ends, value["largest_id"])


@dataclass(frozen=True)
class TokenizedData:
    """Tokenized training and held-out sets, with truncation counts. `fingerprint` hashes the sets on disk."""

    train: Sequence[Tokenized]
    eval: Sequence[Tokenized]
    eval_examples: Sequence[Example]
    style: Style
    seen: TokenScan
    truncation: TruncationCounts = field(default_factory=TruncationCounts)  # of all rows, those held out as well
    fingerprint: str = ""
    labels_per_row: int = 1  # of texts of several classes: a yes or no for each

    @property
    def uses_default_template(self) -> bool:
        """Return True where chats are rendered with peftkit's own template, for want of another."""
        return self.style.source == "the default"

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of the training set."""
        from peftkit.data.tokens.store import Counts

        return int(Counts.of(self.train).tokens.sum())

    @property
    def num_learnt(self) -> int:
        """Return the number of tokens of the training set that are in the loss; a classified text counts once."""
        from peftkit.data.tokens.store import Counts

        return int(Counts.of(self.train).learnt.sum()) // self.labels_per_row


def tokenize_examples(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    plan: DataPlan,
    *,
    task: Task = "causal-lm",
    labels: Sequence[str] = (),
    stops: frozenset[int] = frozenset(),
) -> TokenizedData:
    """Render, tokenize, mask and truncate examples; cached on disk where they came from a recipe.

    `stops` are tokens at which generation stops. Raises UserError where no row with tokens in the loss is
    left.
    """
    style, source = NO_CHATS, ""
    if plan.chat_template is not None:
        tokenizer.chat_template = read_template(Path(plan.chat_template))
        source = Path(plan.chat_template).name
    without_chats = examples.format in {"text", "seq2seq"}
    if task == "causal-lm" and not without_chats:
        style = choose_style(examples.train or examples.eval, tokenizer, mask=plan.mask, source=source)
    elif has_several_turns(examples.train[:_SAMPLE_EXAMPLES]) or has_several_turns(examples.eval[:_SAMPLE_EXAMPLES]):
        used_default = ensure_chat_template(tokenizer)
        style = Style("the default" if used_default else "the model's own", None, "the last answer is the target")
    job = TokenizeJob(tokenizer, plan, task, tuple(labels), style, stops)
    if not examples.key:
        train_writer, held_out_writer, truncation = (
            MemoryWriter(),
            MemoryWriter(),
            [TruncationCounts(), TruncationCounts()],
        )
        scanner = TokenScanner(tokenizer, task)
        write_rows(examples.train, job, train_writer, scanner, truncation[0])
        write_rows(examples.eval, job, held_out_writer, scanner, truncation[1])
        memory_sets = (tuple(train_writer.rows), tuple(held_out_writer.rows), held_out_writer.examples)
        return _build_result(examples, job, memory_sets, truncation, TokenScan.from_json(scanner.to_json()), "")
    key = job.key(examples)
    entry = cache.find_entry("tokens", key)
    if entry is None:
        with cache.resumable_entry("tokens", key) as folder:
            meta = write_token_files(examples, job, folder)
            entry = cache.publish_entry(folder, "tokens", key, meta), meta
    from peftkit.data.tokens.store import StoredTokens

    folder, meta = entry
    paths = [folder / file for file in meta["files"]]
    train_rows, held_out = (
        StoredTokens([path for path in paths if path.name.startswith(name)]) for name in ("train", "eval")
    )
    truncation = [TruncationCounts.from_json(value) for value in meta["fitted"]]
    sets = (train_rows, held_out, held_out.examples.tolist())
    return _build_result(examples, job, sets, truncation, TokenScan.from_json(meta["seen"]), meta["fingerprint"])


def _build_result(
    examples: Examples,
    job: TokenizeJob,
    sets: Any,
    truncation: list[TruncationCounts],
    scan: TokenScan,
    fingerprint: str,
) -> TokenizedData:
    """Build the tokenized data. Raises UserError where a set that should have rows has none."""
    train, held_out, eval_numbers = sets
    refuse_long_rows(truncation, job.plan)
    if examples.train and not train:
        # say why no row is left to train on
        counts = truncation[0]
        masked_rows = scan.tally.of("masked-rows")
        if masked_rows.count:
            fix = "see data.mask and data.truncation"
            nothing_left = [
                Problem(where, detail, "an answer with tokens in the loss", fix) for where, detail in masked_rows.rows
            ]
        else:
            nothing_left = [
                Problem(
                    "train.max_length",
                    f"{job.plan.max_length}, and all {counts.num_rows} rows are longer",
                    f"room for rows of {counts.shortest} to {counts.longest} tokens",
                    f"set train.max_length: {counts.longest}",
                )
            ]
        raise UserError(nothing_left)
    if examples.eval and not held_out:
        got = f"held-out rows that are all longer than {job.plan.max_length} tokens"
        if not truncation[1].num_dropped:
            got = "held-out rows without a token in the loss"
        raise UserError(Problem("data.eval", got, "rows that fit", "raise train.max_length"))
    return TokenizedData(
        train=train,
        eval=held_out,
        eval_examples=Subset(examples.eval, eval_numbers),
        style=job.style,
        seen=scan,
        truncation=truncation[0].joined(truncation[1]),
        fingerprint=fingerprint,
        labels_per_row=len(job.labels) if job.task == "multi-label" else 1,
    )
