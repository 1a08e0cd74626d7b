"""What a merge was and how true it is: `merge_report.json`, and the same as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit.diagnose.statistics import Interval
from peftkit.ship.merge.fidelity import Fidelity
from peftkit.units import html_table, show_bytes

REPORT = "merge_report.json"


@dataclass(frozen=True)
class Choice:
    """A base to merge a QLoRA adapter into, tried: its distance from what was trained, and its loss."""

    base: str
    fidelity: Fidelity


@dataclass(frozen=True)
class MergeReport:
    """The outcome of a merge. `fidelity` is None where nothing computes what several adapters should give.

    `choices` were all tried; `recommended` is the better one by `gain` (nats per learnt token of the other
    one's loss over its), or the faithful one where the difference is within the noise.
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
    fidelity: Fidelity | None
    reference: str
    problem: str
    choices: tuple[Choice, ...] = ()
    recommended: str = ""
    gain: Interval | None = None
    requantized: str = ""
    write_seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problem

    def to_json(self) -> dict[str, Any]:
        """For `merge_report.json`: the numbers of `fidelity` stand at the top as well."""
        found = asdict(self)
        found.pop("out")
        found["gain"] = self.gain.plain if self.gain else None
        verdict = (
            {} if self.requantized and self.passed else {"passed": self.passed}
        )  # another model, wanted so
        return {**found, **self._flat(), **verdict}

    def _flat(self) -> dict[str, Any]:
        if self.fidelity is None:
            return {}
        f = self.fidelity
        return {
            "kl": f.kl,
            "max_abs_difference": f.max_abs_difference,
            "top1_agreement": f.top1_agreement,
            "loss_adapter": f.loss_reference,
            "loss_merged": f.loss,
            "num_prompts": f.num_prompts,
            "num_tokens": f.num_positions,
        }

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""
        adapters = ", ".join(f"{name}" + (f" x {w:g}" if w != 1 else "") for name, w in self.adapters)
        found = [
            ("merged", f"{adapters} into {self.base_id}"),
            *([("base", _BASES[self.base])] if self.base else []),
            ("written", f"{self.num_tensors} tensors, {show_bytes(self.num_bytes)}, {self.dtype}"),
        ]
        if self.how not in {"", "sum"}:
            found.append(("combined", self.how))
        if self.requantized:
            found.append(("requantized", f"{self.requantized}: other weights than those that were evaluated"))
        if self.untied:
            found.append(("tables", "untied: the adapter changed one end of a tied pair"))
        if self.fidelity is not None:
            found += _of_fidelity(self.fidelity, self.reference)
        found.append(("verdict", "the same model" if self.passed else self.problem))
        if self.requantized and self.passed:
            found[-1] = (
                "verdict",
                "in 4 bits again: not the model that was evaluated, and near enough to be kept",
            )
        if self.fidelity is None and self.passed:
            found[-1] = ("verdict", "a new model: no adapter alone says what it should answer")
        return found

    def choice_rows(self) -> list[tuple[str, ...]]:
        """The bases that were tried, side by side."""
        if not self.choices:
            return []
        head = ("base", "KL to what was trained", "same top token", "loss")
        body = [
            (
                choice.base + (" (recommended)" if choice.base == self.recommended else ""),
                f"{choice.fidelity.kl:.4g}",
                f"{choice.fidelity.top1_agreement:.1%}",
                _loss(choice.fidelity.loss),
            )
            for choice in self.choices
        ]
        trained = self.choices[0].fidelity.loss_reference
        return [head, ("as trained, in 4-bit", "0", "100.0%", _loss(trained)), *body]

    def _repr_html_(self) -> str:
        return html_table([*self.rows(), *self.choice_rows()])


_BASES = {
    "dequantized": "dequantized: the 4-bit weights that it was trained and evaluated on",
    "original": "original: the weights before any quantization",
}


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _of_fidelity(f: Fidelity, reference: str) -> list[tuple[str, str]]:
    where = f"{f.num_positions} positions of {f.num_prompts} texts"
    effect = "" if f.effect is None else f"; the adapter itself: {f.effect:.4g}"
    found = [
        ("compared with", f"{reference}, on {where}, read back from the disk"),
        ("KL divergence", f"{f.kl:.3g} nats in the mean, {f.kl_most:.3g} at most{effect}"),
        ("largest difference", f"{f.max_abs_difference:.3g} in a logit"),
        ("same top token", f"{f.top1_agreement:.2%}"),
    ]
    if f.loss is not None:
        found.append(("loss", f"{_loss(f.loss_reference)} with the adapter, {_loss(f.loss)} merged"))
    return found


def read_report(folder: Path) -> Mapping[str, Any] | None:
    """What a merged folder says of itself; None where it says nothing."""
    import json

    file = folder / REPORT
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, Mapping) else None
