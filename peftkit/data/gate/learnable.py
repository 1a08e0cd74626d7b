"""Checks that the data can be learned from: end tokens, padding, truncation, vocabulary and amount."""

from __future__ import annotations

import re

from peftkit.data.chat.template import select_template
from peftkit.data.gate.finding import (
    CheckInputs,
    DataFinding,
    Status,
    finding_from_counts,
    finding_from_rows,
    show_share,
)
from peftkit.data.tokens.store import Counts
from peftkit.plan.packing import MAX_EPOCHS, num_epochs
from peftkit.units import join_names, show_count

_MAX_DROPPED, _MAX_LOST = 0.2, 0.01
_MIN_ROWS = 50
_MIN_TOKENS_PER_PARAMETER = 0.001
_MARKER = re.compile(r"<\|[a-z0-9_▁]{2,30}\|>|<(?:start|end)_of_turn>")


def _token_text(data: CheckInputs, token: int) -> str:
    return str(data.tokenizer.convert_ids_to_tokens(token))


def end_agreement(data: CheckInputs) -> DataFinding:
    """Warn if answers are trained to end in a token at which generation does not stop."""
    special = data.tokenizer.added_tokens_decoder
    ends = [token for token, _ in data.prepared.seen.ends if token in special]
    if not ends:
        return DataFinding("end-agreement", "n/a", "no end tokens to compare")
    non_stops = [_token_text(data, token) for token in ends if token not in data.stops]
    stops = ", ".join(_token_text(data, token) for token in sorted(data.stops))
    if non_stops:
        message = f"answers are trained to end in {', '.join(non_stops)}, but generation stops at {stops}"
        fix = f"configure the inference server to stop at {non_stops[0]} as well (eos_token_id)"
        return DataFinding("end-agreement", "warn", message, fix=fix)
    return DataFinding("end-agreement", "pass", f"answers end where generation stops: {stops}")


def pad_token(data: CheckInputs) -> DataFinding:
    """Report a padding token that equals the end token: padding is masked by position, ends stay in the loss."""
    tokenizer = data.tokenizer
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad != eos:
        return DataFinding("pad-token", "pass", f"padding is {tokenizer.pad_token}, which is not the end token")
    num_ends = dict(data.prepared.seen.ends).get(eos, 0)
    message = f"padding is the end token {tokenizer.eos_token}; labels are masked by position, and it is trained "
    return DataFinding("pad-token", "pass", message + f"as the end of {num_ends:,} rows")


def rows_dropped(data: CheckInputs) -> DataFinding:
    """Count rows that are left out because they are too long, or unusable and waived."""
    fitted, unusable = data.prepared.truncation, data.examples.tally.of("left-out")
    dropped = fitted.num_dropped + unusable.count
    if not dropped:
        split_note = f"; {fitted.num_split:,} long ones were split" if fitted.num_split else ""
        return DataFinding("rows-dropped", "pass", f"every row is used{split_note}")
    total = fitted.num_rows + unusable.count
    rows = [(where, f"{length:,} tokens") for where, length in fitted.too_long] + list(unusable.rows)
    message = f"rows that are left out: {show_share(dropped, total)}, longer than {data.plan.data.max_length:,} tokens"
    if unusable.count:
        message = f"rows that are left out: {show_share(dropped, total)}, {unusable.count:,} of them unusable"
    status: Status = "fail" if dropped >= _MAX_DROPPED * total else "warn"
    fix = f"raise train.max_length (the longest has {fitted.longest:,}), or set data.truncation: split"
    if not fitted.num_dropped:
        fix = "fix the rows: their checks say what is wrong with them"
    finding = finding_from_rows("rows-dropped", status, rows, message, fix)
    return DataFinding(finding.check, finding.status, finding.said, dropped, finding.rows, finding.fix)


def cut_answers(data: CheckInputs) -> DataFinding:
    """Count the answers that max_length truncates."""
    fitted = data.prepared.truncation
    if not fitted.num_cut:
        return DataFinding("cut-answers", "pass", "no row is cut")
    rows = [(where, f"{length:,} tokens") for where, length in fitted.too_long]
    message = f"rows that are truncated at the front: {show_share(fitted.num_cut, fitted.num_rows)}"
    message += f"; tokens in the loss that are cut off: {show_share(fitted.num_learnt_lost, fitted.num_learnt)}"
    status: Status = "fail" if fitted.num_learnt_lost >= _MAX_LOST * max(1, fitted.num_learnt) else "warn"
    fix = f"raise train.max_length to {fitted.longest:,}, or set data.truncation: drop"
    finding = finding_from_rows("cut-answers", status, rows, message, fix)
    return DataFinding(finding.check, finding.status, finding.said, fitted.num_cut, finding.rows, finding.fix)


