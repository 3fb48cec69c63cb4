"""``tl-neuron-attr evaluate``: what becomes of answers without each method's best neurons."""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tl_neuron_attr.cli.options import (
    AsJson,
    Bos,
    Device,
    ModelName,
    WeightDtype,
    command_line,
    errors_in_one_sentence,
    load,
)
from tl_neuron_attr.cli.terminal import WIDTH, model_line, print_table, show_written
from tl_neuron_attr.display import decimals
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.evaluate import ALL_TYPES, By, Evaluation
from tl_neuron_attr.evaluate import evaluate as evaluate_methods
from tl_neuron_attr.evaluate.request import chosen_kinds, chosen_methods, chosen_tops
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.host import open_host
from tl_neuron_attr.knowledge import load_prompts
from tl_neuron_attr.methods import METHODS
from tl_neuron_attr.tables import records

_METRIC_NAMES = {"reciprocal_rank": "MRR", "prob": "probability", "log_prob": "log p"}
_TYPES_SHOWN = 6
_KIND_NAMES = {
    "ffn": "FFN neurons",
    "attn": "attention neurons",
    "both": "FFN neurons and as many attention neurons",
}


def evaluate(
    context: typer.Context,
    prompts: Annotated[
        str,
        typer.Option(
            help="language, capital, country, color, number, month; all; paper (every fact in two "
            "wordings); or a .jsonl, .csv or .json file or a folder."
        ),
    ] = "paper",
    model: ModelName = "tiny-facts",
    methods: Annotated[
        str,
        typer.Option(
            help="Names or letters: a,b,gradient_activation; all; or package.module:function of "
            "your own. Controls stand beside the first."
        ),
    ] = "a,b,c,d,e,f,g,h",
    neurons: Annotated[
        str, typer.Option(help="ffn, attn, or both (so many of each); or several: ffn,attn.")
    ] = "ffn",
    top: Annotated[
        str, typer.Option(help="How many neurons are zeroed; several for curves: 10,30,100.")
    ] = "10",
    limit: Annotated[
        int | None, typer.Option(help="At most so many prompts, drawn evenly from the types.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of all that is drawn. Same seed and batch size, same bytes.")
    ] = 0,
    unfiltered: Annotated[
        bool, typer.Option("--unfiltered", help="Also prompts whose answer the model misses.")
    ] = False,
    correlate: Annotated[
        bool,
        typer.Option(
            "--correlate", help="Rank correlation with exact ablation: a run for every neuron."
        ),
    ] = False,
    by: Annotated[
        str,
        typer.Option(
            help="What intervals draw on screen and in JSON: prompt, or fact with all its prompts."
        ),
    ] = "prompt",
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 32,
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Directory for effects.parquet, summary and other tables."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What becomes of the answers without the best neurons of each method, beside controls.

    Example: tl-neuron-attr evaluate --prompts capital --methods a,b,d --limit 20 --out results
    """
    with errors_in_one_sentence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shown below, from the result
        chosen = _methods(methods)
        kinds, tops = chosen_kinds(neurons), chosen_tops(_numbers(top))
        intervals = _by(by)
        if out is not None:
            check_writable(out)
        load_prompts(prompts)  # what is wrong with a file comes before the model
        loaded = load(model, device, dtype)
        found = evaluate_methods(
            loaded,
            prompts,
            chosen,
            neurons=kinds,
            top=tops,
            limit=limit,
            seed=seed,
            filtered=not unfiltered,
            correlate=correlate,
            prepend_bos=bos,
            batch_size=batch_size,
            progress=sys.stderr.isatty(),
        )
        if out is not None:
            found.save(out, report=True, again=command_line(context))
        if as_json:
            print(json.dumps(_as_json(found, model, intervals), allow_nan=False))
        else:
            _show(found, open_host(loaded), model, intervals, out)


# --- what is asked ----------------------------------------------------------------------------


def _methods(text: str) -> list[Any]:
    """Names, letters, and functions of the user's own, once all are known to be there."""
    if text == "all":
        return list(METHODS)
    given: list[Any] = [name.strip() for name in text.split(",") if name.strip()]
    given = [_function(name) if ":" in name else name for name in given]
    chosen_methods(given)
    return given


def _function(name: str) -> Any:
    """The function ``package.module:function``, its package looked for in the directory too."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise InputError(f"cannot import the method {name!r}: {error}") from error
    if not callable(found):
        raise InputError(f"{name!r} is no function that could be a method")
    return found


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(
            f"--top must be numbers separated by commas, like 10,30,100; got {text!r}"
        ) from None


def _by(name: str) -> By:
    if name == "prompt" or name == "fact":
        return name
    raise InputError(f"--by must be prompt or fact, got {name!r}")


# --- what is shown ----------------------------------------------------------------------------


def _as_json(found: Evaluation, model: str, by: By) -> dict[str, Any]:
    tables = {
        "summary": found.summary(by=by),
        "areas": found.areas(by=by),
        "comparisons": found.comparisons(by=by),
        "calibration": found.calibration(),
        "skipped": found.skipped,
    }
    if not found.correlations.empty:
        tables["rank_correlation"] = found.rank_correlation(by=by)
    return {
        "model": model,
        "facts": dict(found.facts),
        "by": by,
        **{name: records(table) for name, table in tables.items()},
    }


def _show(found: Evaluation, host: Any, model: str, by: By, out: Path | None) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    facts = found.facts
    asked = facts["prompts"]
    console.print(model_line(host, model))
    console.print(
        f"[bold]Prompts[/]  {asked['measured']:,} measured, of {asked['kept']:,} kept and "
        f"{asked['dropped']:,} left out"
    )
    print_table(console, _count_table(asked["counts"]))
    summary, tops = records(found.summary(by=by)), facts["tops"]
    for kind in facts["kinds"]:
        rows = [row for row in summary if row["kind"] == kind]
        whole = [row for row in rows if row["knowledge_type"] == ALL_TYPES]
        if len(tops) == 1:
            console.print(f"\n[bold]Without the top {tops[0]} {_KIND_NAMES[kind]}[/]")
            print_table(console, _effect_table(found, whole, _q(found, kind, by, area=False)))
        else:
            console.print(
                f"\n[bold]Probability of the answer without the top N {_KIND_NAMES[kind]}[/]"
            )
            areas = [row for row in records(found.areas(by=by)) if row["kind"] == kind]
            print_table(console, _curve_table(found, whole, areas, _q(found, kind, by, area=True)))
        console.print(_legend(found, by, len(tops) > 1), style="dim")
        if len({row["knowledge_type"] for row in rows}) > 2:
            console.print(f"\n[bold]Probability by knowledge type[/], top {tops[-1]}")
            print_table(console, _type_table(found, rows))
    _show_calibration(console, found)
    if not found.correlations.empty:
        console.print("\n[bold]Rank correlation with exact ablation[/], over all neurons")
        print_table(console, _correlation_table(found.rank_correlation(by=by)))
    for name, count in facts["without"].items():
        first = next(row["reason"] for row in records(found.skipped) if row["method"] == name)
        console.print(
            f"[yellow]Note:[/] {escape(name)} could not be used on {count} of "
            f"{asked['measured']:,} prompts; the first: {escape(first)}"
        )
    for message in [*facts["warnings"], *facts["model_warnings"]]:
        console.print(f"[yellow]Warning:[/] {escape(message)}")
    if out is not None:
        files = (
            "effects.parquet, summary (.parquet, .csv), curves, areas, comparisons, predicted, "
            "rankings, calibration, prompts, skipped and evaluation.json"
        )
        show_written(console, files, out)


def _count_table(counts: Sequence[dict[str, Any]]) -> Table:
    table = _table(["type", "asked", "one token", "in the top", "kept"])
    for row in counts:
        numbers = (row[name] for name in ("asked", "one_token", "in_top", "kept"))
        table.add_row(escape(row["knowledge_type"]), *(f"{number:,}" for number in numbers))
    return table


Rows = Sequence[dict[str, Any]]


def _effect_table(found: Evaluation, rows: Rows, q: dict[str, str]) -> Table:
    """One line a method: the means of the three metrics with intervals, and q."""
    cells = {(row["method"], row["metric"]): row for row in rows}
    table = _table(["", *_METRIC_NAMES.values(), "q"])
    for number, method in enumerate(_measured(found, rows)):
        of_method = [cells[method, metric] for metric in _METRIC_NAMES]
        if number == 0:
            table.add_row("as it is", *(_number(row["before"]) for row in of_method), "")
        with_ends = (
            _interval(row["after"], row["after_low"], row["after_high"]) for row in of_method
        )
        table.add_row(escape(method), *with_ends, q.get(method, ""))
    return table


def _curve_table(found: Evaluation, rows: Rows, areas: Rows, q: dict[str, str]) -> Table:
    """One line a method: the mean probability by number of neurons, the area, and q."""
    cells = {(row["method"], row["top"]): row for row in rows if row["metric"] == "prob"}
    area_of = {
        row["method"]: _interval(row["area"], row["low"], row["high"])
        for row in areas
        if row["metric"] == "prob" and row["knowledge_type"] == ALL_TYPES
    }
    tops = found.facts["tops"]
    table = _table(["N", "0", *map(str, tops), "area", "q"])
    for method in _measured(found, rows):
        before = cells[method, tops[0]]["before"]
        after = [cells[method, top]["after"] for top in tops]
        numbers = map(_number, (before, *after))
        table.add_row(escape(method), *numbers, area_of[method], q.get(method, ""))
    return table


def _type_table(found: Evaluation, rows: Rows) -> Table:
    """One line a method, one column a knowledge type: the mean probability at the largest N."""
    top = found.facts["tops"][-1]
    cells = {
        (row["method"], row["knowledge_type"]): row
        for row in rows
        if row["metric"] == "prob" and row["top"] == top
    }
    types = list(dict.fromkeys(name for _, name in cells if name != ALL_TYPES))
    shown = types[:_TYPES_SHOWN]
    table = _table(["", *map(escape, shown)])
    for number, method in enumerate(_measured(found, rows)):
        of_method = [cells.get((method, name)) for name in shown]
        columns = {"as it is": "before"} if number == 0 else {}
        for label, column in (columns | {escape(method): "after"}).items():
            table.add_row(
                label, *("-" if row is None else _number(row[column]) for row in of_method)
            )
    if len(types) > len(shown):
        table.caption = f"and of {len(types) - len(shown)} more"
    return table


def _measured(found: Evaluation, rows: Rows) -> list[str]:
    """The methods there are rows of, in the order asked for, controls last."""
    there = {row["method"] for row in rows}
    return [method for method in found.methods if method in there]


def _show_calibration(console: Console, found: Evaluation) -> None:
    rows = [row for row in records(found.calibration()) if row["unit"] == "nats"]
    if not rows:
        return
    console.print("\n[bold]Predicted and measured change of log p[/], nats, and over prompts")
    shown = _table(["", "zeroed", "predicted", "measured", "correlation", "slope"])
    for row in rows:
        names = ("predicted", "measured", "correlation", "slope")
        cells = ["-" if row[name] is None else f"{row[name]:+.2f}" for name in names]
        shown.add_row(escape(row["method"]), f"{row['top']} {row['kind']}", *cells)
    print_table(console, shown)


def _correlation_table(table: pd.DataFrame) -> Table:
    shown = _table(["", "neurons", "prompts", "Spearman"])
    for row in records(table):
        if row["knowledge_type"] != ALL_TYPES:
            continue
        interval = f"[{row['low']:+.2f}, {row['high']:+.2f}]"
        shown.add_row(
            escape(row["method"]),
            row["kind"],
            f"{row['prompts']:,}",
            f"{row['spearman']:+.2f} {escape(interval)}",
        )
    return shown


def _legend(found: Evaluation, by: By, curve: bool) -> str:
    drawn = "prompts" if by == "prompt" else "facts"
    area = "area: mean height of the curve over log(1 + N). " if curve else ""
    return (
        f"{area}Intervals: 95 %, over {drawn}. q: paired test against {found.methods[0]} by "
        f"{'area of ' if curve else ''}log p, false discoveries controlled. Controls are drawn "
        f"beside {found.facts['controls']['beside']}."
    )


def _q(found: Evaluation, kind: str, by: By, *, area: bool) -> dict[str, str]:
    """How sure it is that each method differs from the first."""
    table = found.comparisons(to=found.methods[0], metrics=["log_prob"], area=area, by=by)
    q = {row["method"]: row["q"] for row in records(table) if row["kind"] == kind}
    return {name: "<.001" if value < 0.001 else _number(value) for name, value in q.items()}


def _interval(mean: float, low: float, high: float) -> str:
    return escape(f"{_number(mean)} [{_ends(low)},{_ends(high)}]")


def _number(value: float | None) -> str:
    """Three digits that count, without the zero in front: ``.614``, ``-1.79``."""
    if value is None:
        return "-"
    digits = 2 if abs(value) >= 1 else 3
    return _bare(decimals(value, digits, sign=False))


def _ends(value: float) -> str:
    """Two of them."""
    return _bare(decimals(value, 1 if abs(value) >= 1 else 2, sign=False))


def _bare(shown: str) -> str:
    """A number without the zero in front of its point."""
    return shown.replace("0.", ".", 1) if shown.lstrip("-").startswith("0.") else shown


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    return table
