"""Who fed whom: answer <- value neurons <- what set them off, as one pruned graph.

Nodes are the answer, neurons at the position they write to, and tokens; edges carry nats::

    weight(n, answer) = Imp(n)              the value neuron's own score
    weight(q, n) = share(q, n) * what n hands down                        (share: query.py)

A value neuron hands down its ``Imp``. From ``depth`` 2 on a query neuron hands down its score as a
query neuron, in turn, and so on: an edge holds the sum over all ways of at most ``depth`` steps
from there to a value neuron, through neurons that are drawn. A neuron that is value neuron and
query neuron, or is reached in several ways, is one node for each position it writes to.

Pruning: value neurons are taken best first until they hold ``share`` of the sum of all positive
scores that were ranked, the inputs of a neuron largest first until they hold ``share`` of the sum
of all positive shares that any candidate has of it. No smaller set would do; a limit on their
number may come before. What is not drawn is told: every node has what it hands down, how much of
that its edges explain, and where the rest comes from.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, SupportsIndex, get_args

import pandas as pd
import torch

from tl_neuron_attr.attribution import Attribution, ValueNeurons, named_neurons
from tl_neuron_attr.capture import capture_sources
from tl_neuron_attr.captured import Sources
from tl_neuron_attr.chosen import value_neurons
from tl_neuron_attr.display import Grid, box, brief, grid, line, next_calls, signed
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.identities import verify_subkeys
from tl_neuron_attr.inputs import QueryInputs, query_inputs, together
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.projection import project
from tl_neuron_attr.prompts import Target, TokenizedPrompt, at_least_one, fraction, visible
from tl_neuron_attr.reading import QueryNeurons
from tl_neuron_attr.readout import Convention
from tl_neuron_attr.tables import Saved, write_tables
from tl_neuron_attr.topk import Kind, RankedNeurons, subvalues_of

Kinds = Literal["ffn", "attn", "both"]
Role = Literal["answer", "value", "query", "both", "token"]
NodeKind = Literal["answer", "ffn", "attn", "token"]

NODE_COLUMNS = (
    "id",
    "label",
    "role",
    "kind",
    "layer",
    "head",
    "index",
    "source_pos",
    "position",
    "token",
    "step",
    "coefficient",
    "score",
    "handed_down",
    "explained",
    "rest_token",
    "rest_attn",
    "rest_ffn",
    "rest_bias",
    "reached",
    "left_out",
)
EDGE_COLUMNS = ("source", "target", "weight")
_MANY = 1000  # inputs of one node: more than any picture shows, and little memory
_WHOLE = ("layer", "head", "index", "source_pos", "position", "step")


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What is not drawn of what a node hands down, in nats, by where it comes from.

    For the answer: the ranked value neurons that are not drawn.
    """

    token: float = 0.0
    attn: float = 0.0
    """Earlier attention: neurons that were pruned, and output biases."""
    ffn: float = 0.0
    bias: float = 0.0
    """The biases in front of the neuron (the norm's, and its own)."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """The answer, a neuron at the position it writes to, or a token (the embedding there).

    For every node ``handed_down`` is ``explained`` and the ``rest`` together, to rounding.
    """

    id: str
    """``answer``; ``L3.N12@5``; ``L4.H1.D7@2>5``, from position 2 to 5; ``token@2``."""
    label: str
    """For people: with its token, spaces visible."""
    role: Role
    """``both`` where it is a value neuron and a query neuron."""
    kind: NodeKind
    neuron: FFNNeuron | AttnNeuron | None
    expert: int | None
    """Which one an FFN neuron is in, in a mixture of experts."""
    position: int
    """Where it writes; the answer is read there."""
    token: str
    """The token where it is set off: an attention neuron's source; of the answer the target."""
    step: int
    """The fewest edges from here to the answer."""
    coefficient: float | None
    """What the neuron's subvalue is multiplied with at its position."""
    score: float
    """What goes from here to the nodes it feeds: the sum of the edges that leave it. Of the answer
    the sum of those that enter it."""
    handed_down: float
    """What its inputs were asked to explain, in nats: 0 at the end of the depth, and of tokens."""
    explained: float
    """The sum of the edges that enter it."""
    rest: Rest
    reached: float | None
    """What share of all positive parts the edges that enter it hold: below the share asked for if
    their number was limited. ``None`` where inputs were not asked for."""
    left_out: bool
    """Whether it is ill-conditioned: then its inputs have no useful shares, and none are drawn."""
    raises: tuple[str, ...] = ()
    """Tokens whose logits its signed contribution raises most, if asked for."""
    lowers: tuple[str, ...] = ()

    __repr__ = brief


