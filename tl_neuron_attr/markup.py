"""How it reads in HTML: numbers, tokens and tables -> markup, safe whatever the tokens are.

Text from a model or a user is escaped, and what it has that cannot be seen is made visible. Nothing
here needs a script, a style sheet or a network: pages bring theirs along (``report/``).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tl_neuron_attr.display import cell, escaped, number
from tl_neuron_attr.tables import records

__all__ = ["Shown", "cell", "escaped", "number", "table"]


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
