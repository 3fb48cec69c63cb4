"""What is asked: prompts of a file, a knowledge type or a list, one after another.

``.jsonl`` (an object or a text a line), ``.csv`` and ``.parquet`` have these fields or columns:
``text`` (or ``prompt``, or ``tokens``: ids), and perhaps ``answer`` (follows the text after one
space) or ``target`` (a token as it is, or an id; without either the model's own prediction),
``against``, ``position``, ``knowledge_type``, ``prompt_id``; ``relation``, ``subject`` and
``aliases`` may be there and are not used. What is wrong with the file stops a run before it begins;
what is wrong with one prompt becomes a row of ``errors``.
"""

import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.knowledge import AskedPrompt, KnowledgePrompt, load_prompts
from tl_neuron_attr.knowledge.entries import UNTYPED
from tl_neuron_attr.knowledge.sets import csv_rows
from tl_neuron_attr.prompts import Prompt, as_prompt
from tl_neuron_attr.runs.totals import ALL_TYPES

_USED = (
    "text",
    "prompt",
    "tokens",
    "answer",
    "target",
    "against",
    "position",
    "knowledge_type",
    "prompt_id",
)
_UNUSED = ("relation", "subject", "aliases")
_WHOLE = ("target", "against", "position")
"""Columns that may hold whole numbers, and gaps."""
_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt of a run, or why it is none."""

    prompt_id: str
    knowledge_type: str
    text: str | None
    prompt: Prompt | None
    error: str | None = None


Source = Callable[[], Iterator[Asked]]
"""Gives all prompts anew at each call, so that a long file need not be held in memory."""


def source_of(prompts: Any) -> Source:
    """The prompts that ``prompts`` names or holds.

    A path of a ``.jsonl``, ``.csv`` or ``.parquet`` file is read as this module says, any other
    text by ``load_prompts``; else prompts, texts, token ids, mappings with the fields above.

    Raises:
        InputError: If there are none, or a file cannot be read; faults further on in a file are
            raised when it is walked through.
    """
    if isinstance(prompts, (str, os.PathLike)):
        name = os.fspath(prompts)
        reader = _READERS.get(Path(name).suffix)
        if reader is not None and ("/" in name or Path(name).exists()):
            if not Path(name).is_file():
                raise InputError(f"cannot read prompts from {name!r}: there is no such file")
            return lambda: _numbered(reader(Path(name)), Path(name).stem, name)
        # a set that repeats a prompt says so when it is planned, by its own warning
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            listed: list[Any] = list(load_prompts(name))
        return lambda: (_given(each, number) for number, each in enumerate(listed))
    if isinstance(prompts, (Mapping, bytes, Prompt)) or not isinstance(prompts, Iterable):
        raise InputError(
            f"prompts must be a file, a knowledge type or several prompts, got a "
            f"{type(prompts).__name__}"
        )
    listed = list(prompts)
    if not listed:
        raise InputError("there are no prompts; give at least one")
    return lambda: (_given(each, number) for number, each in enumerate(listed))


def _given(each: Any, number: int) -> Asked:
    """A prompt in any form that a list may hold."""
    if isinstance(each, KnowledgePrompt):
        return _asked(
            {"text": each.text, "target": each.answer},
            each.prompt_id,
            each.fact.knowledge_type,
            f"prompt {each.prompt_id!r}",
        )
    if isinstance(each, AskedPrompt):
        target = None if each.tokenized.target is None else each.tokenized.target.id
        fields = {"tokens": each.tokenized.tokens, "target": target}
        found = _asked(
            {**fields, "position": each.tokenized.read_pos},
            each.prompt.prompt_id,
            each.prompt.fact.knowledge_type,
            f"prompt {each.prompt.prompt_id!r}",
        )
        return replace(found, text=each.prompt.text)
    if isinstance(each, Mapping):
        return _of_fields(dict(each), str(number), f"prompt {number}")
    name = each.prompt_id if isinstance(each, Prompt) and each.prompt_id else str(number)
    text = each if isinstance(each, str) else each.text if isinstance(each, Prompt) else None
    try:
        prompt = replace(as_prompt(each), prompt_id=name)
    except InputError as error:
        return Asked(
            prompt_id=name, knowledge_type=UNTYPED, text=_sound(text), prompt=None, error=str(error)
        )
    return Asked(prompt_id=name, knowledge_type=UNTYPED, text=text, prompt=prompt)


def _numbered(rows: Iterator[tuple[str, str, Any]], stem: str, name: str) -> Iterator[Asked]:
    """Rows of a file as prompts; there must be one at least."""
    empty = True
    for number, where, fields in rows:
        empty = False
        yield _of_fields(fields, f"{stem}/{number}", where)
    if empty:
        raise InputError(f"there are no prompts in {name!r}")


def _of_fields(fields: dict[str, Any], name: str, where: str) -> Asked:
    """One row: unknown fields, and several that say the same, are the file's fault."""
    fields = {key: value for key, value in fields.items() if value is not None}
    unknown = sorted(str(key) for key in fields.keys() - {*_USED, *_UNUSED})
    if unknown:
        raise InputError(
            f"{where} has an unknown field {unknown[0]!r}; known are "
            f"{', '.join((*_USED, *_UNUSED))}"
        )
    for several in (("text", "prompt", "tokens"), ("answer", "target")):
        given = [key for key in several if key in fields]
        if len(given) > 1:
            raise InputError(f"{where} has both {given[0]} and {given[1]}; give one of them")
    for key in ("prompt_id", "knowledge_type", "text", "prompt", "answer"):
        if key in fields and not isinstance(fields[key], str):
            raise InputError(f"{where}: {key} must be text, got {fields[key]!r}")
    if "prompt" in fields:
        fields["text"] = fields.pop("prompt")
    asked = {key: fields[key] for key in ("text", "tokens", "against", "position") if key in fields}
    if "answer" in fields:
        answer = fields["answer"].removeprefix(" ")
        asked["target"] = answer and " " + answer  # an empty one is no token
    elif "target" in fields:
        asked["target"] = fields["target"]
    knowledge_type = fields.get("knowledge_type", UNTYPED)
    return _asked(asked, fields.get("prompt_id", name), knowledge_type, where)


