"""``tl-neuron-attr paper``: every table and figure of the paper for a model; ``paper check``."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, no_type_check

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tl_neuron_attr.cli.options import (
    Bos,
    Device,
    ModelName,
    WeightDtype,
    convention_of,
    errors_in_one_sentence,
    load,
)
from tl_neuron_attr.cli.terminal import WIDTH, print_table
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.paper import Paper, Settings, check_published, write_paper
from tl_neuron_attr.tables import records

paper_app = typer.Typer(
    invoke_without_command=True,
)


@paper_app.callback()
@no_type_check  # what typer passes as a context is not of the class it asks to be annotated
def write(
    context: typer.Context,
    model: ModelName = "tiny-facts",
    out: Annotated[
        Path | None,
        typer.Option(help="Directory to write to: new, or of this very run, which then goes on."),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            help="paper (every fact in two wordings), all, a knowledge type, or a file of prompts."
        ),
    ] = "paper",
    limit: Annotated[
        int | None,
        typer.Option(help="At most so many prompts, evenly from the knowledge types."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of random neurons, of the prompts drawn, and of the bootstrap.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts run, and kept, together.")] = 32,
    sample: Annotated[
        int, typer.Option(help="Prompts of each type whose total of all neurons is bounded.")
    ] = 10,
    example: Annotated[
        str | None,
        typer.Option(help="Prompt of the worked example. Default: the published notebooks'."),
    ] = None,
    convention: Annotated[
        str, typer.Option(help="exact, or published (as the paper's code).")
    ] = "exact",
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
) -> None:
    """Every table and figure of the paper for one model, published numbers beside them.

    Stopped, it goes on where it was when called again with the same arguments.

    Example: tl-neuron-attr paper --limit 12 --out paper-of-tiny-facts
    """
    if context.invoked_subcommand is not None:
        return
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with errors_in_one_sentence():
        if out is None:
            raise InputError("say where to write: --out DIR")
        settings = Settings(seed=seed, batch_size=batch_size, sample=sample, limit=limit)
        read_as = convention_of(convention)
        check_writable(out)
        loaded = load(model, device, dtype)
        with _stopped_in_one_sentence(out, console), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # announced, and on the page
            found = write_paper(
                loaded,
                out,
                prompts=prompts,
                name=model,
                settings=settings,
                convention=read_as,
                prepend_bos=bos,
                example=example,
                announce=lambda line: console.print(_announced(line)),
                progress=sys.stderr.isatty(),
            )
    _show(found)


@paper_app.command()
def check(
    gpt2: Annotated[
        str, typer.Option(help="GPT2-large: a hub name or a Hugging Face directory.")
    ] = "gpt2-large",
    llama: Annotated[
        str, typer.Option(help="Llama-7B: a hub name or a directory. In float32 it takes 27 GB.")
    ] = "huggyllama/llama-7b",
    device: Device = None,
    dtype: WeightDtype = "float32",
) -> None:
    """Compare GPT2-large and Llama-7B with the numbers saved in the published notebooks.

    A model whose weights are not at hand is skipped. Exit code 1 if anything differs.
    """
    with errors_in_one_sentence():
        table = check_published(
            {"gpt2-large": gpt2, "llama-7b": llama}, load=lambda name: load(name, device, dtype)
        )
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    print_table(console, _check_table(table))
    for model, rows in table.groupby("model", sort=False):
        left_out = rows.loc[rows["verdict"] == "skipped"]
        if len(left_out):
            reason = escape(left_out.iloc[0]["note"])
            console.print(f"[yellow]skipped[/] {escape(str(model))}: {reason}")
    counts = Counter(table["verdict"].tolist())
    differ, agree, skipped = (counts[name] for name in ("differs", "agrees", "skipped"))
    console.print(f"{agree} agree, {differ} differ, {skipped} models skipped")
    if differ:
        raise typer.Exit(1)


@contextmanager
def _stopped_in_one_sentence(out: Path, console: Console) -> Iterator[None]:
    """Ctrl-C becomes one sentence on standard error and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        said = "nothing was done yet; the same command begins again"
        if out.is_dir():
            said = (
                f"what is done is kept in {escape(str(out))}; the same command goes on from there"
            )
        console.print(f"[yellow]Stopped:[/] {said}")
        raise typer.Exit(130) from None


def _announced(line: str) -> str:
    label, colon, message = line.partition("Warning: ")
    return f"[yellow]Warning:[/] {escape(message)}" if colon and not label else escape(line)


def _show(found: Paper) -> None:
    """What was written, and the table of methods."""
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    methods = found.tables["methods"]
    console.print("[bold]Without the top 10 FFN neurons[/], means over prompts")
    table = Table(box=None, pad_edge=False, header_style="dim")
    names = {
        "method": "method",
        "mrr": "MRR",
        "prob": "p, %",
        "log_prob": "log p",
        "gpt2_large_mrr": "GPT2-large MRR",
        "gpt2_large_prob": "p, %",
        "llama_7b_mrr": "Llama-7B MRR",
        "llama_7b_prob": "p, %",
    }
    for name, label in names.items():
        left = name == "method"
        table.add_column(label, justify="left" if left else "right", no_wrap=left)
    for row in records(methods.loc[methods["knowledge_type"] == "all"]):
        cells = [
            "-" if row[name] is None else f"{row[name]:.3f}" for name in names if name != "method"
        ]
        table.add_row(row["method"].replace("_", " "), *cells)
    print_table(console, table)
    console.print("[dim]published: of other sentences, which were never released[/]")
    console.print(
        f"wrote {len(found.tables)} tables and {len(found.figures)} figures to "
        f"{escape(str(found.directory))}; all of them on {escape(str(found.page))}",
        soft_wrap=True,
    )


def _check_table(found: pd.DataFrame) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("model", "what", "entries", "difference", "allowed", "out of place", "verdict"):
        left = name in ("model", "what", "verdict")
        table.add_column(name, justify="left" if left else "right")
    colours = {"agrees": "green", "differs": "red", "skipped": "yellow"}
    for row in records(found):
        numbers = [row[name] for name in ("largest_difference", "tolerance")]
        table.add_row(
            row["model"],
            row["what"] or "",
            "" if row["entries"] is None else str(row["entries"]),
            *("" if number is None else f"{number:.2g}" for number in numbers),
            "" if row["out_of_place"] is None else str(row["out_of_place"]),
            f"[{colours[row['verdict']]}]{row['verdict']}[/]",
        )
    return table
