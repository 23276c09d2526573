"""The routing of a text as one HTML page: the text coloured by expert, then each layer's experts.

The page loads nothing. Its script only changes the layer that is shown: without it the first one is.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from moe_parity.pages.palette import expert_colours
from moe_parity.pages.style import document
from moe_parity.pages.visible import named, visible
from moe_parity.routing.numbers import LayerNumbers, least_occurrences

MOST_IN_MATRIX = 16  # experts; of more the strongest pairs are listed
MOST_PAIRS = 24
STYLE = """
.about { margin: 2px 0; }
.chooser { position: sticky; top: 0; background: var(--paper); padding: 8px 0; z-index: 1; margin: 20px 0 0;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; }
.chooser select { font: inherit; } .legend { display: flex; flex-wrap: wrap; gap: 3px; }
.legend button { border: 0; cursor: pointer; } .legend button[aria-pressed=true] { outline: 2px solid var(--ink); }
.e { display: inline-block; min-width: 1.2em; padding: 0 4px; border-radius: 3px; text-align: center; color: #14181d;
  font: 13px/1.5 system-ui, sans-serif; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.75 ui-monospace, monospace; margin: 12px 0;
  padding: 2px 6px; max-height: 430px; overflow: auto; resize: vertical; border: 1px solid var(--line);
  border-radius: 4px; unicode-bidi: plaintext; }
.t { color: #14181d; border-radius: 2px; } .t.w { box-shadow: -2px 0 0 var(--soft); }
.t.d { text-decoration: underline 1.5px var(--wrong); } .text .t.x { background: none; color: var(--wrong); }
.t.m { font-size: 10px; } .text.only .t:not(.on) { background: none; color: var(--soft); }
.bar { display: block; position: relative; width: 190px; height: 13px; background: var(--card); }
.bar i { position: absolute; top: 0; bottom: 0; left: 0; }
.bar i.lost { background: repeating-linear-gradient(45deg, var(--wrong) 0 2px, transparent 2px 5px); }
.bar b { position: absolute; top: -2px; bottom: -2px; width: 2px; background: var(--ink); }
td.takes { white-space: normal; min-width: 260px; }
.one { display: inline-block; white-space: nowrap; margin-right: 9px; }
.one span { font-family: ui-monospace, monospace; background: var(--card); border-radius: 3px; padding: 0 3px;
  white-space: pre; } .one small { color: var(--soft); }
table.matrix { width: auto; } table.matrix td { text-align: center; padding: 3px 7px; border: 1px solid var(--paper); }
table.matrix th { text-align: center; padding: 3px 5px; border: 0; }
section { scroll-margin-top: 56px; } ul { margin: 4px 0 12px; padding-left: 20px; color: var(--soft); }
"""
SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.querySelector(".text"), spans = Array.from(document.querySelectorAll(".t"));
const sections = Array.from(document.querySelectorAll("section")), select = document.getElementById("layer");
const buttons = Array.from(document.querySelectorAll(".legend button"));
const K = data.top_k, steps = data.weight_steps;
let only = null, row = 0;
function draw() {
  const layer = data.rows[row];
  spans.forEach((span, i) => {
    const lines = [data.names[data.tokens[i]]];
    let lost = 0;
    for (let k = i * K; k < i * K + K; k++) {
      const dropped = layer.dropped[k] === "1";
      lost += dropped;
      lines.push(`expert ${layer.experts[k]}: ${(layer.weights[k] / steps).toFixed(3)}${dropped ? ", dropped" : ""}`);
    }
    const first = layer.experts[i * K];
    span.title = lines.join("\\n");
    span.className = `t e${first}${data.base[i]}${lost ? " d" : ""}${lost === K ? " x" : ""}`
      + (first === only ? " on" : "");
  });
  text.classList.toggle("only", only !== null);
  sections.forEach((section, i) => { section.hidden = i !== row; });
  buttons.forEach((button, e) => { button.setAttribute("aria-pressed", e === only); });
  select.value = row;
}
function byAddress() {
  const wanted = data.rows.findIndex((each) => location.hash === `#layer-${each.layer}`);
  row = Math.max(wanted, 0);
  draw();
}
select.addEventListener("change", () => {
  row = Number(select.value);
  history.replaceState(null, "", `#layer-${data.rows[row].layer}`);
  draw();
});
buttons.forEach((button, e) => button.addEventListener("click", () => { only = only === e ? null : e; draw(); }));
addEventListener("hashchange", () => { byAddress(); sections[row].scrollIntoView(); });
document.querySelectorAll("[data-script]").forEach((each) => { each.disabled = false; });
byAddress();
"""
WEIGHT_STEPS = 1000  # weights are stored in the page as whole thousandths


@dataclass(frozen=True)
class Text:
    """The N tokens of a page, with what each shows and is called."""

    token_N: np.ndarray
    start_N: np.ndarray  # True at the first token of a window
    pieces: Sequence[str]  # the text of each token; "" where it has none of its own
    names: dict[int, str]  # what each token is called on its own, never empty


def page(title: str, about: Sequence[str], contract: Sequence[str], text: Text, layers: Sequence[LayerNumbers]) -> str:
    """The whole page. `about` are its first lines, `contract` the lines of `describe`."""
    E = len(layers[0].choices_E)
    colours = "".join(f".e{e}{{background:{colour}}}\n" for e, colour in enumerate(expert_colours(E)))
    body = "".join(
        [
            *(f'<p class="about">{escape(line)}</p>' for line in about),
            f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in contract)}</ul>",
            _chooser(layers, E), _text(text, layers[0]),
            *(_section(each, text, hidden=i > 0) for i, each in enumerate(layers)),
            _overview(layers), _data(text, layers),
        ]
    )
    return document(title, body, STYLE + colours, SCRIPT)


