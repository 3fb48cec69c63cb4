"""How commands answer: plain rows for JSON, tables and lines for a terminal."""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.display import counted, decimals
from tl_neuron_attr.host import Host
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.prompts import visible
from tl_neuron_attr.tables import records

WIDTH = 100

_LEAST = 8
"""Characters below which a list of tokens says nothing."""


def model_line(host: Host, model: str) -> str:
    """Which model this is, and how its weights are held."""
    dtype = str(host.dtype).removeprefix("torch.")
    return (
        f"[bold]{escape(model)}[/]  {host.architecture}, {counted(host.n_layers, 'layer')}, "
        f"{dtype}, {host.processing} weights ({host.class_name})"
    )


def token_line(token_texts: tuple[str, ...], read_pos: int) -> Text:
    """The prompt's tokens with their positions, the read position marked."""
    line = Text.assemble(("Tokens", "bold"), "  ")
    for pos, text in enumerate(token_texts):
        style = "reverse" if pos == read_pos else ""
        line.append(f"{pos}:", style="dim").append(visible(text), style=style)
        line.append("  ")
    return line.append(f"read at {read_pos}", style="dim")


def target_line(result: Attribution) -> str:
    """What is explained, and how probable it is."""
    target, before = result.target, result.embedding_log_prob
    line = f"[bold]Target[/]  {escape(target.words_and_ids)}"
    if target.distribution is not None:
        return (
            f"{line}   {target.quantity} = {decimals(result.log_prob, sign=False)} nats; "
            f"before the first layer {decimals(before)}"
        )
    if target.against is None:
        log_prob = decimals(result.log_prob, sign=False)
        return (
            f"{line}   log p = {log_prob} nats, p = {math.exp(result.log_prob):.3g}; "
            f"before the first layer p = {math.exp(before):.2g}"
        )
    return (
        f"{line}   difference of log p = "
        f"{decimals(result.log_prob)} nats; before the first layer {decimals(before)}"
    )


def asked_as_json(result: Attribution, model: str) -> dict[str, Any]:
    """What was asked of which model, and what it predicts."""
    prompt = result.captured.prompt
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
        "top_predictions": records(result.predictions(10).rename(columns={"token": "text"})),
        "target": {
            **result.target.facts(),
            "log_prob": result.log_prob,
        },
        "convention": result.convention,
    }


def bar(share: float, width: int = 24) -> Text:
    """A bar as long as the score is large; the colour tells the sign, as the number does."""
    return Text("█" * round(abs(share) * width), style="blue" if share >= 0 else "red")


def neuron_lines(neurons: pd.DataFrame, width: int, token_texts: Sequence[str] = ()) -> Table:
    """Neurons, one a line, with the tokens they raise and lower.

    Query neurons (a column ``position``) with the position where they do most: ``token_texts`` are
    those of the prompt.
    """
    # plain ints, not numpy's: these become neurons
    rows = records(neurons)
    attention = any(row["head"] is not None for row in rows)
    query = "position" in neurons.columns
    labels = [str(neuron_of(row)) for row in rows]
    longest = 9 if attention and query else 14
    sources = [visible(row["source_token"] or "")[:longest] for row in rows]
    # fixed widths: rich would rather drop a narrow column than cut the token lists
    widths = {"neuron": max(6, *map(len, labels))}
    if attention:
        widths["source"] = max(6, *map(len, sources))
    at = [f"{row['position']}:{visible(token_texts[int(row['position'])])}" for row in rows * query]
    if query:
        widths["at"] = max(len(place[:longest]) for place in at)
    widths |= {"score": 7, "coef.": 7}
    widths |= token_widths(width - sum(widths.values()) - 2 * (len(widths) - 1))
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
    for number, (label, source, row) in enumerate(zip(labels, sources, rows, strict=True)):
        table.add_row(
            label,
            *([Text(source)] if attention else []),
            *([Text(at[number][:longest])] if query else []),
            decimals(row["score"]),
            decimals(row["coefficient"], 2),
            *(
                Text(" ".join(map(visible, row[name])))
                for name in ("raises", "lowers")
                if name in widths
            ),
        )
    return table


def token_widths(left: int) -> dict[str, int]:
    """Columns of token lists in what a line has left: both, the first, or none; never numbers."""
    if left >= 2 * (_LEAST + 2):
        return dict.fromkeys(("raises", "lowers"), left // 2 - 2)
    return {"raises": left - 2} if left >= _LEAST + 2 else {}


def print_table(console: Console, table: Table) -> None:
    """Print a table whose cells are not to be cut: in parts, where the terminal is too narrow.

    Each part begins with the first column.
    """
    cells = [list(column.cells) for column in table.columns]
    sizes = []
    for of_column, column in zip(cells, table.columns, strict=True):
        found = [Measurement.get(console, console.options, each).maximum for each in of_column]
        header = Measurement.get(console, console.options, column.header)
        # the words of a header may stand under each other
        sizes.append(max([*found, header.maximum if column.no_wrap else header.minimum]))
        # rich would else cut cells to keep the header of another column on one line
        column.no_wrap = sizes[-1] >= header.maximum
    parts: list[list[int]] = [[0]]
    for number in range(1, len(sizes)):
        taken = sum(sizes[place] + 2 for place in parts[-1])
        if taken + sizes[number] > console.width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(number)
    if len(parts) == 1:
        console.print(table)
        return
    for number, part in enumerate(parts):
        one = Table(
            box=None,
            pad_edge=False,
            header_style="dim",
            show_header=table.show_header,
            caption=table.caption if number == len(parts) - 1 else None,
        )
        for place in part:
            column = table.columns[place]
            one.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap)
        for row, line in enumerate(table.rows):
            one.add_row(*(cells[place][row] for place in part), style=line.style)
        console.print(one)


def neuron_of(row: dict[str, Any]) -> FFNNeuron | AttnNeuron:
    """The neuron that a row of a neuron table is about."""
    if row["kind"] == "ffn":
        return FFNNeuron(row["layer"], row["index"])
    return AttnNeuron(row["layer"], row["head"], row["index"], row["source_pos"])


def show_written(console: Console, files: str, directory: Path, page: str = "report.html") -> None:
    """Which files were written where, and what to open: a path on a line of its own, whole."""
    console.print(f"\n[dim]wrote {files} to {escape(str(directory))}[/]")
    console.print(f"open {escape(str(directory / page))}", soft_wrap=True)


def peak_memory() -> str:
    """The most memory this process held, and on a GPU the most it allocated there."""
    parts = []
    if os.name == "posix":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        parts.append(f"{peak / (2**20 if sys.platform == 'darwin' else 2**10):.0f} MiB")
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the GPU")
    return ", ".join(parts) or "unknown"
