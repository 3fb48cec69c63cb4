"""In-context heads: which heads carry the labels of a few-shot prompt to where the answer is read.

A few-shot prompt shows examples with two labels, b1 and b2, and ends where the next label belongs.
A head that learns in context attends from there to the labels before, and brings them over. Three
things tell such heads (Yu & Ananiadou, In-context heads are two towers, arXiv 2402.02872): their
score, what zeroing them does, and what they bring from each position p where a label stands::

    M(p) = log p(b1 | pattern * v * W_O from p) - log p(b2 | pattern * v * W_O from p)

where what the head brings from p is read out *alone*, not added to the residual stream. With the
norm frozen both logits are linear in it, and the normaliser of the two log-probabilities is the
same: M(p) is a difference of two logits, the sum of what p brings and of a constant, the same for
all heads and positions, that the biases of the final norm and of the unembedding bring (0 in
``published``). Without that constant it is the position's rise in log p(b1) - log p(b2).

The two towers are what the head reads: its query at the read position, its keys and values at the
label positions. Each is the residual stream before the layer, a sum of the embedding, of what
earlier attention wrote and of what earlier FFNs wrote (``head_inputs``).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.capture import capture_sources
from tl_neuron_attr.cards import as_head, check_head
from tl_neuron_attr.display import box, brief, facts, grid, line, token
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host
from tl_neuron_attr.interventions import head_scan
from tl_neuron_attr.neurons import Head
from tl_neuron_attr.pieces import times
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.projection import project
from tl_neuron_attr.prompts import Target, TokenizedPrompt, at_least_one, integer
from tl_neuron_attr.reading import through_norm
from tl_neuron_attr.styled import grid_of
from tl_neuron_attr.targets import one_token

IN_CONTEXT_COLUMNS = (
    "layer",
    "head",
    "score",
    "zeroed",
    "contrast",
    "attention_1",
    "attention_2",
    "contrast_1",
    "contrast_2",
)
LABEL_POSITION_COLUMNS = (
    "layer",
    "head",
    "source_pos",
    "label",
    "attention",
    "log_prob_difference",
    "contrast",
)
HEAD_INPUT_COLUMNS = (
    "position",
    "token",
    "part",
    "norm",
    "share",
    "value_share",
    "raises",
    "lowers",
)


@dataclass(frozen=True, kw_only=True)
class InContextHeads:
    """The heads of a few-shot prompt, and what they bring from where its labels stand."""

    labels: tuple[Target, Target]
    """b1 and b2."""
    label_positions: tuple[tuple[int, ...], tuple[int, ...]]
    """Where each of them stands, up to the read position."""
    heads: pd.DataFrame
    """The heads with the highest scores, best first.

    ``layer, head, score`` (rise in log p(target), nats), ``zeroed`` (change of log p(target) when
    the head is zeroed at all positions; missing if not asked for), ``contrast`` (rise in
    log p(b1) - log p(b2)), and of the positions of each label together ``attention_1,
    attention_2`` (which the read position pays them) and ``contrast_1, contrast_2`` (the part of
    ``contrast`` that comes from there; with a recomputed norm, or a soft cap on
    logits, parts do not add up).
    """
    positions: pd.DataFrame
    """The same heads at each label position.

    ``layer, head, source_pos, label, attention, log_prob_difference`` (M of this position) and
    ``contrast`` (its rise in log p(b1) - log p(b2)).
    """
    constant: float
    """M of nothing: what the read-out's biases add to every ``log_prob_difference``."""

    __repr__ = brief

    def _repr_html_(self) -> str:
        first, second = (token(label.text) for label in self.labels)
        where = [", ".join(map(str, places)) for places in self.label_positions]
        return box(
            "Heads of a few-shot prompt",
            facts({"first label": f"{first} at {where[0]}", "second": f"{second} at {where[1]}"}),
            grid(grid_of(self.heads, "", top=10)),
            line(
                "contrast: rise in log p(first) - log p(second); attention and contrast 1, 2: to "
                "and from where each label stands; zeroed: change of log p(target) without the head"
            ),
        )


