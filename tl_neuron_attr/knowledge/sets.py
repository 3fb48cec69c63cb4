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
occurs twice with the same answer is taken once, and a warning says so. A text with several answers
is an error in a ``.jsonl`` or ``.csv`` file, whose lines can be joined by hand; the published files
hold some, and there the later answers become aliases of the first.
"""

import csv
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import write_files
from tl_neuron_attr.knowledge.facts import (
    KNOWLEDGE_TYPES,
    Fact,
    KnowledgePrompt,
    knowledge_prompts,
    paper_prompts,
)

UNTYPED = "untyped"
"""The knowledge type of prompts that name none: their answers all belong together."""

_FIELDS = ("text", "answer", "aliases", "knowledge_type", "relation", "subject", "prompt_id")


def load_prompts(source: str | os.PathLike[str]) -> tuple[KnowledgePrompt, ...]:
    """The prompts that ``source`` names, in its order.

    ``source`` is a knowledge type (``"capital"``: every fact of it in every wording), ``"all"`` of
    them, ``"paper"`` (``paper_prompts()``: every fact in two wordings), or the path of a file or
    folder as this module's docstring says.

    Raises:
        InputError: One sentence with the file, the line and the fault; see above for what is one.
    """
    name = os.fspath(source)
    if name in KNOWLEDGE_TYPES:
        return knowledge_prompts(name)
    if name in ("all", "paper"):
        return knowledge_prompts() if name == "all" else paper_prompts()
    path = Path(name)
    entries = list(_entries(path))
    if not entries:
        raise InputError(f"there are no prompts in {name!r}")
    return _without_repeats(entries, name)


def save_prompts(prompts: Sequence[KnowledgePrompt], path: str | os.PathLike[str]) -> None:
    """Write ``prompts`` to a ``.jsonl`` file that ``load_prompts`` reads.

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
    write_files(place.parent, {place.name: lambda there: there.write_text(text, encoding="utf-8")})


# --- one prompt, wherever it stands -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A prompt as it was read, and where, for errors."""

    prompt: KnowledgePrompt
    where: str
    published: bool
    """Whether it is of a file that a user does not write: LRE, known_1000."""


def prompt_of_text(
    *,
    prompt_id: str,
    text: str,
    answer: str,
    aliases: Sequence[str] = (),
    knowledge_type: str = UNTYPED,
    relation: str | None = None,
    subject: str = "",
    where: str,
) -> KnowledgePrompt:
    """A prompt that is not of this package's facts; ``where`` names its place in errors.

    Its wording is the text with ``{subject}`` for the subject, or the text itself where that does
    not occur in it.

    Raises:
        InputError: If the text is empty or ends in a space, or an answer is empty, has more than
            one space in front, or any behind.
    """
    texts = (text, answer, *aliases, knowledge_type, relation or "", subject, prompt_id)
    if any("\ud800" <= char <= "\udfff" for part in texts for char in part):
        raise InputError(f"{where}: half a character (a lone surrogate) is not valid text")
    if not text.strip():
        raise InputError(f"{where}: the text is empty")
    if text != text.rstrip():
        raise InputError(
            f"{where}: the text {text[-40:]!r} ends in a space; answers are joined to it with "
            "one space, so leave that out"
        )
    for word in (answer, *aliases):
        bare = word.removeprefix(" ")
        if not bare or bare != bare.strip():
            raise InputError(
                f"{where}: the answer {word!r} must be some text, with at most one space in "
                "front and none behind"
            )
    bare = answer.removeprefix(" ")
    others = dict.fromkeys(alias.removeprefix(" ") for alias in aliases)
    return KnowledgePrompt(
        prompt_id=prompt_id,
        text=text,
        answer=f" {bare}",
        fact=Fact(
            knowledge_type=knowledge_type,
            relation=relation or knowledge_type,
            subject=subject,
            answer=bare,
            aliases=tuple(other for other in others if other != bare),
        ),
        phrasing=_phrasing(text, subject),
        held_out=False,
    )


def _phrasing(text: str, subject: str) -> str:
    if not subject:
        return text
    if subject in text:
        return text.replace(subject, "{subject}", 1)
    # at the start of a sentence it may have got a capital
    begins = text[: len(subject)]
    if begins[1:] == subject[1:] and begins[:1].lower() == subject[:1].lower():
        return "{subject}" + text[len(subject) :]
    return text


