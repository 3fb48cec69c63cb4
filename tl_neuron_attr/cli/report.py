"""``tl-neuron-attr report``: one HTML file of what was saved, or an index of many prompts."""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from tl_neuron_attr.attribute import attribute
from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.cli.options import (
    AsJson,
    Bos,
    ConventionName,
    Device,
    WeightDtype,
    convention_of,
    errors_in_one_sentence,
    load,
    prompts_in,
)
from tl_neuron_attr.errors import InputError, NeuronAttrError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.knowledge import KnowledgePrompt, load_prompts
from tl_neuron_attr.prompts import Prompt

_LIMIT = 50


def report(
    source: Annotated[
        str,
        typer.Argument(
            help="A directory that a command wrote with --out, or one of several of attribute; or, "
            "with --model, prompts: a .jsonl file, a knowledge type (capital), paper, all.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Attribute the prompts with this model: tiny-facts, a directory, a hub name.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help=f"At most so many prompts, evenly from all. Default: {_LIMIT}.", show_default=False
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Neurons of each kind, with --model.")] = 100,
    convention: ConventionName = "exact",
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write (default: report.html in the directory itself); of several "
            "prompts the directory for index.html and a page each.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What was found as a page to look at: of one prompt, or an index of many.

    Example: tl-neuron-attr report france

    Example: tl-neuron-attr report capital --model tiny-facts --out capitals --limit 20
    """
    from tl_neuron_attr.report import is_saved, redraw_report, report_set
    from tl_neuron_attr.report.again import check_one_command, draw_again, has_page

    with errors_in_one_sentence():
        place = Path(source)
        left_out: list[str] = []
        if model is None:
            check_one_command(place)
        if model is None and has_page(place):
            written = draw_again(place, out)
        elif model is None and place.is_dir() and is_saved(place):
            written = redraw_report(place, out)
        elif model is None:
            written = report_set(_saved_in(place), _directory(out))
        else:
            asked = _asked(source, bos, _LIMIT if limit is None else limit)
            if top < 1:
                raise InputError(f"--top must be at least 1, got {top}")
            read_as = convention_of(convention)
            directory = _directory(out)
            loaded = load(model, device, dtype)
            options = {"top": top, "convention": read_as}
            written = report_set(_attributed(loaded, asked, options, left_out), directory)
        if as_json:
            print(json.dumps({"written": str(written), "left_out": left_out}))
            return
        for message in left_out:
            print(f"Left out: {message}")
        print(f"wrote {written}")


def _directory(out: Path | None) -> Path:
    if out is None:
        raise InputError("an index of several prompts needs a directory: give --out DIR")
    return check_writable(out)


def _saved_in(place: Path) -> list[Path]:
    """The saved runs in a directory of them."""
    from tl_neuron_attr.report import is_saved

    found = sorted(each for each in place.iterdir() if is_saved(each)) if place.is_dir() else []
    if not found:
        raise InputError(
            f"{str(place)!r} is no directory that attribute --out wrote, nor one of such "
            "directories (tl-neuron-attr summary reads runs); to report on prompts give --model too"
        )
    return found


def _asked(source: str, bos: bool | None, limit: int) -> list[Prompt]:
    """The prompts, no more than ``limit``, evenly from all."""
    if limit < 1:
        raise InputError(f"--limit must be at least 1, got {limit}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        given = _prompts(source, bos)
    count = min(limit, len(given))
    return [given[place * len(given) // count] for place in range(count)]


def _prompts(source: str, bos: bool | None) -> list[Prompt]:
    try:
        return [_of_knowledge(each, bos) for each in load_prompts(source)]
    except InputError:
        if not source.endswith(".jsonl"):
            raise
    return prompts_in(Path(source), bos)  # as the other commands read it, perhaps without answers


def _of_knowledge(asked: KnowledgePrompt, bos: bool | None) -> Prompt:
    return Prompt(text=asked.text, target=asked.answer, prompt_id=asked.prompt_id, prepend_bos=bos)


def _attributed(
    loaded: Any, asked: list[Prompt], options: dict[str, Any], left_out: list[str]
) -> Iterator[Attribution]:
    """One result after the other; a prompt that cannot be attributed is named and passed over."""
    for prompt in tqdm(asked, unit="prompt", leave=False, disable=not sys.stderr.isatty()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are on the prompt's page
                result = attribute(loaded, prompt, **options)
        except NeuronAttrError as error:
            left_out.append(f"{prompt.prompt_id}: {error}")
            continue
        yield result