@full_precision()
def in_context_heads(
    result: Attribution,
    labels: Sequence[str | SupportsIndex] = (" positive", " negative"),
    *,
    top: SupportsIndex = 20,
    scan: bool = True,
) -> InContextHeads:
    """Which heads of a few-shot prompt carry its labels to the answer.

    Args:
        result: The attributed prompt; its target is the answer that heads are scored for.
        labels: The two labels, each one token (text with its leading space, or an id) that stands
            in the prompt.
        top: How many heads.
        scan: Whether to zero each head in turn (``interventions.head_scan``).

    Cost: two read-outs of two logits for each head and label position. The scan: a forward pass of
    ``n_heads`` rows from each layer on.

    Raises:
        InputError: If there are not two different labels, one is not a single token, or does not
            stand in the prompt up to the read position; of the scan, if the model changed.
    """
    host, out, prompt = result.host, result.out, result.captured.prompt
    top = at_least_one(top, "top")
    first, second, positions = check_labels(host, prompt, labels)
    contrast = replace(first, against=second)
    where = [*positions[0], *positions[1]]
    n_first = len(positions[0])
    with torch.no_grad():
        bases = torch.stack([block.base for block in result.attns])
        before = out.baseline(bases, contrast, tangent=False)
        attention, alone, rises = [], [], []
        for layer, block in enumerate(result.attns):
            at_labels = replace(block, pattern=block.pattern[:, where], v=block.v[where])
            brought = at_labels.position_vectors()
            by_label = [part.sum(1) for part in brought.split([n_first, len(where) - n_first], 1)]
            together = torch.stack([*by_label, block.head_vectors()], 1)
            rows = torch.cat([brought, together], 1)
            base = torch.full((rows[..., 0].numel(),), layer, device=rows.device)
            found = out.increase(before, base, rows.flatten(0, 1)).view(rows.shape[:2])
            attention.append(at_labels.pattern)
            alone.append(out.log_prob(brought, contrast))
            rises.append(found)
        constant = out.log_prob(torch.zeros_like(bases[0]), contrast)
        zeroed = None
        if scan:
            zeroed = head_scan(host, result.captured, result.target)
    best = result.head_scores.flatten().sort(descending=True, stable=True).indices[:top]
    paid, difference, rise = (torch.stack(each) for each in (attention, alone, rises))
    return InContextHeads(
        labels=(first, second),
        label_positions=positions,
        heads=_head_table(result.head_scores, zeroed, paid, rise, best, n_first),
        positions=_position_table(paid, difference, rise, best, where, n_first, (first, second)),
        constant=float(constant),
    )


