"""``tl-neuron-attr prompts``: which prompts there are, and which of them a model knows."""

import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tl_neuron_attr.attribution import versions
from tl_neuron_attr.cli.options import (
    AsJson,
    Bos,
    Device,
    WeightDtype,
    command_line,
    errors_in_one_sentence,
    load,
)
from tl_neuron_attr.cli.terminal import WIDTH, print_table, records, show_written
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.host import model_facts, open_host
from tl_neuron_attr.knowledge import (
    KnownPrompts,
    known_prompts,
    load_prompts,
    prompt_table,
    save_prompts,
)
from tl_neuron_attr.knowledge.facts import KnowledgePrompt
from tl_neuron_attr.knowledge.known import Reason
from tl_neuron_attr.report.prompts import prompts_page

_HEADS = {"knowledge_type": "type", "one_token": "one token", "in_top": "among the top"}


def prompts(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="A knowledge type (language, capital, country, color, number, month), all, paper "
            "(every fact in two wordings), triviaqa:SPLIT, or a .jsonl, .csv or .json file."
        ),
    ] = "paper",
    model: Annotated[
        str | None,
        typer.Option(
            help="Ask this model, and keep what it knows: tiny-facts, a directory, a hub name.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(help="Among how many most probable tokens the answer must be.")
    ] = 10,
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl file for the prompts, with --model those kept, with a report beside it."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Which prompts there are by type; with --model which it knows, and why others fall out.

    Example: tl-neuron-attr prompts capital --model tiny-facts --out known.jsonl
    """
    with errors_in_one_sentence():
        if out is not None:
            if out.suffix != ".jsonl":
                raise InputError(f"--out must be a .jsonl file, got {str(out)!r}")
            check_writable(out.parent)
        known = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            asked = load_prompts(source)
        messages = [str(warning.message) for warning in caught]
        made_with: dict[str, Any] = {"versions": versions()}
        if model is not None:
            loaded = load(model, device, dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # shown below, from the result
                known = known_prompts(
                    loaded, asked, top=top, prepend_bos=bos, progress=sys.stderr.isatty()
                )
            messages += known.warnings
            if out is not None:
                made_with["model"] = model_facts(open_host(loaded))
        table = prompt_table(asked) if known is None else known.counts()
        if out is not None:
            found = {
                "command": "prompts",
                **_as_json(source, model, table, known, messages),
                "kept": _kept(asked, known),
                "made_with": made_with,
                "again": command_line(context),
            }
            save_prompts(
                asked if known is None else [each.prompt for each in known.kept],
                out,
                {
                    _beside(out, "report.html"): prompts_page(found),
                    _beside(out, "run.json"): json.dumps(found, indent=2, ensure_ascii=False)
                    + "\n",
                },
            )
        if as_json:
            print(json.dumps(_as_json(source, model, table, known, messages), allow_nan=False))
        else:
            _show(source, model, table, known, messages, out)


def _beside(out: Path, ending: str) -> str:
    """What a file beside the prompts is called: in one directory there may be several sets."""
    return f"{out.stem}.{ending}"


def _as_json(
    source: str,
    model: str | None,
    table: pd.DataFrame,
    known: KnownPrompts | None,
    messages: list[str],
) -> dict[str, Any]:
    found = {"source": source, "types": records(table), "warnings": messages}
    if known is None:
        return found
    return {**found, "model": model, "top": known.top, "dropped": records(known.reasons())}


def _kept(asked: Sequence[KnowledgePrompt], known: KnownPrompts | None) -> list[dict[str, Any]]:
    """The prompts written to the file, and what the model makes of them if one was asked."""
    if known is None:
        return [_prompt(prompt) for prompt in asked]
    return [
        {**_prompt(each.prompt), "prob": math.exp(each.log_prob), "rank": each.rank}
        for each in known.kept
    ]


def _prompt(prompt: KnowledgePrompt) -> dict[str, Any]:
    return {
        "prompt_id": prompt.prompt_id,
        "knowledge_type": prompt.fact.knowledge_type,
        "text": prompt.text,
        "answer": prompt.answer,
    }


def _show(
    source: str,
    model: str | None,
    table: pd.DataFrame,
    known: KnownPrompts | None,
    messages: list[str],
    out: Path | None,
) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    of_model = "" if model is None else f", asked of {escape(model)}"
    console.print(f"[bold]Prompts[/]  {escape(source)}{of_model}\n")
    lines = Table(box=None, pad_edge=False, header_style="dim")
    for name in table.columns:
        text = name == "knowledge_type"
        lines.add_column(_HEADS.get(str(name), str(name)), justify="left" if text else "right")
    for row in records(table):
        cells = [f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()]
        lines.add_row(*map(escape, cells), style="bold" if row["knowledge_type"] == "all" else "")
    print_table(console, lines)
    if known is not None:
        _show_reasons(console, known)
    for message in messages:
        console.print(f"[yellow]Warning:[/] {escape(message)}")
    if out is not None:
        show_written(
            console,
            f"{out.name} and {_beside(out, 'run.json')}",
            out.parent,
            page=_beside(out, "report.html"),
        )


def _show_reasons(console: Console, known: KnownPrompts) -> None:
    console.print(f"\n{escape(known.summary())}")
    fell_out = known.reasons()
    for reason in get_args(Reason):
        some = fell_out[fell_out["reason"] == reason]
        if len(some):
            console.print(f"\n[bold]{reason}[/]: {len(some):,} prompts, for example")
        for row in records(some.iloc[:: max(1, len(some) // 3)].head(3)):
            console.print(f"  {escape(row['text'])}\n    [dim]{escape(row['detail'])}[/]")
