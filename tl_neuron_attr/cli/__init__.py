"""For the shell: arguments -> the same calls a notebook makes -> text, JSON or files."""

import inspect
import io
import sys
from importlib.metadata import version
from typing import Annotated, no_type_check

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from tl_neuron_attr.cli.answer import answer
from tl_neuron_attr.cli.attribute import attribute
from tl_neuron_attr.cli.card import card
from tl_neuron_attr.cli.compare import compare
from tl_neuron_attr.cli.doctor import doctor
from tl_neuron_attr.cli.evaluate import evaluate
from tl_neuron_attr.cli.graph import graph
from tl_neuron_attr.cli.heads import heads
from tl_neuron_attr.cli.in_context import in_context
from tl_neuron_attr.cli.index import index
from tl_neuron_attr.cli.paper import paper_app
from tl_neuron_attr.cli.paper import write as write_paper
from tl_neuron_attr.cli.prompts import prompts
from tl_neuron_attr.cli.query import query
from tl_neuron_attr.cli.report import report
from tl_neuron_attr.cli.runs import diff, run, summary, upgrade
from tl_neuron_attr.cli.terminal import WIDTH

PANELS = {
    "One prompt": (attribute, answer, query, graph, card, in_context),
    "Is it so?": (heads, compare),
    "Many prompts": (prompts, evaluate, run, summary, diff),
    "The paper": (write_paper,),
    "Files": (report, upgrade),
    "A model": (doctor, index),
}
"""The commands, by what one wants of them."""

FIRST_STEPS = {
    'tl-neuron-attr attribute "The capital of France is"': "layers, heads and neurons that gave it",
    'tl-neuron-attr query "The capital of France is"': "what set those neurons off",
    'tl-neuron-attr card L1.N137 "The capital of France is"': "everything about one of them",
    'tl-neuron-attr attribute "The capital of France is" --out france': "tables, and a page",
}
"""What a newcomer may type as it stands: the bundled model, no network."""

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Which neurons gave the answer? Attribute a language model's prediction to its neurons.",
    epilog="Start with:  tl-neuron-attr attribute 'The capital of France is'",
)


class _Command(TyperCommand):
    """A command whose context is of the class its signature names."""

    context_class = typer.Context


def _show_version(wanted: bool) -> bool:
    if wanted:
        print(f"tl_neuron_attr {version('tl_neuron_attr')}")
        raise typer.Exit
    return wanted


@app.callback(invoke_without_command=True)
@no_type_check  # what typer passes as a context is not of the class it asks to be annotated
def main(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Which neurons gave the answer? Attribute a language model's prediction to its neurons."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a token
    if context.invoked_subcommand is None:
        _show_start()


def _show_start() -> None:
    """What to type next, and what there is."""
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    console.print("[bold]Which neurons gave the answer?[/] Nothing was asked yet; for example:\n")
    for command, what in FIRST_STEPS.items():
        # a line of its own each, and never broken: to be copied
        console.print(f"  [dim]# {what}[/]")
        console.print(f"  {escape(command)}", soft_wrap=True)
    console.print(
        "\nThese use a small model that is part of the package. For your own add --model with a "
        "Hugging Face directory, or a hub name."
    )
    for panel, commands in PANELS.items():
        table = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
        table.add_column(width=10, style="bold", no_wrap=True)
        table.add_column()
        for command in commands:
            table.add_row(_name(command), _first_line(command))
        console.print(f"\n[dim]{panel}[/]")
        console.print(table)
    console.print("\ntl-neuron-attr COMMAND --help has every option, and an example.")


def _name(command) -> str:
    return "paper" if command is write_paper else command.__name__.replace("_", "-")


def _first_line(command) -> str:
    return escape((inspect.getdoc(command) or "").splitlines()[0])


for _panel, _commands in PANELS.items():
    for _command in _commands:
        if _command is write_paper:
            app.add_typer(paper_app, name="paper", rich_help_panel=_panel)
        else:
            app.command(cls=_Command, rich_help_panel=_panel)(_command)
