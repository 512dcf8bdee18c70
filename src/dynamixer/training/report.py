"""The page of a run: one HTML file that holds its figures, needs no script and asks nothing of the network."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from dynamixer.files import write_text

MARK = '<meta name="generator" content="dynamixer">'
NOTHING = "\N{EN DASH}"
STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #23272e; --soft: #666d78; --line: #e5e2dc;
  --accent: #2563a8 }
@media (prefers-color-scheme: dark) { :root { --paper: #15181d; --card: #1d2127; --ink: #e4e7ec; --soft: #99a1ad;
  --line: #2f353e; --accent: #7fb2ea }
  figure div { filter: brightness(.9) } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; -webkit-text-size-adjust: 100% }
main { max-width: 62rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2.5rem) }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); font-weight: 650; line-height: 1.2; letter-spacing: -.015em;
  margin: 0 0 2rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; font-weight: 620; margin: 0 0 1rem }
section { margin-top: 3.25rem }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 12rem), 1fr)); gap: .75rem; margin: 0 }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1rem 1.25rem;
  display: flex; flex-direction: column-reverse; justify-content: flex-end }
.numbers dt { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere }
.numbers dd { margin: 0; font-size: clamp(1.35rem, 3.2vw, 1.85rem); font-weight: 620; line-height: 1.25;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
figure { margin: 0 }
figure div { background: #fff; border: 1px solid var(--line); border-radius: 14px; padding: .75rem; text-align: center }
img { display: block; max-width: 100%; height: auto; margin: 0 auto }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .6rem; max-width: 46rem; overflow-wrap: anywhere }
.box { overflow: auto; max-height: 26rem; background: var(--card); border: 1px solid var(--line); border-radius: 14px }
.box:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .5rem .9rem; border-top: 1px solid var(--line); vertical-align: top }
.box th, .box td { text-align: right; white-space: nowrap }
thead th { position: sticky; top: 0; background: var(--card); border-top: 0; color: var(--soft); font-weight: 550;
  box-shadow: inset 0 -1px var(--line) }
thead + tbody tr:first-child td { border-top: 0 }
.pairs tr:first-child > * { border-top: 0 }
.pairs th { text-align: left; font-weight: 450; color: var(--soft); width: 40%; padding-left: 0; overflow-wrap: anywhere }
.pairs td { overflow-wrap: anywhere; padding-right: 0 }
.pairs { table-layout: fixed }
@media (max-width: 30rem) { .numbers { grid-template-columns: 1fr 1fr } .numbers div { padding: .8rem .9rem } }
@media print { .box { max-height: none; overflow: visible } section { break-inside: avoid } }
"""


def is_report(path: Path) -> bool:
    """Whether a file is a page that `write_report` made."""
    return path.is_file() and MARK.encode() in path.read_bytes()[:2000]


def write_report(
    path: Path,
    *,
    title: str,
    summary: Mapping[str, object],
    config: Mapping[str, object],
    rows: Sequence[Mapping[str, object]],
    figures: Sequence[tuple[str, str, bytes]],
    table: str = "Epochs",
) -> None:
    """Write the page of a run, or of what a model made of a picture, whole or not at all.

    Args:
        path: the HTML file.
        title: what was run.
        summary: the headline figures by name, shown large; text stands as it is, numbers are rounded.
        config: what the run depends on, by key.
        rows: one for each epoch, as in metrics.csv; a figure that a row does not have is a dash.
        figures: heading, caption and PNG of each picture.
        table: what the rows are.

    Raises:
        RunError: the file could not be written.
    """
    parts = [
        f"<h1>{_text(title)}</h1>",
        _numbers(summary),
        *(_figure(*figure) for figure in figures),
        _table(rows, table),
        _pairs(config),
    ]
    body = "\n".join(part for part in parts if part)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
{MARK}
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
    write_text(path, page)


def _numbers(summary: Mapping[str, object]) -> str:
    cells = (f"<div><dt>{_text(name)}</dt><dd>{_text(_shown(value))}</dd></div>" for name, value in summary.items())
    return _unless_empty('<dl class="numbers">', cells, "</dl>")


def _figure(heading: str, caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{_text(f"{heading}: {caption}" if caption else heading)}">'
    under = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f"<section><h2>{_text(heading)}</h2>\n<figure><div>{image}</div>{under}</figure></section>"


def _table(rows: Sequence[Mapping[str, object]], heading: str) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f'<th scope="col">{_text(key)}</th>' for key in keys)
    body = (f"<tr>{''.join(f'<td>{_text(_shown(row.get(key)))}</td>' for key in keys)}</tr>" for row in rows)
    # What scrolls has to be reachable by keyboard, and to say what it is.
    name = _text(heading)
    start = f'<section><h2>{name}</h2>\n<div class="box" tabindex="0" role="region" aria-label="{name}"><table>'
    return _unless_empty(f"{start}\n<thead><tr>{head}</tr></thead>\n<tbody>", body, "</tbody></table></div></section>")


def _pairs(config: Mapping[str, object]) -> str:
    body = (
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(_shown(value, exact=True))}</td></tr>'
        for key, value in config.items()
    )
    return _unless_empty(
        '<section><h2>Configuration</h2>\n<table class="pairs"><tbody>', body, "</tbody></table></section>"
    )


def _unless_empty(start: str, parts: Iterable[str], end: str) -> str:
    inner = "\n".join(parts)
    return f"{start}\n{inner}\n{end}" if inner else ""


def _shown(value: object, *, exact: bool = False) -> str:
    """A value as a person reads it: numbers of four digits unless they are to be exact, nested values as JSON."""
    match value:
        case None:
            return NOTHING
        case bool():
            return "yes" if value else "no"
        case int():
            return str(value) if exact else f"{value:,}"
        case float():
            return repr(value) if exact else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        case Mapping() | list() | tuple():
            return json.dumps(value, ensure_ascii=False, default=str) if value else NOTHING
    return str(value)


def _text(words: object) -> str:
    """Words as HTML shows them; what cannot be written (a file name's broken bytes) becomes a question mark."""
    return escape(str(words).encode("utf-8", "replace").decode("utf-8"))
