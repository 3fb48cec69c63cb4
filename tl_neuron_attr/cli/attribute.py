"""``tl-neuron-attr attribute``: the layers, heads and neurons that raised an answer."""

import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tl_neuron_attr.attribute import attribute as attribute_prompt
from tl_neuron_attr.attribution import TOP_VALUES, Attribution
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
    convention_of,
    either,
    errors_in_one_sentence,
    index_of,
    length_of,
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
    target_line,
    token_line,
)
from tl_neuron_attr.display import decimals
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.plan import Plan
from tl_neuron_attr.plan import plan as plan_prompts
from tl_neuron_attr.prompts import visible
from tl_neuron_attr.topk import Kind

_SHOWN = 10
_KEPT = 300


def attribute(
    text: PromptText = None,
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
            help=f"Neurons of each kind. Default: {_SHOWN} on screen, {_KEPT} in files and JSON.",
            show_default=False,
        ),
    ] = None,
    tokens: TokenIds = None,
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    index_dir: Annotated[
        Path | None,
        typer.Option(
            "--index",
            help="Directory of projection indices; the model's is made there if need be. Adds the "
            "neurons that lower the answer most, and the best ones' share of the whole.",
        ),
    ] = None,
    out: OutDirectory = None,
    as_json: AsJson = False,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Say what it would take in operations, memory and time, and stop: of the model "
            "only the configuration and the tokenizer are read.",
        ),
    ] = False,
) -> None:
    """The layers, heads and neurons that raised the answer's log-probability.

    Example: tl-neuron-attr attribute "The capital of France is" --out france
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
        if top is not None and top < 1:
            raise InputError(f"--top must be at least 1, got {top}")
        kept = top or (_KEPT if as_json or out is not None else _SHOWN)
        if plan_only:
            found = plan_prompts(
                model,
                n_tokens=length_of(prompt, model),
                top=kept,
                convention=read_as,
                dtype=dtype,
                device=device,
            )
            print(json.dumps({"model": model, **_plan_as_json(found)}) if as_json else found)
            return
        for directory in (out, index_dir):
            if directory is not None:
                check_writable(directory)
        if index_dir is not None and convention == "recomputed":
            raise InputError(
                "an index is of no use with --convention recomputed, whose scores have no bounds; "
                "leave out --index"
            )
        started = time.perf_counter()
        loaded = load(model, device, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shown below, from the result
            result = attribute_prompt(
                loaded,
                prompt,
                top=kept,
                convention=read_as,
                index=None if index_dir is None else index_of(loaded, index_dir),
                progress=sys.stderr.isatty(),
            )
        if out is not None:
            result.save(out, report=True, progress=sys.stderr.isatty())
        if as_json:
            print(json.dumps(_as_json(result, model), allow_nan=False))
        else:
            _show(result, model, top or _SHOWN, time.perf_counter() - started, out)


def _as_json(result: Attribution, model: str) -> dict[str, Any]:
    top = max(len(result.ffn_neurons), len(result.attn_neurons))
    query_neurons, problems = result.query_neurons_or_why_not(top, tokens=5)
    return {
        **asked_as_json(result, model),
        "layers": records(result.layers()),
        "heads": records(result.heads()),
        "neurons": records(result.neurons(tokens=5)),
        "query_neurons": records(query_neurons),
        "certificates": result.certificates(),
        **_from_index(result),
        "warnings": [*result.warnings, *problems],
        "seconds": result.seconds,
    }


def _from_index(result: Attribution) -> dict[str, Any]:
    """What only a projection index can tell."""
    if result.index is None or not result.out.affine:
        return {}
    top = max(len(result.ffn_neurons), len(result.attn_neurons))
    return {
        "suppressing": records(result.suppressing(tokens=5)),
        "shares": records(result.shares(top)),
    }


def _plan_as_json(found: Plan) -> dict[str, Any]:
    return {**asdict(found), "dtype": str(found.dtype).removeprefix("torch.")}


def _show(result: Attribution, model: str, top: int, seconds: float, out: Path | None) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    prompt = result.captured.prompt
    console.print(model_line(result.host, model))
    console.print(token_line(prompt.token_texts, prompt.read_pos))
    console.print(_prediction_line(result))
    console.print(target_line(result))
    console.print(f"\n[bold]Rise in {result.target.quantity}, nats[/], from each layer")
    print_table(console, _layer_table(result, console.width))
    console.print(f"\n[bold]Heads[/], the best {min(top, result.head_scores.numel())}")
    console.print(_head_table(result, top))
    kinds: tuple[tuple[Kind, str], ...] = (("ffn", "FFN"), ("attn", "Attention"))
    for kind, name in kinds:
        table = result.neurons(kind, top, tokens=5)
        certificate = result.certificates()[kind]
        console.print(
            f"\n[bold]{name} value neurons[/], the best {len(table)} {_proof(certificate)}"
        )
        console.print(neuron_lines(table, console.width))
    found, problems = result.query_neurons_or_why_not(top, tokens=5)
    if not problems:
        console.print(
            f"\n[bold]FFN query neurons[/], which set off the {TOP_VALUES} best attention value "
            "neurons"
        )
        if found.empty:
            console.print("[dim]none: no FFN comes before those neurons[/]")
        else:
            console.print(neuron_lines(found, console.width, prompt.token_texts))
    if result.index is not None and result.out.affine:
        for kind, name in kinds:
            table = result.suppressing(kind, top, tokens=5)
            console.print(f"\n[bold]{name} neurons that lower the target most[/]")
            console.print(neuron_lines(table, console.width))
        console.print(f"\n[bold]Share of all that raises the target[/], in the best {top}")
        print_table(console, _share_table(result.shares(top)))
    console.print(
        "[dim]raises, lowers: the tokens whose logits the neuron moves most with the sign its "
        "coefficient has here[/]"
    )
    for message in (*result.warnings, *problems):
        console.print(f"[yellow]Warning:[/] {escape(message)}")
    console.print(
        f"\n[dim]{seconds:.1f} s with loading, {result.seconds:.2f} s attributing, "
        f"peak memory {peak_memory()}[/]"
    )
    if out is not None:
        more = result.index is not None and result.out.affine
        console.print(
            "[dim]wrote layers, heads, positions, log_probs, neurons"
            f"{', suppressing, shares' * more} "
            f"(.parquet), cards.json and run.json to {escape(str(out))}[/]"
        )
        console.print(f"Open {escape(str(out / 'report.html'))} in a browser")


def _prediction_line(result: Attribution) -> Text:
    line = Text.assemble(("Predicts", "bold"), "  ")
    for row in records(result.predictions(5)):
        line.append(visible(row["token"])).append(
            f" {decimals(row['prob'], sign=False)}", style="dim"
        )
        line.append("   ")
    return line


def _layer_table(result: Attribution, width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("layer", "attention", "", "FFN", ""):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    scores = result.layer_scores
    largest = max(float(scores.attn.abs().max()), float(scores.ffn.abs().max()), 1e-9)
    longest = max(1, min(24, (width - 28) // 2))  # what the numbers leave
    for layer, (attn, ffn) in enumerate(
        zip(scores.attn.tolist(), scores.ffn.tolist(), strict=True)
    ):
        table.add_row(
            str(layer),
            *(decimals(attn), bar(attn / largest, longest)),
            *(decimals(ffn), bar(ffn / largest, longest)),
        )
    if not result.host.parallel:  # only there does the sum mean something
        attn, ffn = float(scores.attn.sum()), float(scores.ffn.sum())
        label = Text(f"together {decimals(attn + ffn)}", style="dim")
        table.add_row("sum", decimals(attn), "", decimals(ffn), label)
    return table


def _head_table(result: Attribution, top: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("head")
    table.add_column("score", justify="right")
    table.add_column("brings most from", overflow="fold")
    for row in records(result.heads(top)):
        positions = result.positions(row["layer"], row["head"])
        sources = [
            f"{source['source_pos']}:{visible(source['token'])} ({decimals(source['score'])})"
            for source in records(positions.nlargest(3, "score"))
        ]
        label = f"L{row['layer']}.H{row['head']}"
        table.add_row(label, decimals(row["score"]), Text("  ".join(sources)))
    return table


def _share_table(shares: pd.DataFrame) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "all raising neurons, nats", "share of the best"):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    for row in records(shares):
        rise = [decimals(row[name], sign=False) for name in ("rise_lower", "rise_upper")]
        table.add_row(
            {"ffn": "FFN", "attn": "attention"}[row["kind"]],
            " to ".join(rise),
            f"{row['share_lower']:.1%} to {row['share_upper']:.1%}",
        )
    return table


def _proof(certificate: dict[str, Any]) -> str:
    total, evaluated = certificate["total"], certificate["evaluated"]
    if not certificate["applies"]:
        return f"[dim](all {total:,} scored)[/]"
    if certificate["linear"]:
        return f"[dim](of {total:,}; a contrast is linear, so all are scored exactly)[/]"
    return f"[dim](of {total:,}; {evaluated:,} scored exactly, bounds exclude the others)[/]"