def _chooser(layers: Sequence[LayerNumbers], E: int) -> str:
    options = "".join(f'<option value="{i}">layer {each.layer}</option>' for i, each in enumerate(layers))
    buttons = "".join(
        f'<button type="button" class="e e{e}" aria-pressed="false" data-script disabled '
        f'title="show the tokens whose first choice is expert {e}">{e}</button>' for e in range(E)
    )
    return (
        f'<div class="chooser"><label><select id="layer" data-script disabled>{options}</select></label>'
        f'<div class="legend">{buttons}</div>'
        "<noscript>Scripts are off: the first of these layers is shown.</noscript></div>"
    )


def _text(text: Text, layer: LayerNumbers) -> str:
    spans = []
    for i, (piece, token) in enumerate(zip(text.pieces, text.token_N.tolist(), strict=True)):
        lost = layer.dropped_NK[i]
        kinds = _base(text, i) + (" d" if lost.any() else "") + (" x" if lost.all() else "")
        choices = zip(layer.expert_NK[i].tolist(), layer.weight_NK[i].tolist(), lost.tolist(), strict=True)
        lines = [f"expert {e}: {_steps(weight) / WEIGHT_STEPS:.3f}{', dropped' if no else ''}"
                 for e, weight, no in choices]
        tip = escape("\n".join([_token_in_words(text, token), *lines]))
        shown = escape(visible(piece) if piece else visible(text.names[token]))
        spans.append(f'<span class="t e{layer.expert_NK[i, 0]}{kinds}" title="{tip}">{shown}</span>')
    note = (
        "The colour of a token is its first choice; point at it for all its choices and their weights. A bar stands "
        "where a window begins. "
    )
    if any(each == "" for each in text.pieces):
        note += "Small tokens have no text of their own, such as marks of a beginning and parts of a character. "
    note += "Underlined: a choice got no slot; without colour: no choice got one."
    return f'<p class="note">{note}</p><div class="text" dir="auto">{"".join(spans)}</div>'


def _base(text: Text, i: int) -> str:
    """The classes of a token that are the same in every layer."""
    return (" w" if text.start_N[i] else "") + ("" if text.pieces[i] else " m")


def _steps(weight: float) -> int:
    return round(weight * WEIGHT_STEPS)


def _token_in_words(text: Text, token: int) -> str:
    return f"{named(text.names[token])}, token {token}"


def _section(layer: LayerNumbers, text: Text, hidden: bool) -> str:
    least = least_occurrences(len(text.token_N))
    which = f" (of those that occur at least {least} times)" if least > 1 else ""
    lost = "No choice was dropped."
    if layer.dropped_NK.any():
        lost = f"Dropped: {layer.dropped_fraction:.1%} of the choices; {layer.lost_tokens:,} tokens got no expert."
    parts = [
        f'<section{" hidden" if hidden else ""}><h2>Layer {layer.layer}: experts</h2>',
        f'<p class="note">Mean router entropy {layer.entropy:.3f} nats, {layer.entropy_share:.0%} of log E. {lost} '
        "The line in a bar is the even share; hatched is what was dropped. Taken most: tokens with the largest lift, "
        f"each with how many of its occurrences chose the expert{which}.</p>",
        _experts(layer, text),
    ]
    return "".join(parts) + _together(layer) + "</section>"