def check_labels(
    host: Host, prompt: TokenizedPrompt, labels: Sequence[str | SupportsIndex]
) -> tuple[Target, Target, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The two labels as tokens, and where each of them stands in the prompt.

    Raises:
        InputError: As ``in_context_heads``.
    """
    if isinstance(labels, str) or len(labels) != 2:
        raise InputError(f"give two labels, like (' positive', ' negative'); got {labels!r}")
    first, second = (one_token(host, label, "label") for label in labels)
    if first.id == second.id:
        raise InputError(f"the two labels are the same token, {first.text!r}")
    positions = []
    for label in (first, second):
        seen = prompt.tokens[: prompt.read_pos + 1]
        found = tuple(place for place, token in enumerate(seen) if token == label.id)
        if not found:
            raise InputError(_absent(label, prompt))
        positions.append(found)
    return first, second, (positions[0], positions[1])


def _absent(label: Target, prompt: TokenizedPrompt) -> str:
    """That a label is not where it should be, and what is there in its place."""
    texts = prompt.token_texts[: prompt.read_pos + 1]
    near = [text for text in texts if text.strip().lower() == label.text.strip().lower()]
    hint = f" (did you mean {near[0]!r}?)" if near and near[0] != label.text else ""
    return (
        f"label {label.text!r} (id {label.id}) does not stand in the prompt up to the read "
        f"position {prompt.read_pos}{hint}; give the labels of its examples"
    )


def _head_table(
    score: Float[Tensor, "layer head"],
    zeroed: Float[Tensor, "layer head"] | None,
    attention: Float[Tensor, "layer head label_pos"],
    rises: Float[Tensor, "layer head each"],
    best: Int[Tensor, " best"],
    n_first: int,
) -> pd.DataFrame:
    n_heads = score.shape[1]
    of_first, of_second, whole = rises[..., -3:].flatten(0, 1)[best].unbind(-1)
    paid = attention.flatten(0, 1)[best]
    columns = {
        "layer": (best // n_heads).tolist(),
        "head": (best % n_heads).tolist(),
        "score": _plain(score.flatten()[best]),
        "zeroed": float("nan") if zeroed is None else _plain(zeroed.flatten()[best]),
        "contrast": _plain(whole),
        "attention_1": _plain(paid[:, :n_first].sum(1)),
        "attention_2": _plain(paid[:, n_first:].sum(1)),
        "contrast_1": _plain(of_first),
        "contrast_2": _plain(of_second),
    }
    return pd.DataFrame(columns, columns=list(IN_CONTEXT_COLUMNS))


def _position_table(
    attention: Float[Tensor, "layer head label_pos"],
    alone: Float[Tensor, "layer head label_pos"],
    rises: Float[Tensor, "layer head each"],
    best: Int[Tensor, " best"],
    where: Sequence[int],
    n_first: int,
    labels: tuple[Target, Target],
) -> pd.DataFrame:
    n_heads = attention.shape[1]
    order = sorted(range(len(where)), key=lambda number: where[number])
    text = [labels[number >= n_first].text for number in order]
    tables = []
    for flat in best.tolist():
        layer, head = divmod(flat, n_heads)
        tables.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "head": head,
                    "source_pos": [where[number] for number in order],
                    "label": text,
                    "attention": _plain(attention[layer, head, order]),
                    "log_prob_difference": _plain(alone[layer, head, order]),
                    "contrast": _plain(rises[layer, head, order]),
                },
                columns=list(LABEL_POSITION_COLUMNS),
            )
        )
    return pd.concat(tables, ignore_index=True)


# --- the two towers ---------------------------------------------------------------------------


@full_precision()
def head_inputs(
    result: Attribution,
    head: str | Head,
    positions: SupportsIndex | Iterable[SupportsIndex] | None = None,
    *,
    tokens: SupportsIndex = 10,
) -> pd.DataFrame:
    """What a head reads at some positions, by where it comes from.

    At the read position (the default) it is what the head's query is made from, at a source
    position what its key and its value are. One row a position and ``part``: ``embed``; ``attn``,
    what the attention of earlier layers wrote, which is the layer's input less embedding and FFN
    outputs (the "key" view of the notebooks); ``ffn``; and ``bias``, what enters through the bias
    of the layer's norm, and into the value through its own.

    Columns: ``position, token, part, norm``; ``share`` of what the head reads behind the norm
    (frozen at its scale there), along it: ``read(part) . read / read . read``; ``value_share``, the
    same of the value vector the head has there; each sums to 1 over the parts. And the tokens that
    the part ``raises`` and ``lowers`` most when read out by itself.

    Cost: one forward pass if there are positions before the read position; a read-out a row.

    Raises:
        InputError: If there is no such head or position, or the model changed since.
    """
    host, captured = result.host, result.captured
    chosen, k = as_head(head), at_least_one(tokens, "tokens")
    check_head(host, chosen)
    where = check_positions(captured.prompt, positions)
    read_pos = captured.prompt.read_pos
    with torch.no_grad():
        parts = {read_pos: _parts(captured.resid_pre, captured.mlp_out, chosen.layer)}
        before = {place for place in where if place != read_pos}
        if before:
            sources = capture_sources(host, captured, before)
            for number, place in enumerate(sources.positions.tolist()):
                at = sources.resid_pre[:, number], sources.mlp_out[:, number]
                parts[place] = _parts(*at, chosen.layer)
        tables = [_input_table(result, chosen, place, parts[place], k) for place in where]
    return pd.concat(tables, ignore_index=True)


def check_positions(
    prompt: TokenizedPrompt, positions: SupportsIndex | Iterable[SupportsIndex] | None
) -> list[int]:
    """Positions as they are counted from the start, the read position by default; each once.

    Raises:
        InputError: If there are none, or one comes after the read position.
    """
    if positions is None:
        return [prompt.read_pos]
    given = positions if isinstance(positions, Iterable) else [positions]
    asked = [integer(position, "position") for position in given]
    found = [place + len(prompt.tokens) if place < 0 else place for place in asked]
    if not found:
        raise InputError("there is no position to look at; give at least one")
    for place, position in zip(found, asked, strict=True):
        if not 0 <= place <= prompt.read_pos:
            raise InputError(
                f"position {position} is out of range: the answer is read at {prompt.read_pos}, "
                f"so heads read positions 0 to {prompt.read_pos}"
            )
    return list(dict.fromkeys(found))


def _parts(
    resid_pre: Float[Tensor, "layer d_model"], mlp_out: Float[Tensor, "layer d_model"], layer: int
) -> Float[Tensor, "part d_model"]:
    """What a layer reads at one position: the embedding, earlier attention, earlier FFNs."""
    embed, ffn = resid_pre[0], mlp_out[:layer].sum(0)
    return torch.stack([embed, resid_pre[layer] - embed - ffn, ffn])


def _input_table(
    result: Attribution,
    head: Head,
    position: int,
    parts: Float[Tensor, "part d_model"],
    k: int,
) -> pd.DataFrame:
    host, layer = result.host, head.layer
    norm, W_V, b_V = host.attn_norm(layer), host.W_V(layer), host.b_V(layer)
    group = head.head // (host.n_heads // len(W_V))
    x = parts.sum(0)
    bias = torch.zeros_like(x) if norm.bias is None else norm.bias.to(x)
    # [part and bias, d_model], [part and bias, d_head]
    read = torch.cat([through_norm(host, norm, x.expand_as(parts), parts), bias[None]])
    value = times(read, W_V[group])
    if b_V is not None:
        value[-1] += b_V[group].to(x)
    ends = project(result.out, parts, k)
    text_of = host.token_text
    norms = parts.norm(dim=-1).tolist()
    says = [norm > 0 for norm in norms]  # of nothing no token is raised
    return pd.DataFrame(
        {
            "position": position,
            "token": result.captured.prompt.token_texts[position],
            "part": ["embed", "attn", "ffn", "bias"],
            "norm": [*norms, float("nan")],
            "share": _plain(_along_their_sum(read)),
            "value_share": _plain(_along_their_sum(value)),
            "raises": [*_texts(ends.top_ids.tolist(), says, text_of), []],
            "lowers": [*_texts(ends.bottom_ids.tolist(), says, text_of), []],
        },
        columns=list(HEAD_INPUT_COLUMNS),
    )


def _along_their_sum(parts: Float[Tensor, "part d"]) -> Float[Tensor, " part"]:
    """The share each part has of the sum of all, along that sum; they add up to 1."""
    total = parts.sum(0)
    return parts @ total / (total @ total)


def _texts(
    ids: Sequence[Sequence[int]], says: Sequence[bool], text_of: Callable[[int], str]
) -> list[list[str]]:
    return [[*map(text_of, row)] if any_ else [] for row, any_ in zip(ids, says, strict=True)]


def _plain(values: Tensor) -> list[float]:
    return values.detach().cpu().double().tolist()
