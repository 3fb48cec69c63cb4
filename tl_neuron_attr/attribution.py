"""What we found: the result of attributing one prompt, from which every table is made."""

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from warnings import warn

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tl_neuron_attr.capture import capture_sources
from tl_neuron_attr.captured import Capture, Sources
from tl_neuron_attr.chosen import value_neurons
from tl_neuron_attr.decompose import AttnDecomposition, Decomposition, FFNDecomposition
from tl_neuron_attr.display import counted
from tl_neuron_attr.errors import InputError, NeuronAttrError
from tl_neuron_attr.files import check_file, check_writable
from tl_neuron_attr.glance import Glance, attribution_box, source_strip
from tl_neuron_attr.host import Host, model_facts, neuron_basis
from tl_neuron_attr.identities import verify_subkeys
from tl_neuron_attr.index import ProjectionIndex
from tl_neuron_attr.intervals import (
    DEFAULT_TOLERANCE,
    Intervals,
    score_intervals,
    suppressing_neurons,
)
from tl_neuron_attr.interventions import head_scan
from tl_neuron_attr.lens import log_probs_everywhere
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Head, parse_neuron
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.projection import project
from tl_neuron_attr.prompts import Target, at_least_one, integer
from tl_neuron_attr.query import QueryScores, query_scores, top_query_neurons
from tl_neuron_attr.reading import QueryNeurons
from tl_neuron_attr.readout import Convention, ReadOut
from tl_neuron_attr.scores import LayerScores, position_scores
from tl_neuron_attr.strip import TokenStrip
from tl_neuron_attr.tables import (
    NEURON_COLUMNS,
    Saved,
    head_scan_table,
    head_table,
    layer_table,
    log_prob_table,
    neuron_table,
    position_table,
    query_layer_table,
    query_neuron_table,
    query_value_table,
    records,
    share_table,
    token_columns,
    with_experts,
    write_run,
)
from tl_neuron_attr.topk import Kind, RankedNeurons, no_intervals, subvalues_of, top_neurons

ValueNeurons = str | FFNNeuron | AttnNeuron | Iterable[str | FFNNeuron | AttnNeuron]
"""Value neurons to find query neurons of: ``"attn"``, ``"ffn"`` or ``"both"`` for the top ones of a
kind; one neuron, as a value or a label like ``"L9.N1234"``; or several."""

TOP_VALUES = 30
"""How many value neurons query neurons are found of, unless asked otherwise: as published."""

ALL_LEFT_OUT = (
    "every value neuron asked about is ill-conditioned: what feeds it nearly cancels, so it has no "
    "useful shares and all query scores are 0"
)
"""What to say where no value neuron is in the sums."""

SAVED_TOKENS = 10
"""How many tokens that a neuron raises, and lowers, are saved beside it."""

