"""The table of all checks by name, and the function that runs them. A new check is a row of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peftkit.data.gate import balance, counted, duplicates, learnable
from peftkit.data.gate.finding import CheckInputs, DataFinding

# in the order in which they are told: rows, then what they say, then tokens
CHECKS: Mapping[str, Callable[[CheckInputs], DataFinding]] = {
    **counted.checks(),
    **duplicates.CHECKS,
    **balance.CHECKS,
    **learnable.CHECKS,
}


def run_checks(data: CheckInputs, waived: Sequence[str]) -> tuple[DataFinding, ...]:
    """Run every check and return the findings; a failed check that is in `waived` gets the status waived."""
    findings = [check(data) for check in CHECKS.values()]
    return tuple(
        DataFinding(f.check, "waived", f.said, f.num_rows, f.rows, f.fix)
        if f.status == "fail" and f.check in waived
        else f
        for f in findings
    )
