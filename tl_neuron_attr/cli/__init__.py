"""For the shell: arguments -> the same calls a notebook makes -> text, JSON or files."""

import io
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from typer.core import TyperCommand

from tl_neuron_attr.cli.attribute import attribute
from tl_neuron_attr.cli.card import card
from tl_neuron_attr.cli.compare import compare
from tl_neuron_attr.cli.evaluate import evaluate
from tl_neuron_attr.cli.graph import graph
from tl_neuron_attr.cli.heads import heads
from tl_neuron_attr.cli.in_context import in_context
from tl_neuron_attr.cli.index import index
from tl_neuron_attr.cli.paper import paper_app
from tl_neuron_attr.cli.prompts import prompts
from tl_neuron_attr.cli.query import query
from tl_neuron_attr.cli.report import report

app = typer.Typer(
    no_args_is_help=True,
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


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Which neurons gave the answer? Attribute a language model's prediction to its neurons."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a token


for command in (
    attribute,
    query,
    graph,
    card,
    compare,
    heads,
    in_context,
    prompts,
    evaluate,
    index,
    report,
):
    app.command(cls=_Command)(command)
app.add_typer(paper_app, name="paper")
