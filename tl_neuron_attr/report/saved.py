"""A directory that ``Attribution.save`` wrote -> the same values as the result gave."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.tables import (
    HEAD_COLUMNS,
    LAYER_COLUMNS,
    LOG_PROB_COLUMNS,
    NEURON_COLUMNS,
    POSITION_COLUMNS,
    SHARE_COLUMNS,
    Saved,
)

_TOKENS = ("source_token", "raises", "lowers")
_TABLES: dict[str, tuple[str, ...]] = {
    "layers": LAYER_COLUMNS,
    "heads": HEAD_COLUMNS,
    "positions": POSITION_COLUMNS,
    "neurons": (*NEURON_COLUMNS, *_TOKENS, "position"),
}
_SOMETIMES: dict[str, tuple[str, ...]] = {
    "log_probs": LOG_PROB_COLUMNS,
    "suppressing": (*NEURON_COLUMNS, *_TOKENS),
    "shares": SHARE_COLUMNS,
}
_FACTS = {
    "prompt_id": str,
    "tokens": list,
    "token_texts": list,
    "read_pos": int,
    "target": dict,
    "predictions": list,
    "convention": str,
    "neuron_basis": dict,
    "model": dict,
    "certificates": dict,
    "versions": dict,
    "seconds": (int, float),
    "warnings": list,
}

Cards = Sequence[Mapping[str, Any]]
"""Neuron cards as plain values, as ``cards.json`` holds them."""


def read_saved(directory: str | Path) -> tuple[Saved, Cards]:
    """What is saved of an attribution: tables, facts, and the cards where there are any.

    Raises:
        InputError: If something is missing or damaged, is of another command or prompt, or was
            written by a version that saved less.
    """
    place = Path(directory)
    facts = _json(place / "run.json", place)
    for name, kind in _FACTS.items():
        if not isinstance(facts, dict) or not isinstance(facts.get(name), kind):
            raise InputError(
                f"run.json in {str(place)!r} has no {name!r} as attribute writes it: it is of "
                "another command or an older version; attribute the prompt again with --out"
            )
    present = [name for name in _SOMETIMES if (place / f"{name}.parquet").exists()]
    columns = {**_TABLES, **{name: _SOMETIMES[name] for name in present}}
    tables = {name: _table(place, name, wanted) for name, wanted in columns.items()}
    _check_one_run(place, tables, facts)
    cards: Any = {"cards": []}
    if (place / "cards.json").exists():
        cards = _json(place / "cards.json", place)
        if not isinstance(cards, dict) or not isinstance(cards.get("cards"), list):
            raise InputError(f"cards.json in {str(place)!r} holds no cards; remove it")
    return Saved(tables=tables, facts=facts), cards["cards"]


def is_saved(directory: Path) -> bool:
    """Whether a run was saved there."""
    return (directory / "run.json").is_file()


def _json(path: Path, place: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"there is no {path.name} in {str(place)!r}; give a directory that attribute --out "
            "or result.save wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path.name} in {str(place)!r}: {_reason(error)}") from None


def _table(place: Path, name: str, columns: Sequence[str]) -> pd.DataFrame:
    file = f"{name}.parquet"
    try:
        table = pd.read_parquet(place / file)
    except FileNotFoundError:
        raise InputError(
            f"there is no {file} in {str(place)!r}: it is of another command or not whole; "
            "attribute the prompt again with --out"
        ) from None
    except Exception as error:  # what pyarrow raises for a damaged file is of many kinds
        raise InputError(f"cannot read {file} in {str(place)!r}: {_reason(error)}") from None
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(
            f"{file} in {str(place)!r} lacks {', '.join(missing)}: it is of another command or an "
            "older version; attribute the prompt again with --out"
        )
    return table


def _check_one_run(
    place: Path, tables: Mapping[str, pd.DataFrame], facts: Mapping[str, Any]
) -> None:
    """Stop where a table is of another run than ``run.json``."""
    read = facts["read_pos"] + 1
    texts = facts["token_texts"][:read]
    alien = []
    if set(tables["neurons"]["prompt_id"]) - {facts["prompt_id"]}:
        alien.append("neurons")
    if tables["positions"]["token"].tolist()[:read] != texts or len(tables["positions"]) != read * (
        len(tables["heads"])
    ):
        alien.append("positions")
    if "log_probs" in tables:
        found = tables["log_probs"].drop_duplicates("position").sort_values("position")
        if found["token"].tolist() != texts:
            alien.append("log_probs")
    if len(set(tables["layers"]["layer"])) != len(set(tables["heads"]["layer"])):
        alien.append("layers")
    if alien:
        raise InputError(
            f"{alien[0]}.parquet in {str(place)!r} is not of the run that run.json is of; "
            "attribute the prompt again with --out"
        )


def _reason(error: BaseException) -> str:
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(told).splitlines()[0]
