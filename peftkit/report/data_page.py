"""The data report as one self-contained HTML page, made from its JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/:'\"]+/)+")  # of an absolute path, not of a URL
_STYLE = """
:root { color-scheme: light dark; --learnt: #0a7f3f; --learnt-back: #d9f5e3; --special: #0b6bcb;
  --line: #8884; --warn: #a86400; --fail: #c4202b; --waived: #7b3fb3 }
@media (prefers-color-scheme: dark) { :root { --learnt: #7ee2a4; --learnt-back: #123d25; --special: #8cc4ff;
  --warn: #f0b357; --fail: #ff8088; --waived: #cba3f5 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
pre { white-space: pre-wrap; word-break: break-word; border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem; font: 13px/1.7 ui-monospace, monospace; max-height: 30rem; overflow: auto }
pre span { border-right: 1px dotted var(--line) }
.masked { opacity: .55 } .learnt { color: var(--learnt); background: var(--learnt-back) }
.special { color: var(--special) }
.learnt-special { color: var(--learnt); background: var(--learnt-back); font-weight: 700;
  text-decoration: underline }
.pass { color: var(--learnt) } .warn { color: var(--warn) } .fail { color: var(--fail); font-weight: 700 }
.waived { color: var(--waived) } .na { opacity: .6 }
.bar { background: var(--learnt); height: .8rem; border-radius: 2px }
.rows { font-size: 13px; opacity: .8 } .fix { font-size: 14px }
td.bar-cell { width: 60% }
@media (max-width: 40rem) { body { margin: 1rem auto } td { display: block; border: 0; padding: .1rem 0 }
  tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0 } }
"""


def without_folders(text: str) -> str:
    """Return a text with files named alone: the folders of a machine are not for a page that is shared."""
    return _FOLDERS.sub("", text)


def _table(rows: list[tuple[str, ...]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{body}</table>"


def _sample_html(sample: Mapping[str, Any]) -> str:
    spans = "".join(
        f'<span class="{p["kind"].replace(" ", "-")}" title="{" ".join(map(str, p["ids"]))}">{escape(p["text"])}</span>'
        for p in sample["pieces"]
    )
    return f"<h3>{escape(sample['set'])}: {escape(without_folders(sample['where']))}</h3><pre>{spans}</pre>"


def _finding_cells(finding: Mapping[str, Any]) -> tuple[str, ...]:
    status = finding["status"]
    text = escape(without_folders(finding["said"]))
    if status not in {"pass", "n/a"}:
        named = (without_folders(f"{where}: {what}") for where, what in finding["rows"])
        rows = "".join(f"<div>{escape(row)}</div>" for row in named)
        text += f'<div class="rows">{rows}</div>'
        text += f'<div class="fix">fix: {escape(finding["fix"])}</div>' if finding["fix"] else ""
    return f'<span class="{status.replace("/", "")}">{status}</span>', escape(finding["check"]), text


def data_page(report: Mapping[str, Any], rows: list[tuple[str, str]], *, title: str) -> str:
    """Render the page of a data report, as `to_json` gives it. `rows` are its totals in words."""
    max_count = max((count for _, count in report["histogram"]), default=1)
    bars: list[tuple[str, ...]] = [
        (f"up to {upper:,}", f'<div class="bar" style="width:{100 * count / max_count:.1f}%"></div>', f"{count:,}")
        for upper, count in report["histogram"]
    ]
    totals: list[tuple[str, ...]] = [(f"<b>{escape(name)}</b>", escape(value)) for name, value in rows]
    totals += [
        (f"<b>{escape(key)}</b>", escape(without_folders(f"{value}: {reason}")))
        for key, value, reason in report["decisions"]
    ]
    legend = " ".join(
        f'<span class="{kind.replace(" ", "-")}">{kind}</span>'
        for kind in ("masked", "learnt", "special", "learnt special")
    )
    order = {"fail": 0, "warn": 1, "waived": 2, "pass": 3, "n/a": 4}
    findings = sorted(report["findings"], key=lambda finding: order[finding["status"]])
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(report['verdict'])}</p>",
        f"<h2>Checks</h2>{_table([_finding_cells(f) for f in findings])}",
        f"<p class='rows'>near duplicates: {escape(report['sampled'])}</p>",
        f"<h2>Tokens in the loss</h2><p>{legend}; hover for token ids</p>",
        *(_sample_html(sample) for sample in report["samples"]),
        f"<h2>Totals</h2>{_table(totals)}",
        f"<h2>Lengths in tokens</h2>{_table(bars)}",
    ]
    viewport = "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    head = f"<meta charset='utf-8'>{viewport}<title>{escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"