@dataclass(frozen=True, kw_only=True)
class Edge:
    """From an input to what it feeds: ``weight`` is in nats."""

    source: str
    target: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The value-to-query graph of one prompt and target, and how it was pruned. Plain values.

    Nodes come by step from the answer, larger scores first; edges by target, in that order, larger
    weights first.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    prompt: TokenizedPrompt
    model_name: str
    target: Target
    log_prob: float
    """log p(target) of the final residual; of a contrast the difference of the two."""
    embedding_log_prob: float
    convention: Convention
    of: str
    """The value neurons asked for: a kind, both, or their labels."""
    kind: Kinds
    """Of which kind query neurons are."""
    ranked: int
    """Of how many neurons of each kind, at the most, the value neurons are the best."""
    share: float
    depth: int
    max_values: int
    max_inputs: int
    opposing: bool

    def __repr__(self) -> str:
        return (
            f"Graph of what gave {self.target.words}: {len(self.nodes)} nodes, "
            f"{len(self.edges)} edges, {self.model_name}, {self.convention}"
        )

    @property
    def answer(self) -> Node:
        """The node all edges lead to. Its ``reached`` is the share the value neurons hold."""
        return self.nodes[0]

    def inputs(self, node: str) -> tuple[Edge, ...]:
        """The edges that enter a node, given by its id, largest first."""
        return tuple(edge for edge in self.edges if edge.target == node)

    def node_table(self) -> pd.DataFrame:
        """One row a node, ``NODE_COLUMNS``; with ``raises`` and ``lowers`` if they were asked for,
        and of a mixture of experts with ``expert``.

        Integers are nullable: empty where a node has no such thing.
        """
        columns = [*NODE_COLUMNS, *(["raises", "lowers"] if self._with_tokens else [])]
        whole = [*_WHOLE]
        if any(node.expert is not None for node in self.nodes):
            columns.append("expert")
            whole.append("expert")
        table = pd.DataFrame([_row(node) for node in self.nodes], columns=columns)
        words = ("id", "label", "role", "kind", "token")
        return table.astype(
            {
                **dict.fromkeys(words, "string"),
                **dict.fromkeys(whole, "Int64"),
                **dict.fromkeys(("coefficient", "reached"), "float64"),
            }
        )

    def edge_table(self) -> pd.DataFrame:
        """One row an edge: ``source, target, weight``, ids and nats."""
        rows = [asdict(edge) for edge in self.edges]
        table = pd.DataFrame(rows, columns=list(EDGE_COLUMNS))
        return table.astype({"source": "string", "target": "string", "weight": "float64"})

    def node_link(self, made_with: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The graph as plain values for JSON, in the form ``networkx.node_link_graph`` reads.

        Nodes have the columns of ``node_table``, without those that are empty; ``graph`` says what
        was asked, and ``made_with`` (``Attribution.facts()``, say) where it comes from.
        """
        facts = {
            name: getattr(self, name)
            for name in ("model_name", "log_prob", "embedding_log_prob", "convention", "of", "kind")
            + ("ranked", "share", "depth", "max_values", "max_inputs", "opposing")
        }
        return {
            "directed": True,
            "multigraph": False,
            "graph": {
                "prompt_id": self.prompt.prompt_id,
                "prompt": self.prompt.text,
                "tokens": list(self.prompt.tokens),
                "token_texts": list(self.prompt.token_texts),
                "read_pos": self.prompt.read_pos,
                "target": self.target.facts(),
                "unit": "nats",
                **facts,
                **({} if made_with is None else {"made_with": dict(made_with)}),
            },
            "nodes": [
                {name: value for name, value in _row(node).items() if value not in (None, [])}
                for node in self.nodes
            ],
            "edges": [asdict(edge) for edge in self.edges],
        }

    def save(
        self,
        directory: str | Path,
        beside: Mapping[str, str] | None = None,
        *,
        made_with: Mapping[str, Any] | None = None,
        report: bool = False,
    ) -> None:
        """Write ``nodes.parquet``, ``edges.parquet`` and ``graph.json`` (``node_link``); with
        ``report`` also ``report.html``, to look at in a browser.

        ``beside`` are texts to write with them, by file name; ``made_with`` are the facts of the
        attribution (its ``facts()``): versions, the weights' hash, certificates. All files appear
        together, or none; a report of an earlier run is removed.

        Raises:
            InputError: If the directory cannot be written to.
            OutputError: If writing fails on the way; nothing has changed then.
        """
        path = check_writable(directory)
        tables = {"nodes": self.node_table(), "edges": self.edge_table()}
        found = self.node_link(made_with)
        pages = {}
        if report:
            from tl_neuron_attr.report.graph import graph_page

            pages["report.html"] = graph_page(Saved(tables=tables, facts=found["graph"]))
        text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
        texts = {**pages, **(beside or {}), "graph.json": text + "\n"}
        write_tables(path, tables, texts, stale_texts=[] if report else ["report.html"])

    def _repr_html_(self) -> str:
        names = {node.id: node for node in self.nodes}
        values = [names[edge.source] for edge in self.inputs(self.answer.id)]
        rows = tuple(
            (
                str(node.neuron or node.id),
                f"{node.position}: {visible(node.token)}",
                node.score,
                ", ".join(
                    f"{names[edge.source].label} {signed(edge.weight)}"
                    for edge in self.inputs(node.id)
                ),
                node.raises[:3],
            )
            for node in values
        )
        reached = self.answer.reached
        held = "" if reached is None else f", which hold {reached:.0%} of what was ranked"
        return box(
            f"What gave {self.target.words}: value neurons and what set them off",
            line(
                f"{len(self.nodes)} nodes, {len(self.edges)} edges; {len(values)} value "
                f"neurons{held}"
            ),
            grid(
                Grid(
                    header=("value neuron", "from", "score, nats", "set off by", "raises"),
                    rows=rows,
                    bars=frozenset({2}),
                    wraps=frozenset({3}),
                )
            ),
            next_calls(
                {
                    "views.sankey(graph.node_table(), graph.edge_table())": "the picture",
                    "graph.node_table()": "all nodes",
                    "graph.edge_table()": "all edges",
                }
            ),
        )

    @property
    def _with_tokens(self) -> bool:
        return any(node.raises for node in self.nodes)


def value_query_graph(
    result: Attribution,
    of: ValueNeurons = "both",
    *,
    kind: Kinds = "both",
    share: float | None = None,
    depth: SupportsIndex = 1,
    max_values: SupportsIndex | None = None,
    max_inputs: SupportsIndex | None = None,
    opposing: bool = False,
    tokens: int = 0,
) -> Graph:
    """Which value neurons gave the answer, and which tokens and query neurons set them off.

    Args:
        result: What ``attribute`` gave; its convention is that of the graph.
        of: The value neurons: of a kind (``"ffn"``, ``"attn"``) or ``"both"``, as many of the best
            as hold ``share``; or chosen ones, as in ``query_layers``, which are all drawn.
        kind: Which query neurons: ``"ffn"``, ``"attn"`` or ``"both"``. Tokens always.
        share: How much the nodes kept explain, above 0 and up to 1: of all ranked value neurons'
            positive scores, and of the positive shares of each node's candidates. By default half,
            as far as it goes within limits that leave a picture one can read.
        depth: How many steps from value neurons back: 1 for query neurons, 2 for theirs, ...
        max_values: At most so many value neurons: by default 10, with a chosen ``share`` all.
        max_inputs: At most so many inputs of each node: by default 4, with a chosen share 1,000.
        opposing: Draw, alike, as many inputs that hold a neuron back: of negative share.
        tokens: If positive, so many tokens that each neuron ``raises`` and ``lowers`` most.

    Cost: a product of ``W_out`` and ``W_O`` of all earlier layers with one vector for each node, a
    step's together; a forward pass for each step that leads to new positions; one more checks a
    model's first query. Memory: the budget of the result's read-out.

    Raises:
        InputError: If an argument makes no sense, a neuron does not exist, or the model no longer
            gives the activations it was attributed by.
        IdentityError: If neurons' pre-activations are not what this package recomputes.
    """
    depth = at_least_one(depth, "depth")
    ranked = len(result.ffn_neurons) + len(result.attn_neurons)
    # a share that was chosen is to be reached; otherwise the picture is to be readable
    most_values, most_inputs = (10, 4) if share is None else (ranked, _MANY)
    max_values = most_values if max_values is None else at_least_one(max_values, "max_values")
    max_inputs = most_inputs if max_inputs is None else at_least_one(max_inputs, "max_inputs")
    share = 0.5 if share is None else fraction(share, "share")
    if kind not in get_args(Kinds):
        raise InputError(f"kind must be 'ffn', 'attn' or 'both', got {kind!r}")
    kinds: tuple[Kind, ...] = ("ffn", "attn") if kind == "both" else (kind,)
    if not isinstance(of, str) or of not in get_args(Kinds):
        of = named_neurons(of)
    host, captured = result.host, result.captured
    convention = "published" if result.convention == "published" else "exact"
    sources: Sources | None = None
    with torch.no_grad(), full_precision():
        drawing = _Drawing(result=result)
        live = drawing.draw_values(*_value_neurons(result, of, share, max_values))
        for step in range(2, 2 + depth):
            if not live:
                break
            verify_subkeys(host, captured)
            sources = _sources_of(result, live, sources)
            found = query_inputs(
                host,
                captured,
                live,
                sources,
                convention,
                kinds=kinds,
                share=share,
                most=max_inputs,
                opposing=opposing,
                budget=result.out.budget,
            )
            live = drawing.draw_inputs(live, found, step)
        nodes = drawing.nodes(tokens)
    return Graph(
        nodes=nodes,
        edges=drawing.edges(nodes),
        prompt=captured.prompt,
        model_name=host.model_name,
        target=result.target,
        log_prob=result.log_prob,
        embedding_log_prob=result.embedding_log_prob,
        convention=result.convention,
        of=of if isinstance(of, str) else ", ".join(map(str, of)),
        kind=kind,
        ranked=max(len(result.ffn_neurons), len(result.attn_neurons)),
        share=share,
        depth=depth,
        max_values=max_values,
        max_inputs=max_inputs,
        opposing=opposing,
    )


def _value_neurons(
    result: Attribution,
    of: str | Sequence[FFNNeuron | AttnNeuron],
    share: float,
    max_values: int,
) -> tuple[list[RankedNeurons], dict[Kind, float]]:
    """The value neurons to draw, and what all there were to choose from hold, by kind."""
    ranked = {"ffn": result.ffn_neurons, "attn": result.attn_neurons}
    if not isinstance(of, str):
        chosen = value_neurons(result.host, result.captured, result.out, result.target, of)
        if not chosen:
            raise InputError("there is no value neuron to draw; name at least one, or a kind")
        return list(chosen), {each.kind: sum(each.score.tolist()) for each in chosen}
    lists = [ranked[name] for name in (("ffn", "attn") if of == "both" else (of,))]
    which = torch.cat([torch.full_like(each.layer, n) for n, each in enumerate(lists)])
    score, order = torch.cat([each.score for each in lists]).sort(descending=True, stable=True)
    rising = score.clamp(min=0)
    before = rising.cumsum(0) - rising
    kept = ((score > 0) & (before < share * rising.sum()))[:max_values]
    of_each = torch.bincount(which[order[: int(kept.sum())]], minlength=len(lists)).tolist()
    return (
        [each.first(count) for each, count in zip(lists, of_each, strict=True) if count],
        {each.kind: float(each.score.clamp(min=0).sum()) for each in lists},
    )


def _sources_of(
    result: Attribution, live: Sequence[QueryNeurons], sources: Sources | None
) -> Sources | None:
    """What happened where these neurons are set off; ``sources``, if that is enough."""
    known = {result.captured.prompt.read_pos}
    if sources is not None:
        known |= set(sources.positions.tolist())
    needed = {position for each in live for position in each.set_off.tolist()}
    if needed <= known:
        return sources
    return capture_sources(result.host, result.captured, needed)


# --- drawing ----------------------------------------------------------------------------------

_ANSWER = "answer"


@dataclass(kw_only=True)
class _Draft:
    """A node while its edges are still being found."""

    neuron: FFNNeuron | AttnNeuron | None
    position: int
    step: int
    coefficient: float | None = None
    value: bool = False
    query: bool = False
    handed_down: float = 0.0
    rest: dict[str, float] = field(default_factory=lambda: asdict(Rest()))
    reached: float | None = None
    left_out: bool = False


@dataclass(kw_only=True)
class _Drawing:
    """Nodes and edges as they are found, from the answer back."""

    result: Attribution
    drafts: dict[str, _Draft] = field(init=False)
    weights: dict[tuple[str, str], float] = field(default_factory=dict)
    """Of each edge, by its source and target."""
    neurons: list[tuple[list[str], RankedNeurons]] = field(default_factory=list)
    """Nodes, and the neurons they are."""

    def __post_init__(self) -> None:
        read_pos = self.result.captured.prompt.read_pos
        self.drafts = {_ANSWER: _Draft(neuron=None, position=read_pos, step=0)}

    def draw_values(
        self, values: Sequence[RankedNeurons], available: Mapping[Kind, float]
    ) -> list[QueryNeurons]:
        """The edges of the answer; ``available`` is what all there were to choose from hold."""
        answer = self.drafts[_ANSWER]
        answer.handed_down = sum(available.values())
        for kind, held in available.items():
            answer.rest[kind] = held
        placed = []
        for ranked in values:
            position = torch.full_like(ranked.layer, answer.position)
            placed.append(QueryNeurons(neurons=ranked, position=position))
            nodes = self._nodes_of(placed[-1], step=1)
            for node, score in zip(nodes, ranked.score.tolist(), strict=True):
                self.drafts[node].value = True
                answer.rest[ranked.kind] -= score
                self._add(node, _ANSWER, score)
        explained = sum(self.weights.values())
        answer.reached = explained / answer.handed_down if answer.handed_down else 0.0
        return placed

    def draw_inputs(
        self, live: Sequence[QueryNeurons], found: QueryInputs, step: int
    ) -> list[QueryNeurons]:
        """The edges into ``live``, once their inputs are found; gives the neurons among these."""
        readers = [node for each in live for node in self._nodes_of(each, step=step - 1)]
        columns = (found.position, found.score, found.left_out, found.reached, found.token)
        columns += (found.embed, found.attn, found.ffn, found.bias)
        for reader, *row in zip(readers, *(column.tolist() for column in columns), strict=True):
            position, score, left_out, reached, token, embed, attn, ffn, bias = row
            draft = self.drafts[reader]
            draft.handed_down += score
            draft.left_out = left_out
            draft.reached = None if left_out else reached
            for name, brought in (("attn", attn), ("ffn", ffn), ("bias", bias)):
                draft.rest[name] += brought
            if token:
                node = f"token@{position}"
                self.drafts.setdefault(node, _Draft(neuron=None, position=position, step=step))
                self._add(node, reader, embed)
            else:
                draft.rest["token"] += embed
        following = []
        for kind, inputs in found.inputs.items():
            nodes = self._nodes_of(inputs.neurons, step=step)
            scores = inputs.neurons.neurons.score.tolist()
            for node, value, score in zip(nodes, inputs.value.tolist(), scores, strict=True):
                self.drafts[node].query = True
                self.drafts[readers[value]].rest[kind] -= score
                self._add(node, readers[value], score)
            if nodes:
                following.append(together(inputs.neurons))
        return following

    def _nodes_of(self, found: QueryNeurons, step: int) -> list[str]:
        """The ids of these neurons' nodes, which are there from now on."""
        ranked = found.neurons
        columns = ranked.neurons(), found.position.tolist(), ranked.coefficient.tolist()
        nodes, fresh = [], []
        for place, (neuron, position, coefficient) in enumerate(zip(*columns, strict=True)):
            node = f"{neuron}{'@' if isinstance(neuron, FFNNeuron) else '>'}{position}"
            nodes.append(node)
            if node not in self.drafts:
                fresh.append(place)
                self.drafts[node] = _Draft(
                    neuron=neuron, position=position, step=step, coefficient=coefficient
                )
        if fresh:
            places = torch.tensor(fresh, device=ranked.layer.device)
            self.neurons.append(([nodes[place] for place in fresh], ranked.at(places)))
        return nodes

    def _add(self, source: str, target: str, weight: float) -> None:
        self.weights[source, target] = self.weights.get((source, target), 0.0) + weight

    def nodes(self, tokens: int) -> tuple[Node, ...]:
        """The finished nodes, by step, then by score."""
        entering, leaving = dict.fromkeys(self.drafts, 0.0), dict.fromkeys(self.drafts, 0.0)
        for (source, target), weight in self.weights.items():
            leaving[source] += weight
            entering[target] += weight
        leaving[_ANSWER] = entering[_ANSWER]
        ends = self._token_ends(tokens) if tokens > 0 else {}
        nodes = []
        for name, draft in self.drafts.items():
            token = self._token(name, draft)
            raises, lowers = ends.get(name, ((), ()))
            nodes.append(
                Node(
                    id=name,
                    label=self._label(name, draft, token),
                    role=_role(draft),
                    kind=_kind(draft),
                    neuron=draft.neuron,
                    expert=self._expert(draft),
                    position=draft.position,
                    token=token,
                    step=draft.step,
                    coefficient=draft.coefficient,
                    score=leaving[name],
                    handed_down=draft.handed_down,
                    explained=entering[name],
                    rest=Rest(**draft.rest),
                    reached=draft.reached,
                    left_out=draft.left_out,
                    raises=raises,
                    lowers=lowers,
                )
            )
        return tuple(sorted(nodes, key=lambda node: (node.step, -node.score)))

    def edges(self, nodes: Sequence[Node]) -> tuple[Edge, ...]:
        """The finished edges, by target in the order of the nodes, then by weight."""
        place = {node.id: number for number, node in enumerate(nodes)}
        edges = [
            Edge(source=source, target=target, weight=weight)
            for (source, target), weight in self.weights.items()
        ]
        return tuple(sorted(edges, key=lambda edge: (place[edge.target], -edge.weight)))

    def _token(self, name: str, draft: _Draft) -> str:
        if name == _ANSWER:
            return self.result.target.in_tables
        source = draft.neuron.source_pos if isinstance(draft.neuron, AttnNeuron) else None
        return self.result.captured.prompt.token_texts[draft.position if source is None else source]

    def _expert(self, draft: _Draft) -> int | None:
        if not isinstance(draft.neuron, FFNNeuron):
            return None
        found = self.result.host.expert_of(draft.neuron.index)
        return None if found is None else found[0]

    def _label(self, name: str, draft: _Draft, token: str) -> str:
        text = visible(token) or "(empty)"
        if name == _ANSWER:
            return self.result.target.words
        if draft.neuron is None:
            return f"@{draft.position} {text}"
        if isinstance(draft.neuron, FFNNeuron):
            return f"{draft.neuron}@{draft.position} {text}"
        # most attention neurons write at the read position: only the others say where
        read_pos = self.result.captured.prompt.read_pos
        where = "" if draft.position == read_pos else f"→{draft.position}"
        return f"{draft.neuron}{where} {text}"

    def _token_ends(self, k: int) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """What each neuron raises and lowers most, with the sign its coefficient has."""
        found = {}
        for names, neurons in self.neurons:
            blocks = self.result.ffns if neurons.kind == "ffn" else self.result.attns
            signs = torch.where(neurons.coefficient < 0, -1.0, 1.0)
            ends = project(self.result.out, signs[:, None] * subvalues_of(blocks, neurons), k)
            rows = zip(ends.top_ids.tolist(), ends.bottom_ids.tolist(), strict=True)
            for name, sides in zip(names, rows, strict=True):
                raises, lowers = (tuple(map(self.result.host.token_text, ids)) for ids in sides)
                found[name] = raises, lowers
        return found


def _kind(draft: _Draft) -> NodeKind:
    if draft.neuron is None:
        return "answer" if draft.step == 0 else "token"
    return "ffn" if isinstance(draft.neuron, FFNNeuron) else "attn"


def _role(draft: _Draft) -> Role:
    if draft.neuron is None:
        return "answer" if draft.step == 0 else "token"
    if draft.value and draft.query:
        return "both"
    return "value" if draft.value else "query"


def _row(node: Node) -> dict[str, Any]:
    """A node's columns; ``None`` where it has no such thing."""
    columns = {
        name: getattr(node, name, getattr(node.neuron, name, None))
        for name in NODE_COLUMNS
        if not name.startswith("rest_")
    }
    rest = {f"rest_{name}": value for name, value in asdict(node.rest).items()}
    tokens = {"raises": list(node.raises), "lowers": list(node.lowers)}
    return {**columns, **rest, **tokens, "expert": node.expert}
