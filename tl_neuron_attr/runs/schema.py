"""The files of a run: columns, and the facts that each file carries.

The schema has a version, ``FORMAT``. Every file's metadata holds, under ``tl_neuron_attr``, what
its numbers are: the model's hash, the basis of the neuron index, convention, dtype, unit, versions,
and the plan it belongs to. Nothing in a file depends on when, where or by whom it was written.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.parts import fingerprint

FORMAT = 2
"""Version of the schema. Runs of an earlier one are read, and gone on with once upgraded."""

_FIRST = 1

KEY = b"tl_neuron_attr"

_NAME = pa.dictionary(pa.int32(), pa.string())

_OF_PROMPT = [("row", pa.int32()), ("prompt_id", _NAME), ("knowledge_type", _NAME)]

PROMPTS = pa.schema(
    [
        ("row", pa.int32()),
        ("prompt_id", pa.string()),
        ("knowledge_type", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("n_tokens", pa.int32()),
        ("read_pos", pa.int32()),
        ("target", pa.int32()),
        ("target_text", pa.string()),
        ("against", pa.int32()),
        ("shard", pa.int32()),
        ("batch", pa.int32()),
        ("error", pa.string()),
    ]
)
"""``prompts.parquet``: what is asked, and in which shard and batch."""

_NEURONS = pa.schema(
    [
        *_OF_PROMPT,
        ("role", _NAME),
        ("kind", _NAME),
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("index", pa.int32()),
        ("source_pos", pa.int32()),
        ("coefficient", pa.float32()),
        ("score", pa.float32()),
        ("rank", pa.int32()),
    ]
)

SCHEMAS: Mapping[str, pa.Schema] = {
    "answers": pa.schema(
        [
            *_OF_PROMPT,
            ("n_tokens", pa.int32()),
            ("read_pos", pa.int32()),
            ("target", pa.int32()),
            ("target_text", pa.string()),
            ("log_prob", pa.float64()),
            ("embedding_log_prob", pa.float64()),
            ("ffn_scored", pa.int32()),
            ("attn_scored", pa.int32()),
            ("proven", pa.bool_()),
        ]
    ),
    "neurons": _NEURONS,
    "query_neurons": _NEURONS,
    "layers": pa.schema(
        [*_OF_PROMPT, ("layer", pa.int16()), ("kind", _NAME), ("score", pa.float32())]
    ),
    "heads": pa.schema(
        [*_OF_PROMPT, ("layer", pa.int16()), ("head", pa.int16()), ("score", pa.float32())]
    ),
    "methods": pa.schema(
        [("method", _NAME) if field.name == "role" else field for field in _NEURONS]
    ),
    "interventions": pa.schema(
        [
            *_OF_PROMPT,
            ("role", _NAME),
            ("set", _NAME),
            ("kind", _NAME),
            ("count", pa.int32()),
            ("zeroed", pa.int32()),
            ("log_prob_before", pa.float64()),
            ("rank_before", pa.int32()),
            ("log_prob", pa.float64()),
            ("rank", pa.int32()),
        ]
    ),
    "errors": pa.schema(
        [
            ("row", pa.int32()),
            ("prompt_id", pa.string()),
            ("knowledge_type", pa.string()),
            ("text", pa.string()),
            ("stage", pa.string()),
            ("reason", pa.string()),
        ]
    ),
}
"""The tables of a shard. Scores are in nats; of ``methods``, in each method's own unit."""

WRITTEN_AS = {
    "compression": "zstd",
    "version": "2.6",
    "row_group_size": 131_072,
    # a dictionary of scores, which all differ, costs time and space
    "use_dictionary": sorted(
        {
            field.name
            for schema in SCHEMAS.values()
            for field in schema
            if not pa.types.is_floating(field.type)
        }
    ),
}
"""How shards are written."""


def with_metadata(table: pa.Table, name: str, identity: Mapping[str, Any]) -> pa.Table:
    """The table with the facts that its file shall carry."""
    return table.replace_schema_metadata({KEY: json.dumps(_facts(name, identity), sort_keys=True)})


def facts_of(schema: pa.Schema, where: str) -> dict[str, Any]:
    """The facts that a file carries.

    Raises:
        InputError: If it is none of a run's files, or of another version.
    """
    try:
        facts = json.loads((schema.metadata or {})[KEY])
        sound = {"format", "plan"} <= facts.keys()
    except (KeyError, AttributeError, ValueError, RecursionError):
        facts, sound = {}, False
    if not sound:
        raise InputError(f"{where} is no file of a run: it does not say what it is of")
    check_format(facts, where)
    return facts


def check_format(facts: Mapping[str, Any], where: str) -> None:
    """Stop at a version of the schema that this release cannot read.

    Raises:
        InputError: Saying which release can.
    """
    found = facts.get("format")
    if type(found) is int and _FIRST <= found <= FORMAT:
        return
    if type(found) is int and found > FORMAT:
        versions = facts.get("versions")
        named = versions if isinstance(versions, Mapping) else {}
        wrote = named.get("tl_neuron_attr", "a later one")
        raise InputError(
            f"{where} is of schema version {found}, and this release reads none after {FORMAT}; "
            f"read it with the release that wrote it, tl_neuron_attr {wrote}, or a later one"
        )
    raise InputError(
        f"{where} is of schema version {found!r}, which no release wrote; give another directory"
    )


def check_current(identity: Mapping[str, Any], directory: str) -> None:
    """Stop where a run cannot be gone on with, for it is of another version of the schema.

    Raises:
        InputError: Saying how to come by this one.
    """
    check_format(identity, repr(directory))
    if identity["format"] < FORMAT:
        raise InputError(
            f"{directory!r} is a run of schema version {identity['format']}, and this release "
            f"writes {FORMAT}; copy what is done with tl-neuron-attr upgrade "
            f"{shlex.quote(directory)} --out NEW, and go on there"
        )


def _facts(name: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": identity["format"],
        "table": name,
        "plan": fingerprint([identity]),
        "model": identity["model"],
        "neuron_basis": identity["neuron_basis"],
        "convention": identity["settings"]["convention"],
        "score_unit": "the method's own" if name == "methods" else "nats",
        "versions": identity["versions"],
    }