def _without_repeats(entries: Sequence[_Entry], name: str) -> tuple[KnowledgePrompt, ...]:
    """Each text once; a warning counts and names what occurred again."""
    by_text: dict[str, _Entry] = {}
    by_id: dict[str, _Entry] = {}
    repeated: list[str] = []
    joined: list[str] = []
    for entry in entries:
        prompt = entry.prompt
        first = by_text.get(prompt.text)
        if first is None:
            namesake = by_id.setdefault(prompt.prompt_id, entry)
            if namesake is not entry:
                raise InputError(
                    f"{entry.where}: the prompt_id {prompt.prompt_id!r} is that of "
                    f"{namesake.where} already; ids must be unique"
                )
            by_text[prompt.text] = entry
        elif set(prompt.fact.accepted) <= set(first.prompt.fact.accepted):
            repeated.append(f"{entry.where} ({prompt.text!r}, as {first.where})")
        elif entry.published:
            joined.append(f"{prompt.text!r}{prompt.answer}")
            by_text[prompt.text] = replace(first, prompt=_joined(first.prompt, prompt))
        else:
            raise InputError(
                f"{entry.where}: the text {prompt.text!r} is that of {first.where}, with the "
                f"answer {prompt.answer!r} instead of {first.prompt.answer!r}; if both are right, "
                "make one an alias"
            )
    for what, listed in (
        ("occur again and are taken once", repeated),
        ("are a further answer to a text, and taken as its aliases", joined),
    ):
        if listed:
            shown = "; ".join(listed[:5]) + ("; ..." if len(listed) > 5 else "")
            warnings.warn(f"{len(listed)} prompts of {name!r} {what}: {shown}", stacklevel=3)
    return tuple(entry.prompt for entry in by_text.values())


def _joined(first: KnowledgePrompt, other: KnowledgePrompt) -> KnowledgePrompt:
    words = dict.fromkeys((*first.fact.aliases, other.fact.answer, *other.fact.aliases))
    aliases = tuple(word for word in words if word != first.fact.answer)
    return replace(first, fact=replace(first.fact, aliases=aliases))


# --- files ------------------------------------------------------------------------------------


def _entries(path: Path) -> Iterator[_Entry]:
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
            f"{', '.join(KNOWLEDGE_TYPES)}, all, paper"
        )
    else:
        raise InputError(
            f"cannot tell what kind of file {str(path)!r} is: its name must end in "
            f"{', '.join(_READERS)}"
        )


def _of_folder(path: Path) -> Iterator[_Entry]:
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


def _of_jsonl(path: Path, text: str) -> Iterator[_Entry]:
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


def _of_csv(path: Path, text: str) -> Iterator[_Entry]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for row in rows:
            where = f"line {rows.line_num} of {str(path)!r}"
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = [name.strip() for name in row]
                if len(set(header)) < len(header):
                    raise InputError(f"{where}: a column's name occurs twice")
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{where} has {len(row)} cells and the header {len(header)}; put quotes "
                    "around a text with commas"
                )
            fields: dict[str, Any] = {
                name: cell for name, cell in zip(header, row, strict=True) if cell
            }
            if "aliases" in fields:
                fields["aliases"] = [word.strip() for word in fields["aliases"].split("|")]
            yield _entry(path, rows.line_num, fields, where)
    except csv.Error as error:
        raise InputError(f"line {rows.line_num} of {str(path)!r} is no CSV: {error}") from None


def _entry(path: Path, number: int, fields: dict[str, Any], where: str) -> _Entry:
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
    return _Entry(prompt=prompt_of_text(**named, where=where), where=where, published=False)


def _of_json(path: Path, text: str) -> Iterator[_Entry]:
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


def _of_lre(path: Path, given: dict[str, Any]) -> Iterator[_Entry]:
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
                text=template.replace("{}", subject),
                answer=answer,
                knowledge_type=kind if isinstance(kind, str) and kind else path.stem,
                relation=path.stem,
                subject=subject,
                where=where,
            )
            phrasing = template.replace("{}", "{subject}")
            yield _Entry(prompt=replace(prompt, phrasing=phrasing), where=where, published=True)


def _of_known(path: Path, given: list[Any]) -> Iterator[_Entry]:
    for number, row in enumerate(given):
        where = f"entry {number} of {str(path)!r}"
        text, answer = _texts(row, ("prompt", "attribute"), where)
        relation, subject = (row.get(name) for name in ("relation_id", "subject"))
        kind = relation if isinstance(relation, str) and relation else UNTYPED
        prompt = prompt_of_text(
            prompt_id=f"{path.stem}/{number}",
            text=text,
            answer=answer,
            knowledge_type=kind,
            subject=subject if isinstance(subject, str) else "",
            where=where,
        )
        yield _Entry(prompt=prompt, where=where, published=True)


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
