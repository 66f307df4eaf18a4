"""The frame of the report's page: its style for screen, dark mode and print, sortable tables, escaped text."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_TEXT = 400

STYLE = """
:root{--paper:#fff;--panel:#f6f7f8;--ink:#16191d;--soft:#5b6470;--rule:#d3d8de;--blue:#0072b2;--orange:#c85200;
--green:#009e73;--purple:#a8578a;--bad:#b3261e;color-scheme:light dark;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
--mono:ui-monospace,"SFMono-Regular",Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--panel:#1d2125;--ink:#e6e8ea;--soft:#9aa4af;--rule:#3a424a;
--blue:#56b4e9;--orange:#f08a3c;--green:#2fc79a;--purple:#d795bd;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 var(--sans)}
main{max-width:1040px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:25px;line-height:1.25;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 10px;padding-top:14px;border-top:1px solid var(--rule)}
h3{font-size:15px;margin:22px 0 6px}
p{margin:6px 0 10px;max-width:78ch}
.soft,figcaption,.hint{color:var(--soft);font-size:13.5px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0 0;font-size:14px}
a{color:var(--blue);text-decoration:none}a:hover{text-decoration:underline}
.verdict{font-size:18px;line-height:1.45;max-width:70ch;margin:14px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:16px 0}
.tile{background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:10px 12px}
.tile b{display:block;font-size:22px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.warning{border-left:4px solid var(--bad);background:var(--panel);padding:8px 12px;margin:10px 0;overflow-wrap:anywhere}
.wide{overflow-x:auto;margin:8px 0 14px}
table{border-collapse:collapse;font-size:13.5px;min-width:100%}
table.narrow{min-width:0}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap;border-bottom-width:2px}
td{min-width:8em}td.n,th.n{min-width:0;text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td code{white-space:nowrap}
table.sortable th{cursor:pointer}
th[aria-sort=ascending]::after{content:" \\2191"}th[aria-sort=descending]::after{content:" \\2193"}
code,pre{font:12.5px/1.5 var(--mono)}
pre{background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:10px 12px;white-space:pre-wrap;
overflow-wrap:anywhere}
svg.chart{display:block;width:100%;min-width:600px;height:auto;margin:4px 0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:16px 28px}
.card{margin:0}.card>div{display:grid;grid-template-columns:repeat(3,1fr);gap:6px}
.card img{width:100%;display:block;border:1px solid var(--rule);border-radius:3px}
.small img{image-rendering:pixelated}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 12px;margin-bottom:3px}
figcaption span{overflow-wrap:anywhere}figcaption span:first-child{color:var(--ink)}
details>summary{cursor:pointer;font-weight:600;margin:6px 0}
@media print{:root{--paper:#fff;--panel:#fff;--ink:#000;--soft:#444;--rule:#bbb;--blue:#0072b2;--orange:#c85200;
--green:#009e73;--purple:#a8578a;--bad:#b3261e}figure,tr,svg,.tile{break-inside:avoid}nav,.hint{display:none}
.wide{overflow:visible}table{font-size:10.5px}td,td code{min-width:0;white-space:normal;overflow-wrap:anywhere}
.cards{grid-template-columns:1fr 1fr}svg.chart{min-width:0}
h2,h3{break-after:avoid}body{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

# A click on a heading sorts the rows by that column: by number where there is one, otherwise by text.
SCRIPT = """
document.querySelectorAll("table.sortable").forEach(function(table){
 var heads=Array.from(table.tHead.rows[0].cells);
 heads.forEach(function(head,column){head.addEventListener("click",function(){
  var up=head.getAttribute("aria-sort")!=="ascending",body=table.tBodies[0];
  heads.forEach(function(other){other.removeAttribute("aria-sort")});
  head.setAttribute("aria-sort",up?"ascending":"descending");
  Array.from(body.rows).sort(function(a,b){
   var x=a.cells[column].dataset.v,y=b.cells[column].dataset.v;
   var order=(x===undefined||y===undefined)?a.cells[column].textContent.localeCompare(b.cells[column].textContent):x-y;
   return up?order:-order;}).forEach(function(row){body.appendChild(row)});
 });});});
"""


def text(value: Any) -> str:
    """Anything as escaped text."""
    return html.escape(str(value), quote=True)


def number(value: float | None, form: str = ".3g", missing: str = "–") -> str:
    """A number as text; infinity as the sign, None and not-a-number by name."""
    if value is None:
        return missing
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return format(value, form)


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f} MB"


class Number:
    """A table cell that is sorted by its value."""

    def __init__(self, value: float | None, form: str = ".3g") -> None:
        self.value = value
        self.shown = number(value, form)

    def cell(self) -> str:
        unknown = self.value is None or math.isnan(self.value)
        key = -1e308 if unknown else min(max(self.value or 0.0, -1e307), 1e307)  # sorted below every number
        return f'<td class="n" data-v="{key!r}">{self.shown}</td>'


class Code(str):
    """A table cell in fixed-width letters."""

    __slots__ = ()


def table(
    headings: Sequence[str], rows: Sequence[Sequence[Any]], *, sortable: bool = False, narrow: bool = False
) -> str:
    """A table that scrolls sideways on its own where it is too wide. Cells: Number, Code or anything printed."""
    numeric = [bool(rows) and isinstance(rows[0][column], Number) for column in range(len(headings))]
    head = "".join(f"<th{' class=n' if n else ''}>{text(h)}</th>" for h, n in zip(headings, numeric, strict=True))
    lines = []
    for row in rows:
        cells = []
        for value in row:
            if isinstance(value, Number):
                cells.append(value.cell())
            elif isinstance(value, Code):
                cells.append(f"<td><code>{text(value)}</code></td>")
            else:
                cells.append(f"<td>{text('' if value is None else value)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    kind = " ".join(name for name, wanted in (("sortable", sortable), ("narrow", narrow)) if wanted)
    body = "".join(lines)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    return table(("", "value"), list(values.items()), narrow=True) if values else ""


def cut(value: str, limit: int = LONGEST_TEXT) -> str:
    """At most `limit` characters of the text, with a mark where it was longer."""
    return value if len(value) <= limit else f"{value[: limit - 1]}…"


def document(title: str, sections: Sequence[tuple[str, str, str]], lead: str) -> str:
    """The whole page. `sections`: (id, heading, HTML); empty ones are left out. `lead` comes before the first."""
    kept = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{text(heading)}</a>' for name, heading, _ in kept)
    body = "".join(
        f'<section id="{name}"><h2>{text(heading)}</h2>{content}</section>' for name, heading, content in kept
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{lead}<nav>{links}</nav>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )
