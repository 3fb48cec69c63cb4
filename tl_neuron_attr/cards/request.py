"""A neuron and a result -> its card; what cannot be asked; and where else it scores."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.capture import capture
from tl_neuron_attr.cards.card import PROMPT_COLUMNS, NeuronCard
from tl_neuron_attr.cards.looked_at import (
    LookedAt,
    end_table,
    input_table,
    looked_at,
    set_off_by,
    source_table,
)
from tl_neuron_attr.cards.onward import carried_table, downstream_table
from tl_neuron_attr.decompose import AttnDecomposition, FFNDecomposition
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, check_exists
from tl_neuron_attr.identities import verify_subkeys
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Head, parse_neuron
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import TokenizedPrompt, at_least_one, integer
from tl_neuron_attr.readout import baseline_of_runs


def neuron_card(
    result: Attribution,
    neuron: str | FFNNeuron | AttnNeuron,
    *,
    position: SupportsIndex | None = None,
    prompts: Sequence[Attribution] = (),
    head: str | Head | None = None,
    tokens: SupportsIndex = 10,
    top: SupportsIndex = 10,
) -> NeuronCard:
    """Everything about one neuron in the run that ``result`` is of.

    Args:
        result: An attributed prompt.
        neuron: A neuron or its label: ``"L4.N123"``, ``"L4.H2.D17@5"`` (one source position), or
            ``"L4.H2.D17"`` (position-free, the sum over source positions).
        position: Where to look at it: by default the read position, or an earlier one.
        prompts: Results of the same model (``attribute_all``), in which to look for the prompts
            where the neuron's score is largest.
        head: A head, or its label, to carry the contribution through. By default every later head.
        tokens: How many tokens of each end.
        top: How many rows of neurons, heads and prompts.

    Cost: besides matrix products, one read-out for each source position, later head and prompt.
    One forward pass for an attention neuron (for what happened at its source positions), one for
    another position than the read position, and one at a model's first query.

    Raises:
        InputError: If there is no such neuron, position or head, the head cannot read the neuron,
            or ``prompts`` are results of another model or convention.
        IdentityError: If pre-activations are not what this package recomputes.
    """
    host, read_pos = result.host, result.captured.prompt.read_pos
    chosen = as_neuron(neuron)
    through = None if head is None else as_head(head)
    tokens, top = at_least_one(tokens, "tokens"), at_least_one(top, "top")
    place = check_request(host, result.captured.prompt, chosen, position, through)
    _check_alike(result, prompts)
    with torch.no_grad(), full_precision():
        verify_subkeys(host, result.captured)
        at = result.captured
        if place != read_pos:
            at = capture(host, replace(at.prompt, read_pos=place)).to(at.v.dtype)
        return _card(result, looked_at(result, at, chosen), through, prompts, tokens, top)


def check_request(
    host: Host,
    prompt: TokenizedPrompt,
    neuron: FFNNeuron | AttnNeuron,
    position: SupportsIndex | None = None,
    head: Head | None = None,
) -> int:
    """Where the neuron is to be looked at, once it is known that there can be a card.

    Raises:
        InputError: If there is no such neuron, position or head, or the head comes too early.
    """
    read_pos, n_tokens = prompt.read_pos, len(prompt.tokens)
    place = asked = read_pos if position is None else integer(position, "position")
    if asked < 0:
        place = asked + n_tokens
    if not 0 <= place <= read_pos:
        raise InputError(
            f"position {asked} is out of range: the answer is read at {read_pos}, "
            f"so a neuron can be looked at from 0 to {read_pos}"
        )
    check_exists(host, neuron, place)
    if head is not None:
        _check_reads(host, neuron, head)
    return place


def as_neuron(neuron: str | FFNNeuron | AttnNeuron) -> FFNNeuron | AttnNeuron:
    """A neuron from its label, or as it is.

    Raises:
        InputError: If the label is of another form.
    """
    try:
        return parse_neuron(neuron) if isinstance(neuron, str) else neuron
    except ValueError as error:
        raise InputError(str(error)) from error


def as_head(head: str | Head) -> Head:
    """A head from its label, or as it is.

    Raises:
        InputError: If the label is of another form.
    """
    try:
        return Head.parse(head) if isinstance(head, str) else head
    except ValueError as error:
        raise InputError(str(error)) from error


def check_head(host: Host, head: Head) -> None:
    """Stop where the model has no such head.

    Raises:
        InputError: Saying what there is.
    """
    if not (0 <= head.layer < host.n_layers and 0 <= head.head < host.n_heads):
        raise InputError(
            f"there is no head {head}: the model has {host.n_layers} layers of {host.n_heads} heads"
        )


def _check_reads(host: Host, neuron: FFNNeuron | AttnNeuron, head: Head) -> None:
    """Stop where a head cannot read what a neuron writes: only those of later layers do."""
    check_head(host, head)
    if head.layer <= neuron.layer:
        last = host.n_layers - 1
        which = (
            f"layers {neuron.layer + 1} to {last}"
            if neuron.layer < last
            else "later layers, of which there are none"
        )
        raise InputError(f"head {head} cannot read {neuron}: only heads of {which} do")


# --- the card ---------------------------------------------------------------------------------


def _card(
    result: Attribution,
    one: LookedAt,
    through: Head | None,
    prompts: Sequence[Attribution],
    tokens: int,
    top: int,
) -> NeuronCard:
    prompt = result.captured.prompt
    position = one.captured.prompt.read_pos
    scored = position == prompt.read_pos
    rank, ranked, total = _rank(result, one.neuron)
    score = one.score if scored else None
    ends, readability = end_table(result, one, tokens)
    query_layers, query_neurons, notes = set_off_by(result, one, score, top, tokens)
    if not scored:
        notes = (
            f"no score: the answer is read at position {prompt.read_pos}, and this is what the "
            f"neuron writes at {position}",
            *notes,
        )
    return NeuronCard(
        neuron=one.neuron,
        model_name=result.host.model_name,
        prompt_id=prompt.prompt_id,
        tokens=prompt.token_texts,
        position=position,
        read_pos=prompt.read_pos,
        target=result.target,
        log_prob=result.log_prob,
        convention=result.convention,
        coefficient=float(one.coefficient),
        score=score,
        rank=rank if scored else None,
        ranked=ranked,
        total=total,
        subvalue_norm=float(one.subvalue.norm()),
        contribution_norm=float(one.contribution.norm()),
        inputs=input_table(result.host, one),
        sources=source_table(one, prompt.token_texts, scored),
        ends=ends,
        readability=readability,
        query_layers=query_layers,
        query_neurons=query_neurons,
        downstream=downstream_table(result.host, one, top),
        heads=carried_table(result, one, through, tokens, top),
        prompts=_prompts(one.neuron, prompts, top),
        notes=notes,
    )


def _rank(result: Attribution, neuron: FFNNeuron | AttnNeuron) -> tuple[int | None, int, int]:
    """Its rank if it is among those ranked, how many were, and how many there are."""
    host = result.host
    if isinstance(neuron, FFNNeuron):
        table, total = result.neurons("ffn"), host.n_layers * host.d_mlp
    else:
        free = neuron.source_pos is None
        n_pos = 1 if free else result.captured.v.shape[1]
        total = host.n_layers * host.n_heads * host.d_head * n_pos
        table = result.neurons("attn", by_source=not free)
    same = pd.Series(True, index=table.index)
    for name, value in vars(neuron).items():
        if value is not None:
            same &= table[name] == value
    found = table.loc[same, "rank"].tolist()
    return (int(found[0]) if found else None), len(table), total


# --- where it is largest ----------------------------------------------------------------------


def _prompts(
    neuron: FFNNeuron | AttnNeuron, prompts: Sequence[Attribution], top: int
) -> pd.DataFrame:
    """The prompts where its score is largest, in blocks within the budget."""
    alike: dict[Any, list[Attribution]] = {}  # those that can be scored together
    for each in prompts:
        key = (each.target.form, each.captured.v.dtype)
        alike.setdefault(key, []).append(each)
    rows = []
    for some in alike.values():
        out = some[0].out
        step = max(1, out.budget // (3 * out.W_U.shape[1] * out.dtype.itemsize))
        for first in range(0, len(some), step):
            rows += _scored_prompts(neuron, some[first : first + step])
    table = pd.DataFrame(rows, columns=list(PROMPT_COLUMNS)).astype({"source_pos": "Int64"})
    table = table.sort_values("score", ascending=False, kind="stable").head(top)
    return table.reset_index(drop=True)


def _scored_prompts(
    neuron: FFNNeuron | AttnNeuron, results: Sequence[Attribution]
) -> list[tuple[Any, ...]]:
    """One row a prompt."""
    parts = [_in_prompt(each, neuron) for each in results]
    before = baseline_of_runs(
        [each.out for each in results],
        [block.base[None] for block, _, _ in parts],
        range(len(results)),
        [each.target for each in results],
        tangent=False,
    )
    counts = [len(coefficients) for _, coefficients, _ in parts]
    which = torch.arange(len(parts), device=before.resid.device).repeat_interleave(
        torch.tensor(counts, device=before.resid.device)
    )
    vectors = torch.cat([c[:, None] * subvalue for _, c, subvalue in parts])
    scores = results[0].out.increase(before, which, vectors).split(counts)
    rows = []
    for each, (_, coefficients, _), score in zip(results, parts, scores, strict=True):
        prompt, source_pos, place = each.captured.prompt, None, 0
        if isinstance(neuron, AttnNeuron):
            n_pos = each.captured.v.shape[1]
            source_pos = int(score[:n_pos].argmax())
            place = source_pos if neuron.source_pos is not None else n_pos
        text = prompt.text if prompt.text is not None else "".join(prompt.token_texts)
        source = None if source_pos is None else prompt.token_texts[source_pos]
        asked = (prompt.prompt_id, text, each.target.in_tables, source_pos, source)
        rows.append((*asked, float(coefficients[place]), float(score[place])))
    return rows


def _in_prompt(
    result: Attribution, neuron: FFNNeuron | AttnNeuron
) -> tuple[FFNDecomposition | AttnDecomposition, Float[Tensor, " form"], Float[Tensor, " d_model"]]:
    """The neuron's block, its coefficients, and its subvalue.

    An attention neuron's coefficients are those at each source position, then their sum.
    """
    if isinstance(neuron, FFNNeuron):
        block = result.ffns[neuron.layer]
        number = torch.tensor([neuron.index], device=block.base.device)
        return block, block.coefficients_of(number), block.subvalues(number)[0]
    block = result.attns[neuron.layer]
    by_source = block.coefficients(slice(neuron.head, neuron.head + 1))[0, :, neuron.index]
    coefficients = torch.cat([by_source, by_source.sum()[None]])
    # of a neuron at its first source position: the row is that of all
    number = torch.tensor([neuron.head * block.shape[1] * block.shape[2] + neuron.index])
    return block, coefficients, block.subvalues(number.to(block.base.device))[0]


# --- requests ---------------------------------------------------------------------------------


def _check_alike(result: Attribution, prompts: Sequence[Attribution]) -> None:
    for each in prompts:
        if each.host.model is not result.host.model or each.convention != result.convention:
            raise InputError(
                "prompts must be results of the same model in the same convention; "
                f"prompt {each.captured.prompt.prompt_id} is of {each.host.model_name}, "
                f"{each.convention}"
            )