def round_trip(data: CheckInputs) -> DataFinding:
    """Check that tokens decode to the text, and that the template's markers are single tokens."""
    counted = data.tally.of("round-trip")
    if counted.count:
        fix = "the tokenizer changes the text: is it this base's own?"
        message = f"rows whose tokens do not give back their text: {counted.count:,} of those looked at"
        return finding_from_counts("round-trip", "fail", counted, message, fix)
    if data.prepared.style.source == "none":
        return DataFinding("round-trip", "pass", "tokens give back the text")
    markers = sorted(set(_MARKER.findall(select_template(data.tokenizer))))
    split_markers = [m for m in markers if len(data.tokenizer(m, add_special_tokens=False)["input_ids"]) > 1]
    if split_markers:
        message = f"markers of the template that are several tokens here: {', '.join(split_markers[:6])}"
        return DataFinding("round-trip", "warn", message, fix="use the template that belongs to this tokenizer")
    return DataFinding("round-trip", "pass", "tokens give back the text, and the template's markers are tokens")


def vocabulary(data: CheckInputs) -> DataFinding:
    """Find token ids beyond the embedding: the run would stop, or on a GPU read other memory."""
    largest = data.prepared.seen.largest_id
    added = [int(data.tokenizer.convert_tokens_to_ids(token)) for token in data.plan.base.new_tokens]
    num_embeddings = max([data.facts.model.shape.dims.vocab, *(i + 1 for i in added)])  # new tokens get theirs
    if largest < num_embeddings:
        return DataFinding("vocabulary", "pass", "every token has its embedding")
    message = f"the token {largest} ({_token_text(data, largest)}) in a model with {num_embeddings:,} embeddings"
    return DataFinding("vocabulary", "fail", message, fix="use the tokenizer that belongs to this base")


def enough_data(data: CheckInputs) -> DataFinding:
    """Compare the tokens in the loss with the trained parameters, and count how often each row is seen."""
    num_train, plan = len(data.prepared.train), data.plan
    counts = Counts.of(data.prepared.train)
    loss_tokens, num_trainable = int(counts.learnt.sum()), plan.method.num_trainable or 0
    epochs = num_epochs(plan, data.facts)
    message = (
        f"{num_train:,} rows, {show_count(loss_tokens)} tokens in the loss for "
        f"{show_count(num_trainable)} trained parameters"
    )
    if epochs:
        message += f", each seen {epochs:.2g} times"
    problems = []
    if num_train < _MIN_ROWS:
        problems.append("few rows: the model will memorise them")
    if epochs > MAX_EPOCHS:
        problems.append("rows are seen too often: fewer epochs")
    if num_trainable and loss_tokens * max(1.0, epochs) < _MIN_TOKENS_PER_PARAMETER * num_trainable:
        problems.append("few tokens for so many parameters: a smaller rank")
    return DataFinding("enough-data", "warn" if problems else "pass", message, fix="; ".join(problems))


def unused_columns(data: CheckInputs) -> DataFinding:
    """Name the columns and keys that are not read, and warn where they look like what training needs."""
    unused = data.examples.unused
    if not unused:
        return DataFinding("unused-columns", "pass", "every column is read")
    names = join_names(list(unused))
    suspects = [(name, f"looks like {looks}, in {num:,} rows") for name, (num, looks) in unused.items() if looks]
    message = f"columns that are not read: {names}"
    if not suspects:
        return DataFinding("unused-columns", "pass", message)
    fix = "map them (data.columns), use the format that reads them (docs/data.md), or remove them"
    return finding_from_rows("unused-columns", "warn", suspects, message, fix)


CHECKS = {
    "unused-columns": unused_columns,
    "end-agreement": end_agreement,
    "pad-token": pad_token,
    "rows-dropped": rows_dropped,
    "cut-answers": cut_answers,
    "round-trip": round_trip,
    "vocabulary": vocabulary,
    "enough-data": enough_data,
}
