"""How a value shows itself: plain values -> HTML at the end of a notebook's cell, or one line.

HTML here needs no script and no network, and its style touches nothing around it. Colours are
those of the page it lands in, made stronger or weaker, so light and dark themes both do. All text
is escaped, and what it has that cannot be seen is made visible. A grid holds plain values: tables
become grids in ``styled.py``.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tl_neuron_attr.prompts import visible

RAISES, LOWERS = (60, 147, 80), (153, 112, 171)
"""The ends of the diverging scale, green and purple: they differ to colour-blind readers too, and
stand out from white as from black."""
ATTENTION, FFN = "#4477AA", "#B8860B"
"""The two kinds of neuron; legible on white and on black."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A small table of plain values."""

    caption: str = ""
    header: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    """Text, numbers, ``None``, and tuples of tokens."""
    bars: frozenset[int] = frozenset()
    """Columns whose numbers have a bar, green above 0 and purple below, as long as they are large:
    all of a grid on one scale."""
    wraps: frozenset[int] = frozenset()
    """Columns of long text."""
    more: int = 0
    """Rows there are beside these."""


# --- boxes and what stands in them ------------------------------------------------------------


def box(title: str, *parts: str) -> str:
    """HTML of what stands at the end of a cell: a title, and parts that are HTML already."""
    heading = f'<div class="title">{escaped(title)}</div>' if title else ""
    return f'<div class="tlna"><style>{_STYLE}</style>{heading}{"".join(parts)}</div>'


def facts(pairs: Mapping[str, str]) -> str:
    """Names beside their values, which are HTML already; those that are empty are left out."""
    rows = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{value}</dd></div>"
        for name, value in pairs.items()
        if value
    )
    return f"<dl>{rows}</dl>"


def line(text: str) -> str:
    """A line of small print."""
    return f'<div class="soft">{escaped(text)}</div>'


def warned(messages: Iterable[str]) -> str:
    """What to bear in mind, a line each."""
    return "".join(
        f'<div class="warn"><b>Warning:</b> {escaped(message)}</div>' for message in messages
    )


def next_calls(calls: Mapping[str, str]) -> str:
    """What to call next: code, and what it gives."""
    parts = ", ".join(
        f"<code>{escaped(call)}</code> {escaped(gives)}" for call, gives in calls.items()
    )
    return f'<div class="soft">Next: {parts}</div>'


def grid(shown: Grid) -> str:
    """A grid as a ``<table>``, which scrolls sideways where it is too wide; without rows a line."""
    if not shown.rows:
        return line(shown.caption or "no rows")
    largest = max(
        (
            abs(float(row[column]))
            for row in shown.rows
            for column in shown.bars
            if isinstance(row[column], (int, float)) and math.isfinite(row[column])
        ),
        default=0.0,
    )
    numeric = {
        column
        for column in range(len(shown.header))
        if any(_is_number(row[column]) for row in shown.rows)
    }

    def data(column: int, value: Any) -> str:
        text = cell(value)
        if column in shown.bars and _is_number(value):
            text = f"{signed(float(value))} {_bar(float(value), largest)}"
        words = column in shown.wraps or (isinstance(value, tuple) and len(value) > 1)
        name = "num" if column in numeric else "words" if words else ""
        return f'<td class="{name}">{text}</td>' if name else f"<td>{text}</td>"

    head = "".join(
        f'<th scope="col"{" class=num" if column in numeric else ""}>{escaped(name)}</th>'
        for column, name in enumerate(shown.header)
    )
    body = "".join(
        "<tr>" + "".join(data(column, value) for column, value in enumerate(row)) + "</tr>"
        for row in shown.rows
    )
    more = f'<div class="soft">and {shown.more:,} more</div>' if shown.more else ""
    caption = f"<caption>{escaped(shown.caption)}</caption>" if shown.caption else ""
    return (
        f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>{more}</div>"
    )


