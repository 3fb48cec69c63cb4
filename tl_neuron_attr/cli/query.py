"""``tl-neuron-attr query``: what set the value neurons off."""

import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tl_neuron_attr.attribute import attribute as attribute_prompt
from tl_neuron_attr.attribution import ALL_LEFT_OUT, TOP_VALUES, Attribution, query_facts
from tl_neuron_attr.chosen import check_value_neuron
from tl_neuron_attr.cli.options import (
    Against,
    AgainstId,
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
    WholeDistribution,
    command_line,
    convention_of,
    either,
    errors_in_one_sentence,
    load,
    prompt_of,
    target_of,
)
from tl_neuron_attr.cli.terminal import (
    WIDTH,
    asked_as_json,
    bar,
    model_line,
    neuron_lines,
    peak_memory,
    print_table,
    records,
    show_written,
    target_line,
    token_line,
)
from tl_neuron_attr.display import decimals
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.host import open_host
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Head, parse_neuron
from tl_neuron_attr.query import QueryScores
from tl_neuron_attr.report.query import query_page
from tl_neuron_attr.tables import Saved, write_run
from tl_neuron_attr.targets import tokenize
from tl_neuron_attr.topk import Kind

_SHOWN = 10
_KEPT = 300
_SAVED_TOKENS = 10
_KINDS = ("ffn", "attn", "both")


