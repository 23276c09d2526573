"""The report as one HTML page: plots, then every stage. It holds no link, no script and no file but itself."""

from collections.abc import Callable, Sequence
from html import escape

from moe_parity.pages import plots
from moe_parity.report import Report
from moe_parity.stages import StageResult

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5c6670; --line: #d9dee3; --paper: #ffffff; --card: #f6f8fa;
  --same: #2f7d6d; --flip: #b7791f; --wrong: #c53030; --allowed: #6b46c1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #39424c; --paper: #14181d; --card: #1c2229;
  --same: #4fb3a0; --flip: #e0a83c; --wrong: #f56565; --allowed: #a78bfa; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 4px; }
p { margin: 4px 0 12px; } .about, .note { color: var(--soft); }
.verdict { border-left: 4px solid var(--same); background: var(--card); padding: 12px 16px; margin: 20px 0;
  overflow-wrap: anywhere; }
.verdict.wrong { border-color: var(--wrong); } .verdict.flip { border-color: var(--flip); }
svg { width: 100%; height: auto; display: block; } svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; } .layer { stroke: var(--line); stroke-dasharray: 2 3; }
.way { fill: none; stroke: var(--soft); stroke-width: 1; opacity: .6; }
.allowed { fill: none; stroke: var(--allowed); stroke-width: 1.5; stroke-dasharray: 5 3; }
circle.same, rect.same { fill: var(--same); } circle.flip, rect.flip { fill: var(--flip); }
circle.wrong, rect.wrong { fill: var(--wrong); } circle.closest { fill: var(--same); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin: 0 5px 0 14px; }
.keys { display: block; white-space: nowrap; margin-left: -14px; }
.key.line { width: 18px; height: 0; border-radius: 0; border-top: 2px dashed var(--allowed); vertical-align: middle; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } td.where { color: var(--soft); white-space: normal; }
tr.wrong td.verdict-word { color: var(--wrong); font-weight: 600; }
tr.flip td.verdict-word { color: var(--flip); font-weight: 600; }
"""


def page(reports: Sequence[Report]) -> str:
    """The whole page, of one comparison or several."""
    title = f"{reports[0].subject}: jax_moe against {reports[0].reference}"
    body = "".join(_section(report) for report in reports)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def _section(report: Report) -> str:
    shape = " x ".join(map(str, report.shape))
    replay = "our side follows their choices" if report.replay else "each side follows its own choices"
    style = "wrong" if not report.passed else "flip" if report.flips else "same"
    parts = [
        f'<p class="about">{escape(report.dtype)}, batch {shape}, {len(report.results)} stages, {replay}</p>',
        f'<p class="verdict {style}">{escape(report.sentence())}</p>',
    ]
    sections: list[tuple[str, str, bool, Callable[[Sequence[StageResult]], str]]] = [
        ("Error by stage", "Largest difference over the largest value, as computed; what is equal stands on the axis. "
         + _key("allowed"),
         True, plots.journey),
        ("Error by layer", "How much of its tolerance each stage uses: pale is a ten-thousandth and less, full is all. " + _key(),
         any(one.layer is not None for one in report.results), plots.stage_map),
        ("Expert agreement", "Choices that are the same on both sides.",
         any(one.agreement is not None for one in report.results), plots.agreement),
        ("Margins", "How far apart the two closest competing scores are; below the line rounding may swap them. " + _key("noise"),
         any(one.closest is not None for one in report.results), plots.margins),
        ("Gradients", "The largest errors, by norm. " + _key("allowed"),
         any(one.kind == "gradient" for one in report.results), plots.gradients),
    ]
    parts += [f'<h2>{name}</h2><p class="note">{note}</p>{draw(report.results)}' for name, note, there, draw in sections if there]
    return "".join(parts) + f"<h2>Every stage</h2>{_table(report.results)}"


def _key(line: str = "") -> str:
    """What the colours mean."""
    words = (("same", "within"), ("flip", "flip at a near tie"), ("wrong", "wrong number"))
    dots = "".join(f'<span class="key" style="background:var(--{style})"></span>{word}' for style, word in words)
    dots += f'<span class="key line"></span>{line}' if line else ""
    return f'<span class="keys">{dots}</span>'


def _table(results: Sequence[StageResult]) -> str:
    rows = []
    for one in results:
        style = {"same": "same", "wrong number": "wrong"}.get(one.verdict, "flip")
        rows.append(
            f'<tr class="{style}"><td>{escape(one.name)}</td><td class="number">{one.error:.2e}</td>'
            f'<td class="number">{one.tolerance:.0e}</td><td class="verdict-word">{one.verdict}</td>'
            f'<td class="where">{escape(one.where)}</td></tr>'
        )
    head = "<tr><th>stage</th><th>error</th><th>allowed</th><th>verdict</th><th>worst entry</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
