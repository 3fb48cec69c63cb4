"""For the shell: arguments -> the same calls a notebook makes -> text, JSON or files."""

import io
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tl_neuron_attr.attribute import attribute as attribute_prompt
from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.errors import InputError, NeuronAttrError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.index import ProjectionIndex, default_directory, projection_index
from tl_neuron_attr.models import count_tokens, load_model
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.plan import Plan
from tl_neuron_attr.plan import plan as plan_prompts
from tl_neuron_attr.prompts import Prompt, visible
from tl_neuron_attr.readout import CONVENTIONS
from tl_neuron_attr.topk import Kind

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Which neurons gave the answer? Attribute a language model's prediction to its neurons.",
    epilog="Start with:  tl-neuron-attr attribute 'The capital of France is'",
)

_SHOWN = 10
_KEPT = 300
_WIDTH = 100


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


@app.command()
def attribute(
    text: Annotated[str | None, typer.Argument(help="The prompt.", show_default=False)] = None,
    model: Annotated[
        str,
        typer.Option(help="tiny-facts (bundled), a Hugging Face directory, or a hub name."),
    ] = "tiny-facts",
    target: Annotated[
        str | None,
        typer.Option(help="The answer, one token (mind its leading space). Default: the model's."),
    ] = None,
    target_id: Annotated[
        int | None, typer.Option(help="The answer as a token id, in place of --target.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="A second token: explain why the target rather than this one."),
    ] = None,
    against_id: Annotated[
        int | None, typer.Option(help="The same as a token id, in place of --against.")
    ] = None,
    position: Annotated[
        int, typer.Option(help="Where the answer is read: a token's place, or from the end.")
    ] = -1,
    convention: Annotated[
        str, typer.Option(help="exact, published (as the paper's code) or recomputed.")
    ] = "exact",
    top: Annotated[
        int | None,
        typer.Option(
            help=f"Neurons of each kind. Default: {_SHOWN} on screen, {_KEPT} in files and JSON.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Token ids in place of the text, used as they are: 1,403,261."),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Put a BOS token in front. Default: as TransformerLens does for the model.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps. Default: what TransformerLens chooses.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Weights as float32, bfloat16 or float16; scores are float32.")
    ] = "float32",
    index_dir: Annotated[
        Path | None,
        typer.Option(
            "--index",
            help="Directory of projection indices; the model's is made there if need be. Adds the "
            "neurons that lower the answer most, and the best ones' share of the whole.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the Parquet tables and run.json.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
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
    with _errors_in_one_sentence():
        if target is not None and target_id is not None:
            raise InputError("give the answer either as --target or as --target-id")
        if against is not None and against_id is not None:
            raise InputError("give the other token either as --against or as --against-id")
        answer = target if target_id is None else target_id
        other = against if against_id is None else against_id
        prompt = _prompt(text, tokens, answer, other, position, bos)
        if convention not in CONVENTIONS:
            raise InputError(
                f"--convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}"
            )
        if top is not None and top < 1:
            raise InputError(f"--top must be at least 1, got {top}")
        kept = top or (_KEPT if as_json or out is not None else _SHOWN)
        if plan_only:
            found = plan_prompts(
                model,
                n_tokens=_length(prompt, model),
                top=kept,
                convention=convention,
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
        loaded = _load(model, device, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shown below, from the result
            result = attribute_prompt(
                loaded,
                prompt,
                top=kept,
                convention=convention,
                index=None if index_dir is None else _index(loaded, index_dir),
                progress=sys.stderr.isatty(),
            )
        if out is not None:
            result.save(out, progress=sys.stderr.isatty())
        if as_json:
            print(json.dumps(_as_json(result, model), allow_nan=False))
        else:
            _show(result, model, top or _SHOWN, time.perf_counter() - started, out)


@app.command()
def index(
    model: Annotated[
        str,
        typer.Option(help="tiny-facts (bundled), a Hugging Face directory, or a hub name."),
    ] = "tiny-facts",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory to keep indices in. Default: the user's cache.", show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps. Default: what TransformerLens chooses.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Weights as float32, bfloat16 or float16.")
    ] = "float32",
) -> None:
    """The projection of every neuron of a model on the vocabulary, computed once and kept.

    Goes on where it was interrupted. Example: tl-neuron-attr index --model ./my-model --out indices
    """
    with _errors_in_one_sentence():
        directory = default_directory() if out is None else out
        check_writable(directory)
        started = time.perf_counter()
        found = _index(_load(model, device, dtype), directory)
        n_layers, d_mlp = found.ffn.low.shape
        print(
            f"{model}: {n_layers} layers, {n_layers * d_mlp:,} FFN and "
            f"{found.attn.low.numel():,} attention subvalues, {found.k} tokens of each end, "
            f"{time.perf_counter() - started:.1f} s with loading\n"
            f"in {directory / found.weights_sha256}"
        )


# --- arguments --------------------------------------------------------------------------------


def _prompt(
    text: str | None,
    tokens: str | None,
    target: str | int | None,
    against: str | int | None,
    position: int,
    bos: bool | None,
) -> Prompt:
    asked: dict[str, Any] = {"target": target, "against": against, "position": position}
    if (text is None) == (tokens is None):
        raise InputError(
            "give a prompt, either as text or as --tokens; "
            'for example: tl-neuron-attr attribute "The capital of France is"'
        )
    if tokens is None:
        return Prompt(text=text, prepend_bos=bos, **asked)
    if bos is not None:
        raise InputError("--tokens are used as they are: leave out --bos and --no-bos")
    try:
        ids = tuple(int(token) for token in tokens.split(","))
    except ValueError:
        raise InputError(
            f"--tokens must be ids separated by commas, like 1,403,261; got {tokens!r}"
        ) from None
    return Prompt(tokens=ids, **asked)


def _load(name: str, device: str | None, dtype: str) -> Any:
    """The model, without the progress bars and warnings of the libraries that load it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(name, device=device, dtype=dtype)


def _index(model: Any, directory: Path) -> ProjectionIndex:
    return projection_index(model, directory, progress=sys.stderr.isatty())


def _length(prompt: Prompt, model: str) -> int:
    """How many tokens the prompt is."""
    if prompt.tokens is not None:
        return len(prompt.tokens)
    return count_tokens(model, prompt.text or "", bos=prompt.prepend_bos)


@contextmanager
def _errors_in_one_sentence() -> Iterator[None]:
    """An expected error becomes one sentence on standard error and exit code 2."""
    try:
        yield
    except NeuronAttrError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None


# --- JSON -------------------------------------------------------------------------------------


def _as_json(result: Attribution, model: str) -> dict[str, Any]:
    prompt = result.captured.prompt
    predictions = result.predictions(10).rename(columns={"token": "text"})
    neurons = result.neurons(tokens=5)
    return {
        "model": model,
        "prompt": prompt.text,
        "tokens": [
            {"pos": pos, "id": token, "text": token_text}
            for pos, (token, token_text) in enumerate(
                zip(prompt.tokens, prompt.token_texts, strict=True)
            )
        ],
        "read_pos": prompt.read_pos,
        "top_predictions": _records(predictions),
        "target": {
            **asdict(result.target),
            "log_prob": result.log_prob,
        },
        "convention": result.convention,
        "layers": _records(result.layers()),
        "heads": _records(result.heads()),
        "neurons": _records(neurons),
        "certificates": result.certificates(),
        **_from_index(result),
        "warnings": list(result.warnings),
        "seconds": result.seconds,
    }


def _from_index(result: Attribution) -> dict[str, Any]:
    """What only a projection index can tell."""
    if result.index is None or not result.out.affine:
        return {}
    top = max(len(result.ffn_neurons), len(result.attn_neurons))
    return {
        "suppressing": _records(result.suppressing(tokens=5)),
        "shares": _records(result.shares(top)),
    }


def _plan_as_json(found: Plan) -> dict[str, Any]:
    return {**asdict(found), "dtype": str(found.dtype).removeprefix("torch.")}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain Python values, ``None`` where a cell is empty."""
    columns = {name: table[name].tolist() for name in table.columns}
    return [
        {name: None if values[row] is pd.NA else values[row] for name, values in columns.items()}
        for row in range(len(table))
    ]


# --- the terminal -----------------------------------------------------------------------------


def _show(result: Attribution, model: str, top: int, seconds: float, out: Path | None) -> None:
    console = Console(width=min(_WIDTH, Console().width), highlight=False)
    host, prompt = result.host, result.captured.prompt
    dtype = str(host.dtype).removeprefix("torch.")
    console.print(
        f"[bold]{escape(model)}[/]  {host.architecture}, {host.n_layers} layers, {dtype}, "
        f"{host.processing} weights ({host.class_name})"
    )
    console.print(_token_line(prompt.token_texts, prompt.read_pos))
    console.print(_prediction_line(result))
    console.print(_target_line(result))
    console.print(f"\n[bold]Rise in {result.target.quantity}, nats[/], from each layer")
    console.print(_layer_table(result))
    console.print(f"\n[bold]Heads[/], the best {min(top, result.head_scores.numel())}")
    console.print(_head_table(result, top))
    kinds: tuple[tuple[Kind, str], ...] = (("ffn", "FFN"), ("attn", "Attention"))
    for kind, name in kinds:
        table = result.neurons(kind, top, tokens=5)
        certificate = result.certificates()[kind]
        console.print(
            f"\n[bold]{name} value neurons[/], the best {len(table)} {_proof(certificate)}"
        )
        console.print(_neuron_table(table, console.width))
    if result.index is not None and result.out.affine:
        for kind, name in kinds:
            table = result.suppressing(kind, top, tokens=5)
            console.print(f"\n[bold]{name} neurons that lower the target most[/]")
            console.print(_neuron_table(table, console.width))
        console.print(f"\n[bold]Share of all that raises the target[/], in the best {top}")
        console.print(_share_table(result.shares(top)))
    console.print(
        "[dim]raises, lowers: the tokens whose logits the neuron moves most with the sign its "
        "coefficient has here[/]"
    )
    for message in result.warnings:
        console.print(f"[yellow]Warning:[/] {escape(message)}")
    console.print(
        f"\n[dim]{seconds:.1f} s with loading, {result.seconds:.2f} s attributing, "
        f"peak memory {_peak_memory()}[/]"
    )
    if out is not None:
        more = result.index is not None and result.out.affine
        console.print(
            f"[dim]wrote layers, heads, positions, neurons{', suppressing, shares' * more} "
            f"(.parquet) and run.json to "
            f"{escape(str(out))}[/]"
        )


def _token_line(token_texts: tuple[str, ...], read_pos: int) -> Text:
    line = Text.assemble(("Tokens", "bold"), "  ")
    for pos, text in enumerate(token_texts):
        style = "reverse" if pos == read_pos else ""
        line.append(f"{pos}:", style="dim").append(visible(text), style=style)
        line.append("  ")
    return line.append(f"read at {read_pos}", style="dim")


def _prediction_line(result: Attribution) -> Text:
    line = Text.assemble(("Predicts", "bold"), "  ")
    for row in _records(result.predictions(5)):
        line.append(visible(row["token"])).append(f" {row['prob']:.3f}", style="dim")
        line.append("   ")
    return line


def _target_line(result: Attribution) -> str:
    target, before = result.target, result.embedding_log_prob
    line = f"[bold]Target[/]  {escape(visible(target.text))} (id {target.id})"
    if target.against is None:
        return (
            f"{line}   log p = {result.log_prob:.3f} nats, p = {_exp(result.log_prob):.3f}; "
            f"before the first layer p = {_exp(before):.2g}"
        )
    other = target.against
    return (
        f"{line} against {escape(visible(other.text))} (id {other.id})   difference of log p = "
        f"{result.log_prob:+.3f} nats; before the first layer {before:+.3f}"
    )


def _layer_table(result: Attribution) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("layer", "attention", "", "FFN", ""):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    scores = result.layer_scores
    largest = max(float(scores.attn.abs().max()), float(scores.ffn.abs().max()), 1e-9)
    for layer, (attn, ffn) in enumerate(
        zip(scores.attn.tolist(), scores.ffn.tolist(), strict=True)
    ):
        table.add_row(
            str(layer), f"{attn:+.3f}", _bar(attn / largest), f"{ffn:+.3f}", _bar(ffn / largest)
        )
    if not result.host.parallel:  # only there does the sum mean something
        total = float(scores.attn.sum() + scores.ffn.sum())
        label = Text(f"together {total:+.3f}", style="dim")
        table.add_row("sum", f"{scores.attn.sum():+.3f}", "", f"{scores.ffn.sum():+.3f}", label)
    return table


def _bar(share: float, width: int = 24) -> Text:
    """A bar as long as the score is large; the colour tells the sign, as the number does."""
    return Text("█" * round(abs(share) * width), style="blue" if share >= 0 else "red")


def _head_table(result: Attribution, top: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("head")
    table.add_column("score", justify="right")
    table.add_column("brings most from", overflow="fold")
    for row in _records(result.heads(top)):
        positions = result.positions(row["layer"], row["head"])
        sources = [
            f"{source['source_pos']}:{visible(source['token'])} ({source['score']:+.2f})"
            for source in _records(positions.nlargest(3, "score"))
        ]
        label = f"L{row['layer']}.H{row['head']}"
        table.add_row(label, f"{row['score']:+.3f}", Text("  ".join(sources)))
    return table


def _share_table(shares: pd.DataFrame) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "all raising neurons, nats", "share of the best"):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    for row in _records(shares):
        table.add_row(
            {"ffn": "FFN", "attn": "attention"}[row["kind"]],
            f"{row['rise_lower']:.3f} to {row['rise_upper']:.3f}",
            f"{row['share_lower']:.1%} to {row['share_upper']:.1%}",
        )
    return table


def _neuron_table(neurons: pd.DataFrame, width: int) -> Table:
    # plain ints, not numpy's: these become neurons
    rows = _records(neurons)
    attention = any(row["head"] is not None for row in rows)
    labels = [str(_neuron(row)) for row in rows]
    sources = [visible(row["source_token"] or "")[:14] for row in rows]
    # fixed widths: rich would rather drop a narrow column than cut the token lists
    widths = {"neuron": max(map(len, labels))}
    if attention:
        widths["source"] = max(6, *map(len, sources))
    widths |= {"score": 7, "coef.": 7}
    tokens = max(12, (width - sum(widths.values()) - 2 * len(widths) - 2) // 2)
    widths |= {"raises": tokens, "lowers": tokens}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, columns in widths.items():
        number = name in ("score", "coef.")
        table.add_column(
            name,
            width=columns,
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if number else "left",
        )
    for label, source, row in zip(labels, sources, rows, strict=True):
        table.add_row(
            label,
            *([Text(source)] if attention else []),
            f"{row['score']:+.3f}",
            f"{row['coefficient']:+.2f}",
            Text(" ".join(visible(token) for token in row["raises"])),
            Text(" ".join(visible(token) for token in row["lowers"])),
        )
    return table


def _neuron(row: dict[str, Any]) -> FFNNeuron | AttnNeuron:
    if row["kind"] == "ffn":
        return FFNNeuron(row["layer"], row["index"])
    return AttnNeuron(row["layer"], row["head"], row["index"], row["source_pos"])


def _proof(certificate: dict[str, Any]) -> str:
    total, evaluated = certificate["total"], certificate["evaluated"]
    if not certificate["applies"]:
        return f"[dim](all {total:,} scored)[/]"
    if certificate["linear"]:
        return f"[dim](of {total:,}; a contrast is linear, so all are scored exactly)[/]"
    return f"[dim](of {total:,}; {evaluated:,} scored exactly, bounds exclude the others)[/]"


def _exp(log_prob: float) -> float:
    return torch.tensor(log_prob).exp().item()


def _peak_memory() -> str:
    """The most memory this process held, and on a GPU the most it allocated there."""
    parts = []
    if os.name == "posix":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        parts.append(f"{peak / (2**20 if sys.platform == 'darwin' else 2**10):.0f} MiB")
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the GPU")
    return ", ".join(parts) or "unknown"