_VERSIONED = ("tl_neuron_attr", "transformer_lens", "transformers", "torch")


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What ``attribute`` found out about one prompt and target. Scores are in nats.

    Layers, heads and the top neurons are here; ``positions`` and what depends on choices made
    later are computed when asked for, from the capture and the model's weights. It therefore
    keeps the model alive: keep the tables, or ``captured``, where that matters.
    """

    host: Host = field(repr=False)
    """The model, and what is known of it."""
    captured: Capture = field(repr=False)
    """The forward pass; pass it to ``attribute`` for another target without running again."""
    target: Target
    """What is explained: the log-probability of a token, or of one token against another."""
    convention: Convention
    """How residual vectors are read out."""
    out: ReadOut = field(repr=False)
    """The read-out of this run."""
    ffns: tuple[FFNDecomposition, ...] = field(repr=False)
    """The FFN of each layer, as a sum over its neurons."""
    attns: tuple[AttnDecomposition, ...] = field(repr=False)
    """The attention of each layer, as a sum over heads, sources and dimensions."""
    log_prob: float
    """log p(target) of the final residual; in ``exact`` the model's own. Of a contrast, here and
    below, the difference of the two log-probabilities."""
    embedding_log_prob: float
    """log p(target) of what enters the first block."""
    layer_scores: LayerScores = field(repr=False)
    """What ``layers`` tabulates."""
    head_scores: Float[Tensor, "layer head"] = field(repr=False)
    """What ``heads`` tabulates."""
    ffn_neurons: RankedNeurons = field(repr=False)
    """The best FFN neurons, with their certificate."""
    attn_neurons: RankedNeurons = field(repr=False)
    """The best attention neurons (by source position), with their certificate."""
    index: ProjectionIndex | None = field(repr=False, default=None)
    """The projection index of the model, which ``suppressing`` and ``shares`` rest on."""
    warnings: tuple[str, ...] = ()
    """What to bear in mind when reading the scores; also raised as ``UserWarning``."""
    seconds: float
    """What ``attribute`` took, the forward pass included; in a batch, a prompt's share of it."""

    def layers(self) -> pd.DataFrame:
        """Rise from each layer's attention and FFN: ``layer, kind, score``, in layer order."""
        return layer_table(self.layer_scores)

    def heads(self, top: int | None = None) -> pd.DataFrame:
        """Rise from each head: ``layer, head, score``; in order, or the ``top`` best first."""
        table = head_table(self.head_scores)
        return table if top is None else _best(table, top)

    def positions(
        self, layer: int | None = None, head: int | None = None, *, progress: bool = False
    ) -> pd.DataFrame:
        """Rise from what a head brings from each source position, with its attention.

        Of one head, of all heads of a layer, or of all heads: ``layer, head, source_pos, token,
        attention, score``. Cost: one read-out per row; computed anew at each call.

        Raises:
            InputError: If there is no such layer or head.
        """
        if layer is None and head is not None:
            raise InputError("give the head's layer too")
        for name, value, count in (
            ("layer", layer, self.host.n_layers),
            ("head", head, self.host.n_heads),
        ):
            if value is not None and not 0 <= integer(value, name) < count:
                raise InputError(f"{name} {value} is out of range: the model has {count} {name}s")
        layers = range(self.host.n_layers) if layer is None else [layer]
        heads = slice(None) if head is None else slice(head, head + 1)
        blocks = [self.attns[place] for place in layers]
        rows = sum(block.pattern[heads].numel() for block in blocks)
        with torch.no_grad(), progress_bar(rows, "position", progress) as bar:
            scores = position_scores(
                blocks, self.out, self.target, heads=heads, progress=bar.update
            )
        tables = [
            position_table(
                block.layer,
                range(self.host.n_heads)[heads],
                self.captured.prompt.token_texts,
                block.pattern[heads],
                of_layer,
            )
            for block, of_layer in zip(blocks, scores, strict=True)
        ]
        return pd.concat(tables, ignore_index=True)

    def log_probs(self) -> pd.DataFrame:
        """log p(target) after each layer, at every position: ``layer, position, token, log_prob``.

        Of the residual stream, read out in the result's convention as if the target came next at
        each position; ``layer`` is empty for what enters the first. A frozen norm has at each
        position the scale it has there at the end of the run. At the read position it goes from
        ``embedding_log_prob`` to ``log_prob``, in steps of a layer's two scores (except in parallel
        blocks, where scores do not add up). Positions after it are left out.

        Cost: one forward pass of the same prompt, and a read-out for each row (see ``lens.py``).

        Raises:
            InputError: If the model no longer gives the activations it was attributed by.
        """
        with torch.no_grad():
            found = log_probs_everywhere(self.host, self.captured, self.out, self.target)
        if self.target.distribution is not None:
            found = found.clamp(max=0.0)  # what rounds where a divergence is 0
        return log_prob_table(found, self.captured.prompt.token_texts)

    def log_probs_or_why_not(self) -> tuple[dict[str, pd.DataFrame], tuple[str, ...]]:
        """``log_probs()`` by its name, or none and what to say: for a report that must not fail."""
        try:
            return {"log_probs": self.log_probs()}, ()
        except NeuronAttrError as error:
            return {}, (f"no log p by layer and position: {error}",)

    def token_strip(
        self,
        layer: int | None = None,
        head: int | None = None,
        *,
        attention: bool = False,
        top: int = 5,
    ) -> TokenStrip:
        """The prompt's tokens to click: what a head, a layer's heads or all heads bring from each.

        Of each token the ``top`` heads that bring most from there, and the best attention neurons
        there among those ranked, with tokens they raise. By default a token's value is the rise in
        nats; of several heads the sum of each one's own, which is not what they do together. With
        ``attention`` it is the weight (0 to 1) that the read position pays it, of several heads
        their mean. Cost and errors: as ``positions``.
        """
        top = at_least_one(top, "top")
        positions = self.positions(layer, head)
        asked = {"layer": layer, "head": head}
        count: dict[int, int] = {}
        places = []
        for place, row in enumerate(records(self.neurons("attn"))):
            if all(wanted in (None, row[name]) for name, wanted in asked.items()):
                count[row["source_pos"]] = count.get(row["source_pos"], 0) + 1
                if count[row["source_pos"]] <= top:
                    places.append(place)
        device = self.attn_neurons.score.device
        listed = self.attn_neurons.at(torch.tensor(places, dtype=torch.long, device=device))
        of = "all heads" if layer is None else f"the heads of layer {layer}"
        return source_strip(
            self.captured.prompt,
            positions,
            self._table(listed, self.attns, 3),
            of if layer is None or head is None else str(Head(layer, head)),
            attention=attention,
            top=top,
        )

    def neurons(
        self,
        kind: Kind | None = None,
        top: int | None = None,
        *,
        by_source: bool = True,
        tokens: int = 0,
    ) -> pd.DataFrame:
        """The best value neurons: one row a neuron, ranked within its kind.

        Args:
            kind: ``"ffn"``, ``"attn"``, or both, FFN neurons first.
            top: How many of each kind; by default all that were ranked.
            by_source: Attention neurons at each source position (the paper's), or, if False,
                summed over source positions; the latter are scored at each call.
            tokens: If positive, three more columns: the source token, and so many tokens that
                the neuron's signed contribution ``raises`` and ``lowers`` most.

        In a mixture of experts FFN neurons are numbered through a layer, expert after expert, and
        the column ``expert`` says which one each is in (a shared one is the one after the last).

        Raises:
            InputError: If ``kind`` is unknown, or more neurons are asked for than were ranked.
        """
        tables = []
        for name in _kinds(kind):
            if name == "ffn":
                neurons, blocks = self.ffn_neurons, self.ffns
            elif by_source:
                neurons, blocks = self.attn_neurons, self.attns
            else:
                neurons, blocks = self.attn_neurons_over_sources, self.attns_over_sources
            if top is not None:
                neurons = _first(neurons, blocks, at_least_one(top, "top"))
            tables.append(self._table(neurons, blocks, tokens))
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def attns_over_sources(self) -> tuple[AttnDecomposition, ...]:
        """The attention of each layer, source positions summed: a sum over heads and dimensions."""
        return tuple(block.over_sources() for block in self.attns)

    @cached_property
    def attn_neurons_over_sources(self) -> RankedNeurons:
        """The best attention neurons summed over source positions, with their certificate.

        As many as were ranked by source position (all, if there are fewer).
        """
        with torch.no_grad():
            return top_neurons(
                self.attns_over_sources, self.out, self.target, len(self.attn_neurons)
            )

    def suppressing(
        self, kind: Kind | None = None, top: int | None = None, *, tokens: int = 0
    ) -> pd.DataFrame:
        """The neurons that lower log p(target) most, lowest score first, each kind for itself.

        Proven like the best ones, but it takes the projection index: ``attribute(..., index=)``.
        Arguments and columns are those of ``neurons``. Cost: a search as that for the best, once.

        Raises:
            InputError: If ``kind`` is unknown, more neurons are asked for than were ranked, or
                there is no index and one is needed (a contrast, and a recomputed norm, need none).
        """
        tables = []
        for name in _kinds(kind):
            blocks = self._blocks(name)
            neurons = self.suppressing_neurons[name]
            if top is not None:
                neurons = _first(neurons, blocks, at_least_one(top, "top"))
            tables.append(self._table(neurons, blocks, tokens))
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def suppressing_neurons(self) -> dict[Kind, RankedNeurons]:
        """What ``suppressing`` tabulates, by kind, with certificates: as many as were ranked."""
        if self.out.affine and self.target.against is None:
            self._need_index()
        ranked = {"ffn": self.ffn_neurons, "attn": self.attn_neurons}
        with torch.no_grad():
            return {
                name: suppressing_neurons(
                    self._blocks(name), self.out, self.target, self.index, len(ranked[name])
                )
                for name in _kinds(None)
            }

    def intervals(self, kind: Kind, *, tolerance: float = DEFAULT_TOLERANCE) -> Intervals:
        """Between what the score of every neuron of a kind lies, at most ``tolerance`` nats apart.

        Cost: a small part of what scoring every neuron takes; computed anew at each call.

        Raises:
            InputError: If ``kind`` is unknown, the norm is recomputed, or there is no index.
        """
        if kind not in ("ffn", "attn"):
            raise InputError(f"kind must be 'ffn' or 'attn', got {kind!r}")
        if not self.out.affine:
            raise InputError(no_intervals(self.out))
        if self.target.against is None:
            self._need_index()
        with torch.no_grad():
            return score_intervals(
                self._blocks(kind), self.out, self.target, self.index, tolerance=tolerance
            )

    def shares(
        self,
        top: int = 300,
        *,
        tolerance: float = DEFAULT_TOLERANCE,
    ) -> pd.DataFrame:
        """How much of all that raises the target the best neurons hold, between proven ends.

        One row a kind: ``kind, top, rise_lower, rise_upper`` (the sum of the scores of all neurons
        that raise the target, in nats) and ``share_lower, share_upper`` (of it, the part that the
        ``top`` best hold). Cost and errors: as ``intervals``.
        """
        top = at_least_one(top, "top")
        rows = []
        for name in _kinds(None):
            found = self.intervals(name, tolerance=tolerance)
            rows.append((name, top, *found.positive_total(), *found.share(top)))
        return share_table(rows)

    def query_layers(
        self, of: ValueNeurons | QueryScores = "attn", *, top_values: int = TOP_VALUES
    ) -> pd.DataFrame:
        """What feeds value neurons: ``layer, kind, score``, kind embed, attn, ffn or bias.

        Scores are in nats: the value neurons' own, handed down by share (see ``query.py``), in the
        result's convention; under ``recomputed`` as in ``exact``.

        Args:
            of: The value neurons: the ``top_values`` best of a kind (``"attn"`` as published,
                ``"ffn"``, ``"both"``), one neuron or its label, or several; or what
                ``query_scores`` gave for them, which saves doing it again.
            top_values: How many of each kind (all, if there are fewer); ranked now where
                ``attribute`` ranked fewer. The notebooks take 30; for query layers of GPT-2, 100.

        Cost: besides matrix products, one forward pass of the same prompt where there are
        attention neurons; for the 30 best of them it is kept with the result. One more checks a
        model's first query.

        Raises:
            InputError: If a neuron does not exist; if the model no longer gives the activations
                it was attributed by.
            IdentityError: If neurons' pre-activations are not what this package recomputes.
        """
        return query_layer_table(self.query_scores(of, top_values=top_values))

    def query_heads(
        self,
        of: ValueNeurons | QueryScores = "attn",
        *,
        top_values: int = TOP_VALUES,
        top: int | None = None,
    ) -> pd.DataFrame:
        """The same for heads: ``layer, head, score``; in order, or the ``top`` best first.

        Those that come before no value neuron score 0; they are not among the best.
        """
        scores = self.query_scores(of, top_values=top_values)
        table = head_table(scores.heads)
        if top is None:
            return table
        return _best(head_table(scores.heads[: scores.attn_depth]), top)

    def query_neurons(
        self,
        top: int = 300,
        kind: Kind | None = "ffn",
        of: ValueNeurons | QueryScores = "attn",
        *,
        top_values: int = TOP_VALUES,
        by_position: bool = False,
        tokens: int = 0,
    ) -> pd.DataFrame:
        """The best query neurons, FFN, attention, or (``None``) both: rows as of ``neurons``, with
        role ``query``.

        A neuron is summed over the positions where it feeds value neurons; its coefficient is that
        at the position where it does most. With ``by_position`` each position has a row, and a
        column ``position``. Empty if nothing of the kind comes before the value neurons. ``tokens``
        as in ``neurons``, with ``position`` beside them: where the neuron does most. The other
        arguments, costs and errors are those of ``query_layers``.
        """
        kinds = _kinds(kind)
        top = at_least_one(top, "top")
        scores = self.query_scores(of, top_values=top_values)
        tables = []
        for name in kinds:
            with torch.no_grad():
                found = top_query_neurons(
                    self.host, self.captured, scores, top, name, by_position=by_position
                )
            tables.append(self._query_table(found, by_position=by_position, tokens=tokens))
        return pd.concat(tables, ignore_index=True)

    def query_neurons_or_why_not(
        self, top: int = 300, *, tokens: int = 0
    ) -> tuple[pd.DataFrame, tuple[str, ...]]:
        """``query_neurons(top)`` for a report that must not fail, and what to say beside it.

        Value neurons come from one run, which may be a cache or a capture; query neurons take the
        prompt to be run again as it was. Where the model or its hooks are no longer the same, or
        every value neuron is ill-conditioned, the table is empty and the message says why.
        """
        try:
            scores = self._query
        except NeuronAttrError as error:
            return self._no_query_neurons(tokens), (f"no query neurons: {error}",)
        if bool(scores.left_out.all()):
            return self._no_query_neurons(tokens), (f"no query neurons: {ALL_LEFT_OUT}",)
        return self.query_neurons(top, of=scores, tokens=tokens), ()

    def query_values(
        self, of: ValueNeurons | QueryScores = "attn", *, top_values: int = TOP_VALUES
    ) -> pd.DataFrame:
        """The value neurons' pre-activations, and which of them were left out: ill-conditioned."""
        table = query_value_table(self.query_scores(of, top_values=top_values))
        return self._with_experts(table)

    def query_scores(
        self, of: ValueNeurons | QueryScores = "attn", *, top_values: int = TOP_VALUES
    ) -> QueryScores:
        """What the query tables are made from, as tensors."""
        if isinstance(of, QueryScores):
            return of
        scores = self._query_scores(self._values(of, top_values))
        if bool(scores.left_out.all()):
            warn(f"{ALL_LEFT_OUT}; query_values() shows them", stacklevel=3)
        return scores

    @cached_property
    def _query(self) -> QueryScores:
        """What ``query_neurons()`` is made from by default."""
        return self._query_scores(self._values("attn", TOP_VALUES))

    def _query_scores(self, values: Sequence[RankedNeurons]) -> QueryScores:
        convention = "published" if self.convention == "published" else "exact"
        with torch.no_grad(), full_precision():
            sources = self._sources_of(values)
            verify_subkeys(self.host, self.captured)
            return query_scores(self.host, self.captured, values, sources, convention)

    def _values(self, of: Any, top_values: int) -> tuple[RankedNeurons, ...]:
        if isinstance(of, str) and of in ("ffn", "attn", "both"):
            count = at_least_one(top_values, "top_values")
            kinds = ("ffn", "attn") if of == "both" else _kinds(of)
            return tuple(self._best_values(kind, count) for kind in kinds)
        with torch.no_grad():
            return value_neurons(self.host, self.captured, self.out, self.target, named_neurons(of))

    def head_scan(self) -> pd.DataFrame:
        """What is lost without each head: ``layer, head, change`` of log p(target), in nats.

        Every head is zeroed in turn, at all positions, and the model's own prediction taken: below
        0, the head helped. Unlike ``heads``, it counts what later layers make of the head. Cost
        and errors are those of ``head_scan``; computed anew at each call.
        """
        return head_scan_table(head_scan(self.host, self.captured, self.target))

    def predictions(self, top: int = 5) -> pd.DataFrame:
        """The model's likeliest next tokens: ``id, token, log_prob, prob``."""
        likeliest = self.captured.top_predictions(at_least_one(top, "top"))
        return pd.DataFrame(
            {
                "id": [token for token, _ in likeliest],
                "token": [self.host.token_text(token) for token, _ in likeliest],
                "log_prob": [log_prob for _, log_prob in likeliest],
                "prob": [torch.tensor(log_prob).exp().item() for _, log_prob in likeliest],
            }
        )

    def facts(self) -> dict[str, Any]:
        """Where these numbers come from, ready for JSON: prompt, target, model, versions.

        Cost: one pass over the model's weights, for their hash.
        """
        host, prompt = self.host, self.captured.prompt
        return {
            "prompt_id": prompt.prompt_id,
            "prompt": prompt.text,
            "tokens": list(prompt.tokens),
            "token_texts": list(prompt.token_texts),
            "read_pos": prompt.read_pos,
            "target": {
                **self.target.facts(),
                "log_prob": self.log_prob,
                "embedding_log_prob": self.embedding_log_prob,
            },
            "predictions": records(self.predictions()),
            "convention": self.convention,
            "neuron_basis": neuron_basis(host),
            "model": model_facts(host),
            "score_dtype": str(self.out.dtype).removeprefix("torch."),
            "score_unit": "nats",
            "certificates": self.certificates(),
            "versions": versions(),
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }

    def certificates(self) -> dict[str, dict[str, Any]]:
        """Why the neurons listed are the best, for each kind: the fields of its ``Certificate``.

        With a projection index also why those that lower the target most are these.
        """
        lists = {"ffn": self.ffn_neurons, "attn": self.attn_neurons}
        if self.index is not None and self.out.affine:
            lists |= {f"suppressing_{name}": r for name, r in self.suppressing_neurons.items()}
        return {name: asdict(ranked.certificate) for name, ranked in lists.items()}

    def saved(self, *, progress: bool = False) -> Saved:
        """The tables and facts that ``save`` writes, by name. Cost: that of ``save``."""
        top = max(len(self.ffn_neurons), len(self.attn_neurons))
        query_neurons, problems = self.query_neurons_or_why_not(top, tokens=SAVED_TOKENS)
        log_probs, no_log_probs = self.log_probs_or_why_not()
        value_neurons = self.neurons(tokens=SAVED_TOKENS)
        # they are all read in one place: empty, in the column where query neurons have it
        nowhere = pd.array([None] * len(value_neurons), dtype="Int64")
        value_neurons.insert(len(NEURON_COLUMNS), "position", nowhere)
        tables = {
            "layers": self.layers(),
            "heads": self.heads(),
            "positions": self.positions(progress=progress),
            **log_probs,
            "neurons": pd.concat([value_neurons, query_neurons], ignore_index=True),
        }
        if self.index is not None and self.out.affine:
            tables["suppressing"] = self.suppressing(tokens=SAVED_TOKENS)
            tables["shares"] = self.shares(top)
        facts = self.facts()
        facts["warnings"] += [*problems, *no_log_probs]
        if not problems:
            facts["query"] = {"for": "attn", "value_top": TOP_VALUES, **query_facts(self._query)}
        return Saved(tables=tables, facts=facts)

    def save(self, directory: str | Path, *, report: bool = False, progress: bool = False) -> None:
        """Write ``layers``, ``heads``, ``positions``, ``log_probs``, ``neurons`` (Parquet) and
        ``run.json``; with ``report`` also ``report.html`` and ``cards.json``, which it shows.

        ``neurons`` holds the value neurons, then (role ``query``) as many of ``query_neurons()``
        as were ranked of a kind, each with the ten tokens it raises and lowers most; where query
        neurons, or ``log_probs``, which both take the prompt to be run again, cannot be had,
        ``run.json`` warns of it. With a projection index ``suppressing`` and ``shares`` too, of as
        many neurons as were ranked. All files appear together at the end, or none. Cost: scores
        every head at every source position, with a progress bar on request where it takes longer
        than two seconds; and that of ``query_layers``. A report costs a ``neuron_card`` of each of
        the best neurons more (``report.CARDS`` of a kind).

        Raises:
            InputError: If the directory cannot be written to.
            OutputError: If writing fails on the way; nothing has changed then.
        """
        path = check_writable(directory)
        saved = self.saved(progress=progress)
        texts = {}
        if report:
            from tl_neuron_attr.report import report_files

            texts = report_files(self, saved)
        facts = json.dumps(saved.facts, indent=2, ensure_ascii=False)
        write_run(path, saved.tables, {**texts, "run.json": facts + "\n"})

    def report(self, path: str | Path, *, progress: bool = False) -> Path:
        """One HTML file with all that was found, to look at without a network; where it is.

        The same as ``save(directory, report=True)`` puts beside the tables. Cost: as that.

        Raises:
            InputError: If the file cannot be written.
            OutputError: If writing fails on the way; what was there before is untouched then.
        """
        from tl_neuron_attr.report import report_files, write_report

        place = check_file(path, "report.html")
        return write_report(report_files(self, self.saved(progress=progress)), place)

    def __repr__(self) -> str:
        target, prompt = self.target, self.captured.prompt
        warned = f", {counted(len(self.warnings), 'warning')}" * bool(self.warnings)
        return (
            f"Attribution of {target.words_and_ids} after {prompt.words}: {target.quantity} = "
            f"{self.log_prob:.4g} nats, {self.host.model_name}, {self.convention}, "
            f"the best {len(self.ffn_neurons)} FFN and "
            f"{len(self.attn_neurons)} attention neurons{warned}"
        )

    def _repr_html_(self) -> str:
        """For notebooks. Runs no model: the costliest part is one small matrix product."""
        host = self.host
        best = {"FFN": self.ffn_neurons.first(5), "Attention": self.attn_neurons.first(5)}
        messages = list(self.warnings)
        try:
            neurons = {
                name: self._table(ranked, self._blocks(ranked.kind), 5)
                for name, ranked in best.items()
            }
        except (RuntimeError, NeuronAttrError) as error:  # the model was moved, or its weights are
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            messages.append(f"neurons are shown without their tokens: {reason}")
            neurons = {name: self._table(ranked, (), 0) for name, ranked in best.items()}
        return attribution_box(
            Glance(
                prompt=self.captured.prompt,
                model=f"{host.model_name}, {host.architecture}, {counted(host.n_layers, 'layer')}",
                target=self.target,
                log_prob=self.log_prob,
                embedding_log_prob=self.embedding_log_prob,
                convention=self.convention,
                predictions=self.predictions(),
                layers=self.layers(),
                neurons=neurons,
                attn_neurons=neuron_table(self.attn_neurons, ""),
                certificates={
                    "FFN": str(self.ffn_neurons.certificate),
                    "attention": str(self.attn_neurons.certificate),
                },
                warnings=messages,
            )
        )

    def _blocks(self, kind: Kind) -> Sequence[Decomposition]:
        return self.ffns if kind == "ffn" else self.attns

    def _need_index(self) -> None:
        if self.index is None:
            raise InputError(
                "this takes the model's projection index; make one with projection_index(model) "
                "(on the command line --index DIR), and pass it: attribute(..., index=index)"
            )

    def _table(
        self, neurons: RankedNeurons, blocks: Sequence[Decomposition], tokens: int
    ) -> pd.DataFrame:
        table = self._with_experts(neuron_table(neurons, self.captured.prompt.prompt_id))
        return table.join(self._token_columns(neurons, blocks, tokens)) if tokens > 0 else table

    def _with_experts(self, table: pd.DataFrame) -> pd.DataFrame:
        return with_experts(table, self.host.n_experts, self.host.d_expert)

    def _query_table(self, found: QueryNeurons, *, by_position: bool, tokens: int) -> pd.DataFrame:
        prompt_id = self.captured.prompt.prompt_id
        by_position = by_position or tokens > 0
        table = self._with_experts(query_neuron_table(found, prompt_id, position=by_position))
        if tokens > 0:
            blocks = self._blocks(found.neurons.kind)
            table = table.join(self._token_columns(found.neurons, blocks, tokens))
        return table

    def _no_query_neurons(self, tokens: int) -> pd.DataFrame:
        nothing = QueryNeurons(
            neurons=self.ffn_neurons.first(0), position=self.ffn_neurons.layer[:0]
        )
        return self._query_table(nothing, by_position=False, tokens=tokens)

    def _sources_of(self, values: Sequence[RankedNeurons]) -> Sources | None:
        """What happened where these neurons are set off, if not at the read position."""
        positions = {
            position
            for ranked in values
            if ranked.source_pos is not None
            for position in ranked.source_pos.tolist()
        } - {self.captured.prompt.read_pos}
        if not positions:
            return None
        if positions <= set(self._sources.positions.tolist()):
            return self._sources
        return capture_sources(self.host, self.captured, positions)

    @cached_property
    def _sources(self) -> Sources:
        """What happened where the best attention neurons are set off: a second forward pass.

        Of no more than are asked about by default: of hundreds it would be a long prompt's whole.
        """
        positions = self._attn_values.first(TOP_VALUES).source_pos
        assert positions is not None
        return capture_sources(self.host, self.captured, positions.tolist())

    def _best_values(self, kind: Kind, count: int) -> RankedNeurons:
        """So many of the best, ranked now where ``attribute`` was asked for fewer."""
        ranked = self.ffn_neurons if kind == "ffn" else self._attn_values
        if len(ranked) < count:
            ranked = self._ranked(kind, count)
        return ranked.first(count)

    @cached_property
    def _attn_values(self) -> RankedNeurons:
        """The best attention neurons: as many as query neurons are found of, or more."""
        ranked = self.attn_neurons
        return ranked if len(ranked) >= TOP_VALUES else self._ranked("attn", TOP_VALUES)

    def _ranked(self, kind: Kind, count: int) -> RankedNeurons:
        with torch.no_grad():
            return top_neurons(self._blocks(kind), self.out, self.target, count)

    def _token_columns(
        self,
        neurons: RankedNeurons,
        blocks: Sequence[Decomposition],
        k: int,
    ) -> pd.DataFrame:
        # the sign rule: with a negative coefficient a neuron raises the bottom of its subvalue
        signs = torch.where(neurons.coefficient < 0, -1.0, 1.0)
        if self.index is not None and k <= self.index.k:
            row = neurons.index
            if neurons.head is not None:
                row = neurons.head * self.host.d_head + row
            ends = self.index.tokens(neurons.kind, neurons.layer, row, sign=signs, k=k)
        else:
            with torch.no_grad():
                ends = project(self.out, signs[:, None] * subvalues_of(blocks, neurons), k)
        ids = {*ends.top_ids.flatten().tolist(), *ends.bottom_ids.flatten().tolist()}
        text_of = {token: self.host.token_text(token) for token in ids}
        return token_columns(neurons, ends, self.captured.prompt.token_texts, text_of)


