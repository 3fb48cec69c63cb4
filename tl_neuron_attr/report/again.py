"""Which page a directory has: what a command or ``save`` left there -> its page, drawn anew."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.evaluate import load_evaluation
from tl_neuron_attr.files import check_writable, write_files
from tl_neuron_attr.report.asked import Facts
from tl_neuron_attr.report.card import card_page
from tl_neuron_attr.report.comparison import comparison_page
from tl_neuron_attr.report.evaluation import evaluation_page
from tl_neuron_attr.report.graph import graph_page
from tl_neuron_attr.report.heads import heads_page
from tl_neuron_attr.report.in_context import in_context_page
from tl_neuron_attr.report.prompts import prompts_page
from tl_neuron_attr.report.query import query_page
from tl_neuron_attr.tables import Saved

Page = Callable[[Saved], str]

OF_RUNS: Mapping[str, tuple[tuple[str, ...], Page]] = {
    "query": (("query_layers", "query_heads", "query_neurons", "query_values"), query_page),
    "compare": (("layers", "heads", "neurons"), comparison_page),
    "heads": (("heads",), heads_page),
    "in-context": (("heads", "label_positions", "inputs"), in_context_page),
}
"""Of each command that writes ``run.json``: the tables it writes, and their page."""


def page_of(directory: str | Path) -> str:
    """The ``report.html`` of a directory of tables, drawn from its files: the same bytes.

    Of the prompts in a ``.jsonl`` file what stands beside it.


    Raises:
        InputError: If no command or ``save`` that has a page wrote there, or files are missing.
    """
    place = Path(directory)
    try:
        if place.suffix == ".jsonl":
            return prompts_page(_json(place.with_suffix(".run.json")))
        if (place / "run.json").exists():
            facts = _json(place / "run.json")
            if facts.get("command") not in OF_RUNS:
                raise InputError(
                    f"{str(place / 'run.json')!r} does not say that it is of "
                    f"{', '.join(OF_RUNS)}; have the command write the directory again"
                )
            names, drawn = OF_RUNS[facts["command"]]
            return drawn(_saved(place, names, facts))
        if (place / "evaluation.json").exists():
            return evaluation_page(load_evaluation(place))
        if (place / "card.json").exists():
            return card_page(_json(place / "card.json"))
        if (place / "graph.json").exists():
            facts = _json(place / "graph.json")["graph"]
            return graph_page(_saved(place, ("nodes", "edges"), facts))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"cannot draw the report of {str(place)!r}: {error}; have the command write it again"
        ) from error
    raise InputError(
        f"there is nothing to draw a report of in {str(place)!r}: give the --out directory of a "
        "command"
    )


def draw_again(directory: str | Path) -> Path:
    """Write ``report.html`` of a directory anew, and say where it is."""
    place = Path(directory)
    prompts = place.suffix == ".jsonl"
    check_writable(place.parent if prompts else place)
    text = page_of(place)
    page = place.with_suffix(".report.html") if prompts else place / "report.html"
    write_files(page.parent, {page.name: lambda path: path.write_text(text, encoding="utf-8")})
    return page


def _saved(place: Path, names: tuple[str, ...], facts: Facts) -> Saved:
    tables = {name: pd.read_parquet(place / f"{name}.parquet") for name in names}
    return Saved(tables=tables, facts=facts)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