def _experts(layer: LayerNumbers, text: Text) -> str:
    E, load_E = len(layer.choices_E), layer.load_E
    widest, rows = max(float(load_E.max()), 1 / E) * 1.05, []
    for e in range(E):
        width, lost = load_E[e] / widest, layer.dropped_E[e] / layer.choices_E.sum() / widest
        bar = (
            f'<span class="bar"><i class="e{e}" style="width:{width:.2%}"></i>'
            f'<i class="lost" style="left:{width - lost:.2%};width:{lost:.2%}"></i>'
            f'<b style="left:{1 / E / widest:.2%}"></b></span>'
        )
        taken = " ".join(
            f'<span class="one" title="{escape(_token_in_words(text, each.token))}: {each.count} of '
            f'{each.occurrences} occurrences, lift {each.lift:.1f}"><span>{escape(named(text.names[each.token])[1:-1])}'
            f"</span> <small>{each.count} ({each.share:.0%})</small></span>" for each in layer.taken[e]
        )
        rows.append(
            f'<tr><td><span class="e e{e}">{e}</span></td><td>{bar}</td>'
            f"{_numbers((f'{load_E[e]:.1%}', f'{layer.choices_E[e]:,}', f'{layer.dropped_E[e]:,}'))}"
            f'<td class="takes">{taken}</td></tr>'
        )
    head = "<tr><th>expert</th><th>load</th><th></th><th>choices</th><th>dropped</th><th>taken most</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _together(layer: LayerNumbers) -> str:
    E, K = len(layer.choices_E), layer.expert_NK.shape[1]
    if K == 1:
        return ""
    title = f"<h2>Layer {layer.layer}: experts chosen together</h2>"
    even = (K - 1) / (E - 1)
    if E > MOST_IN_MATRIX:
        return (
            f'{title}<p class="note">The pairs that most tokens chose; of an expert\'s tokens, {even:.1%} would choose '
            f"each other expert if choices were even.</p>{_pairs(layer)}"
        )
    return (
        f'{title}<p class="note">Row: of the tokens that chose this expert, the share that also chose the other. '
        f"Even: {even:.0%}.</p>{_matrix(layer, even)}"
    )


def _pairs(layer: LayerNumbers) -> str:
    rows, with_EE, N = [], layer.with_EE, len(layer.expert_NK)
    for e, f, count in layer.pairs(MOST_PAIRS):
        chips = f'<span class="e e{e}">{e}</span> <span class="e e{f}">{f}</span>'
        cells = (f"{count:,}", f"{count / N:.1%}", f"{with_EE[e, f]:.1%}", f"{with_EE[f, e]:.1%}")
        rows.append(f"<tr><td>{chips}</td>{_numbers(cells)}</tr>")
    head = "<tr><th>pair</th><th>tokens</th><th>of all tokens</th><th>of the first's</th><th>of the second's</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _numbers(cells: Sequence[str]) -> str:
    return "".join(f'<td class="number">{cell}</td>' for cell in cells)


def _matrix(layer: LayerNumbers, even: float) -> str:
    with_EE, E = layer.with_EE, len(layer.choices_E)
    darkest = max(float(with_EE.max()), even)
    rows = []
    for e in range(E):
        cells = [
            "<td></td>" if e == f else
            f'<td style="background:rgb(47 125 109 / {0.6 * with_EE[e, f] / darkest:.2f})" title="experts {e} and {f}: '
            f'{layer.together_EE[e, f]:,} tokens">{with_EE[e, f]:.0%}</td>' for f in range(E)
        ]
        rows.append(f'<tr><th><span class="e e{e}">{e}</span></th>{"".join(cells)}</tr>')
    head = "".join(f'<th><span class="e e{f}">{f}</span></th>' for f in range(E))
    return f'<div class="scroll"><table class="matrix"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _overview(layers: Sequence[LayerNumbers]) -> str:
    rows = []
    for each in layers:
        load_E = each.load_E
        cells = (
            f"{load_E.max():.1%}", f"{load_E.min():.1%}", f"{int((load_E == 0).sum())}", f"{each.entropy:.3f}",
            f"{each.entropy_share:.0%}", f"{each.dropped_fraction:.1%}",
        )
        most, least = int(load_E.argmax()), int(load_E.argmin())
        chips = [f'<span class="e e{e}">{e}</span>' for e in (most, least)]
        rows.append(
            f'<tr><td><a href="#layer-{each.layer}">layer {each.layer}</a></td><td>{chips[0]} {cells[0]}</td>'
            f"<td>{chips[1]} {cells[1]}</td>{_numbers(cells[2:])}</tr>"
        )
    E = len(layers[0].choices_E)
    head = (
        "<tr><th></th><th>largest load</th><th>smallest load</th><th>unused experts</th><th>entropy, nats</th>"
        f"<th>of log {E} = {math.log(E):.3f}</th><th>dropped</th></tr>"
    )
    return (
        f'<h2>All layers</h2><p class="note">The even load is {1 / E:.1%}.</p><div class="scroll"><table>{head}'
        f'{"".join(rows)}</table></div>'
    )


def _data(text: Text, layers: Sequence[LayerNumbers]) -> str:
    """What the script reads. No `<` is in it, so that nothing in it ends the element."""
    K = layers[0].expert_NK.shape[1]
    token_U, place_N = np.unique(text.token_N, return_inverse=True)
    content = {
        "top_k": K, "weight_steps": WEIGHT_STEPS, "tokens": place_N.tolist(),
        "names": [_token_in_words(text, token) for token in token_U.tolist()],
        "base": [_base(text, i) for i in range(len(text.token_N))],
        "rows": [
            {
                "layer": each.layer, "experts": each.expert_NK.ravel().tolist(),
                "weights": [_steps(weight) for weight in each.weight_NK.ravel().tolist()],
                "dropped": "".join("01"[lost] for lost in each.dropped_NK.ravel().tolist()),
            }
            for each in layers
        ],
    }
    words = json.dumps(content, separators=(",", ":"))
    for sign in "<>&":
        words = words.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="data">{words}</script>'
