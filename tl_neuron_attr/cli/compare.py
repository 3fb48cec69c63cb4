"""``tl-neuron-attr compare``: what raised an answer in one run and not in another."""

import json
import math
import sys
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
    index_of,
    load,
    prompt_of,
    target_of,
)
from tl_neuron_attr.cli.terminal import (
    WIDTH,
    model_line,
    neuron_of,
    print_table,
    records,
    show_written,
    target_line,
    token_line,
    token_widths,
)
from tl_neuron_attr.compare import Comparison
from tl_neuron_attr.compare import compare as compare_runs
from tl_neuron_attr.display import decimals
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.interventions import Zeroed
from tl_neuron_attr.prompts import Prompt, visible
from tl_neuron_attr.topk import Kind

_SHOWN = 10
_KEPT = 300

_NAMES: dict[Kind, str] = {"ffn": "FFN", "attn": "Attention"}


def compare(
    context: typer.Context,
    text: PromptText = None,
    model: ModelName = "tiny-facts",
    zero: Annotated[
        str | None,
        typer.Option(help="Heads and neurons to zero: L3.H2,L9.N12,L9.H3.D17,L9.H3.D17@5."),
    ] = None,
    other_prompt: Annotated[
        str | None, typer.Option(help="Another prompt, of as many tokens, to compare with.")
    ] = None,
    other_model: Annotated[
        str | None, typer.Option(help="Another checkpoint of the same shape, as for --model.")
    ] = None,
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
    kind: Annotated[
        str | None, typer.Option(help="ffn or attn: show and print only these neurons.")
    ] = None,
    lowest: Annotated[
        bool, typer.Option("--lowest", help="Also the neurons that score more in the other run.")
    ] = False,
    tokens: TokenIds = None,
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    index_dir: Annotated[
        Path | None,
        typer.Option(
            "--index",
            help="Directory of projection indices; a model's is made there if need be. Closer "
            "bounds, the same neurons.",
        ),
    ] = None,
    out: OutDirectory = None,
    as_json: AsJson = False,
) -> None:
    """What raised the answer, and does so less in another run: zeroed, prompted or trained apart.

    Example: tl-neuron-attr compare "The capital of France is" --zero L0.H2
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
        if kind not in (None, "ffn", "attn"):
            raise InputError(f"--kind must be ffn or attn, got {kind!r}")
        zeroed = _zeroed(zero, other_prompt, other_model)
        other = None
        if other_prompt is not None:
            other = Prompt(text=other_prompt, prepend_bos=bos, position=position)
        for directory in (out, index_dir):
            if directory is not None:
                check_writable(directory)
        if index_dir is not None and convention == "recomputed":
            raise InputError(
                "an index is of no use with --convention recomputed, whose scores have no bounds; "
                "leave out --index"
            )
        loaded = load(model, device, dtype)
        second = None if other_model is None else load(other_model, device, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shown below, from the result
            result = attribute(
                loaded,
                prompt,
                top=1,
                convention=read_as,
                index=None if index_dir is None else index_of(loaded, index_dir),
            )
        found = compare_runs(
            result,
            zeroed or (other if second is None else second),
            prompt=None if second is None else other,
            top=top or (_KEPT if as_json or out is not None else _SHOWN),
            index=None if index_dir is None or second is None else index_of(second, index_dir),
            progress=sys.stderr.isatty(),
        )
        if out is not None:
            found.save(out, lowest=lowest, report=True, again=command_line(context))
        kinds: tuple[Kind, ...] = tuple(name for name in _NAMES if kind in (None, name))
        if as_json:
            print(json.dumps(_as_json(found, model, kinds, lowest), allow_nan=False))
        else:
            _show(found, model, top or _SHOWN, kinds, lowest, out)


def _zeroed(zero: str | None, other_prompt: str | None, other_model: str | None) -> Zeroed | None:
    """What to zero, once it is known that one thing was asked for."""
    if zero is not None and (other_prompt is not None or other_model is not None):
        raise InputError("give --zero alone: the other run is then the same prompt and model")
    if zero is None and other_prompt is None and other_model is None:
        raise InputError(
            "say what to compare with: --zero L3.H2, --other-prompt TEXT or --other-model NAME"
        )
    return None if zero is None else Zeroed.parse(zero)


def _as_json(
    found: Comparison, model: str, kinds: tuple[Kind, ...], lowest: bool
) -> dict[str, Any]:
    original, other = found.original, found.other
    prompt = other.captured.prompt

    def neurons(lowest: bool) -> list[dict[str, Any]]:
        tables = [found.neurons(kind, lowest=lowest, tokens=5) for kind in kinds]
        return [row for table in tables for row in records(table)]

    return {
        "model": model,
        "prompt": original.captured.prompt.text,
        "tokens": list(original.captured.prompt.token_texts),
        "read_pos": original.captured.prompt.read_pos,
        "target": {**original.target.facts(), "log_prob": original.log_prob},
        "convention": original.convention,
        "other": {
            "what": other.what,
            "zeroed": [str(part) for part in other.zeroed.parts],
            "tokens": list(prompt.token_texts),
            "log_prob": found.log_prob,
            "own_log_prob": found.own_log_prob,
        },
        "layers": records(found.layers()),
        "heads": records(found.heads()),
        "neurons": neurons(False),
        **({"lowest": neurons(True)} if lowest else {}),
        "certificates": found.certificates(),
        "warnings": list(original.warnings),
    }


def _show(
    found: Comparison,
    model: str,
    top: int,
    kinds: tuple[Kind, ...],
    lowest: bool,
    out: Path | None,
) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    original, other = found.original, found.other
    prompt = original.captured.prompt
    console.print(model_line(original.host, model))
    console.print(token_line(prompt.token_texts, prompt.read_pos))
    console.print(target_line(original))
    console.print(Text.assemble(("Compared", "bold"), "  with ", _plain(other.what)))
    if other.captured.prompt.tokens != prompt.tokens:
        console.print(token_line(other.captured.prompt.token_texts, prompt.read_pos))
    console.print(_other_line(found))
    console.print(f"\n[bold]Rise in {original.target.quantity}, nats[/], from each layer")
    print_table(console, _layer_table(found.layers(), console.width))
    console.print(f"\n[bold]Heads[/], the largest {min(top, original.head_scores.numel())}")
    print_table(console, _head_table(found.heads(top)))
    for kind in kinds:
        _show_neurons(console, found, kind, top, lowest=False)
    for kind in kinds if lowest else ():
        _show_neurons(console, found, kind, top, lowest=True)
    for message in original.warnings:
        console.print(f"[yellow]Warning:[/] {escape(message)}")
    if out is not None:
        files = "layers, heads, neurons (.parquet) and run.json"
        show_written(console, files, out)


def _show_neurons(
    console: Console, found: Comparison, kind: Kind, top: int, *, lowest: bool
) -> None:
    table = found.neurons(kind, top, lowest=lowest, tokens=5)
    name = f"{_NAMES[kind]} neurons that score {'less' if lowest else 'more'} here than there"
    proof = _proof(found.certificates()["lowest_" * lowest + kind])
    console.print(f"\n[bold]{name}[/], the first {len(table)} {proof}")
    console.print(_neuron_table(table, console.width))


def _plain(what: str) -> str:
    """A description with nothing in it that a terminal would obey."""
    return "".join(char if char == " " else visible(char) for char in what)


def _other_line(found: Comparison) -> str:
    line = f"[bold]There[/]   log p = {decimals(found.own_log_prob, sign=False)} nats"
    if found.original.target.against is None:
        line += f", p = {math.exp(found.own_log_prob):.3g}"
    else:
        line = f"[bold]There[/]   difference of log p = {decimals(found.own_log_prob)} nats"
    return f"{line}; at the original's norm scale {decimals(found.log_prob)}"


def _layer_table(layers: pd.DataFrame, width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    attention, difference = ("attn.", "diff.") if width < 70 else ("attention", "difference")
    for name in ("layer", attention, "other", difference, "FFN", "other", difference):
        table.add_column(name, justify="right", no_wrap=True)
    rows = records(layers)
    for attn, ffn in zip(rows[::2], rows[1::2], strict=True):
        cells = [
            decimals(row[name])
            for row in (attn, ffn)
            for name in ("score", "other_score", "difference")
        ]
        table.add_row(str(attn["layer"]), *cells)
    return table


def _head_table(heads: pd.DataFrame) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("head")
    for name in ("score", "other", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in records(heads):
        cells = [decimals(row[name]) for name in ("score", "other_score", "difference")]
        table.add_row(f"L{row['layer']}.H{row['head']}", *cells)
    return table


def _neuron_table(neurons: pd.DataFrame, width: int) -> Table:
    """Neurons, one a line: difference, both scores, both coefficients, and their tokens."""
    rows = records(neurons)
    attention = any(row["head"] is not None for row in rows)
    labels = [str(neuron_of(row)) for row in rows]
    numbers = ("difference", "score", "other_score", "coefficient", "other_coefficient")
    # fixed widths: rich would rather drop a narrow column than cut the token lists
    widths = [("neuron", max(map(len, labels)))]
    widths += [("source", 8)] if attention else []
    widths += [(name, 7) for name in ("diff.", "score", "other", "coef.", "other")]
    lists = token_widths(width - sum(size for _, size in widths) - 2 * (len(widths) - 1))
    widths += lists.items()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, size in widths:
        table.add_column(
            name,
            width=size,
            no_wrap=True,
            overflow="ellipsis",
            justify="left" if name in ("neuron", "source", "raises", "lowers") else "right",
        )
    for label, row in zip(labels, rows, strict=True):
        source = Text(visible(row["source_token"] or "")) if attention else None
        table.add_row(
            label,
            *([] if source is None else [source]),
            *(decimals(row[name]) for name in numbers),
            *(Text(" ".join(map(visible, row[name]))) for name in lists),
        )
    return table


def _proof(certificate: dict[str, Any]) -> str:
    total, evaluated = certificate["total"], certificate["evaluated"]
    if not certificate["applies"]:
        return f"[dim](all {total:,} scored in both runs)[/]"
    if certificate["linear"]:
        return f"[dim](of {total:,}; a contrast is linear, so all are known exactly)[/]"
    return f"[dim](of {total:,}; {evaluated:,} scored in both runs, bounds exclude the others)[/]"
