"""The files of a run: columns, and the facts that each file carries.

The schema has a version, ``FORMAT``. Every file's metadata holds, under ``tl_neuron_attr``, what
its numbers are: the model's hash, the basis of the neuron index, convention, dtype, unit, versions,
and the plan it belongs to. Nothing in a file depends on when, where or by whom it was written.
"""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.parts import fingerprint

FORMAT = 1
"""Version of the schema. A run of another version is not gone on with, and not read."""

KEY = b"tl_neuron_attr"

NEURON_BASIS = {
    "ffn": "mlp.hook_post: act(pre), in a gated FFN act(gate) * up",
    "attn": "pattern * v of one head, one source position, one dimension",
}

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
"""The tables of a shard. Scores are in nats."""

WRITTEN_AS = {"compression": "zstd", "version": "2.6", "row_group_size": 131_072}
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
        found = facts["format"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"{where} is no file of a run: it does not say what it is of") from None
    check_format(found, where)
    return facts


def check_format(found: Any, where: str) -> None:
    """Stop at another version of the schema.

    Raises:
        InputError: Saying how to come by this one.
    """
    if found != FORMAT:
        raise InputError(
            f"{where} is of schema version {found!r}, and this release reads {FORMAT}; make it "
            "anew in another directory with tl-neuron-attr run, or read it with the release that "
            "wrote it"
        )


def _facts(name: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": identity["format"],
        "table": name,
        "plan": fingerprint([identity]),
        "model": identity["model"],
        "neuron_basis": identity["neuron_basis"],
        "convention": identity["settings"]["convention"],
        "score_unit": "nats",
        "versions": identity["versions"],
    }
