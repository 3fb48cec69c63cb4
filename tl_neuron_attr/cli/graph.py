"""``tl-neuron-attr graph``: the value neurons of an answer, and what set them off."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from rich.tree import Tree

from tl_neuron_attr.attribute import attribute as attribute_prompt
from tl_neuron_attr.attribution import Attribution, named_neurons
from tl_neuron_attr.cli.options import (
    Against,
    AgainstId,
    AsJson,
    Bos,
    ConventionName,
    Device,
    ModelName,
    Position,
    PromptText,
    TargetId,
    TargetText,
    TokenIds,
    WeightDtype,
    WholeDistribution,
    command_line,
    convention_of,
    either,
    errors_in_one_sentence,
    load,
    prompt_of,
    target_of,
)
from tl_neuron_attr.cli.terminal import WIDTH, model_line, show_written, target_line, token_line
from tl_neuron_attr.display import decimals
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.graph import Graph, Kinds, Node, value_query_graph
from tl_neuron_attr.prompts import at_least_one, fraction, visible
from tl_neuron_attr.report.graph import picture

_KINDS: tuple[Kinds, ...] = ("ffn", "attn", "both")


def graph(
    context: typer.Context,
    text: PromptText = None,
    model: ModelName = "tiny-facts",
    target: TargetText = None,
    target_id: TargetId = None,
    distribution: WholeDistribution = False,
    against: Against = None,
    against_id: AgainstId = None,
    position: Position = -1,
    convention: ConventionName = "exact",
    of: Annotated[
        str,
        typer.Option(help="Value neurons: ffn, attn, both, or chosen ones as L2.N7,L1.H0.D3@4."),
    ] = "both",
    kind: Annotated[str, typer.Option(help="Query neurons: ffn, attn or both.")] = "both",
    share: Annotated[
        float | None,
        typer.Option(
            help="What the nodes kept explain of all there are, above 0 and at most 1. Default: "
            "half, as far as the limits --values 10 and --inputs 4 let it.",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        int, typer.Option(help="Steps back from value neurons: 2 for query neurons of the query's.")
    ] = 1,
    values: Annotated[
        int | None, typer.Option(help="Value neurons at the most.", show_default=False)
    ] = None,
    inputs: Annotated[
        int | None, typer.Option(help="Inputs of each neuron at the most.", show_default=False)
    ] = None,
    opposing: Annotated[
        bool, typer.Option("--opposing", help="Draw inputs that hold neurons back, too.")
    ] = False,
    tokens: TokenIds = None,
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for nodes.parquet, edges.parquet, graph.json (node-link form, as "
            "networkx reads it) and graph.html (a Sankey diagram)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The value neurons that gave the answer, and the tokens and neurons that set them off.

    Example: tl-neuron-attr graph "The capital of France is" --depth 2 --out france
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
        asked: dict[str, Any] = {
            "of": of if of in _KINDS else named_neurons(map(str.strip, of.split(","))),
            "kind": _kind_of(kind),
            "share": None if share is None else fraction(share, "--share"),
            "depth": at_least_one(depth, "--depth"),
            "max_values": None if values is None else at_least_one(values, "--values"),
            "max_inputs": None if inputs is None else at_least_one(inputs, "--inputs"),
        }
        read_as = convention_of(convention)
        if out is not None:
            check_writable(out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shown below, from the result
            result = attribute_prompt(
                load(model, device, dtype),
                prompt,
                convention=read_as,
                progress=sys.stderr.isatty(),
            )
        found = value_query_graph(result, **asked, opposing=opposing, tokens=5)
        if out is not None:
            pages = {"graph.html": picture(found.node_table(), found.edge_table())}
            made_with = {**result.facts(), "again": command_line(context)}
            found.save(out, pages, made_with=made_with, report=True)
        if as_json:
            print(json.dumps(found.node_link(), allow_nan=False))
        else:
            _show(result, found, model, out)


def _kind_of(name: str) -> Kinds:
    for kind in _KINDS:
        if kind == name:
            return kind
    raise InputError(f"--kind must be one of {', '.join(_KINDS)}; got {name!r}")


def _show(result: Attribution, found: Graph, model: str, out: Path | None) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    console.print(model_line(result.host, model))
    console.print(token_line(found.prompt.token_texts, found.prompt.read_pos))
    console.print(target_line(result))
    console.print()
    console.print(_tree(found))
    console.print(
        "[dim]Nats, from each neuron or token to the one it stands under. @n: the position; of an "
        "attention neuron the one it reads from. rest: what is not drawn.[/]"
    )
    for message in result.warnings:
        console.print(f"[yellow]Warning:[/] {escape(message)}")
    if out is not None:
        show_written(console, "nodes.parquet, edges.parquet, graph.json and graph.html", out)


def _tree(found: Graph) -> Tree:
    """The answer, its value neurons, and below each node what set it off."""
    answer, nodes = found.answer, {node.id: node for node in found.nodes}
    n_values = len(found.inputs(answer.id))
    top = Text.assemble((answer.label, "bold"), f"  {decimals(answer.explained)} from {n_values} ")
    top.append("value neuron" if n_values == 1 else "value neurons")
    if answer.handed_down - answer.explained > 5e-4:
        top.append(f", {answer.reached:.0%} of {decimals(answer.handed_down)} from all ranked")
        if n_values == found.max_values:
            top.append("; more with --values", style="dim")
    tree = Tree(top, guide_style="dim")
    waiting, shown = [(answer, tree)], {answer.id}
    while waiting:
        node, branch = waiting.pop(0)
        for edge in found.inputs(node.id):
            source = nodes[edge.source]
            again = source.id in shown and bool(found.inputs(source.id))
            below = branch.add(_line(source, edge.weight, again))
            if not again:
                waiting.append((source, below))
                shown.add(source.id)
        if node is not answer and node.left_out:
            branch.add(Text("ill-conditioned: its inputs nearly cancel", style="dim"))
        elif node is not answer and node.handed_down:
            branch.add(_rest_line(node))
    return tree


def _line(node: Node, weight: float, again: bool) -> Text:
    line = Text(f"{decimals(weight)}  ", no_wrap=True, overflow="ellipsis")
    line.append(node.label, style="" if node.kind == "token" else "bold")
    if again:
        return line.append("  see its other place", style="dim")
    if abs(node.handed_down - weight) > 5e-4 and node.handed_down:
        line.append(f"  {decimals(node.handed_down)} over all it feeds", style="dim")
    if node.raises:
        tokens = " ".join(visible(token) for token in node.raises[:3])
        line.append(f"  raises {tokens}", style="dim")
    return line


def _rest_line(node: Node) -> Text:
    rest = node.rest
    line = Text(
        f"{decimals(node.handed_down - node.explained)}  rest",
        no_wrap=True,
        overflow="ellipsis",
        style="dim",
    )
    parts = {"token": rest.token, "attention": rest.attn, "FFN": rest.ffn, "biases": rest.bias}
    named = [f"{name} {decimals(nats)}" for name, nats in parts.items() if abs(nats) >= 5e-4]
    return line.append(f": {', '.join(named)}" if named else "")
