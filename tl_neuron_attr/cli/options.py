"""What commands are asked: the options they share, and prompts and models made of them."""

import json
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tl_neuron_attr.errors import InputError, NeuronAttrError
from tl_neuron_attr.index import ProjectionIndex, projection_index
from tl_neuron_attr.models import count_tokens, load_model
from tl_neuron_attr.prompts import Answer, Distribution, Prompt
from tl_neuron_attr.readout import CONVENTIONS, Convention

ModelName = Annotated[
    str,
    typer.Option("--model", help="tiny-facts (bundled), a Hugging Face directory, or a hub name."),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, mps, or auto: spread over all GPUs. Default: what "
        "TransformerLens chooses."
    ),
]
WeightDtype = Annotated[
    str,
    typer.Option("--dtype", help="Weights as float32, bfloat16 or float16; scores are float32."),
]
PromptText = Annotated[str | None, typer.Argument(help="The prompt.", show_default=False)]
TokenIds = Annotated[
    str | None,
    typer.Option("--tokens", help="Token ids in place of the text, used as they are: 1,403,261."),
]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Put a BOS token in front. Default: as TransformerLens does for the model.",
        show_default=False,
    ),
]
TargetText = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        help="The answer, one token (mind its leading space); given several times, all of them "
        "are accepted. Default: the model's own.",
        show_default=False,
    ),
]
TargetId = Annotated[
    list[int] | None,
    typer.Option(
        "--target-id",
        help="The same as token ids, in place of --target.",
        show_default=False,
    ),
]
WholeDistribution = Annotated[
    bool,
    typer.Option(
        "--distribution", help="Explain the model's whole prediction, in place of one answer."
    ),
]
Against = Annotated[
    str | None,
    typer.Option(help="A second token: explain why the target rather than this one."),
]
AgainstId = Annotated[
    int | None, typer.Option(help="The same as a token id, in place of --against.")
]
Position = Annotated[
    int, typer.Option(help="Where the answer is read: a token's place, or from the end.")
]
ConventionName = Annotated[
    str, typer.Option("--convention", help="exact, published (as the paper's code) or recomputed.")
]
OutDirectory = Annotated[
    Path | None, typer.Option("--out", help="Directory for the Parquet tables and run.json.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def prompt_of(
    text: str | None,
    tokens: str | None,
    bos: bool | None,
    position: int,
    target: Answer | None,
    against: str | int | None,
) -> Prompt:
    """The prompt that was asked about, as text or as ids."""
    asked: dict[str, Any] = {"target": target, "against": against, "position": position}
    if (text is None) == (tokens is None):
        raise InputError(
            'give a prompt, either as text or as --tokens; for example "The capital of France is"'
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


def prompts_in(path: Path, bos: bool | None = None) -> list[Prompt]:
    """The prompts of a JSON Lines file: each line a text, or an object that holds one.

    Such an object has ``text``, and may have ``target`` (a list: several accepted answers),
    ``against``, ``position`` and ``prompt_id`` (by default the number of its line, from 1).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"cannot read prompts from {str(path)!r}: {reason}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except (ValueError, RecursionError):
            given = None
        fields = {"text": given} if isinstance(given, str) else given
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            raise InputError(
                f"line {number} of {str(path)!r} must be a JSON string, or an object with a "
                f"'text' (and perhaps target, against, position, prompt_id); got {line[:60]!r}"
            )
        unknown = sorted(fields.keys() - {"text", "target", "against", "position", "prompt_id"})
        if unknown:
            raise InputError(
                f"line {number} of {str(path)!r} has an unknown field {unknown[0]!r}; known are "
                "text, target, against, position and prompt_id"
            )
        name = str(fields.get("prompt_id", number))
        try:
            prompts.append(Prompt(**{**fields, "prompt_id": name}, prepend_bos=bos))
        except InputError as error:
            raise InputError(f"line {number} of {str(path)!r}: {error}") from error
    if not prompts:
        raise InputError(f"there are no prompts in {str(path)!r}")
    return prompts


def load(name: str, device: str | None, dtype: str) -> Any:
    """The model, without the progress bars and warnings of the libraries that load it."""
    quiet_libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(name, device=device, dtype=dtype)


def quiet_libraries() -> None:
    """No progress bars and no remarks of the libraries that load models, from now on."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def length_of(prompt: Prompt, model: str) -> int:
    """How many tokens the prompt is."""
    if prompt.tokens is not None:
        return len(prompt.tokens)
    return count_tokens(model, prompt.text or "", bos=prompt.prepend_bos)


def target_of(
    texts: Sequence[str] | None, ids: Sequence[int] | None, distribution: bool = False
) -> Answer | None:
    """What is asked about: one token, a set of accepted answers, a distribution; or nothing."""
    if texts and ids:
        raise InputError("give the answer either as --target or as --target-id")
    answers = [*(texts or ()), *(ids or ())]
    if distribution:
        if answers:
            raise InputError("give either --distribution or answers with --target, not both")
        return Distribution()
    if len(set(answers)) < len(answers):
        raise InputError("--target gives the same answer twice; give each once")
    return frozenset(answers) if len(answers) > 1 else answers[0] if answers else None


def either(option: str, text: str | None, token: int | None) -> str | int | None:
    """A token given as text under ``option``, or as an id under ``option-id``; not as both."""
    if text is not None and token is not None:
        raise InputError(f"give the token either as {option} or as {option}-id")
    return text if token is None else token


def convention_of(name: str) -> Convention:
    """The convention of this name, known before the model is loaded."""
    for convention in CONVENTIONS:
        if convention == name:
            return convention
    raise InputError(f"--convention must be one of {', '.join(CONVENTIONS)}; got {name!r}")


def command_line(context: typer.Context) -> str:
    """The command as it was given, to be given again; without where it wrote, and --json."""
    line, arguments = ["tl-neuron-attr", str(context.info_name)], []
    for param in context.command.params:
        source = context.get_parameter_source(param.name or "")
        if source is None or source.name != "COMMANDLINE" or param.name in ("out", "as_json"):
            continue
        value = context.params[param.name or ""]
        several = isinstance(value, (tuple, list))
        values = [str(each) for each in value] if several else [str(value)]
        if param.param_type_name == "argument":
            arguments += values
        elif isinstance(value, bool):
            line.append((param.opts if value else param.secondary_opts)[0])
        elif getattr(param, "multiple", False):
            line += [word for each in values for word in (param.opts[0], each)]
        else:
            line += [param.opts[0], *values]
    if any(value.startswith("-") for value in arguments):
        line.append("--")
    return shlex.join([*line, *arguments])


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """An expected error becomes one sentence on standard error and exit code 2."""
    try:
        yield
    except NeuronAttrError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None


def index_of(model: Any, directory: Path) -> ProjectionIndex:
    """The model's projection index in ``directory``, made there if need be."""
    return projection_index(model, directory, progress=sys.stderr.isatty())
