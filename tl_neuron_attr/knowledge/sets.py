"""Sets of prompts, from the package or from files: ``load_prompts(source)``.

Four kinds of file are read; all are UTF-8, with or without a byte order mark.

- ``.jsonl``: an object a line, with ``text`` (or ``prompt``) and ``answer``, and perhaps
  ``aliases`` (a list), ``knowledge_type``, ``relation``, ``subject``, ``prompt_id``.
- ``.csv``: the same as columns, aliases separated by ``|``.
- a relation of LRE (Hernandez et al. 2024, github.com/evandez/relations), ``.json``: every sample
  in every template; or a folder with such files, at any depth.
- ``known_1000`` of ROME (Meng et al. 2022), ``.json``: a list of objects with ``prompt``,
  ``attribute``, ``relation_id``.

An answer follows its text after one space, whether or not it was written with it. A text that
occurs twice with the same answer is taken once, and a warning says so. Where a relation has several
answers to one text, that is an error in a ``.jsonl`` or ``.csv`` file, whose lines can be joined by
hand; the published files hold some, and there the later answers become aliases of the first.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import pandas as pd

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.knowledge.entries import UNTYPED, Entry, prompt_of_text, without_repeats
from tl_neuron_attr.knowledge.facts import (
    KNOWLEDGE_TYPES,
    KnowledgePrompt,
    in_order,
    knowledge_prompts,
    paper_prompts,
)
from tl_neuron_attr.knowledge.trivia_qa import load_trivia_qa
from tl_neuron_attr.tables import write_tables

PROMPT_COLUMNS = ("knowledge_type", "relations", "facts", "answers", "prompts")

_FIELDS = ("text", "answer", "aliases", "knowledge_type", "relation", "subject", "prompt_id")


def load_prompts(source: str | os.PathLike[str]) -> tuple[KnowledgePrompt, ...]:
    """The prompts that ``source`` names, in its order.

    ``source`` is a knowledge type (``"capital"``: every fact of it in every wording), ``"all"`` of
    them, ``"paper"`` (``paper_prompts()``: every fact in two wordings), ``"triviaqa:SPLIT"``
    (``load_trivia_qa``; asks the network), or the path of a file or folder as this module's
    docstring says. A file that has one of these names is read as ``./capital``.

    Raises:
        InputError: One sentence with the file, the line and the fault; see above for what is one.
    """
    name = os.fspath(source)
    if name in KNOWLEDGE_TYPES:
        return knowledge_prompts(name)
    if name in ("all", "paper"):
        return knowledge_prompts() if name == "all" else paper_prompts()
    if name.startswith("triviaqa:"):
        return load_trivia_qa(name.removeprefix("triviaqa:"))
    path = Path(name)
    entries = list(_entries(path))
    if not entries:
        raise InputError(f"there are no prompts in {name!r}")
    return without_repeats(entries, name)


def save_prompts(
    prompts: Sequence[KnowledgePrompt],
    path: str | os.PathLike[str],
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write ``prompts`` to a ``.jsonl`` file that ``load_prompts`` reads.

    ``beside`` are texts to write with it, by file name. All files appear together, or none.

    Raises:
        InputError: If ``path`` has another ending.
        OutputError: If it cannot be written; what was there before is untouched then.
    """
    place = Path(path)
    if place.suffix != ".jsonl":
        raise InputError(f"prompts are written to a .jsonl file, not to {str(place)!r}")
    rows = [
        {
            "prompt_id": prompt.prompt_id,
            "knowledge_type": prompt.fact.knowledge_type,
            "relation": prompt.fact.relation,
            "subject": prompt.fact.subject,
            "text": prompt.text,
            "answer": prompt.answer.removeprefix(" "),
            "aliases": list(prompt.fact.aliases),
        }
        for prompt in prompts
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_tables(place.parent, {}, {**(beside or {}), place.name: text})


def prompt_table(prompts: Sequence[KnowledgePrompt]) -> pd.DataFrame:
    """What there is of each knowledge type, and of all together.

    Columns ``knowledge_type, relations, facts, answers, prompts``; a fact is a subject of a
    relation, or a text where prompts name no subject.
    """
    rows = []
    for name in [*in_order(prompt.fact.knowledge_type for prompt in prompts), "all"]:
        some = [prompt for prompt in prompts if name in ("all", prompt.fact.knowledge_type)]
        relations = {(prompt.fact.knowledge_type, prompt.fact.relation) for prompt in some}
        facts = {
            (prompt.fact.knowledge_type, prompt.fact.relation, prompt.fact.subject or prompt.text)
            for prompt in some
        }
        answers = {prompt.answer for prompt in some}
        rows.append((name, len(relations), len(facts), len(answers), len(some)))
    return pd.DataFrame(rows, columns=list(PROMPT_COLUMNS))


# --- files ------------------------------------------------------------------------------------


def _entries(path: Path) -> Iterator[Entry]:
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise InputError(f"cannot read prompts from {str(path)!r}: {error}") from None
    if is_folder:
        yield from _of_folder(path)
    elif path.suffix in _READERS and exists:
        yield from _READERS[path.suffix](path, _text_of(path))
    elif not exists:
        raise InputError(
            f"there are no prompts called {str(path)!r}: it is neither a file nor one of "
            f"{', '.join(KNOWLEDGE_TYPES)}, all, paper, triviaqa:SPLIT"
        )
    else:
        raise InputError(
            f"cannot tell what kind of file {str(path)!r} is: its name must end in "
            f"{', '.join(_READERS)}"
        )


def _of_folder(path: Path) -> Iterator[Entry]:
    found = sorted(path.rglob("*.json"))
    if not found:
        raise InputError(
            f"{str(path)!r} is a folder without any .json file; give a file, or a folder of LRE "
            "relations"
        )
    for file in found:
        given = _json(_text_of(file), str(file))
        if not _is_lre(given):
            raise InputError(
                f"{str(file)!r} is no LRE relation, which all .json files of a folder must be; "
                "give the file itself"
            )
        yield from _of_lre(file, given)


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x})"
    raise InputError(f"cannot read prompts from {str(path)!r}: {reason}")


