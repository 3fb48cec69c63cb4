"""``tl-neuron-attr in-context``: the heads that carry the labels of a few-shot prompt."""

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tl_neuron_attr.attribute import attribute
from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.cards import as_head, check_head
from tl_neuron_attr.cli.options import (
    AsJson,
    Bos,
    ConventionName,
    Device,
    ModelName,
    OutDirectory,
    Position,
    PromptText,
    TargetId,
    TargetText,
    TokenIds,
    WeightDtype,
    command_line,
    convention_of,
    errors_in_one_sentence,
    load,
    prompt_of,
    target_of,
)
from tl_neuron_attr.cli.terminal import (
    WIDTH,
    model_line,
    print_table,
    show_written,
    target_line,
    token_line,
)
from tl_neuron_attr.display import decimals
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.host import open_host
from tl_neuron_attr.in_context import (
    InContextHeads,
    check_labels,
    head_inputs,
    in_context_heads,
)
from tl_neuron_attr.neurons import Head
from tl_neuron_attr.prompts import visible
from tl_neuron_attr.report.in_context import in_context_page
from tl_neuron_attr.tables import Saved, records, write_run
from tl_neuron_attr.targets import tokenize


def in_context(
    context: typer.Context,
    text: PromptText = None,
    labels: Annotated[
        tuple[str, str],
        typer.Option(help="The two labels, one token each (mind their leading spaces)."),
    ] = (" positive", " negative"),
    model: ModelName = "tiny-facts",
    target: TargetText = None,
    target_id: TargetId = None,
    head: Annotated[
        str | None,
        typer.Option(help="Show what this head reads, like L5.H2. Default: the best."),
    ] = None,
    scan: Annotated[
        bool, typer.Option("--scan/--no-scan", help="Zero each head in turn (slow).")
    ] = True,
    position: Position = -1,
    convention: ConventionName = "exact",
    top: Annotated[int, typer.Option(help="How many heads.")] = 10,
    tokens: TokenIds = None,
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    out: OutDirectory = None,
    as_json: AsJson = False,
) -> None:
    """The heads that carry the labels of a few-shot prompt to its answer.

    Example: tl-neuron-attr in-context "the color red, number two, the" --labels " color" " number"
    """
    with errors_in_one_sentence():
        prompt = prompt_of(text, tokens, bos, position, target_of(target, target_id), None)
        read_as = convention_of(convention)
        chosen = None if head is None else as_head(head)
        if top < 1:
            raise InputError(f"--top must be at least 1, got {top}")
        if out is not None:
            check_writable(out)
        loaded = load(model, device, dtype)
        host = open_host(loaded)
        if chosen is not None:
            check_head(host, chosen)
        check_labels(host, tokenize(host, prompt), labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shown below, from the result
            result = attribute(loaded, prompt, top=1, convention=read_as)
        found = in_context_heads(result, labels, top=top, scan=scan)
        if chosen is None:
            chosen = Head(int(found.heads.loc[0, "layer"]), int(found.heads.loc[0, "head"]))
        read_pos = result.captured.prompt.read_pos
        where = sorted({*found.label_positions[0], *found.label_positions[1], read_pos})
        inputs = head_inputs(result, chosen, where)
        facts = _as_json(result, model, found, chosen, inputs)
        if out is not None:
            tables = {"heads": found.heads, "label_positions": found.positions, "inputs": inputs}
            run = {
                "command": "in-context",
                **result.facts(),
                "in_context": {name: facts[name] for name in ("labels", "constant", "head")},
                "again": command_line(context),
            }
            texts = {
                "report.html": in_context_page(Saved(tables=tables, facts=run)),
                "in_context.json": _json(facts),
                "run.json": _json(run),
            }
            write_run(out, tables, texts)
        if as_json:
            print(json.dumps(facts, allow_nan=False))
        else:
            _show(result, model, found, chosen, inputs, out)


def _as_json(
    result: Attribution, model: str, found: InContextHeads, head: Head, inputs: pd.DataFrame
) -> dict[str, Any]:
    prompt = result.captured.prompt
    return {
        "model": model,
        "prompt": prompt.text,
        "tokens": list(prompt.token_texts),
        "read_pos": prompt.read_pos,
        "target": {**result.target.facts(), "log_prob": result.log_prob},
        "convention": result.convention,
        "labels": [
            {"id": label.id, "text": label.text, "positions": list(places)}
            for label, places in zip(found.labels, found.label_positions, strict=True)
        ],
        "constant": found.constant,
        "heads": records(found.heads),
        "label_positions": records(found.positions),
        "head": str(head),
        "inputs": records(inputs),
        "warnings": list(result.warnings),
    }


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _show(
    result: Attribution,
    model: str,
    found: InContextHeads,
    head: Head,
    inputs: pd.DataFrame,
    out: Path | None,
) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    prompt = result.captured.prompt
    console.print(model_line(result.host, model))
    console.print(token_line(prompt.token_texts, prompt.read_pos))
    console.print(target_line(result))
    for number, (label, places) in enumerate(
        zip(found.labels, found.label_positions, strict=True), start=1
    ):
        where = ", ".join(map(str, places))
        console.print(f"[bold]Label {number}[/]  {escape(visible(label.text))} at {where}")
    console.print(f"\n[bold]Heads[/], the best {len(found.heads)} by score, nats")
    print_table(console, _head_table(found))
    console.print(
        "[dim]score: rise in log p(target); zeroed: its change without the head; label 1 - 2: rise "
        "in log p(label 1) - log p(label 2), of the whole head and from the positions of each "
        "label; att.: the attention these are paid[/]"
    )
    console.print(f"\n[bold]{head} at the label positions[/]")
    print_table(console, _position_table(result, found, head))
    console.print(
        "[dim]M: log p(label 1) - log p(label 2) of what the head brings from there, read out "
        f"alone: of it {decimals(found.constant)} comes from the biases, the same everywhere; "
        "label 1 - 2: M without that[/]"
    )
    console.print(f"\n[bold]What {head} reads[/], by where it comes from")
    console.print(_input_table(inputs, prompt.read_pos, console.width))
    for message in result.warnings:
        console.print(f"[yellow]Warning:[/] {escape(message)}")
    if out is not None:
        files = "heads, label_positions, inputs (.parquet), in_context.json and run.json"
        show_written(console, files, out)


def _head_table(found: InContextHeads) -> Table:
    table = _table("head", "score", "zeroed", "label 1 - 2", "from 1", "from 2", "att. 1", "att. 2")
    for row in records(found.heads):
        zeroed = "" if row["zeroed"] is None else decimals(row["zeroed"])
        table.add_row(
            f"L{row['layer']}.H{row['head']}",
            decimals(row["score"]),
            zeroed,
            decimals(row["contrast"]),
            decimals(row["contrast_1"]),
            decimals(row["contrast_2"]),
            decimals(row["attention_1"], sign=False),
            decimals(row["attention_2"], sign=False),
        )
    return table


def _position_table(result: Attribution, found: InContextHeads, head: Head) -> Table:
    if not _of(found.positions, head):  # one that was asked for, and is not among the best
        n_heads = result.head_scores.numel()
        labels = [label.id for label in found.labels]
        found = in_context_heads(result, labels, top=n_heads, scan=False)
    table = _table("position", "attention", "M", "label 1 - 2", ">label")
    for row in _of(found.positions, head):
        table.add_row(
            str(row["source_pos"]),
            decimals(row["attention"], sign=False),
            decimals(row["log_prob_difference"]),
            decimals(row["contrast"]),
            Text(visible(row["label"])),
        )
    return table


def _of(table: pd.DataFrame, head: Head) -> list[dict[str, Any]]:
    return [row for row in records(table) if (row["layer"], row["head"]) == (head.layer, head.head)]


def _input_table(inputs: pd.DataFrame, read_pos: int, width: int) -> Table:
    tokens = max(8, (width - 58) // 2)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("position", "part", "norm", "share", "of value", "raises", "lowers"):
        table.add_column(
            name,
            justify="right" if name in ("norm", "share", "of value") else "left",
            width=tokens if name in ("raises", "lowers") else None,
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in records(inputs):
        what = "query" if row["position"] == read_pos else "key"
        first = row["part"] == "embed"
        table.add_row(
            Text(f"{row['position']}:{visible(row['token'])[:12]} ({what})" if first else ""),
            row["part"],
            "" if row["norm"] is None else f"{row['norm']:.2f}",
            decimals(row["share"], 2),
            decimals(row["value_share"], 2),
            Text(" ".join(map(visible, row["raises"]))),
            Text(" ".join(map(visible, row["lowers"]))),
        )
    return table


def _table(*names: str) -> Table:
    """Columns flush right but the first, and those whose name begins with ``>``."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, name in enumerate(names):
        left = place == 0 or name.startswith(">")
        table.add_column(name.lstrip(">"), justify="left" if left else "right", no_wrap=True)
    return table
