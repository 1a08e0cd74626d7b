"""The picture of the README: loss of a run's steps and evaluations, and its memory, as one SVG.

python benchmarks/plot_run.py runs/quickstart docs/quickstart.svg
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from peftkit.report import read_summary
from peftkit.rundir import RunDir
from peftkit.rundir.events import EvalEvent, StepEvent, of_type
from peftkit.units import show_bytes, show_seconds

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 300, 56, 210, 44, 40
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #57606a } .title { font-weight: 600; fill: #24292f }
.grid { stroke: #d0d7de; stroke-width: 1 } .loss { fill: none; stroke: #0969da; stroke-width: 2 }
.eval { fill: #bc4c00 } .key { fill: #0969da }
@media (prefers-color-scheme: dark) { text { fill: #8b949e } .title { fill: #e6edf3 } .grid { stroke: #30363d }
.loss { stroke: #58a6ff } .key { fill: #58a6ff } .eval { fill: #ffa657 } }
"""


def main() -> int:
    run = RunDir.open(Path(sys.argv[1]))
    events, summary = run.events(), read_summary(run)
    steps, evals = of_type(events, StepEvent), of_type(events, EvalEvent)
    losses = [event.loss for event in [*steps, *evals]]
    low, high = math.log10(min(losses)), math.log10(max(losses))
    low, high = math.floor(low), math.ceil(high)

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / steps[-1].step

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(loss)) / (high - low)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    title = f"{summary.base.removeprefix('embedded:')}, {summary.method}, {len(steps)} steps on {summary.device}"
    parts.append(f"<title>{title}</title><style>{STYLE}</style><text class='title' x='{LEFT}' y='22'>{title}</text>")
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{at:.1f}' y2='{at:.1f}'/>")
        parts.append(f"<text x='{LEFT - 8}' y='{at + 4:.1f}' text-anchor='end'>{10.0**power:g}</text>")
    for step in (1, *range(20, steps[-1].step + 1, 20)):
        parts.append(f"<text x='{x(step):.1f}' y='{HEIGHT - 16}' text-anchor='middle'>{step}</text>")
    points = " ".join(f"{x(event.step):.1f},{y(event.loss):.1f}" for event in steps)
    parts.append(f"<polyline class='loss' points='{points}'/>")
    for event in evals:
        parts.append(f"<circle class='eval' cx='{x(event.step):.1f}' cy='{y(event.loss):.1f}' r='5'/>")
    share = 100 * summary.num_trainable / summary.num_total
    facts = [
        ("training loss, nats per token", "key"),
        (f"held-out loss {evals[0].loss:.1f} to {evals[-1].loss:.3f}", "eval"),
        (f"{summary.metric} {summary.metric_before:.2f} to {summary.metric_after:.2f}", ""),
        (f"on {summary.num_metric_examples} held-out rows", ""),
        (f"{summary.num_trainable:,} trained", ""),
        (f"({share:.1f} % of all parameters)", ""),
        (f"peak {show_bytes(max(summary.peak_bytes.values()))}", ""),
        (f"{show_seconds(summary.total_seconds)} in all", ""),
    ]
    for number, (text, kind) in enumerate(facts):
        parts.append(f"<text class='{kind}' x='{WIDTH - RIGHT + 16}' y='{TOP + 16 + 24 * number}'>{text}</text>")
    Path(sys.argv[2]).write_text("\n".join([*parts, "</svg>\n"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
