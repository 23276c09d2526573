"""What all pages share: colours, the style sheet, and a document that can load nothing."""

from html import escape

# By the names of CSS variables, which replace them in the plots' SVG: the plots follow light and dark mode.
COLOURS = {
    "soft": "#5c6670", "line": "#d9dee3", "same": "#2f7d6d", "flip": "#b7791f", "wrong": "#c53030",
    "allowed": "#6b46c1",
}
STYLE = """
:root { color-scheme: light dark; LIGHT --ink: #1d2329; --paper: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #39424c; --paper: #14181d;
  --card: #1c2229; --same: #4fb3a0; --flip: #e0a83c; --wrong: #f56565; --allowed: #a78bfa; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 36px 0 4px; }
p { margin: 4px 0 12px; } .about, .note { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
""".replace("LIGHT", " ".join(f"--{name}: {colour};" for name, colour in COLOURS.items()))


def document(title: str, body: str, style: str, script: str = "") -> str:
    """A whole page with the shared style and `style`; the browser refuses whatever is not in the page itself.

    `body`, `style` and `script` are trusted; the title is escaped.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'" + ("; script-src 'unsafe-inline'" if script else "")
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{style}</style></head><body><main><h1>{escape(title)}</h1>{body}</main>{code}</body></html>\n"
    )
