"""All checks by name, and what they say together. A new check is a row of one of the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peftkit.data.gate import balance
from peftkit.data.gate import counted as noticed
from peftkit.data.gate import duplicates as alike
from peftkit.data.gate import learnable as learning
from peftkit.data.gate.finding import Data, Finding

# in the order in which they are told: rows, then what they say, then tokens
CHECKS: Mapping[str, Callable[[Data], Finding]] = {
    **noticed.checks(),
    **alike.CHECKS,
    **balance.CHECKS,
    **learning.CHECKS,
}


def judge(data: Data, waived: Sequence[str]) -> tuple[Finding, ...]:
    """What every check says. One that fails and is waived says so."""
    found = [check(data) for check in CHECKS.values()]
    return tuple(
        Finding(f.check, "waived", f.said, f.num_rows, f.rows, f.fix)
        if f.status == "fail" and f.check in waived
        else f
        for f in found
    )
