"""``tl-neuron-attr heads``: what becomes of an answer when each head in turn is zeroed."""

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tl_neuron_attr.attribute import attribute
from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.cli.options import (
    Against,
    AgainstId,
    AsJson,
    Bos,
    Device,
    ModelName,
    OutDirectory,
    Position,
    PromptText,
    TargetId,
    TargetText,
    TokenIds,
    WeightDtype,
    WholeDistribution,
    command_line,
    either,
    errors_in_one_sentence,
    load,
    prompt_of,
    target_of,
)
from tl_neuron_attr.cli.terminal import (
    WIDTH,
    model_line,
    print_table,
    records,
    show_written,
    target_line,
    token_line,
)
from tl_neuron_attr.display import decimals
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.interventions import head_scan
from tl_neuron_attr.report.heads import heads_page
from tl_neuron_attr.tables import Saved, head_scan_table, write_run


def heads(
    context: typer.Context,
    text: PromptText = None,
    model: ModelName = "tiny-facts",
    target: TargetText = None,
    target_id: TargetId = None,
    distribution: WholeDistribution = False,
    against: Against = None,
    against_id: AgainstId = None,
    position: Position = -1,
    top: Annotated[int, typer.Option(help="Heads to show, those that help most first.")] = 10,
    tokens: TokenIds = None,
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    out: OutDirectory = None,
    as_json: AsJson = False,
) -> None:
    """Zero each head in turn, and see by how much the answer's log-probability changes.

    Example: tl-neuron-attr heads "The capital of France is"
    """
    with errors_in_one_sentence():
        prompt = prompt_of(
            text,
            tokens,
            bos,
            position,
            target_of(target, target_id, distribution),
            either("--against", against, against_id),
        )
        if top < 1:
            raise InputError(f"--top must be at least 1, got {top}")
        directory = None if out is None else check_writable(out)
        loaded = load(model, device, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shown below, from the result
            result = attribute(loaded, prompt, top=1)
        changes = head_scan_table(head_scan(result.host, result.captured, result.target))
        table = changes.assign(score=result.heads()["score"])
        if directory is not None:
            _save(result, table, command_line(context), directory)
        if as_json:
            print(json.dumps(_as_json(result, model, table), allow_nan=False))
        else:
            _show(result, model, table, top, directory)


def _save(result: Attribution, table: pd.DataFrame, again: str, directory: Path) -> None:
    """Write ``heads.parquet``, ``report.html`` and ``run.json``: all of them, or none."""
    found = {"command": "heads", **result.facts(), "again": again}
    page = heads_page(Saved(tables={"heads": table}, facts=found))
    facts = json.dumps(found, indent=2, ensure_ascii=False)
    write_run(directory, {"heads": table}, {"report.html": page, "run.json": facts + "\n"})


def _as_json(result: Attribution, model: str, table: pd.DataFrame) -> dict[str, Any]:
    prompt = result.captured.prompt
    return {
        "model": model,
        "prompt": prompt.text,
        "tokens": list(prompt.token_texts),
        "read_pos": prompt.read_pos,
        "target": {**result.target.facts(), "log_prob": result.log_prob},
        "heads": records(table),
        "warnings": list(result.warnings),
    }


def _show(
    result: Attribution, model: str, table: pd.DataFrame, top: int, directory: Path | None
) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    prompt = result.captured.prompt
    console.print(model_line(result.host, model))
    console.print(token_line(prompt.token_texts, prompt.read_pos))
    console.print(target_line(result))
    shown = table.sort_values("change", kind="stable").head(top)
    console.print(
        f"\n[bold]Change of {result.target.quantity}, nats[/], when a head alone is zeroed: the "
        f"lowest {len(shown)} of {len(table)}"
    )
    lines = Table(box=None, pad_edge=False, header_style="dim")
    lines.add_column("head")
    lines.add_column("change", justify="right", no_wrap=True)
    lines.add_column("own rise", justify="right", no_wrap=True)
    for row in records(shown):
        label = f"L{row['layer']}.H{row['head']}"
        lines.add_row(label, decimals(row["change"]), decimals(row["score"]))
    print_table(console, lines)
    console.print("[dim]own rise: what the head itself adds to the target, nothing zeroed[/]")
    for message in result.warnings:
        console.print(f"[yellow]Warning:[/] {escape(message)}")
    if directory is not None:
        show_written(console, "heads.parquet and run.json", directory)
