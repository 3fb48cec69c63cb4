"""How it reads in HTML: numbers, tokens and tables -> markup, safe whatever the tokens are.

Text from a model or a user is escaped, and what it has that cannot be seen is made visible. Nothing
here needs a script, a style sheet or a network: pages bring theirs along (``report/``).
"""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tl_neuron_attr.prompts import visible
from tl_neuron_attr.tables import records


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One table as the page shows it."""

    caption: str
    table: pd.DataFrame
    columns: Mapping[str, str]
    """Which columns, and what each is called; a name that begins with ``*`` is published."""


# --- tables -----------------------------------------------------------------------------------


def table(shown: Shown) -> str:
    """A ``<table>`` in a box of its own, which scrolls sideways where it is too wide."""
    known = {name: label for name, label in shown.columns.items() if name in shown.table}
    rows = pd.DataFrame(shown.table, columns=[*known])
    for name in known:  # means of counts that are all the same are counts
        cells = rows[name].tolist()
        if all(isinstance(cell, float) and cell.is_integer() for cell in cells):
            rows = rows.assign(**{name: [int(cell) for cell in cells]})
    numeric = {
        name
        for name in known
        if pd.api.types.is_numeric_dtype(rows[name].dtype)
        and not pd.api.types.is_bool_dtype(rows[name].dtype)
    }

    def classes(name: str) -> str:
        found = ["num"] * (name in numeric) + ["pub"] * known[name].startswith("*")
        return f' class="{" ".join(found)}"' if found else ""

    head = "".join(
        f'<th scope="col"{classes(name)}>{escaped(label.removeprefix("*"))}</th>'
        for name, label in known.items()
    )
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{classes(name)}{_exact(row[name])}>{cell(row[name])}</td>" for name in known)
        + "</tr>"
        for row in records(rows)
    )
    return (
        f'<div class="wide" tabindex="0"><table><caption>{escaped(shown.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _exact(value: Any) -> str:
    """What the cell is sorted by, where what it shows is rounded."""
    rounded = isinstance(value, float) and value != 0 and math.isfinite(value)
    return f' data-v="{value:.9g}"' if rounded else ""


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
        return " ".join(f"<code>{escaped(visible(str(each)))}</code>" for each in value)
    return escaped(str(value))


def number(value: float) -> str:
    """Three significant digits, and a real minus sign."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    if digits > 6:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def escaped(text: str) -> str:
    """Text as HTML shows it: what cannot be seen is made visible, and nothing is markup."""
    shown = "".join(char if char == " " else visible(char) for char in text)
    return html.escape(shown, quote=True)
