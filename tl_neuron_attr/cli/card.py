"""``tl-neuron-attr card``: everything about one neuron."""

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tl_neuron_attr.attribute import attribute, attribute_all
from tl_neuron_attr.cards import as_head, as_neuron, check_request, neuron_card
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
    prompts_in,
    target_of,
)
from tl_neuron_attr.cli.terminal import WIDTH, show_written
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.host import open_host
from tl_neuron_attr.targets import tokenize


def card(
    context: typer.Context,
    neuron: Annotated[str, typer.Argument(help="L4.N123, L4.H2.D17@5 or L4.H2.D17.")],
    text: PromptText = None,
    model: ModelName = "tiny-facts",
    head: Annotated[
        str | None,
        typer.Option(help="Carry it through this head, like L5.H2. Default: the most readable."),
    ] = None,
    writes_at: Annotated[
        int | None,
        typer.Option(
            "--at",
            help="Look at it at this token. Default: where the answer is read.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON Lines: find those of these prompts where its score is largest."),
    ] = None,
    target: TargetText = None,
    target_id: TargetId = None,
    distribution: WholeDistribution = False,
    against: Against = None,
    against_id: AgainstId = None,
    position: Position = -1,
    convention: ConventionName = "exact",
    top: Annotated[int, typer.Option(help="Rows of neurons, heads and prompts.")] = 10,
    tokens: TokenIds = None,
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for card.json, card.txt and the tables (Parquet)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Everything about one neuron: what it says, what set it off, what it sets off.

    Example: tl-neuron-attr card L1.N137 "The capital of France is"
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
        chosen = as_neuron(neuron)
        through = None if head is None else as_head(head)
        if top < 1:
            raise InputError(f"--top must be at least 1, got {top}")
        others = [] if prompts is None else prompts_in(prompts, bos)
        if out is not None:
            check_writable(out)
        loaded = load(model, device, dtype)
        host = open_host(loaded)
        check_request(host, tokenize(host, prompt), chosen, writes_at, through)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = attribute(loaded, prompt, convention=read_as)
            more = attribute_all(loaded, others, top=1, convention=read_as) if others else []
        found = neuron_card(result, chosen, position=writes_at, prompts=more, head=through, top=top)
        if out is not None:
            made_with = {**result.facts(), "again": command_line(context)}
            found.save(out, made_with=made_with, report=True)
        if as_json:
            print(json.dumps(_as_json(found, model, result.warnings), allow_nan=False))
            return
        console = Console(width=min(WIDTH, Console().width), highlight=False)
        print(found.text(console.width))
        for message in result.warnings:
            print(f"\nWarning: {message}")
        if out is not None:
            show_written(console, "card.json, card.txt and its tables (.parquet)", out)


def _as_json(found: Any, model: str, messages: tuple[str, ...]) -> dict[str, Any]:
    return {**found.to_dict(), "model": model, "warnings": list(messages)}