def _asked(fields: dict[str, Any], name: str, knowledge_type: str, where: str) -> Asked:
    if knowledge_type == ALL_TYPES:
        raise InputError(
            f"{where}: the knowledge type {ALL_TYPES!r} stands for all of them; rename it"
        )
    text = fields.get("text")
    known: dict[str, Any] = {
        "prompt_id": _sound(name),
        "knowledge_type": _sound(knowledge_type),
        "text": _sound(text),
    }
    try:
        return Asked(**known, prompt=Prompt(**fields, prompt_id=name))
    except InputError as error:
        return Asked(**known, prompt=None, error=str(error))


def _sound(text: str | None) -> str | None:
    """Text that a file can hold."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")


# --- files ------------------------------------------------------------------------------------

_Rows = Iterator[tuple[str, str, Any]]
"""Number of the row, where it is for errors, its fields."""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, split at newlines alone: JSON texts may hold other separators."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise InputError(
            f"cannot read prompts from {str(path)!r}: {error.strerror or error}"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"line {number} of {str(path)!r} is not UTF-8 (byte {error.start} of it is "
            f"{error.object[error.start]:#04x}); save the file as UTF-8"
        ) from None


def _of_jsonl(path: Path) -> _Rows:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            given = json.loads(line)
        except RecursionError:
            raise InputError(f"{where} is nested too deeply") from None
        except ValueError as error:
            raise InputError(f"{where} is no JSON: {error}") from None
        fields = {"text": given} if isinstance(given, str) else given
        if not isinstance(fields, dict):
            raise InputError(f"{where} must be an object or a text, got {line.strip()[:60]!r}")
        yield str(number), where, fields


def _of_csv(path: Path) -> _Rows:
    # a line is split as csv wants its lines: also where a carriage return stands alone
    lines = (part for _, line in _lines(path) for part in io.StringIO(line, newline=""))
    for number, where, cells in csv_rows(path, lines, _check_columns):
        yield str(number), where, _from_text({**cells}, where)


def _check_columns(where: str, names: Sequence[str]) -> None:
    unknown = sorted({*names} - {*_USED, *_UNUSED, ""})  # one without a name may stay empty
    if unknown:
        raise InputError(
            f"{where} has an unknown column {unknown[0]!r}; known are "
            f"{', '.join((*_USED, *_UNUSED))}"
        )
    if not {"text", "prompt", "tokens"} & {*names}:
        raise InputError(
            f"{where} lacks a column text (or prompt, or tokens); it has {', '.join(names)}"
        )


def _from_text(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Numbers of a CSV file as such."""
    try:
        if "tokens" in fields:
            fields["tokens"] = [int(each) for each in fields["tokens"].replace(",", " ").split()]
        if "position" in fields:
            fields["position"] = int(fields["position"])
    except ValueError:
        raise InputError(f"{where}: tokens and position must be whole numbers") from None
    return fields


def _of_parquet(path: Path) -> _Rows:
    number = 0
    try:
        file = pq.ParquetFile(path)
        _check_columns(repr(str(path)), file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=_ROWS):
            for fields in batch.to_pylist():
                number += 1
                whole = {name: _whole(fields[name]) for name in _WHOLE if name in fields}
                yield str(number), f"row {number} of {str(path)!r}", fields | whole
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"a text between rows {number + 1} and {number + _ROWS} of {str(path)!r} is not UTF-8 "
            f"({error.reason}); write the file with sound texts"
        ) from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"cannot read prompts from {str(path)!r}: it is no whole Parquet file "
            f"({str(error).splitlines()[0]})"
        ) from None


def _whole(value: Any) -> Any:
    """A float as pandas makes it of a whole number, in a column with gaps, as that number."""
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() else value


_READERS: Mapping[str, Callable[[Path], _Rows]] = {
    ".jsonl": _of_jsonl,
    ".csv": _of_csv,
    ".parquet": _of_parquet,
}
