"""``tl-neuron-attr doctor``: every check of a model on this machine, as a card."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tl_neuron_attr.cli.options import (
    AsJson,
    Bos,
    Device,
    ModelName,
    Position,
    PromptText,
    TokenIds,
    WeightDtype,
    errors_in_one_sentence,
    load,
    prompt_of,
)
from tl_neuron_attr.cli.terminal import WIDTH, show_written
from tl_neuron_attr.doctor import ModelCheck, Status, check_model
from tl_neuron_attr.doctor.card import card_lines
from tl_neuron_attr.doctor.subject import COPY_LIMIT, default_prompt
from tl_neuron_attr.errors import InputError, UnsupportedModelError
from tl_neuron_attr.files import check_writable, write_files
from tl_neuron_attr.host import open_host
from tl_neuron_attr.prompts import Prompt
from tl_neuron_attr.report.page import document

_STYLES: dict[Status, str] = {
    "ok": "green",
    "approximate": "yellow",
    "refused": "yellow",
    "fails": "bold red",
    "not checked": "dim",
}


def doctor(
    text: PromptText = None,
    model: ModelName = "tiny-facts",
    tokens: TokenIds = None,
    position: Position = -1,
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    copy_gib: Annotated[
        float,
        typer.Option(
            "--copy-gib", help="What a copy of the weights in float64 may take; 0 for no copy."
        ),
    ] = COPY_LIMIT / 2**30,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Directory for the card as doctor.json and doctor.html."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Whether a model can be trusted with: every check, run on it here.

    A prompt may be given, for checks are of one: by default a short sentence. The exit code is 0 if
    all that was checked holds, 1 if not, and 2 if nothing could be loaded or asked.

    Example: tl-neuron-attr doctor --model tiny-facts
    """
    with errors_in_one_sentence():
        given = text is not None or tokens is not None
        prompt = prompt_of(text, tokens, bos, position, None, None) if given else None
        copy_limit = _in_whole_bytes(copy_gib)
        if out is not None:
            check_writable(out)
        loaded = load(model, device, dtype)
        if not given and (position != -1 or bos is not None):
            prompt = _default(loaded, bos, position)
        found = check_model(loaded, prompt, copy_limit=copy_limit)
        if out is not None:
            _write(found, out)
    if as_json:
        print(json.dumps(found.to_dict(), allow_nan=False))
    else:
        _show(found, out)
    raise typer.Exit(0 if found.holds else 1)


def _in_whole_bytes(copy_gib: float) -> int:
    size = copy_gib * 2**30
    if not 0 <= size < math.inf:  # False for NaN
        raise InputError(f"--copy-gib must be a number of GiB, 0 for no copy; got {copy_gib}")
    return int(size)


def _default(model: Any, bos: bool | None, position: int) -> Prompt | None:
    """The prompt that is asked where none was given, as the options want it."""
    try:
        return default_prompt(open_host(model), position=position, prepend_bos=bos)
    except UnsupportedModelError:  # the card says so
        return None


def _show(found: ModelCheck, out: Path | None) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    for each in card_lines(found, console.width):
        line = Text(each.text)
        if each.status is not None:
            begins = each.text.startswith(each.status)
            line.stylize(_STYLES[each.status], 0, len(each.status) if begins else None)
        console.print(line, soft_wrap=True)
    if out is not None:
        show_written(console, "doctor.json and doctor.html", out, "doctor.html")


def _write(found: ModelCheck, out: Path) -> None:
    facts = json.dumps(found.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    page = document(f"Doctor: {found.model_name}", found._repr_html_(), plotly=False)
    write_files(
        out,
        {
            "doctor.json": lambda path: path.write_text(facts, encoding="utf-8"),
            "doctor.html": lambda path: path.write_text(page, encoding="utf-8"),
        },
    )