def layer_bars(attn: Sequence[float], ffn: Sequence[float], unit: str) -> str:
    """Two bars a layer around 0, attention and FFN, with the scale in ``unit``."""
    width, height, left, top = 640, 120, 52, 8
    values = [*attn, *ffn, 0.0]
    high, low = max(values), min(values)
    span = (high - low) or 1.0
    each = (width - left - 4) / max(1, len(attn))

    def y(value: float) -> float:
        return top + (high - value) / span * height

    bars = []
    for layer, pair in enumerate(zip(attn, ffn, strict=True)):
        for place, (value, colour, name) in enumerate(
            zip(pair, (ATTENTION, FFN), ("attention", "FFN"), strict=True)
        ):
            x = left + each * (layer + 0.1 + 0.4 * place)
            bars.append(
                f'<rect x="{x:.1f}" y="{min(y(value), y(0.0)):.1f}" width="{each * 0.36:.1f}" '
                f'height="{max(abs(y(value) - y(0.0)), 0.5):.1f}" fill="{colour}">'
                f"<title>layer {layer}, {name}: {signed(value)} {escaped(unit)}</title></rect>"
            )
    step = max(1, math.ceil(len(attn) / 20))
    names = "".join(
        f'<text x="{left + each * (layer + 0.5):.1f}" y="{top + height + 16}" '
        f'text-anchor="middle">{layer}</text>'
        for layer in range(0, len(attn), step)
    )
    scale = "".join(
        f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{signed(value)}</text>'
        for value in dict.fromkeys((high, 0.0, low))
        # the ends would stand on the 0 otherwise
        if value == 0 or abs(y(value) - y(0.0)) > 12
    )
    label = f"Rise from each layer's attention and FFN, {unit}"
    return (
        f'<svg viewBox="0 0 {width} {top + height + 22}" width="{width}" role="img" '
        f'aria-label="{escaped(label)}"><g class="axis">{scale}{names}'
        f'<line x1="{left}" x2="{width}" y1="{y(0.0):.1f}" y2="{y(0.0):.1f}"/></g>{"".join(bars)}'
        f'</svg><div class="soft">by layer, {escaped(unit)}: '
        f'<b style="color:{ATTENTION}">■</b> attention <b style="color:{FFN}">■</b> FFN</div>'
    )


def tinted(value: float, largest: float) -> str:
    """The colour of a value on the diverging scale centred on 0, over whatever lies behind."""
    share = min(1.0, abs(value) / largest) if largest > 0 else 0.0
    red, green, blue = RAISES if value >= 0 else LOWERS
    return f"rgba({red},{green},{blue},{0.6 * share:.2f})"


def _bar(value: float, largest: float) -> str:
    share = abs(value) / largest if largest > 0 and math.isfinite(value) else 0.0
    red, green, blue = RAISES if value >= 0 else LOWERS
    return (
        f'<span class="bar"><i style="width:{100 * share:.0f}%;'
        f'background:rgb({red},{green},{blue})"></i></span>'
    )


# --- text and numbers -------------------------------------------------------------------------


def cell(value: Any) -> str:
    """One value as a reader wants it: numbers short, lists as tokens, nothing as a dash."""
    if value is None:
        return '<span class="none">–</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "–" if math.isnan(value) else number(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)) or hasattr(value, "tolist"):
        return " ".join(token(str(each)) for each in value)
    return escaped(str(value))


def token(text: str) -> str:
    """A token with its spaces visible, its direction its own."""
    return f"<code>{escaped(visible(text))}</code>"


def number(value: float) -> str:
    """Three significant digits, and a real minus sign."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value).replace("-", "−")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    if digits > 6:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    """The same with a plus sign before what is positive."""
    return f"+{number(value)}" if value > 0 else number(value)


def decimals(value: float, digits: int = 3, *, sign: bool = True) -> str:
    """So many decimals, for columns of plain text; what they would show as 0 has two digits that
    count instead, as in ``+3.2e-5``. No longer than 7 characters
    below 100 with three decimals.
    """
    shown = f"{value:{'+' if sign else ''}.{digits}f}"
    if value == 0 or not math.isfinite(value) or any(char in "123456789" for char in shown):
        return shown
    shown = f"{value:{'+' if sign else ''}.{1 if abs(value) >= 1e-9 else 0}e}"
    return re.sub(r"e-0*", "e-", shown)


def counted(count: int, what: str) -> str:
    """So many of them: ``1 layer``, ``12 layers``."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def escaped(text: str) -> str:
    """Text as HTML shows it: what cannot be seen is made visible, and nothing is markup."""
    shown = "".join(char if char == " " else visible(char) for char in text)
    return html.escape(shown, quote=True)


def brief(self: Any) -> str:
    """A dataclass in one line: tensors and tables by shape, long sequences by length.

    To be a class's ``__repr__``, where the one that dataclasses come with would print every number.
    """
    parts = ", ".join(
        f"{each.name}={_short(getattr(self, each.name))}" for each in fields(self) if each.repr
    )
    return f"{type(self).__name__}({parts})"


_LONG = 60


