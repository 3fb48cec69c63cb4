"""``tl-neuron-attr answer``: what raised an answer of several tokens."""

import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tl_neuron_attr.answers import AnswerAttribution, attribute_answer
from tl_neuron_attr.cli.options import (
    AsJson,
    Bos,
    ConventionName,
    Device,
    ModelName,
    OutDirectory,
    PromptText,
    TokenIds,
    WeightDtype,
    command_line,
    convention_of,
    errors_in_one_sentence,
    load,
    prompt_of,
)
from tl_neuron_attr.cli.terminal import (
    WIDTH,
    model_line,
    neuron_of,
    print_table,
    records,
    show_written,
    token_line,
)
from tl_neuron_attr.display import decimals
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.prompts import shown_tokens, visible
from tl_neuron_attr.topk import Kind

_SHOWN, _KEPT = 10, 300


def answer(
    context: typer.Context,
    text: PromptText = None,
    answer: Annotated[
        str | None,
        typer.Option(
            "--answer", help="The whole answer, as it follows the prompt; mind its leading space."
        ),
    ] = None,
    model: ModelName = "tiny-facts",
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
    out: OutDirectory = None,
    as_json: AsJson = False,
) -> None:
    """The layers, heads and neurons that raised an answer of several tokens.

    Example: tl-neuron-attr answer "The capital of France is" --answer " Paris and Rome"
    """
    with errors_in_one_sentence():
        prompt = prompt_of(text, tokens, bos, -1, None, None)
        if answer is None:
            raise InputError(
                'give the answer with --answer; for example --answer " Paris and Rome"'
            )
        read_as = convention_of(convention)
        if top is not None and top < 1:
            raise InputError(f"--top must be at least 1, got {top}")
        directory = None if out is None else check_writable(out)
        started = time.perf_counter()
        loaded = load(model, device, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shown below, from the result
            found = attribute_answer(
                loaded,
                prompt,
                answer,
                top=top or (_KEPT if as_json or out is not None else _SHOWN),
                convention=read_as,
                progress=sys.stderr.isatty(),
            )
        if directory is not None:
            found.save(directory, report=True, again=command_line(context))
        if as_json:
            print(json.dumps(_as_json(found, model), allow_nan=False))
        else:
            _show(found, model, top or _SHOWN, time.perf_counter() - started, directory)


def _as_json(found: AnswerAttribution, model: str) -> dict[str, Any]:
    prompt = found.parts[0].captured.prompt
    return {
        "model": model,
        "tokens": list(prompt.token_texts[: prompt.read_pos + 1]),
        "answer": found.text,
        "answer_tokens": records(found.tokens()),
        "log_prob": found.log_prob,
        "embedding_log_prob": found.embedding_log_prob,
        "layers": records(found.layers(by_token=True)),
        "heads": records(found.heads(by_token=True)),
        "neurons": records(found.neurons(tokens=5)),
        "neurons_by_token": records(found.neurons(by_token=True)),
        "certificates": found.certificates(),
        "convention": found.parts[0].convention,
        "warnings": list(found.warnings),
    }


def _show(
    found: AnswerAttribution, model: str, top: int, seconds: float, directory: Path | None
) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    first = found.parts[0]
    prompt = first.captured.prompt
    console.print(model_line(first.host, model))
    console.print(token_line(prompt.token_texts[: prompt.read_pos + 1], prompt.read_pos))
    texts = [part.target.text for part in found.parts]
    console.print(
        f"[bold]Answer[/]  {escape(shown_tokens(texts))}   log p = "
        f"{decimals(found.log_prob, sign=False)} nats, p = {math.exp(found.log_prob):.3g}; "
        f"before the first layer log p = {decimals(found.embedding_log_prob, sign=False)}"
    )
    print_table(console, _token_table(found))
    names = [f"{number}:{visible(text)}" for number, text in enumerate(texts)]
    console.print("\n[bold]Rise in log p(answer), nats[/], from each layer: the sum, and by token")
    print_table(console, _layer_table(found, names))
    console.print(f"\n[bold]Heads[/], the best {min(top, first.head_scores.numel())}")
    print_table(console, _head_table(found, names, top))
    kinds: tuple[tuple[Kind, str], ...] = (("ffn", "FFN"), ("attn", "Attention"))
    for kind, name in kinds:
        certificate = (found.ffn if kind == "ffn" else found.attn).neurons.certificate
        count = min(top, certificate.total)
        console.print(f"\n[bold]{name} neurons[/], the best {count} [dim]({certificate})[/]")
        print_table(console, _neuron_table(found, kind, count, names))
    console.print(
        "[dim]raises: the tokens whose logits the neuron moves most with the sign its coefficient "
        "has where it does most[/]"
    )
    for message in found.warnings:
        console.print(f"[yellow]Warning:[/] {escape(message)}")
    console.print(f"\n[dim]{seconds:.1f} s with loading[/]")
    if directory is not None:
        files = "answer_tokens, layers, heads, neurons, neurons_by_token (.parquet) and run.json"
        show_written(console, files, directory)


def _table(columns: Sequence[str], left: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(
            Text(name),
            justify="left" if name in left else "right",
            no_wrap=True,
            overflow="ellipsis",
        )
    return table


def _token_table(found: AnswerAttribution) -> Table:
    table = _table(["token", "read at", "log p", "p", "log p before"], ["token"])
    for row in records(found.tokens()):
        table.add_row(
            Text(f"{row['number']}:{visible(row['token'])}"),
            str(row["position"]),
            decimals(row["log_prob"], sign=False),
            f"{row['prob']:.3g}",
            decimals(row["embedding_log_prob"], sign=False),
        )
    return table


def _layer_table(found: AnswerAttribution, names: Sequence[str]) -> Table:
    table = _table(["layer", "sum", *names], ["layer"])
    each = [part.layers()["score"].tolist() for part in found.parts]
    for row, *scores in zip(records(found.layers()), *each, strict=True):
        label = f"{'attention' if row['kind'] == 'attn' else 'FFN'} {row['layer']}"
        table.add_row(label, decimals(row["score"]), *map(decimals, scores))
    return table


def _head_table(found: AnswerAttribution, names: Sequence[str], top: int) -> Table:
    table = _table(["head", "sum", *names], ["head"])
    for row in records(found.heads(top)):
        layer, head = row["layer"], row["head"]
        scores = [float(part.head_scores[layer, head]) for part in found.parts]
        table.add_row(f"L{layer}.H{head}", decimals(row["score"]), *map(decimals, scores))
    return table


def _neuron_table(found: AnswerAttribution, kind: Kind, top: int, names: Sequence[str]) -> Table:
    source = ["source"] if kind == "attn" else []
    table = _table(["neuron", *source, "sum", *names, "raises"], ["neuron", "source", "raises"])
    each = (found.ffn if kind == "ffn" else found.attn).scores[:, :top].tolist()
    for row, *scores in zip(records(found.neurons(kind, top, tokens=5)), *each, strict=True):
        table.add_row(
            str(neuron_of(row)),
            *[Text(visible(row["source_token"] or "")[:12])] * len(source),
            decimals(row["score"]),
            *map(decimals, scores),
            Text(" ".join(map(visible, row["raises"][:3]))[:24]),
        )
    return table
