"""One HTML file: tables and figures with words around them, for any browser, without a network.

``plotly.js`` is embedded once; the page asks no host for anything. All text that came from a
model or a user is escaped, and what it has that cannot be seen is made visible. Light or dark as
the reader's system is; on a narrow screen tables scroll on their own.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tl_neuron_attr.prompts import visible
from tl_neuron_attr.tables import records


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One table as the page shows it."""

    caption: str
    table: pd.DataFrame
    columns: Mapping[str, str]
    """Which columns, and what each is called; a name that begins with ``*`` is published."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, what to know about what follows, and then tables and figures."""

    title: str
    text: Sequence[str] = ()
    """Paragraphs of plain text."""
    items: Sequence[Shown | go.Figure] = field(default=(), repr=False)


def page(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole file."""
    numbers = iter(range(10**6))
    body = "\n".join(_section(section, number, numbers) for number, section in enumerate(sections))
    contents = "".join(
        f'<li><a href="#s{number}">{_escaped(section.title)}</a></li>'
        for number, section in enumerate(sections)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_escaped(title)}</title>\n<style>{_asset('page.css')}</style>\n"
        f"<script>{_script(get_plotlyjs())}</script>\n</head>\n<body>\n<main>\n"
        f"<h1>{_escaped(title)}</h1>\n{_paragraphs(lead)}\n"
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n{body}\n</main>\n'
        f"<script>{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _section(section: Section, number: int, numbers: Any) -> str:
    parts = [f'<section id="s{number}"><h2>{_escaped(section.title)}</h2>']
    parts.append(_paragraphs(section.text))
    for item in section.items:
        if isinstance(item, Shown):
            parts.append(_table(item))
        else:
            parts.append(_figure(item, next(numbers)))
    return "\n".join([*parts, "</section>"])


def _paragraphs(texts: Sequence[str]) -> str:
    return "\n".join(f"<p>{_escaped(text)}</p>" for text in texts)


# --- figures ----------------------------------------------------------------------------------


def _figure(figure: go.Figure, number: int) -> str:
    plain = json.loads(figure.to_json() or "{}")
    # the page has a caption of its own, which wraps on a phone
    title = plain["layout"].pop("title", {}).get("text", "")
    plain["layout"].pop("template", None)
    plain["layout"].setdefault("margin", {})["t"] = 64
    text = _script(json.dumps(plain, ensure_ascii=False, sort_keys=True))
    height = int(plain["layout"].get("height", 400))
    return (
        f"<figure><figcaption>{_escaped(html.unescape(title.replace('<br>', ' ')))}</figcaption>"
        f'<div class="plot" id="f{number}" style="height:{height}px"></div>'
        f'<script type="application/json" data-for="f{number}">{text}</script></figure>'
    )


def _script(text: str) -> str:
    """Text that may stand in a script element: nothing in it ends the element."""
    return text.replace("</", "<\\/").replace("<!--", "<\\!--")


# --- tables -----------------------------------------------------------------------------------


def _table(shown: Shown) -> str:
    known = {name: label for name, label in shown.columns.items() if name in shown.table}
    table = pd.DataFrame(shown.table, columns=[*known])
    for name in known:  # means of counts that are all the same are counts
        cells = table[name].tolist()
        if all(isinstance(cell, float) and cell.is_integer() for cell in cells):
            table = table.assign(**{name: [int(cell) for cell in cells]})
    numeric = {
        name
        for name in known
        if pd.api.types.is_numeric_dtype(table[name].dtype)
        and not pd.api.types.is_bool_dtype(table[name].dtype)
    }

    def classes(name: str) -> str:
        found = ["num"] * (name in numeric) + ["pub"] * known[name].startswith("*")
        return f' class="{" ".join(found)}"' if found else ""

    head = "".join(
        f'<th scope="col"{classes(name)}>{_escaped(label.removeprefix("*"))}</th>'
        for name, label in known.items()
    )
    rows = "\n".join(
        "<tr>" + "".join(f"<td{classes(name)}>{_cell(row[name])}</td>" for name in known) + "</tr>"
        for row in records(table)
    )
    return (
        f'<div class="wide" tabindex="0"><table><caption>{_escaped(shown.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return '<span class="none">–</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "–" if math.isnan(value) else number(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)) or hasattr(value, "tolist"):
        return " ".join(f"<code>{_escaped(visible(str(each)))}</code>" for each in value)
    return _escaped(str(value))


def number(value: float) -> str:
    """Three significant digits, and a real minus sign."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    if digits > 6:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def _escaped(text: str) -> str:
    shown = "".join(char if char == " " else visible(char) for char in text)
    return html.escape(shown, quote=True)


def _asset(name: str) -> str:
    return files("tl_neuron_attr.paper").joinpath(name).read_text(encoding="utf-8")
