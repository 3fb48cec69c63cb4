"""One HTML file: tables and figures with words around them, for any browser, without a network.

``plotly.js`` is embedded once; the page asks no host for anything. All text that came from a
model or a user is escaped, and what it has that cannot be seen is made visible. Light or dark as
the reader's system is; on a narrow screen tables scroll on their own.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tl_neuron_attr.markup import Shown, escaped, table


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
        f'<li><a href="#s{number}">{escaped(section.title)}</a></li>'
        for number, section in enumerate(sections)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escaped(title)}</title>\n<style>{_asset('page.css')}</style>\n"
        f"<script>{_script(get_plotlyjs())}</script>\n</head>\n<body>\n<main>\n"
        f"<h1>{escaped(title)}</h1>\n{_paragraphs(lead)}\n"
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n{body}\n</main>\n'
        f"<script>{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _section(section: Section, number: int, numbers: Any) -> str:
    parts = [f'<section id="s{number}"><h2>{escaped(section.title)}</h2>']
    parts.append(_paragraphs(section.text))
    for item in section.items:
        if isinstance(item, Shown):
            parts.append(table(item))
        else:
            parts.append(_figure(item, next(numbers)))
    return "\n".join([*parts, "</section>"])


def _paragraphs(texts: Sequence[str]) -> str:
    return "\n".join(f"<p>{escaped(text)}</p>" for text in texts)


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
        f"<figure><figcaption>{escaped(html.unescape(title.replace('<br>', ' ')))}</figcaption>"
        f'<div class="plot" id="f{number}" style="height:{height}px"></div>'
        f'<script type="application/json" data-for="f{number}">{text}</script></figure>'
    )


def _script(text: str) -> str:
    """Text that may stand in a script element: nothing in it ends the element."""
    return text.replace("</", "<\\/").replace("<!--", "<\\!--")


def _asset(name: str) -> str:
    return files("tl_neuron_attr.report").joinpath(name).read_text(encoding="utf-8")