def query(
    context: typer.Context,
    text: PromptText = None,
    value_kind: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Value neurons to trace back: ffn, attn or both. Default: attn, as published.",
            show_default=False,
        ),
    ] = None,
    value_top: Annotated[
        int | None,
        typer.Option(
            help=f"How many value neurons of each kind, the best ones. Default: {TOP_VALUES}.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--of",
            help="Chosen value neurons in place of the best: L4.N12,L3.H2.D5@4.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="Query neurons to list: ffn, attn or both.")] = "ffn",
    model: ModelName = "tiny-facts",
    target: TargetText = None,
    target_id: TargetId = None,
    distribution: WholeDistribution = False,
    against: Against = None,
    against_id: AgainstId = None,
    position: Position = -1,
    convention: ConventionName = "exact",
    top: Annotated[
        int | None,
        typer.Option(
            help=f"Query neurons of each kind. Default: {_SHOWN} on screen, {_KEPT} in files and "
            "JSON.",
            show_default=False,
        ),
    ] = None,
    tokens: TokenIds = None,
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    out: OutDirectory = None,
    as_json: AsJson = False,
) -> None:
    """What set the value neurons off: earlier layers, heads and neurons, by how much they fed them.

    Scores are the value neurons' own, handed down by share of what they read.

    Example: tl-neuron-attr query "The capital of France is" --for attn --value-top 30
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
        read_as = convention_of(convention)
        asked = _asked(value_kind, value_top, labels, kind, top)
        if out is not None:
            check_writable(out)
        started = time.perf_counter()
        loaded = load(model, device, dtype)
        if asked.chosen:
            host = open_host(loaded)
            read_pos = tokenize(host, prompt).read_pos
            for neuron in asked.chosen:
                check_value_neuron(host, neuron, read_pos)
        ready = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shown below
            result = attribute_prompt(
                loaded,
                prompt,
                top=1 if asked.chosen else asked.value_top,
                convention=read_as,
                progress=sys.stderr.isatty(),
            )
            of = asked.chosen or asked.value_kind
            scores = result.query_scores(of, top_values=asked.value_top)
        kept = top or (_KEPT if as_json or out is not None else _SHOWN)
        if out is not None:
            _save(result, scores, asked, kept, command_line(context), out)
        seconds = time.perf_counter() - ready
        if as_json:
            found = {**_as_json(result, scores, asked, model, kept), "seconds": seconds}
            print(json.dumps(found, allow_nan=False))
        else:
            _show(result, scores, asked, model, top or _SHOWN)
            _show_end(ready - started, seconds, out)


# --- what is asked ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Which value neurons, and which query neurons of them."""

    value_kind: str
    value_top: int
    chosen: tuple[FFNNeuron | AttnNeuron, ...]
    """In place of the best ones, if there are any."""
    kind: Kind | None
    """Of the query neurons to list; ``None`` for both."""

    def facts(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        if self.chosen:
            values: dict[str, Any] = {"of": [str(neuron) for neuron in self.chosen]}
        else:
            values = {"for": self.value_kind, "value_top": self.value_top}
        return {**values, "kind": self.kind or "both"}


def _asked(
    value_kind: str | None,
    value_top: int | None,
    labels: str | None,
    kind: str,
    top: int | None,
) -> _Asked:
    """The request, once it makes sense without the model."""
    for option, name in (("--for", value_kind), ("--kind", kind)):
        if name not in (None, *_KINDS):
            raise InputError(f"{option} must be ffn, attn or both; got {name!r}")
    for option, number in (("--value-top", value_top), ("--top", top)):
        if number is not None and number < 1:
            raise InputError(f"{option} must be at least 1, got {number}")
    if labels is not None and (value_kind, value_top) != (None, None):
        raise InputError("give value neurons either by --of or by --for and --value-top")
    try:
        chosen = () if labels is None else tuple(map(parse_neuron, _split(labels)))
    except ValueError as error:
        raise InputError(f"--of takes labels of neurons separated by commas: {error}") from None
    return _Asked(
        value_kind=value_kind or "attn",
        value_top=value_top or TOP_VALUES,
        chosen=chosen,
        kind="ffn" if kind == "ffn" else "attn" if kind == "attn" else None,
    )


def _split(labels: str) -> list[str]:
    return [label.strip() for label in labels.split(",")]


# --- files and JSON ---------------------------------------------------------------------------


def _save(
    result: Attribution,
    scores: QueryScores,
    asked: _Asked,
    top: int,
    again: str,
    directory: Path,
) -> None:
    """Write the query tables, ``report.html`` and ``run.json``: all of them, or none."""
    found = {"command": "query", **result.facts(), "again": again}
    found["warnings"] += _problems(scores)
    found["query"] = {**asked.facts(), **query_facts(scores)}
    tables = {
        "query_layers": result.query_layers(scores),
        "query_heads": result.query_heads(scores),
        "query_neurons": result.query_neurons(top, asked.kind, scores, tokens=_SAVED_TOKENS),
        "query_values": result.query_values(scores),
    }
    page = query_page(Saved(tables=tables, facts=found))
    text = json.dumps(found, indent=2, ensure_ascii=False)
    write_run(directory, tables, {"report.html": page, "run.json": text + "\n"})


def _as_json(
    result: Attribution, scores: QueryScores, asked: _Asked, model: str, top: int
) -> dict[str, Any]:
    return {
        **asked_as_json(result, model),
        "query": {**asked.facts(), **query_facts(scores)},
        "query_values": records(result.query_values(scores)),
        "query_layers": records(result.query_layers(scores)),
        "query_heads": records(result.query_heads(scores)),
        "query_neurons": records(result.query_neurons(top, asked.kind, scores, tokens=5)),
        "warnings": [*result.warnings, *_problems(scores)],
    }


def _problems(scores: QueryScores) -> list[str]:
    return [ALL_LEFT_OUT] if bool(scores.left_out.all()) else []


# --- a terminal -------------------------------------------------------------------------------


def _show(result: Attribution, scores: QueryScores, asked: _Asked, model: str, top: int) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    prompt = result.captured.prompt
    console.print(model_line(result.host, model))
    console.print(token_line(prompt.token_texts, prompt.read_pos))
    console.print(target_line(result))
    console.print(_value_lines(scores, asked))
    console.print("\n[bold]What feeds them, nats[/], from each layer")
    print_table(console, _layer_table(scores, console.width))
    heads = [
        f"{Head(row['layer'], row['head'])} {decimals(row['score'])}"
        for row in records(result.query_heads(scores, top=top))
    ]
    if heads:
        console.print(f"\n[bold]Heads[/], the best {len(heads)}")
        console.print(Columns(heads, padding=(0, 3)))
    kinds: tuple[Kind, ...] = ("ffn", "attn") if asked.kind is None else (asked.kind,)
    for kind in kinds:
        name = "FFN" if kind == "ffn" else "Attention"
        table = result.query_neurons(top, kind, scores, tokens=5)
        if table.empty:
            console.print(f"\n[bold]{name} query neurons[/]: none comes before the value neurons")
            continue
        console.print(f"\n[bold]{name} query neurons[/], the best {len(table)}")
        console.print(neuron_lines(table, console.width, prompt.token_texts))
    console.print(
        "[dim]at: where the neuron feeds them most; raises, lowers: the tokens whose logits it "
        "moves most with the sign its coefficient has there[/]"
    )
    for message in (*result.warnings, *_problems(scores)):
        console.print(f"[yellow]Warning:[/] {escape(message)}")


def _show_end(loading: float, seconds: float, out: Path | None) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    console.print(
        f"\n[dim]{loading:.1f} s loading, {seconds:.2f} s attributing and tracing back, "
        f"peak memory {peak_memory()}[/]"
    )
    if out is not None:
        files = "query_layers, query_heads, query_neurons, query_values (.parquet) and run.json"
        show_written(console, files, out)


def _value_lines(scores: QueryScores, asked: _Asked) -> Text:
    """Which value neurons, what they add up to, and which of them have no useful shares."""
    neurons = [neuron for ranked in scores.values for neuron in ranked.neurons()]
    total = sum(float(ranked.score.sum()) for ranked in scores.values)
    if asked.chosen:
        what = _listed(neurons)
    else:
        names = {"ffn": "FFN", "attn": "attention"}
        what = " and ".join(
            f"the best {len(ranked)} {names[ranked.kind]} neurons" for ranked in scores.values
        )
    together = "together " if len(neurons) > 1 else ""
    line = Text.assemble(("Value neurons", "bold"), f"  {what}, {together}{decimals(total)} nats")
    kept = scores.ill_conditioned & ~scores.left_out
    for done, which in (("left out", scores.left_out), ("kept, as published", kept)):
        bad = [neuron for neuron, one in zip(neurons, which, strict=True) if one]
        if bad:
            line.append(f"\n{len(bad)} ill-conditioned, {done}: {_listed(bad)}", style="yellow")
    return line


def _listed(neurons: Sequence[FFNNeuron | AttnNeuron], most: int = 6) -> str:
    more = f" and {len(neurons) - most} more" if len(neurons) > most else ""
    return ", ".join(map(str, neurons[:most])) + more


def _layer_table(scores: QueryScores, width: int) -> Table:
    """Attention and FFN of each layer, between what entered the first and the biases."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in range(5):
        table.add_column(justify="left" if column in (2, 4) else "right", no_wrap=True)
    attn, ffn = scores.attn.tolist(), scores.ffn.tolist()
    embed, bias = float(scores.embed), float(scores.bias)
    largest = max(*map(abs, (*attn, *ffn, embed, bias)), 1e-9)
    longest = max(1, min(24, (width - 34) // 2))  # what the numbers leave

    def cells(score: float) -> tuple[str, Text]:
        return decimals(score), bar(score / largest, longest)

    table.add_row("embedding", *cells(embed))
    heads = ("layer", "attention", "", "FFN", "")
    table.add_row(*(Text(name, style="dim") for name in heads))
    for layer, of_layer in enumerate(zip(attn, ffn, strict=True)):
        table.add_row(str(layer), *(cell for score in of_layer for cell in cells(score)))
    if scores.convention == "exact":
        table.add_row("biases", *cells(bias))
    table.add_row("sum", decimals(sum(attn) + sum(ffn) + embed + bias))
    return table
