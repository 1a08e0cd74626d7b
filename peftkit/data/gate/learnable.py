"""Whether what is to be learnt can be: ends, padding, truncation, vocabulary, and enough of it."""

from __future__ import annotations

import re

from peftkit.data.chat.template import template_of
from peftkit.data.gate.finding import Data, Finding, Status, of_pairs, of_rows, share
from peftkit.data.tokens.store import Counts
from peftkit.plan.packing import num_rows
from peftkit.units import show_count

_DROPPED, _LOST = 0.2, 0.01
_FEW_ROWS = 50
_MANY_EPOCHS = 10
_TOKENS_PER_PARAMETER = 0.001
_MARKER = re.compile(r"<\|[a-z0-9_▁]{2,30}\|>|<(?:start|end)_of_turn>")


def _token(data: Data, token: int) -> str:
    return str(data.tokenizer.convert_ids_to_tokens(token))


def end_agreement(data: Data) -> Finding:
    """Whether generation stops at the token with which answers are learnt to end."""
    special = data.tokenizer.added_tokens_decoder
    ends = [token for token, _ in data.prepared.seen.ends if token in special]
    if not ends:
        return Finding("end-agreement", "pass", "no end tokens to compare")
    other = [_token(data, token) for token in ends if token not in data.stops]
    stops = ", ".join(_token(data, token) for token in sorted(data.stops))
    if other:
        said = f"answers are learnt to end in {', '.join(other)}, but generation stops at {stops}"
        fix = f"tell what serves the model to stop at {other[0]} as well (eos_token_id)"
        return Finding("end-agreement", "warn", said, fix=fix)
    return Finding("end-agreement", "pass", f"answers end where generation stops: {stops}")


def pad_token(data: Data) -> Finding:
    """Whether a padding token that is the end token as well hides ends from the loss."""
    tokenizer = data.tokenizer
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad != eos:
        return Finding("pad-token", "pass", f"padding is {tokenizer.pad_token}, which ends nothing")
    learnt = dict(data.prepared.seen.ends).get(eos, 0)
    said = f"padding is the end token {tokenizer.eos_token}; labels are masked by position, and it is learnt "
    return Finding("pad-token", "pass", said + f"as the end of {learnt:,} rows")


def rows_dropped(data: Data) -> Finding:
    """Rows that were left out: too long, or unusable and waived."""
    fitted, left = data.prepared.fitted, data.examples.tally.of("left-out")
    dropped = fitted.num_dropped + left.count
    if not dropped:
        cut = f"; {fitted.num_split:,} long ones were split" if fitted.num_split else ""
        return Finding("rows-dropped", "pass", f"every row is used{cut}")
    whole = fitted.num_rows + left.count
    rows = [(where, f"{length:,} tokens") for where, length in fitted.too_long] + list(left.rows)
    said = (
        f"rows that are left out: {share(dropped, whole)}, longer than {data.plan.data.max_length:,} tokens"
    )
    if left.count:
        said = f"rows that are left out: {share(dropped, whole)}, {left.count:,} of them unusable"
    status: Status = "fail" if dropped >= _DROPPED * whole else "warn"
    fix = f"raise train.max_length (the longest has {fitted.longest:,}), or set data.truncation: split"
    if not fitted.num_dropped:
        fix = "mend the rows: their checks say what is wrong with them"
    found = of_pairs("rows-dropped", status, rows, said, fix)
    return Finding(found.check, found.status, found.said, dropped, found.rows, found.fix)


def cut_answers(data: Data) -> Finding:
    """Answers of which max_length cut something away."""
    fitted = data.prepared.fitted
    if not fitted.num_cut:
        return Finding("cut-answers", "pass", "no row is cut")
    rows = [(where, f"{length:,} tokens") for where, length in fitted.too_long]
    said = f"rows that are cut at the front: {share(fitted.num_cut, fitted.num_rows)}"
    said += f"; learnt tokens that are lost: {share(fitted.num_learnt_lost, fitted.num_learnt)}"
    status: Status = "fail" if fitted.num_learnt_lost >= _LOST * max(1, fitted.num_learnt) else "warn"
    fix = f"raise train.max_length to {fitted.longest:,}, or set data.truncation: drop"
    found = of_pairs("cut-answers", status, rows, said, fix)
    return Finding(found.check, found.status, found.said, fitted.num_cut, found.rows, found.fix)


def round_trip(data: Data) -> Finding:
    """Whether tokens give back the text, and the template's markers are tokens of this tokenizer."""
    noticed = data.tally.of("round-trip")
    if noticed.count:
        fix = "the tokenizer changes the text: is it this base's own?"
        said = f"rows whose tokens do not give back their text: {noticed.count:,} of those looked at"
        return of_rows("round-trip", "fail", noticed, said, fix)
    if data.prepared.style.source == "none":
        return Finding("round-trip", "pass", "tokens give back the text")
    markers = sorted(set(_MARKER.findall(template_of(data.tokenizer))))
    broken = [m for m in markers if len(data.tokenizer(m, add_special_tokens=False)["input_ids"]) > 1]
    if broken:
        said = f"markers of the template that are several tokens here: {', '.join(broken[:6])}"
        return Finding("round-trip", "warn", said, fix="use the template that belongs to this tokenizer")
    return Finding("round-trip", "pass", "tokens give back the text, and the template's markers are tokens")


def vocabulary(data: Data) -> Finding:
    """Token ids beyond the embedding: the run would stop, or on a GPU read other memory."""
    largest = data.prepared.seen.largest_id
    num_embeddings = data.facts.model.shape.dims.vocab
    if largest < num_embeddings:
        return Finding("vocabulary", "pass", "every token has its embedding")
    said = f"the token {largest} ({_token(data, largest)}) in a model with {num_embeddings:,} embeddings"
    return Finding("vocabulary", "fail", said, fix="use the tokenizer that belongs to this base")


def enough_data(data: Data) -> Finding:
    """Tokens for each trained parameter, and how often each row is seen."""
    rows, plan = len(data.prepared.train), data.plan
    counts = Counts.of(data.prepared.train)
    learnt, trained = int(counts.learnt.sum()), plan.method.num_trainable or 0
    drawn = num_rows(plan, data.facts) or rows  # rows or packs
    epochs = (plan.train.num_steps or 0) * plan.train.batch_size / max(1, drawn)
    said = f"{rows:,} rows, {show_count(learnt)} learnt tokens for {show_count(trained)} trained parameters"
    if epochs:
        said += f", each seen {epochs:.2g} times"
    problems = []
    if rows < _FEW_ROWS:
        problems.append("few rows: it will memorise them")
    if epochs > _MANY_EPOCHS:
        problems.append("seen too often: fewer epochs")
    if trained and learnt * max(1.0, epochs) < _TOKENS_PER_PARAMETER * trained:
        problems.append("few tokens for so many parameters: a smaller rank")
    return Finding("enough-data", "warn" if problems else "pass", said, fix="; ".join(problems))


CHECKS = {
    "end-agreement": end_agreement,
    "pad-token": pad_token,
    "rows-dropped": rows_dropped,
    "cut-answers": cut_answers,
    "round-trip": round_trip,
    "vocabulary": vocabulary,
    "enough-data": enough_data,
}