def named_neurons(of: ValueNeurons) -> list[FFNNeuron | AttnNeuron]:
    """The neurons given: one or several, as values or as labels.

    Raises:
        InputError: If a label cannot be read.
    """
    given = [of] if isinstance(of, (str, FFNNeuron, AttnNeuron)) else of
    if not isinstance(given, Iterable):
        raise InputError(f"of must be 'attn', 'ffn', 'both' or neurons; got {of!r}")
    try:
        return [parse_neuron(each) if isinstance(each, str) else each for each in given]
    except ValueError as error:
        raise InputError(f"of must be 'attn', 'ffn', 'both' or neurons: {error}") from error


def _kinds(kind: Kind | None) -> tuple[Kind, ...]:
    if kind is None:
        return ("ffn", "attn")
    if kind not in ("ffn", "attn"):
        raise InputError(f"kind must be 'ffn', 'attn' or None for both, got {kind!r}")
    return (kind,)


def _first(neurons: RankedNeurons, blocks: Sequence[Decomposition], top: int) -> RankedNeurons:
    if len(neurons) < min(top, sum(block.n_neurons for block in blocks)):
        raise InputError(
            f"only the best {len(neurons)} {neurons.kind} neurons were ranked; "
            f"call attribute(..., top={top})"
        )
    return neurons.first(top)


def _best(table: pd.DataFrame, top: int) -> pd.DataFrame:
    ordered = table.sort_values("score", ascending=False, kind="stable")
    return ordered.head(at_least_one(top, "top")).reset_index(drop=True)


def query_facts(scores: QueryScores) -> dict[str, Any]:
    """How many value neurons query scores are of, and how many are in no sum, ready for JSON."""
    return {
        "convention": scores.convention,
        "value_neurons": len(scores.left_out),
        "ill_conditioned": int(scores.ill_conditioned.sum()),
        "left_out": int(scores.left_out.sum()),
    }


def progress_bar(total: int, unit: str, show: bool) -> Any:
    """A bar for ``total`` steps, shown where they take longer than two seconds, if at all."""
    return tqdm(total=total, unit=unit, delay=2, leave=False, disable=not show)


def versions() -> dict[str, str]:
    """Which Python, and which versions of what scores depend on."""
    names = {name: version_of(name) for name in _VERSIONED}
    return {"python": platform.python_version(), **names}


def version_of(package: str) -> str:
    """The version of an installed package, or ``not installed``."""
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "not installed"
