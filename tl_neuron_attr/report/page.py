"""One HTML file: tables and figures with words around them, for any browser, without a network.

``plotly.js`` is embedded once; the page asks no host for anything, and a policy in its head forbids
it to. All text that came from a model or a user is escaped, and what it has that cannot be seen is
made visible. Light or dark as the reader's system is; on a narrow screen tables scroll on their
own. Every table is sorted by its headings and, from eleven rows on, searched (``tables.js``);
figures are drawn when they come into view (``figures.js``). Without scripts the tables are there.
"""

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import count
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tl_neuron_attr.markup import Shown, escaped, table

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)
"""What a page may load: what is in it, and nothing else. Connections are forbidden."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, what to know about what follows, and then tables and figures."""

    title: str
    text: Sequence[str] = ()
    """Paragraphs of plain text."""
    items: Sequence[Shown | go.Figure] = field(default=(), repr=False)


def page(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole file."""
    numbers = count()
    body = "\n".join(
        _section(section, f"s{number}", numbers) for number, section in enumerate(sections)
    )
    places = [(f"s{number}", section.title) for number, section in enumerate(sections)]
    return document(
        title,
        f"<h1>{escaped(title)}</h1>\n{paragraphs(lead)}\n{contents(places)}\n{body}",
        scripts=["tables.js", "figures.js"],
        plotly=any(isinstance(item, go.Figure) for each in sections for item in each.items),
    )


def document(
    title: str,
    body: str,
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    plotly: bool | str = True,
    policy: str = POLICY,
) -> str:
    """``body`` as a file of its own, with these assets of this folder after ``page.css``.

    Scripts stand after the text, which can be read before they have run, and plotly.js, which is
    large, after the others. ``plotly`` may be the address of a plotly.js beside the file, which is
    then not embedded.
    """
    if isinstance(plotly, str):
        library = [f'<script src="{escaped(plotly)}"></script>']
    else:
        library = [f"<script>{_script(get_plotlyjs())}</script>"] * plotly
    css = "\n".join(asset(name) for name in ("page.css", *styles))
    own = [f"<script>{asset(name)}</script>" for name in scripts]
    drawn = ["<script>Figures.start();</script>"] * ("figures.js" in scripts)
    code = "\n".join([*own, *library, *drawn])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escaped(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n"
        f"<main>\n{body}\n</main>\n{code}\n</body>\n</html>\n"
    )


def contents(places: Sequence[tuple[str, str]]) -> str:
    """The list of a page's headings, by id."""
    items = "".join(f'<li><a href="#{place}">{escaped(title)}</a></li>' for place, title in places)
    return f'<nav aria-label="Contents"><ol>{items}</ol></nav>'


def paragraphs(texts: Sequence[str]) -> str:
    """Plain text, a paragraph each."""
    return "\n".join(f"<p>{escaped(text)}</p>" for text in texts)


def _section(section: Section, place: str, numbers: Iterator[int]) -> str:
    parts = [f'<section id="{place}"><h2>{escaped(section.title)}</h2>']
    parts.append(paragraphs(section.text))
    for item in section.items:
        if isinstance(item, Shown):
            parts.append(table(item))
        else:
            parts.append(figure(item, f"f{next(numbers)}"))
    return "\n".join([*parts, "</section>"])


# --- figures ----------------------------------------------------------------------------------


def figure(drawn: go.Figure, place: str) -> str:
    """A figure with its title as caption, which wraps on a phone; its data, to be drawn later."""
    plain = json.loads(drawn.to_json() or "{}")
    title = plain["layout"].pop("title", {}).get("text", "")
    plain["layout"].pop("template", None)
    named = [trace for trace in plain["data"] if trace.get("showlegend", len(plain["data"]) > 1)]
    legend = plain["layout"].get("showlegend", bool(named))
    plain["layout"].setdefault("margin", {})["t"] = 64 if legend else 32
    height = int(plain["layout"].get("height", 400))
    caption = html.unescape(title.replace("<br>", " "))
    script = data(plain, f'data-for="{place}"')
    return (
        f'<figure><figcaption id="{place}-says">{escaped(caption)}</figcaption>'
        f'<div class="plot" id="{place}" role="img" aria-labelledby="{place}-says" '
        f'style="height:{height}px"></div>{script}</figure>'
    )


def data(values: Any, attributes: str) -> str:
    """Plain values for a script of the page: JSON in which nothing can end the element."""
    text = json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    for char in "<\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return f'<script type="application/json" {attributes}>{_whole(text)}</script>'


def _whole(text: str) -> str:
    """Half a surrogate pair cannot be written to a file; in JSON it can be escaped."""
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _script(text: str) -> str:
    """Code that may stand in a script element: nothing in it ends the element."""
    return text.replace("</", "<\\/").replace("<!--", "<\\!--")


def plotly_js() -> str:
    """The library that draws figures, for pages that share it."""
    return get_plotlyjs()


def asset(name: str) -> str:
    """A style sheet or a script of this folder."""
    return files("tl_neuron_attr.report").joinpath(name).read_text(encoding="utf-8")