def _short(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if hasattr(value, "named_modules"):  # a model would print all its modules
        return f"<{type(value).__name__}>"
    if hasattr(value, "shape") and hasattr(value, "columns"):
        rows, columns = value.shape
        return f"<table, {rows:,} rows of {columns} columns>"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        text = repr(value) if len(value) <= _LONG and not _holds_values(value) else ""
        if text and len(text) <= _LONG:
            return text
        return f"<{type(value).__name__} of {len(value):,}>"
    text = repr(value)
    return text if len(text) <= 4 * _LONG and "\n" not in text else f"<{type(value).__name__}>"


def _holds_values(several: Any) -> bool:
    """Whether showing the members could be long work: they hold tensors, or are many."""
    members = several.values() if isinstance(several, dict) else several
    return any(hasattr(each, "__dataclass_fields__") or hasattr(each, "shape") for each in members)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- style ------------------------------------------------------------------------------------

# three times the class: notebooks have rules of their own for tables, which would win otherwise
_OURS = ".tlna.tlna.tlna"
_LINE = "rgba(128,128,128,.35)"
_STYLE = "".join(
    f"{','.join(f'{_OURS} {each}'.rstrip() for each in selector.split(','))}{{{rules}}}"
    for selector, rules in {
        "": "font:13px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;color:inherit;"
        f"max-width:960px;border:1px solid {_LINE};border-radius:6px;padding:10px 14px;"
        "margin:4px 0;text-align:left",
        ".title": "font-weight:600;font-size:14px;margin:0 0 4px",
        ".soft": "opacity:.78;font-size:12px;margin:3px 0",
        ".warn": "border-left:3px solid #B8860B;padding:1px 8px;margin:4px 0",
        ".none": "opacity:.6",
        "code": "font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:inherit;"
        "background:rgba(128,128,128,.16);border-radius:3px;padding:0 3px;unicode-bidi:isolate;"
        "white-space:pre-wrap",
        "dl": "margin:2px 0",
        "dl>div": "display:flex;gap:10px;margin:1px 0",
        "dt": "flex:0 0 116px;opacity:.78;font-weight:400;margin:0;padding:0",
        "dd": "margin:0;padding:0;min-width:0",
        ".wide": "overflow-x:auto;margin:6px 0",
        "table": "border-collapse:collapse;border:0;margin:0;font-size:12px;background:none;"
        "font-variant-numeric:tabular-nums;table-layout:auto;width:auto",
        "caption": "caption-side:top;text-align:left;font-weight:600;padding:2px 0;color:inherit;"
        "white-space:nowrap",
        "tr": "background:none;border:0",
        "th,td": "padding:2px 12px 2px 0;text-align:left;vertical-align:top;border:0;"
        "background:none;color:inherit;white-space:nowrap;max-width:none;font-size:12px",
        "th": "font-weight:400;opacity:.78;vertical-align:bottom",
        "tbody td": f"border-top:1px solid {_LINE}",
        "td.words": "white-space:normal;min-width:150px",
        ".num": "text-align:right",
        ".bar": "display:inline-block;width:40px;height:9px;margin-left:4px",
        ".bar i": "display:block;height:100%;border-radius:1px",
        "svg": "display:block;max-width:100%;height:auto;margin:6px 0 0",
        "svg text": "font-size:11px;fill:currentColor;opacity:.8",
        "svg line": "stroke:currentColor;opacity:.5",
        # the strip
        ".strip": "display:flex;flex-wrap:wrap;gap:3px;margin:6px 0;padding:0;border:0",
        ".tok": "display:inline-flex;flex-direction:column;position:relative;margin:0;"
        "padding:2px 5px 0;cursor:pointer;font-weight:400;color:inherit;"
        f"border:1px solid {_LINE};border-radius:4px;font-size:13px;line-height:1.35",
        ".tok bdi": "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;"
        "white-space:pre-wrap;overflow-wrap:anywhere",
        ".tok small": "font-size:10px;opacity:.85;white-space:nowrap;"
        "font-variant-numeric:tabular-nums",
        ".tok input": "position:absolute;opacity:0;width:1px;height:1px;margin:0;"
        "pointer-events:none",
        ".tok:has(input:checked)": "outline:2px solid currentColor;outline-offset:0",
        ".tok:has(input:focus-visible)": "outline:3px solid #4477AA;outline-offset:1px",
        ".tok.read": "border-width:1px 1px 3px;border-color:currentColor",
        ".gap": "align-self:center;opacity:.78;font-size:11px;padding:0 4px",
        ".at": f"display:none;order:1;flex:1 0 100%;border-top:1px solid {_LINE};"
        "margin-top:5px;padding-top:5px",
        ".tok:has(input:checked)+.at": "display:block!important",
        ".at .grids": "display:flex;flex-wrap:wrap;gap:4px 32px",
        ".scale": "display:inline-block;width:110px;height:9px;vertical-align:middle;"
        f"border:1px solid {_LINE};margin:0 6px",
    }.items()
)