def _of_jsonl(path: Path, text: str) -> Iterator[Entry]:
    # not splitlines(), which also splits at characters that may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        given = _json(line, where)
        if not isinstance(given, dict):
            raise InputError(
                f"{where} must be an object with text and answer, got {line.strip()[:60]!r}"
            )
        fields = {name: value for name, value in given.items() if value is not None}
        aliases = fields.get("aliases", [])
        if not isinstance(aliases, list) or not all(isinstance(word, str) for word in aliases):
            raise InputError(f"{where}: aliases must be a list of texts, got {aliases!r}")
        for name, value in fields.items():
            if name != "aliases" and not isinstance(value, str):
                raise InputError(f"{where}: {name} must be text, in quotes; got {value!r}")
        yield _entry(path, number, fields, where)


def _of_csv(path: Path, text: str) -> Iterator[Entry]:
    for number, where, row in csv_rows(path, io.StringIO(text, newline="")):
        fields: dict[str, Any] = {**row}
        if "aliases" in row:
            fields["aliases"] = [word.strip() for word in row["aliases"].split("|")]
        yield _entry(path, number, fields, where)


def csv_rows(
    path: Path,
    lines: Iterable[str],
    check: Callable[[str, Sequence[str]], object] | None = None,
) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Each row that is not empty: its number, what to call it, and its cells that are not.

    Numbers count rows below the header, from 1; errors, and what a row is called, name the line.

    ``check`` is called with what to call the header and with its names.

    Raises:
        InputError: If the lines are no CSV, a column's name occurs twice, or a row has not one cell
            for each column.
    """
    rows = csv.reader(lines, strict=True)
    header: list[str] = []
    number = 0
    try:
        for row in rows:
            where = f"line {rows.line_num} of {str(path)!r}"
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = [name.strip() for name in row]
                if len(set(header)) < len(header):
                    raise InputError(f"{where}: a column's name occurs twice")
                if check is not None:
                    check(where, header)
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{where} has {len(row)} cells and the header {len(header)}; put quotes "
                    "around a text with commas"
                )
            cells = {name: cell for name, cell in zip(header, row, strict=True) if cell}
            number += 1
            yield number, where, cells
    except csv.Error as error:
        raise InputError(f"line {rows.line_num} of {str(path)!r} is no CSV: {error}") from None


def _entry(path: Path, number: int, fields: dict[str, Any], where: str) -> Entry:
    if "prompt" in fields:
        if "text" in fields:
            raise InputError(f"{where} has both text and prompt; give one of them")
        fields = {**fields, "text": fields["prompt"]}
        del fields["prompt"]
    unknown = sorted(fields.keys() - set(_FIELDS))
    if unknown:
        raise InputError(
            f"{where} has an unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}"
        )
    for name in ("text", "answer"):
        if name not in fields:
            raise InputError(f"{where} lacks {name!r}")
    given = {name: value for name, value in fields.items() if value or name in ("text", "answer")}
    named = {"prompt_id": f"{path.stem}/{number}", **given}
    return Entry(prompt=prompt_of_text(**named, where=where), where=where, published=False)


def _of_json(path: Path, text: str) -> Iterator[Entry]:
    given = _json(text, str(path)) if text.strip() else []
    if _is_lre(given):
        yield from _of_lre(path, given)
    elif isinstance(given, list):
        yield from _of_known(path, given)
    else:
        raise InputError(
            f"{str(path)!r} is neither an LRE relation (an object with prompt_templates and "
            "samples) nor known_1000 (a list of objects with prompt and attribute)"
        )


def _is_lre(given: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(given, dict) and "prompt_templates" in given and "samples" in given


def _of_lre(path: Path, given: dict[str, Any]) -> Iterator[Entry]:
    """Every sample in every template, those for zero-shot use included.

    The knowledge type is the range of the relation (``language``), by which answers of several
    relations belong together.
    """
    lists = [given["prompt_templates"], given.get("prompt_templates_zs") or []]
    if not all(isinstance(templates, list) for templates in lists):
        raise InputError(f"{str(path)!r}: prompt_templates must be a list of texts")
    templates = [template for templates in lists for template in templates]
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise InputError(
                f"{str(path)!r}: a template must be a text with one {{}} for the subject, "
                f"got {template!r}"
            )
    samples = given["samples"]
    if not isinstance(samples, list):
        raise InputError(f"{str(path)!r}: samples must be a list")
    properties = given.get("properties")
    kind = properties.get("range_name") if isinstance(properties, dict) else None
    for number, sample in enumerate(samples):
        where = f"sample {number} of {str(path)!r}"
        subject, answer = _texts(sample, ("subject", "object"), where)
        for wording, template in enumerate(dict.fromkeys(templates)):
            prompt = prompt_of_text(
                prompt_id=f"{path.stem}/{number}/{wording}",
                text=template.replace("{}", subject.strip()),
                answer=answer.strip(),  # the published files hold a few with spaces behind
                knowledge_type=kind if isinstance(kind, str) and kind else path.stem,
                relation=path.stem,
                subject=subject.strip(),
                where=where,
            )
            phrasing = template.replace("{}", "{subject}")
            yield Entry(prompt=replace(prompt, phrasing=phrasing), where=where, published=True)


def _of_known(path: Path, given: list[Any]) -> Iterator[Entry]:
    for number, row in enumerate(given):
        where = f"entry {number} of {str(path)!r}"
        text, answer = _texts(row, ("prompt", "attribute"), where)
        relation, subject = (row.get(name) for name in ("relation_id", "subject"))
        kind = relation if isinstance(relation, str) and relation else UNTYPED
        prompt = prompt_of_text(
            prompt_id=f"{path.stem}/{number}",
            text=text,
            answer=answer.strip(),
            knowledge_type=kind,
            subject=subject if isinstance(subject, str) else "",
            where=where,
        )
        yield Entry(prompt=prompt, where=where, published=True)


def _texts(given: Any, names: Sequence[str], where: str) -> list[str]:
    if not isinstance(given, dict) or not all(isinstance(given.get(name), str) for name in names):
        raise InputError(f"{where} must be an object with the texts {' and '.join(names)}")
    return [given[name] for name in names]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where} is no JSON: {error}") from None


_READERS = {".jsonl": _of_jsonl, ".csv": _of_csv, ".json": _of_json}
