"""Tables in a notebook: DataFrames -> grids with visible tokens, neurons' names, bars and units.

``styled`` wraps a table for showing and leaves the table what it is. It knows the columns of this
package's tables; others are shown under their own name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from tl_neuron_attr.display import Grid, box, grid
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Head
from tl_neuron_attr.prompts import at_least_one
from tl_neuron_attr.tables import records

_PLACE = ("kind", "layer", "head", "index", "source_pos")
_NAMES = {
    "score": "score, nats",
    "other_score": "other, nats",
    "difference": "difference, nats",
    "change": "change, nats",
    "zeroed": "zeroed, nats",
    "log_prob": "log p, nats",
    "log_prob_difference": "log p difference, nats",
    "contrast": "contrast, nats",
    "contrast_1": "from first, nats",
    "contrast_2": "from second, nats",
    "prob": "p",
    "source_token": "source",
    "knowledge_type": "type",
    "one_token": "one token",
    "in_top": "among the top",
    "rank": "#",
}
_BARS = ("score", "difference", "change", "contrast")
_DULL = ("prompt_id", "role", "raised_by", "lowered_by")


@dataclass(frozen=True, kw_only=True)
class Styled:
    """A table as a notebook shows it; the DataFrame itself is ``table``."""

    table: pd.DataFrame = field(repr=False)
    caption: str = ""
    top: int = 30
    """How many rows are shown."""
    tokens: int = 5
    """How many tokens of a list are shown."""
    columns: tuple[str, ...] | None = None
    """Which columns; by default all that are not the same in every row."""

    def __repr__(self) -> str:
        rows, columns = self.table.shape
        return f"Styled({rows:,} rows of {columns} columns; .table is the DataFrame)"

    def _repr_html_(self) -> str:
        asked = {"top": self.top, "tokens": self.tokens, "columns": self.columns}
        return box("", grid(grid_of(self.table, self.caption, **asked)))


def styled(
    table: pd.DataFrame,
    caption: str = "",
    *,
    top: int = 30,
    tokens: int = 5,
    columns: Sequence[str] | None = None,
) -> Styled:
    """A table of this package to look at in a notebook: the ``top`` first rows, in their order.

    The columns that say which neuron or head a row is about become its name, tokens are shown with
    their spaces, scores with a bar and a unit. Columns that are empty are left out, or those that
    are not among ``columns``.

    Raises:
        InputError: If ``top`` or ``tokens`` is not at least 1.
    """
    return Styled(
        table=table,
        caption=caption,
        top=at_least_one(top, "top"),
        tokens=at_least_one(tokens, "tokens"),
        columns=None if columns is None else tuple(columns),
    )


def grid_of(
    table: pd.DataFrame,
    caption: str = "",
    *,
    top: int = 30,
    tokens: int = 5,
    columns: Sequence[str] | None = None,
) -> Grid:
    """The first rows of a table as a grid: see ``styled``."""
    rows = records(table.head(top))
    names = [str(name) for name in table.columns] if columns is None else list(columns)
    label = _labelled(table)
    if label is not None:
        names = [name for name in names if name not in _PLACE or name not in label]
    names = [
        name
        for name in names
        if name in table.columns
        and (columns is not None or name not in _DULL)
        and any(row[name] is not None for row in rows)
    ]
    heads = [_NAMES.get(name, name.replace("_", " ")) for name in names]
    cells = [[row[name] for name in names] for row in rows]
    if label is not None:
        heads.insert(0, "neuron" if "index" in label else "head")
        cells = [[name_of(row), *each] for row, each in zip(rows, cells, strict=True)]
    return Grid(
        caption=caption,
        header=tuple(heads),
        rows=tuple(tuple(_plain(value, tokens) for value in each) for each in cells),
        bars=frozenset(
            place + (label is not None) for place, name in enumerate(names) if name in _BARS
        ),
        more=len(table) - len(rows),
    )


def name_of(row: dict[str, Any]) -> str:
    """The label of the neuron or head that a row is about; a query layer has its kind for one."""
    if row.get("index") is None:
        if row.get("head") is None:
            return str(row.get("kind") or "")
        return str(Head(row["layer"], row["head"]))
    if row.get("head") is None:
        return str(FFNNeuron(row["layer"], row["index"]))
    return str(AttnNeuron(row["layer"], row["head"], row["index"], row.get("source_pos")))


def _labelled(table: pd.DataFrame) -> tuple[str, ...] | None:
    """The columns that a row's label stands for; ``None`` if rows are about something else."""
    if {"layer", "head", "index"} <= {*table.columns}:
        return _PLACE
    if {"layer", "head"} <= {*table.columns}:
        return ("layer", "head")
    return None


def _plain(value: Any, tokens: int) -> Any:
    if isinstance(value, list) or hasattr(value, "tolist"):
        return tuple(str(each) for each in value[:tokens])
    return value
