"""Report of a merge: `merge_report.json`, and the same as a value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit.diagnose.statistics import Interval
from peftkit.ship.merge.fidelity import Fidelity
from peftkit.units import html_table, show_bytes

REPORT_FILE = "merge_report.json"


@dataclass(frozen=True)
class BaseComparison:
    """A base that a QLoRA adapter was merged into, with the fidelity and loss of the result."""

    base: str
    fidelity: Fidelity


@dataclass(frozen=True)
class MergeReport:
    """Outcome of a merge. `fidelity` is None where several adapters have no reference to be compared with.

    `choices` were all compared; `recommended` is the better one by `gain` (nats per loss token of the other's
    loss over its), or the faithful one where the difference is within the noise.
    """

    out: str
    base: str
    base_id: str
    adapters: tuple[tuple[str, float], ...]
    how: str
    dtype: str
    num_tensors: int
    num_bytes: int
    untied: bool
    ignored: tuple[str, ...]
    fidelity: Fidelity | None
    reference: str
    problem: str
    choices: tuple[BaseComparison, ...] = ()
    recommended: str = ""
    gain: Interval | None = None
    requantized: str = ""
    write_seconds: float = 0.0
    doubts: tuple[str, ...] = ()  # what no comparison with the adapter can show

    @property
    def passed(self) -> bool:
        return not self.problem

    def to_json(self) -> dict[str, Any]:
        """Return the content of `merge_report.json`, with the numbers of `fidelity` repeated at the top."""
        content = asdict(self)
        content.pop("out")
        content["gain"] = self.gain.json_values if self.gain else None
        verdict = {} if self.requantized and self.passed else {"passed": self.passed}  # another model, wanted so
        if self.fidelity is None:
            flat = {}
        else:
            fidelity = self.fidelity
            flat = {
                "kl": fidelity.kl,
                "max_abs_difference": fidelity.max_abs_difference,
                "top1_agreement": fidelity.top1_agreement,
                "loss_adapter": fidelity.loss_reference,
                "loss_merged": fidelity.loss,
                "num_prompts": fidelity.num_prompts,
                "num_tokens": fidelity.num_positions,
            }
        return {**content, **flat, **verdict}

    def rows(self) -> list[tuple[str, str]]:
        """Return (label, value) rows for a table."""
        adapters = ", ".join(f"{name}" + (f" x {weight:g}" if weight != 1 else "") for name, weight in self.adapters)
        found = [
            ("merged", f"{adapters} into {self.base_id}"),
            *([("base", _BASE_NOTES[self.base])] if self.base else []),
            ("written", f"{self.num_tensors} tensors, {show_bytes(self.num_bytes)}, {self.dtype}"),
        ]
        if self.how not in {"", "sum"}:
            found.append(("combined", self.how))
        if self.requantized:
            found.append(("requantized", f"{self.requantized}: not the weights that were evaluated"))
        if self.untied:
            found.append(("embeddings", "untied: the adapter changed only one of the tied embeddings"))
        if self.ignored:
            found.append(("ignored", f"{', '.join(self.ignored)}: keys of the adapter that this PEFT does not know"))
        found += [("to check", doubt) for doubt in self.doubts]
        if self.fidelity is not None:
            where = f"{self.fidelity.num_positions} positions of {self.fidelity.num_prompts} texts"
            effect = "" if self.fidelity.effect is None else f"; the adapter itself: {self.fidelity.effect:.4g}"
            fidelity_rows = [
                ("compared with", f"{self.reference}, on {where}, read back from the disk"),
                (
                    "KL divergence",
                    f"{self.fidelity.kl:.3g} nats on average, {self.fidelity.kl_most:.3g} at most{effect}",
                ),
                ("largest difference", f"{self.fidelity.max_abs_difference:.3g} in a logit"),
                ("same top token", f"{self.fidelity.top1_agreement:.2%}"),
            ]
            if self.fidelity.loss is not None:
                fidelity_rows.append(
                    (
                        "loss",
                        f"{_loss_text(self.fidelity.loss_reference)} with the adapter, "
                        f"{_loss_text(self.fidelity.loss)} merged",
                    )
                )
            found += fidelity_rows
        found.append(("verdict", "the same model" if self.passed else self.problem))
        if self.passed and self.fidelity is not None and self.fidelity.effect == 0:
            found[-1] = ("verdict", "the same model, and its base too: the adapter changes nothing")
        if self.requantized and self.passed:
            found[-1] = ("verdict", "in 4-bit again: not the evaluated model, but within tolerance")
        if self.fidelity is None and self.passed:
            found[-1] = ("verdict", "a new model: there is no reference to compare it with")
        return found

    def choice_rows(self) -> list[tuple[str, ...]]:
        """Return the compared bases side by side, with a header row."""
        if not self.choices:
            return []
        head = ("base", "KL to the trained model", "same top token", "loss")
        body = [
            (
                choice.base + (" (recommended)" if choice.base == self.recommended else ""),
                f"{choice.fidelity.kl:.4g}",
                f"{choice.fidelity.top1_agreement:.1%}",
                _loss_text(choice.fidelity.loss),
            )
            for choice in self.choices
        ]
        trained_loss = self.choices[0].fidelity.loss_reference
        return [head, ("as trained, in 4-bit", "0", "100.0%", _loss_text(trained_loss)), *body]

    def _repr_html_(self) -> str:
        return html_table([*self.rows(), *self.choice_rows()])


_BASE_NOTES = {
    "dequantized": "dequantized: the 4-bit weights used in training and evaluation",
    "original": "original: the weights before any quantization",
}


def _loss_text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def read_merge_report(folder: Path) -> Mapping[str, Any] | None:
    """Return the merge report of a folder; None where it has none."""
    file = folder / REPORT_FILE
    if not file.is_file():
        return None
    report = json.loads(file.read_text(encoding="utf-8"))
    return report if isinstance(report, Mapping) else None
