"""Is this a table that can be drawn: said in one sentence, before anything is."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.views.style import KIND_NAMES


def checked(
    table: pd.DataFrame,
    name: str,
    columns: Sequence[str],
    *,
    key: list[str] | None,
    value: str | None = "score",
    source: str | None = None,
) -> pd.DataFrame:
    """``table`` in order of its ``key``, once it is known to be one that can be drawn.

    ``value`` is a column that must be finite, if any. ``source`` says where such a table comes
    from, by default the method of ``Attribution`` of its name.

    Raises:
        InputError: If it lacks columns, is empty, is not finite, or has two rows for one key.
    """
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(
            f"a {name} table has the columns {', '.join(columns)}; this one lacks "
            f"{', '.join(missing)}: give the table of {source or f'Attribution.{name}()'}"
        )
    if table.empty:
        raise InputError(f"the {name} table has no rows: there is nothing to draw")
    if value is not None:
        bad = int((~np.isfinite(table[value].to_numpy(dtype=float))).sum())
        if bad:
            raise InputError(f"{bad} {value}s of the {name} table are not finite; drop those rows")
    return table if key is None else unique(table, name, key)


def unique(table: pd.DataFrame, name: str, key: list[str]) -> pd.DataFrame:
    """``table`` in order of its ``key``.

    Raises:
        InputError: If two rows have the same.
    """
    twice = table.loc[table.duplicated(key), key]
    if len(twice):
        where = ", ".join(f"{column} {twice.iloc[0][column]}" for column in key)
        raise InputError(
            f"the {name} table has more than one row for {where}; give the {name} of one prompt, "
            f"or average them first with groupby({key})"
        )
    return table.sort_values(key, kind="stable")


def kinds_of(table: pd.DataFrame) -> list[str]:
    """The kinds in ``table``, in the order they act in a block."""
    found = set(table["kind"].tolist())
    unknown = sorted(str(kind) for kind in found - set(KIND_NAMES))
    if unknown:
        raise InputError(f"kind must be one of {', '.join(KIND_NAMES)}, got {', '.join(unknown)}")
    return [kind for kind in KIND_NAMES if kind in found]


def one_role(neurons: pd.DataFrame) -> str:
    """The role (value or query) that all neurons of a table have.

    Raises:
        InputError: If they have several.
    """
    roles = sorted(str(role) for role in neurons["role"].unique())
    if len(roles) > 1:
        raise InputError(
            f"the neurons table mixes the roles {', '.join(roles)}; draw one at a time, for "
            f"example neurons[neurons['role'] == {roles[0]!r}]"
        )
    return roles[0]
