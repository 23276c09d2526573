"""The report as one HTML page: plots, then every stage. The page loads nothing and runs nothing."""

from collections.abc import Callable, Sequence
from html import escape

from moe_parity.pages import plots
from moe_parity.pages.style import document
from moe_parity.report import Report
from moe_parity.stages import StageResult

STYLE = """
.verdict { border-left: 4px solid var(--same); background: var(--card); padding: 12px 16px; margin: 20px 0;
  overflow-wrap: anywhere; }
.verdict.wrong { border-color: var(--wrong); } .verdict.flip { border-color: var(--flip); }
svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif !important; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin: 0 5px 0 14px; }
.keys { display: block; white-space: nowrap; margin-left: -14px; }
.key.line { width: 18px; height: 0; border-radius: 0; border-top: 2px dashed var(--allowed); vertical-align: middle; }
td.where { color: var(--soft); white-space: normal; }
tr.wrong td.verdict-word { color: var(--wrong); font-weight: 600; }
tr.flip td.verdict-word { color: var(--flip); font-weight: 600; }
"""

# Title, note, meaning of the dashed line, which stages are shown, how they are drawn.
SECTIONS: list[tuple[str, str, str, Callable[[StageResult], bool], plots.Draw]] = [
    ("Error by stage",
     "Largest difference divided by the largest value, in the order of computation. An error of 0 lies on the axis.",
     "tolerance", lambda stage: stage.kind != "gradient" and stage.tolerance > 0, plots.errors),
    ("Error by layer",
     "The share of its tolerance that each stage uses: pale is a ten-thousandth or less, full colour is all of it.",
     "", lambda stage: stage.layer is not None and stage.tolerance > 0, plots.stage_map),
    ("Expert agreement", "The share of choices that are equal on both sides.",
     "", lambda stage: stage.agreement is not None, plots.agreement),
    ("Margins",
     "The difference of the two closest competing scores; rounding may exchange scores below the dashed line.",
     "what rounding explains", lambda stage: stage.closest is not None, plots.margins),
    ("Gradients", "The largest errors, by norm.", "tolerance", lambda stage: stage.kind == "gradient", plots.gradients),
]


def page(reports: Sequence[Report]) -> str:
    """The whole page, for one or more comparisons."""
    title = f"{reports[0].subject}: jax_moe against {reports[0].reference}"
    body = "".join(_section(report) for report in reports)
    return document(title, body, STYLE)


def _section(report: Report) -> str:
    shape = " x ".join(map(str, report.shape))
    replay = "JAX follows the choices of the other side" if report.replay else "each side follows its own choices"
    style = "wrong" if not report.passed else "flip" if report.flips else "same"
    parts = [
        f'<p class="about">{escape(report.dtype)}, batch {shape}, {len(report.results)} stages, {replay}</p>',
        f'<p class="verdict {style}">{escape(report.sentence())}</p>',
    ]
    for title, note, line, is_shown, draw in SECTIONS:
        shown = [stage for stage in report.results if is_shown(stage)]
        if shown:
            parts.append(f'<h2>{title}</h2><p class="note">{note} {_key(line)}</p>{plots.svg(draw, shown, title)}')
    return "".join(parts) + f"<h2>Every stage</h2>{_table(report.results)}"


def _key(line: str) -> str:
    """What the colours mean, and the dashed line."""
    words = (("same", "within tolerance"), ("flip", "flip at a near tie"), ("wrong", "wrong number"))
    dots = "".join(f'<span class="key" style="background:var(--{style})"></span>{word}' for style, word in words)
    dots += f'<span class="key line"></span>{line}' if line else ""
    return f'<span class="keys">{dots}</span>'


def _table(results: Sequence[StageResult]) -> str:
    rows = []
    for stage in results:
        rows.append(
            f'<tr class="{plots.verdict_class(stage)}"><td>{escape(stage.name)}</td>'
            f'<td class="number">{stage.error:.2e}</td>'
            f'<td class="number">{stage.tolerance:.0e}</td><td class="verdict-word">{stage.verdict}</td>'
            f'<td class="where">{escape(stage.where)}</td></tr>'
        )
    head = "<tr><th>stage</th><th>error</th><th>tolerance</th><th>verdict</th><th>worst entry</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
